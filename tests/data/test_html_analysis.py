"""The older era's HTML: every score and text kept, however badly the page was written."""

import pytest

from common.data.html_analysis import html_to_analysis
from integration.lora_patch.analysis import AnalysisError


def card(name: str, score: object, comment: str, recommendation: str) -> str:
    return (
        f'<div class="feedback-card"><h3>{name} <span class="dimension-score">({score}/10)</span></h3>'
        f'<p class="feedback-comment">{comment}</p>'
        f'<div class="feedback-recommendation"><strong>Recommendation:</strong> {recommendation}</div></div>'
    )


def page(
    cards: str, advisor: str = "ansel", grade: str = '<p class="overall-grade"><strong>8.1/10</strong></p>'
) -> str:
    return (
        f'<div class="advisor-section" data-advisor="{advisor}"><div class="analysis"><h2>Image Analysis</h2>'
        f"<p>A ridge at dusk.</p><h2>Detailed Feedback</h2>{cards}<h2>Overall Grade</h2>{grade}"
        '<p class="grade-note">(Average of all dimension scores)</p></div></div><hr class="advisor-divider" />'
    )


WHOLE = {
    "image_description": "A ridge at dusk.",
    "dimensions": [
        {"name": "Composition", "score": 8, "comment": "Strong & calm.", "recommendation": "Crop."},
        {"name": "Lighting", "score": 7, "comment": "Flat.", "recommendation": "Wait for x < 5 minutes."},
    ],
    "overall_score": 8.1,
}
CARDS = card("Composition", 8, "Strong & calm.", "Crop.") + card("Lighting", 7, "Flat.", "Wait for x < 5 minutes.")


def test_a_page_as_asked_for():
    assert html_to_analysis(page(CARDS), "ansel") == (WHOLE, [])


def test_unclosed_elements():
    assert html_to_analysis(page(CARDS.replace("</div>", "").replace("</p>", "")), "ansel") == (WHOLE, [])
    assert html_to_analysis(page(CARDS).replace("</span>", "").replace("</strong>", ""), "ansel")[0] == WHOLE


def test_inline_markup_lists_and_entities_are_kept():
    html = page(
        card("Depth &amp; Perspective", "7.5", "A <em>very</em> <b>deep</b><br>view", "<ul><li>go<li>wait</ul>")
    )
    analysis, mends = html_to_analysis(html, "ansel")
    assert analysis["dimensions"] == [
        {"name": "Depth & Perspective", "score": 7.5, "comment": "A very deep view", "recommendation": "go wait"}
    ]
    assert mends == []


def test_cards_out_of_the_ordinary():
    cards = (
        '<div class="feedback-card"><h4>Composition (8/10)</h4>Plain words.<p><b>Recommendation:</b> Do <i>it</i>.</p>'
        "</div>"
        '<div class="feedback-card"><h3>ColorHarmony</h3><span class="dimension-score">Score: 9/10</span>'
        '<p class="feedback-comment">One.</p><p class="feedback-comment">Two.</p></div>'
        '<div class="feedback-card"><h3>Overall Grade</h3><p class="overall-grade"><strong>6.5/10</strong></p></div>'
    )
    analysis, mends = html_to_analysis(page(cards, grade=""), "ansel")
    assert analysis["dimensions"] == [
        {"name": "Composition", "score": 8, "comment": "Plain words.", "recommendation": "Do it."},
        {"name": "Color Harmony", "score": 9, "comment": "One. Two."},
    ]
    assert analysis["overall_score"] == 6.5
    assert mends == ["dimension_names"]


def test_of_several_sections_the_advisors_own():
    both = page(card("Composition", 3, "Weston's.", "Less."), "weston") + page(CARDS)
    assert html_to_analysis(both, "ansel")[0] == WHOLE
    assert html_to_analysis(both.replace("</div>", ""), "ansel")[0] == WHOLE
    with pytest.raises(AnalysisError) as error:
        html_to_analysis(both, "okeefe")
    assert error.value.reason == "wrong_advisor"


def test_an_echo_of_the_prompt_before_the_answer():
    echo = page(card("Composition", 8, "[What works]", "[Specific advice]"))
    assert html_to_analysis(echo + page(CARDS), "ansel")[0] == WHOLE
    with pytest.raises(AnalysisError) as error:
        html_to_analysis(echo, "ansel")
    assert error.value.reason == "prompt_echo"


def test_a_card_without_a_score():
    with pytest.raises(AnalysisError) as error:
        html_to_analysis(page('<div class="feedback-card"><h3>Lighting</h3><p>Flat.</p></div>'), "ansel")
    assert error.value.reason == "missing_score"


def test_sections_of_lists():
    more = (
        "<h2>Key Strengths</h2><ul><li>Light <b>and</b> air</li><li>Scale</li></ul><h2>Technical Notes</h2><p>f/64.</p>"
    )
    analysis, _ = html_to_analysis(page(CARDS + more), "ansel")
    assert analysis["key_strengths"] == ["Light and air", "Scale"]
    assert analysis["technical_notes"] == "f/64."

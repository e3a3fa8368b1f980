"""The prompt is the service's, and what it asks for is read from it."""

import sqlite3

from integration.lora_patch.prompts import (
    DEFAULT_SYSTEM_PROMPT,
    build_prompt,
    demands_html,
    prompt_dimensions,
    prompt_example_scores,
    read_prompts,
)

SEVEN = ["Composition", "Lighting", "Focus & Sharpness", "Color Harmony", "Depth & Perspective", "Visual Balance",
         "Emotional Impact"]  # fmt: skip
HTML = """You MUST output clean, valid HTML. <div class="feedback-card">
<h3>Composition <span class="dimension-score">(8/10)</span></h3>
<h3>Focus & Sharpness <span class="dimension-score">(9/10)</span></h3>
<p class="overall-grade"><strong>8.1/10</strong></p> as <AdvisorName> would"""


def test_the_prompt_is_built_byte_for_byte():
    assert build_prompt("You judge as <AdvisorName>.\n", "weston", "See form.\n") == (
        "You judge as weston.\n\n\nSee form.\n\n\nAnalyze the provided image."
    )


def test_what_a_prompt_asks_for():
    assert prompt_dimensions(DEFAULT_SYSTEM_PROMPT) == SEVEN
    assert prompt_dimensions(HTML) == ["Composition", "Focus & Sharpness"]
    assert not demands_html(DEFAULT_SYSTEM_PROMPT) and demands_html(HTML)


def test_the_built_in_prompt_has_no_scores_to_copy():
    assert prompt_example_scores(DEFAULT_SYSTEM_PROMPT) == ([], None)
    assert prompt_example_scores(HTML) == ([8, 9], 8.1)
    assert prompt_example_scores('{"score": 8, "overall_score": 7.4}') == ([8], 7.4)


def test_prompts_are_read_as_text_or_blob_and_may_be_absent():
    connection = sqlite3.connect(":memory:")
    assert read_prompts(connection, "ansel") == (None, None)
    connection.executescript("CREATE TABLE config (key TEXT, value); CREATE TABLE advisors (id TEXT, prompt TEXT)")
    connection.execute("INSERT INTO config VALUES ('system_prompt', ?)", ("Größe\n".encode(),))
    connection.execute("INSERT INTO advisors VALUES ('ansel', 'See light.')")
    assert read_prompts(connection, "ansel") == ("Größe\n", "See light.")
    assert read_prompts(connection, "nobody").advisor_prompt is None

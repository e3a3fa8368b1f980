"""From the older era's HTML feedback cards to the analysis object, every score and text kept.

    analysis, mends = html_to_analysis(html, advisor="ansel")

The HTML was written by a model: elements stay unclosed, ampersands bare, cards out of the ordinary. So the page is
read in document order, and each text belongs to the innermost element that says what it is: a card that swallows the
next one because its <div> was never closed reads like two cards side by side.
"""

import re
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser, LexborNode

from integration.lora_patch.analysis import AnalysisError, number
from integration.lora_patch.specification import KEYS, canonical_name

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = {"p", "div", "li", "ul", "ol", "br", "tr", "td", "section", *HEADINGS}
# digits are counted, and begin where no digit stands before them, so that a text of digits is read in linear time
_NUMBER = r"(?<![\d.])(-?\d{1,6}(?:\.\d{1,15})?)(?!\d)"
_ENDS = r"(?:/|out of)\s?(5|10|20|50|100)(?!\d)"
_SCORE = re.compile(rf"\(?\s?(?:score|grade|rating)?\s?:?\s?{_NUMBER}\s?{_ENDS}\s?\)?", re.I)
_MAX_ELEMENTS = 3_000  # tags; a page of nine advisors has 900
_MAX_TITLE = 100  # characters
_SILENT = {"script", "style", "-comment", "!--", "template", "title"}
# what a class declares the text of its element to be; "score" before the others, since it stands inside them
_DECLARED = (
    ("dimension-score", "score"),
    ("grade-note", "note"),
    ("overall-grade", "overall"),
    ("comment", "comment"),
    ("recommendation", "recommendation"),
)
_LABEL = re.compile(r"\s*(?:Recommendations?|Suggestions?)\s*:\s*", re.I)
_PLACEHOLDER = re.compile(r"\[[^\[\]]*\]")
# <h2> headings and what stands under them
_SECTIONS = (
    (re.compile(r"image (analysis|description)|^description|^summary", re.I), "image_description"),
    (re.compile(r"overall|final (grade|score)", re.I), "overall_score"),
    (re.compile(r"strengths", re.I), "key_strengths"),
    (re.compile(r"improvements", re.I), "priority_improvements"),
    (re.compile(r"technical notes", re.I), "technical_notes"),
)


@dataclass
class _Card:
    title: list[str] = field(default_factory=list)
    score: list[str] = field(default_factory=list)
    comment: list[str] = field(default_factory=list)
    recommendation: list[str] = field(default_factory=list)
    recommending: bool = False  # an unmarked text after "Recommendation:" belongs to the recommendation


@dataclass
class _Page:
    cards: list[_Card] = field(default_factory=list)
    sections: dict[str, list[str]] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)  # text that is in no card and under no known heading


def is_html_analysis(text: str) -> bool:
    """Tell whether a text is meant as feedback cards."""
    return "feedback-card" in text or "dimension-score" in text or "feedback-comment" in text


def html_to_analysis(html: str, advisor: str | None = None, highest: float = 10) -> tuple[dict, list[str]]:
    """Return (analysis, mends) of a page of feedback cards; of several sections, the one of ``advisor``.

    ``highest`` is where the range of scores ends that its prompt asks for.

    The last whole answer counts when the page holds an echo of the prompt and an answer; of two cards of one
    dimension, the first. Raises AnalysisError ("wrong_advisor", "prompt_echo", "missing_score", "no_cards",
    "no_scores", "wrong_dimensions", "too_large").
    """
    if html.count("<") > _MAX_ELEMENTS:  # some nestings of elements take a parser quadratic time
        raise AnalysisError("too_large", f"HTML of {html.count('<'):,} elements")
    pages = [page for page in _read(html, advisor) if page.cards]
    if not pages:
        raise AnalysisError("no_cards", "HTML without a feedback card")
    answers = [page for page in pages if not _is_placeholder(page)]
    if not answers:
        raise AnalysisError("prompt_echo", "the prompt's own HTML example, placeholders and all")
    page = answers[-1]
    mends: list[str] = []
    dimensions: dict[str, dict] = {}
    for card in page.cards:
        item = _dimension(card, page, highest, mends)
        if item and dimensions.setdefault(item["name"], item) is not item:
            mends.append("doubled_cards")
    if not dimensions:
        raise AnalysisError("no_scores", "feedback cards without a scored dimension")
    if page.outside:
        mends.append("text_outside_cards")
    analysis: dict[str, object] = {"dimensions": list(dimensions.values())}
    for key, parts in page.sections.items():
        if key == "overall_score":
            match = _SCORE.search(_joined(parts)) or re.search(_NUMBER, _joined(parts))
            overall = number(match[1]) if match else None
            if overall is not None:
                analysis[key] = overall
        elif key in ("key_strengths", "priority_improvements"):
            analysis[key] = [text for text in map(_clean, parts) if text]
        elif text := _joined(parts):
            analysis[key] = text
    return {key: analysis[key] for key in KEYS if analysis.get(key)}, list(dict.fromkeys(mends))


# ------------------------------------------------------------------------------------------------ reading the page


def _read(html: str, advisor: str | None) -> list[_Page]:
    body = LexborHTMLParser(html).body
    if body is None:
        return []
    wanted = _wanted_section(body, advisor)
    pages = [_Page()]
    section: str | None = None  # what the last heading announced
    card: _Card | None = None
    breaks = False  # whether a space or a block element came since the last text
    starts = False  # whether a list item began since the last text
    # depth first in document order; with each node goes what the elements around it say that it is
    stack = [(body, "", wanted is None)]
    while stack:
        node, kind, inside = stack.pop()
        if node.next is not None and node is not body:
            stack.append((node.next, kind, inside))
        tag = node.tag
        if tag == "-text":
            text = node.text_content or ""
            if text.isspace():
                breaks = True
            elif inside and text:
                _place(pages[-1], card, section, kind, f" {text}" if breaks else text, starts)
                breaks = starts = False
            continue
        if tag in _SILENT:
            continue
        breaks = breaks or tag in _BLOCKS
        starts = starts or tag == "li"
        attributes = node.attributes or {}
        classes = attributes.get("class") or ""
        if "data-advisor" in attributes:
            inside = wanted is None or attributes["data-advisor"] == wanted
            kind = ""
        if "feedback-card" in classes:
            kind = ""  # a card inside an unclosed one is a card of its own
            if inside:
                card, section = _Card(), None
                pages[-1].cards.append(card)
        elif tag in HEADINGS:
            title = _clean(node.text(deep=True))
            scored = bool(_SCORE.search(title))
            announced = None if scored else _section_of(title)
            kind = "heading" if announced or (tag in ("h1", "h2") and not scored) else "title"
            if not inside:
                pass
            elif kind == "heading":
                if announced == "image_description" and pages[-1].cards:
                    pages.append(_Page())  # a second answer in the same text
                card, section = None, announced
            elif card is None or card.title:
                card, section = _Card(), None
                pages[-1].cards.append(card)
        else:
            kind = _kind(tag, classes, kind)
        if node.child is not None:
            stack.append((node.child, kind, inside))
    return pages


def _kind(tag: str, classes: str, around: str) -> str:
    """Say what an element's own text is: as its class declares it, else as the element around it does."""
    for part, kind in _DECLARED:
        if part in classes:
            return kind
    return "item" if tag == "li" and not around else around


def _place(page: _Page, card: _Card | None, section: str | None, kind: str, text: str, starts: bool) -> None:
    """Put a text where it belongs: what the elements around it say that it is, else what came before it."""
    if kind == "overall":
        page.sections.setdefault("overall_score", []).append(text)
    elif kind in ("note", "heading"):
        return
    elif card is not None:
        if kind == "":
            card.recommending = card.recommending or bool(_LABEL.match(text))
            kind = "recommendation" if card.recommending else "comment"
        getattr(card, "comment" if kind == "item" else kind).append(text)
    elif section:
        texts = page.sections.setdefault(section, [])
        if kind == "item" and starts or not texts:
            texts.append(text)
        else:
            texts[-1] += text
    elif not page.cards and kind != "title" and "image_description" not in page.sections:
        page.sections["image_description"] = [text]
    else:
        page.outside.append(text)


def _section_of(title: str) -> str | None:
    return next((key for pattern, key in _SECTIONS if pattern.search(title)), None)


def _wanted_section(body: LexborNode, advisor: str | None) -> str | None:
    """Return the data-advisor of the section to read; None for a page without sections."""
    names = list(dict.fromkeys(node.attributes.get("data-advisor") or "" for node in body.css("[data-advisor]")))
    if not names or advisor is None:
        return None
    for name in names:
        if name.strip().lower() == advisor.strip().lower():
            return name
    raise AnalysisError("wrong_advisor", f"holds the analysis of {', '.join(names)[:80]}, not of {advisor}")


# ------------------------------------------------------------------------------------------------ reading a card


def _dimension(card: _Card, page: _Page, highest: float, mends: list[str]) -> dict | None:
    """Return the dimension on a card; None for a card that carries the overall grade or nothing."""
    title, scored, comment = _joined(card.title), _joined(card.score), _joined(card.comment)
    if not title and comment:  # a card without a heading: its first words are the title if a score ends them
        match = _SCORE.search(comment)
        if match and match.start() <= 60:
            title, comment = comment[: match.end()], comment[match.end() :].lstrip(" :-\u2013\u2014")
    match = _SCORE.search(scored) or re.search(_NUMBER, scored)
    if match is None:
        match = _SCORE.search(title)
        title = title[: match.start()] + title[match.end() :] if match else title
    name = title.strip(" :-\u2013\u2014()")
    if match is None:
        if _section_of(name) == "overall_score" or not (name or comment or card.recommendation):
            return None
        raise AnalysisError("missing_score", f"the card {name[:40]!r} has no score")
    if _section_of(name) == "overall_score":
        page.sections.setdefault("overall_score", [match[1]])
        return None
    if not 0 < len(name) <= _MAX_TITLE:
        raise AnalysisError("wrong_dimensions", f"a card of the title {name[:40]!r}")
    proper = canonical_name(name)
    if proper != name:
        mends.append("dimension_names")
    score, ends = number(match[1]), match[2] if match.re is _SCORE else None
    if score is None or (ends and float(ends) != highest):
        what = f"{match[1][:40]}{f'/{ends}' if ends else ''}"
        raise AnalysisError("missing_score", f"the score of {proper[:40]} is {what}, not a number out of {highest:g}")
    recommendation = _LABEL.sub("", _joined(card.recommendation), count=1)
    texts = {"comment": comment, "recommendation": recommendation}
    return {"name": proper, "score": score, **{key: text for key, text in texts.items() if text}}


def _is_placeholder(page: _Page) -> bool:
    comments = [_joined(card.comment) for card in page.cards if card.comment]
    return bool(comments) and all(_PLACEHOLDER.fullmatch(comment) for comment in comments)


def _joined(parts: list[str]) -> str:
    return _clean("".join(parts))


def _clean(text: str) -> str:
    return " ".join(text.split())

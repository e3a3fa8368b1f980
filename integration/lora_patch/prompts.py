"""The prompt: the text that the service sends with a photograph, and what it demands of the answer.

    prompt = build_prompt(system_prompt, "ansel", advisor_prompt)
    specification = read_specification(prompt)            # or UnreadablePrompt, which asks for --dimensions

A prompt shows the answer as a JSON example, which may be no sound JSON (`"score": <1-10>`, `...`) and may show fewer
dimensions than the text around it asks for. So the keys and the form of the scores are read from the example, and the
dimensions from the example or from the list in the text that goes on where the example stops.
"""

import functools
import html
import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .errors import LoraError
from .json_text import balanced_end, is_number, without_trailing_commas
from .score_range import USUAL, parse_score_range, read_score_range
from .specification import (
    DIMENSION_KEYS,
    DIMENSION_SPELLINGS,
    DIMENSIONS7,
    DIMENSIONS8,
    KEYS,
    SPELLINGS,
    STANDARD,
    Field,
    PromptSpecification,
    canonical_key,
    canonical_name,
    squeezed,
)

DEFAULT_SYSTEM_PROMPT = """\
You are a photography critic. Study the photograph and answer with one JSON object and nothing else: no Markdown, \
no code fence, no text before the opening { or after the closing }.

The object has exactly these keys, in this order:

{
  "image_description": "<two or three sentences on what the photograph shows>",
  "dimensions": [
    {"name": "Composition", "score": <1-10>, "comment": "<what works and what does not>", \
"recommendation": "<what to do better>"},
    {"name": "Lighting", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Focus & Sharpness", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Color Harmony", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Depth & Perspective", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Visual Balance", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Emotional Impact", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"}
  ],
  "overall_score": <the mean of the seven scores, one decimal>,
  "key_strengths": ["<two or three>"],
  "priority_improvements": ["<two or three>"],
  "technical_notes": "<exposure, lens, processing, as far as they can be seen>"
}

Write in English. Give whole-number scores from 1 to 10 by what this photograph deserves. Refer to what is visible \
in it; keep each recommendation under 50 words. Judge as the advisor below would.
"""


class Prompts(NamedTuple):
    """What a Mondrian database says to the model; a text that it lacks is None."""

    system_prompt: str | None
    advisor_prompt: str | None


def build_prompt(system_prompt: str, advisor: str, advisor_prompt: str) -> str:
    """Return the service's prompt, byte for byte: its jobs show the advisor's id in place of ``<AdvisorName>``."""
    system_prompt = system_prompt.replace("<AdvisorName>", advisor)
    return f"{system_prompt}\n\n{advisor_prompt}\n\nAnalyze the provided image."


def demands_html(system_prompt: str) -> bool:
    """Tell whether a system prompt is of the older era, which asked for HTML instead of JSON."""
    return "feedback-card" in system_prompt or bool(re.search(r"valid HTML|raw HTML|output HTML", system_prompt, re.I))


def read_prompts(connection: sqlite3.Connection, advisor: str) -> Prompts:
    """Read the system prompt (``config``, text or BLOB) and the advisor's (``advisors``) from a Mondrian database."""
    return Prompts(
        _text(connection, "SELECT CAST(value AS BLOB) FROM config WHERE key = ?", "system_prompt"),
        _text(connection, "SELECT CAST(prompt AS BLOB) FROM advisors WHERE id = ?", advisor)
        or _text(connection, "SELECT CAST(prompt AS BLOB) FROM advisors WHERE lower(trim(id)) = ?", advisor.lower()),
    )


def _text(connection: sqlite3.Connection, query: str, key: str) -> str | None:
    try:
        row = connection.execute(query, (key,)).fetchone()
    except sqlite3.OperationalError:  # an older database without the table or the column
        return None
    except (sqlite3.Error, UnicodeDecodeError) as error:  # some messages of a damaged database are no UTF-8
        raise LoraError(f"its prompts cannot be read ({error}); copy or repair the database") from error
    # read as bytes: some versions stored a BLOB, and one damaged character must not end the run
    return row[0].decode("utf-8", "replace") if row and row[0] else None


# ------------------------------------------------------------------------------------------------ what it demands


class UnreadablePrompt(LoraError):
    """A prompt from which the dimensions that it asks for cannot be told."""


_MAX_PROMPT = 100_000  # characters; the longest real prompt has 8,000
_MAX_TRIES = 200  # braces at which an example is looked for
_NUMBERS = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_COUNT = re.compile(rf"\b(\d{{1,2}}|{'|'.join(_NUMBERS)})\s+(?:[\w-]+\s+){{0,2}}dimensions\b", re.I)
_SAMPLE = re.compile(  # the tokens of an example: strings, comments, placeholders, ellipses, ranges, numbers, the rest
    r'"(?:[^"\\]|\\.)*+"?|//[^\n]*|/\*[^*]{0,500}\*/|<[^<>"\n]{0,300}>|\.\.\.|\u2026|'
    r"\d+(?:\.\d+)?\s*(?:-|\u2013|to)\s*\d+(?:\.\d+)?|-?\d+(?:\.\d+)?|[^\"/<.\u2026\d-]+|.",
    re.S,
)
_ELIDED = re.compile(
    r"\}\s*,?\s*(?:\.\.\.|\u2026|/[/*][^\n]*(?:\.\.|\b(?:more|other|same|rest|each|etc|remaining|repeat)))", re.I
)
_BARE = re.compile(r":(\s*)(?!\s|true|false|null)[A-Za-z][^,}\]\n]*")  # `"score": number`
_ITEM = re.compile(  # a line of a list: numbered, with a bullet, a heading, or a bold beginning
    r"(?P<indent>\s{0,40})(?:(?P<mark>[-*+\u2022]|\#{1,6})\s+|(?:[A-Za-z]{4,9}\s+)?(?P<number>\d{1,2})\s*[.):\u2013-]\s*"
    r"|(?=\*\*))(?:\*\*|__|[\"'`])?(?P<name>[A-Za-z][\w&/'\u2019 -]{1,38}?)(?:\*\*|__|[\"'`])?"
    r"\s*(?:[-\u2013\u2014:(,;.]|\*\*|$)"
)
_NUMBER = r"\d{1,4}(?:\.\d{1,6})?"
_NAME = re.compile(r"[A-Za-z][\w&/'\u2019-]*(?: [\w&/'\u2019-]+){0,3}")


@dataclass(frozen=True)
class _Example:
    """The answer that a prompt shows."""

    fields: dict[str, Any]  # of the object
    names: list[str]  # of its dimensions
    dimensions: list[dict]  # scores as written
    listed: bool  # as a list, else as an object keyed by name
    whole: bool  # without an ellipsis among the dimensions
    span: tuple[int, int]  # where it stands in the prompt


@functools.lru_cache(512)
def read_specification(
    prompt: str, dimensions: str | None = None, score_range: str | None = None
) -> PromptSpecification:
    """Return what a prompt demands of an answer, with the dimensions of ``dimensions`` ("7", "8" or names separated
    by commas) and the ``score_range`` ("0-100") where they are given. UnreadablePrompt says what cannot be told from
    it, and asks for --dimensions.
    """
    prompt = prompt[:_MAX_PROMPT]
    example = _example_of(prompt)
    shown = example.names if example else _names_in_pieces(prompt)
    around = prompt[: example.span[0]] + "\n" + prompt[example.span[1] :] if example else prompt
    whole = example.whole if example else True
    names = _given(dimensions, shown) if dimensions else _asked_for(around, list(dict.fromkeys(shown)), whole)
    scores, overall = _example_scores(example, prompt)
    ends = parse_score_range(score_range) if score_range else read_score_range(prompt, scores)
    specification = PromptSpecification(
        names, example_scores=scores, example_overall=overall, thinking="</think" in prompt, score_range=ends or USUAL
    )
    return _with_fields(specification, example, around) if example else specification


@functools.lru_cache(512)
def told_range(prompt: str) -> tuple[float, float] | None:
    """Return (lowest, highest) score that a prompt asks for; None where it does not tell."""
    return read_score_range(prompt[:_MAX_PROMPT], _example_scores(_example_of(prompt[:_MAX_PROMPT]), prompt)[0])


@functools.lru_cache(64)
def _example_of(prompt: str) -> "_Example | None":
    return max(_examples(prompt), key=lambda e: (len(e.dimensions), len(e.fields)), default=None)


def _examples(prompt: str) -> Iterator[_Example]:
    at, tries, ends = prompt.find("{"), 0, {}
    while at >= 0 and tries < _MAX_TRIES:
        end, tries = balanced_end(prompt, at, ends), tries + 1
        shows = end and any(f'"{key}"' in prompt[at:end] for key in SPELLINGS["dimensions"])
        try:
            value = json.loads(without_trailing_commas(_tidied(prompt[at:end])), strict=False) if shows else None
        except (ValueError, RecursionError):
            value = None
        dimensions = next((value[k] for k in SPELLINGS["dimensions"] if k in value), None) if value else None
        if isinstance(dimensions, dict):
            named = [(name, item) for name, item in dimensions.items() if isinstance(item, dict)]
        else:
            items = [item for item in dimensions if isinstance(item, dict)] if isinstance(dimensions, list) else []
            named = [(name, item) for item in items if (name := _name_of(item))]
        if dimensions is not None:
            whole = not _ELIDED.search(re.sub(r'"(?:[^"\\]|\\.)*+"', "", prompt[at:end]))
            names, entries = [name for name, _ in named], [item for _, item in named]
            yield _Example(value, names, entries, not isinstance(dimensions, dict), whole, (at, end))
        at = prompt.find("{", end if value is not None else at + 1)


def _name_of(item: dict) -> str | None:
    name = next((item[k] for k in DIMENSION_SPELLINGS["name"] if isinstance(item.get(k), str)), "")
    return name.strip() if name.strip() and "<" not in name else None


def _tidied(sample: str) -> str:
    """Make an example sound JSON: placeholders become null, ellipses and comments go."""

    def sound(token: str) -> str:
        if token.startswith(('"', "-")) or token[0].isdigit():
            return "null" if re.match(r"\d+(?:\.\d+)?\s*(?:-|\u2013|to)", token) else token
        if token.startswith(("//", "/*")) or token in ("...", "\u2026"):
            return ""
        return "null" if len(token) > 1 and token[0] == "<" else _BARE.sub(r":\1null", token)

    return "".join(sound(token) for token in _SAMPLE.findall(sample))


def _names_in_pieces(prompt: str) -> list[str]:
    """Return the names that an HTML example shows, or a JSON example that cannot be read."""
    names = re.findall(r'"name"\s{0,9}:\s{0,9}"([^"<>]{1,100})"', prompt)
    if not names:
        names = [html.unescape(name.strip()) for name in re.findall(r"<h3>([^<]{1,100})<span", prompt)]
    return list(dict.fromkeys(names))


def _example_scores(example: _Example | None, prompt: str) -> tuple[tuple[float, ...], float | None]:
    if example:
        overall = next((example.fields[k] for k in SPELLINGS["overall_score"] if k in example.fields), None)
        scores = [_as_number(_score_of(dimension)) for dimension in example.dimensions]
        return tuple(score for score in scores if score is not None), _as_number(overall)
    scores = re.findall(rf'"score"\s{{0,9}}:\s{{0,9}}({_NUMBER})|dimension-score">\(({_NUMBER})\s?/', prompt)
    found = re.search(rf'"overall_score"\s{{0,9}}:\s{{0,9}}({_NUMBER})|overall-grade"><strong>({_NUMBER})\s?/', prompt)
    scores = [_as_number(one or other) for one, other in scores]
    return tuple(s for s in scores if s is not None), _as_number(found[1] or found[2]) if found else None


def _score_of(dimension: dict) -> Any:
    return next((dimension[key] for key in DIMENSION_SPELLINGS["score"] if key in dimension), None)


def _as_number(value: Any) -> float | None:
    if isinstance(value, str):
        match = re.fullmatch(rf"({_NUMBER})(?:\s*/\s*{_NUMBER})?\.?", value.strip())
        value = float(match[1]) if match else None
    return value if is_number(value) else None


# ------------------------------------------------------------------------------------------------ its dimensions


def _given(dimensions: str, shown: list[str]) -> tuple[str, ...]:
    """Return the dimensions that were named, spelled as the prompt's example spells them."""
    named = {"7": DIMENSIONS7, "8": DIMENSIONS8}.get(dimensions.strip())
    spelled = {canonical_name(name): name for name in shown}
    names = named or tuple(canonical_name(name) for name in dimensions.split(",") if name.strip())
    if not names or len(set(names)) < len(names) or all(name.strip().isdecimal() for name in names):
        raise LoraError(f'--dimensions {dimensions}: write "7", "8", or different names separated by commas')
    return tuple(spelled.get(name, name) for name in names)


def _asked_for(text: str, shown: list[str], whole: bool) -> tuple[str, ...]:
    """Return the dimensions that a prompt asks for, from those in its example and the ``text`` around that."""
    counts = [_NUMBERS.get(word.lower()) or int(word) for word in _COUNT.findall(text)]
    wanted = max((count for count in counts if len(shown) < count <= 20), default=0)
    if shown and whole and len(shown) in counts and not wanted:
        return tuple(shown)
    lists = [names for names in _lists(text) if _goes_on(names, shown)]
    if whole and len(shown) >= 3 and not wanted and not lists:
        return tuple(shown)
    fitting = [names for names in lists if len(names) == wanted or not wanted]
    if fitting:
        spelled = {canonical_name(name): name for name in shown}
        return tuple(spelled.get(canonical_name(name), name) for name in max(fitting, key=len))
    says = f"asks for {wanted} dimensions" if wanted else "does not say which dimensions it asks for"
    shows = f"its example shows {', '.join(shown[:4])}{' alone' if len(shown) == 1 else ''}" if shown else "shows none"
    shows = " ".join(shows.split())[:200]
    raise UnreadablePrompt(
        f"the prompt {says} and {shows}; name all of them in the prompt's order: --dimensions NAME,NAME,..."
    )


def _goes_on(names: list[str], shown: list[str]) -> bool:
    """Tell whether a list of the text starts as the example does and goes on where that stops."""
    found = [canonical_name(name) for name in names]
    if not shown:
        return len(found) >= 3 and all(squeezed(name) in STANDARD for name in found)
    rest = iter(found)
    return (
        len(set(found)) == len(found) > len(shown)
        and found[0] == canonical_name(shown[0])
        and all(canonical_name(name) in rest for name in shown)
    )


def _lists(text: str) -> Iterator[list[str]]:
    """Yield the lists of names in a text: its numbered, bulleted and bold lines, and names separated by commas."""
    current: dict[tuple[int, str], list[str]] = {}
    for line in text.splitlines():
        item = _ITEM.match(line)
        numbered = re.match(r"\s*\d{1,2}[.)]", line)
        indent = len(line) - len(line.lstrip())
        key = (indent, "1" if item["number"] else item["mark"] or "**") if item else None
        # bullets end at the next other line; the other lists continue over text under their lines
        ended = [
            k
            for k in current
            if k != key
            and line.strip()
            and k[0] >= indent
            and (k[1] in "-*+\u2022" or line.lstrip().startswith("#") or (k[1] == "1" and numbered))
        ]
        for k in [*ended, *([key] if item and item["number"] == "1" else [])]:
            yield current.pop(k, [])
        if item:
            current.setdefault(key, []).append(item["name"].strip())
        for sentence in re.split(r"(?<=[.!?])\s", line[:2000]):
            yield from _comma_lists(sentence)
    yield from current.values()


def _comma_lists(sentence: str) -> Iterator[list[str]]:
    pieces = re.split(r"[,;]", sentence)
    if len(pieces) < 2:
        return
    if squeezed(re.split(r"[.:)\]]", pieces[-1])[0]) not in STANDARD:
        pieces[-1:] = re.split(r"\band\b", pieces[-1], maxsplit=1)
    run: list[str] = []
    for piece in pieces:
        opening, rest = re.split(r"[:(\[{]", piece)[-1], re.split(r"[.:)(\[\]]", piece)[0]
        name = (rest if run else opening).strip(" \t\"'`*_.")
        endings = (" ".join(name.split()[-k:]) for k in (4, 3, 2, 1))  # of the words before the first comma
        name = name if run else next((ending for ending in endings if squeezed(ending) in STANDARD), name)
        if _NAME.fullmatch(name):
            run.append(name)
        elif run and piece.strip():
            break
    if len(run) >= 3:
        yield run


# ------------------------------------------------------------------------------------------------ its keys


def _with_fields(specification: PromptSpecification, example: _Example, text: str) -> PromptSpecification:
    """Return the specification with the keys of an example and the form of its scores."""
    scores = [_score_of(dimension) for dimension in example.dimensions]
    kind = _score_kind(scores, text)
    names = list(dict.fromkeys(key for dimension in example.dimensions for key in dimension))
    if not names:
        return specification
    dimension_fields = tuple(
        Field(
            name,
            {"score": kind}.get(key, "text" if key in DIMENSION_KEYS else _kind(_first(example.dimensions, name))),
            key in DIMENSION_KEYS or (all(name in d for d in example.dimensions) and not _is_optional(name, text)),
        )
        for name in names
        if (key := canonical_key(name, DIMENSION_SPELLINGS)) != "name" or example.listed
    )
    fields = tuple(
        Field(
            name, _key_kind(canonical_key(name, SPELLINGS), value, kind, example.listed), not _is_optional(name, text)
        )
        for name, value in example.fields.items()
    )
    return replace(specification, fields=fields, dimension_fields=dimension_fields)


def _key_kind(key: str, value: Any, score_kind: str, listed: bool) -> str:
    if key == "dimensions":
        return "list" if listed else "object"
    if key == "overall_score":
        if isinstance(value, str) and _as_number(value) is not None:
            return "of_ten" if "/" in value else "quoted"
        return "decimal" if score_kind == "decimal" else "number" if isinstance(value, int) else "mean"
    if key in KEYS:
        return "texts" if key in ("key_strengths", "priority_improvements") else "text"
    return _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "texts"
    return "text" if isinstance(value, str) else "any"


def _score_kind(scores: list[Any], text: str) -> str:
    """Return how a prompt wants a dimension's score written: as its example writes them, else as its text says."""
    quoted = [score for score in scores if isinstance(score, str) and _as_number(score) is not None]
    numbers = [score for score in scores if is_number(score)]
    if quoted:
        return "of_ten" if any("/" in score for score in quoted) else "quoted"
    if any(isinstance(score, float) and score.is_integer() for score in numbers):
        return "decimal"
    if numbers:
        return "whole" if all(isinstance(score, int) for score in numbers) else "number"
    return "whole" if re.search(r"whole[- ]numbers?|integers?", text, re.I) else "number"


def _first(dimensions: list[dict], name: str) -> Any:
    return next((dimension[name] for dimension in dimensions if name in dimension), None)


def _is_optional(name: str, text: str) -> bool:
    """Tell whether the text says of a key beyond the usual ones that it is optional."""
    if canonical_key(name, SPELLINGS) in KEYS:
        return False
    name, says = re.escape(name), r"\b(?:optional|omit\w*|(?<!not be )empty)\b"
    return bool(re.search(rf"{name}[^\n]{{0,200}}{says}|{says}[^\n]{{0,80}}{name}", text, re.I))

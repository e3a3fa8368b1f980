"""Answers that are wrapped in something: an object keyed by advisor, JSON inside a JSON string, HTML's entities.

for text in answers_in(parsed, "ansel"): ...
text, mend = unwrapped(stored, objects_in_it, "ansel")     # ("", "") for what is not wrapped
"""

import ast
import html
import json
import re
from collections.abc import Iterator
from typing import Any

from common.data.html_analysis import is_html_analysis
from integration.lora_patch.analysis import AnalysisError, looks_like_analysis
from integration.lora_patch.json_text import is_too_deep

# keys under which an answer stands
_ANSWERS = ("response", "output", "content", "text", "html", "analysis")
_ANSWERS += ("result", "data", "message", "messages", "choices", "answer")
_NAMED_BY = ("advisor", "advisor_id", "advisor_name")  # keys that name an answer's advisor
_STRING = re.compile(r'(?<!\\)"(?:\\+")?\s{0,9}\{\s{0,9}\\+"')  # JSON in a JSON string, with its quotes
_ESCAPED = re.compile(r'\{\s{0,9}\\+"')  # the same without
_ENTITIES = re.compile(r"\{\s{0,9}&quot;|&lt;div\b")
_PYTHON = re.compile(r"\{\s{0,9}'[a-z_]{1,40}'\s{0,9}:")  # what Python prints of a dictionary
_MAX_PYTHON, _MAX_BRACKETS = 60_000, 500


def answers_in(value: Any, advisor: str) -> Iterator[str | AnalysisError]:
    """Yield the answers in a parsed value: an object keyed by advisor, one with prompt and response, or a bare text."""
    if isinstance(value, list):
        value = _entry_of(value, advisor)
    if isinstance(value, dict) and not looks_like_analysis(value):
        own = [item for key, item in value.items() if advisor.strip().lower() in key.lower()]
        if own:
            value = own[0]
        elif value and not {"prompt", *_ANSWERS} & value.keys() and all(map(_is_answer, value.values())):
            names = ", ".join(str(key)[:30] for key in value)
            yield AnalysisError("wrong_advisor", f"holds the analysis of {names[:80]}, not of {advisor}")
            return
    if isinstance(value, dict) and not looks_like_analysis(value):
        answers = [value[key] for key in _ANSWERS if key in value]
        value = next((answer for answer in answers if answer), None) if answers or "prompt" in value else value
    if isinstance(value, str):
        yield value if value.strip() != "{}" else ""
    elif value and not is_too_deep(value):
        yield json.dumps(value, ensure_ascii=False)


def of_advisor(values: list[dict], advisor: str) -> list[dict]:
    """Return those of several answers that name their advisor as the one asked for; all where none names any.

    AnalysisError where all name others.
    """
    names = [next((str(value[key]) for key in _NAMED_BY if value.get(key)), "") for value in values]
    own = [value for value, name in zip(values, names, strict=True) if advisor.strip().lower() in name.lower()]
    if not own and len(values) > 1 and all(names):
        raise AnalysisError("wrong_advisor", f"holds the analyses of {', '.join(names)[:80]}, not of {advisor}")
    return own or values


def _entry_of(values: list, advisor: str) -> Any:
    """Return the entry of a list that holds the answer: the assistant's last turn, the advisor's own, the only one."""
    entries = [value for value in values if isinstance(value, dict)]
    turns = [entry.get("content") for entry in entries if entry.get("role") == "assistant"]
    if turns:
        return turns[-1]
    if len(values) == 1:
        return values[0]
    named = [entry for entry in entries if any(entry.get(key) for key in _NAMED_BY)]
    own = of_advisor(named, advisor) if named else []
    return own[0] if len(own) == 1 else values


def _is_answer(value: object) -> bool:
    """Tell whether an entry of `llm_outputs` is an analysis, and so its key the name of an advisor."""
    if isinstance(value, str):
        return is_html_analysis(value) or '"dimensions"' in value or '"dimensional_analysis"' in value
    return looks_like_analysis(value)


def unwrapped(text: str, objects: list[dict], advisor: str) -> tuple[str, str]:
    """Return (what a text without an analysis object wraps, the mend that this is); ("", "") for what wraps nothing.

    ``objects`` are those found in the text. AnalysisError for the analysis of another advisor.
    """
    if not objects and (inner := _decoded(text)):
        return inner, "double_encoded"
    if _ENTITIES.search(text) and "<div" not in text:
        return html.unescape(text), "html_entities"
    if (inner := _from_python(text)) is not None:
        return inner, "python_literal"
    for value in reversed(of_advisor(objects, advisor)):
        found = next(answers_in(value, advisor), "")
        if isinstance(found, AnalysisError):
            raise found
        if ("{" in found or is_html_analysis(found) or len(value) == 1) and found != json.dumps(
            value, ensure_ascii=False
        ):
            return found, "wrapped"
    return "", ""


def _decoded(text: str) -> str:
    """Return the text of a JSON string that holds JSON, with or without its quotes, or a page; "" for none."""
    decoder, whole = json.JSONDecoder(strict=False), text.strip()
    try:
        if whole[:1] == '"' and is_html_analysis(whole):
            return decoder.decode(whole)
        if found := _STRING.search(text):
            value, _ = decoder.raw_decode(text, found.start())
        elif found := _ESCAPED.search(text):
            value = decoder.decode(f'"{text[found.start() :].rstrip()}"')
        else:
            return ""
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _from_python(text: str) -> str | None:
    """Return as JSON what Python printed of a dictionary; None for anything else."""
    found = _PYTHON.search(text)
    piece = text[found.start() : text.rfind("}") + 1] if found else ""
    if not piece or len(piece) > _MAX_PYTHON or sum(map(piece.count, "[{(")) > _MAX_BRACKETS:
        return None
    try:
        return json.dumps(ast.literal_eval(piece), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None

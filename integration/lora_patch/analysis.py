"""The analysis object: one canonical form, made from every shape in which Mondrian's models have answered.

    analysis, mends = parse_lenient(model_output)     # what a forgiving reader makes of a text
    analysis, mends = canonical(parsed_answer)

The canonical keys, in order, are `KEYS`; a dimension's are `DIMENSION_KEYS`. Nothing is invented: a field that the
source lacks stays absent. How a prompt wants it written is `specification`'s.
"""

import itertools
import json
import re
from typing import Any

from .json_text import find_objects, is_number, is_too_deep, strings_in
from .specification import DIMENSION_KEYS, DIMENSION_SPELLINGS, KEYS, SPELLINGS, STANDARD, canonical_name, squeezed

_NUMBER = re.compile(
    r"\s*\(?\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*(?:(?:/|out of)\s*(\d{1,4})(?:\.0)?|(%))?\s*(?:points?|stars?)?\s*\)?\s*",
    re.I,
)
_MAX_NAME = 100  # characters of a dimension's name
_PLAIN = frozenset((*KEYS, *DIMENSION_KEYS, *sum(SPELLINGS.values(), ()), *sum(DIMENSION_SPELLINGS.values(), ())))
_KEYS = {squeezed(key): key for key in (*KEYS, *sum(SPELLINGS.values(), ()))}
_DIMENSION_KEYS = {squeezed(key): key for key in sum(DIMENSION_SPELLINGS.values(), ())}
_MAX_EXTRA = 8  # levels of what a prompt asks for beyond the canonical keys
_SCORE = DIMENSION_SPELLINGS["score"]
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class AnalysisError(ValueError):
    """A text that holds no usable analysis. ``reason`` is one of the names in `common.data.sources.REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


def number(value: Any, highest: float = 10) -> int | float | None:
    """Return a score as a finite number, whole ones as int; None for what is no number ("8/10" and "8.1" are).

    ``highest`` is where the range of scores ends: "4/5" is no score out of 10, "85%" one out of 100.
    """
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value[:100].strip("*_ "))  # Markdown's bold
        ends = float(match[2] or (100 if match[3] else highest)) if match else None
        value = float(match[1]) if ends == highest else None
    if not is_number(value):
        return None
    return int(value) if value == int(value) else value


# ------------------------------------------------------------------------------------------------ the canonical form


def canonical(value: dict, extra: frozenset[str] = frozenset(), highest: float = 10) -> tuple[dict, list[str]]:
    """Return (analysis, mends) of a parsed answer in any of its shapes: ``dimensions`` as a list, the object
    ``dimensional_analysis`` with snake_case names and ``overall_grade`` as a string, or one key a dimension.

    Keys beyond the canonical ones are kept where they are in ``extra`` (what the prompt asks for), else dropped.
    ``highest`` is where its range of scores ends.
    Raises AnalysisError ("no_scores", "misspelt_json", "missing_score") when no dimensions with scores are in it.
    """
    mends: list[str] = []
    value = _respelled(value, _KEYS, mends)
    listed = _listed_dimensions(value, mends)
    found: dict[str, Any] = {"dimensions": [_dimension(item, extra, highest, mends) for item in listed]}
    found["overall_score"] = number(_first(value, SPELLINGS["overall_score"])[0], highest)
    found["image_description"] = _text(_first(value, SPELLINGS["image_description"])[0])
    found["technical_notes"] = _text(value.get("technical_notes"))
    for key in ("key_strengths", "priority_improvements"):
        found[key] = _texts(value.get(key))
        if found[key] and isinstance(value[key], str):
            mends.append("list_from_text")
    analysis = {key: found[key] for key in KEYS if found[key] or found[key] == 0}
    analysis |= _extras(value, extra)
    if "flat_dimensions" not in mends and not {*KEYS, *sum(SPELLINGS.values(), ()), *extra} >= value.keys():
        mends.append("other_keys")
    if any(not text.isprintable() and _CONTROL.search(text) for text in strings_in(analysis)):
        analysis = _without_control_characters(analysis)
        mends.append("control_characters")
    return analysis, list(dict.fromkeys(mends))


def texts_of(analysis: dict) -> list[str]:
    """Return the texts of a canonical analysis, names left out."""
    texts = [analysis[key] for key in ("image_description", "technical_notes") if key in analysis]
    texts += [d[key] for d in analysis["dimensions"] for key in ("comment", "recommendation") if key in d]
    return texts + analysis.get("key_strengths", []) + analysis.get("priority_improvements", [])


def _without_control_characters(value: Any) -> Any:
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, list):
        return [_without_control_characters(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_control_characters(item) for key, item in value.items()}
    return value


def looks_like_analysis(value: Any) -> bool:
    """Tell whether a parsed value is meant as an analysis, however bad, rather than some other JSON object."""
    if not isinstance(value, dict):
        return False
    keys = {_KEYS.get(squeezed(key)) for key in itertools.islice(value, 100) if len(key) <= _MAX_NAME}
    return any(key in keys for key in SPELLINGS["dimensions"]) or len(_flat_dimensions(value)) >= 3


def _respelled(item: dict, known: dict[str, str], mends: list[str]) -> dict:
    """Return an object with the keys that are known under their own spelling: ``overallScore`` is overall_score."""
    if item.keys() <= _PLAIN:
        return item
    result: dict = {}
    for key, value in item.items():
        spelled = key if key in _PLAIN or len(key) > _MAX_NAME else known.get(squeezed(key), key)
        if spelled != key and spelled not in item:
            mends.append("key_names")
        result.setdefault(spelled if spelled not in item else key, value)
    return result


def _flat_dimensions(value: dict) -> list[dict]:
    return [
        {"name": name, **item}
        for name, item in value.items()
        if isinstance(item, dict) and squeezed(name[:_MAX_NAME]) in STANDARD and _first(item, _SCORE)[1]
    ]


def _listed_dimensions(value: dict, mends: list[str]) -> list[dict]:
    dimensions = next((value[key] for key in SPELLINGS["dimensions"] if value.get(key)), None)
    if isinstance(dimensions, dict):
        if all(isinstance(item, str) and number(item) is None for item in dimensions.values()):
            raise AnalysisError("no_scores", f"texts without scores: {_names(dimensions)}")
        items = dimensions.items()
        dimensions = [{"name": name, **(item if isinstance(item, dict) else {"score": item})} for name, item in items]
        for item in dimensions:  # an object's snake_case names are its shape, not a fault
            item["name"] = canonical_name(str(item["name"])[: _MAX_NAME + 1])
    elif not dimensions:
        dimensions = _flat_dimensions(value)
        if dimensions:
            mends.append("flat_dimensions")
    if not isinstance(dimensions, list) or not dimensions:
        named = any(key in value for key in SPELLINGS["dimensions"])
        if not named and re.search(r'"(image_)?desc|"dim\w*s"|"overall', json.dumps(value)[:400]):
            raise AnalysisError("misspelt_json", f"no dimensions among the keys {_names(value)}")
        raise AnalysisError("no_scores", f"an object without scored dimensions: {_names(value)}")
    if not all(isinstance(item, dict) for item in dimensions):
        raise AnalysisError("misspelt_json", "an entry of dimensions is not an object")
    return dimensions


def _dimension(item: dict, extra: frozenset[str], highest: float, mends: list[str]) -> dict:
    item = _respelled(item, _DIMENSION_KEYS, mends)
    name, name_key = _first(item, DIMENSION_SPELLINGS["name"])
    if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME:
        raise AnalysisError("misspelt_json", f"a dimension without a name: {_names(item)}")
    proper = canonical_name(name)
    if proper != name:
        mends.append("dimension_names")
    raw, score_key = _first(item, _SCORE)
    score = number(raw, highest)
    if score is None:
        if score_key is None:
            raise AnalysisError("missing_score", f"{proper[:40]} has no score: {_names(item)}")
        raise AnalysisError(
            "missing_score", f"the score of {proper[:40]} is {json.dumps(raw)[:40]}, not a number out of {highest:g}"
        )
    if isinstance(raw, str):
        mends.append("score_text")
    texts = {key: _first(item, DIMENSION_SPELLINGS[key]) for key in ("comment", "recommendation")}
    used = {name_key, score_key, *(key for _, key in texts.values())}
    if not used <= {None, *DIMENSION_KEYS}:
        mends.append("key_names")
    if not item.keys() <= used | extra:
        mends.append("other_keys")
    result = {"name": proper, "score": score, **{key: _text(value) for key, (value, _) in texts.items()}}
    return {key: value for key, value in result.items() if value != ""} | _extras(item, extra)


def _extras(item: dict, extra: frozenset[str]) -> dict:
    return {key: item[key] for key in item if key in extra and not is_too_deep(item[key], _MAX_EXTRA)}


def _first(item: dict, spellings: tuple[str, ...]) -> tuple[Any, str | None]:
    return next(((item[spelling], spelling) for spelling in spellings if spelling in item), (None, None))


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _texts(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text for text in map(_text, values) if text]


def _names(value: dict) -> str:
    names = ", ".join(str(name)[:30] for name in list(value)[:8])
    return (names or "(empty)") + (", ..." if len(value) > 8 else "")


def compact_json(analysis: dict) -> str:
    """Return the canonical response: the analysis on one line, keys in order, no spaces between tokens."""
    return json.dumps(analysis, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def parse_lenient(text: str, extra: frozenset[str] = frozenset(), highest: float = 10) -> tuple[dict | None, list[str]]:
    """Return (analysis, mends): the last analysis object in a text and what had to be overlooked to read it.

    (None, []) when there is none. A fence and prose around the object are "text_around".
    """
    best: tuple[dict | None, list[str]] = (None, [])
    for value, mends, start, end in find_objects(text):
        if not looks_like_analysis(value):
            continue
        try:
            analysis, more = canonical(value, extra, highest)
        except AnalysisError:
            continue
        around = ["text_around"] if (text[:start] + text[end:]).strip() else []
        best = analysis, [*around, *mends, *more]
    return best

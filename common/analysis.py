"""The analysis object: one canonical form, made from every shape in which Mondrian's models have answered.

    analysis, mends = parse_lenient(model_output)     # what a forgiving reader makes of a text
    problems = check_strict(model_output, dimensions)  # what the service's system prompt would find wrong with it
    response = compact_json(analysis)                  # what an adapter is trained to answer

The canonical keys, in order, are `KEYS`; a dimension's are `DIMENSION_KEYS`. Nothing is invented: a field that the
source lacks stays absent.
"""

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

KEYS = (
    "image_description",
    "dimensions",
    "overall_score",
    "key_strengths",
    "priority_improvements",
    "technical_notes",
)
DIMENSION_KEYS = ("name", "score", "comment", "recommendation")
DIMENSIONS8 = (
    "Composition",
    "Lighting",
    "Focus & Sharpness",
    "Color Harmony",
    "Subject Isolation",
    "Depth & Perspective",
    "Visual Balance",
    "Emotional Impact",
)
DIMENSIONS7 = tuple(name for name in DIMENSIONS8 if name != "Subject Isolation")

# Spellings of keys that real outputs use; the first of each is the canonical one.
_SPELLINGS = {
    "name": ("name", "dimension"),
    "score": ("score", "grade", "rating"),
    "comment": ("comment", "comments", "feedback"),
    "recommendation": ("recommendation", "recommendations"),
}
_NUMBER = re.compile(r"\s*\(?\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*(?:/\s*10(?:\.0)?)?\s*\)?\s*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_MAX_SCANNED = 2_000_000  # characters read in search of closing braces in one text; more only in hostile ones


class AnalysisError(ValueError):
    """A text that holds no usable analysis. ``reason`` is one of the names in `common.data.sources.REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


# ------------------------------------------------------------------------------------------------ names and numbers


@functools.lru_cache(4096)
def _squeezed(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("colour", "color")
    return "".join(word for word in re.findall(r"[a-z]+", words) if word != "and")


_BY_SQUEEZED = {_squeezed(name): name for name in DIMENSIONS8}


def canonical_name(name: str) -> str:
    """Return the standard spelling of a dimension (``ColorHarmony``, ``focus_sharpness``); other names as they are."""
    return _BY_SQUEEZED.get(_squeezed(name), " ".join(name.split()))


def number(value: Any) -> int | float | None:
    """Return a score as a finite number, whole ones as int; None for what is no number ("8/10" and "8.1" are)."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        value = float(match[1]) if match else None
    if (
        isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300
    ):  # nor NaN, nor 400 digits
        return None
    return int(value) if value == int(value) else value


def mean_score(dimensions: list[dict]) -> float:
    """Return the overall score as the system prompt defines it: the mean of the dimensions, one decimal, half up."""
    mean = sum(dimension["score"] for dimension in dimensions) / len(dimensions)
    return math.floor(mean * 10 + 0.5 + 1e-9) / 10


# ------------------------------------------------------------------------------------------------ the canonical form


def canonical(value: dict) -> tuple[dict, list[str]]:
    """Return (analysis, mends) of a parsed answer in any of its shapes: ``dimensions`` as a list, the object
    ``dimensional_analysis`` with snake_case names and ``overall_grade`` as a string, or one key a dimension.

    Raises AnalysisError ("no_scores", "misspelt_json", "missing_score") when no dimensions with scores are in it.
    """
    mends: list[str] = []
    listed = _listed_dimensions(value, mends)
    analysis: dict[str, Any] = {}
    if text := _text(value.get("image_description", value.get("description"))):
        analysis["image_description"] = text
    analysis["dimensions"] = [_dimension(item, mends) for item in listed]
    overall = number(value.get("overall_score", value.get("overall_grade")))
    if overall is not None:
        analysis["overall_score"] = overall
    for key in ("key_strengths", "priority_improvements"):
        texts = _texts(value.get(key))
        if texts:
            analysis[key] = texts
            if isinstance(value[key], str):
                mends.append("list_from_text")
    if text := _text(value.get("technical_notes")):
        analysis["technical_notes"] = text
    if any(not text.isprintable() and _CONTROL.search(text) for text in texts_of(analysis)):
        analysis = _without_control_characters(analysis)
        mends.append("control_characters")
    return analysis, list(dict.fromkeys(mends))


def texts_of(analysis: dict) -> list[str]:
    """Return every text of a canonical analysis, names of dimensions included."""
    texts = [analysis[key] for key in ("image_description", "technical_notes") if key in analysis]
    for dimension in analysis["dimensions"]:
        texts += [dimension[key] for key in ("name", "comment", "recommendation") if key in dimension]
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
    return bool({"dimensions", "dimensional_analysis"} & value.keys()) or len(_flat_dimensions(value)) >= 3


def _flat_dimensions(value: dict) -> list[dict]:
    return [
        {"name": name, **item}
        for name, item in value.items()
        if isinstance(item, dict) and _squeezed(name) in _BY_SQUEEZED and _first(item, "score")[0] is not None
    ]


def _listed_dimensions(value: dict, mends: list[str]) -> list[dict]:
    dimensions = value.get("dimensions")
    if not dimensions:
        dimensions = value.get("dimensional_analysis")
    if isinstance(dimensions, dict):
        items = dimensions.items()
        dimensions = [{"name": name, **(item if isinstance(item, dict) else {"score": item})} for name, item in items]
        for item in dimensions:  # an object's snake_case names are its shape, not a fault
            item["name"] = canonical_name(str(item["name"]))
    elif not dimensions:
        dimensions = _flat_dimensions(value)
        if dimensions:
            mends.append("flat_dimensions")
    if not isinstance(dimensions, list) or not dimensions:
        named = {"dimensions", "dimensional_analysis"} & value.keys()
        if not named and re.search(r'"(image_)?desc|"dim\w*s"|"overall', json.dumps(value)[:400]):
            raise AnalysisError("misspelt_json", f"no dimensions among the keys {_names(value)}")
        raise AnalysisError("no_scores", f"an object without scored dimensions: {_names(value)}")
    if not all(isinstance(item, dict) for item in dimensions):
        raise AnalysisError("misspelt_json", "an entry of dimensions is not an object")
    return dimensions


def _dimension(item: dict, mends: list[str]) -> dict:
    name, name_key = _first(item, "name")
    if not isinstance(name, str) or not name.strip():
        raise AnalysisError("misspelt_json", f"a dimension without a name: {_names(item)}")
    proper = canonical_name(name)
    if proper != name:
        mends.append("dimension_names")
    raw, score_key = _first(item, "score")
    score = number(raw)
    if score is None:
        if score_key is None:
            raise AnalysisError("missing_score", f"{proper[:40]} has no score: {_names(item)}")
        raise AnalysisError("missing_score", f"the score of {proper[:40]} is {json.dumps(raw)[:40]}, not a number")
    if isinstance(raw, str):
        mends.append("score_text")
    result: dict[str, Any] = {"name": proper, "score": score}
    keys = [name_key, score_key]
    for key in ("comment", "recommendation"):
        value, used = _first(item, key)
        keys.append(used)
        if text := _text(value):
            result[key] = text
    if any(used not in (None, *DIMENSION_KEYS) for used in keys):
        mends.append("key_names")
    return result


def _first(item: dict, key: str) -> tuple[Any, str | None]:
    return next(((item[spelling], spelling) for spelling in _SPELLINGS[key] if spelling in item), (None, None))


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


def projected(analysis: dict, dimensions: tuple[str, ...] | list[str]) -> tuple[dict, bool]:
    """Return (analysis with exactly ``dimensions`` in that order, whether any was dropped).

    When one was dropped the overall score is computed anew. KeyError names the dimensions that are lacking.
    """
    by_name = {dimension["name"]: dimension for dimension in analysis["dimensions"]}
    lacking = [name for name in dimensions if name not in by_name]
    if lacking:
        raise KeyError(", ".join(lacking))
    kept = [by_name[name] for name in dimensions]
    dropped = len(kept) < len(analysis["dimensions"])
    result = {**analysis, "dimensions": kept}
    if dropped:
        result["overall_score"] = mean_score(kept)
    return {key: result[key] for key in KEYS if key in result}, dropped


# ------------------------------------------------------------------------------------------------ objects in a text


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Return (value, mends) of a text that is one JSON value, give or take what can be mended without inventing.

    Raises ValueError (JSONDecodeError with a position where there is one) for everything else.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant), []
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        original = error
    for mended, mends in ((text, []), (without_trailing_commas(text), ["trailing_comma"])):
        try:
            value = json.loads(mended, parse_constant=_refuse_constant)
            return value, mends
        except ValueError:
            pass
        try:
            value = json.loads(mended, parse_constant=_refuse_constant, strict=False)
            return value, [*mends, "raw_control_characters"]
        except ValueError:
            pass
    raise original


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def without_trailing_commas(text: str) -> str:
    """Drop commas that stand before a closing bracket, outside strings."""
    parts = re.findall(r'"(?:[^"\\]|\\.)*"?|[^"]+', text, re.S)
    return "".join(part if part.startswith('"') else re.sub(r",(?=\s*[}\]])", "", part) for part in parts)


def balanced_end(text: str, start: int) -> int | None:
    """Return the position after the brace that closes the one at ``start``; None when the text ends before."""
    depth = 0
    for token in re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[{}]', re.S).finditer(text, start):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                return token.end()
    return None


def find_objects(text: str) -> Iterator[tuple[dict, list[str], int, int]]:
    """Yield (object, mends, start, end) for each JSON object that stands in a text, outermost ones first to last."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    at, scanned = text.find("{"), 0
    while at >= 0 and scanned < _MAX_SCANNED:
        try:
            value, end = decoder.raw_decode(text, at)
            mends: list[str] = []
        except (ValueError, RecursionError):
            end = balanced_end(text, at)
            scanned += (end or len(text)) - at
            try:
                value, mends = parse_json(text[at:end]) if end else (None, [])
            except ValueError:
                value = None
        if isinstance(value, dict):
            yield value, mends, at, end
            at = text.find("{", end)
        else:
            at = text.find("{", at + 1)


def parse_lenient(text: str) -> tuple[dict | None, list[str]]:
    """Return (analysis, mends): the last analysis object in a text and what had to be overlooked to read it.

    (None, []) when there is none. A fence and prose around the object are "text_around".
    """
    best: tuple[dict | None, list[str]] = (None, [])
    for value, mends, start, end in find_objects(text):
        if not looks_like_analysis(value):
            continue
        try:
            analysis, more = canonical(value)
        except AnalysisError:
            continue
        around = ["text_around"] if (text[:start] + text[end:]).strip() else []
        best = analysis, [*around, *mends, *more]
    return best


# ------------------------------------------------------------------------------------------------ the strict reader


def check_strict(text: str, dimensions: tuple[str, ...] | list[str]) -> list[str]:
    """Return what the system prompt would find wrong with an answer, a sentence each; [] for a compliant one.

    Compliant: one JSON object and nothing around it, exactly `KEYS`, exactly ``dimensions`` in that order, whole
    scores from 1 to 10, an overall score from 1 to 10, no empty text, no empty list.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return [f"not a JSON object alone: {getattr(error, 'msg', error)}"]
    if not isinstance(value, dict):
        return ["not a JSON object"]
    problems = [f"{key} is missing" for key in KEYS if key not in value]
    problems += [f"{str(key)[:40]} is no key of an analysis" for key in value if key not in KEYS]
    for key in ("image_description", "technical_notes"):
        if key in value and not _text(value[key]):
            problems.append(f"{key} is not a text, or empty")
    for key in ("key_strengths", "priority_improvements"):
        if key in value and not (
            isinstance(value[key], list) and value[key] and all(_text(item) for item in value[key])
        ):
            problems.append(f"{key} is not a list of texts, or empty")
    overall = value.get("overall_score")
    if "overall_score" in value and not (_is_number(overall) and 1 <= overall <= 10):
        problems.append("overall_score is not a number from 1 to 10")
    if "dimensions" in value:
        problems += _check_dimensions(value["dimensions"], list(dimensions))
    return problems


def _check_dimensions(value: Any, dimensions: list[str]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return ["dimensions is not a list of objects"]
    problems = []
    names = [item.get("name") for item in value]
    if names != dimensions:
        problems.append(f"dimensions are not the {len(dimensions)} asked for, in their order")
    for item in value:
        label = str(item.get("name"))[:40]
        if set(item) != set(DIMENSION_KEYS):
            problems.append(f"{label}: keys are not {', '.join(DIMENSION_KEYS)}")
            continue
        score = item["score"]
        if isinstance(score, bool) or not isinstance(score, int) or not 1 <= score <= 10:
            problems.append(f"{label}: the score is not a whole number from 1 to 10")
        problems += [
            f"{label}: {key} is not a text, or empty" for key in ("comment", "recommendation") if not _text(item[key])
        ]
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

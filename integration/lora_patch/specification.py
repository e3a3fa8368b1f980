"""What a prompt demands of an answer: read once from its text and its JSON example, then checked and written.

    specification = read_specification(prompt)       # UnreadablePrompt asks for --dimensions
    problems = specification.check(answer)           # [] for an answer as the prompt demands it
    response = specification.render(analysis)        # the answer that an adapter is trained to give

Prompts differ in the dimensions and keys that they ask for (`overall_grade`, `case_study_id`) and in how scores are
written (7, 7.0, "7/10"). An analysis inside this project has one canonical form: the keys `KEYS`, dimensions with
`DIMENSION_KEYS` under their standard names, scores as numbers, and what else its prompt asks for under its own key.
"""

import functools
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from .json_text import is_number, is_too_deep
from .score_range import USUAL

KEYS = ("image_description", "dimensions", "overall_score", "key_strengths", "priority_improvements", "technical_notes")
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

# Spellings of keys in real prompts and answers; the first of each is the canonical one.
SPELLINGS = {
    "image_description": ("image_description", "description"),
    "dimensions": ("dimensions", "dimensional_analysis"),
    "overall_score": ("overall_score", "overall_grade"),
}
DIMENSION_SPELLINGS = {
    "name": ("name", "dimension", "title"),
    "score": ("score", "grade", "rating"),
    "comment": ("comment", "comments", "feedback"),
    "recommendation": ("recommendation", "recommendations", "suggestion", "suggestions"),
}
KINDS = {  # what is said of a value that is not of its kind
    "text": "is not a text, or empty",
    "texts": "is not a list of texts, or empty",
    "list": "is not a list of objects",  # of the dimensions, each with its name
    "object": "is not an object of objects",  # of the dimensions, by name
    "whole": "is not a whole number from {low:g} to {high:g}",
    "decimal": "is not a number from {low:g} to {high:g} with a decimal point",  # 7.0
    "number": "is not a number from {low:g} to {high:g}",
    "mean": "is not a number from {low:g} to {high:g}",  # written with a decimal point
    "quoted": "is not a score from {low:g} to {high:g} in quotes",  # "7"
    "of_ten": 'is not a score from {low:g} to {high:g} such as "{low:g}/{high:g}"',  # "7/10", or of another range's end
    "any": "is null",
}
_SCORES = ("whole", "decimal", "number", "mean", "quoted", "of_ten")
_THINKING = re.compile(r"\s*<(think|thinking)>.*?</\1>\s*", re.S)


# ------------------------------------------------------------------------------------------------ names


@functools.lru_cache(4096)
def squeezed(name: str) -> str:
    """Return the letters of a name alone, in one case: what its spellings have in common."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("&amp;", "&").replace("colour", "color")
    return "".join(word for word in re.findall(r"[a-z]+", words) if word != "and")


STANDARD = {squeezed(name): name for name in DIMENSIONS8}


def canonical_name(name: str) -> str:
    """Return the standard spelling of a dimension (``ColorHarmony``, ``focus_sharpness``); other names as they are."""
    return STANDARD.get(squeezed(name), " ".join(name.split()))


def canonical_key(key: str, spellings: dict[str, tuple[str, ...]]) -> str:
    """Return the canonical key of one of its spellings, other keys as they are."""
    return next((canonical for canonical, all_of_it in spellings.items() if key in all_of_it), key)


def mean_score(dimensions: list[dict], highest: float = 10) -> float:
    """Return the overall score as the system prompt defines it: the mean of the dimensions, one decimal, half up.

    Two decimals where scores reach no higher than 1.
    """
    mean, parts = sum(dimension["score"] for dimension in dimensions) / len(dimensions), 10 if highest > 1 else 100
    return math.floor(mean * parts + 0.5 + 1e-9) / parts


# ------------------------------------------------------------------------------------------------ the specification


@dataclass(frozen=True)
class Field:
    """A key of an answer or of one of its dimensions; ``kind`` is one of `KINDS`."""

    name: str
    kind: str
    required: bool = True

    def fault(self, value: Any, score_range: tuple[float, float] = USUAL) -> str | None:
        """Say what is wrong with a value, None for a sound one. What is optional may be null or empty."""
        low, high = score_range
        if not self.required and value in (None, "", []):
            return None
        return None if _is(self.kind, value, low, high) else KINDS[self.kind].format(low=low, high=high)


def _is(kind: str, value: Any, low: float, high: float) -> bool:
    if kind == "text":
        return isinstance(value, str) and bool(value.strip())
    if kind in ("texts", "list", "object"):
        holder, item = {"texts": (list, str), "list": (list, dict), "object": (dict, dict)}[kind]
        items = list(value.values() if isinstance(value, dict) else value) if isinstance(value, holder) else []
        return bool(items) and all(isinstance(i, item) and (kind != "texts" or i.strip()) for i in items)
    if kind in ("quoted", "of_ten"):
        ending = rf"\s*/\s*{high:g}" if kind == "of_ten" else ""
        match = re.fullmatch(rf"(\d{{1,4}}(?:\.\d{{1,6}})?){ending}", value) if isinstance(value, str) else None
        return match is not None and low <= float(match[1]) <= high
    if kind in _SCORES:
        wanted = {"whole": int, "decimal": float}.get(kind, int | float)
        return is_number(value) and isinstance(value, wanted) and low <= value <= high
    return value is not None


def _written(kind: str, value: Any, highest: float) -> Any:
    """Return a canonical value in the form that a prompt demands."""
    if kind in ("quoted", "of_ten"):
        return f"{value:g}" + (f"/{highest:g}" if kind == "of_ten" else "")
    if kind in ("decimal", "mean"):
        return float(value)
    return int(value) if kind in ("whole", "number") and value == int(value) else value


_FIELDS = (
    Field("image_description", "text"),
    Field("dimensions", "list"),
    Field("overall_score", "mean"),
    Field("key_strengths", "texts"),
    Field("priority_improvements", "texts"),
    Field("technical_notes", "text"),
)
_DIMENSION_FIELDS = (
    Field("name", "text"),
    Field("score", "whole"),
    Field("comment", "text"),
    Field("recommendation", "text"),
)


@dataclass(frozen=True)
class PromptSpecification:
    """What one prompt demands of an answer, keys and dimensions in its order and spelling."""

    dimensions: tuple[str, ...] = DIMENSIONS7
    fields: tuple[Field, ...] = _FIELDS
    dimension_fields: tuple[Field, ...] = _DIMENSION_FIELDS
    example_scores: tuple[float, ...] = ()  # in the prompt's example: what a model that parrots its prompt answers
    example_overall: float | None = None
    thinking: bool = False  # whether reasoning may stand before the object, in <thinking> tags
    score_range: tuple[float, float] = USUAL  # lowest and highest score

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions under their standard names."""
        return tuple(map(canonical_name, self.dimensions))

    @property
    def extra_keys(self) -> frozenset[str]:
        """What the prompt asks for beyond the canonical keys, such as case_study_id."""
        asked = {canonical_key(field.name, SPELLINGS) for field in self.fields}
        asked |= {canonical_key(field.name, DIMENSION_SPELLINGS) for field in self.dimension_fields}
        return frozenset(asked) - {*KEYS, *DIMENSION_KEYS}

    def points(self, score: float) -> float:
        """Return a score in points of ten, whatever the range of scores is."""
        return score if self.score_range[1] == 10 else score * 10 / self.score_range[1]

    def to_dict(self) -> dict:
        """Return the specification as JSON can hold it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, value: Any) -> "PromptSpecification":
        """Return what `to_dict` gave; ValueError for a value that no specification gives."""
        try:
            fields, dimension_fields = (
                tuple(Field(str(f["name"]), f["kind"], f["required"]) for f in value[key])
                for key in ("fields", "dimension_fields")
            )
            result = cls(
                tuple(value["dimensions"]),
                fields,
                dimension_fields,
                tuple(value["example_scores"]),
                value["example_overall"],
                value["thinking"],
                tuple(value.get("score_range", USUAL)),  # records of earlier versions have none
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no prompt specification ({error})") from None
        kinds = [field.kind for field in (*fields, *dimension_fields)]
        numbers = [*result.example_scores, *([] if result.example_overall is None else [result.example_overall])]
        sound = all(isinstance(kind, str) and kind in KINDS for kind in kinds) and all(map(is_number, numbers))
        ends = result.score_range
        sound = sound and len(ends) == 2 and all(map(is_number, ends)) and 0 <= ends[0] < ends[1]
        if not (sound and result.dimensions and all(isinstance(name, str) for name in result.dimensions)):
            raise ValueError("no prompt specification: a field of it is of the wrong kind")
        return result

    # -- an answer held against it

    def check(self, text: str) -> list[str]:
        """Return what the prompt would find wrong with an answer, a sentence each; [] for a compliant one.

        Compliant: one JSON object and nothing around it (except reasoning where the prompt allows it), exactly the
        keys asked for, exactly the dimensions in their order, scores in the range asked for, as they are to be written.
        """
        if self.thinking and (thoughts := _THINKING.match(text)):
            text = text[thoughts.end() :]
        try:
            value = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            return [f"not a JSON object alone: {getattr(error, 'msg', error)}"]
        if not isinstance(value, dict) or is_too_deep(value):
            return ["not a JSON object"]
        known = {field.name: field for field in self.fields}
        problems = [f"{field.name} is missing" for field in self.fields if field.required and field.name not in value]
        problems += [f"{key[:40]} is no key of an analysis" for key in value if key not in known]
        for key, field in known.items():
            fault = field.fault(value[key], self.score_range) if key in value else None
            if fault:
                problems.append(f"{key} {fault}")
            elif key in value and field.kind in ("list", "object"):
                problems += self._check_dimensions(value[key])
        return problems

    def _check_dimensions(self, value: list | dict) -> list[str]:
        name_key = next((f.name for f in self.dimension_fields if f.name in DIMENSION_SPELLINGS["name"]), "name")
        names = list(value) if isinstance(value, dict) else [item.get(name_key) for item in value]
        problems = []
        if names != list(self.dimensions):
            problems.append(f"dimensions are not the {len(self.dimensions)} asked for, in their order")
        required = {field.name for field in self.dimension_fields if field.required}
        known = {field.name: field for field in self.dimension_fields}
        for name, item in zip(names, value.values() if isinstance(value, dict) else value, strict=True):
            label = str(name)[:40]
            if not required <= item.keys() <= known.keys():
                problems.append(f"{label}: keys are not {', '.join(known)}")
                continue
            there = [key for key in known if key in item and key != name_key]
            faults = ((key, known[key].fault(item[key], self.score_range)) for key in there)
            problems += [f"{label}: {'the ' * (key == 'score')}{key} {fault}" for key, fault in faults if fault]
        return problems

    # -- an answer written by it

    def project(self, analysis: dict) -> tuple[dict, bool]:
        """Return (the analysis with exactly the prompt's dimensions in its order, whether any was dropped).

        When one was dropped the overall score is computed again. KeyError names the missing dimensions.
        """
        by_name = {dimension["name"]: dimension for dimension in analysis["dimensions"]}
        lacking = [name for name in self.names if name not in by_name]
        if lacking:
            raise KeyError(", ".join(lacking))
        kept = [by_name[name] for name in self.names]
        dropped = len(kept) < len(analysis["dimensions"])
        overall = {"overall_score": mean_score(kept, self.score_range[1])} if dropped else {}
        return {**analysis, "dimensions": kept, **overall}, dropped

    def lacking(self, analysis: dict) -> list[str]:
        """Return what the prompt demands that an analysis does not have: dimensions, keys, keys of dimensions."""
        by_name = {dimension["name"]: dimension for dimension in analysis["dimensions"]}
        found = [f"the dimension {name}" for name in self.names if name not in by_name]
        keys = [canonical_key(field.name, SPELLINGS) for field in self.fields if field.required]
        found += [key for key in keys if key not in analysis]
        needed = [canonical_key(f.name, DIMENSION_SPELLINGS) for f in self.dimension_fields if f.required]
        return found + [f"{n}'s {key}" for n in self.names if n in by_name for key in needed if key not in by_name[n]]

    def render(self, analysis: dict) -> str:
        """Return the answer that the prompt demands, on one line; what the analysis lacks stays away.

        ``analysis`` is canonical. KeyError names the missing dimensions.
        """
        analysis, _ = self.project(analysis)
        listed = [
            _filled(self.dimension_fields, {**dimension, "name": spelled}, DIMENSION_SPELLINGS, self.score_range[1])
            for spelled, dimension in zip(self.dimensions, analysis["dimensions"], strict=True)
        ]
        by_name = dict(zip(self.dimensions, listed, strict=True))
        answer = _filled(self.fields, analysis, SPELLINGS, self.score_range[1])
        for field in self.fields:
            if field.kind in ("list", "object"):
                answer[field.name] = listed if field.kind == "list" else by_name
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _filled(fields: tuple[Field, ...], values: dict, spellings: dict, highest: float) -> dict:
    keys = [(field, canonical_key(field.name, spellings)) for field in fields]
    return {field.name: _written(field.kind, values[key], highest) for field, key in keys if key in values}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

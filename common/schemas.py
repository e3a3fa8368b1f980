"""The JSONL files of the pipeline, field by field: what a row must hold, and what it means.

    problem = fault(row, MANIFEST)       # None, or one line: "image_sha256 is 5; 64 hex digits were expected"

A file is edited by hand and passed on, so every reader checks each row against its table here before it uses it.
Fields that a table does not name are ignored. docs/formats.md shows the tables.
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from integration.lora_patch.json_text import is_number

_TEXT = 4_000_000  # characters
_PATH = 4_000


def _texts(value: Any, most: int = _TEXT) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and len(item) <= most for item in value)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _PATH and "\0" not in value


def _is_base64(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(base64.b64decode(value, validate=True))
    except ValueError:
        return False


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _are_spans(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(span, list) and len(span) == 2 for span in value)
    if not pairs or not all(_whole(place, 0, _TEXT) for span in value for place in span):
        return False
    places = [place for span in value for place in span]
    return places == sorted(places)


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and 0 <= value[0] < value[1]


def analysis_fault(value: Any) -> str | None:
    """Say what is wrong with a canonical analysis, None for a sound one."""
    listed = value.get("dimensions") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        return "holds no list of dimensions"
    parts = [(value, "", {"image_description": "text", "technical_notes": "text", "overall_score": "score"})]
    parts.append((value, "", dict.fromkeys(("key_strengths", "priority_improvements"), "texts")))
    for number, item in enumerate(listed, 1):
        if not isinstance(item.get("name"), str):
            return f"its dimension {number} has no name"
        if "score" not in item:
            return f"{item['name'][:40]} has no score"
        parts.append((item, f"{item['name'][:40]}'s ", {"score": "score", "comment": "text", "recommendation": "text"}))
    for holder, whose, kinds in parts:
        for key, kind in kinds.items():
            if key in holder and not KINDS[kind][0](holder[key]):
                return f"{whose}{key} is {_shown(holder[key])}; {KINDS[kind][1]} was expected"
    twice = [item["name"] for item in listed if sum(item["name"] == other["name"] for other in listed) > 1]
    return f"{twice[0][:40]} stands there twice" if twice else None


def _shown(value: Any) -> str:
    return json.dumps(value)[:40] if not isinstance(value, dict | list) else f"a {type(value).__name__}"


# what a kind of field accepts, and how it is called
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda v: isinstance(v, str) and len(v) <= _TEXT, "a text"),
    "filled": (lambda v: isinstance(v, str) and bool(v.strip()) and len(v) <= _TEXT, "a text that is not empty"),
    "name": (lambda v: isinstance(v, str) and 0 < len(v.strip()) <= 1000 and "\n" not in v, "a name"),
    "path": (_is_path, "a path"),
    "paths": (
        lambda v: _is_path(v) or (isinstance(v, list) and v != [] and all(map(_is_path, v))),
        "a path or several",
    ),
    "hash": (_is_hash, "64 hex digits"),
    "hashes": (lambda v: isinstance(v, str) or _texts(v, 64), "64 hex digits, or several such"),
    "base64": (_is_base64, "base64"),
    "texts": (_texts, "a list of texts"),
    "number": (is_number, "a number"),
    "positive": (lambda v: is_number(v) and v > 0, "a number above 0"),
    "numbers": (lambda v: isinstance(v, list) and all(map(is_number, v)), "a list of numbers"),
    "score": (lambda v: is_number(v) and 0 <= v <= 1000, "a number from 0 to 1000"),
    "range": (_is_range, "the lowest and the highest score"),
    "share": (lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "count": (lambda v: _whole(v, 0, 2**53), "a whole number from 0"),
    "some": (lambda v: _whole(v, 1, 2**53), "a whole number from 1"),
    "integer": (lambda v: _whole(v, -(2**63), 2**63), "a whole number"),
    "row": (lambda v: _whole(v, 0, 2**53) or isinstance(v, str), "a row's number from 0, or a job's id"),
    "flag": (lambda v: isinstance(v, bool), "true or false"),
    "object": (lambda v: isinstance(v, dict), "an object"),
    "objects": (lambda v: isinstance(v, list) and all(isinstance(item, dict) for item in v), "a list of objects"),
    "side": (lambda v: v in ("train", "val"), '"train" or "val"'),
    "finish": (lambda v: v in ("stop", "length", "loop"), '"stop", "length" or "loop"'),
    "spans": (_are_spans, "a list of [start, end], sorted"),
    "turns": (lambda v: isinstance(v, list) and len(v) == 2, "a user's and an assistant's turn"),
    "analysis": (lambda v: analysis_fault(v) is None, "an analysis with scored dimensions"),
}


@dataclass(frozen=True)
class Column:
    """A field of a row: its kind (of `KINDS`), what it means, whether it is required, whether null is allowed."""

    kind: str
    meaning: str
    needed: bool = True
    null: bool = False


def fault(row: Any, schema: dict[str, Column]) -> str | None:
    """Say what is wrong with a row, None for a sound one."""
    if not isinstance(row, dict):
        return "a JSON object was expected"
    missing = [name for name, column in schema.items() if column.needed and name not in row]
    if missing:
        return f"{', '.join(missing)} missing"
    for name, column in schema.items():
        value = row.get(name)
        if name in row and not (value is None and column.null) and not KINDS[column.kind][0](value):
            if column.kind == "analysis":
                return f"{name}: {analysis_fault(value)}"
            return f"{name} is {_shown(value)}; {KINDS[column.kind][1]} was expected"
    return None


_SEEN = {  # the job and the photograph that a row belongs to
    "job_id": Column("name", "id of the job in its database"),
    "image_path": Column("path", "the photograph, from the working folder or absolute"),
    "image_sha256": Column("hash", "SHA-256 of the photograph's bytes"),
}

MANIFEST = {
    **_SEEN,
    "advisor": Column("name", "id of the advisor"),
    "image_thumb": Column("base64", "thumbnail, for near-duplicates"),
    "analysis": Column("analysis", "canonical analysis: KEYS and DIMENSION_KEYS, and what else its prompt asks for"),
    "image_exists": Column("flag", "always true: a photograph that is not there is no row", needed=False),
    "image_size": Column("count", "bytes of the photograph", needed=False),
    "image_width": Column("count", "pixels, upright", needed=False),
    "image_height": Column("count", "pixels, upright", needed=False),
    "image_orientation": Column("count", "EXIF orientation, 1 to 8", needed=False),
    "image_phash": Column("text", "64-bit perceptual hash, hex", needed=False),
    "analysis_path": Column("text", "file that the analysis was read from", needed=False, null=True),
    "analysis_source": Column("text", "place where it was found", needed=False),
    "analysis_format": Column("text", '"json" or "html"', needed=False),
    "overall_score": Column("score", "of the analysis", needed=False, null=True),
    "mends": Column("texts", "what had to be overlooked to read it", needed=False),
    "prompt_scores": Column("numbers", "scores of the example in the job's own prompt", needed=False),
    "prompt_overall": Column("number", "overall score of that example", needed=False, null=True),
    "prompt_range": Column("range", "lowest and highest score that the job's own prompt asks for", needed=False),
    "status": Column("text", "of the job", needed=False),
    "mode": Column("text", "of the job", needed=False, null=True),
    "created_at": Column("text", "when the job was made", needed=False, null=True),
    "completed_at": Column("text", "when it ended", needed=False, null=True),
    "filename": Column("text", "photograph as the job names it", needed=False),
    "database": Column("path", "database that the job is in", needed=False),
}
REJECTED = {
    "job_id": Column("text", "id of the job"),
    "advisor": Column("text", "of the job"),
    "reason": Column("text", "why it is not linked, see docs/data.md"),
    "detail": Column("text", "what was found"),
    "also": Column("texts", "further reasons"),
    "database": Column("path", "database that the job is in"),
}
EXAMPLE = {
    "job_id": Column("text", "id of the job", needed=False, null=True),
    "image_sha256": Column("hashes", "SHA-256 of each photograph's bytes", needed=False, null=True),
    "masked_spans": Column("spans", "characters of the response that are not trained on", needed=False),
}
TRIPLET = {
    "image_path": Column(
        "paths", "the photograph: from the working folder, the file's folder, its parent, or absolute"
    ),
    "prompt": Column("filled", "the service's prompt"),
    "response": Column("filled", "the answer to train"),
    **EXAMPLE,
}
MESSAGES = {
    "messages": Column("turns", "what was asked, and the answer"),
    "images": Column("paths", "as image_path"),
    **EXAMPLE,
}
VERDICT = {
    "job_id": Column("text", "id of the job"),
    "side": Column("side", "of an example", null=True),
    "reason": Column("text", "why it is no example, see docs/data.md", null=True),
    "detail": Column("text", "what was found"),
    "verdicts": Column("object", "what each gate found, by its name"),
    "image_path": Column("path", "the photograph"),
    "image_sha256": Column("hash", "SHA-256 of its bytes"),
    "photo_group": Column("hash", "smallest SHA-256 of the photographs that are one picture", null=True),
}
LINK_REPORT = {
    "jobs": Column("count", "in all databases"),
    "linked": Column("count", "jobs in the manifest"),
    "reasons": Column("object", "of the jobs left out: LINK_REASON by name"),
    "sha256": Column("object", "of the manifest and the rejects, by file name"),
}
LINK_REASON = {
    "jobs": Column("count", "jobs whose first reason it is"),
    "in_all": Column("count", "jobs that have it"),
    "meaning": Column("text", "the reason in words"),
}
SPLIT_RECORD = {
    "seed": Column("integer", "seed of the draw"),
    "val_split": Column("share", "share of validation"),
    "photographs": Column("object", "side and thumbnail of each photograph, by SHA-256"),
}
SPLIT_PHOTOGRAPH = {
    "side": Column("side", "of the photograph; it never changes"),
    "thumb": Column("base64", "thumbnail, for near-duplicates; absent where it could not be read", needed=False),
}
_OUTPUT = {
    "arm": Column("name", '"base", "candidate", "deployed", or one of them with "+grammar"'),
    "example": Column("row", "row of the validation file from 0, or its job's id"),
}
OUTPUTS = {  # by kind
    "output": {
        **_OUTPUT,
        "text": Column("text", "what was generated, without the end of turn"),
        "finish": Column("finish", "how it ended: end of turn, token limit, repetition loop"),
        "sample": Column("count", "which of several samples, from 0", needed=False),
        "tokens": Column("count", "generated tokens", needed=False),
    },
    "loss": {
        **_OUTPUT,
        "sum": Column("number", "nats over the supervised tokens", null=True),
        "tokens": Column("some", "supervised tokens"),
    },
    "timing": {
        **_OUTPUT,
        "seconds": Column("positive", "of the whole answer"),
        "first_token_seconds": Column("positive", "to the first token"),
        "tokens": Column("count", "generated tokens"),
    },
    "arm": {"arm": Column("name", "as above"), "load_seconds": Column("number", "that loading took")},
}

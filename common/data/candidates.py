"""From the manifest to candidates: each linked job judged by the gates, held in a few hundred bytes.

A manifest of 100,000 jobs is 600 MB of text, so rows are read one at a time and only what choosing needs is kept: the
row itself is read again, by its place in the file, when it is written.
"""

import base64
import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from common.data.database import shown, sortable_time
from common.data.near_duplicates import is_thumb
from common.data.quality import Crowd, Target, copied_scores, judge
from common.errors import UserError
from common.files import RowFile
from common.schemas import MANIFEST
from integration.lora_patch.analysis import compact_json
from integration.lora_patch.names import is_advisor
from integration.lora_patch.specification import DIMENSION_SPELLINGS, SPELLINGS, PromptSpecification

# the number of a score in a response, which holds no such text inside a string: its quotes would be escaped
_KEYS = "|".join((*DIMENSION_SPELLINGS["score"], *SPELLINGS["overall_score"]))
_SCORE = re.compile(rf'(?<=[{{,])"(?:{_KEYS})":"?(\d+(?:\.\d+)?)')


@dataclass(slots=True)
class Candidate:
    """One linked job on its way to being an example."""

    place: int  # of its row: offset in a JSONL file, position in a JSON array
    job_id: str
    sha256: str
    made: str  # time, in a form that sorts
    overall: float
    scores: tuple[float, ...]
    width: int
    height: int
    image_path: str
    verdicts: dict[str, str] = field(default_factory=dict)  # {gate: finding}
    reason: str = ""  # why it is no example; "" while it is one
    detail: str = ""
    side: str = ""
    projected: bool = False
    overall_changed: bool = False
    copied: str = ""  # "exact" or "near" when its scores are those of the example in its prompt
    masked: bool = False  # whether its scores stay out of the loss
    gaps_masked: bool = False  # whether the places of the keys that it lacks do
    length: int = 0  # tokens of the whole example, once counted


def open_manifest(path: Path) -> RowFile:
    """Return a manifest of `link_training_data.py`, to be read row by row."""
    return RowFile(path, MANIFEST, "link the data again or mend the row")


def choose_advisor(manifest: RowFile, advisor: str | None) -> tuple[str, list[Path]]:
    """Return (advisor as the manifest spells it, databases of its jobs); UserError with the choice that there is."""
    counts: Counter = Counter()
    databases: dict[str, dict[str, None]] = defaultdict(dict)
    for _, _, row in manifest.rows("reading"):
        counts[row["advisor"]] += 1
        if isinstance(row.get("database"), str):
            databases[row["advisor"].lower()][row["database"]] = None
    there = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(20)) or "none; link jobs first"
    if advisor is None and len({name.lower() for name in counts}) != 1:
        raise UserError(f"{manifest.path}: name one of its advisors with --advisor: {there}")
    spelled = [name for name, _ in counts.most_common() if advisor is None or name.lower() == advisor.strip().lower()]
    if not spelled:
        raise UserError(f"{manifest.path}: no jobs of {advisor!r}; advisors in it: {there}")
    if not is_advisor(spelled[0]):
        raise UserError(f"{manifest.path}: {shown(spelled[0])!r} cannot be part of a file name; rename the advisor")
    return spelled[0], list(map(Path, databases[spelled[0].lower()]))


@dataclass(frozen=True)
class Judged:
    """An advisor's linked jobs, each judged by itself."""

    candidates: list[Candidate]
    thumbs: dict[str, bytes]  # {SHA-256 of a photograph: its thumbnail}
    crowd: Crowd  # what is still to be compared among all


def judge_all(manifest: RowFile, advisor: str, target: Target) -> Judged:
    """Judge each of an advisor's rows by itself. UserError names every damaged row."""
    candidates: list[Candidate] = []
    thumbs: dict[str, bytes] = {}
    crowd = Crowd()
    for number, place, row in manifest.rows("judging"):
        thumb = base64.b64decode(row["image_thumb"])
        if not is_thumb(thumb):
            raise UserError(f"{manifest.path}:{number}: image_thumb is not of this version; link the data again")
        if row["advisor"].lower() != advisor.lower():
            continue
        analysis, dropped = target.as_trained(row["analysis"])
        candidates.append(_candidate(place, row, analysis, dropped, target))
        crowd.add(analysis)
        thumbs.setdefault(row["image_sha256"], thumb)
    return Judged(candidates, thumbs, crowd)


def response_of(row: dict, target: Target, candidate: Candidate) -> tuple[str, list[tuple[int, int]]]:
    """Return the response that an example teaches, and the spans of it that stay out of the loss.

    A row that lacks a dimension but is an example anyway (``--gate schema=warn``) is written in the
    canonical form.
    """
    analysis, _ = target.as_trained(row["analysis"])
    try:
        response = target.specification.render(analysis)
    except KeyError:
        response = compact_json(analysis)
    spans = [match.span(1) for match in _SCORE.finditer(response)] if candidate.masked else []
    spans += gaps_in(response, target.specification) if candidate.gaps_masked else []
    return response, sorted(spans)


def gaps_in(response: str, specification: PromptSpecification) -> list[tuple[int, int]]:
    """Return the spans of a response that would teach to leave out the keys that it lacks: what follows in their place.

    That is the next key with its comma and colon, or the closing brace.
    """
    there, at, spans, lacking = json.loads(response), 1, [], False
    for asked in specification.fields:
        if asked.name not in there:
            lacking = lacking or asked.required
            continue
        key = f"{',' * (at > 1)}{compact_json(asked.name)}:"
        spans += [(at, at + len(key))] if lacking else []
        at += len(key) + len(compact_json(there[asked.name]))
        lacking = False
    whole = at + 1 == len(response)  # not the canonical form of an analysis that lacks a dimension
    return [*spans, *([(at, at + 1)] if lacking else [])] if whole else []


def _candidate(place: int, row: dict, analysis: dict, dropped: bool, target: Target) -> Candidate:
    copied = copied_scores(row, target.specification)
    candidate = Candidate(
        place=place,
        job_id=row["job_id"],
        sha256=row["image_sha256"],
        made=sortable_time(row.get("created_at") or row.get("completed_at")),
        overall=analysis["overall_score"],
        scores=tuple(d["score"] for d in analysis["dimensions"]),
        width=row.get("image_width") or 1024,
        height=row.get("image_height") or 768,
        image_path=row["image_path"],
        verdicts=judge(row, analysis, target),
        projected=dropped,
        overall_changed=analysis["overall_score"] != row["analysis"].get("overall_score"),
        copied="" if copied is None else "near" if "but for" in copied else "exact",
    )
    if problem := _stale(row):
        candidate.reason, candidate.detail = "photograph_changed", problem
    return candidate


def _stale(row: dict) -> str | None:
    try:
        size = os.stat(row["image_path"]).st_size
    except (OSError, ValueError):
        return "the photograph is not there any more; link again"
    return None if size == row.get("image_size", size) else "the photograph's file has changed; link again"


def apply_gates(candidates: list[Candidate], levels: dict[str, str]) -> None:
    """Give each candidate that a rejecting gate holds back its reason, and forget what gates found that are off."""
    for candidate in candidates:
        candidate.verdicts = {gate: text for gate, text in candidate.verdicts.items() if levels[gate] != "off"}
        candidate.masked = levels["copied_scores"] == "mask" and "copied_scores" in candidate.verdicts
        candidate.gaps_masked = levels["sections"] == "mask" and "sections" in candidate.verdicts
        rejecting = [gate for gate in levels if levels[gate] == "reject" and gate in candidate.verdicts]
        if rejecting and not candidate.reason:
            candidate.reason, candidate.detail = rejecting[0], candidate.verdicts[rejecting[0]]


def keep_newest(candidates: list[Candidate], groups: list[int]) -> None:
    """Of the analyses of one photograph keep the newest that passes all gates, else the newest with fewest warnings."""
    best: dict[int, Candidate] = {}
    for candidate, group in zip(candidates, groups, strict=True):
        if candidate.reason:
            continue
        other = best.get(group)
        if other is None or _preference(candidate) >= _preference(other):
            best[group] = candidate
    for candidate, group in zip(candidates, groups, strict=True):
        if not candidate.reason and candidate is not best[group]:
            candidate.reason, candidate.detail = "other_kept", f"job {best[group].job_id} is kept for this photograph"


def _preference(candidate: Candidate) -> tuple[int, str]:
    return -len(candidate.verdicts), candidate.made


def tallies(candidates: list[Candidate], levels: dict[str, str]) -> dict[str, dict]:
    """Return {gate: {"level", "found", "rejected", "job_ids"}}: what each gate found, the first 20 ids."""
    result = {}
    rejected = Counter(candidate.reason for candidate in candidates)
    for gate, level in levels.items():
        found = [candidate.job_id for candidate in candidates if gate in candidate.verdicts]
        result[gate] = {"level": level, "found": len(found), "rejected": rejected[gate], "job_ids": found[:20]}
    return result

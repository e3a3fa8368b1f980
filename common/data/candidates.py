"""From the manifest to candidates: each linked job judged by the gates, held in a few hundred bytes.

A manifest of 100,000 jobs is 600 MB of text, so rows are read one at a time and only what choosing needs is kept: the
row itself is read again, by its place in the file, when it is written.
"""

import base64
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common.analysis import compact_json, projected
from common.data.database import shown, sortable_time
from common.data.near_duplicates import THUMB_BYTES
from common.data.quality import Crowd, Target, copied_scores, judge
from common.errors import UserError, refuse
from common.files import read_rows

_NEEDED = {"job_id": str, "advisor": str, "image_path": str, "image_sha256": str, "image_thumb": str, "analysis": dict}
_OPTIONAL = {"mends": list, "prompt_scores": list, "image_width": int, "image_height": int, "image_size": int}


@dataclass(slots=True)
class Candidate:
    """One linked job on its way to being an example."""

    place: int  # of its row: offset in a JSONL file, position in a JSON array
    job_id: str
    sha256: str
    made: str  # time, in a form that sorts
    overall: float | None
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
    near_copy: bool = False  # all but one of its scores are the example's
    overall_copied: bool = False  # the example's overall score over other dimensions' scores
    length: int = 0  # tokens of the whole example, once counted


class Manifest:
    """A manifest file, JSONL or a JSON array, read row by row."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self._array = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        self._rows = [row for _, row in read_rows(path)] if self._array else []

    def _open(self):
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def rows(self, label: str) -> Iterator[tuple[int, dict]]:
        """Yield (place, row); all damaged rows are collected into one UserError at the end."""
        if self._array:
            yield from self._checked(enumerate(enumerate(self._rows), start=1))
            return
        size = self.path.stat().st_size
        with (
            self._open() as file,
            tqdm(total=size, desc=label, unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ):
            yield from self._checked(self._lines(file, bar))

    @staticmethod
    def _lines(file, bar) -> Iterator[tuple[int, tuple[int, object]]]:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, (offset, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
                except (ValueError, RecursionError) as error:
                    yield number, (offset, f"not valid JSON ({getattr(error, 'msg', error)})")
            offset += len(line)
            bar.update(len(line))

    def _checked(self, numbered: Iterator) -> Iterator[tuple[int, dict]]:
        problems = []
        for number, (place, row) in numbered:
            problem = row if isinstance(row, str) else _problem(row)
            if problem:
                problems.append(f"{self.path}:{number}: {problem}; link the data again or mend the row")
            elif not problems:
                yield place, row
        refuse(problems)

    def read(self, places: list[int]) -> Iterator[dict]:
        """Yield the rows at the places given, in that order."""
        if self._array:
            yield from (self._rows[place] for place in places)
            return
        with self._open() as file:
            for place in places:
                file.seek(place)
                yield json.loads(file.readline().decode("utf-8-sig"))


def _problem(row: object) -> str | None:
    if not isinstance(row, dict):
        return "a JSON object was expected"
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(row.get(name), kind)]
    if wrong:
        return f"{', '.join(wrong)} is missing or of the wrong kind"
    if any(not isinstance(row.get(name, kind()), kind) for name, kind in _OPTIONAL.items()):
        return "a field is of the wrong kind"
    if not _is_thumb(row["image_thumb"]):
        return "image_thumb is damaged"
    dimensions = row["analysis"].get("dimensions")
    if not isinstance(dimensions, list) or not dimensions or not all(map(_is_dimension, dimensions)):
        return "the analysis has no scored dimensions"
    return None


def _is_thumb(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == THUMB_BYTES
    except ValueError:
        return False


def _is_dimension(item: object) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(item.get("score"), int | float)
        and all(isinstance(item.get(key, ""), str) for key in ("comment", "recommendation"))
    )


def choose_advisor(manifest: Manifest, advisor: str | None) -> tuple[str, list[Path]]:
    """Return (advisor as the manifest spells it, databases of its jobs); UserError with the choice that there is."""
    counts: Counter = Counter()
    databases: dict[str, dict[str, None]] = defaultdict(dict)
    for _, row in manifest.rows("reading"):
        counts[row["advisor"]] += 1
        if isinstance(row.get("database"), str):
            databases[row["advisor"].lower()][row["database"]] = None
    there = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(20)) or "none; link jobs first"
    if advisor is None and len({name.lower() for name in counts}) != 1:
        raise UserError(f"{manifest.path}: name one of its advisors with --advisor: {there}")
    spelled = [name for name, _ in counts.most_common() if advisor is None or name.lower() == advisor.strip().lower()]
    if not spelled:
        raise UserError(f"{manifest.path}: no jobs of {advisor!r}; advisors in it: {there}")
    if not re.fullmatch(r"\w[\w .-]*", spelled[0]):
        raise UserError(f"{manifest.path}: {shown(spelled[0])!r} cannot be part of a file name; rename the advisor")
    return spelled[0], list(map(Path, databases[spelled[0].lower()]))


@dataclass(frozen=True)
class Judged:
    """An advisor's linked jobs, each judged by itself."""

    candidates: list[Candidate]
    thumbs: dict[str, bytes]  # {SHA-256 of a photograph: its thumbnail}
    crowd: Crowd  # what is still to be compared among all


def judge_all(manifest: Manifest, advisor: str, target: Target) -> Judged:
    """Judge each of an advisor's rows by itself."""
    candidates: list[Candidate] = []
    thumbs: dict[str, bytes] = {}
    crowd = Crowd()
    for place, row in manifest.rows("judging"):
        if row["advisor"].lower() != advisor.lower():
            continue
        candidates.append(_candidate(place, row, target))
        crowd.add(as_trained(row, target)[0])
        if row["image_sha256"] not in thumbs:
            thumbs[row["image_sha256"]] = base64.b64decode(row["image_thumb"])
    return Judged(candidates, thumbs, crowd)


def as_trained(row: dict, target: Target) -> tuple[dict, bool]:
    """Return (a row's analysis with the prompt's dimensions alone, whether some were dropped)."""
    try:
        return projected(row["analysis"], target.dimensions)
    except KeyError:
        return row["analysis"], False


def response_of(row: dict, target: Target) -> str:
    """Return the response that an example teaches: the canonical JSON with the prompt's dimensions in its order."""
    return compact_json(as_trained(row, target)[0])


def _candidate(place: int, row: dict, target: Target) -> Candidate:
    analysis, dropped = as_trained(row, target)
    source = row["analysis"]
    scores = tuple(d["score"] for d in source["dimensions"])
    example = tuple(row.get("prompt_scores") or target.scores)
    overall = row.get("prompt_overall") if row.get("prompt_scores") else target.overall
    candidate = Candidate(
        place=place,
        job_id=row["job_id"],
        sha256=row["image_sha256"],
        made=sortable_time(row.get("created_at") or row.get("completed_at")),
        overall=analysis.get("overall_score"),
        scores=tuple(d["score"] for d in analysis["dimensions"]),
        width=row.get("image_width") or 1024,
        height=row.get("image_height") or 768,
        image_path=row["image_path"],
        verdicts=judge(row, source, analysis, target),
        projected=dropped,
        overall_changed=dropped and analysis["overall_score"] != source.get("overall_score"),
        near_copy=len(example) == len(scores) and sum(a != b for a, b in zip(example, scores, strict=True)) == 1,
        overall_copied=overall is not None
        and source.get("overall_score") == overall
        and copied_scores(row, source, target) is None,
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

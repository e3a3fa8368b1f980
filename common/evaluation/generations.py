"""Where a comparison's raw outputs come from: the model, or a file; and the log from which an interrupted run resumes.

A source has ``arms`` (names, "base" first), ``load_seconds``, ``facts`` and methods that yield these rows, the
same that `--sample_outputs` writes and `--from_outputs` reads back (`common.schemas.OUTPUTS`), one JSON object a line:

    {"kind": "output", "arm": "base", "example": 0, "sample": 0, "text": "...", "finish": "stop", "tokens": 873}
    {"kind": "loss", "arm": "base", "example": 0, "sum": 612.5, "tokens": 880}
    {"kind": "timing", "arm": "base", "example": 0, "seconds": 2.1, "first_token_seconds": 0.3, "tokens": 873}

``example`` counts the rows of the validation file from 0. ``finish``: "stop" (end of turn), "length" (token limit) or
"loop" (stopped in a repetition loop). An output may have "expected_scores": {dimension or "overall_score": points},
from the probabilities of the score's tokens. A loss's ``sum`` is in nats over ``tokens`` supervised tokens.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.dataset import Example
from common.errors import UserError, refuse
from common.files import append_jsonl, read_rows, write_jsonl
from common.schemas import OUTPUTS, fault
from integration.lora_patch.json_text import is_number
from integration.lora_patch.specification import PromptSpecification

ARMS = ("base", "candidate", "deployed", "base+grammar", "candidate+grammar")


@dataclass
class Item:
    """One held-out example and what its prompt asks for."""

    index: int
    example: Example
    sha256: list[str]  # of the photographs' bytes, computed by this program
    specification: PromptSpecification
    key: str = field(init=False)  # names photograph, prompt and reference by content

    def __post_init__(self) -> None:
        parts = [*self.sha256, self.example.prompt, self.example.response]
        content = "\0".join(parts + [str(span) for span in self.example.masked_spans])
        self.key = hashlib.sha256(content.encode()).hexdigest()[:24]


class OutputSource(Protocol):
    """What `evaluate_lora.py` needs of the model, and what a file of planted outputs gives just as well."""

    arms: list[str]
    load_seconds: dict[str, float]
    facts: dict  # what identifies base, adapters and software; {} of recorded outputs

    def settings(self, arm: str) -> dict:
        """Return all that an arm's outputs depend on, besides photograph and prompt."""

    def outputs(self, arm: str, items: list[Item], samples: int) -> Iterator[dict]:
        """Yield an "output" row a sample of each item, in any order."""

    def losses(self, arm: str, items: list[Item]) -> Iterator[dict]:
        """Yield a "loss" row an item."""

    def timings(self, items: list[Item]) -> Iterator[dict]:
        """Yield "timing" rows, the arms in turn for each item."""

    def release(self) -> None:
        """Forget what was kept of the photographs so far."""


class RecordedSource:
    """Raw outputs read from a file: an evaluation done again without the model, or one whose outputs are planted."""

    def __init__(self, path: Path, items: list[Item]):
        self.path, self.load_seconds, self.facts = path, {}, {}
        by_job = {item.example.job_id: item.index for item in items}
        known = {item.index for item in items}
        self.rows: dict[tuple[str, str], list[dict]] = {}
        problems, seen = [], {}
        for line, row in read_rows(path):
            kind = row.setdefault("kind", "output")
            problem = fault(row, OUTPUTS[kind]) if str(kind) in OUTPUTS else f"unknown kind {kind!r}"
            expected = row.get("expected_scores", {})
            if not isinstance(expected, dict) or not all(map(is_number, expected.values())):
                problem = problem or "expected_scores is not an object of numbers"
            if problem:
                problems.append(f"{path}:{line}: {problem}")
                continue
            example = by_job.get(row.get("example"), row.get("example"))
            if kind == "arm":
                self.load_seconds[row["arm"]] = row["load_seconds"]
            elif example in known:
                found = {"sample": 0, "tokens": len(str(row.get("text", "")).split())} | row | {"example": example}
                which = (kind, row["arm"], example, found["sample"])
                if kind != "timing" and seen.setdefault(which, line) != line:
                    problems.append(f"{path}:{line}: the same {kind} as in line {seen[which]}; delete one of them")
                self.rows.setdefault((kind, row["arm"]), []).append(found)
        refuse(problems)
        present = {arm for kind, arm in self.rows if kind == "output"}
        self.arms = [arm for arm in ARMS if arm in present]
        if not {"base", "candidate"} <= present:
            raise UserError(
                f"{path}: outputs of 'base' and of 'candidate' are needed, found {sorted(present) or 'none'}"
            )

    def settings(self, arm: str) -> dict:
        return {"outputs": str(self.path)}

    def lacking(self, items: list[Item]) -> list[str]:
        """Return a sentence for each arm that has no output of some photographs."""
        found = []
        for arm in self.arms:
            there = {row["example"] for row in self.rows["output", arm]}
            if missing := sum(item.index not in there for item in items):
                text = f"no output of {arm} for {missing} of {len(items)} examples, which are in no figure of it"
                found.append(f"{self.path}: {text}.")
        return found

    def outputs(self, arm: str, items: list[Item], samples: int) -> Iterator[dict]:
        wanted = {item.index for item in items}
        return (row for row in self.rows.get(("output", arm), []) if row["example"] in wanted)

    def losses(self, arm: str, items: list[Item]) -> Iterator[dict]:
        wanted = {item.index for item in items}
        return (row for row in self.rows.get(("loss", arm), []) if row["example"] in wanted)

    def timings(self, items: list[Item]) -> Iterator[dict]:
        wanted = {item.index for item in items}
        return (row for arm in self.arms for row in self.rows.get(("timing", arm), []) if row["example"] in wanted)

    def release(self) -> None:
        pass


def _is_logged(row: object) -> bool:
    known = isinstance(row, dict) and str(row.get("kind")) in OUTPUTS and isinstance(row.get("key"), str)
    return known and fault(row, OUTPUTS[row["kind"]]) is None


class OutputLog:
    """The outputs and losses of one arm so far: a JSONL file named after the exact settings they came from.

    Each row reaches the disk as it comes, so an interrupted evaluation resumes where it stopped; another evaluation
    with the same base, settings and photographs (the next version's, say) finds the base's outputs there. Rows are
    keyed by content, not by position. A last line that a crash cut short is dropped.
    """

    def __init__(self, folder: Path, arm: str, settings: dict, fresh: bool = False):
        self.arm = arm
        text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        self.path = folder / f"{arm}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self.rows: dict[tuple[str, str, int], dict] = {}
        found = [] if fresh else self._whole_rows()
        if not found or found[0] != {"settings": settings}:
            found = [{"settings": settings}]
        for row in found[1:]:
            self.rows[row["kind"], row["key"], row.get("sample", 0)] = row
        write_jsonl(self.path, found)

    def _whole_rows(self) -> list[dict]:
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if found and not _is_logged(row):
                break  # rows after a damaged line cannot be trusted
            found.append(row)
        return found

    def has(self, kind: str, item: Item, sample: int = 0) -> bool:
        return (kind, item.key, sample) in self.rows

    def get(self, kind: str, item: Item, sample: int = 0) -> dict | None:
        """Return a row as its source gave it, numbered as in this evaluation."""
        row = self.rows.get((kind, item.key, sample))
        return row and {name: value for name, value in row.items() if name != "key"} | {"example": item.index}

    def add(self, row: dict, item: Item) -> None:
        """Append one row and make it durable."""
        row = row | {"key": item.key}
        self.rows[row["kind"], item.key, row.get("sample", 0)] = row
        append_jsonl(self.path, [row])

"""What preparation writes: the examples, what became of each job, the record of sides, the card and meta.json."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

from common.data.candidates import response_of
from common.data.findings import findings_of
from common.data.preparation import MIN_VALIDATION, Arrangement, DataOptions, Lengths, Task
from common.dataset import messages_row, triplet_row
from common.errors import UserError
from common.files import read_json, sha256_file, write_atomic
from common.schemas import LINK_REASON, LINK_REPORT, fault
from common.tables import counted

SCHEMA_VERSION = 1
_FILES = {"train": "jsonl", "val": "jsonl", "verdicts": "jsonl", "split": "json", "card": "html", "meta": "json"}


def output_paths(folder: Path, advisor: str, split_record: Path | None) -> dict[str, Path]:
    """Return {"train", "val", "verdicts", "split", "card", "meta": path}."""
    paths = {name: folder / f"training_data_{advisor}_{name}.{suffix}" for name, suffix in _FILES.items()}
    return paths | ({"split": split_record} if split_record else {})


def write_set(paths: dict[str, Path], task: Task, arrangement: Arrangement, options: DataOptions, meta: dict) -> None:
    """Write the files of a set so that no mixture of two sets is ever taken for one.

    All are complete on the disk before the first gets its name. meta.json, which holds the SHA-256 of the others, comes
    last but one, and the training examples, which make waits for, last: until then readers refuse the set, or see the
    old one.
    """
    rows = {
        "val": _rows(task, arrangement, options.row_format, "val"),
        "verdicts": _verdicts(arrangement),
        "train": _rows(task, arrangement, options.row_format, "train"),
    }
    with contextlib.ExitStack() as stack:  # which names them in the opposite order
        files = {
            name: stack.enter_context(write_atomic(paths[name], "wb"))
            for name in ("train", "meta", "verdicts", "val", "split")
        }
        hashes = {paths["card"].name: sha256_file(paths["card"])}
        for name, values in rows.items():
            hashes[paths[name].name] = _write_lines(files[name], values)
        hashes[paths["split"].name] = _write_lines(files["split"], [arrangement.record.to_dict()], indent=2)
        _write_lines(files["meta"], [meta | {"sha256": hashes}], indent=2)


def _write_lines(file: IO[bytes], values: Iterable[dict], indent: int | None = None) -> str:
    """Write values as JSON, put them on the disk, and return their SHA-256."""
    digest = hashlib.sha256()
    for value in values:
        line = (json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False) + "\n").encode()
        digest.update(line)
        file.write(line)
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


def _rows(task: Task, arrangement: Arrangement, row_format: str, side: str) -> Iterator[dict]:
    make = {"triplet": triplet_row, "messages": messages_row}[row_format]
    examples = arrangement.examples(side)
    for candidate, row in zip(examples, task.manifest.read([c.place for c in examples]), strict=True):
        response, spans = response_of(row, task.target, candidate)
        yield make(row["image_path"], task.prompt.text, response, row["job_id"], row["image_sha256"], spans)


def _verdicts(arrangement: Arrangement) -> Iterator[dict]:
    for candidate, group in zip(arrangement.candidates, arrangement.group_of, strict=True):
        yield {
            "job_id": candidate.job_id,
            "side": candidate.side or None,
            "reason": candidate.reason or None,
            "detail": candidate.detail,
            "verdicts": candidate.verdicts,
            "image_path": candidate.image_path,
            "image_sha256": candidate.sha256,
            "photo_group": min(arrangement.groups[group]) if group < len(arrangement.groups) else None,
        }


def meta_of(task: Task, arrangement: Arrangement, options: DataOptions, lengths: Lengths, warnings: list[str]) -> dict:
    """Return the content of meta.json for a set, without the SHA-256 of its files."""
    examples, photos = arrangement.examples(), arrangement.photographs()
    return {
        "schema_version": SCHEMA_VERSION,
        "advisor": task.advisor,
        "manifest": {"path": str(task.manifest.path), "sha256": sha256_file(task.manifest.path)},
        "options": {name: value for name, value in asdict(options).items() if name != "levels"},
        "seed": options.seed,
        "prompt": {"source": task.prompt.source, "sha256": hashlib.sha256(task.prompt.text.encode()).hexdigest()},
        "dimensions": list(task.target.specification.names),
        "specification": task.target.specification.to_dict(),
        "counts": {
            "linked": len(arrangement.candidates),
            "train": len(arrangement.examples("train")),
            "val": len(arrangement.examples("val")),
            "train_photographs": photos["train"],
            "val_photographs": photos["val"],
            "left_out": {name: len(ids) for name, ids in arrangement.left_out().items()},
            "projected": sum(candidate.projected for candidate in examples),
            "overall_recomputed": sum(candidate.overall_changed for candidate in examples),
        },
        "headline": headline(arrangement, warnings),
        "left_to_learn": arrangement.left_to_learn,
        "findings": findings_of(arrangement.candidates, task.target.specification.names),
        "warnings": warnings,
        "gates": arrangement.gates,
        "lengths": asdict(lengths),
    }


def headline(arrangement: Arrangement, warnings: list[str]) -> dict[str, str]:
    """Return {"text", "class"}: whether the set is ready to be trained on."""
    photos = arrangement.photographs()
    if photos["val"] < MIN_VALIDATION:
        needs = f"{counted(photos['val'], 'validation photograph')}, and evaluation needs {MIN_VALIDATION}"
        return {"text": f"Not ready: {needs}", "class": "bad"}
    told = counted(len(warnings), "warning") if warnings else "no warnings"
    return {
        "text": f"Ready: {photos['train']:,} + {photos['val']:,} photographs, {told}",
        "class": "warn" if warnings else "good",
    }


def link_report(manifest: Path) -> dict:
    """Return the report that linking left beside a manifest; {} where there is none or it is of another manifest."""
    path = manifest.with_name(f"{manifest.stem}_report.json")
    if not path.is_file():
        return {}
    report = read_json(path)
    problem = fault(report, LINK_REPORT) if isinstance(report, dict) else "not a report of linking"
    if not problem:
        reasons = report["reasons"].items()
        found = ((name, fault(r, LINK_REASON) if isinstance(r, dict) else "not an object") for name, r in reasons)
        problem = next((f"{name}: {text}" for name, text in found if text), None)
    if problem:
        raise UserError(f"{path}: {problem}; link the data again")
    return report if report["sha256"].get(manifest.name) == sha256_file(manifest) else {}

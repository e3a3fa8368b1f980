"""What preparation writes: the examples, what became of each job, the record of sides, the card and meta.json."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from common.data.candidates import response_of
from common.data.findings import copied_sentence, findings_of
from common.data.preparation import Arrangement, Lengths, Options, Task
from common.dataset import messages_row, triplet_row
from common.files import read_json, sha256_file, write_json, write_jsonl, write_text
from common.tables import counted

SCHEMA_VERSION = 1
_FILES = {"train": "jsonl", "val": "jsonl", "verdicts": "jsonl", "split": "json", "card": "html", "meta": "json"}


def output_paths(folder: Path, advisor: str, split_record: Path | None) -> dict[str, Path]:
    """Return {"train", "val", "verdicts", "split", "card", "meta": path}."""
    paths = {name: folder / f"training_data_{advisor}_{name}.{suffix}" for name, suffix in _FILES.items()}
    return paths | ({"split": split_record} if split_record else {})


def write_set(paths: dict[str, Path], task: Task, arrangement: Arrangement, options: Options, card: str, meta: dict):
    """Write all files, meta.json last: it names the SHA-256 of the others."""
    for side in ("train", "val"):
        write_jsonl(paths[side], _rows(task, arrangement, options.row_format, side))
    write_jsonl(paths["verdicts"], _verdicts(arrangement))
    arrangement.record.write(paths["split"])
    write_text(paths["card"], card)
    write_json(
        paths["meta"],
        meta | {"sha256": {path.name: sha256_file(path) for name, path in paths.items() if name != "meta"}},
    )


def _rows(task: Task, arrangement: Arrangement, row_format: str, side: str) -> Iterator[dict]:
    make = {"triplet": triplet_row, "messages": messages_row}[row_format]
    for row in task.manifest.read([candidate.place for candidate in arrangement.examples(side)]):
        response = response_of(row, task.target)
        yield make(row["image_path"], task.prompt.text, response, row["job_id"], row["image_sha256"])


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


def meta_of(task: Task, arrangement: Arrangement, options: Options, lengths: Lengths, warnings: list[str]) -> dict:
    """Return what meta.json says of a set, less the SHA-256 of its files."""
    examples, photos = arrangement.examples(), arrangement.photographs()
    return {
        "schema_version": SCHEMA_VERSION,
        "advisor": task.advisor,
        "manifest": {"path": str(task.manifest.path), "sha256": sha256_file(task.manifest.path)},
        "options": {name: value for name, value in asdict(options).items() if name != "levels"},
        "seed": options.seed,
        "prompt": {"source": task.prompt.source, "sha256": hashlib.sha256(task.prompt.text.encode()).hexdigest()},
        "dimensions": list(task.target.dimensions),
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
        "copied_scores": copied_sentence(arrangement.candidates),
        "findings": findings_of(arrangement.candidates, task.target.dimensions),
        "warnings": warnings,
        "gates": arrangement.gates,
        "lengths": asdict(lengths),
    }


def headline(arrangement: Arrangement, warnings: list[str]) -> dict[str, str]:
    """Return {"text", "class"}: whether the set is ready to be trained on."""
    photos = arrangement.photographs()
    told = counted(len(warnings), "warning") if warnings else "no warnings"
    return {
        "text": f"Ready: {photos['train']:,} + {photos['val']:,} photographs, {told}",
        "class": "warn" if warnings else "good",
    }


def link_report(manifest: Path) -> dict:
    """Return the report that linking left beside a manifest; {} where there is none or it is of another manifest."""
    path = manifest.with_name(f"{manifest.stem}_report.json")
    report = read_json(path) if path.is_file() else {}
    return report if report.get("sha256", {}).get(manifest.name) == sha256_file(manifest) else {}

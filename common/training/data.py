"""A training run's data: found by name, read, hashed, recorded so that a resumed run can tell its own from others."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click

from common.dataset import Example, load_examples
from common.errors import UserError
from common.files import find_input, read_json, sha256_file
from common.training.data_loader import Prepared, hash_photos


@dataclass(frozen=True)
class DataFile:
    """One dataset file: its examples, their photographs' hashes, and the record that goes into training_args.json."""

    examples: list[Example]
    photos: list[tuple[str, ...]]
    record: dict


def resolve_paths(settings: SimpleNamespace) -> None:
    """Replace the paths in ``settings`` by what is there; find validation data, name the output by the advisor."""
    train = find_input(settings.train_data)
    settings.train_data = str(train)
    if settings.val_data:
        settings.val_data = str(find_input(settings.val_data))
    else:
        name = re.sub(r"_train(?=\.\w+$)", "_val", train.name)
        beside = train.with_name(name)
        settings.val_data = str(beside) if name != train.name and beside.is_file() else None
    settings.advisor = _advisor(train)
    settings.output_dir = str(Path(settings.output_dir or f"models/qwen3-vl-4b-lora-{settings.advisor}"))


def _advisor(train: Path) -> str:
    """Return the advisor that meta.json or the file's name tells of; else the file's stem."""
    meta = train.with_name(re.sub(r"(_train)?\.\w+$", "_meta.json", train.name))
    if meta.is_file():
        found = read_json(meta)
        if (
            isinstance(found, dict)
            and isinstance(found.get("advisor"), str)
            and re.fullmatch(r"[\w-]+", found["advisor"])
        ):
            return found["advisor"]
    match = re.fullmatch(r"training_data_([\w-]+)_train\.\w+", train.name)
    return match[1] if match else train.stem


def read_data(path: str | None) -> DataFile | None:
    """Read a dataset file and hash its photographs; UserError names all that is wrong."""
    if path is None:
        return None
    examples = load_examples(path)
    photos = hash_photos(examples)
    record = {
        "path": path,
        "sha256": sha256_file(path),
        "examples": len(examples),
        "photos": [photo for hashes in photos for photo in hashes],
    }
    return DataFile(examples, photos, record)


def check_apart(train: DataFile, val: DataFile | None) -> None:
    """UserError when a validation photograph is also trained on: its loss would measure memory."""
    shared = set(train.record["photos"]) & set(val.record["photos"]) if val else set()
    if shared:
        where = [
            example.source
            for example, photos in zip(val.examples, val.photos, strict=True)
            if shared.intersection(photos)
        ]
        raise UserError(
            f"{where[0]}: the photograph is in the training data too ({len(shared)} such); prepare the data again"
        )


def report_overlong(prepared: Prepared, on_overlong: str, max_length: int) -> None:
    """Say which examples were left out as too long, or stop for them; UserError when none is left."""
    lines = [f"{example.source}: {length:,} tokens, more than {max_length:,}" for example, length in prepared.overlong]
    if lines and on_overlong == "fail":
        raise UserError("\n  ".join([f"{len(lines)} examples are longer than --max_seq_length", *lines[:20]]))
    if lines:
        click.echo(f"left out whole, since they are longer than {max_length:,} tokens: {len(lines)} examples", err=True)
        for line in lines[:10]:
            click.echo(f"  {line}", err=True)
    if not prepared.examples:
        raise UserError(
            f"no example of {max_length:,} tokens or less is left; raise --max_seq_length or prepare shorter ones"
        )

"""A training run's data: read, hashed, recorded so that a resumed run can tell its own from others."""

from dataclasses import dataclass

import click

from common.dataset import Example, load_examples, read_meta
from common.errors import UserError
from common.files import sha256_file
from common.training.rows import Prepared, hash_photos


@dataclass(frozen=True)
class DataFile:
    """One dataset file: its examples, their photographs' hashes, and the record that goes into training_args.json."""

    examples: list[Example]
    photos: list[tuple[str, ...]]  # SHA-256 of each example's photographs as they are on disk
    record: dict
    specification: dict | None  # of the prompt, as prepare_training_data.py wrote it beside the file


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
    return DataFile(examples, photos, record, (read_meta(path) or {}).get("specification"))


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


def report_overlong(prepared: Prepared, on_overlong: str, max_length: int, needed: bool = True) -> None:
    """Say which examples were left out as too long, or stop for them; UserError when none is left that is ``needed``.

    A run can do without validation examples, not without training examples.
    """
    lines = [f"{example.source}: {length:,} tokens, more than {max_length:,}" for example, length in prepared.overlong]
    if lines and on_overlong == "fail":
        raise UserError("\n  ".join([f"{len(lines)} examples are longer than --max_seq_length", *lines[:20]]))
    if lines:
        click.echo(f"left out whole, since they are longer than {max_length:,} tokens: {len(lines)} examples", err=True)
        for line in lines[:10]:
            click.echo(f"  {line}", err=True)
    if not prepared.examples and not needed:
        click.echo("no validation example is left: the adapter of the last step is delivered, unvalidated", err=True)
    elif not prepared.examples:
        raise UserError(
            f"no example of {max_length:,} tokens or less is left; raise --max_seq_length or prepare shorter ones"
        )

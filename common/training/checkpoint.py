"""Checkpoints that are whole or not there: a folder a step, renamed into place after its last byte is on the disk.

A checkpoint holds the adapter, the optimizer's moments, the best adapter so far, the log up to its step, and
`state.json` (position in the data, random state, settings, hashes of data and base). `manifest.json` names every
file's size and SHA-256, so a folder that a power loss or a bad disk has damaged is skipped for the one before.
A checkpoint is enough to resume: nothing else in the run's folder is read.
"""

import os
import re
import shutil
from pathlib import Path

import click

from common.errors import UserError
from common.files import read_json, sha256_file, sync_folder, write_json, write_jsonl
from common.model.tensors import HostArray, write_host_tensors

MANIFEST, STATE, LOG = "manifest.json", "state.json", "log.jsonl"
STATE_KEYS = {
    "schema_version", "position", "random_state", "settings", "layout", "processes", "train_data", "val_data",
    "base_fingerprint", "versions",
}  # fmt: skip


class Checkpoints:
    """The checkpoints of one run, in ``folder``; the newest ``keep`` are kept."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint folder, newest first, damaged ones included."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name)), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def newest(self) -> tuple[Path, dict] | None:
        """Return (folder, state) of the newest whole checkpoint; damaged ones are named on stderr and skipped."""
        for step in self.steps():
            problem = damage(self.path(step))
            if problem is None:
                return self.path(step), read_json(self.path(step) / STATE)
            click.echo(f"{self.path(step)} is damaged ({problem}); trying the one before", err=True)
        return None

    def save(self, step: int, tensors: dict[str, dict[str, HostArray]], state: dict, log: list[dict]) -> Path:
        """Write a checkpoint of ``step``: one safetensors file for each of ``tensors``, ``state`` and ``log``.

        Older ones beyond ``keep`` are removed afterwards. When the disk refuses, the draft is removed and a UserError
        names the newest whole checkpoint.
        """
        target, draft = self.path(step), self.folder / f".writing-{os.getpid()}-{step:06d}"
        try:
            make_durable(self.folder)
            draft.mkdir()
            for name, group in tensors.items():
                write_host_tensors(draft / f"{name}.safetensors", group, {"format": "mlx"})
            write_json(draft / STATE, state)
            write_jsonl(draft / LOG, log)
            write_manifest(draft)
            self._put_in_place(draft, target)
        except (OSError, UserError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            reason = getattr(error, "strerror", None) or getattr(error, "message", error)
            kept = [self.path(old) for old in self.steps() if damage(self.path(old)) is None]
            raise UserError(
                f"the checkpoint of step {step} could not be written: {reason}; "
                + (f"{kept[0]} is whole: free space, then --resume" if kept else "no earlier one exists")
            ) from error
        self._prune()
        return target

    def _put_in_place(self, draft: Path, target: Path) -> None:
        sync_folder(draft)
        if target.exists():  # a run that was resumed from further back saves this step again
            aside = self.folder / f".removing-{os.getpid()}-{target.name}"
            target.rename(aside)
            draft.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            draft.rename(target)
        sync_folder(self.folder)

    def _prune(self) -> None:
        for step in self.steps()[self.keep :]:
            # renamed first: a half-removed folder must not look like a checkpoint
            aside = self.folder / f".removing-{os.getpid()}-{step:06d}"
            self.path(step).rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed runs left half-written."""
        for leftover in self.folder.glob(".*ing-*") if self.folder.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)


def make_durable(folder: Path) -> None:
    """Make a folder such that its name, and those of new folders above it, survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file in ``folder``, which makes the folder whole."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    write_json(
        folder / MANIFEST, {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
    )


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is as its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except UserError as error:
        return error.message
    except (AttributeError, TypeError, KeyError):
        return f"{MANIFEST} is no list of files with their sizes and hashes"
    for name, size, sha256 in entries:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_file(path) != sha256:
            return f"{name} has changed since it was written"
    if STATE not in manifest:
        return f"{STATE} is missing"
    state = read_json(folder / STATE)
    missing = STATE_KEYS - state.keys() if isinstance(state, dict) else STATE_KEYS
    return f"{STATE} lacks {', '.join(sorted(missing))}" if missing else None

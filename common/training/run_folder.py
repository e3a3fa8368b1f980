"""The folder a training run writes to: never overwritten unasked, used by one run at a time, gone on with exactly."""

import fcntl
from pathlib import Path

from common.errors import UserError
from common.records import ARGS
from common.training.checkpoint import Checkpoints
from integration.lora_patch.versions import CONFIG, PEFT_WEIGHTS

# settings that a resumed run may change, since the adapter comes out the same; what they name is compared by content
FREE = {
    "train_data", "val_data", "base_model", "output_dir", "save_freq", "keep_checkpoints", "log_freq", "report_to",
    "resume", "overwrite", "plan", "feature_cache", "cache_limit_gb", "on_overlong", "auto_memory",
}  # fmt: skip


class RunFolder:
    """The output folder, its checkpoints, and the lock that keeps a second run out."""

    def __init__(self, path: Path, keep_checkpoints: int):
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep_checkpoints)
        self.lock = None

    @property
    def cache(self) -> Path:
        """Where prepared rows wait that memory has no room for: beside the folder, which may yet be renamed."""
        return self.path.with_name(f".{self.path.name}.cache")

    @property
    def finished(self) -> bool:
        return all((self.path / name).is_file() for name in (ARGS, CONFIG, PEFT_WEIGHTS))

    def find_resumable(self, resume: bool, overwrite: bool) -> tuple[Path, dict] | None:
        """Return (checkpoint, state) to go on from, None to begin anew; UserError where that would lose an adapter."""
        if overwrite:  # above --resume, which the Makefile always gives
            return None
        if resume and (found := self.checkpoints.newest()):
            return found
        if self.finished:
            raise UserError(
                f"{self.path}: holds a finished adapter; name another --output_dir, or give --overwrite to train anew "
                "(the old folder is renamed, not deleted)"
            )
        if (steps := self.checkpoints.steps()) and not resume:
            raise UserError(
                f"{self.path}: holds an unfinished run (step {steps[0]}); give --resume to go on with it, or "
                "--overwrite to begin anew (the old folder is renamed, not deleted)"
            )
        return None

    def claim(self, fresh: bool) -> str | None:
        """Take the folder for this run, just before the first write; return what was said aside, if anything was.

        ``fresh``: begin anew; what a former run left is renamed.
        """
        said = None
        try:
            self._lock()
            if fresh and (self.finished or self.checkpoints.steps()):
                number = 1
                while (aside := self.path.with_name(f"{self.path.name}.replaced-{number}")).exists():
                    number += 1
                self.path.rename(aside)
                said = f"the former {self.path} is now {aside}"
                self._lock()
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another run is training here; wait for it or name another folder") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); name another --output_dir") from error
        self.checkpoints.sweep()
        for folder in (self.path, self.path / "last", self.cache):  # what killed runs left half-written
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        return said

    def _lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends, however it ends
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_over(settings: dict, typed: set[str], saved: dict) -> list[str]:
    """Fill ``settings`` with a checkpoint's, but for those that may change; return how the ``typed`` ones differ."""
    differences = []
    for name, value in saved.items():
        if name in FREE or name not in settings:
            continue
        if name in typed and settings[name] != value:
            differences.append(f"{name} was {value}, now {settings[name]}")
        settings[name] = value
    return differences


def data_differences(saved: dict | None, now: dict | None, label: str) -> list[str]:
    """Return how a dataset differs from the one a checkpoint was trained on, in words."""
    if saved is None or now is None:
        return [] if saved == now else [f"{label} was {_data(saved)}, now {_data(now)}"]
    if saved["photos"] != now["photos"]:
        gone, new = (len(set(a["photos"]) - set(b["photos"])) for a, b in ((saved, now), (now, saved)))
        if gone or new or saved["examples"] != now["examples"]:
            return [f"{label} was {_data(saved)}, now {_data(now)} ({gone} photographs gone, {new} new)"]
    if saved["sha256"] != now["sha256"]:
        return [f"{label} was {_data(saved)}, now {_data(now)} (the texts or their order changed)"]
    return []


def _data(record: dict | None) -> str:
    return f"{record['examples']} examples, SHA-256 {record['sha256'][:12]}" if record else "none"


def refuse_differences(folder: Path, differences: list[str]) -> None:
    """UserError that names every difference between a checkpoint and the run that would go on from it."""
    if differences:
        raise UserError(
            f"{folder}: cannot go on with another run's checkpoint: "
            + "; ".join(differences)
            + ". Give the same again, or train anew with --overwrite or another --output_dir"
        )

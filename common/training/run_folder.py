"""The folder a training run writes to: overwritten only on request, used by one run at a time, resumed exactly."""

import fcntl
import time
from pathlib import Path

from common.errors import UserError
from common.files import sync_folder, write_text
from common.training.checkpoint import Checkpoints, make_durable
from common.training.model_card import CARD
from integration.lora_patch.versions import ARGS, CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS

TRAINED = ".trained"  # written last: the run is finished, which the launcher's exit code does not prove
ADAPTER_FILES = (ARGS, CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS, "adapter_model.bin", CARD)


class RunFolder:
    """The output folder, its checkpoints, and the lock that keeps a second run out."""

    def __init__(self, path: Path, keep_checkpoints: int):
        self.path = Path(path)
        if Path.cwd().is_relative_to(self.path.resolve()):  # --overwrite would rename it, with all that is in it
            raise UserError(f"{self.path}: is the working folder, or one above it; name a folder of its own")
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep_checkpoints)
        self.lock = None

    @property
    def cache(self) -> Path:
        """Where prepared rows are kept that memory has no room for: beside the folder, which may yet be renamed."""
        return self.path.with_name(f".{self.path.name}.cache")

    @property
    def finished(self) -> bool:
        return all((self.path / name).is_file() for name in (ARGS, CONFIG, PEFT_WEIGHTS))

    @property
    def holds(self) -> str | None:
        """The name of a file that an adapter, or a model, consists of; None if there is none."""
        names = [name for name in ADAPTER_FILES if (self.path / name).exists()]
        names += [path.name for path in self.path.glob("*.safetensors")]
        if not (self.path / ".lock").exists() and (self.path / "config.yaml").exists():  # each run leaves both
            names.append("config.yaml")
        return next(iter(names), None)

    def find_resumable(self, resume: bool, overwrite: bool) -> tuple[Path, dict] | None:
        """Return (checkpoint, state) to resume, None to train again; UserError where that would lose an adapter."""
        if overwrite:  # above --resume, which the Makefile always gives
            return None
        if resume and (found := self.checkpoints.newest()):
            return found
        steps = self.checkpoints.steps()
        if self.finished or (self.holds and not steps):
            what = "a finished adapter" if self.finished else f"files that this run did not write ({self.holds})"
            raise UserError(
                f"{self.path}: holds {what}; name another --output_dir, or give --overwrite to train again "
                "(the old folder is renamed, not deleted)"
            )
        if steps and not resume:
            raise UserError(
                f"{self.path}: holds an unfinished run (step {steps[0]}); give --resume to continue it, or "
                "--overwrite to train again (the old folder is renamed, not deleted)"
            )
        return None

    def claim(self, fresh: bool) -> str | None:
        """Take the folder for this run, just before the first write; return a line on what was renamed, if anything.

        ``fresh``: train again; what a former run left is renamed. Of a link the target is renamed.
        """
        line, taken = None, fresh and self.holds  # asked before the lock is there, which each run leaves
        try:
            self._lock()
            if taken or (fresh and self.checkpoints.steps()):
                real = self.path.resolve()
                number = 1
                while (aside := real.with_name(f"{real.name}.replaced-{number}")).exists():
                    number += 1
                (real / ".lock").unlink()
                real.rename(aside)
                sync_folder(real.parent)
                line = f"the former {self.path} is now {aside if self.path.is_absolute() else self._shown(aside)}"
                self._lock()
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another run is training here; wait for it or name another folder") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); name another --output_dir") from error
        self.checkpoints.sweep()
        for folder in (self.path, self.path / "last", self.cache):  # what killed runs left half-written
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        return line

    def _shown(self, aside: Path) -> Path:
        return self.path.with_name(aside.name) if self.path.resolve().parent == self.path.parent.resolve() else aside

    def _lock(self) -> None:
        make_durable(self.path.resolve())
        self.lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends, however it ends
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def take(self, seconds: float) -> bool:
        """Take the lock of a process that is ending; False if the folder is not here, or others keep it for so long."""
        if not (self.path / ".lock").is_file():
            return False
        until = time.monotonic() + seconds
        while True:
            try:
                self._lock()
                return True
            except OSError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)

    def mark(self, finished: bool) -> None:
        """Record with a file that the run is finished, or that it is not."""
        if finished:
            write_text(self.path / TRAINED, "")
            return
        try:
            (self.path / TRAINED).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); name another --output_dir") from error


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
    """UserError that names every difference between a checkpoint and the run that would resume it."""
    if differences:
        raise UserError(
            f"{folder}: cannot resume another run's checkpoint: "
            + "; ".join(differences)
            + ". Give the same, or train again with --overwrite or another --output_dir"
        )

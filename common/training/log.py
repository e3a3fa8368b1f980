"""What the person who waits sees: a log line a report, a loss curve that grows, TensorBoard or wandb on request."""

import importlib.util
import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomic
from common.training.loss_curve import draw_loss_curve

CURVE_SECONDS = 20  # the picture is drawn again at most this often, so that drawing costs nothing


class TrainingLog:
    """`training_log.jsonl`: {"kind": "train"|"validation", "step": ...} a line, appended as it happens.

    A resumed run first drops what a killed one logged after its checkpoint, so that no step stands there twice.
    """

    def __init__(self, folder: Path, upto_step: int):
        self.path, self.curve = Path(folder) / "training_log.jsonl", Path(folder) / "loss_curve.png"
        self.rows = [row for row in _whole_lines(self.path) if row["step"] <= upto_step] if upto_step else []
        self.drawn = 0.0
        with write_atomic(self.path) as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def add(self, kind: str, step: int, **figures: float | int | None) -> dict:
        """Append one line and draw the curve again if that is due."""
        row = {"kind": kind, "step": step, **figures}
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free space, then --resume") from error
        if time.monotonic() - self.drawn > CURVE_SECONDS:
            self.draw()
        return row

    def draw(self) -> None:
        """Draw `loss_curve.png` from all lines so far."""
        with write_atomic(self.curve, "wb") as file:
            draw_loss_curve(self.rows).save(file, "PNG")
        self.drawn = time.monotonic()

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]


def _whole_lines(path: Path) -> list[dict]:
    """Return the log's lines up to the first that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class NoReporter:
    """Reports nowhere but to the log."""

    def report(self, row: dict) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardReporter(NoReporter):
    def __init__(self, folder: Path, settings: dict):
        from tensorboard.summary import Writer

        self.writer = Writer(str(folder / "tensorboard"))

    def report(self, row: dict) -> None:
        for name, value in _figures(row):
            self.writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


class WandbReporter(NoReporter):
    def __init__(self, folder: Path, settings: dict):
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(project="mondrian-lora", name=folder.name, dir=str(folder), config=settings)

    def report(self, row: dict) -> None:
        self.run.log({f"{row['kind']}/{name}": value for name, value in _figures(row)}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


REPORTERS = {"tensorboard": TensorBoardReporter, "wandb": WandbReporter}


def require_reporter(kind: str) -> None:
    """UserError when the library that ``--report_to`` needs is not installed; nothing is imported or written."""
    if kind in REPORTERS and importlib.util.find_spec(kind) is None:
        raise UserError(f"--report_to {kind}: not installed; pip install {kind}")


def make_reporter(kind: str, folder: Path, settings: dict) -> NoReporter:
    """Return the reporter that ``--report_to`` names; ``folder`` must be there."""
    return REPORTERS[kind](folder, settings) if kind in REPORTERS else NoReporter()


def _figures(row: dict) -> list[tuple[str, float]]:
    return [(name, value) for name, value in row.items() if name not in ("kind", "step") and value is not None]


def clock(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def say(line: str) -> None:
    """Print one line without tearing a progress bar apart."""
    tqdm.write(line)

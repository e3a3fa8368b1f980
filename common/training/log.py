"""The progress log of a run: a line a report, a loss curve that grows, TensorBoard or wandb on request."""

import importlib.util
import io
import json
import math
import os
import time
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import jsonl_writer, write_atomic, write_jsonl
from common.training.loss_curve import draw_loss_curve

CURVE_SECONDS = 60  # the picture takes a third of a second, so it is drawn again at most this often


class TrainingLog:
    """`training_log.jsonl`: {"kind": "train"|"validation", "step": ...} a line, appended as it happens.

    ``rows`` are the lines so far: a resumed run takes them from its checkpoint and writes the file again, so no step is
    in it twice. Only the process that ``writes`` touches the disk.
    """

    def __init__(self, folder: Path, rows: list[dict], writes: bool):
        self.path, self.curve = Path(folder) / "training_log.jsonl", Path(folder) / "loss_curve.png"
        self.rows, self.writes, self.drawn = rows, writes, time.monotonic()
        if writes:
            write_jsonl(self.path, rows)

    def add(self, kind: str, step: int, **figures: float | int | None) -> dict:
        """Append one line and draw the curve again if that is due."""
        row = {"kind": kind, "step": step, **figures}
        self.rows.append(row)
        if self.writes:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    jsonl_writer(file).write(row)
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); free space, then --resume"
                ) from error
            if time.monotonic() - self.drawn > CURVE_SECONDS:
                self.draw()
        return row

    def draw(self, delivered: int | None = None) -> None:
        """Draw `loss_curve.png` from all lines so far, with a mark at the step that is ``delivered``."""
        picture = io.BytesIO()
        draw_loss_curve(self.rows, picture, delivered)
        with write_atomic(self.curve, "wb") as file:
            file.write(picture.getvalue())
        self.drawn = time.monotonic()


def read_log(path: Path, upto_step: int) -> list[dict]:
    """Return a log's lines up to a step, as far as they are whole: a kill cuts the last one short."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
            if row["step"] <= upto_step and math.isfinite(row["loss"]) and row["kind"] in ("train", "validation"):
                rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
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
    """Return a duration for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def print_line(line: str) -> None:
    """Print one line without breaking a progress bar."""
    tqdm.write(line)

"""A training run: what it trains and on what, how far it is, and how it is saved and resumed."""

import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from common.model.step import pack_lora, unpack_lora
from common.model.tensors import HostArray, read_host_tensors
from common.records import software_versions
from common.training.checkpoint import LOG
from common.training.data import DataFile
from common.training.data_loader import Sharding, steps_per_epoch
from common.training.distributed import Processes
from common.training.log import TrainingLog, make_reporter, read_log
from common.training.memory import Layout
from common.training.optimizer import AdamW, warmup_within
from common.training.options import TrainingOptions
from common.training.rows import Prepared
from common.training.run_folder import RunFolder
from integration.lora_patch.vlm import Base

LOCK_SECONDS = 5.0  # a killed process holds its locks until its memory is given back


@dataclass
class Position:
    """How far a run is: what a checkpoint holds besides tensors and settings."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    validations_since_best: int = 0
    done: bool = False
    stopped_early: bool = False


@dataclass(eq=False, repr=False)
class Run:
    """A training run from its first step, or exactly where a checkpoint left off. Making it claims the folder."""

    options: TrainingOptions
    processes: Processes
    folder: RunFolder
    base: Base  # with its adapter attached
    fingerprint: dict
    data: tuple[DataFile, DataFile | None]  # training, validation
    train: Prepared
    val: Prepared | None
    layout: Layout
    checkpoint: tuple[Path, dict] | None  # (folder, state) to resume from

    def __post_init__(self) -> None:
        options, processes = self.options, self.processes
        global_batch = options.batch_size * options.gradient_accumulation_steps * processes.world
        self.sharding = Sharding(global_batch, self.layout.micro, processes.rank, processes.world)
        self.steps_per_epoch = steps_per_epoch(len(self.train), global_batch)
        self.total_steps = options.epochs * self.steps_per_epoch
        self.warmup_steps = warmup_within(options.warmup_steps, self.total_steps)
        self.optimizer = AdamW(pack_lora(self.base.model), options.weight_decay)
        self.position, self.best, rows = Position(), {}, []
        if self.checkpoint:
            self.position, self.best, rows = self._restore(*self.checkpoint)
        if processes.first and (renamed := self.folder.claim(fresh=not self.checkpoint)):
            click.echo(renamed)
        self.reporter = make_reporter(
            options.report_to if processes.first else "none", self.folder.path, asdict(options)
        )
        self.log = TrainingLog(self.folder.path, rows, processes.first)
        self.last_step: Snapshot | None = None
        self.writing = threading.Lock()

    def __str__(self) -> str:
        validation = f"{len(self.val)} for validation" if self.val else "none for validation (best = last)"
        resumed = f"; continuing after step {self.position.step}" if self.position.step else ""
        return (
            f"{self.optimizer.values.size:,} parameters, {len(self.train)} examples to train on, {validation}; "
            f"{self.total_steps} steps, {self.steps_per_epoch} an epoch, {self.warmup_steps} of warm-up{resumed}"
        )

    @property
    def delivered_step(self) -> int:
        """The step whose adapter is delivered: the best by validation loss, else the last."""
        return self.position.best_step or self.position.step

    def _restore(self, checkpoint: Path, state: dict) -> tuple[Position, dict[str, HostArray], list[dict]]:
        """Give the optimizer a checkpoint's state; return (position, best adapter, log)."""
        position, best, rows = Position(**state["position"]), {}, []
        tensors = {name: mx.zeros_like(self.optimizer.values) for name in ("values", "first", "second")}
        if self.processes.first:
            tensors = mx.load(str(checkpoint / "optimizer.safetensors"))
            tensors["values"] = pack_lora(self.base.model, mx.load(str(checkpoint / "adapter.safetensors")))
        if self.processes.first or checkpoint.is_dir():  # other processes on this machine may have to save, too
            if (checkpoint / "best.safetensors").is_file():
                best = read_host_tensors(checkpoint / "best.safetensors")[0]
            own = checkpoint / LOG  # checkpoints of an earlier version have none
            rows = read_log(own if own.is_file() else self.folder.path / "training_log.jsonl", position.step)
        tensors = {name: self.processes.from_first(tensors[name]) for name in ("values", "first", "second")}
        mx.eval(tensors)
        self.optimizer.restore(tensors, position.step)
        return position, best, rows

    def snapshot(self) -> "Snapshot":
        """Return the state after the present step."""
        optimizer = self.optimizer
        vectors = {"values": optimizer.values, "first": optimizer.first, "second": optimizer.second}
        return Snapshot(replace(self.position), vectors, self.best, len(self.log.rows))

    def save(self) -> Path | None:
        """Write a checkpoint of the present position, on the process that writes."""
        return self.write(self.snapshot()) if self.processes.first else None

    def step_ends(self) -> None:
        """Keep this state while the next step runs, in case another process is lost in that step.

        It costs no computation; the device holds both states for the moment of the update.
        """
        if self.processes.world > 1:
            self.last_step = self.snapshot()

    def rescue(self) -> Path | None:
        """Return the checkpoint of the last step that all processes finished, written now if need be.

        Called from another thread while the main one waits in MLX, so it must not compute anything with MLX. None if
        there is no such step, this process does not know all of it, or the folder stays locked.
        """
        snapshot = self.last_step
        if snapshot is None or not snapshot.position.step:
            return None
        if snapshot.position.best_step and not snapshot.best:
            return None
        if not self.processes.first and not self.folder.take(LOCK_SECONDS):
            return None
        with self.writing:
            steps = self.folder.checkpoints.steps()
            if steps and steps[0] >= snapshot.position.step:
                return self.folder.checkpoints.path(steps[0])
        return self.write(snapshot)

    def write(self, snapshot: "Snapshot") -> Path:
        """Write a checkpoint."""
        train, val = self.data
        state = {
            "schema_version": 1,
            "position": asdict(snapshot.position),
            # order and dropout are functions of seed and step, so these two are the whole random state
            "random_state": {"seed": self.options.seed, "step": snapshot.position.step},
            "settings": asdict(self.options),
            "layout": asdict(self.layout),
            "processes": self.processes.world,
            "train_data": train.record,
            "val_data": val and val.record,
            "base_fingerprint": self.fingerprint,
            "versions": software_versions(),
        }
        host = {name: np.array(vector) for name, vector in snapshot.vectors.items()}
        adapter = unpack_lora(self.base.model, host.pop("values"))
        tensors = {"adapter": adapter, "optimizer": host}
        tensors = {
            group: {name: HostArray("float32", array) for name, array in arrays.items()}
            for group, arrays in tensors.items()
        }
        if snapshot.best:
            tensors["best"] = snapshot.best
        with self.writing:
            rows = self.log.rows[: snapshot.rows]
            return self.folder.checkpoints.save(snapshot.position.step, tensors, state, rows)

    def delivered(self) -> dict[str, HostArray]:
        """Return the adapter in the base's own precision, which is also what the forward pass rounds it to."""
        dtype = self.base.model.language_model.model.norm.weight.dtype
        tensors = unpack_lora(self.base.model, self.optimizer.values)
        return {name: HostArray.of(tensor.astype(dtype)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Snapshot:
    """The state after a step, all that a checkpoint needs: arrays that are computed, or being computed."""

    position: Position
    vectors: dict[str, mx.array]  # "values", "first", "second": float32 [parameters]
    best: dict[str, HostArray]  # the best adapter so far; {} if there is none
    rows: int  # lines of the log

"""A training run: what it trains and on what, how far it is, and how it is saved and gone on with."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import mlx.core as mx

from common.model.step import pack_lora, unpack_lora
from common.records import software_versions
from common.training.data import DataFile
from common.training.data_loader import Prepared, Sharding, steps_per_epoch
from common.training.distributed import Processes
from common.training.log import TrainingLog, make_reporter
from common.training.optimizer import AdamW, warmup_within
from common.training.plan import Layout
from common.training.run_folder import RunFolder
from integration.lora_patch.vlm import Base


@dataclass
class Position:
    """How far a run is: all that a checkpoint tells of it besides tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    validations_since_best: int = 0
    done: bool = False
    stopped_early: bool = False


@dataclass
class Run:
    """A training run: what it trains, on what, how far it is, and where it writes."""

    settings: SimpleNamespace
    base: Base
    train: Prepared
    val: Prepared | None
    data: tuple[DataFile, DataFile | None]
    fingerprint: dict
    layout: Layout
    folder: RunFolder
    processes: Processes

    def begin(self, found: tuple[Path, dict] | None) -> None:
        """Start from the untrained adapter, or exactly where a checkpoint left off; claim the folder."""
        settings, processes = self.settings, self.processes
        self.sharding = Sharding(
            settings.batch_size * settings.gradient_accumulation_steps * processes.world,
            self.layout.micro,
            processes.rank,
            processes.world,
        )
        self.an_epoch = steps_per_epoch(len(self.train), self.sharding.global_batch)
        self.total = settings.epochs * self.an_epoch
        self.warmup = warmup_within(settings.warmup_steps, self.total)
        self.optimizer = AdamW(pack_lora(self.base.model), settings.weight_decay)
        self.position, self.best = Position(), {}
        if found:
            self._restore(*found)
        self.log, self.reporter = None, None
        if processes.first:
            if said := self.folder.claim(fresh=not found):
                click.echo(said)
            self.reporter = make_reporter(settings.report_to, self.folder.path, vars(settings))
            self.log = TrainingLog(self.folder.path, self.position.step if found else None)

    def _restore(self, checkpoint: Path, state: dict) -> None:
        self.position = Position(**state["position"])
        names = ("values", "first", "second")
        tensors = {name: mx.zeros_like(self.optimizer.values) for name in names}
        if self.processes.first:
            tensors = mx.load(str(checkpoint / "optimizer.safetensors"))
            tensors["values"] = pack_lora(self.base.model, mx.load(str(checkpoint / "adapter.safetensors")))
            best = checkpoint / "best.safetensors"
            self.best = mx.load(str(best)) if best.is_file() else {}
        tensors = {name: self.processes.from_first(tensors[name]) for name in names}
        mx.eval(tensors, self.best)
        self.optimizer.restore(tensors, self.position.step)

    def save(self) -> Path | None:
        """Write a checkpoint of the present position."""
        if not self.processes.first:
            return None
        train, val = self.data
        state = {
            "schema_version": 1,
            "position": asdict(self.position),
            # order and dropout are functions of seed and step, so these two are the whole random state
            "random_state": {"seed": self.settings.seed, "step": self.position.step},
            "settings": vars(self.settings),
            "layout": asdict(self.layout),
            "processes": self.processes.world,
            "train_data": train.record,
            "val_data": val and val.record,
            "base_fingerprint": self.fingerprint,
            "versions": software_versions(),
        }
        tensors = {"adapter": unpack_lora(self.base.model, self.optimizer.values)}
        tensors["optimizer"] = {"first": self.optimizer.first, "second": self.optimizer.second}
        if self.best:
            tensors["best"] = self.best
        return self.folder.checkpoints.save(self.position.step, tensors, state)

    def delivered(self) -> dict[str, mx.array]:
        """Return the adapter in the base's own precision, which is also what the forward pass rounds it to."""
        dtype = self.base.model.language_model.model.norm.weight.dtype
        tensors = unpack_lora(self.base.model, self.optimizer.values)
        return {name: tensor.astype(dtype) for name, tensor in tensors.items()}

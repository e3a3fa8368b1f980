"""The options of a training run, as one record that checkpoints and training_args.json keep."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from common.dataset import read_meta
from common.errors import UserError
from common.files import find_input
from integration.lora_patch.names import is_advisor
from integration.lora_patch.versions import version_folder

AUTO = "auto"

# A resumed run may change these: the adapter stays the same. Data and base are compared by content instead of name.
FREE = {
    "train_data", "val_data", "advisor", "base_model", "output_dir", "save_freq", "keep_checkpoints", "log_freq",
    "report_to", "resume", "overwrite", "plan", "feature_cache", "cache_limit_gb", "wired_limit_gb", "on_overlong",
    "auto_memory",
    "phrasebook",
}  # fmt: skip
# And these, which lay a step out in memory: the same mathematics, but other rounding and other dropout masks.
LAYOUT = {"micro_batch_size", "grad_checkpointing", "pad_multiple"}


class NumberOrAuto(click.ParamType):
    """A number of at least ``least``, or "auto"."""

    name = "number"

    def __init__(self, least: float, kind: type = int):
        self.least, self.kind = least, kind
        self.wanted = f"'auto' or a {'whole ' if kind is int else ''}number of at least {least:g}"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | float | str:
        if value == AUTO:
            return AUTO
        try:
            number = self.kind(value)
        except ValueError:
            number = None
        if number is None or not self.least <= number < float("inf"):
            self.fail(f"{value}: give {self.wanted}", param, ctx)
        return number


@dataclass(frozen=True)
class TrainingOptions:
    """The options of train_mlx_lora.py by their names on the command line; "auto" where memory decides.

    Sizes are in examples, lengths in tokens, pictures in pixels, frequencies in optimizer steps, memory in GB (1e9).
    """

    train_data: str  # path
    val_data: str | None  # path
    max_seq_length: int | str
    max_image_size: int  # long side
    on_overlong: str  # "skip" or "fail"
    base_model: str  # hub id or folder
    lora_r: int
    lora_alpha: int
    lora_dropout: float  # probability
    epochs: int
    batch_size: int  # in each process
    gradient_accumulation_steps: int
    learning_rate: float  # after warm-up
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float  # 0: no clipping
    early_stopping_patience: int  # validations; 0: never
    seed: int
    auto_memory: bool
    micro_batch_size: int | str
    grad_checkpointing: str  # "auto", "on" or "off"
    pad_multiple: int | str  # tokens
    cache_limit_gb: float | str
    wired_limit_gb: float | str  # on a Mac
    feature_cache: str  # "auto", "memory" or "disk"
    output_dir: str | None  # path; None: named by the advisor
    phrasebook: bool  # whether to write the training responses' tokens beside the adapter
    save_freq: int
    keep_checkpoints: int
    eval_freq: int  # 0: after each epoch only
    log_freq: int
    report_to: str  # "none", "tensorboard" or "wandb"
    resume: bool
    overwrite: bool
    plan: bool
    advisor: str = ""

    def found(self) -> "TrainingOptions":
        """Return the options with their inputs found on disk, and the output named by the advisor."""
        train = find_input(self.train_data)
        if self.val_data:
            val = find_input(self.val_data)
        else:
            name = re.sub(r"_train(?=\.\w+$)", "_val", train.name)
            val = train.with_name(name)
            val = val if name != train.name and val.is_file() else None
        if self.micro_batch_size != AUTO and self.micro_batch_size > self.batch_size:
            raise UserError(f"--micro_batch_size {self.micro_batch_size} is more than --batch_size {self.batch_size}")
        advisor = advisor_of(train, read_meta(train, *([val] if val else [])) or {})
        output = str(Path(self.output_dir or version_folder(Path("models"), advisor, 1)))
        val = str(val) if val else None
        return replace(self, train_data=str(train), val_data=val, advisor=advisor, output_dir=output)

    def resumed(self, saved: dict, given: set[str]) -> tuple["TrainingOptions", list[str]]:
        """Return (options with a checkpoint's ``saved`` ones, how those that were ``given`` differ from them)."""
        own, taken, differences = asdict(self), {}, []
        for name, value in saved.items():
            if name not in own or name in FREE or (name in LAYOUT and name in given):
                continue
            taken[name] = value
            if name in given and own[name] != value:
                differences.append(f"{name} was {value}, now {own[name]}")
        return replace(self, **taken), differences

    @property
    def longest(self) -> int | None:
        """The longest example in tokens, if it was given."""
        return None if self.max_seq_length == AUTO else self.max_seq_length


def advisor_of(train: Path, meta: dict) -> str:
    """Return the advisor that the dataset's summary or the file's name tells; else the file's stem."""
    if isinstance(advisor := meta.get("advisor"), str) and is_advisor(advisor):
        return advisor
    match = re.fullmatch(r"training_data_(.+)_train\.\w+", train.name)
    return match[1] if match and is_advisor(match[1]) else train.stem

"""How a run is laid out in memory, said before it starts; and `--plan`, which measures a few steps and trains none."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import click
import mlx.core as mx

from common.errors import UserError
from common.model.lora import lora_parameters
from common.model.step import collate, loss_and_grads
from common.training.data_loader import Prepared, padded, steps_per_epoch
from common.training.log import clock
from common.training.memory import (
    GB,
    PAD_MULTIPLE,
    Choice,
    Device,
    Plan,
    Shape,
    estimate,
    fit,
    longest_that_fits,
    size,
    too_large,
)
from integration.lora_patch.vlm import Base

AUTO = "auto"


@dataclass(frozen=True)
class Layout:
    """What the memory decided; a resumed run keeps it, since other micro-batches would round otherwise."""

    micro: int
    checkpointing: bool
    multiple: int
    max_length: int


def whole_number(settings: SimpleNamespace, name: str, least: int) -> int | None:
    """Return an option that is "auto" (None) or a whole number of at least ``least``; UserError otherwise."""
    text = str(getattr(settings, name))
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"--{name} {text}: give 'auto' or a whole number of at least {least}")
    return int(text)


def check_numbers(settings: SimpleNamespace) -> None:
    """UserError for the options that are neither "auto" nor a number, before anything is loaded."""
    whole_number(settings, "max_seq_length", 16)
    micro = whole_number(settings, "micro_batch_size", 1)
    whole_number(settings, "pad_multiple", 1)
    if micro and micro > settings.batch_size:
        raise UserError(f"--micro_batch_size {micro} is more than --batch_size {settings.batch_size}")
    if settings.cache_limit_gb != "auto":
        try:
            float(settings.cache_limit_gb)
        except ValueError as error:
            raise UserError(f"--cache_limit_gb {settings.cache_limit_gb}: give 'auto' or gigabytes") from error


def choose_layout(
    settings: SimpleNamespace, shape: Shape, device: Device, train: Prepared, val: Prepared | None
) -> Layout:
    """Choose micro-batch, checkpointing, padding and the longest example, so that the run fits; say what and why.

    UserError with the flags to change when nothing fits. ``--no_auto_memory`` takes the flags as they are.
    """
    multiple = whole_number(settings, "pad_multiple", 1) or PAD_MULTIPLE[device.backend]
    given = {AUTO: None, "on": True, "off": False}[settings.grad_checkpointing]
    choice = Choice(min(settings.batch_size, len(train)), whole_number(settings, "micro_batch_size", 1), given)
    lengths, targets = train.lengths + (val.lengths if val else []), train.targets + (val.targets if val else [])
    if not settings.auto_memory:
        micro, checkpointing = choice.micro or settings.batch_size, bool(choice.checkpointing)
        plan = estimate(shape, micro, max(lengths), max(targets), checkpointing, multiple)
        _say(plan, device, "as given")
        return Layout(micro, checkpointing, multiple, max(lengths))
    longest = max(lengths)
    if settings.max_seq_length == AUTO:
        longest = longest_that_fits(shape, device, lengths, targets, choice, multiple)
    kept = [(length, target) for length, target in zip(lengths, targets, strict=True) if length <= longest]
    plan = fit(shape, device, *map(list, zip(*kept, strict=True)), choice, multiple) if kept else None
    if plan is None:
        raise too_large(shape, device, lengths, targets, choice, multiple)
    _say(plan, device, "chosen")
    return Layout(plan.micro, plan.checkpointing, multiple, longest)


def _say(plan: Plan, device: Device, how: str) -> None:
    click.echo(f"memory: about {plan} of {size(device.budget)} on {device.name}")
    click.echo(
        f"  {how}: micro-batch {plan.micro}, checkpointing {'on' if plan.checkpointing else 'off'}, sequences up to "
        f"{plan.length:,} tokens padded to multiples of {plan.multiple}"
    )


def limit_cache(settings: SimpleNamespace, shape: Shape, device: Device, layout: Layout, targets: int) -> None:
    """Bound the freed buffers that MLX keeps: on a Mac they count against the same memory as everything else."""
    if device.backend == "metal":
        mx.set_wired_limit(device.offers)  # so that macOS does not page the weights out between steps
    if settings.cache_limit_gb != AUTO:
        mx.set_cache_limit(int(float(settings.cache_limit_gb) * GB))
        return
    plan = estimate(shape, layout.micro, layout.max_length, targets, layout.checkpointing, layout.multiple)
    mx.set_cache_limit(int(max(0.05 * device.budget, min(device.budget - plan.total, 0.25 * device.budget))))


def print_plan(base: Base, settings: SimpleNamespace, layout: Layout, train: Prepared, val: Prepared | None) -> None:
    """Run a few steps on the longest rows and print time, measured memory, adapter size and parameters."""
    trainable = sum(tensor.size for tensor in lora_parameters(base.model).values())
    itemsize = base.model.language_model.model.norm.weight.dtype.size
    order = sorted(range(len(train)), key=lambda index: -train.lengths[index])
    probes = [order[: layout.micro]] * 2 + [order[len(order) // 2 :][: layout.micro]]  # the first one compiles
    mx.reset_peak_memory()
    seconds = tokens = 0.0
    for number, probe in enumerate(probes):
        started = time.perf_counter()
        batch = collate(base.model, train.rows(probe), layout.multiple)
        mx.eval(loss_and_grads(base.model, batch, checkpointing=layout.checkpointing, seed=(0, number)))
        if number:
            seconds += time.perf_counter() - started
            tokens += sum(padded(train.lengths[index], layout.multiple) for index in probe)
    epoch = sum(train.lengths) * seconds / tokens
    validation = sum(val.lengths) * seconds / tokens / 3 if val else 0.0  # a forward pass is a third of a step
    steps = steps_per_epoch(len(train), settings.batch_size * settings.gradient_accumulation_steps)
    whole = settings.epochs * (epoch + validation) + validation
    click.echo(f"trainable    {trainable:,} parameters (rank {settings.lora_r})")
    click.echo(f"adapter      {size(trainable * itemsize)}, written once for PEFT and once for mlx-vlm")
    click.echo(f"checkpoint   {size(trainable * (12 + itemsize))} each, {settings.keep_checkpoints} kept")
    click.echo(f"measured     {size(mx.get_peak_memory())} at the peak of the longest rows' step")
    click.echo(f"examples     {len(train)} in {steps} steps an epoch, {sum(train.lengths):,} tokens")
    click.echo(f"speed        {tokens / seconds:,.0f} tokens/s")
    click.echo(f"time         {clock(epoch)} an epoch; {settings.epochs} epochs with validation {clock(whole)}")

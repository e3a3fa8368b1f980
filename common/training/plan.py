"""How a run is laid out in memory, printed before it starts; and `--plan`, which measures a few steps."""

import time
from dataclasses import dataclass

import click
import mlx.core as mx

from common.model.step import collate, pack_lora, packed_loss_and_grads, round_up
from common.training.data_loader import steps_per_epoch
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
from common.training.options import AUTO, TrainingOptions
from common.training.rows import Prepared
from integration.lora_patch.vlm import Base


@dataclass(frozen=True)
class Layout:
    """What the memory decided; a resumed run keeps it, since other micro-batches would round otherwise."""

    micro: int
    checkpointing: bool
    multiple: int
    max_length: int


def choose_layout(
    options: TrainingOptions, shape: Shape, device: Device, train: Prepared, val: Prepared | None
) -> Layout:
    """Choose micro-batch, checkpointing, padding and the longest example, so that the run fits; say what and why.

    UserError with the flags to change when nothing fits. ``--no_auto_memory`` takes the flags as they are.
    """
    multiple = PAD_MULTIPLE[device.backend] if options.pad_multiple == AUTO else options.pad_multiple
    given = {AUTO: None, "on": True, "off": False}[options.grad_checkpointing]
    micro = None if options.micro_batch_size == AUTO else options.micro_batch_size
    choice = Choice(min(options.batch_size, len(train)), micro, given)
    lengths, targets = train.lengths + (val.lengths if val else []), train.targets + (val.targets if val else [])
    if not options.auto_memory:
        micro, checkpointing = choice.micro or options.batch_size, bool(choice.checkpointing)
        plan = estimate(shape, micro, max(lengths), max(targets), checkpointing, multiple)
        _say(plan, device, "as given")
        return Layout(micro, checkpointing, multiple, max(lengths))
    longest = max(lengths)
    if options.max_seq_length == AUTO:
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


def limit_cache(options: TrainingOptions, shape: Shape, device: Device, layout: Layout, targets: int) -> None:
    """Bound the freed buffers that MLX keeps: on a Mac they count against the same memory as everything else."""
    if device.backend == "metal":
        # so that macOS does not page the weights out between steps
        mx.set_wired_limit(device.offers if options.wired_limit_gb == AUTO else int(options.wired_limit_gb * GB))
    if options.cache_limit_gb != AUTO:
        mx.set_cache_limit(int(options.cache_limit_gb * GB))
        return
    plan = estimate(shape, layout.micro, layout.max_length, targets, layout.checkpointing, layout.multiple)
    mx.set_cache_limit(int(max(0.05 * device.budget, min(device.budget - plan.total, 0.25 * device.budget))))


def print_plan(options: TrainingOptions, base: Base, layout: Layout, train: Prepared, val: Prepared | None) -> None:
    """Run a few steps on the longest rows and print time, measured memory, adapter size and parameters."""
    itemsize = base.model.language_model.model.norm.weight.dtype.size
    order = sorted(range(len(train)), key=lambda index: -train.lengths[index])
    probes = [order[: layout.micro]] * 2 + [order[len(order) // 2 :][: layout.micro]]  # the first one compiles
    vector = pack_lora(base.model)
    trainable = vector.size
    mx.reset_peak_memory()
    seconds = tokens = 0.0
    for number, probe in enumerate(probes):
        started = time.perf_counter()
        batch = collate(base.model, train.rows(probe), layout.multiple)
        mx.eval(packed_loss_and_grads(base.model, batch, vector, checkpointing=layout.checkpointing, seed=(0, number)))
        if number:
            seconds += time.perf_counter() - started
            tokens += sum(round_up(train.lengths[index], layout.multiple) for index in probe)
    epoch = sum(train.lengths) * seconds / tokens
    validation = sum(val.lengths) * seconds / tokens / 3 if val else 0.0  # a forward pass is a third of a step
    steps = steps_per_epoch(len(train), options.batch_size * options.gradient_accumulation_steps)
    whole = options.epochs * (epoch + validation) + validation
    click.echo(f"trainable    {trainable:,} parameters (rank {options.lora_r})")
    click.echo(f"adapter      {size(trainable * itemsize)}, written once for PEFT and once for mlx-vlm")
    click.echo(f"checkpoint   {size(trainable * (12 + itemsize))} each, {options.keep_checkpoints} kept")
    click.echo(f"measured     {size(mx.get_peak_memory())} at the peak of the longest rows' step")
    click.echo(f"examples     {len(train)} in {steps} steps an epoch, {sum(train.lengths):,} tokens")
    click.echo(f"speed        {tokens / seconds:,.0f} tokens/s")
    click.echo(f"time         {clock(epoch)} an epoch; {options.epochs} epochs with validation {clock(whole)}")

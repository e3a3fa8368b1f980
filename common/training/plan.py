"""How a run is laid out in memory, printed before it starts; and `--plan`, which measures a few steps."""

import time

import click
import mlx.core as mx

from common.model.step import collate, pack_lora, packed_loss_and_grads, round_up
from common.training.data_loader import steps_per_epoch
from common.training.log import clock
from common.training.memory import GB, PAD_MULTIPLE, Layout, ModelShape, Planner, estimate, size
from common.training.options import AUTO, TrainingOptions
from common.training.rows import Prepared
from integration.lora_patch.memory import Device
from integration.lora_patch.vlm import Base


def choose_layout(
    options: TrainingOptions, shape: ModelShape, device: Device, train: Prepared, val: Prepared | None
) -> Layout:
    """Choose micro-batch, checkpointing, padding and the longest example, so that the run fits; say what and why.

    UserError with the flags to change when nothing fits. ``--no_auto_memory`` takes the flags as they are.
    """
    planner = Planner(
        shape,
        device,
        lengths=train.lengths + (val.lengths if val else []),
        targets=train.targets + (val.targets if val else []),
        multiple=PAD_MULTIPLE[device.backend] if options.pad_multiple == AUTO else options.pad_multiple,
        batch_size=min(options.batch_size, len(train)),
        micro=None if options.micro_batch_size == AUTO else options.micro_batch_size,
        checkpointing={AUTO: None, "on": True, "off": False}[options.grad_checkpointing],
    )
    if options.auto_memory:
        fitting = planner.up_to(planner.longest()) if options.max_seq_length == AUTO else planner
        plan, how = fitting.fit(), "chosen"
        if plan is None:
            raise planner.too_large()
    else:
        plan, how = planner.estimate(planner.micro or options.batch_size, bool(planner.checkpointing)), "as given"
    layout, on = plan.layout, "on" if plan.layout.checkpointing else "off"
    click.echo(f"memory: about {plan} of {size(device.budget)} on {device.name}")
    click.echo(
        f"  {how}: micro-batch {layout.micro}, checkpointing {on}, sequences up to {layout.max_length:,} tokens padded "
        f"to multiples of {layout.multiple}"
    )
    return layout


def limit_cache(options: TrainingOptions, shape: ModelShape, device: Device, layout: Layout, targets: int) -> None:
    """Bound the freed buffers that MLX keeps: on a Mac they count against the same memory as everything else."""
    if device.backend == "metal":
        # so that macOS does not page the weights out between steps
        mx.set_wired_limit(device.offers if options.wired_limit_gb == AUTO else int(options.wired_limit_gb * GB))
    if options.cache_limit_gb != AUTO:
        mx.set_cache_limit(int(options.cache_limit_gb * GB))
        return
    free = device.budget - estimate(shape, layout, targets).total
    mx.set_cache_limit(int(max(0.05 * device.budget, min(free, 0.25 * device.budget))))


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

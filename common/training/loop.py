"""The training loop: optimizer steps, validation, checkpoints, and what happens when a loss is not finite."""

import math
import sys
import time
from dataclasses import dataclass

import mlx.core as mx
from tqdm import tqdm

from common.errors import UserError
from common.model.step import Batch, collate, loss_only, packed_loss_and_grads
from common.training.data_loader import evaluation_batches, load_batches, micro_batches, step_examples
from common.training.log import print_line
from common.training.memory import GB
from common.training.optimizer import clip, learning_rate_at
from common.training.rows import HostRow, Prepared
from common.training.run import Run
from common.training.signals import StopRequest


def train_loop(run: Run, stop: StopRequest) -> bool:
    """Take the remaining steps; return whether they were all taken (``stop`` ends the loop after a step).

    While the device computes one step, the rows of the next are copied to it.
    """
    position, options = run.position, run.options
    if position.step == 0:
        validate(run)
    steps = range(position.step, 0 if position.done else run.total_steps)
    plans = (micro_batches(run.train.lengths, step, options.seed, run.sharding) for step in steps)
    incoming = load_batches(run.train, plans)
    batches = to_device(run, next(incoming, []))
    mx.reset_peak_memory()
    with progress_bar(run) as bar:
        for step in steps:
            started = time.perf_counter()
            dispatched = dispatch(run, step, batches, bool(stop))
            batches = to_device(run, next(incoming, []))
            figures, stopping = wait_for(run, step, dispatched, started)
            stopping = stopping or (run.processes.world == 1 and bool(stop))  # several processes agree, a step later
            position.step = step + 1
            report(run, bar, figures)
            epoch_ends = position.step % run.steps_per_epoch == 0
            if epoch_ends or (options.eval_freq and position.step % options.eval_freq == 0):
                validate(run)
            position.done = position.stopped_early or position.step == run.total_steps
            if epoch_ends or position.done or stopping or position.step % options.save_freq == 0:
                with stop.ignored():
                    run.save()
            run.step_ends()
            if position.done or stopping:
                break
    run.processes.wait()  # a launcher ends all processes as soon as one has ended: not before the step is saved
    return position.done


def to_device(run: Run, rows: list[list[HostRow]]) -> list[Batch]:
    """Copy the rows of a step's micro-batches to the device and put the first batch together there."""
    batches = [collate(run.base.model, [row.to_row() for row in micro], run.layout.multiple) for micro in rows]
    if batches:
        mx.async_eval(batches[0].arrays)
    return batches


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.total_steps,
        initial=run.position.step,
        unit="step",
        disable=not run.processes.first,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds; a log file needs no animation
    )


@dataclass
class Dispatched:
    """A step under way: lazy arrays, and what is known of it on the host."""

    losses: list[mx.array]  # of this process's micro-batches, sums
    totals: mx.array  # float32 [2]: loss sum and requests to stop, over all processes
    norm: mx.array  # of the gradient, before clipping
    rate: float
    tokens: int  # of the global batch
    targets: int  # of them, those that the loss counts


def dispatch(run: Run, step: int, batches: list[Batch], stop: bool) -> Dispatched:
    """Start one optimizer step: gradients of all micro-batches, their mean per token over the global batch, AdamW."""
    options, optimizer, model = run.options, run.optimizer, run.base.model
    members = step_examples(len(run.train), step, options.seed, run.sharding)
    tokens, targets = (sum(counts[index] for index in members) for counts in (run.train.lengths, run.train.targets))
    losses, gradient = [], None
    for index, batch in enumerate(batches):
        loss, _, gradient = packed_loss_and_grads(
            model,
            batch,
            optimizer.values,
            checkpointing=run.layout.checkpointing,
            seed=(options.seed, step, run.processes.rank, index) if options.lora_dropout else None,
            grads=gradient,
        )
        mx.async_eval(loss, gradient)
        losses.append(loss)
    # in an epoch's last step a process may have no rows; it takes part with zeros
    own = mx.zeros_like(optimizer.values) if gradient is None else gradient
    gradient, norm = clip(run.processes.sum(own) / targets, options.max_grad_norm)
    rate = learning_rate_at(step, run.total_steps, options.learning_rate, run.warmup_steps)
    optimizer.update(gradient, rate, mx.isfinite(norm))
    totals = run.processes.sum(mx.stack([sum(losses, mx.array(0.0)), mx.array(float(stop))]))
    mx.async_eval(totals, norm, optimizer.state())
    return Dispatched(losses, totals, norm, rate, tokens, targets)


def wait_for(run: Run, step: int, dispatched: Dispatched, started: float) -> tuple[dict, bool]:
    """Wait for a step; return its figures, and whether some process asks to stop. UserError if it is not finite."""
    total, stopping = dispatched.totals.tolist()
    loss, norm = total / dispatched.targets, dispatched.norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(not_finite(run, step, loss, norm))
    seconds = time.perf_counter() - started
    position = run.position
    position.tokens += dispatched.tokens
    position.seconds += seconds
    position.peak_bytes = max(position.peak_bytes, mx.get_peak_memory())
    figures = {
        "epoch": round((step + 1) / run.steps_per_epoch, 4),
        "loss": loss,
        "learning_rate": dispatched.rate,
        "gradient_norm": norm,
        "tokens_per_second": round(dispatched.tokens / seconds, 1),
        "peak_memory_gb": round(position.peak_bytes / GB, 3),
        "seconds": round(position.seconds, 3),
    }
    return figures, stopping > 0


def not_finite(run: Run, step: int, loss: float, norm: float) -> str:
    """Return the message for a loss or gradient that is not finite; the weights are as before the step."""
    members = sum(micro_batches(run.train.lengths, step, run.options.seed, run.sharding), [])
    suspects = [index for index in members if not math.isfinite(loss_of(run, run.train, [index]))]
    examples = [run.train.examples[index] for index in suspects or members]
    named = ", ".join(f"{example.source} (job {example.job_id})" for example in examples)
    good = run.folder.checkpoints.newest() if run.processes.first else None
    return (
        f"step {step + 1}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite (loss {loss:g}, gradient "
        f"norm {norm:g}), {'in' if suspects else 'among'} {named or 'another process'}; last good checkpoint: "
        f"{good[0] if good else 'none yet'}. Mend or drop the example, or lower --learning_rate or --max_grad_norm"
    )


def report(run: Run, bar: tqdm, figures: dict) -> None:
    """Move the bar; write a log line when one is due."""
    bar.set_postfix_str(
        f"loss {figures['loss']:.4f}, lr {figures['learning_rate']:.1e}, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"peak {figures['peak_memory_gb']:.2f} GB",
        refresh=False,
    )
    bar.update()
    if run.position.step % run.options.log_freq == 0 or run.position.step == run.total_steps:
        run.reporter.report(run.log.add("train", run.position.step, **figures))


def validate(run: Run) -> None:
    """Measure the validation loss; keep the adapter if it is the best so far, and notice when it no longer falls."""
    if not run.val:
        return
    position = run.position
    loss, epoch = validation_loss(run), round(position.step / run.steps_per_epoch, 4)
    run.reporter.report(run.log.add("validation", position.step, epoch=epoch, loss=loss))
    if run.processes.first:
        print_line(
            f"validation loss {loss:.4f} " + (f"after epoch {epoch:g}" if position.step else "of the base model")
        )
    if position.step == 0:
        return  # the untrained adapter is the base itself: a mark to beat, never the one to deliver
    if position.best_loss is None or loss < position.best_loss:
        position.best_loss, position.best_step, position.validations_since_best = loss, position.step, 0
        run.best = run.delivered()
    else:
        position.validations_since_best += 1
        patience = run.options.early_stopping_patience
        position.stopped_early = bool(patience) and position.validations_since_best >= patience


def validation_loss(run: Run) -> float:
    """Return the mean loss per response token over all validation examples, over all processes."""
    total = mx.array(0.0)
    batches = [[micro] for micro in evaluation_batches(run.val.lengths, run.sharding)]
    for (micro,) in load_batches(run.val, batches):
        batch = collate(run.base.model, [row.to_row() for row in micro], run.layout.multiple)
        loss, _ = loss_only(run.base.model, batch, run.optimizer.values)
        total = total + loss
        mx.eval(total)
    mean = run.processes.sum(total).item() / sum(run.val.targets)
    if not math.isfinite(mean):
        bad = [e.source for i, e in enumerate(run.val.examples) if not math.isfinite(loss_of(run, run.val, [i]))]
        raise UserError(f"step {run.position.step}: the validation loss is not finite, in {', '.join(bad[:5])}")
    return mean


def loss_of(run: Run, prepared: Prepared, indices: list[int]) -> float:
    batch = collate(run.base.model, prepared.rows(indices), run.layout.multiple)
    loss, tokens = loss_only(run.base.model, batch, run.optimizer.values)
    return loss.item() / tokens

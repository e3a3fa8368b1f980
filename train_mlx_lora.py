"""Train a LoRA adapter for Qwen3-VL on prepared examples, with all that the frozen base makes constant computed once.

    python train_mlx_lora.py --train_data training_data_ansel_train.json
    python train_mlx_lora.py --train_data training_data_ansel_train.json --plan      # what it would need
    python train_mlx_lora.py --train_data training_data_ansel_train.json --resume    # go on after an interruption
    mlx.launch -n 2 python train_mlx_lora.py --train_data ...                        # several processes

Reads the training file, the validation file beside it, their photographs and the base model. Writes to
models/qwen3-vl-4b-lora-ADVISOR: the adapter for PEFT and mlx-vlm (adapter_config.json, adapter_model.safetensors,
adapters.safetensors; the best by validation loss, and the last under last/), training_args.json, training_log.jsonl,
loss_curve.png, README.md and checkpoints/.
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import contextlib
import functools
import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import click
import mlx.core as mx
from tqdm import tqdm

from common.cli import PhaseCommand, option_group, print_settings
from common.errors import UserError
from common.model.lora import attach_lora
from common.model.step import Batch, collate, loss_only, packed_loss_and_grads
from common.records import software_versions
from common.signals import StopRequest
from common.training.data import DataFile, check_apart, read_data, report_overlong, resolve_paths
from common.training.data_loader import (
    HostRow,
    Prepared,
    RowStore,
    evaluation_batches,
    feed,
    micro_batches,
    prepare_examples,
    step_examples,
)
from common.training.distributed import Processes, is_peer_lost, join_processes
from common.training.export import deliver, training_record
from common.training.log import require_reporter, say
from common.training.memory import GB, available_ram, find_device, is_out_of_memory, shape_of
from common.training.optimizer import clip, learning_rate_at
from common.training.plan import AUTO, Layout, check_numbers, choose_layout, limit_cache, print_plan, whole_number
from common.training.run import Run
from common.training.run_folder import RunFolder, data_differences, refuse_differences, take_over
from common.training.verdict import loss_summary, verdict
from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints
from integration.lora_patch.photo import MAX_IMAGE_SIZE
from integration.lora_patch.vlm import Base, load_base

option = functools.partial(click.option, show_default=True)
COUNT, POSITIVE = click.IntRange(0), click.IntRange(1)


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Data")
@option("--train_data", required=True, help="training examples, as prepare_training_data.py writes them")
@option("--val_data", help="validation examples  [default: ..._val beside ..._train, if there]")
@option("--max_seq_length", default=AUTO, help="longest example in tokens, or auto: the longest that memory allows")
@option("--max_image_size", default=MAX_IMAGE_SIZE, type=click.IntRange(32), help="long side of photographs, pixels")
@option("--on_overlong", default="skip", type=click.Choice(["skip", "fail"]), help="longer examples: leave out or stop")
@option_group("Model")
@option("--base_model", default="Qwen/Qwen3-VL-4B-Instruct", help="hub id or folder, 16-bit or quantized")
@option("--lora_r", default=16, type=POSITIVE, help="rank of the adapter")
@option("--lora_alpha", default=32, type=POSITIVE, help="the update is scaled by alpha / rank")
@option("--lora_dropout", default=0.05, type=click.FloatRange(0, 1, max_open=True), help="on the adapter's input")
@option_group("Optimization")
@option("--epochs", default=3, type=POSITIVE, help="passes over the training data")
@option("--batch_size", default=2, type=POSITIVE, help="examples a batch, in each process")
@option("--gradient_accumulation_steps", default=1, type=POSITIVE, help="batches an optimizer step")
@option("--learning_rate", default=2e-4, type=click.FloatRange(0, min_open=True), help="after warm-up; cosine decay")
@option("--warmup_steps", default=100, type=COUNT, help="never more than a tenth of all steps")
@option("--weight_decay", default=0.01, type=click.FloatRange(0), help="AdamW's")
@option("--max_grad_norm", default=1.0, type=click.FloatRange(0), help="gradient clipping; 0: none")
@option(
    "--early_stopping_patience", default=0, type=COUNT, help="validations without progress before stopping; 0: never"
)
@option("--seed", default=0, type=COUNT, help="of adapter, order and dropout")
@option_group("Memory")
@option("--auto_memory/--no_auto_memory", default=True, help="choose what follows so that the run fits the device")
@option("--micro_batch_size", default=AUTO, help="examples on the device at once")
@option("--grad_checkpointing", default=AUTO, type=click.Choice([AUTO, "on", "off"]), help="less memory, slower")
@option("--pad_multiple", default=AUTO, help="sequences are padded to multiples of this")
@option("--cache_limit_gb", default=AUTO, help="freed buffers that MLX may keep")
@option("--feature_cache", default=AUTO, type=click.Choice([AUTO, "memory", "disk"]), help="where prepared rows wait")
@option_group("Output")
@option("--output_dir", help="adapter folder  [default: models/qwen3-vl-4b-lora-ADVISOR]")
@option("--save_freq", default=500, type=POSITIVE, help="steps between checkpoints; each epoch ends with one too")
@option("--keep_checkpoints", default=2, type=POSITIVE, help="newest checkpoints kept")
@option("--eval_freq", default=0, type=COUNT, help="steps between validations, besides each epoch's; 0: none")
@option("--log_freq", default=1, type=POSITIVE, help="steps between log lines")
@option("--report_to", default="none", type=click.Choice(["none", "tensorboard", "wandb"]), help="besides the log")
@option("--resume", is_flag=True, help="go on from the newest whole checkpoint; from the start if there is none")
@option("--overwrite", is_flag=True, help="train anew where an adapter is; the old folder is renamed")
@option("--plan", is_flag=True, help="print memory, time, adapter size and parameters; train nothing")
@click.pass_context
def main(ctx: click.Context, **options) -> None:
    settings, processes = SimpleNamespace(**options), join_processes()
    check_numbers(settings)
    require_reporter(settings.report_to)
    resolve_paths(settings)
    folder, found = open_folder(settings, processes)
    differences = take_over(vars(settings), typed_options(ctx), found[1]["settings"]) if found else []
    if processes.first:
        print_settings(f"LoRA training, {processes.world} process{'es' * (processes.world > 1)}", vars(settings), ctx)
    with one_line_when_the_device_fails(processes):
        data = read_data(settings.train_data), read_data(settings.val_data)
        check_apart(*data)
        base = load_base(settings.base_model)
        fingerprint = fingerprint_of(base)
        check_resumable(folder, found, differences, data, fingerprint, settings, processes)
        if found and found[1]["position"]["done"] and folder.finished:
            click.echo(f"{folder.path}: finished at step {found[1]['position']['step']} already; nothing to do")
            return
        train, val = prepare(settings, base, fingerprint, data, folder, processes)
        train, val, layout = lay_out(settings, base, train, val, found, processes)
        modules = attach_lora(base, settings.lora_r, settings.lora_alpha, settings.lora_dropout, seed=settings.seed)
        if settings.plan:
            return print_plan(base, settings, layout, train, val) if processes.first else None
        run = Run(settings, base, train, val, data, fingerprint, layout, folder, processes)
        run.begin(found)
        say_what_is_trained(run, modules)
        train_loop(run)
        finish(run)


# -- before the first step --------------------------------------------------------------------------------------------


def open_folder(settings: SimpleNamespace, processes: Processes) -> tuple[RunFolder, tuple[Path, dict] | None]:
    """Return the output folder and (checkpoint, state) to go on from; all processes get rank 0's state."""
    folder = RunFolder(Path(settings.output_dir), settings.keep_checkpoints)

    def look() -> list | None:
        found = None if settings.plan else folder.find_resumable(settings.resume, settings.overwrite)
        if settings.resume and not found and not settings.overwrite:
            click.echo(f"{folder.path}: no checkpoint to resume; training from the start")
        return [str(found[0]), found[1]] if found else None

    found = processes.agreed(look)
    return folder, (Path(found[0]), found[1]) if found else None


def typed_options(ctx: click.Context) -> set[str]:
    """Return the names of the options that were given on the command line."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}


def fingerprint_of(base: Base) -> dict:
    try:
        return base_fingerprint(base.path, base.name)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_resumable(
    folder: RunFolder,
    found: tuple[Path, dict] | None,
    differences: list[str],
    data: tuple[DataFile, DataFile | None],
    fingerprint: dict,
    settings: SimpleNamespace,
    processes: Processes,
) -> None:
    """UserError that names all in which this run differs from the one whose checkpoint it would go on from."""
    if not found:
        return
    state, (train, val) = found[1], data
    errors, warnings = compare_fingerprints(state["base_fingerprint"], fingerprint)
    differences += errors + warnings  # another quantization gives other numbers too
    differences += data_differences(state["train_data"], train.record, "the training data")
    differences += data_differences(state["val_data"], val and val.record, "the validation data")
    if state["processes"] != processes.world:
        differences.append(f"there were {state['processes']} processes, now {processes.world}")
    refuse_differences(folder.path, differences)
    now = software_versions()
    changed = [f"{name} {was}, now {now[name]}" for name, was in state["versions"].items() if now[name] != was]
    if changed and processes.first:
        click.echo(f"begun with {'; '.join(changed)}: the adapter may differ in rounding", err=True)


def prepare(
    settings: SimpleNamespace,
    base: Base,
    fingerprint: dict,
    data: tuple[DataFile, DataFile | None],
    folder: RunFolder,
    processes: Processes,
) -> tuple[Prepared, Prepared | None]:
    """Run tokenizer and vision tower over every example once; the rows wait in memory, or on disk if they are many."""
    limits = {"memory": sys.maxsize, "disk": 0, AUTO: available_ram() // (4 * processes.world)}
    # a plan leaves nothing behind, and only rank 0 writes to the adapter's folder
    store = RowStore(folder.cache, limits["memory" if settings.plan or not processes.first else settings.feature_cache])
    longest = whole_number(settings, "max_seq_length", 16)
    identity = f"{fingerprint['architecture']} {fingerprint['weights']}"
    prepared = tuple(
        file
        and prepare_examples(
            base,
            identity,
            file.examples,
            file.photos,
            store,
            settings.max_image_size,
            longest,
            label,
            not processes.first,
        )
        for file, label in zip(data, ("training photographs", "validation photographs"), strict=True)
    )
    base.model.vision_tower = None  # it has said what it had to say; its memory is free for training
    mx.clear_cache()
    return prepared


def lay_out(
    settings: SimpleNamespace,
    base: Base,
    train: Prepared,
    val: Prepared | None,
    found: tuple[Path, dict] | None,
    processes: Processes,
) -> tuple[Prepared, Prepared | None, Layout]:
    """Choose the layout that fits the device (or take the checkpoint's); leave out what is longer than it allows."""
    asked = whole_number(settings, "max_seq_length", 16)
    if not train.examples:
        report_overlong(train, settings.on_overlong, asked)
    device = find_device()
    shape = shape_of(base.model, settings.lora_r, device.backend)
    if found:
        layout = Layout(**found[1]["layout"])
    else:
        layout = Layout(**processes.agreed(lambda: asdict(choose_layout(settings, shape, device, train, val))))
    train, val = (part and part.without_overlong(layout.max_length) for part in (train, val))
    for part in (train, val):
        if part and processes.first:
            report_overlong(part, settings.on_overlong, asked or layout.max_length)
    limit_cache(settings, shape, device, layout, max(train.targets))
    return train, val, layout


@contextlib.contextmanager
def one_line_when_the_device_fails(processes: Processes) -> Iterator[None]:
    """Turn the device's out-of-memory error, whichever way it comes, into one line that says what to change.

    A process whose peer has ended ends too, without a word: the peer has said why.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if processes.world > 1 and is_peer_lost(error):
            raise SystemExit(1) from error
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "MemoryError").splitlines()[0]
        raise UserError(
            f"the device ran out of memory ({reason}); try --grad_checkpointing on, --micro_batch_size 1, a smaller "
            "--max_seq_length or --max_image_size; --plan shows what is needed. Checkpoints are whole: --resume goes on"
        ) from error


def say_what_is_trained(run: Run, modules: list[str]) -> None:
    if not run.processes.first:
        return
    validation = f"{len(run.val)} for validation" if run.val else "none for validation (best = last)"
    click.echo(
        f"{run.optimizer.values.size:,} parameters in {len(modules)} modules; "
        f"{len(run.train)} examples to train on, {validation}; {run.total} steps, {run.an_epoch} an epoch, "
        f"{run.warmup} of warm-up" + (f"; going on after step {run.position.step}" if run.position.step else "")
    )


# -- training ---------------------------------------------------------------------------------------------------------


def train_loop(run: Run) -> None:
    """Take the remaining steps. While the device computes one, the rows of the next are copied to it."""
    position, settings = run.position, run.settings
    if position.step == 0:
        validate(run)
    steps = range(position.step, 0 if position.done else run.total)
    plans = (micro_batches(run.train.lengths, step, settings.seed, run.sharding) for step in steps)
    incoming = feed(run.train, plans)
    batches = to_device(run, next(incoming, []))
    mx.reset_peak_memory()
    with StopRequest() as stop, progress_bar(run) as bar:
        for step in steps:
            started = time.perf_counter()
            dispatched = dispatch(run, step, batches, bool(stop))
            batches = to_device(run, next(incoming, []))
            figures, stopping = wait_for(run, step, dispatched, started)
            stopping = stopping or (run.processes.world == 1 and bool(stop))  # several have to agree, a step later
            position.step = step + 1
            report(run, bar, figures)
            epoch_ends = position.step % run.an_epoch == 0
            if epoch_ends or (settings.eval_freq and position.step % settings.eval_freq == 0):
                validate(run)
            position.done = position.stopped_early or position.step == run.total
            if epoch_ends or position.done or stopping or position.step % settings.save_freq == 0:
                run.save()
            if position.done:
                break
            if stopping:
                bar.close()
                leave(run, stop)


def to_device(run: Run, rows: list[list[HostRow]]) -> list[Batch]:
    """Copy the rows of a step's micro-batches to the device and put the first batch together there."""
    batches = [collate(run.base.model, [row.to_row() for row in micro], run.layout.multiple) for micro in rows]
    if batches:
        mx.async_eval(batches[0].arrays)
    return batches


def progress_bar(run: Run) -> tqdm:
    quiet = not run.processes.first
    every = 0.5 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
    return tqdm(
        total=run.total, initial=run.position.step, unit="step", disable=quiet, dynamic_ncols=True, mininterval=every
    )


@dataclass
class Dispatched:
    """A step under way: lazy arrays, and what is known of it on the host."""

    losses: list[mx.array]  # of this process's micro-batches, sums
    totals: mx.array  # float32 [2]: loss sum and wishes to stop, over all processes
    norm: mx.array  # of the gradient, before clipping
    rate: float
    tokens: int  # of the global batch
    targets: int  # of them, those that the loss counts


def dispatch(run: Run, step: int, batches: list[Batch], stop: bool) -> Dispatched:
    """Start one optimizer step: gradients of all micro-batches, their mean per token over the global batch, AdamW."""
    settings, optimizer, model = run.settings, run.optimizer, run.base.model
    members = step_examples(len(run.train), step, settings.seed, run.sharding)
    tokens, targets = (sum(counts[index] for index in members) for counts in (run.train.lengths, run.train.targets))
    losses, gradient = [], None
    for index, batch in enumerate(batches):
        loss, _, gradient = packed_loss_and_grads(
            model,
            batch,
            optimizer.values,
            checkpointing=run.layout.checkpointing,
            seed=(settings.seed, step, run.processes.rank, index) if settings.lora_dropout else None,
            grads=gradient,
        )
        mx.async_eval(loss, gradient)
        losses.append(loss)
    # in an epoch's last step a process may have no rows; it takes part with zeros
    own = mx.zeros_like(optimizer.values) if gradient is None else gradient
    gradient, norm = clip(run.processes.sum(own) / targets, settings.max_grad_norm)
    rate = learning_rate_at(step, run.total, settings.learning_rate, run.warmup)
    optimizer.update(gradient, rate, mx.isfinite(norm))
    totals = run.processes.sum(mx.stack([sum(losses, mx.array(0.0)), mx.array(float(stop))]))
    mx.async_eval(totals, norm, optimizer.state())
    return Dispatched(losses, totals, norm, rate, tokens, targets)


def wait_for(run: Run, step: int, dispatched: Dispatched, started: float) -> tuple[dict, bool]:
    """Wait for a step; return its figures, and whether some process wishes to stop. UserError if it went astray."""
    total, stopping = dispatched.totals.tolist()
    loss, norm = total / dispatched.targets, dispatched.norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(astray(run, step, dispatched, loss, norm))
    seconds = time.perf_counter() - started
    position = run.position
    position.tokens += dispatched.tokens
    position.seconds += seconds
    position.peak_bytes = max(position.peak_bytes, mx.get_peak_memory())
    figures = {
        "epoch": round((step + 1) / run.an_epoch, 4),
        "loss": loss,
        "learning_rate": dispatched.rate,
        "gradient_norm": norm,
        "tokens_per_second": round(dispatched.tokens / seconds, 1),
        "peak_memory_gb": round(position.peak_bytes / GB, 3),
        "seconds": round(position.seconds, 3),
    }
    return figures, stopping > 0


def astray(run: Run, step: int, dispatched: Dispatched, loss: float, norm: float) -> str:
    """Return the message for a loss or gradient that is not finite; the weights are as before the step."""
    members = sum(micro_batches(run.train.lengths, step, run.settings.seed, run.sharding), [])
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
    if run.log and (run.position.step % run.settings.log_freq == 0 or run.position.step == run.total):
        run.reporter.report(run.log.add("train", run.position.step, **figures))


# -- validation -------------------------------------------------------------------------------------------------------


def validate(run: Run) -> None:
    """Measure the validation loss; keep the adapter if it is the best so far, and notice when it no longer falls."""
    if not run.val:
        return
    position, settings = run.position, run.settings
    loss = validation_loss(run)
    if run.log:
        epoch = round(position.step / run.an_epoch, 4)
        run.reporter.report(run.log.add("validation", position.step, epoch=epoch, loss=loss))
        say(f"validation loss {loss:.4f} " + (f"after epoch {epoch:g}" if position.step else "of the base model"))
    if position.step == 0:
        return  # the untrained adapter is the base itself: a mark to beat, never the one to deliver
    if position.best_loss is None or loss < position.best_loss:
        position.best_loss, position.best_step, position.validations_since_best = loss, position.step, 0
        run.best = run.delivered()
        mx.eval(run.best)
    else:
        position.validations_since_best += 1
        patience = settings.early_stopping_patience
        position.stopped_early = bool(patience) and position.validations_since_best >= patience


def validation_loss(run: Run) -> float:
    """Return the mean loss per response token over all validation examples, over all processes."""
    total = mx.array(0.0)
    batches = [[micro] for micro in evaluation_batches(run.val.lengths, run.sharding)]
    for (micro,) in feed(run.val, batches):
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


# -- the end ----------------------------------------------------------------------------------------------------------


def leave(run: Run, stop: StopRequest) -> NoReturn:
    """Say how to go on, after a signal; the exit code is the shell's for that signal."""
    number = stop.signal or signal.SIGTERM
    if run.processes.first:
        again = [argument for argument in sys.argv if argument not in ("--overwrite", "--resume")]
        click.echo(
            f"{number.name}: stopped after step {run.position.step} of {run.total}, saved in "
            f"{run.folder.checkpoints.path(run.position.step)}; go on with:\n"
            f"  python {shlex.join([*again, '--resume'])}",
            err=True,
        )
    sys.exit(128 + number)


def finish(run: Run) -> None:
    """Deliver the best adapter and everything that tells of it; end with the verdict."""
    if not run.processes.first:
        return
    position, settings = run.position, run.settings
    train, val = run.data
    losses = loss_summary(run.log.rows, position.best_step)
    result = {
        **losses,
        "best_step": position.best_step or position.step,
        "steps": position.step,
        "epochs": round(position.step / run.an_epoch, 4),
        "examples": len(run.train),
        "examples_per_step": run.sharding.global_batch,
        "left_out_too_long": [example.source for example, _ in run.train.overlong],
        "warmup_steps": run.warmup,
        "trainable_parameters": run.optimizer.values.size,
        "tokens": position.tokens,
        "seconds": round(position.seconds, 1),
        "tokens_per_second": round(position.tokens / max(position.seconds, 1e-9), 1),
        "peak_memory_gb": round(position.peak_bytes / GB, 3),
        "stopped_early": position.stopped_early,
    }
    lines = verdict(losses, position.step, run.an_epoch, position.stopped_early)
    record = training_record(
        vars(settings), settings.advisor, run.fingerprint, train.record, val and val.record, asdict(run.layout), result
    )
    record["verdict"] = lines
    last = run.delivered()
    run.log.draw()
    deliver(run.folder.path, record, run.best or last, last, lines)
    shutil.rmtree(run.folder.cache, ignore_errors=True)
    run.reporter.close()
    for line in lines:
        click.echo(line)
    click.echo(f"{run.folder.path}: adapter of step {result['best_step']}, for PEFT and mlx-vlm; the last in last/")


if __name__ == "__main__":
    main()

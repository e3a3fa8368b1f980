"""Train a LoRA adapter for Qwen3-VL on prepared examples, with all that the frozen base makes constant computed once.

    python train_mlx_lora.py --train_data training_data_ansel_train.json
    python train_mlx_lora.py --train_data training_data_ansel_train.json --plan      # memory and time, no training
    python train_mlx_lora.py --train_data training_data_ansel_train.json --resume    # after an interruption
    mlx.launch -n 2 python train_mlx_lora.py --train_data ...                        # several processes

Reads the training file, the validation file beside it, their photographs and the base model. Writes to
models/qwen3-vl-4b-lora-ADVISOR: the adapter for PEFT and mlx-vlm (adapter_config.json, adapter_model.safetensors,
adapters.safetensors; the best by validation loss, and the last under last/), training_args.json, training_log.jsonl,
loss_curve.png, README.md and checkpoints/.
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
from dataclasses import asdict

import click

from common.cli import (
    PhaseCommand,
    command_line,
    given_options,
    next_step,
    option,
    option_group,
    print_settings,
    write_config,
)  # fmt: skip
from common.model.lora import attach_lora
from common.training.data import check_apart, read_data
from common.training.distributed import join_processes
from common.training.export import deliver
from common.training.leaving import leave
from common.training.log import require_reporter
from common.training.loop import train_loop
from common.training.options import AUTO, NumberOrAuto, TrainingOptions
from common.training.plan import print_plan
from common.training.run import Run
from common.training.setup import check_resumable, device_errors, lay_out, open_folder, prepare_rows
from common.training.signals import Stopped, StopRequest
from common.training.watchdog import Watchdog
from integration.lora_patch.fingerprint import base_fingerprint
from integration.lora_patch.hub import DEFAULT_BASE
from integration.lora_patch.photo import MAX_IMAGE_SIZE
from integration.lora_patch.vlm import load_base

COUNT, POSITIVE = click.IntRange(0), click.IntRange(1)


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Data")
@option("--train_data", required=True, help="training examples, as prepare_training_data.py writes them")
@option("--val_data", help="validation examples  [default: ..._val beside ..._train, if there]")
@option("--max_seq_length", default=AUTO, type=NumberOrAuto(16), help="in tokens; auto: what memory allows")
@option("--max_image_size", default=MAX_IMAGE_SIZE, type=click.IntRange(32), help="long side of photographs, pixels")
@option("--on_overlong", default="skip", type=click.Choice(["skip", "fail"]), help="longer examples: leave out or stop")
@option_group("Model")
@option("--base_model", default=DEFAULT_BASE, help="hub id or folder, 16-bit or quantized")
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
@option("--micro_batch_size", default=AUTO, type=NumberOrAuto(1), help="examples on the device at once")
@option("--grad_checkpointing", default=AUTO, type=click.Choice([AUTO, "on", "off"]), help="less memory, slower")
@option("--pad_multiple", default=AUTO, type=NumberOrAuto(1), help="sequences are padded to multiples of this")
@option("--cache_limit_gb", default=AUTO, type=NumberOrAuto(0, float), help="freed buffers that MLX may keep")
@option("--wired_limit_gb", default=AUTO, type=NumberOrAuto(0, float), help="Mac: memory that is never paged out")
@option("--feature_cache", default=AUTO, type=click.Choice([AUTO, "memory", "disk"]), help="where rows are kept")
@option_group("Output")
@option("--output_dir", help="adapter folder  [default: models/qwen3-vl-4b-lora-ADVISOR]")
@option("--phrasebook/--no_phrasebook", default=True, help="speeds up answers; holds text of the training responses")
@option("--save_freq", default=500, type=POSITIVE, help="steps between checkpoints; each epoch ends with one too")
@option("--keep_checkpoints", default=2, type=POSITIVE, help="newest checkpoints kept")
@option("--eval_freq", default=0, type=COUNT, help="steps between validations, besides each epoch's; 0: none")
@option("--log_freq", default=1, type=POSITIVE, help="steps between log lines")
@option("--report_to", default="none", type=click.Choice(["none", "tensorboard", "wandb"]), help="besides the log")
@option("--resume", is_flag=True, help="continue from the newest whole checkpoint; from the start if there is none")
@option("--overwrite", is_flag=True, help="train again in a folder that holds an adapter; it is renamed")
@option("--plan", is_flag=True, help="print memory, time, adapter size and parameters; train nothing")
@click.pass_context
def main(ctx: click.Context, **values) -> None:
    options = TrainingOptions(**values).found()
    require_reporter(options.report_to)
    processes = join_processes()
    with StopRequest() as stop, Watchdog(processes, stop) as watchdog, device_errors(watchdog):
        try:
            train(ctx, options, watchdog, stop)
        except Stopped as stopped:
            leave(stopped.signal, options, processes)


def train(ctx: click.Context, options: TrainingOptions, watchdog: Watchdog, stop: StopRequest) -> None:
    """Set up a run, take its steps, deliver the adapter; ``stop`` ends it after a step, with a checkpoint."""
    processes = watchdog.processes
    folder, checkpoint = open_folder(options, processes)
    state, differences = checkpoint[1] if checkpoint else None, []
    if state:
        options, differences = options.resumed(state["settings"], given_options(ctx))
    if processes.first:
        print_settings(f"LoRA training, {processes}", asdict(options), ctx)
    data = read_data(options.train_data), read_data(options.val_data)
    check_apart(*data)
    base = load_base(options.base_model)
    fingerprint = base_fingerprint(base.path, base.name)
    if state:
        check_resumable(folder, state, differences, data, fingerprint, processes)
    if state and state["position"]["done"] and folder.finished:
        if processes.first:
            click.echo(f"{folder.path}: finished at step {state['position']['step']} already; nothing to do")
            folder.mark(finished=True)
        return
    rows = prepare_rows(options, base, fingerprint, data, folder.cache, processes)
    layout, rows = lay_out(options, base, rows, state and state["layout"], given_options(ctx), processes)
    attach_lora(base, options.lora_r, options.lora_alpha, options.lora_dropout, seed=options.seed)
    if options.plan:
        return print_plan(options, base, layout, *rows) if processes.first else None
    run = watchdog.run = Run(options, processes, folder, base, fingerprint, data, *rows, layout, checkpoint)
    if processes.first:
        write_config(folder.path / "config.yaml", leave_out=("resume", "overwrite", "plan"))
        click.echo(run)
    with stop.deferred():
        done = train_loop(run, stop)
        watchdog.part()
    if not done:
        leave(stop.signal, options, processes, run)
    deliver(run)
    if processes.first:
        folder.mark(finished=True)
        made = f"{folder.path}: adapter of step {run.delivered_step}, for PEFT and mlx-vlm; the last in last/"
        next_step(made, command_line("python", "evaluate_lora.py", "--lora_path", folder.path), target="eval")


if __name__ == "__main__":
    main()

"""What a finished run leaves behind: best and last adapter, training_args.json, model card, curve and verdict."""

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from common.files import write_atomic, write_json
from common.records import software_versions
from common.training.adapter_files import adapter_config, write_adapter
from common.training.memory import GB
from common.training.model_card import write_card
from common.training.run import Run
from common.training.verdict import loss_summary, verdict
from integration.lora_patch.phrasebook import PHRASEBOOK, write_phrasebook
from integration.lora_patch.versions import ARGS
from integration.lora_patch.vlm import TARGET_MODULES, response_tokens

SCHEMA_VERSION = 1


def deliver(run: Run) -> None:
    """Write everything that a finished adapter folder holds; training_args.json last. Print the verdict."""
    shutil.rmtree(run.folder.cache, ignore_errors=True)
    if not run.processes.first:
        return
    options, position, folder = run.options, run.position, run.folder.path
    losses = loss_summary(run.log.rows, position.best_step, position.best_loss)
    record = training_record(run, losses)
    record["verdict"] = lines = verdict(losses, position.step, run.steps_per_epoch, position.stopped_early)
    last = run.delivered()
    best = run.best or last
    last, best = ({name: tensor.to_mlx() for name, tensor in adapter.items()} for adapter in (last, best))
    modules = sorted({name.rpartition(".")[0] for name in best})
    record["phrasebook"] = export_phrasebook(run) if options.phrasebook else None
    config = adapter_config(options.base_model, modules, options.lora_r, options.lora_alpha, options.lora_dropout)
    run.log.draw(run.delivered_step)
    (folder / ARGS).unlink(missing_ok=True)
    write_adapter(folder / "last", last, config)
    write_adapter(folder, best, config)
    write_card(folder, record)
    write_json(folder / ARGS, record)
    run.reporter.close()
    for line in lines:
        click.echo(line)


def export_phrasebook(run: Run) -> str:
    """Write the training responses' tokens, from which the service drafts its answers; return the file's SHA-256."""
    lists = [response_tokens(run.base, example.response)[0] for example in run.train.examples]
    with tempfile.TemporaryDirectory() as made, write_atomic(run.folder.path / PHRASEBOOK, "wb") as file:
        digest = write_phrasebook(Path(made) / PHRASEBOOK, lists)
        file.write((Path(made) / PHRASEBOOK).read_bytes())
    return digest


def training_record(run: Run, losses: dict) -> dict:
    """Return the content of training_args.json: all that evaluation, the service and a repeated run need to know."""
    options, position, (train, val) = run.options, run.position, run.data
    return {
        "schema_version": SCHEMA_VERSION,
        "advisor": options.advisor,
        "base_model": options.base_model,
        "base_fingerprint": run.fingerprint,
        "target_modules": list(TARGET_MODULES),
        "settings": asdict(options),
        "layout": asdict(run.layout),
        "train_data": train.record,
        "val_data": val and val.record,
        "specification": train.specification,
        "versions": software_versions(),
        "result": {
            **losses,
            "best_step": run.delivered_step,
            "steps": position.step,
            "epochs": round(position.step / run.steps_per_epoch, 4),
            "examples": len(run.train),
            "examples_per_step": run.sharding.global_batch,
            "left_out_too_long": [example.source for example, _ in run.train.overlong],
            "warmup_steps": run.warmup_steps,
            "trainable_parameters": run.optimizer.values.size,
            "tokens": position.tokens,
            "seconds": round(position.seconds, 1),
            "tokens_per_second": round(position.tokens / max(position.seconds, 1e-9), 1),
            "peak_memory_gb": round(position.peak_bytes / GB, 3),
            "stopped_early": position.stopped_early,
        },
    }

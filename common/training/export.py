"""What a finished run leaves behind: best and last adapter, training_args.json, model card, curve and verdict."""

from pathlib import Path

import mlx.core as mx

from common.files import write_json
from common.records import ARGS, software_versions
from common.training.adapter_files import adapter_config, write_adapter
from common.training.model_card import write_card
from integration.lora_patch.vlm import TARGET_MODULES

SCHEMA_VERSION = 1


def deliver(
    folder: Path, record: dict, best: dict[str, mx.array], last: dict[str, mx.array], verdict: list[str]
) -> None:
    """Write everything that a finished adapter folder holds; training_args.json last, which marks it as finished."""
    settings = record["settings"]
    modules = sorted({name.rsplit(".", 1)[0] for name in best})
    config = adapter_config(
        record["base_model"], modules, settings["lora_r"], settings["lora_alpha"], settings["lora_dropout"]
    )
    (folder / ARGS).unlink(missing_ok=True)
    write_adapter(folder / "last", last, config)
    write_adapter(folder, best, config)
    write_card(folder, record, verdict)
    write_json(folder / ARGS, record)


def training_record(
    settings: dict, advisor: str, fingerprint: dict, train: dict, val: dict | None, layout: dict, result: dict
) -> dict:
    """Return the content of training_args.json: all that evaluation, service and a repetition need to know."""
    return {
        "schema_version": SCHEMA_VERSION,
        "advisor": advisor,
        "base_model": settings["base_model"],
        "base_fingerprint": fingerprint,
        "target_modules": list(TARGET_MODULES),
        "settings": settings,
        "layout": layout,
        "train_data": train,
        "val_data": val,
        "versions": software_versions(),
        "result": result,
    }

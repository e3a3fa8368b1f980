"""What the evaluation's tests share: held-out data of drawn photographs, adapters made without training."""

import json
import random
from pathlib import Path

import mlx.core as mx
from click.testing import CliRunner, Result

from common.dataset import triplet_row
from common.files import sha256_file, write_json, write_jsonl
from common.model.lora import attach_lora, lora_parameters
from common.model.step import collate
from common.training.adapter_files import adapter_config, write_adapter
from evaluate_lora import main
from integration.lora_patch import vlm
from integration.lora_patch.analysis import compact_json
from integration.lora_patch.fingerprint import base_fingerprint
from integration.lora_patch.photo import load_photo
from tests.lora import loss_and_grads
from tests.sample import scenes
from tests.sample.make_tree import sample_prompt


def make_data(folder: Path, photos: int = 10, trained: int = 3) -> tuple[Path, Path]:
    """Draw photographs and write train and validation rows; returns (train, val)."""
    rng = random.Random(11)
    rows = []
    for number in range(trained + photos):
        scene = scenes.random_scene(rng)
        path = folder / "source" / f"photo-{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scenes.draw(scene, 96).save(path)
        response = compact_json(scenes.critique(scene))
        rows.append(triplet_row(str(path), sample_prompt("ansel"), response, f"job-{number}", sha256_file(path)))
    paths = folder / "training_data" / "train.jsonl", folder / "training_data" / "val.jsonl"
    write_jsonl(paths[0], rows[:trained])
    write_jsonl(paths[1], rows[trained:])
    return paths


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_adapter(
    folder: Path, base: Path, data: tuple[Path, Path], b_scale: float = 0.0, climb: float = 0.0, seed: int = 0
) -> Path:
    """Write an adapter folder as training leaves it: A random, B normal of ``b_scale`` (0: an adapter of zeros).

    ``climb`` adds so much of the held-out loss's gradient to B: below 0 the adapter is better than its base, above 0
    it is sabotaged.
    """
    loaded = vlm.load_base(base)
    attach_lora(loaded, rank=2, alpha=4, seed=seed)
    tensors, key = lora_parameters(loaded.model), mx.random.key(seed)
    matrices = [name for name in sorted(tensors) if name.endswith("lora_b")]
    for name, own in zip(matrices, mx.random.split(key, len(matrices)), strict=True):
        tensors[name] = b_scale * mx.random.normal(tensors[name].shape, key=own)
    if climb:
        gradients = _loss_gradients(loaded, read_jsonl(data[1]))
        for name in matrices:
            tensors[name] = tensors[name] + climb * gradients[name]
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    write_adapter(folder, tensors, adapter_config(str(base), modules, 2, 4, 0.0))
    (folder / "README.md").write_text("# card\n<!-- evaluation:start -->\nno\n<!-- evaluation:end -->\nend\n")
    record = {
        "schema_version": 1,
        "advisor": "ansel",
        "base_model": str(base),
        "base_fingerprint": base_fingerprint(base, str(base)),
        "settings": {"max_image_size": 128},
        "train_data": data_record(data[0]),
        "val_data": data_record(data[1]),
    }
    write_json(folder / "training_args.json", record)
    return folder


def _loss_gradients(base: vlm.Base, rows: list[dict]) -> dict[str, mx.array]:
    encoded = [vlm.encode(base, row["prompt"], [load_photo(row["image_path"], 128)], row["response"]) for row in rows]
    batch = collate(base.model, [vlm.prepare_row(base, one) for one in encoded])
    _, tokens, gradients = loss_and_grads(base.model, batch)
    return {name: gradient / tokens for name, gradient in gradients.items()}


def data_record(path: Path) -> dict:
    rows = read_jsonl(path)
    photos = [row["image_sha256"] for row in rows]
    return {"path": str(path), "sha256": sha256_file(path), "examples": len(rows), "photos": photos}


def evaluate(*arguments: object) -> Result:
    """Run evaluate_lora.py in this process; a bug keeps its traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result

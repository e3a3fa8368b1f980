"""For the tests: a training set in a folder, as `prepare_training_data.py` leaves it, and the trainer run on it."""

import hashlib
import json
import random
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from click.testing import CliRunner, Result

import train_mlx_lora
from tests.sample import scenes

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "You are ansel. Answer with one JSON object.\n\nAnalyze the provided image."
TRAIN, VAL = "training_data/training_data_ansel_train.jsonl", "training_data/training_data_ansel_val.jsonl"


def write_dataset(folder: Path, train: int = 7, val: int = 3, seed: int = 5) -> Path:
    """Write photographs (128 pixels), a training and a validation file and meta.json; return the folder."""
    rng = random.Random(seed)
    (folder / "photos").mkdir(parents=True)
    (folder / "training_data").mkdir()
    rows = []
    for number in range(train + val):
        scene = scenes.random_scene(rng)
        photo = folder / f"photos/{number}.jpg"
        scenes.draw(scene, 128).save(photo)
        text = json.dumps(scenes.critique(scene), ensure_ascii=False, separators=(",", ":"))
        rows.append(
            {
                "image_path": f"photos/{number}.jpg",
                "prompt": PROMPT,
                # digits are tokens of their own: 20 to 120 of them, so padding, sorting and weighting all matter
                "response": text[:200] + "".join(rng.choices("0123456789", k=20 + 25 * (number % 5))),
                "job_id": f"job-{number}",
                "image_sha256": hashlib.sha256(photo.read_bytes()).hexdigest(),
            }
        )
    for path, part in ((TRAIN, rows[:train]), (VAL, rows[train:])):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "training_data/training_data_ansel_meta.json").write_text('{"advisor": "ansel"}', encoding="utf-8")
    return folder


def edit_row(path: Path, number: int, **changes: str) -> None:
    """Change fields of one row of a dataset file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[number] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_here(base: Path, *options: object) -> Result:
    """Run the trainer in this process, in the present working directory."""
    arguments = ["--train_data", "training_data_ansel_train.json", "--base_model", str(base), *map(str, options)]
    return CliRunner().invoke(train_mlx_lora.main, arguments, catch_exceptions=False)


def trainer_command(base: Path, *options: object) -> list[str]:
    """Return the command of a trainer in a process of its own."""
    script = [sys.executable, str(ROOT / "train_mlx_lora.py"), "--train_data", TRAIN, "--base_model", str(base)]
    return [*script, *map(str, options)]


def log_of(adapter: Path) -> list[dict]:
    return [json.loads(line) for line in (adapter / "training_log.jsonl").read_text().splitlines()]


def adapter_bytes(adapter: Path) -> dict[str, bytes]:
    """Return the weight and config files of an adapter, best and last, by name."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
    files = [adapter / part / name for part in ("", "last") for name in names]
    return {str(path.relative_to(adapter)): path.read_bytes() for path in files}


def difference(one: Path, other: Path) -> float:
    """Return how far two last adapters' B matrices, which start at zero, are apart: relative to their norm.

    AdamW divides by the gradient's size, so where a gradient is next to nothing rounding alone turns it about; a
    bound on each value would say more of those few than of the adapter.
    """
    ours, theirs = (
        np.concatenate([np.array(t).ravel() for n, t in sorted(mx.load(str(f)).items()) if n.endswith("lora_b")])
        for f in (one / "last/adapters.safetensors", other / "last/adapters.safetensors")
    )
    assert np.linalg.norm(theirs) > 0.05
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)

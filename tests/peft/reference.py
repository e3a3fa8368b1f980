"""Make an adapter on a tiny base, and write down what mlx-vlm answers with and without it.

    .venv/bin/python tests/peft/reference.py OUTPUT_DIR

Writes OUTPUT_DIR/base (a tiny Qwen3-VL), OUTPUT_DIR/adapter (as training writes it, with an update large enough to
see), OUTPUT_DIR/merged (the two fused) and OUTPUT_DIR/logits.npz: the inputs of one photograph and prompt, and the
logits of mlx_vlm.load(base) and mlx_vlm.load(base, adapter_path=adapter), float32 [L, V].
"""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_vlm
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.model.lora import attach_lora, lora_parameters  # noqa: E402
from common.release.fuse import fuse_adapter  # noqa: E402
from common.training.adapter_files import adapter_config, write_adapter  # noqa: E402
from integration.lora_patch.vlm import encode, load_base  # noqa: E402
from tests.sample import scenes  # noqa: E402


def main(folder: Path) -> None:
    base, adapter = folder / "base", folder / "adapter"
    maker = ROOT / "tests/sample/make_tiny_model.py"
    subprocess.run([sys.executable, str(maker), "--output_dir", str(base)], check=True)
    model = load_base(base)
    modules = attach_lora(model, rank=4, alpha=8, dropout=0.1)
    mx.random.seed(3)
    tensors = {name: 0.1 * mx.random.normal(tensor.shape) for name, tensor in lora_parameters(model.model).items()}
    write_adapter(adapter, tensors, adapter_config(str(base), modules, 4, 8, 0.1))
    for line in fuse_adapter(str(base), adapter, folder / "merged"):
        print(line)

    encoded = encode(
        model, "What does the photograph show?", [scenes.draw(scenes.random_scene(seeded()), 128)], "A hill."
    )
    arrays = {
        "input_ids": encoded.input_ids,
        "pixel_values": encoded.pixel_values,
        "image_grid_thw": encoded.image_grid_thw,
        "base": logits(encoded, base),
        "tuned": logits(encoded, base, adapter_path=str(adapter)),
        "merged": logits(encoded, folder / "merged"),
    }
    np.savez(folder / "logits.npz", **arrays)


def seeded():
    import random

    return random.Random(4)


def logits(encoded, path: Path, **options) -> np.ndarray:
    model, _ = mlx_vlm.load(str(path), **options)
    output = model(
        mx.array(encoded.input_ids)[None],
        pixel_values=mx.array(encoded.pixel_values),
        image_grid_thw=mx.array(encoded.image_grid_thw),
    )
    return np.array(output.logits[0].astype(mx.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

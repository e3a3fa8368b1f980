"""The files of an adapter folder: one LoRA adapter in the form that both PEFT (hence vLLM) and mlx-vlm read.

PEFT reads `adapter_model.safetensors` and from `adapter_config.json` r, lora_alpha and target_modules; mlx-vlm reads
`adapters.safetensors` and from the same config lora_parameters. Both ignore a tensor whose name they do not expect,
without a warning, so everything written is read back and compared.
"""

import re
from pathlib import Path

import mlx.core as mx

from common.errors import UserError, refuse
from common.files import write_json
from common.model.tensors import save_tensors
from integration.lora_patch.versions import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS

MLX_PREFIX, PEFT_PREFIX = "language_model.model.layers.", "base_model.model.model.language_model.layers."
MLX_NAME = re.compile(r"language_model\.model\.layers\.(\d+)\.([a-z_]+\.[a-z_]+)\.lora_([ab])")


def adapter_config(base_model: str, modules: list[str], rank: int, alpha: float, dropout: float) -> dict:
    """Return the config for both readers. ``modules``: full MLX names of the adapted linear layers.

    PEFT scales by lora_alpha / r and mlx-vlm by lora_parameters.scale; nothing in either checks that they agree.
    """
    suffixes = {name.removeprefix(MLX_PREFIX).split(".", 1)[1] for name in modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "inference_mode": True,
        # a pattern, since a plain list of suffixes could one day match the vision tower too
        "target_modules": r"(.*\.)?language_model\.layers\.\d+\.(" + "|".join(sorted(map(re.escape, suffixes))) + ")",
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": dropout, "keys": sorted(modules)},
    }


def peft_name(name: str) -> str:
    """Return PEFT's name of an MLX LoRA tensor: ...q_proj.lora_a -> base_model.model....q_proj.lora_A.weight."""
    layer, module, matrix = MLX_NAME.fullmatch(name).groups()
    return f"{PEFT_PREFIX}{layer}.{module}.lora_{matrix.upper()}.weight"


def write_adapter(folder: Path, tensors: dict[str, mx.array], config: dict) -> None:
    """Write the adapter for both readers, then read it back; ``tensors`` by MLX name, lora_a [in, r], lora_b [r, out].

    The config is removed first and written last: without it neither reader takes the folder for an adapter, so one
    that is half written is never loaded.
    """
    folder = Path(folder)
    refuse(
        [
            f"{folder}: {name} is no LoRA matrix of the language model"
            for name in tensors
            if not MLX_NAME.fullmatch(name)
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    transposed = {peft_name(name): mx.contiguous(tensor.T) for name, tensor in tensors.items()}
    save_tensors(folder / PEFT_WEIGHTS, transposed, {"format": "pt"})
    save_tensors(folder / MLX_WEIGHTS, tensors, {"format": "mlx"})
    _compare(folder, tensors, config)
    write_json(folder / CONFIG, config)


def _compare(folder: Path, expected: dict[str, mx.array], config: dict) -> None:
    """Read both files back and compare names and values with what was meant."""
    modules = {name.rsplit(".", 1)[0] for name in expected}
    if modules != set(config["lora_parameters"]["keys"]):
        raise UserError(f"{folder}: the adapter's tensors and lora_parameters.keys name different modules")
    for file, rename, turn in ((MLX_WEIGHTS, str, False), (PEFT_WEIGHTS, peft_name, True)):
        try:
            written = mx.load(str(folder / file))
        except RuntimeError as error:
            raise UserError(f"{folder / file}: cannot be read back ({error}); the disk may be failing") from error
        if written.keys() != {rename(name) for name in expected}:
            raise UserError(f"{folder / file}: read back with other names than written; the disk may be failing")
        for name, tensor in expected.items():
            found = written[rename(name)]
            same = found.dtype == tensor.dtype and mx.array_equal(found.T if turn else found, tensor, equal_nan=True)
            if not same:
                raise UserError(f"{folder / file}: {name} reads back changed; the disk may be failing")

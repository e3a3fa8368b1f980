"""The files of an adapter folder: one LoRA adapter in the form that both PEFT (hence vLLM) and mlx-vlm read.

PEFT reads `adapter_model.safetensors` and from `adapter_config.json` r, lora_alpha and target_modules; mlx-vlm reads
`adapters.safetensors` and from the same config lora_parameters. Both ignore a tensor whose name they do not expect,
without a warning, so everything written is read back and compared.
"""

import re
from pathlib import Path

import mlx.core as mx

from common.errors import UserError, refuse
from common.files import read_json, write_json
from common.tensors import HostArray, read_host_tensors, save_tensors
from integration.lora_patch.versions import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS

MLX_PREFIX, PEFT_PREFIX = "language_model.model.layers.", "base_model.model.model.language_model.layers."
MLX_NAME = re.compile(r"language_model\.model\.layers\.(\d+)\.([a-z_]+\.[a-z_]+)\.lora_([ab])")
PEFT_NAME = re.compile(
    r"base_model\.model\.model\.language_model\.layers\.(\d+)\.([a-z_]+\.[a-z_]+)\.lora_([AB])\.weight"
)


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


def mlx_name(name: str) -> str:
    """Return the MLX name of a PEFT LoRA tensor; ValueError for a tensor of another kind."""
    match = PEFT_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no LoRA matrix of the language model")
    layer, module, matrix = match.groups()
    return f"{MLX_PREFIX}{layer}.{module}.lora_{matrix.lower()}"


def write_adapter(folder: Path, tensors: dict[str, mx.array], config: dict) -> None:
    """Write the adapter for both readers, then read it back; ``tensors`` by MLX name, lora_a [in, r], lora_b [r, out].

    The config is removed first and written last: without it neither reader takes the folder for an adapter, so one
    that is half written is never loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    transposed = {peft_name(name): mx.contiguous(tensor.T) for name, tensor in tensors.items()}
    save_tensors(folder / PEFT_WEIGHTS, transposed, {"format": "pt"})
    save_tensors(folder / MLX_WEIGHTS, tensors, {"format": "mlx"})
    _compare(folder, {name: HostArray.of(tensor) for name, tensor in tensors.items()}, config)
    write_json(folder / CONFIG, config)


def _compare(folder: Path, expected: dict[str, HostArray], config: dict) -> None:
    """Read both files back and hold names and values against what was meant."""
    modules = {name.rsplit(".", 1)[0] for name in expected}
    if modules != set(config["lora_parameters"]["keys"]):
        raise UserError(f"{folder}: the adapter's tensors and lora_parameters.keys name different modules")
    for file, rename, turn in ((MLX_WEIGHTS, str, False), (PEFT_WEIGHTS, peft_name, True)):
        written, _ = read_host_tensors(folder / file)
        if written.keys() != {rename(name) for name in expected}:
            raise UserError(f"{folder / file}: read back with other names than written; the disk may be failing")
        for name, tensor in expected.items():
            data = tensor.data.T if turn else tensor.data
            if written[rename(name)].data.tobytes() != data.tobytes():
                raise UserError(f"{folder / file}: {name} reads back changed; the disk may be failing")


def read_adapter(folder: Path) -> tuple[dict[str, mx.array], dict]:
    """Read (tensors by MLX name, config) of an adapter folder in either reader's form.

    UserError for a folder without its files, with damaged ones, or where the two weight files disagree.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    present = [file for file in (MLX_WEIGHTS, PEFT_WEIGHTS) if (folder / file).is_file()]
    if config is None or not present:
        missing = CONFIG if config is None else f"{PEFT_WEIGHTS} and {MLX_WEIGHTS}"
        raise UserError(f"{folder}: no adapter there ({missing} missing); name the folder that training wrote")
    try:
        found = [_by_mlx_name(folder / file, file == PEFT_WEIGHTS) for file in present]
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; train or copy the adapter again") from error
    if len(found) == 2 and not _same(*found):
        raise UserError(f"{folder}: {PEFT_WEIGHTS} and {MLX_WEIGHTS} hold different adapters; copy the folder again")
    tensors = found[0]
    return tensors, _completed(folder, config, tensors)


def _by_mlx_name(path: Path, is_peft: bool) -> dict[str, mx.array]:
    tensors = {}
    for name, tensor in read_host_tensors(path)[0].items():
        if is_peft:
            tensors[mlx_name(name)] = mx.contiguous(tensor.to_mlx().T)
        elif MLX_NAME.fullmatch(name):
            tensors[name] = tensor.to_mlx()
        else:
            raise ValueError(f"{path}: {name} is no LoRA matrix of the language model")
    halves = {name[:-1] for name in tensors}
    if not tensors or any(half + side not in tensors for half in halves for side in "ab"):
        raise ValueError(f"{path}: LoRA matrices come in pairs, and one is missing")
    return tensors


def _same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and bool(mx.array_equal(one[name], other[name], equal_nan=True))
        for name in one
    )


def _completed(folder: Path, config: dict, tensors: dict[str, mx.array]) -> dict:
    """Return a config for both readers from one made for either; UserError where config and tensors disagree."""
    own = config.get("lora_parameters") or {}
    rank = config.get("r") or own.get("rank")
    widths = {tensor.shape[-1 if name.endswith("a") else 0] for name, tensor in tensors.items()}
    problems = []
    if widths != {rank}:
        problems.append(f"{folder / CONFIG}: rank {rank}, but the matrices have {sorted(widths)}")
    unsupported = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if unsupported:
        problems.append(f"{folder / CONFIG}: {', '.join(unsupported)} is not plain LoRA, which alone is understood")
    scales = [config["lora_alpha"] / rank] if "lora_alpha" in config and rank else []
    scales += [own["scale"]] if "scale" in own else []
    if not scales or max(scales) - min(scales) > 1e-6 * abs(max(scales)):
        problems.append(f"{folder / CONFIG}: the scale must be given once or twice alike, found {scales}")
    refuse(problems)
    modules = sorted({name.rsplit(".", 1)[0] for name in tensors})
    alpha = config.get("lora_alpha", scales[0] * rank)
    dropout = config.get("lora_dropout", own.get("dropout", 0.0))
    return adapter_config(config.get("base_model_name_or_path") or "", modules, rank, alpha, dropout)

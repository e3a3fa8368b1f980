"""The served base model as its files describe it, and whether an adapter belongs to it."""

import struct
from dataclasses import dataclass
from pathlib import Path

from .adapters import Adapter
from .errors import LoraError, first_of, one_line
from .files import read_json, safetensors_header
from .fingerprint import base_fingerprint, compare_fingerprints
from .hub import model_folder
from .names import mlx_module


@dataclass(frozen=True)
class BaseFiles:
    """The served model as its files describe it, before it is loaded."""

    fingerprint: dict
    linear: dict  # module name -> (inputs, outputs)


def read_base(name: str) -> BaseFiles | None:
    """Describe a model folder or a hub model in the local cache; None when it is not here."""
    try:
        folder = model_folder(name, download=False)
    except LoraError:
        return None
    try:
        return BaseFiles(base_fingerprint(folder, name), _linear_layers(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LoraError(f"{name}: {one_line(error)}") from error


def _linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every matrix in a model's files; a quantized one has a column of scales a group."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    shapes = {}
    for path in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            for name, tensor in safetensors_header(file, path)[0].items():
                if len(tensor["shape"]) == 2:
                    shapes[name] = tensor["shape"]
    found = {}
    for name, (outputs, inputs) in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and f"{module}.scales" in shapes:
            own = quantization.get(module)
            group = (own if isinstance(own, dict) else quantization).get("group_size", 64)
            inputs = shapes[f"{module}.scales"][1] * group
        if kind == "weight":
            found[mlx_module(module)] = (inputs, outputs)
    return found


def check_base(adapter: Adapter, served: BaseFiles | None) -> list[str]:
    """Return warnings of using the adapter on the served base; LoraError, naming both, when it is another model."""
    if served is not None:
        if adapter.trained_on is not None:
            errors, doubts = compare_fingerprints(adapter.trained_on, served.fingerprint)
            if errors:
                raise LoraError(f"{adapter.path}: {'; '.join(errors)}")
        check_shapes(adapter, served.linear)
    if adapter.trained_on is None:
        name = adapter.config.get("base_model_name_or_path")
        says = (
            f"only the name of its base model ({name[:100]})" if isinstance(name, str) else "nothing of its base model"
        )
        return [f"{adapter.path}: says {says}; only shapes can be checked"]
    if served is None:
        return [f"{adapter.path}: the served model's files were not found; only shapes can be checked"]
    return [f"{adapter.path}: {doubt}" for doubt in doubts]


def check_shapes(adapter: Adapter, linear: dict[str, tuple[int, int]]) -> None:
    """Hold every update against the linear layer that it is for; LoraError counts those that do not fit."""
    problems = []
    for name, (a, b, _) in adapter.layers.items():
        own, served = (a.shape[0], b.shape[1]), linear.get(name)
        if served is None:
            problems.append(f"{name}: the served model has no such linear layer")
        elif own != served:
            problems.append(f"{name}: made for {own[0]} -> {own[1]}, the served model has {served[0]} -> {served[1]}")
    if problems:
        raise LoraError(f"{adapter.path} does not fit the served model: {first_of(problems)}")

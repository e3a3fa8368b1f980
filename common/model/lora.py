"""The adapter as training needs it: attached untrained to a base, read and replaced by parameter name."""

import mlx.core as mx
import mlx.nn as nn

from integration.lora_patch.errors import LoraError
from integration.lora_patch.vlm import (
    LAYERS,
    TARGET_MODULES,
    Base,
    adapter_of,
    build_adapter,
    linear_size,
    plain_modules,
    use_adapter,
)


def attach_lora(
    base: Base,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = TARGET_MODULES,
    seed: int = 0,
) -> list[str]:
    """Put an untrained adapter on ``target_modules`` of every decoder layer; return the full module names.

    A is uniform in +-1/sqrt(inputs) from ``seed`` (PEFT's and mlx-vlm's initialisation), B is zero, so the adapter
    starts as a no-op. Both are float32 whatever the base is: updates of 2e-4 would be lost in bfloat16.
    """
    unknown = [name for name in target_modules if name not in TARGET_MODULES]
    if unknown or not target_modules:
        raise LoraError(f"target modules {', '.join(unknown) or '(none)'}: choose from {', '.join(TARGET_MODULES)}")
    if adapter_of(base.model) is not None:
        raise ValueError("the model already has an adapter; load the base again")
    plain = plain_modules(base.model)
    names = [f"{LAYERS}.{i}.{name}" for i in range(len(base.model.layers)) for name in target_modules]
    tensors = {}
    for name, key in zip(names, mx.random.split(mx.random.key(seed), len(names)), strict=True):
        inputs, outputs = linear_size(plain[name])
        bound = inputs**-0.5
        tensors[f"{name}.lora_a"] = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        tensors[f"{name}.lora_b"] = mx.zeros((rank, outputs))
    adapter = build_adapter(base, tensors, rank, alpha, dropout)
    base.model.freeze()
    use_adapter(base, adapter)
    for module in adapter.modules.values():
        module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return names


def lora_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return {"language_model.model.layers.0.self_attn.q_proj.lora_a": float32 [in, r], ... "lora_b": [r, out]}."""
    modules = adapter_of(model).modules
    return {f"{name}.{part}": module[part] for name, module in modules.items() for part in ("lora_a", "lora_b")}

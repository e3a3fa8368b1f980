"""For the tests: an adapter's values and gradients by parameter name, as automatic differentiation gives them."""

import mlx.core as mx
import mlx.nn as nn

from common.model.step import Batch, pack_lora, packed_loss_and_grads, unpack_lora
from integration.lora_patch.vlm import adapter_of


def update_lora(model: nn.Module, parameters: dict[str, mx.array]) -> None:
    """Put new values, by parameter name, in place."""
    for full, value in parameters.items():
        name, _, part = full.rpartition(".")
        module = adapter_of(model).modules[name]
        assert module[part].shape == value.shape, full
        module[part] = value


def loss_and_grads(
    model: nn.Module,
    batch: Batch,
    *,
    checkpointing: bool = False,
    seed: tuple[int, ...] | None = None,
    grads: dict[str, mx.array] | None = None,
) -> tuple[mx.array, int, dict[str, mx.array]]:
    """Return (summed cross-entropy float32 [], supervised tokens, gradients of that sum by parameter name, float32).

    The arguments are those of `packed_loss_and_grads`.
    """
    vector = pack_lora(model)
    loss, n, new = packed_loss_and_grads(model, batch, vector, checkpointing=checkpointing, seed=seed)
    new = unpack_lora(model, new)
    if grads is not None:
        new = {name: grads[name] + g for name, g in new.items()}
    return loss, n, new

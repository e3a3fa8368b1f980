"""Switch adapters per request over one base in memory; without an active adapter the base is untouched."""

import contextvars
import functools

from .adapters import Adapter
from .base import check_shapes


class Use:
    """One generation with an adapter; ``happened`` tells whether the adapter really took part in it."""

    def __init__(self, adapter: Adapter):
        self.layers, self.happened = adapter.layers, False


active = contextvars.ContextVar("lora_patch_active", default=None)  # a Use, or None: the base
within = contextvars.ContextVar("lora_patch_within", default=False)  # in a generation that is switched already


@functools.cache
def _switched(kind: type) -> type:
    """Return the class of a linear layer that adds the active adapter's update: scale * ((x A) B), as mlx-vlm does."""

    def forward(self, x):
        y = kind.__call__(self, x)
        use = active.get()
        if use is None:
            return y
        update = use.layers.get(self._lora_module)
        if update is None:
            return y
        use.happened = True
        a, b, scale = update
        return y + (scale * ((x @ a) @ b)).astype(x.dtype)

    return type(f"Switched{kind.__name__}", (kind,), {"__call__": forward, "switched_from": kind})


def check_layers(model, adapter: Adapter) -> dict:
    """Return the linear layers of ``model`` by name; LoraError, naming all, when a matrix does not fit its layer."""
    import mlx.nn as nn

    from .vlm import linear_size

    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    check_shapes(adapter, {name: linear_size(module) for name, module in modules.items()})
    return modules


def make_switchable(model, adapter: Adapter) -> None:
    """Let the adapter be switched on in ``model``; LoraError, naming all, when a matrix does not fit its layer.

    A layer keeps its weights, its name and its place in the model; only its class changes, so that without an active
    adapter it computes exactly what it did before, and no memory is taken.
    """
    modules = check_layers(model, adapter)
    for name in adapter.layers:
        module = modules[name]
        if not hasattr(type(module), "switched_from"):
            object.__setattr__(module, "_lora_module", name)
            module.__class__ = _switched(type(module))


def is_switchable(model) -> bool:
    """Tell whether an adapter can be switched on in some layer of ``model``."""
    return any(hasattr(type(module), "switched_from") for _, module in model.named_modules())


class switched_on:
    """Within it, the model answers with a `Use`, or as the base (None)."""

    def __init__(self, use: Use | None):
        self.use = use

    def __enter__(self):
        self.tokens = active.set(self.use), within.set(True)

    def __exit__(self, *exception):
        active.reset(self.tokens[0])
        within.reset(self.tokens[1])

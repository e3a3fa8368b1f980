"""Serve LoRA adapters from ai_advisor_service.py; shared with training and evaluation. Copied as a folder."""

import importlib

# what the lines in a service call, by module; imported when first asked for, so that `import lora_patch` stays light
_HOME = dict.fromkeys(("attach", "generation", "choose", "carry", "start"), "hooks") | {"add_arguments": "arguments"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

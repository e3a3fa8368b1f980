"""Names: of advisors, of the folders of their adapters, and of a model's modules in the various file formats."""

import re

PREFIX = "qwen3-vl-4b-lora-"  # models/qwen3-vl-4b-lora-ansel, version 2 in ...-ansel-v2


def is_advisor(text: str) -> bool:
    """Tell whether a text can name an advisor: letters, digits, "_", "-", "." and spaces, the first no sign.

    A name that ends like a version ("ansel-v2") or like a folder set aside would be read as one, so it names nobody.
    """
    ending = re.search(r"-v\d+$", text) or is_set_aside(text)
    return not ending and re.fullmatch(r"\w([\w .-]{0,98}[\w-])?", text) is not None


def adapter_name(advisor: str, number: int = 1) -> str:
    """Return the name of the folder of an advisor's adapter; version 1 has no suffix."""
    return PREFIX + advisor + (f"-v{number}" if number > 1 else "")


def parse_name(name: str) -> tuple[str, int]:
    """Return (advisor, version number) of an adapter folder's name; another form: version 1."""
    match = re.fullmatch(r"(?:.*lora-)?(.+?)(?:-v(\d+))?", name)
    return match[1], int(match[2] or 1)


def is_set_aside(name: str) -> bool:
    """Tell whether training moved this folder out of the way (...-ansel.replaced-1): no version of anything."""
    return re.search(r"\.replaced(-\d+)?$", name) is not None


def module_name(key: str) -> tuple[str, str] | None:
    """Split a tensor's name into mlx-vlm's module name and "a" or "b"; None when it is no LoRA matrix.

    Understands mlx-vlm's names, PEFT's (with or without the adapter's name, with the prefixes that transformers gave
    Qwen-VL over the years) and the older .A/.B.
    """
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+?)\.(?:lora_([ab])|lora_([AB])(?:\.[\w-]+)?\.weight|([AB]))", key)
    if not match:
        return None
    return mlx_module(match[1]), (match[2] or match[3] or match[4]).lower()


def mlx_module(name: str) -> str:
    """Return mlx-vlm's name of a module that transformers calls ``name``."""
    name = re.sub(r"^(model\.)?visual\.", "vision_tower.", name)
    name = re.sub(r"^(model\.language_model\.|language_model\.|model\.)?layers\.", "language_model.model.layers.", name)
    return re.sub(r"^lm_head$", "language_model.lm_head", name)

"""What tells one base model from another, so that an adapter is never applied to weights it was not trained on."""

import hashlib
import json
import re
import struct
from pathlib import Path

from .errors import LoraError
from .files import read_json, safetensors_header

# config fields that give the shapes and the arithmetic of the language model and the vision tower
TEXT_SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "head_dim", "vocab_size", "rms_norm_eps")  # fmt: skip
VISION_SHAPE = ("depth", "hidden_size", "intermediate_size", "out_hidden_size", "num_heads", "patch_size",
                "spatial_merge_size", "temporal_patch_size", "deepstack_visual_indexes")  # fmt: skip


def base_fingerprint(folder: Path, name: str) -> dict:
    """Return the fingerprint of the model in ``folder``; ``name`` (hub id or folder) is what people call it.

    ``architecture``: SHA-256 of the config's shape-giving fields. ``norms``: SHA-256 of the language model's RMSNorm
    weights as float32, which quantizing leaves as they are: equal for a model and its 4-bit conversion, different for
    any other training. ``weights``: SHA-256 over the language model's tensors (name, dtype, shape, first 4 KiB).
    Raises LoraError when config or weights are missing or damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    shape = [config.get("model_type"), [text.get(f) for f in TEXT_SHAPE], [vision.get(f) for f in VISION_SHAPE]]
    norms, weights = _weights(folder)
    return {
        "name": name,
        "model_type": config.get("model_type"),
        "shape": f"{text.get('num_hidden_layers')} layers, hidden {text.get('hidden_size')}",
        "architecture": hashlib.sha256(json.dumps(shape).encode()).hexdigest(),
        "norms": norms,
        "weights": weights,
        "quantization": _quantization(config.get("quantization") or config.get("quantization_config")),
    }


def compare_fingerprints(trained: dict, served: dict) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) of using an adapter trained on one base with another; ([], []) for the same base.

    Another quantization of the same weights is a warning: the adapter works, with a small loss of accuracy.
    """
    names = f"trained on {trained['name']} ({trained['shape']}), used on {served['name']} ({served['shape']})"
    if trained["architecture"] != served["architecture"]:
        return [f"the adapter's base is another model: {names}"], []
    if trained["norms"] != served["norms"]:
        return [f"the adapter's base has the same shape but other weights: {names}"], []
    if trained["quantization"] != served["quantization"]:
        then, now = (
            f"{q['bits']}-bit" if q else "unquantized" for q in (trained["quantization"], served["quantization"])
        )
        return [], [f"the base is quantized otherwise than in training ({then} then, {now} now): {names}"]
    if trained["weights"] != served["weights"]:
        return [f"the adapter's base has other weights: {names}"], []
    return [], []


def _quantization(settings: dict | None) -> dict | None:
    """Return the settings that change the weights; "mode" is absent from models older than its introduction."""
    if not settings:
        return None
    return {
        "bits": settings.get("bits"),
        "group_size": settings.get("group_size"),
        "mode": settings.get("mode", "affine"),
    }


def _weights(folder: Path) -> tuple[str, str]:
    """Return the hashes of the norms and of the language model's tensors, read from the files' headers and heads."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header, start = safetensors_header(file, path)
            for name, tensor in header.items():
                # "model.language_model." is transformers' name, "language_model.model." MLX's
                key, count = re.subn(r"^(model\.language_model|language_model\.model)\.", "", name)
                if count:
                    first, last = tensor["data_offsets"]
                    file.seek(start + first)
                    # a norm is a few KB; a crafted header that claims otherwise must not fill the memory
                    limit = 1 << 20 if key.endswith("norm.weight") else 4096
                    found[key] = (tensor["dtype"], tensor["shape"], file.read(min(limit, last - first)))
    if not found:
        raise LoraError(f"{folder}: no language-model weights in .safetensors; name a folder that holds a whole model")
    norms, weights = hashlib.sha256(), hashlib.sha256()
    for key, (dtype, shape, data) in sorted(found.items()):
        weights.update(f"{key} {dtype} {shape}\n".encode() + data[:4096])
        if key.endswith("norm.weight"):
            norms.update(key.encode() + _as_float32(dtype, data))
    return norms.hexdigest(), weights.hexdigest()


def _as_float32(dtype: str, data: bytes) -> bytes:
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    if dtype == "F16":
        count = len(data) // 2
        return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data[: 2 * count]))
    return data

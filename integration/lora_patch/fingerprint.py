"""What tells one base model from another, so that an adapter is never applied to weights it was not trained on."""

import contextlib
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import LoraError
from .files import FLOATS, as_float32, read_json, safetensors_header, write_file
from .names import mlx_module

# config fields that give the shapes and the arithmetic of the language model and the vision tower
TEXT_SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "head_dim", "vocab_size", "rms_norm_eps")  # fmt: skip
VISION_SHAPE = ("depth", "hidden_size", "intermediate_size", "out_hidden_size", "num_heads", "patch_size",
                "spatial_merge_size", "temporal_patch_size", "deepstack_visual_indexes")  # fmt: skip
IMAGE_SETTINGS = ("size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "image_mean",
                  "image_std", "rescale_factor", "do_resize", "do_rescale", "do_normalize")  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
OTHER_FILES = ("config.json", "preprocessor_config.json", *TOKENIZER_FILES, *TEMPLATE_FILES)
CACHED = 50  # fingerprints that the cache keeps
VERSION = 1  # of the way a fingerprint is computed: cached ones of another way are computed again


def base_fingerprint(folder: Path, name: str) -> dict:
    """Return the fingerprint of the model in ``folder``; ``name`` (hub id or folder) is what people call it.

    Every value is a SHA-256 in hex, except ``name``, ``model_type``, ``shape`` and ``quantization``:
    ``architecture`` the config's fields that give the shapes; ``norms`` the language model's RMSNorm weights as
    float32, which quantization does not change: equal for a model and its 4-bit conversion, different for any other
    training; ``tensors`` all weights, the same for the same numbers in bfloat16 and float32 and under transformers'
    and MLX's names; ``tokenizer``, ``chat_template`` and ``image`` (the image processor's settings) what makes tokens
    and pixels, None where the folder has none; ``weights`` the language model's names, dtypes, shapes and first 4 KiB
    of each tensor, which is all that adapters of earlier versions recorded.

    Reading all weights takes seconds: the result is cached under the files' sizes and times of change.
    Raises LoraError when config or weights are missing or damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not shards:
        raise LoraError(f"{folder}: no language-model weights in .safetensors; name a folder that holds a whole model")
    found = _cached(folder, shards)
    if found is None:
        found = {
            **_hash_weights(folder, shards, config),
            "tokenizer": _hash_tokenizer(folder),
            "chat_template": _hash_template(folder),
            "image": _hash_image_settings(folder),
        }
        _cache(folder, shards, found)
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    shape = [config.get("model_type"), [text.get(f) for f in TEXT_SHAPE], [vision.get(f) for f in VISION_SHAPE]]
    return {
        "name": name,
        "model_type": config.get("model_type"),
        "shape": f"{text.get('num_hidden_layers')} layers, hidden {text.get('hidden_size')}",
        "architecture": hashlib.sha256(json.dumps(shape).encode()).hexdigest(),
        "quantization": _quantization(config.get("quantization") or config.get("quantization_config")),
        **found,
    }


def compare_fingerprints(trained: dict, served: dict) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) of using an adapter trained on one base with another; ([], []) for the same base.

    Another quantization of the same weights is a warning: the adapter works, with a small loss of accuracy. So are
    another chat template or other image settings, which a service may set by itself. What one of the two does not
    record (fingerprints of earlier versions) is not compared.
    """
    names = f"trained on {trained['name']} ({trained['shape']}), used on {served['name']} ({served['shape']})"
    if trained["architecture"] != served["architecture"]:
        return [f"the adapter's base is another model: {names}"], []
    if trained["norms"] != served["norms"]:
        return [f"the adapter's base has the same shape but other weights: {names}"], []

    def differs(key: str) -> bool:
        return None not in (trained.get(key), served.get(key)) and trained[key] != served[key]

    errors, warnings = [], []
    if trained["quantization"] != served["quantization"]:
        then, now = (
            f"{q['bits']}-bit" if q else "unquantized" for q in (trained["quantization"], served["quantization"])
        )
        warnings.append(f"the base is quantized otherwise than in training ({then} then, {now} now): {names}")
    elif differs("tensors" if trained.get("tensors") and served.get("tensors") else "weights"):
        errors.append(f"the adapter's base has other weights: {names}")
    if differs("tokenizer"):
        errors.append(f"the base's tokenizer is another than in training: {names}")
    if differs("chat_template"):
        warnings.append(f"the base's chat template is another than in training: {names}")
    if differs("image"):
        warnings.append(f"the base's image settings are others than in training: {names}")
    return errors, warnings


def _quantization(settings: dict | None) -> dict | None:
    """Return the settings that change the weights; "mode" is absent from models older than its introduction."""
    if not settings:
        return None
    return {
        "bits": settings.get("bits"),
        "group_size": settings.get("group_size"),
        "mode": settings.get("mode", "affine"),
    }


# -- weights ----------------------------------------------------------------------------------------------------------


def _hash_weights(folder: Path, shards: list[Path], config: dict) -> dict:
    """Return ``norms``, ``weights`` and ``tensors``; the shards are read by four threads, hashing leaves the GIL."""
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False))
    heads, digests, jobs = {}, {}, []
    for path in shards:
        with open(path, "rb") as file:
            header, start = safetensors_header(file, path)
            for name, tensor in header.items():
                first, last = tensor["data_offsets"]
                # "model.language_model." is transformers' name, "language_model.model." MLX's
                key, count = re.subn(r"^(model\.language_model|language_model\.model)\.", "", name)
                if count:
                    file.seek(start + first)
                    # a norm is a few KB; a crafted header that claims otherwise must not fill the memory
                    limit = 1 << 20 if key.endswith("norm.weight") else 4096
                    heads[key] = (tensor["dtype"], tensor["shape"], file.read(min(limit, last - first)))
                key = _plain_name(name)
                if not (tied and key == "language_model.lm_head.weight"):  # some files hold tied weights twice
                    jobs.append((key, path, start, tensor))
    if not heads:
        raise LoraError(f"{folder}: no language-model weights in .safetensors; name a folder that holds a whole model")
    with ThreadPoolExecutor(4) as pool:
        for (key, *_), digest in zip(jobs, pool.map(lambda job: _hash_tensor(*job[1:]), jobs), strict=True):
            digests[key] = digest
    norms, weights = hashlib.sha256(), hashlib.sha256()
    for key, (dtype, shape, data) in sorted(heads.items()):
        weights.update(f"{key} {dtype} {shape}\n".encode() + data[:4096])
        if key.endswith("norm.weight"):
            norms.update(key.encode() + (as_float32(dtype, data).tobytes() if dtype in FLOATS else data))
    tensors = _hash_json(sorted(digests.items()))
    return {"norms": norms.hexdigest(), "weights": weights.hexdigest(), "tensors": tensors}


def _plain_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    module = re.sub(r"^model\.language_model\.", "language_model.model.", module)
    return f"{mlx_module(module)}.{part}"


def _hash_tensor(path: Path, start: int, tensor: dict) -> str:
    """Return the SHA-256 of a tensor's shape and numbers, whatever the float type that holds them."""
    import numpy as np

    (first, last), dtype, shape = tensor["data_offsets"], tensor["dtype"], tensor["shape"]
    flat = np.memmap(path, np.uint8, "r", start + first, (last - first,)) if last > first else np.zeros(0, np.uint8)
    if len(shape) == 5:  # the vision tower's convolution: [out, in, t, h, w], which MLX turns to [out, t, h, w, in]
        values = flat.view(np.uint32 if dtype == "F32" else np.uint16).reshape(shape)
        values = np.moveaxis(values, 1, -1) if shape[1] == 3 and shape[-1] != 3 else values
        shape, flat = list(values.shape), np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    found = hashlib.sha256()
    size = FLOATS.get(dtype)
    found.update(f"{'float' if size else dtype} {shape}".encode())
    step = (1 << 22) * (size or 1)  # bytes of a piece: equally many numbers for every type
    for at in range(0, len(flat), step):
        found.update(_canonical(dtype, flat[at : at + step]))
    return found.hexdigest()


def _canonical(dtype: str, raw):
    """Return a piece of a tensor such that the same numbers give the same bytes: bfloat16 where that holds them."""
    import numpy as np

    if dtype not in ("F16", "F32"):
        return np.ascontiguousarray(raw)
    if dtype == "F16":
        raw = np.ascontiguousarray(raw).view(np.float16).astype(np.float32).view(np.uint8)
    wide = np.ascontiguousarray(raw).view(np.uint32)
    return np.ascontiguousarray(wide >> 16).astype(np.uint16) if not (wide & 0xFFFF).any() else wide


# -- tokenizer, chat template, image settings --------------------------------------------------------------------------


def _hash_json(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_tokenizer(folder: Path) -> str | None:
    """Return the hash of what decides which ids a text becomes, however the file is laid out."""
    file = folder / "tokenizer.json"
    if file.is_file():
        content = read_json(file)
        model = content.get("model") if isinstance(content.get("model"), dict) else {}
        added = {str(one.get("content")): one.get("id") for one in _objects(content.get("added_tokens"))}
        # tokenizers before 0.20 wrote a merge as "a b", later ones as ["a", "b"]
        merges = [one if isinstance(one, str) else " ".join(map(str, one)) for one in model.get("merges") or []]
        parts = [content.get("normalizer"), content.get("pre_tokenizer")]
        return _hash_json([model.get("vocab"), merges, added, parts])
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")
              if (folder / name).is_file()]  # fmt: skip
    return _hash_json(hashes) if hashes else None


def _objects(content) -> list[dict]:
    return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []


def _hash_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    else:
        files = [folder / "chat_template.json", folder / "tokenizer_config.json"]
        contents = [read_json(file) for file in files if file.is_file()]
        text = next((one["chat_template"] for one in contents if one.get("chat_template")), None)
    return _hash_json(text.strip() if isinstance(text, str) else text) if text else None


def _hash_image_settings(folder: Path) -> str | None:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    content = read_json(file)
    return _hash_json({key: content[key] for key in IMAGE_SETTINGS if content.get(key) is not None})


# -- cache ------------------------------------------------------------------------------------------------------------


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "mondrian-lora" / "fingerprints.json"


def _key(folder: Path, shards: list[Path]) -> str:
    files = [*shards, *(folder / name for name in OTHER_FILES)]
    stats = [(path.name, *_stat(path)) for path in files if path.exists()]
    return _hash_json([VERSION, str(folder.resolve()), stats])


def _stat(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _cached(folder: Path, shards: list[Path]) -> dict | None:
    try:
        found = json.loads(_cache_file().read_text(encoding="utf-8")).get(_key(folder, shards))
    except (OSError, ValueError, AttributeError, RuntimeError):
        return None
    keys = {"norms", "weights", "tensors", "tokenizer", "chat_template", "image"}
    return found if isinstance(found, dict) and set(found) == keys else None


def _cache(folder: Path, shards: list[Path], found: dict) -> None:
    """Keep a fingerprint; a cache that cannot be written costs time, no more."""
    with contextlib.suppress(OSError, RuntimeError):
        file, content = _cache_file(), {}
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
        kept = list(content.items())[-CACHED:] if isinstance(content, dict) else []
        write_file(file, json.dumps(dict(kept) | {_key(folder, shards): found}).encode())

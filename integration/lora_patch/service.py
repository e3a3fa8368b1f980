"""Serve LoRA adapters from ai_advisor_service.py: arms per request over one base, A/B test, reload, rollback.

    python lora_patch.py install --service path/to/ai_advisor_service.py [--check | --uninstall]
    python lora_patch.py check --lora_path models/qwen3-vl-4b-lora-ansel --base_model Qwen/Qwen3-VL-4B-Instruct
    python lora_patch.py report --db mondrian.db --days 7 [--format table|json|html]

`install` copies this file beside the service and adds the few lines that call it (the guide shows them); it needs
the standard library alone. The service then takes --lora_path, --model_mode, --ab_test_split and more. It reads
adapter folders, never writes them, and writes four columns of the jobs table. Without these flags every function
here returns at once and nothing changes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import contextvars
import functools
import hashlib
import html
import inspect
import io
import json
import logging
import math
import os
import re
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import tokenize
import uuid
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

Image = ImageOps = None  # Pillow, imported with the first photograph: `install` and `report` do without

log = logging.getLogger("lora_patch")

COLUMNS = {  # added to the jobs table
    "model_used": "TEXT",  # base, fine_tuned, ab_test_base or ab_test_fine_tuned
    "adapter_version": "TEXT",
    "model_duration": "REAL",  # seconds of generation, a retry included, waiting for the model not
    "model_fallback": "INTEGER",  # 1: the fine-tuned answer was unusable, and the user got the base's
}


class LoraError(ValueError):
    """Something a person can mend; the message is one line."""


# -- flags ------------------------------------------------------------------------------------------------------------

MODES = ("base", "fine_tuned", "ab_test")
DEFAULTS = {
    "lora_path": None,
    "model_mode": None,  # base, unless --use_fine_tuned or an active model says otherwise
    "use_fine_tuned": False,
    "ab_test_split": 0.5,
    "model_config": None,
    "jobs_db": None,
    "fallback_on_invalid": True,
    "allow_arm_override": False,
    "breaker_window": 20,
    "breaker_bound": 0.25,
    "breaker_time_limit": None,
}
flags = dict(DEFAULTS)  # filled while the service parses its command line
parsed = argparse.Namespace()  # the service's own flags, once one of ours was given


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to the service's parser and return it; their values go to `flags`, whoever parses and wherever."""
    add = functools.partial(parser.add_argument_group("LoRA adapters").add_argument, action=_Flag)
    add("--lora_path", help="adapter folder, folder of versions, or ansel=FOLDER,weston=FOLDER; a:0.7,b:0.3 combines")
    add("--model_mode", choices=MODES, help="which model answers (default: base)")
    add("--ab_test_split", type=_share, help="share of jobs that ab_test gives to the adapter (default: %(default)s)")
    add("--use_fine_tuned", nargs=0, help="the same as --model_mode fine_tuned")
    add("--model_config", help="JSON with named models and active_model, or a deployed.json")
    add("--jobs_db", help="database with the jobs table (default: the service's, else mondrian.db)")
    add("--fallback_on_invalid", type=_yes_or_no, help="on|off: retry an unusable answer on the base (default: on)")
    add("--allow_arm_override", nargs=0, help="debugging: let a request choose with X-Lora-Arm: base|fine_tuned")
    add(
        "--breaker_window",
        type=_count,
        help="answers of an adapter that its circuit breaker looks at (default: %(default)s)",
    )
    add("--breaker_bound", type=_share, help="share of bad answers above which it goes off (default: %(default)s)")
    add("--breaker_time_limit", type=float, help="seconds; a slower answer is a bad one (default: --model_timeout)")
    return parser


class _Flag(argparse.Action):
    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, dest, default=DEFAULTS[dest], **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        global parsed
        value = True if self.nargs == 0 else values
        setattr(namespace, self.dest, value)
        flags[self.dest], parsed = value, namespace


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.0 and 1.0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("on", "off", "true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text} is neither on nor off")
    return text.lower() in ("on", "true", "yes", "1")


# -- the training code's own functions: a test holds them to be the same text as there ---------------------------------

MAX_IMAGE_SIZE = 1024  # pixels of the long side: 768 image tokens for a 4:3 photograph, where 12 megapixels give 11,900
MAX_PIXELS = 200_000_000  # above it a file is taken for a decompression bomb; the largest cameras make 150 megapixels


class PhotoError(ValueError):
    """A file that is no photograph; the message is one line and names the file."""


def load_photo(path: str | os.PathLike, max_image_size: int = MAX_IMAGE_SIZE) -> Image.Image:
    """Read a photograph as 8-bit RGB, upright, its long side at most ``max_image_size`` pixels (never enlarged).

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey keeps its range.
    Raises PhotoError for a file that is missing, no image, damaged, or larger than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF; both are dealt with here
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PhotoError(f"{path}: {image.width} x {image.height} pixels, taken for a decompression bomb")
                # a JPEG is decoded at the nearest larger eighth: a 12-megapixel photograph needs 4 MB instead of 36
                image.draft("RGB", (max_image_size, max_image_size))
                return _bounded(_rgb(ImageOps.exif_transpose(image)), max_image_size)
    except PhotoError:
        raise
    except FileNotFoundError as error:
        raise PhotoError(f"{path}: no such photograph") from error
    except (OSError, ValueError, SyntaxError, MemoryError, OverflowError, Image.DecompressionBombError) as error:
        raise PhotoError(f"{path}: not a readable photograph ({' '.join(str(error).split())[:120]})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit grey; Pillow's own conversion clips it to white
        return image.convert("F").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _bounded(image: Image.Image, max_image_size: int) -> Image.Image:
    longest = max(image.size)
    if longest <= max_image_size:
        return image
    size = [max(1, round(side * max_image_size / longest)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


MAX_HEADER = 100_000_000  # bytes; the limit that the safetensors format itself sets
TEXT_SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "head_dim", "vocab_size", "rms_norm_eps")  # fmt: skip
VISION_SHAPE = ("depth", "hidden_size", "intermediate_size", "out_hidden_size", "num_heads", "patch_size",
                "spatial_merge_size", "temporal_patch_size", "deepstack_visual_indexes")  # fmt: skip


def base_fingerprint(folder: Path, name: str) -> dict:
    """Return the fingerprint of the model in ``folder``; ``name`` (hub id or folder) is what people call it.

    ``architecture``: SHA-256 of the config's shape-giving fields. ``norms``: SHA-256 of the language model's RMSNorm
    weights as float32, which quantizing leaves as they are: equal for a model and its 4-bit conversion, different for
    any other training. ``weights``: SHA-256 over the language model's tensors (name, dtype, shape, first 4 KiB).
    Raises ValueError when config or weights are missing or damaged.
    """
    folder = Path(folder)
    config = _config(folder / "config.json")
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


def _config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; name a folder that holds a whole model") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return config


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
        raise ValueError(f"{folder}: no language-model weights in .safetensors; name a folder that holds a whole model")
    norms, weights = hashlib.sha256(), hashlib.sha256()
    for key, (dtype, shape, data) in sorted(found.items()):
        weights.update(f"{key} {dtype} {shape}\n".encode() + data[:4096])
        if key.endswith("norm.weight"):
            norms.update(key.encode() + _as_float32(dtype, data))
    return norms.hexdigest(), weights.hexdigest()


def safetensors_header(file, path: Path) -> tuple[dict, int]:
    """Read a safetensors file's header: ({tensor name: dtype, shape, data_offsets}, where the data start).

    Format: 8 bytes little-endian length, then that much JSON (huggingface.co/docs/safetensors). Raises ValueError.
    """
    size = path.stat().st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{path}: not a safetensors file (a header of {length:,} bytes in a file of {size:,})")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, last = tensor["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length or not isinstance(tensor["shape"], list):
                raise ValueError(f"tensor {name} lies outside the file")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged safetensors header ({error})") from error
    return header, 8 + length


def _as_float32(dtype: str, data: bytes) -> bytes:
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    if dtype == "F16":
        count = len(data) // 2
        return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data[: 2 * count]))
    return data


def build_prompt(system_prompt: str, advisor: str, advisor_prompt: str) -> str:
    """Return the service's prompt, byte for byte: its jobs show the advisor's id in place of ``<AdvisorName>``."""
    system_prompt = system_prompt.replace("<AdvisorName>", advisor)
    return f"{system_prompt}\n\n{advisor_prompt}\n\nAnalyze the provided image."


def demands_html(system_prompt: str) -> bool:
    """Tell whether a system prompt is of the older era, which asked for HTML instead of JSON."""
    return "feedback-card" in system_prompt or bool(re.search(r"valid HTML|raw HTML|output HTML", system_prompt, re.I))


# -- an adapter: reading and checking ---------------------------------------------------------------------------------

WEIGHTS = ("adapters.safetensors", "adapter_model.safetensors", "weights.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npz", "*.npy")
LANGUAGE = "language_model.model.layers."
SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes; LoRA matrices come in no other type
MAX_ADAPTER = 8 << 30  # bytes; rank 256 on all layers of the 8B model takes 4 GB
MAX_JSON = 16 << 20  # bytes


@dataclass
class Adapter:
    """One LoRA adapter, ready to be switched on: its update of each module, and what people call it."""

    layers: dict  # module name -> (a [in, r], b [r, out], scale): mx.array, mx.array, float
    path: str
    version: str
    ranks: list[int]
    digest: str  # SHA-256 of the weights and weightings: the same adapter is not loaded twice
    trained_on: dict | None  # base fingerprint, when the folder says it
    max_image_size: int
    breaker: Breaker | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b, _ in self.layers.values())


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from: folders with their weights, the version's name, and the hashes it must have."""

    parts: tuple  # ((Path, float), ...)
    version: str
    sha256: tuple = ()  # ((file name, hex), ...)

    def __post_init__(self):
        # it goes into a response header
        object.__setattr__(self, "version", re.sub(r"[^ -~]", "?", self.version)[:80])

    @property
    def path(self) -> str:
        if len(self.parts) == 1 and self.parts[0][1] == 1.0:
            return str(self.parts[0][0])
        return ",".join(f"{folder}:{weight:g}" for folder, weight in self.parts)


def read_adapter(source: Source) -> Adapter:
    """Read and check an adapter, or the weighted sum of several: sum_i w_i s_i (x A_i) B_i.

    A sum is exact, not an average of matrices: the A_i stand side by side, the w_i s_i B_i below one another, so the
    combined rank is the sum of the ranks. Raises LoraError naming all that is wrong with the folders.
    """
    import mlx.core as mx
    import numpy as np

    parts, problems = [], []
    for folder, weight in source.parts:
        try:
            parts.append((*_read_folder(folder, dict(source.sha256)), weight))
        except LoraError as error:
            problems.append(str(error))
    if problems:
        raise LoraError("; ".join(problems))
    layers = {}
    plain = len(parts) == 1 and parts[0][-1] == 1.0
    for module in sorted({name for part in parts for name in part[0]}):
        updates = [(*part[0][module], part[-1]) for part in parts if module in part[0]]
        if plain:
            a, b, scale, dtype = updates[0][:4]
        else:
            shapes = {(a.shape[0], b.shape[1]) for a, b, *_ in updates}
            if len(shapes) > 1:
                raise LoraError(f"{source.path}: the adapters are of different models: {module} has {sorted(shapes)}")
            a = np.concatenate([a for a, *_ in updates], axis=1)
            b = np.concatenate([b * np.float32(scale * weight) for _, b, scale, _, weight in updates], axis=0)
            scale, dtype = 1.0, "F32"
        target = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
        layers[module] = (mx.array(a).astype(target), mx.array(b).astype(target), scale)
    mx.eval([matrix for a, b, _ in layers.values() for matrix in (a, b)])  # streams end with the thread that made them
    trained_on = {json.dumps(part[2]["base_fingerprint"]) for part in parts if part[2].get("base_fingerprint")}
    if len(trained_on) > 1:
        raise LoraError(f"{source.path}: the combined adapters were trained on different bases")
    sizes = [part[2]["max_image_size"] for part in parts]
    return Adapter(
        layers,
        source.path,
        source.version,
        sorted({a.shape[1] for a, _, _ in layers.values()}),
        hashlib.sha256(json.dumps([[part[1], part[-1]] for part in parts]).encode()).hexdigest(),
        json.loads(trained_on.pop()) if trained_on else None,
        max(sizes),
    )


def _read_folder(folder: Path, expected: dict) -> tuple[dict, str, dict]:
    """Return ({module: (a, b, scale, dtype)} as float32 numpy, SHA-256 of weights and config, training notes)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LoraError(f"{folder}: no such adapter folder")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise LoraError(f"{folder}: holds {pickles[0]} but no safetensors; pickle is never read: convert it")
        raise LoraError(f"{folder}: no {WEIGHTS[0]} or {WEIGHTS[1]}; name the folder that training wrote")
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise LoraError(f"{folder}: no adapter_config.json beside {file.name}; without it the scale is unknown")
    config = _read_json(config_file)
    _check_plain(config, config_file)
    for name in expected:
        if name.endswith((".json", ".safetensors")) and "/" not in name and (folder / name).is_file():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected[name]:
                raise LoraError(f"{folder / name}: not the file that was deployed (SHA-256 differs)")
        elif expected[name] is not None:
            raise LoraError(f"{folder}: {name}, which was deployed, is missing")
    tensors, digest = _read_tensors(file)
    updates = _pair(file, tensors, config)
    both = [_config_scale(config, kind, config_file) for kind in ("mlx", "peft")]
    uniform = not (config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"))
    if uniform and None not in both and not math.isclose(*both, rel_tol=1e-6):
        raise LoraError(f"{config_file}: lora_parameters.scale is {both[0]:g} but lora_alpha / r is {both[1]:g}")
    digest = hashlib.sha256(f"{digest} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()
    return updates, digest, _training_notes(folder)


def _check_plain(config: dict, path: Path) -> None:
    """Refuse what is more than LoRA; tensors that do not belong (trained biases) are refused where they are met."""
    kinds = ("use_dora", "modules_to_save", "fan_in_fan_out", "megatron_config")
    unsupported = [key for key in kinds if config.get(key)]
    if config.get("fine_tune_type") in ("dora", "full"):
        unsupported.append(f"fine_tune_type {config['fine_tune_type']}")
    if config.get("peft_type") not in (None, "LORA"):
        unsupported.append(f"peft_type {str(config['peft_type'])[:40]}")
    if unsupported:
        raise LoraError(f"{path}: {', '.join(unsupported)}: not plain LoRA")


def _read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_JSON:
            raise LoraError(f"{path}: larger than {MAX_JSON >> 20} MB; that is no configuration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"{path}: cannot be read as JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise LoraError(f"{path}: a JSON object was expected")
    return content


def _training_notes(folder: Path) -> dict:
    """Return what the trainer left, if anything: the base's fingerprint and the bound of the photographs' size."""
    notes = {"base_fingerprint": None, "max_image_size": MAX_IMAGE_SIZE}
    if not (folder / "training_args.json").is_file():
        return notes
    trained = _read_json(folder / "training_args.json")
    settings = trained.get("settings") if isinstance(trained.get("settings"), dict) else {}
    size = settings.get("max_image_size")
    if isinstance(size, int) and 28 <= size <= 8192:
        notes["max_image_size"] = size
    fingerprint = trained.get("base_fingerprint")
    if fingerprint is not None:
        keys = ("name", "shape", "architecture", "norms", "weights", "quantization")
        if not isinstance(fingerprint, dict) or any(key not in fingerprint for key in keys):
            raise LoraError(f"{folder / 'training_args.json'}: base_fingerprint is damaged")
        notes["base_fingerprint"] = fingerprint
    return notes


def _read_tensors(path: Path) -> tuple[dict, str]:
    """Return ({name: (float32 array [2 dimensions], dtype)}, SHA-256 of the file), every tensor checked."""
    import numpy as np

    if path.stat().st_size > MAX_ADAPTER:
        raise LoraError(f"{path}: {path.stat().st_size:,} bytes; that is no LoRA adapter")
    try:
        with open(path, "rb") as file:
            header, start = safetensors_header(file, path)
            file.seek(0)
            data = file.read()
    except (OSError, ValueError, MemoryError) as error:
        raise LoraError(_one_line(error)) from error
    tensors, problems = {}, []
    for name, tensor in header.items():
        dtype, shape, (first, last) = tensor.get("dtype"), tensor["shape"], tensor["data_offsets"]
        if dtype not in SIZES or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
            problems.append(f"{name[:120]} is {dtype} {str(shape)[:60]}, not a matrix of F32, F16 or BF16")
        elif last - first != SIZES[dtype] * shape[0] * shape[1] or start + last > len(data):
            problems.append(f"{name[:120]}: {last - first} bytes do not make {dtype} {shape}")
        else:
            raw = np.frombuffer(data, "<u4" if dtype == "F32" else "<u2", shape[0] * shape[1], start + first)
            if dtype == "BF16":  # the upper half of a float32
                values = (raw.astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view(np.float32 if dtype == "F32" else np.float16).astype(np.float32)
            if not np.isfinite(values).all():
                problems.append(f"{name[:120]} holds NaN or infinity")
            tensors[name] = values.reshape(shape), dtype
    if problems:
        raise LoraError(f"{path}: {_first_of(problems)}")
    return tensors, hashlib.sha256(data).hexdigest()


def module_name(key: str) -> tuple[str, str] | None:
    """Split a tensor's name into mlx-vlm's module name and "a" or "b"; None when it is no LoRA matrix.

    Understands mlx-vlm's names, PEFT's (with or without the adapter's name, with the prefixes that transformers gave
    Qwen-VL over the years) and the older .A/.B.
    """
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+?)\.(?:lora_([ab])|lora_([AB])(?:\.[\w-]+)?\.weight|([AB]))", key)
    if not match:
        return None
    return _mlx_module(match[1]), (match[2] or match[3] or match[4]).lower()


def _mlx_module(name: str) -> str:
    """Return mlx-vlm's name of a module that transformers calls ``name``."""
    name = re.sub(r"^(model\.)?visual\.", "vision_tower.", name)
    name = re.sub(r"^(model\.language_model\.|language_model\.|model\.)?layers\.", LANGUAGE, name)
    return re.sub(r"^lm_head$", "language_model.lm_head", name)


def _pair(file: Path, tensors: dict, config: dict) -> dict:
    """Return {module: (a [in, r], b [r, out], scale, dtype)} from a file's tensors and its config."""
    import numpy as np

    halves, problems = {}, []
    for key, (values, dtype) in tensors.items():
        named = module_name(key)
        if named is None:
            problems.append(f"{key[:120]} is no LoRA matrix of a linear layer")
            continue
        is_peft = key.endswith(".weight")
        turned = np.ascontiguousarray(values.T) if is_peft else values  # PEFT: A [r, in], B [out, r]
        if halves.setdefault(named[0], {}).setdefault(named[1], (turned, dtype, is_peft, key))[3] != key:
            problems.append(f"{named[0]} is there twice")
    updates = {}
    for module, half in halves.items():
        if set(half) != {"a", "b"}:
            problems.append(f"{module}: {'B' if 'a' in half else 'A'} is missing")
            continue
        (a, dtype, is_peft, key), (b, dtype_b, _, _) = half["a"], half["b"]
        if a.shape[1] != b.shape[0]:
            problems.append(f"{module}: A has rank {a.shape[1]}, B {b.shape[0]}")
        elif not _is_targeted(config, key, is_peft):
            problems.append(f"{module}: adapter_config.json's target_modules leaves it out")
        else:
            scale, rank = _module_scale(file.parent / "adapter_config.json", config, key, is_peft)
            if rank is not None and rank != a.shape[1]:
                problems.append(f"{module}: rank {a.shape[1]}, but adapter_config.json says {rank}")
            updates[module] = (a, b, scale, dtype if dtype == dtype_b else "F32")
    if problems:
        raise LoraError(f"{file}: {_first_of(problems)}")
    if not updates:
        raise LoraError(f"{file}: holds no LoRA matrices")
    return updates


def _is_targeted(config: dict, key: str, is_peft: bool) -> bool:
    """Tell whether PEFT would use this tensor: it drops, silently, what target_modules does not match."""
    targets = config.get("target_modules")
    if not is_peft or targets is None or targets == "all-linear":
        return True
    name = re.sub(r"\.lora_A(\.[\w-]+)?\.weight$", "", key).removeprefix("base_model.model.")
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error:
            return False
    return isinstance(targets, list) and any(name == str(t) or name.endswith(f".{t}") for t in targets)


def _config_scale(config: dict, kind: str, path: Path) -> float | None:
    """Return the config's one scale as mlx-vlm ("mlx") or PEFT ("peft") would take it; None when it has none."""
    own = config.get("lora_parameters")
    if kind == "mlx":
        if isinstance(own, dict):
            return _number(own.get("scale"), "lora_parameters.scale", path)
        if "rank" in config and "alpha" in config:  # mlx-vlm's older form
            return _number(config["alpha"], "alpha", path) / _rank(config["rank"], "rank", path)
        return None
    if "r" not in config or "lora_alpha" not in config:
        return None
    rank = _rank(config["r"], "r", path)
    return _number(config["lora_alpha"], "lora_alpha", path) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module_scale(path: Path, config: dict, key: str, is_peft: bool) -> tuple[float, int | None]:
    """Return (scale, rank that the config demands or None) of one module."""
    if not is_peft:
        scale = _config_scale(config, "mlx", path)
        if scale is None:
            scale = _config_scale(config, "peft", path)
        if scale is None:
            raise LoraError(f"{path}: no lora_parameters.scale; without it the adapter's strength is unknown")
        own = config.get("lora_parameters")
        rank = own.get("rank") if isinstance(own, dict) else config.get("rank", config.get("r"))
        return scale, _rank(rank, "rank", path) if rank is not None else None
    name = re.sub(r"\.lora_A(\.[\w-]+)?\.weight$", "", key).removeprefix("base_model.model.")
    rank = _rank(_pattern(config.get("rank_pattern"), name, config.get("r")), "r", path)
    alpha = _number(_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha")), "lora_alpha", path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _pattern(patterns, name: str, default):
    """Return the value of the first pattern that matches as PEFT matches them, else the default."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error:
            continue
    return default


def _number(value, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoraError(f"{path}: {name} is {str(value)[:40]}, not a number")
    return float(value)


def _rank(value, name: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        raise LoraError(f"{path}: {name} is {str(value)[:40]}, not a rank")
    return value


def check_base(adapter: Adapter, served: Base | None) -> list[str]:
    """Return warnings of using the adapter on the served base; LoraError, naming both, when it is another model."""
    if served is not None:
        if adapter.trained_on is not None:
            errors, doubts = compare_fingerprints(adapter.trained_on, served.fingerprint)
            if errors:
                raise LoraError(f"{adapter.path}: {'; '.join(errors)}")
        check_shapes(adapter, served.linear)
    if adapter.trained_on is None:
        return [f"{adapter.path}: says nothing of its base model; only shapes can be checked"]
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
        raise LoraError(f"{adapter.path} does not fit the served model: {_first_of(problems)}")


@dataclass(frozen=True)
class Base:
    """The served model as its files describe it, before it is loaded."""

    fingerprint: dict
    linear: dict  # module name -> (inputs, outputs)


def read_base(name: str) -> Base | None:
    """Describe a model folder or a hub model in the local cache; None when it is not here."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # no cache, no such id, no client: all mean that the files are not here
            return None
    try:
        return Base(base_fingerprint(folder, name), _linear_layers(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LoraError(f"{name}: {_one_line(error)}") from error


def _linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every matrix in a model's files; a quantized one has a column of scales a group."""
    config = _config(folder / "config.json")
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
            found[_mlx_module(module)] = (inputs, outputs)
    return found


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _first_of(problems: list[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


# -- which adapters: --lora_path, --model_config, deployed.json --------------------------------------------------------

EVERYONE = "*"  # in place of an advisor: an adapter that answers for all


def find_sources(lora_path: str | None, model_config: str | None) -> tuple[dict[str, Source], str | None]:
    """Return ({advisor or "*": Source}, mode that an active model implies or None); reads names, no weights."""
    if lora_path:
        return _parse_list(lora_path), None
    if model_config:
        return _from_config(Path(model_config))
    return {}, None


def _parse_list(text: str) -> dict[str, Source]:
    """Parse ``FOLDER``, ``a:0.7,b:0.3`` and ``ansel=FOLDER,weston=a:0.5,b:0.5`` (an item without = goes on)."""
    groups, advisor = {}, EVERYONE
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.match(r"([\w.-]+)=(.+)", item)
        if match and not Path(item).exists():
            advisor, item = match[1].lower(), match[2]
            if advisor in groups:
                raise LoraError(f"--lora_path: {advisor} is named twice")
        groups.setdefault(advisor, []).append(item)
    if not groups:
        raise LoraError("--lora_path: empty")
    found = {}
    for advisor, items in groups.items():
        if len(items) == 1 and not _weighted(items[0])[1]:
            found.update(_from_folder(Path(items[0]), advisor))
            continue
        parts, names = [], []
        for item in items:
            path, weight = _weighted(item)
            if weight is None:
                raise LoraError(f"--lora_path: {item} has no weight; combine as a:0.7,b:0.3")
            sources = _from_folder(Path(path), advisor)
            if len(sources) != 1:
                raise LoraError(f"--lora_path: {path} holds several adapters; name the one to combine")
            source = next(iter(sources.values()))
            parts.extend((folder, own * weight) for folder, own in source.parts)
            names.append(f"{Path(path).name}:{weight:g}")
        found[advisor] = Source(tuple(parts), "+".join(names))
    return found


def _weighted(item: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", item)
    return (match[1], float(match[2])) if match and not Path(item).exists() else (item, None)


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*WEIGHTS, "adapter_config.json"))


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder holds a finished adapter: the config is what training writes last."""
    return (folder / "adapter_config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS)


def _version(name: str) -> tuple[str, int]:
    """Split a folder's name into advisor and version: qwen3-vl-4b-lora-ansel-v2 is ("ansel", 2)."""
    match = re.fullmatch(r"(?:.*lora-)?(.+?)(?:-v(\d+))?", name.lower())
    return match[1], int(match[2] or 1)


def _from_folder(folder: Path, advisor: str) -> dict[str, Source]:
    """Find what a path names: one adapter, a deployed record, or a folder of versions (of several advisors)."""
    folder = folder.expanduser()
    if folder.is_file() and folder.name == "deployed.json":
        return _from_record(folder)
    if folder.is_file():
        raise LoraError(f"{folder}: is a file; name the adapter's folder")
    if not folder.is_dir():
        raise LoraError(f"{folder}: no such adapter folder")
    if (folder / "deployed.json").is_file():
        return _from_record(folder / "deployed.json")
    if _is_adapter(folder):
        name, number = _version(folder.name)
        plain = name == folder.name.lower() and number == 1 and "lora" not in name
        return {advisor: Source(((folder, 1.0),), folder.name if plain else f"v{number}")}
    newest, deployed, decided = {}, {}, set()
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (child / "deployed.json").is_file():
            deployed.update(_from_record(child / "deployed.json"))
            decided |= {child.name.lower(), *deployed}  # also when it says that no version is in use
        elif _is_whole(child):
            name, number = _version(child.name)
            if re.search(r"\.[a-z]+(-\d+)?$", name):  # a copy set aside by the trainer: ...-ansel.replaced-1
                continue
            if re.fullmatch(r"v\d+", child.name.lower()):  # versions of one adapter: folder/v1, folder/v2
                name, number = advisor, int(child.name[1:])
            if number >= newest.get(name, (0,))[0]:
                newest[name] = number, Source(((child, 1.0),), f"v{number}")
        else:
            versions = [p for p in child.iterdir() if re.fullmatch(r"v\d+", p.name.lower()) and _is_whole(p)]
            if versions:
                last = max(versions, key=lambda path: int(path.name[1:]))
                newest[child.name.lower()] = int(last.name[1:]), Source(((last, 1.0),), last.name.lower())
    found = {name: source for name, (_, source) in newest.items() if name not in decided} | deployed
    if not found and not decided:
        raise LoraError(f"{folder}: neither an adapter nor a folder of adapters (no adapter_config.json in it)")
    return found


def _from_record(path: Path) -> dict[str, Source]:
    """Read models/ADVISOR/deployed.json; a record without an adapter (all versions taken back) gives nothing."""
    record = _read_json(path)
    advisor = str(record.get("advisor") or path.resolve().parent.name).lower()
    if not record.get("adapter"):
        return {}
    hashes = record.get("sha256") or {}
    if not isinstance(record["adapter"], str) or not isinstance(hashes, dict):
        raise LoraError(f"{path}: adapter must be a path and sha256 an object")
    root = path.resolve().parent.parent  # versions lie beside the record's folder: models/ADVISOR/deployed.json
    folder = _inside(root, path.resolve().parent / record["adapter"], path)
    return {advisor: Source(((folder, 1.0),), str(record.get("version") or folder.name), tuple(sorted(hashes.items())))}


def _from_config(path: Path) -> tuple[dict[str, Source], str | None]:
    """Read model_config.json ({"models": {name: {"lora_path": ...}}, "active_model": name}) or a deployed.json."""
    config = _read_json(path)
    if "models" not in config and "adapter" in config:
        return _from_record(path), "fine_tuned"
    models, active = config.get("models"), config.get("active_model")
    if isinstance(models, list):
        models = {str(model.get("name")): model for model in models if isinstance(model, dict)}
    if not isinstance(models, dict) or not models:
        raise LoraError(f'{path}: "models" must name at least one model')
    if not isinstance(active, str) or active not in models:
        raise LoraError(f"{path}: active_model {str(active)[:60]!r} is none of {', '.join(map(str, models))[:200]}")
    model = models[active]
    model = model if isinstance(model, dict) else {"lora_path": model}
    lora_path = next((model[key] for key in ("lora_path", "adapter_path", "adapter", "lora") if model.get(key)), None)
    if lora_path is None:
        return {}, "base"
    if not isinstance(lora_path, str):
        raise LoraError(f"{path}: lora_path of {active} must be text")
    here = path.resolve().parent
    root = here.parent if here.name == "config" else here  # config/model_config.json belongs to the folder above
    pieces = []
    for piece in lora_path.split(","):
        advisor, equals, rest = piece.rpartition("=")
        name, weight = _weighted(rest.strip())
        folder = _inside(root, root / name, path)
        pieces.append(f"{advisor}{equals}{folder}" + ("" if weight is None else f":{weight:g}"))
    found = _parse_list(",".join(pieces))
    if isinstance(model.get("advisor"), str) and EVERYONE in found:
        found[model["advisor"].lower()] = found.pop(EVERYONE)
    if model.get("version"):
        found = {
            name: Source(source.parts, str(model["version"])[:60], source.sha256) for name, source in found.items()
        }
    return found, "fine_tuned"


def _inside(root: Path, path: Path, file: Path) -> Path:
    """Return the path with links resolved; LoraError when it leaves the folder that the file may speak for."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise LoraError(f"{file}: {str(path)[:120]!r} is no path ({_one_line(error)})") from error
    if not resolved.is_relative_to(root):
        raise LoraError(f"{file}: {str(path)[:200]} lies outside {root}; adapters elsewhere need --lora_path")
    return resolved


# -- switching: one base in memory, the adapter chosen per request -----------------------------------------------------


class _Use:
    """One generation with an adapter; ``happened`` tells whether the adapter really took part in it."""

    def __init__(self, adapter: Adapter):
        self.layers, self.happened = adapter.layers, False


_active = contextvars.ContextVar("lora_patch_active", default=None)  # a _Use, or None: the base
_UNSET = object()


@functools.cache
def _switched(kind: type) -> type:
    """Return the class of a linear layer that adds the active adapter's update: scale * ((x A) B), as mlx-vlm does."""

    def forward(self, x):
        y = kind.__call__(self, x)
        use = _active.get()
        if use is None:
            return y
        update = use.layers.get(self._lora_module)
        if update is None:
            return y
        use.happened = True
        a, b, scale = update
        return y + (scale * ((x @ a) @ b)).astype(x.dtype)

    return type(f"Switched{kind.__name__}", (kind,), {"__call__": forward, "switched_from": kind})


def _in_and_out(linear) -> tuple[int, int]:
    outputs, inputs = linear.weight.shape
    bits = getattr(linear, "bits", None)  # a quantized layer packs 32 / bits weights into a number
    return (inputs * 32 // bits if bits else inputs), outputs


def make_switchable(model, adapter: Adapter) -> None:
    """Let the adapter be switched on in ``model``; LoraError, naming all, when a matrix does not fit its layer.

    A layer keeps its weights, its name and its place in the model; only its class changes, so that without an active
    adapter it computes exactly what it did before, and no memory is taken.
    """
    import mlx.nn as nn

    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    check_shapes(adapter, {name: _in_and_out(module) for name, module in modules.items()})
    for name in adapter.layers:
        module = modules[name]
        if not hasattr(type(module), "switched_from"):
            object.__setattr__(module, "_lora_module", name)
            module.__class__ = _switched(type(module))


# -- arms -------------------------------------------------------------------------------------------------------------


def assign(job_id: str, split: float) -> str:
    """Return base or fine_tuned: the same job always gets the same; a share ``split`` of all jobs gets fine_tuned."""
    number = int.from_bytes(hashlib.sha256(f"mondrian-ab-test:{job_id}".encode()).digest()[:8], "big")
    return "fine_tuned" if number / 2**64 < split else "base"


class Breaker:
    """Takes an adapter out of service when too many of its last answers were bad, until somebody re-arms it.

    It goes off as soon as the bad answers exceed ``bound`` of a whole window: it does not wait for the window to fill.
    """

    def __init__(self, window: int, bound: float):
        self.window, self.bound = window, bound
        self.arm()

    def arm(self) -> None:
        self.answers, self.since, self.reason = deque(maxlen=self.window), None, None

    def note(self, problem: str | None) -> bool:
        """Count an answer; return True when this one sets the breaker off."""
        self.answers.append(problem is not None)
        if self.since is None and sum(self.answers) > self.bound * self.window:
            self.since, self.reason = time.strftime("%Y-%m-%dT%H:%M:%S"), problem
            return True
        return False

    def state(self) -> dict:
        return {
            "state": "closed" if self.since is None else "open",
            "bad": sum(self.answers),
            "answers": len(self.answers),
            "since": self.since,
            "reason": self.reason,
        }


def analysis_problem(text: str | None, prompt: str = "") -> str | None:
    """Say what is wrong with an answer, or None: it must parse as the analysis that the prompt asks for.

    Text around the object and a code fence are let pass, as the service does. A prompt that asks for no analysis
    (no dimensions, no feedback cards) is content with any text.
    """
    if text is None or not text.strip():
        return "no answer"
    if prompt and demands_html(prompt):
        return None if re.search(r"dimension-score[^>]*>\s*\(?\d", text) else "no scored feedback card"
    if prompt and not re.search(r"dimensions|dimensional_analysis", prompt):
        return None
    analysis = parse_analysis(text)
    if analysis is None:
        return "no JSON object"
    return None if _scores(analysis) else "no scored dimensions"


def parse_analysis(text: str) -> dict | None:
    """Return the JSON object in an answer, or None."""
    text = re.sub(r"<(think|thought|thinking)>.*?</\1>", "", text, flags=re.S)
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return None
    decoder = json.JSONDecoder(parse_constant=lambda name: float("nan"))
    try:
        found, _ = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _scores(analysis: dict) -> list[float]:
    """Return the dimensions' scores of either shape of analysis; [] unless every dimension has one from 0 to 10."""
    dimensions = analysis.get("dimensions") or analysis.get("dimensional_analysis")
    dimensions = list(dimensions.values()) if isinstance(dimensions, dict) else dimensions
    if not isinstance(dimensions, list) or not dimensions:
        return []
    scores = [_score(one.get("score")) if isinstance(one, dict) else None for one in dimensions]
    return scores if None not in scores else []


def _score(value) -> float | None:
    """Return 8.1 for 8.1, "8.1" and "8.1/10"; None for what is no score from 0 to 10."""
    match = re.match(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*$", str(value)) if not isinstance(value, bool) else None
    return float(match[1]) if match and float(match[1]) <= 10 else None


# -- the service: what its inserted lines call -------------------------------------------------------------------------


@dataclass
class Job:
    """One request on its way through the service."""

    id: str | None
    advisor: str | None
    arm: str  # base or fine_tuned
    adapter: Adapter | None  # the advisor's, also when the arm is base
    in_test: bool = False
    version: str | None = None
    seconds: float = 0.0
    fallback: bool = False
    done: bool = False

    @property
    def model_used(self) -> str:
        return f"ab_test_{self.arm}" if self.in_test else self.arm


@dataclass
class _Scope:
    """A request: the jobs chosen in it (more than one when several advisors judge one photograph)."""

    jobs: list = field(default_factory=list)
    is_open: bool = True


_scope = contextvars.ContextVar("lora_patch_scope", default=None)
_job = contextvars.ContextVar("lora_patch_job", default=None)
_within = contextvars.ContextVar("lora_patch_within", default=False)

PHOTO_NAMES = (
    "image_path",
    "image",
    "img_path",
    "photo_path",
    "image_file",
    "images",
    "photo",
    "file_path",
    "filepath",
)
PROMPT_NAMES = ("full_prompt", "prompt", "formatted_prompt", "text")


class Service:
    """The state of a service process with adapters; without our flags it stays unused."""

    def __init__(self):
        self.generating = threading.Lock()  # mlx-vlm keeps state in the model: one generation at a time
        self.starting, self.reloading = threading.RLock(), threading.Lock()
        self.writing = threading.Lock()
        self.table: dict[str, Adapter] = {}
        self.mode, self.split, self.problem = "base", DEFAULTS["ab_test_split"], None
        self.asked: str | None = None  # the mode that /lora/reload was given
        self.model = self.base_name = self.base = None
        self.started, self.warned = False, set()
        self.refusal: LoraError | None = None
        self.jobs_db, self.recording = None, "not started"
        self.pending: deque = deque(maxlen=1000)  # [value of each of COLUMNS, job id, tries]
        self.not_before, self.later = 0.0, None
        self.counts, self.prompts = Counter(), Counter()

    @property
    def is_on(self) -> bool:
        return bool(flags["lora_path"] or flags["model_config"] or flags["use_fine_tuned"]) or (
            flags["model_mode"] not in (None, "base")
        )

    # starting

    def load(self) -> None:
        """Read everything that the flags name; fills table, mode and problem. LoraError in the way of fine_tuned."""
        # without --model_mode the configuration decides; until it is read, take it for the stricter
        self.mode = self.wanted_mode("fine_tuned" if flags["model_config"] else None)
        self.split, self.problem = flags["ab_test_split"], None
        try:
            if flags["use_fine_tuned"] and flags["model_mode"] not in (None, "fine_tuned"):
                self.mode = "fine_tuned"
                raise LoraError(f"--use_fine_tuned and --model_mode {flags['model_mode']} contradict each other")
            if self.mode != "base" and not flags["lora_path"] and not flags["model_config"]:
                raise LoraError(f"--model_mode {self.mode} needs --lora_path or --model_config")
            sources, implied = find_sources(flags["lora_path"], flags["model_config"])
            self.mode = self.wanted_mode(implied)
            self.table = {} if self.mode == "base" else self.read(sources)
            if self.mode != "base" and not sources:
                say(logging.WARNING, "no adapter is deployed: the base answers everything")
        except LoraError as error:
            self.fail(error)

    def wanted_mode(self, implied: str | None) -> str:
        return flags["model_mode"] or ("fine_tuned" if flags["use_fine_tuned"] else implied or "base")

    def read(self, sources: dict[str, Source]) -> dict[str, Adapter]:
        """Return the adapters, those that are in use already taken over as they are; LoraError names all that fail."""
        loaded, table, problems = {adapter.digest: adapter for adapter in self.table.values()}, {}, []
        for advisor, source in sources.items():
            try:
                adapter = read_adapter(source)
                known = loaded.get(adapter.digest)
                if known and (known.version, known.path) == (adapter.version, adapter.path):
                    adapter = known
                if adapter.breaker is None:
                    adapter.breaker = Breaker(flags["breaker_window"], flags["breaker_bound"])
                table[advisor] = adapter
            except LoraError as error:
                problems.append(str(error))
        if problems:
            raise LoraError(_first_of(problems))
        return table

    def fail(self, error: LoraError) -> None:
        """Refuse in fine_tuned mode; serve the base, and say so, in the others."""
        if self.mode == "fine_tuned":
            self.refusal = error
            raise error
        self.table, self.problem = {}, str(error)
        say(logging.ERROR, f"THE ADAPTER IS NOT IN USE, the base answers everything: {error}")

    def adopt(self, model, name: str | None) -> None:
        """Take over the model that the service has just loaded and prepare it for the adapters."""
        self.begin()
        self.model = model
        self.base_name = name or self.base_name
        try:
            self.fit(self.table)
        except LoraError as error:
            self.fail(error)

    def begin(self) -> None:
        """Load once; a thread of the service's that loads the model early may come before `start`, or beside it."""
        with self.starting:
            if self.refusal is not None:
                raise self.refusal
            if not self.started:
                self.started = True
                self.base_name = getattr(parsed, "mlx_model", None)
                self.load()

    def fit(self, table: dict[str, Adapter]) -> None:
        """Check adapters against the served model's files and, once it is loaded, its layers."""
        if not table:
            return
        if self.base_name and (self.base is None or self.base.fingerprint["name"] != str(self.base_name)):
            self.base = read_base(str(self.base_name))
        for adapter in set_of(table):
            for warning in check_base(adapter, self.base):
                if warning not in self.warned:
                    say(logging.WARNING, warning)
                self.warned.add(warning)
            if self.model is not None:
                make_switchable(self.model, adapter)

    def reload(self, mode: str | None = None, split: float | None = None) -> dict:
        """Read the sources again and swap what has changed; requests on their way keep the adapter they began with."""
        with self.reloading:
            before = {advisor: adapter.version for advisor, adapter in self.table.items()}
            sources, implied = find_sources(flags["lora_path"], flags["model_config"])
            asked = mode or self.asked  # what was asked for by hand holds until it is asked for otherwise
            mode = asked or self.wanted_mode(implied)
            table = {} if mode == "base" else self.read(sources)
            self.fit(table)
            self.table, self.mode, self.problem, self.refusal, self.asked = table, mode, None, None, asked
            self.split = self.split if split is None else split
        after = {advisor: adapter.version for advisor, adapter in table.items()}
        say(logging.INFO, f"reloaded: {mode}, {after or 'no adapter'} (before: {before or 'no adapter'})")
        return {"status": "reloaded", "model_mode": mode, "adapters": after, "before": before}

    # a request

    def choose(self, job_id: str | None, advisor: str | None, override: str | None) -> Job:
        if isinstance(advisor, dict):
            advisor = advisor.get("id")
        elif isinstance(advisor, list | tuple) and len(advisor) == 1:
            advisor = advisor[0]
        advisor = str(advisor).strip().lower() if advisor else None
        adapter = self.table.get(advisor) or self.table.get(EVERYONE)
        job = Job(str(job_id) if job_id else None, advisor, "base", adapter)
        if adapter is not None and self.mode != "base":
            if override in ("base", "fine_tuned") and flags["allow_arm_override"]:
                job.arm = override
            elif self.mode == "fine_tuned":
                job.arm = "fine_tuned"
            else:
                job.in_test = True
                job.arm = assign(job.id or uuid.uuid4().hex, self.split)
        scope = _scope.get()
        if scope is not None:
            scope.jobs.append(job)
        return job

    def current_job(self) -> Job:
        """Return the job that `choose` was called for; without such a call, one made from the request's own fields."""
        if (job := _job.get()) is not None:
            return job
        fields = _request_fields()
        return self.choose(fields.get("job_id"), fields.get("advisor"), fields.get("override"))

    def generate(self, function, args: tuple, kwargs: dict, job: Job | None = None):
        """Run mlx_vlm.generate, or a function that returns an answer, in the job's arm; see `generation`."""
        job = job or self.current_job()
        call = _Call(function, args, kwargs)
        with self.generating:
            use_adapter = self.settle(job)
            begun = time.perf_counter()
            try:
                with _prepared(call, job.adapter.max_image_size if use_adapter or job.in_test else None):
                    if not use_adapter:
                        return self.run(call, None)[0]
                    result, problem, error = self.attempt(call, job.adapter)
                    self.judge(job, problem, time.perf_counter() - begun)
                    if problem is None or not flags["fallback_on_invalid"]:
                        if error is not None:
                            raise error
                        return result
                    say(logging.WARNING, f"job {job.id!r}: {job.version} gave {problem}; the base answers instead")
                    job.fallback = True
                    if job.in_test:  # the arms of a test see the same photograph
                        return self.run(call, None)[0]
                return self.run(call, None)[0]
            finally:
                job.seconds += time.perf_counter() - begun
                self.finish(job, call.prompt)

    def stream(self, function, args: tuple, kwargs: dict):
        """The same for one that yields its answer. With a retry on the base in prospect, nothing of the adapter's is
        passed on before it has been found good: what has been sent cannot be taken back."""
        job = self.current_job()
        if job.arm == "fine_tuned" and flags["fallback_on_invalid"]:
            whole = functools.wraps(function)(lambda *positional, **named: list(function(*positional, **named)))
            yield from self.generate(whole, args, kwargs, job)
            return
        call = _Call(function, args, kwargs)
        with self.generating:
            use_adapter = self.settle(job)
            begun, pieces, error, ended = time.perf_counter(), [], None, False
            use = _Use(job.adapter) if use_adapter else None
            try:
                with _prepared(call, job.adapter.max_image_size if use_adapter or job.in_test else None):
                    steps = function(*call.args, **call.kwargs)
                    while True:
                        with _switched_on(use):  # set anew for each piece: between them this is the caller's context
                            try:
                                piece = next(steps)
                            except StopIteration:
                                ended = True
                                break
                        pieces.append(piece)
                        yield piece
            except Exception as problem:
                error, ended = _one_line(problem), True
                raise
            finally:
                if use_adapter and ended:  # a reader who turned away says nothing about the answer
                    self.judge(job, error or self.problem_of(pieces, use.happened, call), time.perf_counter() - begun)
                job.seconds += time.perf_counter() - begun
                self.finish(job, call.prompt)

    def settle(self, job: Job) -> bool:
        """Decide, with the model in hand, whether the adapter is used: its breaker may have gone off in the queue."""
        if job.arm != "fine_tuned" or job.adapter is None:
            return False
        if job.adapter.breaker.since is not None:
            job.arm, job.in_test = "base", False  # an answer of the base, but no part of the test
            return False
        job.version = job.adapter.version
        return True

    def attempt(self, call: _Call, adapter: Adapter):
        """Return (result, problem, exception) of an answer with the adapter."""
        try:
            result, happened = self.run(call, adapter)
        except Exception as error:  # whatever the adapter led to, the base may do better
            return None, _one_line(error), error
        return result, self.problem_of(result, happened, call), None

    def problem_of(self, result, happened: bool, call: _Call) -> str | None:
        if not happened:
            return "no use of the adapter (is the model loaded through lora_patch.attach?)"
        text = _text(result)
        unknown = text is None and result is not None  # a result of a kind that we cannot look into
        return None if unknown else analysis_problem(text, call.prompt)

    def run(self, call: _Call, adapter: Adapter | None):
        use = _Use(adapter) if adapter else None
        call.rewind()
        with _switched_on(use):
            result = call.function(*call.args, **call.kwargs)
        return result, bool(use and use.happened)

    def judge(self, job: Job, problem: str | None, seconds: float) -> None:
        limit = flags["breaker_time_limit"] or getattr(parsed, "model_timeout", None)
        if problem is None and limit and seconds > float(limit):
            problem = f"an answer after {seconds:.0f} s, more than {float(limit):g} s"
        if problem is not None:
            self.counts["invalid"] += 1
        if job.adapter.breaker.note(problem):
            say(logging.ERROR, f"CIRCUIT BREAKER: {job.adapter.path} ({job.version}) gave too many bad answers, "
                f"the last one: {problem}; the base answers until POST /lora/rearm or a reload")  # fmt: skip

    def finish(self, job: Job, prompt: str) -> None:
        if not job.done:
            self.counts[job.model_used] += 1
        if job.fallback:
            self.counts["fallback"] += 1
        job.done = True
        if job.adapter is not None:
            self.prompts[self.compare_prompt(prompt, job.advisor)] += 1
        scope = _scope.get()
        if scope is None or not scope.is_open:
            self.record(job)

    def compare_prompt(self, prompt: str, advisor: str | None) -> str:
        """Say whether the service's prompt is the one that training builds from this database: as_trained or other."""
        if self.jobs_db is None or not prompt or advisor is None:
            return "unknown"
        try:
            with contextlib.closing(_connect(self.jobs_db, "ro")) as db:
                system = db.execute("SELECT CAST(value AS TEXT) FROM config WHERE key = 'system_prompt'").fetchone()
                own = db.execute("SELECT CAST(prompt AS TEXT) FROM advisors WHERE id = ?", (advisor,)).fetchone()
        except (sqlite3.Error, LoraError):
            return "unknown"
        if not system or not own or not system[0] or not own[0]:
            return "unknown"
        return "as_trained" if build_prompt(system[0], advisor, own[0]) in prompt else "other"

    # the jobs table

    def record(self, job: Job) -> None:
        if self.recording == "on" and job.id is not None:
            self.pending.append([job.model_used, job.version, round(job.seconds, 3), int(job.fallback), job.id, 0])
            self.write_pending()

    def write_pending(self) -> None:
        """Write what is to be recorded; what cannot be written now (busy, or no such job yet) is tried again later."""
        with self.writing:
            if not self.pending or time.monotonic() < self.not_before:
                return
            try:
                with contextlib.closing(_connect(self.jobs_db, "rw")) as db:
                    key = _columns(db)[0]
                    assignments = ", ".join(f"{column} = ?" for column in COLUMNS)
                    for _ in range(len(self.pending)):
                        *values, tries = self.pending[0]
                        changed = db.execute(f"UPDATE jobs SET {assignments} WHERE {key} = ?", values).rowcount
                        self.pending.popleft()
                        if not changed and tries < 20:
                            self.pending.append([*values, tries + 1])
                        elif not changed:
                            self.counts["unrecorded"] += 1
            except (sqlite3.Error, LoraError) as error:
                self.not_before = time.monotonic() + 2  # the next requests do not wait for it one after another
                waiting = f"{len(self.pending)} job(s) wait to be recorded"
                say(logging.WARNING, f"{self.jobs_db}: {waiting} ({_one_line(error)})")
            if self.pending and not (self.later and self.later.is_alive()):
                self.later = threading.Timer(2.1, self.write_later)
                self.later.daemon = True
                self.later.start()

    def write_later(self) -> None:
        self.later = None
        self.write_pending()

    def open_jobs(self, path: str | os.PathLike | None) -> None:
        """Find the database and add the columns; what stands in the way is said, and the service runs without."""
        path = flags["jobs_db"] or path or "mondrian.db"
        self.jobs_db = Path(path).absolute()
        try:
            added = migrate(self.jobs_db)
            self.recording = "on"
            if added:
                say(logging.INFO, f"{self.jobs_db}: added {', '.join(added)} to the jobs table")
        except (sqlite3.Error, LoraError) as error:
            self.recording = f"off: {_one_line(error)}"
            say(logging.WARNING, f"{self.jobs_db}: the arms are not recorded ({_one_line(error)}); see --jobs_db")

    # what /health says

    def health(self) -> dict:
        adapters = {
            advisor: {
                "path": adapter.path,
                "version": adapter.version,
                "rank": adapter.ranks[0] if len(adapter.ranks) == 1 else adapter.ranks,
                "megabytes": round(adapter.nbytes / 1e6, 1),
                "trained_on": (adapter.trained_on or {}).get("name"),
                "breaker": adapter.breaker.state(),
            }
            for advisor, adapter in self.table.items()
        }
        first = next(iter(adapters.values()), {})
        arms = {name: self.counts[name] for name in ("base", "fine_tuned", "ab_test_base", "ab_test_fine_tuned")}
        return {
            "model_mode": self.mode,
            "ab_test_split": self.split,
            "problem": self.problem,
            "adapter_path": first.get("path") if len(adapters) == 1 else flags["lora_path"] or flags["model_config"],
            "version": first.get("version") if len(adapters) == 1 else None,
            "rank": first.get("rank") if len(adapters) == 1 else None,
            "base_fingerprint": self.base and self.base.fingerprint,
            "adapters": adapters,
            "breaker": "open" if any(a["breaker"]["state"] == "open" for a in adapters.values()) else "closed",
            "arms": arms,
            "invalid": self.counts["invalid"],
            "fallbacks": self.counts["fallback"],
            "prompts": dict(self.prompts),
            "recording": self.recording,
            "unrecorded": self.counts["unrecorded"] + len(self.pending),
        }


def set_of(table: dict[str, Adapter]) -> list[Adapter]:
    """Return each adapter of a table once."""
    return list({id(adapter): adapter for adapter in table.values()}.values())


class _switched_on:
    """Within it, the model answers with a `_Use`, or as the base (None)."""

    def __init__(self, use: _Use | None):
        self.use = use

    def __enter__(self):
        self.tokens = _active.set(self.use), _within.set(True)

    def __exit__(self, *exception):
        _active.reset(self.tokens[0])
        _within.reset(self.tokens[1])


class _Call:
    """A call of a generating function of the service: where its photograph and its prompt are among the arguments."""

    def __init__(self, function, args: tuple, kwargs: dict):
        self.function, self.args, self.kwargs = function, list(args), dict(kwargs)
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            names = []
        at = dict(zip(names, range(len(self.args)), strict=False))
        self.photo = next((name for name in PHOTO_NAMES if name in self.kwargs or name in at), None)
        self.photo_at = at.get(self.photo)
        named = next((name for name in PROMPT_NAMES if name in self.kwargs or name in at), None)
        prompt = self.kwargs.get(named) if named in self.kwargs else self.args[at[named]] if named else ""
        self.prompt = prompt if isinstance(prompt, str) else ""

    def _photo(self, value=_UNSET):
        place = self.kwargs if self.photo in self.kwargs else self.args
        key = self.photo if place is self.kwargs else self.photo_at
        if value is not _UNSET:
            place[key] = value
        return place[key]

    def rewind(self) -> None:
        """Let a second attempt read an open file from its start again."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, io.BytesIO):
                value.seek(0)


class _prepared:
    """Within it, the photograph among a call's arguments is the one that training would see (None: as it came)."""

    def __init__(self, call: _Call, max_image_size: int | None):
        self.call, self.size, self.files = call, max_image_size, []

    def __enter__(self):
        if self.size is None or self.call.photo is None:
            self.before = _UNSET
            return
        self.before = self.call._photo()
        try:
            self.call._photo(self.prepare(self.before))
        except PhotoError as error:
            say(logging.WARNING, f"left as it is: {error}")  # the service has its own answer to such a file

    def __exit__(self, *exception):
        if self.before is not _UNSET:
            self.call._photo(self.before)
        for path in self.files:
            Path(path).unlink(missing_ok=True)

    def prepare(self, photo):
        """Return the photograph as training sees it, in the form in which it came: path, bytes, file, picture, list."""
        global Image, ImageOps
        from PIL import Image, ImageOps

        if isinstance(photo, list | tuple):
            return type(photo)(self.prepare(one) for one in photo)
        if isinstance(photo, Image.Image):
            return _bounded(_rgb(ImageOps.exif_transpose(photo)), self.size)
        if isinstance(photo, str | os.PathLike) and os.path.isfile(photo):
            picture = load_photo(photo, self.size)
            handle, path = tempfile.mkstemp(suffix=".png", prefix="lora_patch_")
            self.files.append(path)
            with open(handle, "wb") as file:
                picture.save(file, "PNG", compress_level=1)
            return type(photo)(path) if isinstance(photo, str) else Path(path)
        if isinstance(photo, bytes | io.BytesIO):
            raw = io.BytesIO(photo) if isinstance(photo, bytes) else photo
            raw.seek(0)
            out = io.BytesIO()
            load_photo(raw, self.size).save(out, "PNG", compress_level=1)
            out.seek(0)
            return out.getvalue() if isinstance(photo, bytes) else out
        return photo


def _text(result) -> str | None:
    """Return the answer's text in what a generating function returns: text, mlx-vlm's result, a tuple or a dict."""
    if isinstance(result, str):
        return result
    if isinstance(getattr(result, "text", None), str):
        return result.text
    if isinstance(result, list):  # the pieces of a stream
        pieces = [_text(piece) for piece in result]
        return None if None in pieces else "".join(pieces)
    if isinstance(result, tuple) and result:
        return _text(result[0])
    if isinstance(result, dict):
        keys = ("response", "text", "output", "analysis", "content", "result")
        return next((result[key] for key in keys if isinstance(result.get(key), str)), None)
    return None


def _request_fields() -> dict:
    """Return advisor, job id and override as they stand in the Flask request that is being answered, if any."""
    flask = sys.modules.get("flask")
    if flask is None or not flask.has_request_context():
        return {}
    request = flask.request
    sources = [request.values, request.view_args or {}]
    if request.is_json and isinstance(request.get_json(silent=True), dict):
        sources.append(request.get_json(silent=True))

    def first(*names):
        return next((source[name] for name in names for source in sources if source.get(name)), None)

    return {
        "advisor": first("advisor", "advisor_id", "advisors"),
        "job_id": first("job_id", "jobId", "jobid", "id") or request.headers.get("X-Job-ID"),
        "override": request.headers.get("X-Lora-Arm") or first("lora_arm"),
    }


def say(level: int, message: str) -> None:
    """Log, or print where the service has no logging set up: a refusal must not get lost."""
    if logging.getLogger().handlers or log.handlers:
        log.log(level, message)
    else:
        print(f"lora_patch: {message}", file=sys.stderr, flush=True)


_service = Service()


def attach(loaded, name: str | os.PathLike | None = None):
    """Prepare what mlx_vlm.load(name) returned, (model, processor, ...), for the adapters; returns it."""
    if _service.is_on:
        try:
            _service.adopt(loaded[0], name)
        except LoraError as error:
            if threading.current_thread() is threading.main_thread():
                sys.exit(f"lora_patch: {error}")
            raise
    return loaded


def generation(function):
    """Return mlx_vlm.generate or stream_generate such that it answers in the arm of the request that it works for.

    To be put around the function where it is called, so that it is our lock that is taken last and released first,
    whatever locks the service has. It also decorates a function of the service's own that returns an answer.
    """

    @functools.wraps(function)
    def answer(*args, **kwargs):
        if not _service.is_on or _within.get():
            return function(*args, **kwargs)
        if inspect.isgeneratorfunction(inspect.unwrap(function)):
            return _service.stream(function, args, kwargs)
        return _service.generate(function, args, kwargs)

    return answer


def choose(job_id=None, advisor=None) -> None:
    """Say, before the model is asked, which job this is and whose voice it wants: that decides its arm."""
    if _service.is_on:
        fields = _request_fields()
        job = _service.choose(job_id or fields.get("job_id"), advisor or fields.get("advisor"), fields.get("override"))
        _job.set(job)


def carry(function):
    """Return the function as something that another thread can run for the same request."""
    if not _service.is_on:
        return function
    context = contextvars.copy_context()

    @functools.wraps(function)
    def carried(*args, **kwargs):
        def call():
            try:
                return function(*args, **kwargs)
            finally:
                _record_done(_scope.get())

        return context.copy().run(call)

    return carried


def start(app, get_model=None, db_path=None):
    """Begin serving adapters: read and check them, load the model, migrate the jobs table, add the routes. Returns app.

    Exits with one line when fine_tuned cannot be served. Without our flags it does nothing.
    """
    if not _service.is_on or getattr(app, "_lora_patch", False):
        return app
    app._lora_patch = True
    try:
        _service.begin()
        _service.fit(_service.table)  # before the model is loaded: a refusal need not wait for gigabytes
        if _service.table and _service.model is None and get_model is not None:
            try:
                get_model()
            except LoraError:
                raise
            except Exception as error:  # the service would say so with its first request
                raise LoraError(f"{_service.base_name}: cannot be loaded ({_one_line(error)})") from error
        _service.begin()  # raises what a thread of the service's may have met, and swallowed
    except LoraError as error:
        if _service.mode == "fine_tuned":
            sys.exit(f"lora_patch: {error}")
        _service.fail(error)
    _service.open_jobs(db_path)
    app.before_request(_before_request)
    app.after_request(_after_request)
    app.add_url_rule("/lora/reload", "lora_reload", _route_reload, methods=["POST"])
    app.add_url_rule("/lora/rearm", "lora_rearm", _route_rearm, methods=["POST"])
    for advisor, adapter in _service.table.items():
        who = "every advisor" if advisor == EVERYONE else advisor
        ranks = ", ".join(map(str, adapter.ranks))
        say(logging.INFO, f"{who}: {adapter.path} ({adapter.version}, rank {ranks}, {adapter.nbytes / 1e6:.1f} MB)")
    split = f", split {_service.split:g}" if _service.mode == "ab_test" else ""
    say(logging.INFO, f"model mode {_service.mode}{split}")
    return app


def _record_done(scope: _Scope | None) -> None:
    """Write the finished jobs of a request; again at its end, since the service may have written the row anew."""
    for job in scope.jobs if scope is not None else ():
        if job.done:
            _service.record(job)


def _before_request():
    _scope.set(_Scope())
    _job.set(None)


def _after_request(response):
    flask = sys.modules["flask"]
    scope = _scope.get()
    if scope is not None:
        scope.is_open = False
        _record_done(scope)
        if response.is_streamed:
            response.call_on_close(functools.partial(_record_done, scope))
        if scope.jobs:
            job = scope.jobs[-1]
            response.headers["X-Model-Used"] = job.model_used
            if job.arm == "fine_tuned" and job.adapter is not None:
                response.headers["X-Adapter-Version"] = job.adapter.version
            if job.fallback:
                response.headers["X-Model-Fallback"] = "base"
    if flask.request.path.rstrip("/") == "/health" and response.is_json:
        content = response.get_json(silent=True)
        if isinstance(content, dict):
            content.setdefault("model_mode", _service.mode)
            content["lora"] = _service.health()
            response.set_data(json.dumps(content))
    return response


def _refused():
    """Return a 403 unless the request comes straight from this machine, and not from a web page in its browser."""
    flask = sys.modules["flask"]
    address = (flask.request.remote_addr or "").removeprefix("::ffff:")
    forwarded = any(name in flask.request.headers for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Origin"))
    if forwarded or not (address == "::1" or address.startswith("127.")):
        return flask.jsonify(error="only from the machine that the service runs on"), 403
    return None


def _route_reload():
    flask = sys.modules["flask"]
    if refused := _refused():
        return refused
    asked = flask.request.get_json(silent=True)
    asked = asked if isinstance(asked, dict) else flask.request.values
    mode, split = asked.get("model_mode"), asked.get("ab_test_split")
    try:
        if mode is not None and mode not in MODES:
            raise LoraError(f"model_mode {str(mode)[:40]!r} is none of {', '.join(MODES)}")
        split = None if split is None else _share(str(split))
        return flask.jsonify(_service.reload(mode, split))
    except (ValueError, OSError, MemoryError, argparse.ArgumentTypeError) as error:
        say(logging.ERROR, f"reload refused, everything stays as it is: {_one_line(error)}")
        return flask.jsonify(status="refused", error=_one_line(error), model_mode=_service.mode), 409


def _route_rearm():
    if refused := _refused():
        return refused
    for adapter in set_of(_service.table):
        adapter.breaker.arm()
    say(logging.INFO, "circuit breakers armed again")
    return sys.modules["flask"].jsonify(status="armed", adapters=list(_service.table))


# -- the jobs table ---------------------------------------------------------------------------------------------------


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open an existing database, ro or rw; a service that writes to it is waited for up to 5 seconds."""
    if not Path(path).is_file():
        raise LoraError(f"{path}: no such database")
    return sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode={mode}", uri=True, timeout=5, isolation_level=None)


def _columns(db: sqlite3.Connection) -> tuple[str, set[str]]:
    """Return the jobs table's key column and all its columns."""
    names = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
    if not names:
        raise LoraError("no jobs table")
    key = next((name for name in ("id", "job_id") if name in names), None)
    if key is None:
        raise LoraError("the jobs table has neither id nor job_id")
    return key, set(names)


def _lock(db: sqlite3.Connection, seconds: float = 30) -> None:
    """Begin to write. SQLite's own waiting sleeps too long to get a turn beside a service that writes all the time."""
    end = time.monotonic() + seconds
    db.execute("PRAGMA busy_timeout = 0")
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.002)


def migrate(path: Path) -> list[str]:
    """Add the columns that the jobs table lacks; returns them. All or none, once only, beside a running service."""
    with contextlib.closing(_connect(path, "rw")) as db:
        if set(COLUMNS) <= _columns(db)[1]:
            return []
        _lock(db)
        missing = [name for name in COLUMNS if name not in _columns(db)[1]]  # looked up again, now under the lock
        for name in missing:
            db.execute(f"ALTER TABLE jobs ADD COLUMN {name} {COLUMNS[name]}")
        db.execute("COMMIT")
        return missing


# -- report -----------------------------------------------------------------------------------------------------------

ARMS = ("base", "fine_tuned", "ab_test_base", "ab_test_fine_tuned")


def read_jobs(path: Path, days: float) -> list[dict]:
    """Return the finished jobs of the last ``days`` (0: all): arm, score, valid, seconds; both eras of the table."""
    try:
        db = _connect(path, "ro")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error:  # a WAL database in a folder that cannot be written
        db = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    with contextlib.closing(db):
        try:
            key, names = _columns(db)
        except sqlite3.Error as error:
            raise LoraError(f"{path}: not a readable database ({_one_line(error)})") from error
        except LoraError as error:
            raise LoraError(f"{path}: {error}") from error
        wanted = (key, "status", "mode", "created_at", "started_at", "completed_at", "last_activity", "prompt",
                  "llm_prompt", "analysis_markdown", "llm_outputs", "advisor", *COLUMNS)  # fmt: skip
        columns = ", ".join(
            f"CAST({name} AS BLOB) AS {name}" if name in names else f"NULL AS {name}" for name in wanted
        )
        since = time.time() - days * 86400 if days else 0
        jobs = []
        for row in db.execute(f"SELECT {columns} FROM jobs"):
            raw = dict(
                zip(wanted, (None if v is None else bytes(v).decode("utf-8", "replace") for v in row), strict=True)
            )
            if (raw["status"] or "done") in ("done", "completed") and (not since or (_when(raw) or 0) >= since):
                jobs.append(_job_row(raw))
    return jobs


def _when(raw: dict) -> float | None:
    """Return a row's time as seconds since 1970 (UTC where the text names no zone)."""
    from datetime import datetime, timedelta, timezone

    for name in ("completed_at", "created_at", "last_activity"):
        try:
            at = datetime.fromisoformat((raw[name] or "").replace("Z", "+00:00"))
            return (at if at.tzinfo else at.replace(tzinfo=timezone(timedelta(0)))).timestamp()
        except ValueError:
            continue
    return None


def _job_row(raw: dict) -> dict:
    """Return what the report needs of a job; a row without recorded arm is judged by its mode."""
    recorded = raw["model_used"] in ARMS
    arm = raw["model_used"] if recorded else {"lora": "fine_tuned", "baseline": "base"}.get(raw["mode"] or "baseline")
    fell_back = raw["model_fallback"] == "1"
    valid, score = _judged(raw)
    seconds = float(raw["model_duration"]) if raw["model_duration"] else None
    return {
        "arm": arm or raw["mode"],
        "recorded": recorded,
        "version": raw["adapter_version"],
        # a fallback is a failure of its arm; the score that the user saw is the base's and counts for neither
        "valid": valid and not fell_back,
        "score": None if fell_back else score,
        "fallback": fell_back,
        "seconds": seconds,
    }


def _judged(raw: dict) -> tuple[bool, float | None]:
    """Return (valid, overall score) of a row's answer: JSON, JSON under a heading, or the older HTML."""
    texts = [raw["analysis_markdown"] or ""]
    try:
        outputs = json.loads(raw["llm_outputs"] or "{}")
        if isinstance(outputs, dict):
            own = outputs.get("response") or outputs.get(raw["advisor"] or "")
            texts.insert(0, own if isinstance(own, str) else "")
    except (ValueError, RecursionError):
        pass
    for text in texts:
        analysis = parse_analysis(text)
        if analysis is not None and _scores(analysis):
            given = analysis.get("overall_score", analysis.get("overall_grade"))
            return True, _score(given)
        if "dimension-score" in text:
            grade = re.search(r"overall-grade[^>]*>\s*(?:<strong>)?\s*(\d+(?:\.\d+)?)\s*/\s*10", text)
            return True, _score(grade[1]) if grade else None
    return False, None


def make_report(jobs: list[dict], days: float) -> dict:
    """Return the figures per arm, the difference of the arms of the test with 95% intervals, and a plain sentence."""
    import statistics

    names = [*ARMS, *sorted({job["arm"] for job in jobs} - set(ARMS))]
    arms = {}
    for name in names:
        own = [job for job in jobs if job["arm"] == name]
        if not own:
            continue
        scores = [job["score"] for job in own if job["score"] is not None]
        seconds = sorted(job["seconds"] for job in own if job["seconds"] is not None)
        arms[name] = {
            "count": len(own),
            "versions": sorted({job["version"] for job in own if job["version"]}),
            "scored": len(scores),
            "average_score": statistics.fmean(scores) if scores else None,
            "one_score": scores[0] if len(scores) >= 5 and len(set(scores)) == 1 else None,  # does not judge at all
            "valid": sum(job["valid"] for job in own),
            "valid_rate": sum(job["valid"] for job in own) / len(own),
            "fallbacks": sum(job["fallback"] for job in own),
            "timed": len(seconds),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "p95_seconds": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
        }
    pair = next(
        (p for p in (("ab_test_base", "ab_test_fine_tuned"), ("base", "fine_tuned")) if set(p) <= set(arms)), None
    )
    difference = None
    if pair:
        scores = [[job["score"] for job in jobs if job["arm"] == arm and job["score"] is not None] for arm in pair]
        difference = {
            "of": f"{pair[1]} minus {pair[0]}",
            "randomised": pair[0] == "ab_test_base",
            "average_score": _mean_difference(*scores),
            "valid_rate": _rate_difference(*((arms[arm]["valid"], arms[arm]["count"]) for arm in pair)),
        }
    unrecorded = sum(not job["recorded"] for job in jobs)
    report = {"days": days, "jobs": len(jobs), "unrecorded": unrecorded, "arms": arms, "difference": difference}
    return report | {"sentence": _sentence(report)}


def _mean_difference(base: list[float], tuned: list[float]) -> dict | None:
    """Return tuned - base of the means with Welch's 95% interval; None with fewer than two values a side."""
    import statistics

    if min(len(base), len(tuned)) < 2:
        return None
    difference = statistics.fmean(tuned) - statistics.fmean(base)
    errors = [statistics.variance(side) / len(side) for side in (base, tuned)]
    total = sum(errors)
    if total == 0:
        return {"value": difference, "low": difference, "high": difference}
    freedom = total**2 / sum(e**2 / (len(side) - 1) for e, side in zip(errors, (base, tuned), strict=True))
    margin = _t_quantile(freedom) * math.sqrt(total)
    return {"value": difference, "low": difference - margin, "high": difference + margin}


def _t_quantile(freedom: float) -> float:
    """Return Student's t at 97.5%, from the normal's by the expansion of Abramowitz & Stegun 26.7.5 (exact below 3)."""
    if freedom < 3:  # the expansion fails there; the tabled values of 1 and 2, in between the larger
        return 12.706 if freedom < 2 else 4.303
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def _rate_difference(base: tuple[int, int], tuned: tuple[int, int]) -> dict:
    """Return tuned - base of two rates (hits, tries) with Newcombe's 95% interval (1998, method 10)."""

    def wilson(hits: int, tries: int) -> tuple[float, float, float]:
        z, rate = 1.959964, hits / tries
        middle, margin = rate + z * z / (2 * tries), z * math.sqrt(rate * (1 - rate) / tries + z * z / (4 * tries**2))
        return rate, (middle - margin) / (1 + z * z / tries), (middle + margin) / (1 + z * z / tries)

    (b, b_low, b_high), (t, t_low, t_high) = wilson(*base), wilson(*tuned)
    low = t - b - math.sqrt((t - t_low) ** 2 + (b_high - b) ** 2)
    high = t - b + math.sqrt((t_high - t) ** 2 + (b - b_low) ** 2)
    return {"value": t - b, "low": max(-1.0, low), "high": min(1.0, high)}


def _sentence(report: dict) -> str:
    period = f"In the last {report['days']:g} days" if report["days"] else "Over all jobs"
    if not report["jobs"]:
        return f"{period} no job was finished."
    difference = report["difference"]
    if difference is None:
        arms = ", ".join(f"{arm['count']} by {name}" for name, arm in report["arms"].items())
        return f"{period} {report['jobs']} jobs were finished ({arms}); with one arm alone there is nothing to compare."
    tuned_name, base_name = difference["of"].split(" minus ")
    tuned, base = report["arms"][tuned_name], report["arms"][base_name]
    text = f"{period} the fine-tuned model answered {tuned['count']} jobs and the base {base['count']}"
    score = difference["average_score"]
    if score is None:
        text += "; too few scores to compare"
    elif score["low"] == score["high"]:
        text += f"; neither's scores vary, and they differ by {abs(score['value']):.2f}"
    else:
        sure = "is more than chance" if score["low"] > 0 or score["high"] < 0 else "chance alone can explain"
        higher = "higher" if score["value"] >= 0 else "lower"
        interval = f"(95% interval {score['low']:+.2f} to {score['high']:+.2f})"
        text += f"; its scores are on average {abs(score['value']):.2f} {higher} {interval}, which {sure}"
    rate = difference["valid_rate"]
    text += (f"; {tuned['valid_rate']:.0%} of its answers are valid against {base['valid_rate']:.0%} "
             f"(difference {rate['low']:+.0%} to {rate['high']:+.0%})")  # fmt: skip
    if tuned["median_seconds"] is not None and base["median_seconds"] is not None:
        text += f"; it takes {tuned['median_seconds']:.1f} s at the median against {base['median_seconds']:.1f} s"
    return text + ("." if difference["randomised"] else ". The jobs were not assigned at random, so compare with care.")


def _cells(arm: dict) -> list[str]:
    def shown(value, form):
        return "-" if value is None else format(value, form)

    return [
        str(arm["count"]),
        shown(arm["average_score"], ".2f"),
        shown(arm["valid_rate"], ".1%"),
        str(arm["fallbacks"]),
        shown(arm["median_seconds"], ".1f"),
        shown(arm["p95_seconds"], ".1f"),
        " ".join(arm["versions"]) or "-",
    ]


HEADINGS = ["arm", "jobs", "average score", "valid", "fallbacks", "median s", "p95 s", "versions"]


def _differences(report: dict) -> list[str]:
    difference, lines = report["difference"] or {}, []
    for name, form in (("average_score", "+.2f"), ("valid_rate", "+.1%")):
        if found := difference.get(name):
            values = (format(found[key], form) for key in ("value", "low", "high"))
            lines.append(
                f"{name.replace('_', ' ')}, {difference['of']}: {{}} (95% interval {{}} to {{}})".format(*values)
            )
    for name, arm in report["arms"].items():
        if arm["one_score"] is not None:
            lines.append(
                f"all {arm['scored']} scores of {name} are {arm['one_score']:g}: copied from the prompt's example?"
            )
    if report["unrecorded"]:
        lines.append(f"{report['unrecorded']} jobs carry no recorded arm and are sorted by their mode")
    return lines


def as_table(report: dict) -> str:
    rows = [HEADINGS, *([name, *_cells(arm)] for name, arm in report["arms"].items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_differences(report), report["sentence"]])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Base and fine-tuned model in service</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --bar: #3b7dd8 }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line) }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left }}
.says {{ font-size: 1.15rem; border-left: 4px solid var(--bar); padding-left: 1rem }}
</style>
<h1>Base and fine-tuned model in service</h1>
<p class="says">{sentence}</p>
<table><thead><tr>{headings}</tr></thead><tbody>
{rows}
</tbody></table>
<ul>{notes}</ul>
</html>
"""


def as_html(report: dict) -> str:
    def row(cells, tag):
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    rows = "\n".join(f"<tr>{row([name, *_cells(arm)], 'td')}</tr>" for name, arm in report["arms"].items())
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _differences(report))
    return PAGE.format(sentence=html.escape(report["sentence"]), headings=row(HEADINGS, "th"), rows=rows, notes=notes)


# -- install: the few lines that go into the service -------------------------------------------------------------------

BACKUP = ".before_lora"
BY_HAND = {
    "import": "with the other imports:                import lora_patch",
    "add_arguments": "before parser.parse_args():            lora_patch.add_arguments(parser)",
    "attach": "after model, processor = load(NAME):   lora_patch.attach((model, processor), NAME)",
    "generation": "where mlx_vlm.generate(...) is called: lora_patch.generation(mlx_vlm.generate)(...)",
    "choose": "in /analyze, before run_model_mlx():   lora_patch.choose(job_id=job_id, advisor=advisor)",
    "start": "before app.run(...):                   lora_patch.start(app, get_mlx_model)",
}
VERBS = ("get", "post", "put")  # methods of a view class; too common as names to follow by name


class Refusal(LoraError):
    """The service file is not understood; ``missing`` names the lines (keys of BY_HAND) that have no place yet."""

    def __init__(self, problems: list[str], missing: list[str]):
        super().__init__("; ".join(problems))
        self.problems, self.missing = problems, missing


class _File:
    """A Python source: its bytes, its syntax tree, and where in the bytes a node of the tree stands."""

    def __init__(self, raw: bytes, path: Path):
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            self.bom = b"\xef\xbb\xbf" if encoding == "utf-8-sig" else b""
            self.encoding = "utf-8" if self.bom else encoding
            self.text = raw[len(self.bom) :].decode(self.encoding).encode()  # what the tree's columns count
            self.tree = ast.parse(raw)
        except (SyntaxError, UnicodeDecodeError, LookupError, ValueError) as error:
            line = f":{error.lineno}" if getattr(error, "lineno", None) else ""
            raise Refusal([f"{path}{line}: not valid Python ({_one_line(error)})"], []) from error
        if re.search(rb"\r(?!\n)", self.text):
            raise Refusal([f"{path}: lines end in a bare carriage return; convert the line ends first"], [])
        self.lines = re.findall(rb"[^\n]*\n|[^\n]+", self.text)  # not splitlines: a form feed ends no line
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.nodes = list(ast.walk(self.tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def source(self, node) -> str:
        start, end = self.span(node)
        return self.text[start:end].decode()

    def indent(self, node) -> bytes | None:
        """Return the white space before a node, None when something else stands before it on its line."""
        before = self.lines[node.lineno - 1][: node.col_offset]
        return before if not before.strip() else None

    def end_of_line(self, line: int) -> bytes:
        return b"\r\n" if self.lines[line - 1].endswith(b"\r\n") else b"\n"

    def statement(self, node):
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def function(self, node):
        """Return the innermost function around a node, or None."""
        node = self.parents.get(node)
        while node is not None and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.parents.get(node)
        return node

    def encode(self, text: bytes) -> bytes:
        return self.bom + text.decode().encode(self.encoding)


class Installer:
    """Finds the places in a service file by its syntax tree and inserts the lines; changes no other byte."""

    def __init__(self, raw: bytes, path: Path):
        self.path, self.file = path, _File(raw, path)
        self.edits: list[tuple[int, int, bytes]] = []  # (from, to, replacement); from == to inserts
        self.problems, self.missing, self.notes, self.placed = [], [], [], {}

    # looking around

    @functools.cache  # noqa: B019 - an installer lives as long as one command
    def walk(self, kind):
        return [node for node in self.file.nodes if isinstance(node, kind)]

    def calls(self):
        return self.walk(ast.Call)

    def functions(self):
        return self.walk(ast.FunctionDef | ast.AsyncFunctionDef)

    def made_by(self, *makers: str) -> set[str]:
        """Return the variables that are assigned from a call of one of these functions or classes."""
        found = set()
        for node in self.walk(ast.Assign | ast.AnnAssign):
            if isinstance(node.value, ast.Call) and self.file.source(node.value.func).rsplit(".", 1)[-1] in makers:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(self.file.source(target) for target in targets)
        return found

    def mlx_names(self, wanted: set[str]) -> set[str]:
        """Return how the file may call functions of mlx_vlm: {"generate", "mlx_vlm.generate", "mv.generate"}."""
        names = set()
        for node in self.walk(ast.Import | ast.ImportFrom):
            for alias in node.names:
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlx_vlm":
                    if alias.name in wanted:
                        names.add(alias.asname or alias.name)
                    elif alias.name in ("generate", "utils"):  # a module of that name
                        names.update(f"{alias.asname or alias.name}.{name}" for name in wanted)
                elif isinstance(node, ast.Import) and alias.name.split(".")[0] == "mlx_vlm":
                    names.update(f"{alias.asname or alias.name}.{name}" for name in wanted)
                    names.update(f"mlx_vlm.{part}{name}" for part in ("", "utils.", "generate.") for name in wanted)
        return names

    def calls_of(self, wanted: set[str]) -> list:
        names = self.mlx_names(wanted)
        return [call for call in self.calls() if self.file.source(call.func).replace(" ", "") in names]

    def problem(self, node, text: str, *keys: str) -> None:
        where = f"{self.path}:{node.lineno}" if node is not None else str(self.path)
        self.problems.append(f"{where}: {text}")
        self.missing.extend(key for key in keys if key not in self.missing)

    # editing

    def line_before(self, key: str, statement, text: str) -> bool:
        indent, line = self.file.indent(statement), statement.lineno
        if key != "generation":  # which is a decorator itself, and the innermost
            line = min([line, *(node.lineno for node in getattr(statement, "decorator_list", []))])
        start = self.file.at(line, 0)
        if indent is None or self.file.text[start + len(indent) :].startswith(b"elif"):
            return False
        self.insert(key, start, indent + text.encode() + self.file.end_of_line(line), line)
        return True

    def line_after(self, key: str, statement, text: str) -> bool:
        indent, last = self.file.indent(statement), self.file.lines[statement.end_lineno - 1]
        rest = last[statement.end_col_offset :].strip()
        if indent is None or (rest and not rest.startswith(b"#")) or not last.endswith(b"\n"):
            return False
        start = self.file.starts[statement.end_lineno]
        self.insert(
            key, start, indent + text.encode() + self.file.end_of_line(statement.end_lineno), statement.end_lineno + 1
        )
        return True

    def insert(self, key: str, start: int, text: bytes, line: int) -> None:
        self.edits.append((start, start, text))
        self.placed.setdefault(key, []).append(line)

    def wrap(self, key: str, node, call: str, more: str = "") -> None:
        start, end = self.file.span(node)
        self.edits.append((start, start, f"lora_patch.{call}(".encode()))
        self.edits.append((end, end, f"{more})".encode()))
        self.placed.setdefault(key, []).append(node.lineno)

    # the places

    def plan(self) -> bytes:
        """Return the service with the lines in it; Refusal, with everything that is not understood."""
        self.refuse_own_lora()
        self.place_arguments()
        self.place_attach()
        self.place_generation()
        self.place_choose()
        self.place_start()
        self.place_import()
        if self.problems:
            raise Refusal(self.problems, self.missing)
        text = self.file.text
        for start, end, new in reversed(sorted(self.edits, key=lambda edit: edit[0])):
            text = text[:start] + new + text[end:]  # at one place: the last first, so that they end up in order
        new = self.file.encode(text)
        try:
            compile(new, str(self.path), "exec")
        except SyntaxError as error:  # our own error, but better said than written
            raise Refusal(
                [f"{self.path}:{error.lineno}: the lines do not fit in ({error.msg})"], list(BY_HAND)
            ) from error
        if uninstalled(new, self.path) != self.file.encode(self.file.text):
            raise Refusal([f"{self.path}: the lines could not be taken out again"], list(BY_HAND))
        return new

    def refuse_own_lora(self) -> None:
        ours = {f"--{name}" for name in DEFAULTS}
        for call in self.calls():
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
                for value in call.args:
                    if isinstance(value, ast.Constant) and value.value in ours:
                        self.problem(
                            call, f"the service has a flag {value.value} of its own; rename or remove it first"
                        )
        for call in self.calls_of({"load"}):
            if any(keyword.arg == "adapter_path" for keyword in call.keywords):
                self.problem(call, "the service loads an adapter of its own (adapter_path); remove that first")

    def place_arguments(self) -> None:
        parses = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")
        found = [c for c in self.calls() if isinstance(c.func, ast.Attribute) and c.func.attr in parses]
        makers = self.made_by("ArgumentParser")
        known = [c for c in found if self.file.source(c.func.value) in makers] or found
        with_model = {
            self.file.source(c.func.value)
            for c in self.calls()
            if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument" and c.args
            if isinstance(c.args[0], ast.Constant) and c.args[0].value in ("--mlx_model", "--mlx-model", "--port")
        }
        if len(known) > 1:
            known = [c for c in known if self.file.source(c.func.value) in with_model] or known
        if not known:
            self.problem(None, "no parser.parse_args() found", "add_arguments")
            return
        if len(known) > 1 and len({(self.file.function(c), self.file.source(c.func.value)) for c in known}) > 1:
            self.problem(known[0], "several parsers; which one is the service's is not clear", "add_arguments")
            return
        call = min(known, key=lambda c: c.lineno)
        receiver, statement = call.func.value, self.file.statement(call)
        plain = isinstance(receiver, ast.Name | ast.Attribute) and statement.lineno == call.lineno
        text = f"lora_patch.add_arguments({self.file.source(receiver)})"
        if not plain or not self.line_before("add_arguments", statement, text):
            self.wrap("add_arguments", receiver, "add_arguments")

    def place_attach(self) -> None:
        self.loaders, simple_target = [], (ast.Name, ast.Attribute, ast.Subscript)
        loads = self.calls_of({"load"})
        if not loads:
            self.problem(None, "no call of mlx_vlm.load found", "attach")
        for call in loads:
            self.loaders.append(self.file.function(call))
            model = call.args[0] if call.args and not isinstance(call.args[0], ast.Starred) else None
            model = model or next((k.value for k in call.keywords if k.arg == "path_or_hf_repo"), None)
            simple = isinstance(model, ast.Name | ast.Attribute | ast.Constant | ast.Subscript) or (
                isinstance(model, ast.Call) and self.file.source(model.func) in ("str", "Path", "os.path.expanduser")
            )
            name = f", {ast.unparse(model)}" if simple else ""
            statement = self.file.statement(call)
            target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
            names = isinstance(target, ast.Tuple) and all(isinstance(e, simple_target) for e in target.elts)
            if names and statement.value is call:
                loaded = ", ".join(self.file.source(element) for element in target.elts)
                if self.line_after("attach", statement, f"lora_patch.attach(({loaded}){name})"):
                    continue
            self.wrap("attach", call, "attach", name)

    def place_generation(self) -> None:
        names = self.mlx_names({"generate", "stream_generate"})
        names |= {  # ask = mlx_vlm.generate
            target.id
            for node in self.walk(ast.Assign)
            if self.file.source(node.value).replace(" ", "") in names
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.asking = [  # calls, and mentions such as executor.submit(generate, ...)
            node
            for node in self.walk(ast.Name | ast.Attribute)
            if self.file.source(node).replace(" ", "") in names and not isinstance(node.ctx, ast.Store)
            if isinstance(self.file.parents[node], ast.Call | ast.keyword)
        ]
        functions = [f for f in self.functions() if f.name == "run_model_mlx"] if not self.asking else []
        if not self.asking and not functions:
            self.problem(None, "no call of mlx_vlm.generate and no run_model_mlx found", "generation")
        for function in [*functions, *filter(None, map(self.file.function, self.asking))]:
            if isinstance(function, ast.AsyncFunctionDef):
                self.problem(
                    function, f"{function.name} is async; the model must be asked in a plain function", "generation"
                )
        self.generating = {f.name for f in functions} | {f.name for n in self.asking if (f := self.file.function(n))}
        self.generating -= set(VERBS)
        for function in functions:
            self.line_before("generation", function, "@lora_patch.generation")

    def is_factory(self, function) -> bool:
        """Tell whether a function makes the app: its inner functions are the service's, not steps of its own."""
        return any(self.file.function(f) is function and self.routes(f) for f in self.functions()) or any(
            self.file.function(c) is function and self.file.source(c.func) in ("Flask", "flask.Flask")
            for c in self.calls()
        )

    def routes(self, function) -> list[str]:
        """Return the paths that a function answers, by decorator, by app.add_url_rule or as a view class's method."""
        paths = []
        for call in function.decorator_list:
            routes = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if routes and call.func.attr in ("route", "get", "post", "put"):
                paths.append(self.constant(call, "rule"))
        around = self.file.parents.get(function)
        is_method = isinstance(around, ast.ClassDef) and function.name in VERBS
        name = around.name if is_method else function.name
        for call in self.calls():
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_url_rule":
                named = [*call.args[2:3], *(k.value for k in call.keywords if k.arg == "view_func")]
                whole = (name, f"{name}.as_view") if is_method else (name,)
                if any(self.file.source(getattr(node, "func", node)) in whole for node in named):
                    paths.append(self.constant(call, "rule"))
            given = [self.file.source(node) for node in call.args[:1]]  # flask-restful's api.add_resource(Class, path)
            if is_method and given == [name] and self.file.source(call.func).endswith(".add_resource"):
                paths += [node.value for node in call.args[1:] if isinstance(node, ast.Constant)]
        return [path for path in paths if isinstance(path, str)]

    @staticmethod
    def constant(call, keyword: str) -> str:
        nodes = [*call.args[:1], *(k.value for k in call.keywords if k.arg == keyword)]
        return next((n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)), "?")

    def mentions(self, node) -> set[str]:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}

    def reaching(self) -> set[str]:
        """Return the names of all functions from which the model is asked in the end."""
        names = set(self.generating)
        while True:
            more = {f.name for f in self.functions() if f.name not in names and self.mentions(f) & names} - set(VERBS)
            more -= {f.name for f in self.functions() if self.is_factory(f)}
            if not more:
                return names
            names |= more

    def place_choose(self) -> None:
        names = self.reaching()
        views = [f for f in self.functions() if any("analy" in path for path in self.routes(f))]
        views = [f for f in views if self.leads(f, names - {f.name})]
        if not views:
            self.problem(None, "no view of /analyze found that leads to the model", "choose")
        for view in views:
            if isinstance(view, ast.AsyncFunctionDef):
                self.problem(view, f"{view.name} is async; the request's arm cannot be kept", "choose")
                continue
            self.choose_in(view, names - {view.name})
        self.carry_threads(names)
        for node in self.asking:
            self.wrap("generation", node, "generation")

    def choose_in(self, view, names: set[str]) -> None:
        """Insert the line before the first statement of the view that leads to the model, with the view's own names."""
        block = view.body
        while True:
            index = next((i for i, s in enumerate(block) if self.leads(s, names)), None)
            if index is None:
                self.problem(view, f"{view.name} does not say how it asks the model", "choose")
                return
            statement = block[index]
            advisor = self.variable(view, statement.lineno, "advisor")
            local = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            loops = any(
                isinstance(node, ast.For) and "advisor" in self.file.source(node.iter) and self.leads(node, names)
                for node in ast.walk(statement)
            )
            if local or (advisor is not None and not loops):
                break
            inner = [b for b in self.blocks(statement) if any(self.leads(s, names) for s in b)]
            if not inner:
                break
            block = inner[0]
        job_id = self.variable(view, statement.lineno, "job")
        texts = {node.value for node in ast.walk(view) if isinstance(node, ast.Constant)}
        if advisor is None and not texts & {"advisor", "advisor_id"}:  # those the request is asked for at run time
            self.problem(statement, f"which variable of {view.name} holds the advisor is not clear", "choose")
            return
        if advisor is None:
            self.notes.append(f"{view.name} has no variable with the advisor: the request's field is used")
        if job_id is None:
            self.notes.append(f"{view.name} has no variable with the job's id: the request's field job_id is used")
        values = [f"{name}={value}" for name, value in (("job_id", job_id), ("advisor", advisor)) if value]
        if not self.line_before("choose", statement, f"lora_patch.choose({', '.join(values)})"):
            self.problem(statement, "shares its line with other code", "choose")

    def leads(self, node, names: set[str]) -> bool:
        """Tell whether a piece of code asks the model, itself or through one of the functions of these names."""
        return bool(self.mentions(node) & names) or any(inner in self.asking for inner in ast.walk(node))

    @staticmethod
    def blocks(statement) -> list[list]:
        handlers = [handler.body for handler in getattr(statement, "handlers", [])]
        cases = [case.body for case in getattr(statement, "cases", [])]
        return (
            [b for name in ("body", "orelse", "finalbody") if (b := getattr(statement, name, None))] + handlers + cases
        )

    def variable(self, view, before: int, kind: str) -> str | None:
        """Return the view's variable for the advisor ("advisor") or the job's id ("job"), set above line ``before``.

        That is what is read from a request field of that name, or a parameter, variable or loop's target so called.
        """
        fields = {"advisor": ("advisor", "advisorid"), "job": ("jobid", "xjobid", "analysisid")}[kind]
        read, named = None, None
        parameters = [a.arg for a in (*view.args.posonlyargs, *view.args.args, *view.args.kwonlyargs)]
        for name in parameters:
            if name.replace("_", "").lower() in fields:
                named = name
        for node in ast.walk(view):
            if isinstance(node, ast.Assign) and node.end_lineno < before:
                pairs = [pair for target in node.targets for pair in self.pairs(target, node.value)]
            elif (
                isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None and node.end_lineno < before
            ):
                pairs = [(node.target, node.value)]
            elif isinstance(node, ast.For) and node.lineno < before <= node.end_lineno:
                pairs = [(node.target, node.iter)]
                if kind == "advisor" and isinstance(node.target, ast.Name) and "advisor" in self.file.source(node.iter):
                    named, read = node.target.id, None  # for one in request.form["advisors"].split(",")
            else:
                continue
            if self.file.function(node) is not view:
                continue
            for target, value in pairs:
                if isinstance(target, ast.Name):
                    if self.is_field(value, fields):
                        read = read or target.id
                    if target.id.replace("_", "").lower() in fields:
                        named = target.id
                for element in target.elts if isinstance(target, ast.Tuple) else []:
                    if isinstance(element, ast.Name) and element.id.replace("_", "").lower() in fields:
                        named = element.id
        # a field of the request is an advisor's id for sure; of the job's id the view may have made one itself
        return (read or named) if kind == "advisor" else (named or read)

    def is_field(self, value, fields: tuple[str, ...]) -> bool:
        """Tell whether a value is a request's field of one of these names, as it is or tidied (.lower())."""
        if isinstance(value, ast.BoolOp):
            return self.is_field(value.values[0], fields)
        if isinstance(value, ast.IfExp):
            return self.is_field(value.body, fields)
        key = None
        if isinstance(value, ast.Subscript):
            key = value.slice
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            if value.func.attr in ("get", "pop"):
                key = value.args[0] if value.args else None
            elif value.func.attr in ("lower", "strip", "casefold", "replace"):
                return self.is_field(value.func.value, fields)
        elif isinstance(value, ast.Call) and self.file.source(value.func) == "str" and value.args:
            return self.is_field(value.args[0], fields)
        text = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""
        return re.sub(r"[_-]", "", text).lower() in fields

    @staticmethod
    def pairs(target, value) -> list[tuple]:
        """Take ``a, b = x, y`` apart."""
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        alike = both and len(target.elts) == len(value.elts)
        return list(zip(target.elts, value.elts, strict=True)) if alike else [(target, value)]

    def carry_threads(self, names: set[str]) -> None:
        """Wrap what is handed to another thread and leads to the model: the thread must know its request."""
        for call in self.calls():
            kind = self.file.source(call.func).rsplit(".", 1)[-1]
            if kind in ("Thread", "Timer"):
                handed = [k.value for k in call.keywords if k.arg in ("target", "function")] or call.args[1:2]
            elif kind in ("submit", "apply_async", "start_new_thread", "start_background_task", "spawn"):
                handed = call.args[:1]
            elif kind == "run_in_executor":
                handed = call.args[1:2]
            else:
                continue
            for node in handed:
                if self.leads(node, names):
                    self.wrap("carry", node, "carry")

    def place_start(self) -> None:
        apps = self.made_by("Flask", "create_app", "make_app", "build_app") or {"app", "application"}
        servers = ("serve", "run", "run_simple", "make_server", "WSGIServer", "serve_forever")
        runs = {}  # statement -> where the app stands in it
        for node in self.walk(ast.Attribute):  # app.run(...), or Thread(target=app.run)
            if node.attr == "run" and self.file.source(node.value) in apps:
                runs.setdefault(self.file.statement(node), node.value)
        for call in self.calls():
            if self.file.source(call.func).rsplit(".", 1)[-1] in servers:
                for node in call.args:
                    if self.file.source(node) in apps:
                        runs.setdefault(self.file.statement(call), node)
        if not runs:
            self.problem(None, "no app.run(...) found", "start")
        getter = next((f for f in self.loaders if f is not None and self.is_plain(f)), None)
        if getter is None and any(f is not None for f in self.loaders):
            self.notes.append("the model is loaded in a place that cannot be called from here: with its first request")
        more = f", {getter.name}" if getter is not None else ""
        if database := self.database():
            more += f", db_path={database}"
        for statement, app in runs.items():
            if not self.line_before("start", statement, f"lora_patch.start({self.file.source(app)}{more})"):
                self.wrap("start", app, "start", more)

    def is_plain(self, function) -> bool:
        """Tell whether a function is the module's own and can be called without arguments."""
        arguments = function.args
        required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
        required += sum(default is None for default in arguments.kw_defaults)
        return self.file.parents[function] is self.file.tree and required == 0

    def database(self) -> str | None:
        """Return the module's variable that names the database, by its sqlite3.connect calls."""
        level = {
            t.id for s in self.file.tree.body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)
        }
        connects = [c for c in self.calls() if self.file.source(c.func) in ("sqlite3.connect", "connect") and c.args]
        names = [c.args[0].id for c in connects if isinstance(c.args[0], ast.Name) and c.args[0].id in level]
        return min(names, key=lambda name: not re.search("DB|DATABASE", name.upper()), default=None)

    def place_import(self) -> None:
        body = self.file.tree.body
        first_edit = min((start for start, _, _ in self.edits), default=len(self.file.text))
        last = None
        for statement in body:
            if self.file.span(statement)[1] >= first_edit:
                break
            if isinstance(statement, ast.Import | ast.ImportFrom):
                last = statement
        package = self.package()
        if package is None:
            lines = ["import lora_patch"]
        else:
            lines = ["try:", "    import lora_patch", "except ImportError:", f"    from {package} import lora_patch"]
        if last is not None:
            end = self.file.end_of_line(last.end_lineno).decode()
            if self.line_after("import", last, end.join(lines)):
                return
        documented = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        anchor = body[1] if documented and len(body) > 1 else body[0] if body else None
        if anchor is not None and not (isinstance(anchor, ast.ImportFrom) and anchor.module == "__future__"):
            end = self.file.end_of_line(anchor.lineno).decode()
            if self.line_before("import", anchor, end.join(lines)):
                return
        self.problem(anchor, "no place for an import found", "import")

    def package(self) -> str | None:
        """Return the dotted name of the package that the service lies in; None for a script of its own."""
        parts, folder = [], self.path.resolve().parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        return ".".join(parts) or None


def uninstalled(raw: bytes, path: Path) -> bytes:
    """Return a service file without our lines, whatever else was changed in it since."""
    file = _File(raw, path)
    edits = []

    def ours(node, *names) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "lora_patch"
            and (not names or node.attr in names)
        )

    def drop_lines(first: int, last: int) -> None:
        edits.append((file.starts[first - 1], file.starts[last], b""))

    dropped = set()
    for node in ast.walk(file.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if names == ["lora_patch"]:
            around = file.parents[node]
            if isinstance(around, ast.ExceptHandler):
                continue
            node = around if isinstance(around, ast.Try) else node
            drop_lines(node.lineno, node.end_lineno)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ours(node.value.func):
            drop_lines(node.lineno, node.end_lineno)
            dropped.add(node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if ours(decorator, "generation"):
                    drop_lines(decorator.lineno, decorator.end_lineno)
        elif isinstance(node, ast.Call) and ours(node.func) and node not in dropped and node.args:
            (start, end), (inner, inner_end) = file.span(node), file.span(node.args[0])
            edits.append((start, inner, b""))
            edits.append((inner_end, end, b""))
    text = file.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return file.encode(text)


def inserted(raw: bytes, path: Path) -> set[str]:
    """Return which of our lines a file has (keys of BY_HAND)."""
    tree = _File(raw, path).tree
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and any(alias.name == "lora_patch" for alias in node.names):
            found.add("import")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora_patch":
            found.add(node.attr)
    return found & set(BY_HAND)


def _diff(before: bytes, after: bytes, name: str) -> str:
    import difflib

    sides = [raw.decode("utf-8", "replace").splitlines(keepends=True) for raw in (before, after)]
    return "".join(difflib.unified_diff(*sides, f"a/{name}", f"b/{name}")).replace("\r\n", "\n")


def _write(path: Path, raw: bytes) -> None:
    """Replace a file's content in one step, its permissions kept."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o7777)
        else:
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def install(service: Path, check: bool, uninstall: bool) -> None:
    """Insert our lines, say what would be inserted (``check``), or take them out again (``uninstall``)."""
    if not service.is_file():
        raise LoraError(f"{service}: no such file")
    path = service.resolve()
    raw = path.read_bytes()
    backup, module = path.with_name(path.name + BACKUP), path.with_name("lora_patch.py")
    have = inserted(raw, service)
    if not check:
        for place in (path, path.parent):
            if not os.access(place, os.W_OK) or not place.stat().st_mode & 0o222:
                raise LoraError(f"{place}: read-only; nothing was changed")
    if uninstall:
        _uninstall(service, path, raw, backup, module, bool(have), check)
        return
    if have:
        missing = [key for key in BY_HAND if key not in have]
        if missing:
            raise Refusal([f"{service}: some of our lines are there already, but not all"], missing)
        if not check and not _same_file(module):
            _write(module, Path(__file__).read_bytes())
            print(f"{service}: installed already; lora_patch.py beside it brought up to date")
        else:
            print(f"{service}: installed already, nothing to do")
        return
    installer = Installer(raw, service)
    new = installer.plan()
    lines = sum(map(len, installer.placed.values()))
    if check:
        print(f"{service}: not installed; {lines} places were found and understood, these lines would be added:\n")
        print(_diff(raw, new, path.name), end="")
    else:
        _write(backup, raw)
        if not _same_file(module):
            _write(module, Path(__file__).read_bytes())
        _write(path, new)
        print(f"{service}: {lines} lines inserted; as it was: {backup.name}\n")
        print(_diff(raw, new, path.name), end="")
    for note in installer.notes:
        print(f"note: {note}")
    if re.search(rb"INSERT\s+(OR\s+\w+\s+)?INTO\s+jobs\s+VALUES", raw, re.I):
        print(
            "note: INSERT INTO jobs without a list of columns will fail once the table has four more; name the columns"
        )


def _same_file(module: Path) -> bool:
    return module.is_file() and module.read_bytes() == Path(__file__).read_bytes()


def _uninstall(service: Path, path: Path, raw: bytes, backup: Path, module: Path, have: bool, check: bool) -> None:
    if not have:
        print(f"{service}: not installed, nothing to do")
        return
    old = uninstalled(raw, service)
    compile(old, str(path), "exec")
    as_before = backup.is_file() and backup.read_bytes() == old
    if check:
        print(
            f"{service}: our lines would be taken out" + (", which gives back the file as it was" if as_before else "")
        )
        return
    ours = _same_file(module)
    _write(path, old)
    if as_before:
        backup.unlink()
    if ours:
        module.unlink()
    kept = (
        "byte for byte as it was"
        if as_before
        else f"our lines taken out, your later changes kept ({backup.name} stays)"
    )
    print(f"{service}: {kept}")


# -- command line -----------------------------------------------------------------------------------------------------


def check_adapters(lora_path: str | None, model_config: str | None, base_model: str | None) -> None:
    """Print what the service would serve; LoraError for what it would refuse."""
    sources, _ = find_sources(lora_path, model_config)
    base = read_base(base_model) if base_model else None
    if base_model and base is None:
        raise LoraError(f"{base_model}: neither a model folder nor a model in the hub's cache")
    for advisor, source in sources.items():
        adapter = read_adapter(source)
        warnings_ = check_base(adapter, base) if base_model else []
        who = "every advisor" if advisor == EVERYONE else advisor
        ranks = ", ".join(map(str, adapter.ranks))
        print(f"{who}: {adapter.path}, {adapter.version}, rank {ranks}, {len(adapter.layers)} modules, "
              f"{adapter.nbytes / 1e6:.1f} MB, base {(adapter.trained_on or {}).get('name', 'unknown')}")  # fmt: skip
        for warning in warnings_:
            print(f"warning: {warning}")
    if not sources:
        print("no adapter: the base answers everything")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lora_patch.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="install|check|report")
    command = commands.add_parser("install", help="put the lines into ai_advisor_service.py, or take them out")
    command.add_argument("--service", type=Path, required=True, help="path to ai_advisor_service.py")
    command.add_argument("--check", action="store_true", help="change nothing; show what would be done")
    command.add_argument("--uninstall", action="store_true", help="take the lines out again, byte for byte")
    command = commands.add_parser("check", help="check adapters before the service is started with them")
    command.add_argument("--lora_path")
    command.add_argument("--model_config")
    command.add_argument("--base_model", help="model folder, or hub id in the local cache, to check against")
    command = commands.add_parser("report", help="compare the arms from the jobs table")
    command.add_argument("--db", type=Path, default=Path("mondrian.db"), help="database with the jobs table")
    command.add_argument("--days", type=float, default=7, help="how far back to look; 0 takes all (default: 7)")
    command.add_argument("--format", choices=("table", "json", "html"), default="table")
    command.add_argument("--output", type=Path, help="file to write instead of the screen")
    given = parser.parse_args(arguments)
    try:
        if given.command == "install":
            install(given.service, given.check, given.uninstall)
        elif given.command == "check":
            check_adapters(given.lora_path, given.model_config, given.base_model)
        else:
            report = make_report(read_jobs(given.db, given.days), given.days)
            shown = {"table": as_table, "html": as_html}.get(given.format, lambda r: json.dumps(r, indent=2))(report)
            if given.output:
                _write(given.output, shown.encode() + b"\n")
            else:
                print(shown)
    except Refusal as error:
        for problem in error.problems:
            print(f"lora_patch: {problem}", file=sys.stderr)
        if error.missing:
            print("nothing was changed; lines to add by hand:", file=sys.stderr)
            for key in BY_HAND:
                if key in error.missing or key == "import":
                    print(f"    {BY_HAND[key]}", file=sys.stderr)
        sys.exit(1)
    except (LoraError, OSError) as error:
        sys.exit(f"lora_patch: {_one_line(error)}")


if __name__ == "__main__":
    main()

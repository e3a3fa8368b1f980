"""Read adapter folders of this and other software into matrices that can be switched on; checked, never trusted."""

import contextlib
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .arms import Breaker
from .errors import LoraError, first_of, one_line
from .files import FLOATS, as_float32, read_json, safetensors_header
from .names import module_name
from .sources import PICKLES, WEIGHTS, Source
from .versions import ARGS, CONFIG, training_args

MAX_ADAPTER = 8 << 30  # bytes; rank 256 on all layers of the 8B model takes 4 GB


@dataclass
class Adapter:
    """One LoRA adapter, ready to be switched on: its update of each module, and what people call it."""

    layers: dict  # module name -> (a [in, r], b [r, out], scale): mx.array, mx.array, float
    path: str
    version: str
    ranks: list[int]
    digest: str  # SHA-256 of the weights and weightings: the same adapter is not loaded twice
    trained_on: dict | None  # base fingerprint, when the folder says it
    max_image_size: int  # pixels of a photograph's long side
    config: dict  # adapter_config.json, of the first of several
    phrasebook: object | None = None  # `phrasebook.Continuations` of its training responses, to draft from
    breaker: Breaker | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b, _ in self.layers.values())


def read_adapter(source: Source, lora_scale: float | None = None) -> Adapter:
    """Read and check an adapter, or the weighted sum of several: sum_i w_i s_i (x A_i) B_i.

    A sum is exact, not an average of matrices: the A_i stand side by side, the w_i s_i B_i below one another, so the
    combined rank is the sum of the ranks. ``lora_scale`` is the scale of adapters whose files do not tell it.
    Raises LoraError naming all that is wrong with the folders.
    """
    import mlx.core as mx
    import numpy as np

    from .phrasebook import PHRASEBOOK, read_phrasebook  # MLX: slow to import

    parts, problems = [], []
    for folder, weight in source.parts:
        try:
            parts.append((*_read_folder(folder, dict(source.sha256), lora_scale), weight))
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
        parts[0][2]["config"],
        read_phrasebook(Path(source.parts[0][0]) / PHRASEBOOK) if len(parts) == 1 else None,
    )


def as_uniform(layers: dict) -> tuple[dict, int, float]:
    """Return ({module.lora_a: [in, r], module.lora_b: [r, out]}, r, scale) of an adapter: one rank and scale for all.

    Matrices of a smaller rank are filled up with zeros and B takes up what differs in scale, so the updates are the
    same; where rank and scale are the same everywhere, nothing is changed.
    """
    import mlx.core as mx

    rank, tensors = max(a.shape[1] for a, _, _ in layers.values()), {}
    scale = max((scale for _, _, scale in layers.values()), key=abs)
    for module, (a, b, own) in layers.items():
        more = rank - a.shape[1]
        tensors[f"{module}.lora_a"] = mx.pad(a, ((0, 0), (0, more))) if more else a
        b = b if own == scale else (b.astype(mx.float32) * (own / scale)).astype(b.dtype)
        tensors[f"{module}.lora_b"] = mx.pad(b, ((0, more), (0, 0))) if more else b
    return tensors, rank, scale


def _read_folder(folder: Path, expected: dict, lora_scale: float | None) -> tuple[dict, str, dict]:
    """Return ({module: (a, b, scale, dtype)} as float32 numpy, SHA-256 of weights and config, training notes)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LoraError(f"{folder}: no such adapter folder")
    present = _weights(folder)
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise LoraError(
            f"{folder}: no adapter_config.json beside {present[0][0].name}; without it the scale is unknown"
        )
    config = read_json(config_file)
    _check_plain(config, config_file)
    for name in expected:
        if name.endswith((".json", ".safetensors")) and "/" not in name and (folder / name).is_file():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected[name]:
                raise LoraError(f"{folder / name}: not the file that was deployed (SHA-256 differs)")
        elif expected[name] is not None:
            raise LoraError(f"{folder}: {name}, which was deployed, is missing")
    if lora_scale is not None and _scale_is_unknown(config):
        config = config | {"lora_parameters": {"rank": config["rank"], "scale": lora_scale}}
    tensors, digest = _read_files(present[0])
    updates = _pair(present[0][0], tensors, config)
    for other in present[1:]:
        if not _same(tensors, _read_files(other)[0]):
            raise LoraError(
                f"{folder}: {present[0][0].name} and {other[0].name} hold different adapters; copy it again"
            )
    if not any(scale for _, _, scale, _ in updates.values()):
        raise LoraError(f"{config_file}: the scale is 0, so the adapter would change nothing")
    scale = _mlx_scale(config, config_file)
    uniform = not (config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"))
    if uniform and scale is not None and {"r", "lora_alpha"} <= config.keys():
        own = _peft_scale(config, config_file)[0]
        if not math.isclose(scale, own, rel_tol=1e-6):
            raise LoraError(f"{config_file}: lora_parameters.scale is {scale:g} but lora_alpha / r is {own:g}")
    digest = hashlib.sha256(f"{digest} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()
    return updates, digest, _training_notes(folder) | {"config": config}


def _weights(folder: Path) -> list[list[Path]]:
    """Return the weights in a folder, as often as they are there: a file, or the files that they are split into."""
    present = [[folder / name] for name in WEIGHTS if (folder / name).is_file()]
    shards = sorted(folder.glob("adapter*-*-of-*.safetensors"))
    if present:
        return present
    if shards:
        count = re.search(r"-of-(\d+)", shards[-1].name)
        if not count or len(shards) != int(count[1]):
            raise LoraError(f"{folder}: {len(shards)} files as {shards[0].name}, not all of one adapter; copy it again")
        return [shards]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise LoraError(f"{folder}: holds {pickles[0]} but no safetensors; pickle is never read: convert it, with "
                        "torch.load(FILE, weights_only=True) and safetensors.torch.save_file")  # fmt: skip
    steps = sorted(path.name for path in folder.glob("*_adapters.safetensors"))
    more = f"; copy the step to use, such as {steps[-1]}, to {WEIGHTS[0]}" if steps else ""
    raise LoraError(f"{folder}: no {WEIGHTS[0]} or {WEIGHTS[1]}{more or '; name the folder that training wrote'}")


def _read_files(paths: list[Path]) -> tuple[dict, str]:
    """Return what `_read_tensors` returns, of all files together."""
    read = [_read_tensors(path) for path in paths]
    if len(read) == 1:
        return read[0]
    digest = hashlib.sha256(" ".join(sha for _, sha in read).encode()).hexdigest()
    return {name: tensor for tensors, _ in read for name, tensor in tensors.items()}, digest


def _same(one: dict, other: dict) -> bool:
    """Tell whether two files hold the same matrices, whatever names and layout they have there."""
    import numpy as np

    both = [
        {module_name(key): values.T if key.endswith(".weight") else values for key, (values, _) in tensors.items()}
        for tensors in (one, other)
    ]
    return both[0].keys() == both[1].keys() and all(np.array_equal(both[0][key], both[1][key]) for key in both[0])


def _scale_is_unknown(config: dict) -> bool:
    """Tell whether only mlx-vlm's older form {"rank", "alpha"} gives the scale, and its numbers do not tell which.

    Before mlx-vlm #846 (April 2026) the update was multiplied by alpha, since then by alpha / rank. An alpha below 1
    is from before: 0.1 was the default, and divided by the rank it would hardly change the model.
    """
    named = isinstance(config.get("lora_parameters"), dict) or "lora_alpha" in config
    numbers = [value for value in (config.get("alpha"), config.get("rank")) if type(value) in (int, float)]
    return not named and len(numbers) == 2 and abs(numbers[0]) >= 1 and numbers[1] > 1


# LoraConfig of peft 0.21.2: each adds something that A and B do not hold, or is used otherwise than on each token
MORE_THAN_LORA = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "megatron_config", "lora_bias", "alora_invocation_tokens",
    "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of init_lora_weights


def _check_plain(config: dict, path: Path) -> None:
    """Refuse what is more than LoRA; tensors that do not belong (trained biases) are refused where they are met."""
    unsupported = [key for key in MORE_THAN_LORA if config.get(key)]
    if config.get("fine_tune_type") in ("dora", "full"):
        unsupported.append(f"fine_tune_type {config['fine_tune_type']}")
    if config.get("peft_type") not in (None, "LORA"):
        unsupported.append(f"peft_type {str(config['peft_type'])[:40]}")
    if unsupported:
        raise LoraError(f"{path}: {', '.join(unsupported)}: not plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise LoraError(f"{path}: init_lora_weights {start[:20]} changed the base that this was trained on; save it "
                        "with PEFT's path_initial_model_for_weight_conversion, for the untouched one")  # fmt: skip


def _training_notes(folder: Path) -> dict:
    """Return what the trainer left, if anything: the base's fingerprint and the bound of the photographs' size."""
    from .photo import MAX_IMAGE_SIZE  # Pillow: slow to import

    notes = {"base_fingerprint": None, "max_image_size": MAX_IMAGE_SIZE}
    trained = training_args(folder)
    settings = trained.get("settings") if isinstance(trained.get("settings"), dict) else {}
    size = settings.get("max_image_size")
    if isinstance(size, int) and 28 <= size <= 8192:
        notes["max_image_size"] = size
    fingerprint = trained.get("base_fingerprint")
    if fingerprint is not None:
        keys = ("name", "shape", "architecture", "norms", "weights", "quantization")
        if not isinstance(fingerprint, dict) or any(key not in fingerprint for key in keys):
            raise LoraError(f"{folder / ARGS}: base_fingerprint is damaged")
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
        raise LoraError(one_line(error)) from error
    tensors, problems = {}, []
    for name, tensor in header.items():
        dtype, shape, (first, last) = tensor.get("dtype"), tensor["shape"], tensor["data_offsets"]
        if dtype not in FLOATS or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
            problems.append(f"{name[:120]} is {dtype} {str(shape)[:60]}, not a matrix of F32, F16 or BF16")
        elif last - first != FLOATS[dtype] * shape[0] * shape[1] or start + last > len(data):
            problems.append(f"{name[:120]}: {last - first} bytes do not make {dtype} {shape}")
        else:
            values = as_float32(dtype, memoryview(data)[start + first : start + last])
            if not np.isfinite(values).all():
                problems.append(f"{name[:120]} holds NaN or infinity")
            tensors[name] = values.reshape(shape), dtype
    if problems:
        raise LoraError(f"{path}: {first_of(problems)}")
    return tensors, hashlib.sha256(data).hexdigest()


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
            problems.append(f"{module}: adapter_config.json leaves it out (target_modules, layers_to_transform ...)")
        else:
            scale, rank = _module_scale(file.parent / CONFIG, config, key, is_peft)
            if rank is not None and rank != a.shape[1]:
                problems.append(f"{module}: rank {a.shape[1]}, but adapter_config.json says {rank}")
            updates[module] = (a, b, scale, dtype if dtype == dtype_b else "F32")
    if problems:
        raise LoraError(f"{file}: {first_of(problems)}")
    if not updates:
        raise LoraError(f"{file}: holds no LoRA matrices")
    return updates


def _is_targeted(config: dict, key: str, is_peft: bool) -> bool:
    """Tell whether PEFT would use this tensor: it drops, silently, what its config does not name."""
    if not is_peft:
        return True
    name = _peft_module(key)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("exclude_modules") and _names(config["exclude_modules"], name):
        return False
    if layers is not None and _layer(config.get("layers_pattern"), name) not in (
        layers if isinstance(layers, list) else [layers]
    ):
        return False
    return targets is None or targets == "all-linear" or _names(targets, name)


def _layer(patterns, name: str) -> int | None:
    """Return the number of the layer that a module is in, as PEFT takes it from its name."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]:
        with contextlib.suppress(re.error):
            if match := re.match(rf".*\.{pattern}\.(\d+)\.", name):
                return int(match[1])
    return None


def _names(targets, name: str) -> bool:
    """Tell whether PEFT's ``targets``, a regular expression or endings of names, mean the module ``name``."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error:
            return False
    return isinstance(targets, list) and any(name == str(t) or name.endswith(f".{t}") for t in targets)


def _peft_module(key: str) -> str:
    return re.sub(r"\.lora_A(\.[\w-]+)?\.weight$", "", key).removeprefix("base_model.model.")


def _mlx_scale(config: dict, path: Path) -> float | None:
    """Return the config's scale as mlx-vlm takes it; None when it has none."""
    if isinstance(own := config.get("lora_parameters"), dict):
        return _number(own.get("scale"), "lora_parameters.scale", path)
    if "rank" not in config or "alpha" not in config:  # mlx-vlm's older form
        return None
    alpha, rank = _number(config["alpha"], "alpha", path), _rank(config["rank"], "rank", path)
    if _scale_is_unknown(config):
        raise LoraError(
            f"{path}: rank {rank} and alpha {alpha:g} do not tell the scale: mlx-vlm before April 2026 meant "
            f"{alpha:g}, later {alpha / rank:g}; say which with --lora_scale {alpha:g} or {alpha / rank:g}"
        )
    return alpha


def _peft_scale(config: dict, path: Path, module: str = "") -> tuple[float, int]:
    """Return (scale, rank) of a module as PEFT takes them from the config."""
    rank = _rank(_pattern(config.get("rank_pattern"), module, config.get("r")), "r", path)
    alpha = _number(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha")), "lora_alpha", path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _module_scale(path: Path, config: dict, key: str, is_peft: bool) -> tuple[float, int | None]:
    """Return (scale, rank that the config demands or None) of one module."""
    if is_peft:
        return _peft_scale(config, path, _peft_module(key))
    scale = _mlx_scale(config, path)
    if scale is None and not {"r", "lora_alpha"} <= config.keys():
        raise LoraError(f"{path}: no lora_parameters.scale; without it the adapter's strength is unknown")
    if scale is None:
        scale = _peft_scale({name: config.get(name) for name in ("r", "lora_alpha", "use_rslora")}, path)[0]
    own = config.get("lora_parameters")
    rank = own.get("rank") if isinstance(own, dict) else config.get("rank", config.get("r"))
    return scale, _rank(rank, "rank", path) if rank is not None else None


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
    if value is None:
        raise LoraError(f"{path}: {name} is missing; add the one that the adapter was trained with")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoraError(f"{path}: {name} is {str(value)[:40]}, not a number")
    return float(value)


def _rank(value, name: str, path: Path) -> int:
    if value is None:
        raise LoraError(f"{path}: {name} is missing; add the one that the adapter was trained with")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        raise LoraError(f"{path}: {name} is {str(value)[:40]}, not a rank")
    return value

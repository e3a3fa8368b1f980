"""Merging an adapter into its base model: W + scale * B A, shard by shard, under the names the base itself uses."""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from common.errors import UserError, refuse
from common.files import read_json, sync_folder, write_json
from integration.lora_patch.adapters import read_adapter
from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints
from integration.lora_patch.hub import model_folder
from integration.lora_patch.names import mlx_module
from integration.lora_patch.sources import adapter_in
from integration.lora_patch.versions import training_args

INDEX = "model.safetensors.index.json"
QUANTIZED_PARTS = ("weight", "scales", "biases")


def fuse_adapter(base_model: str, lora_path: Path, output_dir: Path, dequantize: bool = False) -> Iterator[str]:
    """Write base + adapter to ``output_dir`` (new) and yield lines that say what was done.

    The shards keep their names and tensor names, so what loads the base loads the result. A quantized base is
    dequantized, changed, and quantized again in its own way, which rounds the update too: how much is measured and
    said; with ``dequantize`` every weight is written in 16 bits instead and nothing is lost.
    UserError for another base than the adapter's, or an adapter with modules that the base lacks.
    """
    layers = read_adapter(adapter_in(lora_path)).layers
    base = model_folder(base_model)
    yield from _check_base(base, base_model, lora_path)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir}: not empty; name a new folder")
    shards, weights = {}, {}
    for path in sorted(base.glob("*.safetensors")):
        arrays, metadata = mx.load(str(path), return_metadata=True)  # lazy: read when a shard is evaluated
        shards[path.name] = list(arrays), metadata
        weights |= arrays
    base_config = read_json(base / "config.json")
    merging = _Merging(weights, layers, base_config, dequantize)
    merging.check(lora_path)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", suffix=".tmp", dir=output_dir.parent))
    try:
        where, total = {}, 0
        for name, (tensor_names, metadata) in shards.items():
            merged = merging.shard(tensor_names)
            mx.save_safetensors(str(draft / name), merged, metadata)
            where |= dict.fromkeys(merged, name)
            total += sum(array.nbytes for array in merged.values())
        if (base / INDEX).is_file():
            write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
        _copy_rest(base, draft)
        if dequantize:
            plain = {key: value for key, value in base_config.items() if not key.startswith("quantization")}
            write_json(draft / "config.json", plain)
        sync_folder(draft)
        if output_dir.exists():
            output_dir.rmdir()
        draft.chmod(0o755)
        draft.rename(output_dir)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output_dir}: the merged model could not be written ({error}); free space") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    yield f"{output_dir}: {len(merging.merged)} modules merged, {total / 1e9:.2f} GB"
    if merging.losses:
        yield (
            f"quantizing the merged weights again changed the update by {statistics.median(merging.losses):.0%} "
            "(median over modules, relative): serve base + adapter, or fuse with --dequantize, to lose nothing"
        )


def _check_base(base: Path, name: str, lora_path: Path) -> list[str]:
    """Compare the base with the fingerprint in the adapter's training_args.json; return warnings."""
    try:
        fingerprint = base_fingerprint(base, name)
    except ValueError as error:
        raise UserError(str(error)) from error
    trained_on = training_args(lora_path).get("base_fingerprint")
    if not trained_on:
        return [f"{lora_path} has no training_args.json: that it belongs to this base cannot be checked"]
    errors, warnings = compare_fingerprints(trained_on, fingerprint)
    refuse(errors)
    return warnings


def _copy_rest(base: Path, draft: Path) -> None:
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX and not path.name.startswith("."):
            shutil.copyfile(path, draft / path.name)


class _Merging:
    """Base weights by name, and the adapter that goes into them."""

    def __init__(self, weights: dict, layers: dict, config: dict, dequantize: bool):
        self.weights, self.layers = weights, layers
        self.quantization = config.get("quantization") or config.get("quantization_config") or {}
        self.dequantize = dequantize
        self.merged: set[str] = set()
        self.losses: list[float] = []

    def check(self, lora_path: Path) -> None:
        """Refuse, before anything is written, an adapter whose modules or shapes the base does not have."""
        stems = {mlx_module(name.removesuffix(".weight")): name for name in self.weights if name.endswith(".weight")}
        problems = []
        for module, (a, b, _) in sorted(self.layers.items()):
            if module not in stems:
                problems.append(f"{lora_path}: {module} is not in the base model")
                continue
            wanted = b.shape[1], a.shape[0]
            if (shape := self._shape(stems[module].removesuffix(".weight"))) != wanted:
                problems.append(f"{lora_path}: {module} is made for a layer {wanted}, the base's is {shape}")
        refuse(problems)

    def _shape(self, stem: str) -> tuple[int, int]:
        rows, columns = self.weights[stem + ".weight"].shape
        settings = self._settings(stem)
        return (rows, columns * 32 // settings["bits"]) if settings else (rows, columns)

    def _settings(self, stem: str) -> dict | None:
        """Return group_size, bits and mode of a quantized module, None for a plain one."""
        if stem + ".scales" not in self.weights:
            return None
        own = self.quantization.get(stem, self.quantization.get(mlx_module(stem)))
        settings = own if isinstance(own, dict) else self.quantization
        return {"mode": "affine"} | {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}

    def shard(self, names: list[str]) -> dict[str, mx.array]:
        """Return the merged tensors of one shard, and free the base's arrays."""
        result = {}
        for name in names:
            stem, _, part = name.rpartition(".")
            settings = self._settings(stem) if part in QUANTIZED_PARTS else None
            changed = mlx_module(stem) in self.layers and part in QUANTIZED_PARTS
            if settings is None:
                result[name] = self._plain(name, stem) if changed else self.weights[name]
            elif self.dequantize:
                if part == "weight":
                    result[name] = self._wide(stem, settings).astype(self.weights[stem + ".scales"].dtype)
            elif changed:
                if part == "weight":  # its scales and biases come along, wherever they lay before
                    result |= {f"{stem}.{key}": array for key, array in self._requantized(stem, settings).items()}
            else:
                result[name] = self.weights[name]
        mx.eval(result)
        for name in names:
            if not name.endswith((".scales", ".biases")):  # small, and the next shard may need them
                del self.weights[name]
        return result

    def _delta(self, stem: str) -> mx.array:
        module = mlx_module(stem)
        self.merged.add(module)
        a, b, scale = self.layers[module]
        return scale * (a.astype(mx.float32) @ b.astype(mx.float32)).T

    def _plain(self, name: str, stem: str) -> mx.array:
        weight = self.weights[name]
        return (weight.astype(mx.float32) + self._delta(stem)).astype(weight.dtype)

    def _wide(self, stem: str, settings: dict) -> mx.array:
        parts = [self.weights.get(f"{stem}.{part}") for part in QUANTIZED_PARTS]
        weight = mx.dequantize(*parts, **settings).astype(mx.float32)
        return weight + self._delta(stem) if mlx_module(stem) in self.layers else weight

    def _requantized(self, stem: str, settings: dict) -> dict[str, mx.array]:
        merged = self._wide(stem, settings)
        first = self.weights[stem + ".scales"].dtype
        parts = dict(zip(QUANTIZED_PARTS, mx.quantize(merged.astype(first), **settings), strict=False))
        delta, rounded = self._delta(stem), mx.dequantize(*parts.values(), **settings).astype(mx.float32)
        self.losses.append((mx.linalg.norm(rounded - merged) / mx.maximum(mx.linalg.norm(delta), 1e-12)).item())
        return parts

"""A base model is told from any other, and known again under another quantization."""

import json
import struct

import mlx.core as mx
import pytest

from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints


def folder(path, seed=0, layers=2, dtype=mx.bfloat16, prefix="model.language_model", quantized=False, scale=1.0):
    """Write a model folder of the shape that matters here: a config and language-model tensors."""
    path.mkdir()
    text = {"num_hidden_layers": layers, "hidden_size": 64, "vocab_size": 100}
    config = {"model_type": "qwen3_vl", "text_config": text, "vision_config": {"depth": 2}}
    key = mx.random.key(seed)
    weights = {}
    for layer in range(layers):
        weight = scale * mx.random.normal((64, 64), key=mx.random.key(layer)).astype(dtype)
        name = f"{prefix}.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = mx.random.normal((64,), key=mx.random.split(key, 9)[layer]).astype(
            dtype
        )
        if quantized:
            config["quantization"] = {"bits": 4, "group_size": 64}
            for part, value in zip(("weight", "scales", "biases"), mx.quantize(weight), strict=True):
                weights[f"{name}.mlp.up_proj.{part}"] = value
        else:
            weights[f"{name}.mlp.up_proj.weight"] = weight
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps(config))
    return base_fingerprint(path, path.name)


def test_the_same_weights_under_either_naming_are_the_same_base(tmp_path):
    a = folder(tmp_path / "hub")
    b = folder(tmp_path / "mlx", prefix="language_model.model")
    assert compare_fingerprints(a, b) == ([], [])


def test_another_quantization_is_a_warning(tmp_path):
    errors, (warning,) = compare_fingerprints(folder(tmp_path / "full"), folder(tmp_path / "four", quantized=True))
    assert errors == []
    assert "unquantized then, 4-bit now: trained on full (2 layers, hidden 64), used on four" in warning.replace(
        ")", "", 1
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layers": 3}, "another model"),
        ({"seed": 1}, "same shape but other weights"),
        ({"scale": 2.0}, "other weights"),
    ],
)
def test_any_other_base_is_refused_with_both_named(tmp_path, other, words):
    (error,), _ = compare_fingerprints(folder(tmp_path / "ours"), folder(tmp_path / "theirs", **other))
    assert words in error and "trained on ours (2 layers" in error and "used on theirs (" in error


def test_damage_is_one_line(tmp_path):
    folder(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    with pytest.raises(ValueError, match=r"nowhere/config\.json: no such file"):
        base_fingerprint(tmp_path / "nowhere", "nowhere")
    weights.write_bytes(struct.pack("<Q", 10_000_000_000) + b"{}")
    with pytest.raises(ValueError, match="not a safetensors file"):
        base_fingerprint(tmp_path / "base", "base")
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 60]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="tensor x lies outside the file"):
        base_fingerprint(tmp_path / "base", "base")
    weights.unlink()
    with pytest.raises(ValueError, match="no language-model weights"):
        base_fingerprint(tmp_path / "base", "base")

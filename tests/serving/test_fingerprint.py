"""A base model is told from any other, and known again under another quantization."""

import json
import struct

import mlx.core as mx
import mlx_vlm
import pytest

from integration.lora_patch import fingerprint
from integration.lora_patch.fingerprint import base_fingerprint, compare_fingerprints


def folder(
    path, seed=0, layers=2, dtype=mx.bfloat16, prefix="model.language_model", quantized=False, scale=1.0, wide=False
):
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
    vision = "model.visual" if prefix.startswith("model") else "vision_tower"
    weights[f"{vision}.merger.weight"] = mx.random.normal((64, 64), key=mx.random.key(7)).astype(dtype)
    if wide:
        weights = {name: value.astype(mx.float32) for name, value in weights.items()}
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


def test_the_same_numbers_are_the_same_base_in_any_float_type_and_under_either_naming(tmp_path):
    half = folder(tmp_path / "bf16")
    wide = folder(tmp_path / "f32", wide=True, prefix="language_model.model")
    assert half["tensors"] == wide["tensors"] and half["weights"] != wide["weights"]
    assert compare_fingerprints(half, wide) == ([], [])


def test_a_base_that_mlx_vlm_has_converted_is_the_same(tmp_path, tiny_base):
    """It renames the tensors, turns the vision tower's convolution, and writes the tokenizer's files again."""
    mlx_vlm.convert(str(tiny_base), str(tmp_path / "mlx"))
    hub, mlx = base_fingerprint(tiny_base, "hub"), base_fingerprint(tmp_path / "mlx", "mlx")
    assert hub["tensors"] == mlx["tensors"] and compare_fingerprints(hub, mlx) == ([], [])


def change(path, name, at):
    """Change one number of a tensor in a model folder, far behind its first 4 KiB; the file's time is moved on."""
    weights = mx.load(str(path / "model.safetensors"))
    mx.eval(weights)  # before the file is written again
    values = weights[name].reshape(-1)
    values[at] = values[at] + 1
    weights[name] = values.reshape(weights[name].shape)
    mx.save_safetensors(str(path / "model.safetensors"), weights)


@pytest.mark.parametrize("name", ["model.language_model.layers.0.mlp.up_proj.weight", "model.visual.merger.weight"])
def test_a_number_changed_anywhere_is_another_base(tmp_path, name):
    before = folder(tmp_path / "base")
    change(tmp_path / "base", name, 4000)
    after = base_fingerprint(tmp_path / "base", "base")
    assert (before["norms"], before["weights"]) == (after["norms"], after["weights"])  # all that was looked at before
    assert "other weights" in compare_fingerprints(before, after)[0][0]


def test_tokenizer_template_and_image_settings_are_told_apart(tmp_path):
    from tests.sample.make_tiny_model import CHAT_TEMPLATE

    ours = folder(tmp_path / "base")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "added_tokens": []}
    files = {
        "tokenizer": ("tokenizer.json", json.dumps(tokenizer), "errors"),
        "chat template": ("chat_template.jinja", CHAT_TEMPLATE, "warnings"),
        "image settings": ("preprocessor_config.json", '{"patch_size": 16}', "warnings"),
    }
    for file, text, _ in files.values():
        (tmp_path / "base" / file).write_text(text)
    trained = base_fingerprint(tmp_path / "base", "base")
    assert compare_fingerprints(ours, trained) == ([], [])  # nothing recorded, nothing to compare
    tokenizer["model"]["merges"] = [["a", "b"]]  # as newer tokenizers write the same
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    assert compare_fingerprints(trained, base_fingerprint(tmp_path / "base", "base")) == ([], [])
    for words, (file, text, kind) in files.items():
        changed = {"patch_size": ("16", "14"), '"ab"': ('"ab": 2', '"ba": 2')}
        other = text + " {# other #}"
        for sign, (now, then) in changed.items():
            other = text.replace(now, then) if sign in text else other
        (tmp_path / "base" / file).write_text(other)
        errors, warnings = compare_fingerprints(trained, base_fingerprint(tmp_path / "base", "base"))
        (said,) = errors if kind == "errors" else warnings
        assert words in said
        (tmp_path / "base" / file).write_text(text)


def test_an_adapter_of_an_earlier_version_still_knows_its_base(tmp_path):
    """Its fingerprint has the first 4 KiB of each tensor alone."""
    new = folder(tmp_path / "base")
    old = {key: new[key] for key in ("name", "model_type", "shape", "architecture", "norms", "weights", "quantization")}
    assert compare_fingerprints(old, new) == ([], [])
    other = folder(tmp_path / "other", scale=2.0)
    assert "other weights" in compare_fingerprints(old, other)[0][0]


def test_a_fingerprint_is_computed_once(tmp_path, monkeypatch):
    first = folder(tmp_path / "base")
    monkeypatch.setattr(fingerprint, "_hash_weights", None)  # would raise, were it called
    assert base_fingerprint(tmp_path / "base", "base") == first
    monkeypatch.undo()
    change(tmp_path / "base", "model.language_model.layers.0.mlp.up_proj.weight", 0)
    assert base_fingerprint(tmp_path / "base", "base")["tensors"] != first["tensors"]
    fingerprint._cache_file().write_text("[")
    assert base_fingerprint(tmp_path / "base", "base")["norms"] == first["norms"]


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

"""The adapter folder: the names and config of both readers, read back by mlx-vlm, converted, checked and fused."""

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest
from click.testing import CliRunner

from common.errors import UserError
from common.files import write_json
from common.model.lora import attach_lora, lora_parameters
from common.model.tensors import save_tensors
from common.release.adapter import main
from common.training.adapter_files import adapter_config, peft_name, write_adapter
from integration.lora_patch.adapters import as_uniform, read_adapter
from integration.lora_patch.fingerprint import base_fingerprint
from integration.lora_patch.names import module_name
from integration.lora_patch.sources import adapter_in
from integration.lora_patch.vlm import Base, encode, load_base
from tests.evaluation_case import evaluate, make_data
from tests.lora import update_lora
from tests.sample import scenes

RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny_base):
    """The tiny base in 4 bits, as mlx-vlm converts it."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-4bit"
    mlx_vlm.convert(str(tiny_base), str(folder), quantize=True, q_bits=4, q_group_size=64)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_base):
    """(adapter folder, its tensors, its config): an update that changes the logits by whole units."""
    base = load_base(tiny_base)
    modules = attach_lora(base, RANK, ALPHA, 0.1)
    mx.random.seed(1)
    tensors = {name: 0.1 * mx.random.normal(tensor.shape) for name, tensor in lora_parameters(base.model).items()}
    config = adapter_config(str(tiny_base), modules, RANK, ALPHA, 0.1)
    folder = tmp_path_factory.mktemp("adapter") / "ansel"
    write_adapter(folder, tensors, config)
    write_json(folder / "training_args.json", {"base_fingerprint": base_fingerprint(tiny_base, str(tiny_base))})
    return folder, tensors, config


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the adapter, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def answer(base: Base, model) -> np.ndarray:
    """Return a model's logits for one photograph and prompt: float32 [L, V]."""
    photo = scenes.draw(scenes.random_scene(random.Random(2)), 128)
    example = encode(base, "What is there?", [photo], "A hill.")
    image = dict(pixel_values=mx.array(example.pixel_values), image_grid_thw=mx.array(example.image_grid_thw))
    return np.array(model(mx.array(example.input_ids)[None], **image).logits[0].astype(mx.float32))


def logits(path: Path, **options) -> np.ndarray:
    """Return what mlx-vlm itself, freshly loaded, answers."""
    return answer(load_base(path), mlx_vlm.load(str(path), **options)[0])


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# -- names and config -------------------------------------------------------------------------------------------------


def test_the_names_of_both_worlds():
    theirs = "base_model.model.model.language_model.layers.7.mlp.down_proj.lora_B.weight"
    ours = "language_model.model.layers.7.mlp.down_proj.lora_b"
    assert peft_name(ours) == theirs and module_name(theirs) == module_name(ours) == (ours.rpartition(".")[0], "b")


def test_the_config_serves_both_readers(made):
    folder, tensors, config = made
    assert json.loads((folder / "adapter_config.json").read_text()) == config
    assert {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "bias", "inference_mode")} == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    assert config["target_modules"] == (
        r"(.*\.)?language_model\.layers\.\d+\.(mlp\.down_proj|mlp\.gate_proj|mlp\.up_proj|"
        r"self_attn\.k_proj|self_attn\.o_proj|self_attn\.q_proj|self_attn\.v_proj)"
    )
    own = config["lora_parameters"]
    assert (own["rank"], own["scale"], own["dropout"]) == (4, 2.0, 0.1)
    assert {f"{key}.lora_{side}" for key in own["keys"] for side in "ab"} == set(tensors)


def test_the_same_tensors_give_the_same_files(made, tmp_path):
    folder, tensors, config = made
    write_adapter(tmp_path, dict(reversed(tensors.items())), config)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_half_precision_keeps_its_values(made, tmp_path):
    _, tensors, config = made
    half = {name: tensor.astype(mx.bfloat16) for name, tensor in tensors.items()}
    write_adapter(tmp_path, half, config)
    read, rank, scale = as_uniform(read_adapter(adapter_in(tmp_path)).layers)
    assert (rank, scale) == (RANK, ALPHA / RANK)
    assert all(read[name].dtype == mx.bfloat16 and mx.array_equal(read[name], half[name]) for name in half)


def test_one_that_is_half_written_is_no_adapter(made, tiny_base, tmp_path, monkeypatch):
    """A kill between the two weight files leaves a folder that neither reader takes."""
    _, tensors, config = made
    write_adapter(tmp_path / "cut", tensors, config)
    monkeypatch.setattr(
        "common.training.adapter_files._compare", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "cut", {name: 2 * tensor for name, tensor in tensors.items()}, config)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        mlx_vlm.load(str(tiny_base), adapter_path=str(tmp_path / "cut"))
    assert run("check", tmp_path / "cut").exit_code == 1


def test_what_reads_back_otherwise_is_noticed(made, tmp_path, monkeypatch):
    _, tensors, config = made
    changed = {name: tensor + (name.endswith("q_proj.lora_a")) for name, tensor in tensors.items()}
    monkeypatch.setattr(
        "common.training.adapter_files.save_tensors", lambda path, values, meta: save_tensors(path, changed, meta)
    )
    with pytest.raises(UserError, match="lora_a reads back changed"):
        write_adapter(tmp_path, tensors, config)
    with pytest.raises(UserError, match="name different modules"):
        write_adapter(tmp_path, tensors, config | {"lora_parameters": config["lora_parameters"] | {"keys": []}})


# -- mlx-vlm ----------------------------------------------------------------------------------------------------------


def test_mlx_vlm_loads_it_and_answers_like_the_trained_model(made, tiny_base):
    folder, tensors, _ = made
    base = load_base(tiny_base)
    attach_lora(base, RANK, ALPHA, 0.1)
    update_lora(base.model, tensors)
    plain, loaded = logits(tiny_base), logits(tiny_base, adapter_path=str(folder))
    assert np.abs(loaded - plain).max() > 0.5
    np.testing.assert_array_equal(loaded, answer(base, base.model))


# -- check and convert ------------------------------------------------------------------------------------------------


def test_check_says_what_is_there(made):
    folder, tensors, config = made
    result = run("check", folder)
    count = sum(tensor.size for tensor in tensors.values())
    modules = len(config["lora_parameters"]["keys"])
    assert result.exit_code == 0
    assert result.output == (
        f"{folder}: rank 4, scale 2, {modules} modules, {count:,} parameters, for PEFT and mlx-vlm alike\n"
    )


@pytest.mark.parametrize("gone", ["adapters.safetensors", "adapter_model.safetensors"])
def test_convert_completes_an_adapter_of_either_world(gone, made, copy, tmp_path):
    (copy / gone).unlink()
    only = {"adapters.safetensors": ("lora_parameters", "fine_tune_type", "num_layers")}
    config = json.loads((copy / "adapter_config.json").read_text())
    other = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
    for key in only.get(gone, other):
        del config[key]
    write_json(copy / "adapter_config.json", config)
    assert "for one of PEFT and mlx-vlm alone (see convert)" in run("check", copy).output
    result = run("convert", "--lora_path", copy, "--output_dir", tmp_path / "both")
    assert result.exit_code == 0, result.output
    for name in ("adapter_model.safetensors", "adapters.safetensors"):
        assert (tmp_path / "both" / name).read_bytes() == (made[0] / name).read_bytes()
    written = json.loads((tmp_path / "both/adapter_config.json").read_text())
    assert written["lora_parameters"] == made[2]["lora_parameters"]
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 8, made[2]["target_modules"])
    again = run("convert", "--lora_path", copy, "--output_dir", tmp_path / "both")
    assert again.exit_code == 1 and "not empty; name a new folder" in again.output


def change_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        write_json(path, json.loads(path.read_text()) | changes)

    return change


def change_tensor(folder):
    tensors = mx.load(str(folder / "adapters.safetensors"))
    name = sorted(tensors)[0]
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors | {name: tensors[name] + 1})


def drop_tensor(folder):
    (folder / "adapter_model.safetensors").unlink()
    tensors = mx.load(str(folder / "adapters.safetensors"))
    tensors.pop(sorted(tensors)[0])
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)


def cut(folder):
    path = folder / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


DAMAGED = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json beside"),
    "two adapters": (change_tensor, "hold different adapters; copy it again"),
    "half a pair": (drop_tensor, "A is missing"),
    "cut short": (cut, "lies outside the file"),
    "another rank": (change_config(r=8, lora_alpha=16, lora_parameters={"rank": 8, "scale": 2.0}), "rank 4, but"),
    "two scales": (change_config(lora_alpha=99), "lora_parameters.scale is 2 but lora_alpha / r is 24.75"),
    "no plain LoRA": (change_config(use_dora=True), "use_dora: not plain LoRA"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_adapter_is_named_in_one_line(name, copy):
    damage, message = DAMAGED[name]
    damage(copy)
    result = run("check", copy)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and message in result.output.replace("\n", " ")


# -- fuse -------------------------------------------------------------------------------------------------------------


def fuse(base: Path, adapter: Path, output: Path, *options: str):
    return run("fuse", "--base_model", base, "--lora_path", adapter, "--output_dir", output, *options)


def test_the_fused_model_answers_like_base_and_adapter(made, tiny_base, tmp_path):
    result = fuse(tiny_base, made[0], tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert f"{len(made[2]['lora_parameters']['keys'])} modules merged" in result.output
    expected = logits(tiny_base, adapter_path=str(made[0]))
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=2e-4)
    names = {path.name for path in tiny_base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


def test_a_quantized_base_is_fused_without_loss_in_16_bits(made, quantized, tmp_path):
    result = fuse(quantized, made[0], tmp_path / "wide", "--dequantize")
    assert result.exit_code == 0, result.output
    assert "the base is quantized otherwise than in training (unquantized then, 4-bit now)" in result.output
    assert "quantization" not in json.loads((tmp_path / "wide/config.json").read_text())
    expected = logits(quantized, adapter_path=str(made[0]))
    np.testing.assert_allclose(logits(tmp_path / "wide"), expected, atol=2e-3)


def test_a_quantized_base_can_stay_quantized_and_the_rounding_is_said(made, quantized, tmp_path):
    result = fuse(quantized, made[0], tmp_path / "narrow")
    assert result.exit_code == 0, result.output
    assert "quantizing the merged weights again changed the update by" in result.output
    before = {path.name: path.stat().st_size for path in quantized.glob("*.safetensors")}
    after = {path.name: path.stat().st_size for path in (tmp_path / "narrow").glob("*.safetensors")}
    assert before.keys() == after.keys()
    expected, plain = logits(quantized, adapter_path=str(made[0])), logits(quantized)
    got = logits(tmp_path / "narrow")
    assert np.linalg.norm(got - expected) < 0.5 * np.linalg.norm(plain - expected)


def test_another_base_is_refused(made, make_tiny_model, tmp_path):
    other = make_tiny_model(tmp_path / "other", "--seed", "3")
    result = fuse(other, made[0], tmp_path / "merged")
    assert result.exit_code == 1 and "has the same shape but other weights" in result.output
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_is_not_written_to(made, tiny_base, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = fuse(tiny_base, made[0], tmp_path)
    assert result.exit_code == 1 and "not empty; name a new folder" in result.output


def test_modules_that_the_base_lacks_are_named(made, tiny_base, tmp_path):
    folder, tensors, config = made
    moved = {name.replace("layers.0.", "layers.9."): tensor for name, tensor in tensors.items()}
    keys = sorted({name.rsplit(".", 1)[0] for name in moved})
    write_adapter(tmp_path / "far", moved, config | {"lora_parameters": config["lora_parameters"] | {"keys": keys}})
    result = fuse(tiny_base, tmp_path / "far", tmp_path / "merged")
    assert result.exit_code == 1
    assert "language_model.model.layers.9.self_attn.q_proj is not in the base model" in result.output
    assert "no training_args.json: that it belongs to this base cannot be checked" in result.output


# -- adapters of other software ---------------------------------------------------------------------------------------


@pytest.fixture
def irregular(made, tmp_path):
    """PEFT's rsLoRA with rank and alpha patterns, on one layer's q and v alone; (folder, its update by module)."""
    rng, tensors, deltas = np.random.default_rng(4), {}, {}
    for name, rank, alpha in (("self_attn.q_proj", 2, 6), ("self_attn.v_proj", 4, 8)):
        module = f"language_model.model.layers.1.{name}"
        inputs, outputs = (made[1][f"{module}.lora_{side}"].shape[axis] for side, axis in (("a", 0), ("b", 1)))
        a, b = (0.3 * rng.standard_normal(shape) for shape in ((rank, inputs), (outputs, rank)))
        prefix = f"base_model.model.model.language_model.layers.1.{name}"
        tensors |= {f"{prefix}.lora_A.weight": mx.array(a), f"{prefix}.lora_B.weight": mx.array(b)}
        deltas[module] = alpha / np.sqrt(rank) * b @ a
    folder = tmp_path / "theirs"
    folder.mkdir()
    tensors = {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6},
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    return folder, deltas


def test_convert_takes_every_adapter_that_the_service_reads(irregular, tiny_base, tmp_path):
    folder, deltas = irregular
    assert "rank 2, 4, scale 4, 4.24264, 2 modules" in run("check", folder).output
    result = run("convert", "--lora_path", folder, "--output_dir", tmp_path / "both")
    assert result.exit_code == 0, result.output
    written = read_adapter(adapter_in(tmp_path / "both"))
    assert written.layers.keys() == deltas.keys()
    for module, (a, b, scale) in written.layers.items():
        np.testing.assert_allclose(scale * np.array(a @ b).T, deltas[module], atol=1e-4)
    assert np.abs(logits(tiny_base, adapter_path=str(tmp_path / "both")) - logits(tiny_base)).max() > 0.01
    peft = mx.load(str(tmp_path / "both/adapter_model.safetensors"))
    assert {tensor.shape[0] for name, tensor in peft.items() if "lora_A" in name} == {4}


def test_fuse_takes_them_too(irregular, tiny_base, tmp_path):
    folder, _ = irregular
    assert run("convert", "--lora_path", folder, "--output_dir", tmp_path / "both").exit_code == 0
    assert fuse(tiny_base, folder, tmp_path / "merged").exit_code == 0
    expected = logits(tiny_base, adapter_path=str(tmp_path / "both"))
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=2e-4)


def test_evaluate_takes_them_too(irregular, tiny_base, tmp_path):
    _, val = make_data(tmp_path, 5, 1)
    where = ("--base_model", tiny_base, "--val_data", val, "--output_report", tmp_path / "report")
    result = evaluate("--lora_path", irregular[0], *where, "--max_tokens", 8, "--timing_examples", 0)
    assert result.exit_code in (1, 3, 4), result.output  # judged: a random adapter meets no gate
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"]["differences"]["candidate-base"]["loss.nats"]["value"] != 0


def test_an_older_mlx_vlm_s_adapter_is_converted_by_the_scale_that_is_named(made, tiny_base, tmp_path):
    """Names ending in .A and .B, and a config of rank and alpha, which may mean alpha or alpha / rank."""
    _, tensors, _ = made
    folder = tmp_path / "old"
    folder.mkdir()
    ending = {"lora_a": "A", "lora_b": "B"}
    old = {f"{name.rpartition('.')[0]}.{ending[name.rpartition('.')[2]]}": tensor for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), old)
    write_json(folder / "adapter_config.json", {"rank": RANK, "alpha": ALPHA})
    asked = run("convert", "--lora_path", folder, "--output_dir", tmp_path / "both")
    assert asked.exit_code == 1 and "--lora_scale 8 or 2" in asked.output and not (tmp_path / "both").exists()
    _, val = make_data(tmp_path, 5, 1)
    judged = evaluate("--lora_path", folder, "--base_model", tiny_base, "--val_data", val, "--max_tokens", 8)
    assert judged.exit_code == 1
    assert "convert it first with python -m common.release.adapter convert --lora_scale 8 or 2" in judged.output
    assert run("convert", "--lora_path", folder, "--output_dir", tmp_path / "both", "--lora_scale", 2).exit_code == 0
    read, rank, scale = as_uniform(read_adapter(adapter_in(tmp_path / "both")).layers)
    assert (rank, scale) == (RANK, 2.0) and all(mx.array_equal(read[name], tensors[name]) for name in tensors)

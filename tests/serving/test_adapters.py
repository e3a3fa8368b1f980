"""Adapters as the package reads them: of this and other software, hostile ones, sums, parity with training."""

import json
import math
import os
import struct
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image, ImageOps

from integration.lora_patch import hooks, photo
from integration.lora_patch.adapters import as_uniform, read_adapter
from integration.lora_patch.answering import Answering
from integration.lora_patch.arms import Breaker, job_of_request
from integration.lora_patch.base import check_base, read_base
from integration.lora_patch.calls import Call, sweep_photos
from integration.lora_patch.errors import LoraError
from integration.lora_patch.flags import flags
from integration.lora_patch.in_use import AdaptersInUse
from integration.lora_patch.jobs import Recorder
from integration.lora_patch.phrasebook import PHRASEBOOK, write_phrasebook
from integration.lora_patch.sources import Source, find_sources, unpromoted
from integration.lora_patch.switching import Use, make_switchable, switched_on
from integration.lora_patch.vlm import encode, load_base
from tests.sample.make_tree import sample_prompt
from tests.standin.running import linear_shapes, make_adapter, random_lora

ONE = "language_model.model.layers.0.self_attn.q_proj"
PEFT = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def source(*folders, version="v1", weights=None) -> Source:
    return Source(tuple(zip(folders, weights or [1.0] * len(folders), strict=True)), version)


@pytest.fixture
def adapter(tmp_path, tiny_base) -> Path:
    return make_adapter(tmp_path / "qwen3-vl-4b-lora-ansel", tiny_base, 1)


@pytest.fixture
def base(tiny_base):
    """A tiny model, freshly loaded: these tests change its layers' classes."""
    return mlx_vlm.load(str(tiny_base))


def logits(model, seed=0):
    tokens = mx.array(np.random.default_rng(seed).integers(0, 500, (1, 24)))
    return np.array(model(tokens).logits)


def save(folder: Path, tensors: dict, config: dict, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / name), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_adapter(model, adapter):
    make_switchable(model, adapter)
    with switched_on(Use(adapter)):
        return logits(model)


# -- photographs -------------------------------------------------------------------------------------------------------


def picture(kind: str, folder: Path) -> Path:
    rng = np.random.default_rng(3)
    grain = Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8))
    file = folder / "photo.jpg"
    if kind == "EXIF-rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        grain.resize((600, 400)).save(file, exif=exif)
    elif kind == "RGBA":
        image = grain.resize((300, 400)).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        file = folder / "photo.png"
        image.save(file)
    elif kind == "grayscale":
        grain.resize((200, 500)).convert("L").save(file)
    elif kind == "16-bit":
        file = folder / "photo.png"
        Image.fromarray(rng.integers(0, 65535, (90, 120), dtype=np.uint16)).save(file)
    else:
        grain.resize((4000, 3000)).save(file)
    return file


@pytest.mark.parametrize("kind", ["EXIF-rotated", "RGBA", "grayscale", "16-bit", "12 megapixels"])
def test_serving_sends_what_training_trained_on(kind, tmp_path, tiny_base, base, adapter, monkeypatch):
    """The ids and pixels that reach the model in the service, against what vlm.encode makes."""
    file = picture(kind, tmp_path)
    model, processor = base
    seen = []
    embed = model.get_input_embeddings
    model.get_input_embeddings = lambda ids, pixels=None, **more: (
        seen.append((ids, pixels, more)),
        embed(ids, pixels, **more),
    )[1]
    adapters = AdaptersInUse()
    adapters.table, adapters.mode = {"*": read_adapter(source(adapter))}, "fine_tuned"
    adapters.table["*"].breaker = Breaker(20, 1.0)
    make_switchable(model, adapters.table["*"])
    monkeypatch.setattr(hooks, "service", Answering(adapters, Recorder()))
    monkeypatch.setattr(flags, "use_fine_tuned", True)
    monkeypatch.setattr(flags, "fallback_on_invalid", False)
    hooks.choose("job", "ansel")
    prompt = mlx_vlm.apply_chat_template(processor, model.config, sample_prompt("ansel"), num_images=1)
    hooks.generation(mlx_vlm.generate)(model, processor, prompt, image=[str(file)], max_tokens=1, temperature=0.0)
    assert job_of_request.get().model_used == "fine_tuned"

    trained = encode(load_base(tiny_base), sample_prompt("ansel"), [photo.load_photo(file)])
    ids, pixels, more = seen[0]
    assert np.array_equal(np.array(ids)[0], trained.input_ids)
    assert np.array_equal(np.array(pixels), trained.pixel_values)
    assert np.array_equal(np.array(more["image_grid_thw"]), trained.image_grid_thw)


# -- adapters of this and of other software ----------------------------------------------------------------------------


def test_our_adapter_gives_what_mlx_vlm_gives_with_it(base, tiny_base, adapter):
    theirs, _ = mlx_vlm.load(str(tiny_base), adapter_path=str(adapter))
    theirs.eval()
    model, _ = base
    plain = logits(model)
    assert np.array_equal(with_adapter(model, read_adapter(source(adapter))), logits(theirs))
    assert np.array_equal(logits(model), plain)  # switched off again: to the last bit what it was


def test_the_layers_keep_names_weights_and_kind(base, adapter):
    model, _ = base
    before = {name: id(value) for name, value in tree_flatten(model.parameters())}
    read = read_adapter(source(adapter))
    make_switchable(model, read)
    make_switchable(model, read)
    assert {name: id(value) for name, value in tree_flatten(model.parameters())} == before
    assert all(isinstance(layer.mlp.up_proj, nn.Linear) for layer in model.language_model.model.layers)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base(base, tiny_base, adapter, bits):
    model, _ = base
    nn.quantize(model.language_model, group_size=32, bits=bits)
    plain = logits(model)
    read = read_adapter(source(adapter))
    changed = with_adapter(model, read)
    assert np.abs(changed - plain).max() > 0.1 and np.array_equal(logits(model), plain)


def peft_folder(folder: Path, tiny_base: Path, config: dict, rename=lambda name: name, modules=None) -> Path:
    """Write an adapter as PEFT alone does: no training_args.json, no file for mlx-vlm."""
    tensors = {}
    for name, tensor in random_lora(tiny_base, 1).items():
        module, side = name.rsplit(".lora_", 1)
        if modules and module.rsplit(".", 1)[1] not in modules:
            continue
        module = module.replace("language_model.model.layers", "base_model.model.model.language_model.layers")
        tensors[rename(f"{module}.lora_{side.upper()}.weight")] = mx.contiguous(tensor.T)
    return save(folder, tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}, "adapter_model.safetensors")


PEFT_ADAPTERS = {
    "plain, a list of modules": (
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        None,
    ),
    "a pattern": ({"target_modules": r".*language_model.*\.(self_attn|mlp)\.\w+_proj"}, None),
    "with the adapter's name": ({}, lambda n: n.replace(".weight", ".default.weight")),
    "names of older transformers": ({}, lambda n: n.replace("model.language_model.layers", "model.layers")),
}


@pytest.mark.parametrize("kind", PEFT_ADAPTERS)
def test_an_adapter_of_peft(kind, base, tmp_path, tiny_base, adapter):
    config, rename = PEFT_ADAPTERS[kind]
    other = peft_folder(tmp_path / "peft", tiny_base, config, rename or (lambda name: name))
    read = read_adapter(source(other))
    assert read.trained_on is None and read.ranks == [4]
    model, _ = base
    assert np.array_equal(with_adapter(model, read), with_adapter(model, read_adapter(source(adapter))))


def test_rank_stabilised_and_per_module_scales(tmp_path, tiny_base):
    folder = peft_folder(tmp_path / "rs", tiny_base, {"use_rslora": True, "alpha_pattern": {"layers.0.*q_proj": 2}})
    layers = read_adapter(source(folder)).layers
    assert layers[ONE][2] == 2 / math.sqrt(4)
    assert layers[ONE.replace("q_proj", "k_proj")][2] == 8 / math.sqrt(4)
    ranks = {"rank_pattern": {"self_attn.q_proj": 4}, "r": 4, "alpha_pattern": {"self_attn.q_proj": 16}}
    layers = read_adapter(source(peft_folder(tmp_path / "pattern", tiny_base, ranks))).layers
    assert layers[ONE][2] == 4.0 and layers[ONE.replace("q_proj", "v_proj")][2] == 2.0


@pytest.mark.parametrize(
    "config",
    [
        {"lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}},
        {"rank": 4, "alpha": 8, "dropout": 0.0},  # mlx-vlm's older form, its scale named by --lora_scale
    ],
)
def test_an_adapter_of_mlx_vlm(config, base, tmp_path, tiny_base, adapter):
    tensors = random_lora(tiny_base, 1)
    if "alpha" in config:
        tensors = {name.replace("lora_a", "A").replace("lora_b", "B"): value for name, value in tensors.items()}
    other = save(tmp_path / "mlx", tensors, config, "adapters.safetensors")
    model, _ = base
    expected = with_adapter(model, read_adapter(source(adapter)))
    assert np.array_equal(with_adapter(model, read_adapter(source(other), 2.0)), expected)


def test_the_scale_of_an_older_mlx_vlm_adapter_is_told_by_its_numbers_or_asked_for(tmp_path, tiny_base):
    """Before April 2026 mlx-vlm multiplied by alpha, later by alpha / rank; both wrote {"rank", "alpha"}."""
    tensors = {
        name.replace("lora_a", "A").replace("lora_b", "B"): value for name, value in random_lora(tiny_base, 1).items()
    }
    old = save(tmp_path / "old", tensors, {"rank": 4, "alpha": 0.1, "dropout": 0.0}, "adapters.safetensors")
    assert read_adapter(source(old)).layers[ONE][2] == 0.1
    either = save(tmp_path / "either", tensors, {"rank": 4, "alpha": 16}, "adapters.safetensors")
    with pytest.raises(LoraError, match="before April 2026 meant 16, later 4; say which with --lora_scale 16 or 4"):
        read_adapter(source(either))
    assert read_adapter(source(either), 16.0).layers[ONE][2] == 16.0
    assert read_adapter(source(old), 5.0).layers[ONE][2] == 0.1  # what a file tells holds


def test_ranks_and_scales_that_differ_are_brought_to_one(tmp_path, tiny_base, adapter):
    patterns = {"rank_pattern": {"q_proj": 2}, "r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 16, "k_proj": 3}}
    tensors = {}
    for name, value in random_lora(tiny_base, 1).items():
        module, side = name.rsplit(".lora_", 1)
        value = value if "q_proj" not in module else value[:, :2] if side == "a" else value[:2]
        peft = module.replace("language_model.model.layers", "base_model.model.model.language_model.layers")
        tensors[f"{peft}.lora_{side.upper()}.weight"] = mx.contiguous(value.T)
    layers = read_adapter(source(save(tmp_path / "p", tensors, patterns, "adapter_model.safetensors"))).layers
    uniform, rank, scale = as_uniform(layers)
    assert (rank, scale) == (4, 8.0) and len({layer[2] for layer in layers.values()}) == 3
    for module, (a, b, own) in layers.items():
        update = scale * (uniform[f"{module}.lora_a"] @ uniform[f"{module}.lora_b"])
        assert uniform[f"{module}.lora_a"].shape[1] == 4 and mx.allclose(update, own * (a @ b), rtol=1e-5, atol=1e-5)
    plain = read_adapter(source(adapter)).layers
    tensors, rank, scale = as_uniform(plain)
    assert (rank, scale) == (4, 2.0) and tensors[f"{ONE}.lora_b"] is plain[ONE][1]  # nothing to be brought to one


def test_two_weight_files_that_differ_are_refused(adapter, tmp_path, tiny_base):
    other = make_adapter(tmp_path / "other", tiny_base, 2)
    (adapter / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    with pytest.raises(LoraError, match="hold different adapters"):
        read_adapter(source(adapter))


def test_a_phrasebook_beside_the_weights_comes_with_the_adapter(adapter):
    assert read_adapter(source(adapter)).phrasebook is None
    write_phrasebook(adapter / PHRASEBOOK, [[1, 2, 3, 4, 5]])
    assert read_adapter(source(adapter)).phrasebook.after([1, 2])[0] == 3
    (adapter / PHRASEBOOK).write_bytes(b"no safetensors")
    with pytest.raises(LoraError, match="no phrasebook"):
        read_adapter(source(adapter))


def test_half_precision_is_kept(tmp_path, tiny_base):
    tensors = {name: value.astype(mx.bfloat16) for name, value in random_lora(tiny_base, 1).items()}
    folder = save(tmp_path / "half", tensors, {"lora_parameters": {"rank": 4, "scale": 2.0}}, "adapters.safetensors")
    a, _, _ = read_adapter(source(folder)).layers[ONE]
    assert a.dtype == mx.bfloat16 and mx.array_equal(a, tensors[f"{ONE}.lora_a"])


# -- sums --------------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_is_the_exact_sum_of_the_updates(tmp_path, tiny_base, base):
    folders = [
        make_adapter(tmp_path / "a", tiny_base, 1, rank=4),
        make_adapter(tmp_path / "b", tiny_base, 2, rank=3, alpha=9),
    ]
    both = read_adapter(source(*folders, weights=[0.7, -0.3]))
    one, two = (read_adapter(source(folder)) for folder in folders)
    assert both.ranks == [7]
    for module, (a, b, scale) in both.layers.items():
        parts = [weight * s * (x @ y) for weight, (x, y, s) in ((0.7, one.layers[module]), (-0.3, two.layers[module]))]
        assert mx.allclose(scale * (a @ b), parts[0] + parts[1], atol=1e-5)
    model, _ = base
    fused, _ = mlx_vlm.load(str(tiny_base))
    for name, module in fused.named_modules():
        if name in one.layers:
            update = sum(w * s * (x @ y) for w, (x, y, s) in ((0.7, one.layers[name]), (-0.3, two.layers[name])))
            module.weight = module.weight + update.T
    assert np.abs(with_adapter(model, both) - logits(fused)).max() < 2e-3


def test_a_weight_of_one_is_the_adapter_itself(tmp_path, tiny_base, base):
    folder = make_adapter(tmp_path / "a", tiny_base, 1)
    model, _ = base
    one = with_adapter(model, read_adapter(source(folder)))
    assert np.array_equal(with_adapter(model, read_adapter(source(folder, weights=[1.0]))), one)
    nothing = with_adapter(model, read_adapter(source(folder, weights=[0.0])))
    assert np.array_equal(nothing, logits(model))


# -- cost --------------------------------------------------------------------------------------------------------------


def test_switching_costs_microseconds_and_memory_grows_by_the_adapter_alone(tmp_path, tiny_base, base):
    model, _ = base
    mx.eval(model.parameters())
    folder = make_adapter(tmp_path / "a", tiny_base, 1, rank=32)
    mx.clear_cache()
    before = mx.get_active_memory()
    adapter = read_adapter(source(folder))
    make_switchable(model, adapter)
    grown = mx.get_active_memory() - before
    assert adapter.nbytes <= grown < adapter.nbytes + 4096 * 2 * len(adapter.layers)  # a page an array at most
    use = Use(adapter)
    started = time.perf_counter()
    for _ in range(1000):
        with switched_on(use):
            pass
    assert (time.perf_counter() - started) / 1000 < 100e-6


# -- hostile and broken adapters ---------------------------------------------------------------------------------------


def raw_safetensors(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def spoil_nan(folder, base):
    tensors = random_lora(base, 1)
    tensors[f"{ONE}.lora_a"] = mx.full((128, 4), float("nan"))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)


def spoil_half(folder, base):
    tensors = random_lora(base, 1)
    del tensors[f"{ONE}.lora_b"]
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)


def spoil_config(**changes):
    def spoil(folder, base):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return spoil


def write_weights(*arguments, **more):
    return lambda folder, base: raw_safetensors(folder / "adapters.safetensors", *arguments, **more)


def only_pickle(folder, base):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'echo hacked > /tmp/hacked'\ntR.")


def remove(name):
    return lambda folder, base: (folder / name).unlink()


def write(name, text):
    return lambda folder, base: (folder / name).write_text(text)


PEFT_ONLY = remove("adapters.safetensors")
HOSTILE = {
    "a header of 10 GB": (write_weights(b"{}", length=10 * 2**30), "a header of 10,737,418,240 bytes"),
    "a header that is no JSON": (write_weights(b"\xff" * 64), "damaged safetensors header"),
    "a deeply nested header": (write_weights(b"[" * 100_000), "damaged safetensors header"),
    "a header that is a list": (write_weights(b"[1, 2]"), "damaged safetensors header"),
    "a tensor outside the file": (
        write_weights({f"{ONE}.lora_a": {"dtype": "F32", "shape": [128, 4], "data_offsets": [0, 1 << 40]}}),
        "lies outside the file",
    ),
    "more elements than bytes": (
        write_weights({f"{ONE}.lora_a": {"dtype": "F32", "shape": [1 << 40, 4], "data_offsets": [0, 16]}}, b"\0" * 16),
        "do not make",
    ),
    "a negative side": (
        write_weights({f"{ONE}.lora_a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, b"\0" * 16),
        "not a matrix",
    ),
    "text for offsets": (
        write_weights({f"{ONE}.lora_a": {"dtype": "F32", "shape": [2, 2], "data_offsets": ["0", "16"]}}, b"\0" * 16),
        "damaged safetensors header",
    ),
    "integers": (
        write_weights({f"{ONE}.lora_a": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}}, b"\0" * 16),
        "not a matrix of F32, F16 or BF16",
    ),
    "an empty file": (write_weights(b"", length=0), "not a safetensors file"),
    "NaN": (spoil_nan, "holds NaN or infinity"),
    "half a pair": (spoil_half, "B is missing"),
    "no config": (remove("adapter_config.json"), "no adapter_config.json"),
    "a config that is no JSON": (write("adapter_config.json", "{"), "cannot be read as JSON"),
    "a nested config": (write("adapter_config.json", "[" * 100_000), "cannot be read as JSON"),
    "a config that is a list": (write("adapter_config.json", "[]"), "a JSON object was expected"),
    "a scale that is NaN": (spoil_config(lora_parameters={"rank": 4, "scale": float("nan")}), "not a number"),
    "scales that disagree": (spoil_config(lora_alpha=80), "lora_parameters.scale is 2 but lora_alpha / r is 20"),
    "a scale of 0": (spoil_config(lora_alpha=0, lora_parameters={"rank": 4, "scale": 0}), "the scale is 0"),
    "no alpha": (spoil_config(lora_alpha=None, lora_parameters=None), "lora_alpha is missing; add the one"),
    "steps of mlx-lm": (
        lambda folder, base: [
            (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors"),
            (folder / "adapter_model.safetensors").unlink(),
        ],
        "copy the step to use, such as 0000100_adapters.safetensors, to adapters.safetensors",
    ),
    "a rank that is wrong": (
        spoil_config(r=8, lora_alpha=16, lora_parameters={"rank": 8, "scale": 2.0}),
        "rank 4, but",
    ),
    "DoRA": (spoil_config(use_dora=True), "use_dora: not plain LoRA"),
    "pickle": (only_pickle, "pickle is never read"),
    "a damaged fingerprint": (
        write("training_args.json", '{"base_fingerprint": {"name": 1}}'),
        "base_fingerprint is damaged",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_adapter_is_refused_with_one_line(kind, adapter, tiny_base):
    spoil, expected = HOSTILE[kind]
    spoil(adapter, tiny_base)
    with pytest.raises(LoraError) as refused:
        read_adapter(source(adapter))
    assert expected in str(refused.value) and "\n" not in str(refused.value) and str(adapter) in str(refused.value)


def test_peft_tensors_that_its_config_leaves_out_are_refused(tmp_path, tiny_base):
    folder = peft_folder(tmp_path / "peft", tiny_base, {"target_modules": ["q_proj"]})
    with pytest.raises(LoraError, match="adapter_config.json leaves it out"):
        read_adapter(source(folder))
    only = peft_folder(tmp_path / "only", tiny_base, {"target_modules": ["q_proj"]}, modules=["q_proj"])
    assert set(read_adapter(source(only)).layers) == {m for m in linear_shapes(tiny_base) if m.endswith("q_proj")}


@pytest.mark.parametrize(
    "config", [{"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "layers"},
               {"layers_to_transform": [0], "layers_pattern": ["("]}, {"exclude_modules": ["k_proj"]},
               {"exclude_modules": r".*\.k_proj"}],
)  # fmt: skip
def test_what_else_a_config_of_peft_leaves_out_is_refused(config, tmp_path, tiny_base):
    with pytest.raises(LoraError, match="adapter_config.json leaves it out"):
        read_adapter(source(peft_folder(tmp_path / "peft", tiny_base, config)))


def test_an_adapter_on_one_layer_is_read(tmp_path, tiny_base):
    folder = peft_folder(tmp_path / "peft", tiny_base, {"layers_to_transform": [0]})
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    own = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), own)
    assert set(read_adapter(source(folder)).layers) == {m for m in linear_shapes(tiny_base) if ".layers.0." in m}


@pytest.mark.parametrize(
    "config",
    [{"init_lora_weights": name} for name in ("pissa_niter_4", "olora", "corda", "loftq")]
    + [{"alora_invocation_tokens": [5]}, {"layer_replication": [[0, 2]]}, {"lora_bias": True}, {"use_qalora": True}],
)
def test_what_is_more_than_an_update_of_the_untouched_base_is_refused(config, tmp_path, tiny_base):
    """Applied like plain LoRA, each would answer otherwise than where it was trained, without a word."""
    with pytest.raises(LoraError, match=next(iter(config))):
        read_adapter(source(peft_folder(tmp_path / "peft", tiny_base, config)))
    read_adapter(source(peft_folder(tmp_path / "plain", tiny_base, {"init_lora_weights": "gaussian"})))


def test_an_adapter_split_into_several_files(tmp_path, tiny_base):
    folder = peft_folder(tmp_path / "peft", tiny_base, {})
    whole = read_adapter(source(folder)).layers
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    (folder / "adapter_model.safetensors").unlink()
    for part in (1, 2):
        own = dict(sorted(tensors.items())[part - 1 :: 2])
        mx.save_safetensors(str(folder / f"adapter_model-0000{part}-of-00002.safetensors"), own)
    read = read_adapter(source(folder)).layers
    assert read.keys() == whole.keys()
    assert all(mx.array_equal(read[m][half], whole[m][half]) for m in whole for half in (0, 1))
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LoraError, match="1 files as adapter_model-00001-of-00002.safetensors, not all"):
        read_adapter(source(folder))


def test_shapes_of_another_model_are_refused_before_and_after_loading(tmp_path, tiny_base, base, adapter):
    read = read_adapter(source(adapter))
    a, b, scale = read.layers[ONE]
    read.layers[ONE] = (mx.zeros((64, 4)), b, scale)
    read.layers["language_model.model.layers.77.mlp.up_proj"] = (a, b, scale)
    with pytest.raises(LoraError, match=r"made for 64 -> 128, the served model has 128 -> 128 \(and 1 more\)"):
        make_switchable(base[0], read)
    with pytest.raises(LoraError, match=r"made for 64 -> 128"):
        check_base(read, read_base(str(tiny_base)))


def test_linear_layers_are_read_from_files_as_from_the_model(tiny_base, base, tmp_path):
    model, _ = base
    nn.quantize(model.language_model, group_size=32, bits=4)
    config = json.loads((tiny_base / "config.json").read_text()) | {"quantization": {"group_size": 32, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    for folder in (tiny_base, tmp_path):
        found = read_base(str(folder)).linear
        assert {name: found[name] for name in linear_shapes(tiny_base)} == linear_shapes(tiny_base)


def test_another_base_is_refused_naming_both(adapter, tiny_base):
    trained = json.loads((adapter / "training_args.json").read_text())
    other = trained["base_fingerprint"] | {
        "name": "Qwen/Qwen3-VL-8B-Instruct",
        "architecture": "0",
        "shape": "36 layers",
    }
    (adapter / "training_args.json").write_text(json.dumps({"base_fingerprint": other}))
    read = read_adapter(source(adapter))
    with pytest.raises(LoraError) as refused:
        check_base(read, read_base(str(tiny_base)))
    assert "Qwen/Qwen3-VL-8B-Instruct" in str(refused.value) and str(tiny_base) in str(refused.value)
    (adapter / "training_args.json").write_text(json.dumps({"base_fingerprint": trained["base_fingerprint"]}))
    assert check_base(read_adapter(source(adapter)), read_base(str(tiny_base))) == []


# -- which adapters ----------------------------------------------------------------------------------------------------


def found(lora_path=None, model_config=None) -> dict:
    sources, mode = find_sources(lora_path and str(lora_path), model_config and str(model_config))
    return {who: (s.version, [(folder.name, weight) for folder, weight in s.parts]) for who, s in sources.items()} | (
        {"mode": mode} if model_config else {}
    )


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A project folder with versions of two advisors; only names matter here."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "qwen3-vl-4b-lora-ansel",
        "qwen3-vl-4b-lora-ansel-v2",
        "qwen3-vl-4b-lora-ansel-v10",
        "qwen3-vl-4b-lora-weston",
    ):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "adapter_config.json").write_text("{}")
        (tmp_path / "models" / name / "adapters.safetensors").write_text("")
    for name in ("qwen3-vl-4b-lora-ansel-v11", "qwen3-vl-4b-lora-ansel-v2.replaced-1"):  # unfinished; set aside
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "adapters.safetensors").write_text("")
    (tmp_path / "models" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "config").mkdir()
    return tmp_path


def record(tree: Path, **changes) -> Path:
    folder = tree / "models" / "ansel"
    folder.mkdir(exist_ok=True)
    content = {
        "schema_version": 1,
        "advisor": "ansel",
        "version": "v2",
        "adapter": "../qwen3-vl-4b-lora-ansel-v2",
        "sha256": {},
        "history": [],
    }
    (folder / "deployed.json").write_text(json.dumps(content | changes))
    return folder / "deployed.json"


def test_what_a_lora_path_can_be(tree):
    one = "models/qwen3-vl-4b-lora-ansel"
    assert found(one) == {"*": ("v1", [("qwen3-vl-4b-lora-ansel", 1.0)])}
    assert found("models") == {} and unpromoted(tree / "models") == ["ansel", "weston"]  # none was put in use
    assert found(f"ansel={one},weston=models/qwen3-vl-4b-lora-weston") == {
        "ansel": ("v1", [("qwen3-vl-4b-lora-ansel", 1.0)]),
        "weston": ("v1", [("qwen3-vl-4b-lora-weston", 1.0)]),
    }
    mixed = f"{one}:0.7,{one}-v2:0.3"
    parts = [("qwen3-vl-4b-lora-ansel", 0.7), ("qwen3-vl-4b-lora-ansel-v2", 0.3)]
    name = "qwen3-vl-4b-lora-ansel:0.7+qwen3-vl-4b-lora-ansel-v2:0.3"
    assert found(mixed) == {"*": (name, parts)}
    both = found(f"Ansel={mixed},weston=models/qwen3-vl-4b-lora-weston")
    assert both == {"ansel": (name, parts), "weston": ("v1", [("qwen3-vl-4b-lora-weston", 1.0)])}
    record(tree)
    deployed = {"ansel": ("v2", [("qwen3-vl-4b-lora-ansel-v2", 1.0)])}
    assert found("models") == deployed and unpromoted(tree / "models") == ["weston"]
    assert found("models/ansel") == found("models/ansel/deployed.json") == deployed
    record(tree, adapter=None, version=None)  # everything taken back: the newest must not come in its place
    assert found("models/ansel") == found("models") == {} and unpromoted(tree / "models") == ["weston"]


def test_a_record_means_the_same_from_every_folder(tree, monkeypatch):
    expected = (tree / "models" / "qwen3-vl-4b-lora-ansel-v2").resolve()
    path = record(tree)
    for folder, named in (
        (tree, "models"),
        (tree / "models", "ansel"),
        (tree / "config", "../models/ansel/deployed.json"),
    ):
        monkeypatch.chdir(folder)
        sources, _ = find_sources(named, None)
        assert sources["ansel"].parts == ((expected, 1.0),), path


def test_an_advisor_with_a_dot_in_the_name_is_served(tree):
    """Such a name passed for a folder that training had set aside, and was served from none."""
    folder = tree / "models" / "qwen3-vl-4b-lora-mary.ellen"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapters.safetensors").write_text("")
    (tree / "models" / "mary.ellen").mkdir()
    (record(tree).parent / "deployed.json").rename(tree / "models" / "mary.ellen" / "deployed.json")
    written = json.loads((tree / "models" / "mary.ellen" / "deployed.json").read_text())
    written |= {"advisor": "mary.ellen", "version": "v1", "adapter": "../qwen3-vl-4b-lora-mary.ellen"}
    (tree / "models" / "mary.ellen" / "deployed.json").write_text(json.dumps(written))
    assert found("models") == {"mary.ellen": ("v1", [(folder.name, 1.0)])}
    assert found(f"Mary.Ellen={folder}") == found("models")


def test_a_folder_of_versions(tree):
    for name in ("v1", "v2", "v10"):
        (tree / "adapters" / "weston" / name).mkdir(parents=True)
        (tree / "adapters" / "weston" / name / "adapter_config.json").write_text("{}")
        (tree / "adapters" / "weston" / name / "adapter_model.safetensors").write_text("")
    assert found("adapters") == {} and unpromoted(tree / "adapters") == ["weston"]
    assert unpromoted(tree / "adapters" / "weston") == ["weston"]
    assert found("adapters/weston") == {} and found("adapters/weston/v2") == {"*": ("v2", [("v2", 1.0)])}


@pytest.mark.parametrize(
    ("lora_path", "expected"),
    [
        ("nowhere", "nowhere: no such adapter folder"),
        ("models/qwen3-vl-4b-lora-ansel/adapters.safetensors", "is a file; name the adapter's folder"),
        ("ansel=models/qwen3-vl-4b-lora-ansel,ansel=nowhere", "ansel is named twice"),
        ("models/qwen3-vl-4b-lora-ansel,models/qwen3-vl-4b-lora-weston", "has no weight; combine as a:0.7,b:0.3"),
        ("models:0.5,models/qwen3-vl-4b-lora-weston:0.5", "models is not one adapter"),
        (",", "--lora_path: empty"),
        ("models/notes", "neither an adapter nor a folder of adapters"),
    ],
)
def test_a_lora_path_that_cannot_be_followed(lora_path, expected, tree):
    with pytest.raises(LoraError, match=expected):
        found(lora_path)


def configure(tree: Path, **content) -> Path:
    path = tree / "config" / "model_config.json"
    path.write_text(json.dumps(content))
    return path


def test_model_config_names_models_and_the_active_one(tree):
    models = {
        "base": {"lora_path": None},
        "ansel_v2": {"lora_path": "models/qwen3-vl-4b-lora-ansel-v2", "advisor": "ansel"},
        "mix": {
            "lora_path": "./models/qwen3-vl-4b-lora-ansel:0.5,./models/qwen3-vl-4b-lora-weston:0.5",
            "version": "mix-1",
        },
    }
    config = configure(tree, models=models, active_model="ansel_v2")
    assert found(None, config) == {"ansel": ("v2", [("qwen3-vl-4b-lora-ansel-v2", 1.0)]), "mode": "fine_tuned"}
    assert found(None, configure(tree, models=models, active_model="base")) == {"mode": "base"}
    parts = [("qwen3-vl-4b-lora-ansel", 0.5), ("qwen3-vl-4b-lora-weston", 0.5)]
    assert found(None, configure(tree, models=models, active_model="mix")) == {
        "*": ("mix-1", parts),
        "mode": "fine_tuned",
    }
    assert found(None, record(tree)) == {"ansel": ("v2", [("qwen3-vl-4b-lora-ansel-v2", 1.0)]), "mode": "fine_tuned"}


@pytest.mark.parametrize(
    ("mode", "expected"), [("lora", "fine_tuned"), ("rag", "base"), ("ab_test", "ab_test"), (None, "fine_tuned")]
)
def test_the_later_form_of_a_model_config(mode, expected, tree):
    """As services of the family write it: model_id and adapter of each preset, the preset and mode in use below."""
    models = {
        "qwen3-4b": {"model_id": "Qwen/Qwen3-VL-4B-Instruct", "adapter": "./models/qwen3-vl-4b-lora-ansel-v2"},
        "plain": {"model_id": "Qwen/Qwen3-VL-4B-Instruct", "adapter": None},
    }
    defaults = {"model_preset": "qwen3-4b", "mode": mode}
    adapter = {"*": ("v2", [("qwen3-vl-4b-lora-ansel-v2", 1.0)])}
    assert found(None, configure(tree, models=models, defaults=defaults)) == adapter | {"mode": expected}
    defaults["model_preset"] = "plain"
    assert found(None, configure(tree, models=models, defaults=defaults)) == {"mode": "base"}
    with pytest.raises(LoraError, match="defaults.model_preset 'None' is none of qwen3-4b, plain"):
        found(None, configure(tree, models=models, defaults={}))


@pytest.mark.parametrize("path", ["../../../etc", "/etc", "models/../../..", "models/link", "ansel=../../x", "a\0b"])
def test_a_model_config_cannot_leave_its_folder(path, tree):
    (tree / "models" / "link").symlink_to("/etc")
    config = configure(tree, models={"evil": {"lora_path": path}}, active_model="evil")
    with pytest.raises(LoraError, match="lies outside|is no path"):
        found(None, config)
    with pytest.raises(LoraError, match="lies outside|is no path"):
        found(record(tree, adapter={"models/link": "../link"}.get(path, path.replace("ansel=", "../"))))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"models": {"a": {"lora_path": "models"}}, "active_model": "b"}, "active_model 'b' is none of a"),
        ({"models": [], "active_model": "b"}, "must name at least one model"),
        ({"models": {"a": {"lora_path": 7}}, "active_model": "a"}, "lora_path of a must be text"),
        ({"models": {"a": "models"}, "active_model": ["a"]}, "active_model"),
    ],
)
def test_a_broken_model_config(content, expected, tree):
    with pytest.raises(LoraError, match=expected):
        found(None, configure(tree, **content))


def test_a_deployed_adapter_must_be_the_one_that_was_deployed(tmp_path, tiny_base):
    import hashlib

    folder = make_adapter(tmp_path / "models" / "qwen3-vl-4b-lora-ansel-v2", tiny_base, 1)
    hashes = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapters.safetensors")
    }
    path = record(tmp_path, sha256=hashes)
    sources, _ = find_sources(str(path), None)
    assert read_adapter(sources["ansel"]).version == "v2"
    make_adapter(folder, tiny_base, 2)
    with pytest.raises(LoraError, match="not the file that was deployed"):
        read_adapter(sources["ansel"])
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(LoraError, match="adapters.safetensors, which was deployed, is missing"):
        read_adapter(sources["ansel"])


def test_photographs_are_prepared_in_memory_and_left_files_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    file = str(picture("12 megapixels", tmp_path))
    for given in (file, [file]):
        call = Call(mlx_vlm.generate, (None, None, "prompt", given), {})
        call.prepare_photo(300)
        assert [image.size for image in call.prepared] == [(300, 225)] and not os.listdir(tmp_path / "temp")
    own = Call(lambda image_path: None, (file,), {})  # a function of the service's is given a path, as it expects
    own.prepare_photo(300)
    assert Path(own.prepared).is_file() and isinstance(own.prepared, str)
    sweep_photos()
    assert Path(own.prepared).is_file()
    os.utime(own.prepared, (1, 1))
    sweep_photos()  # what a killed service left
    assert not os.listdir(tmp_path / "temp")


def test_exif_is_applied_to_a_picture_in_memory_too(tmp_path):
    file = picture("EXIF-rotated", tmp_path)
    with Image.open(file) as image:
        call = Call(lambda image: image, (image,), {})
        call.prepare_photo(300)
        call.use_photo(call.prepared)
        seen = call.args[0]
        call.use_photo(call.photo)
        assert seen.size == (200, 300) and call.args[0] is image
        assert seen.getpixel((0, 0)) == ImageOps.exif_transpose(image).resize(
            (200, 300), Image.Resampling.LANCZOS
        ).getpixel((0, 0))

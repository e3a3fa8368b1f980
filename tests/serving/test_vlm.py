"""Loading, tokens and the loss mask, the frozen features and LoRA, against mlx-vlm's own paths."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

from common.model.lora import attach_lora, lora_parameters
from integration.lora_patch.errors import LoraError
from integration.lora_patch.photo import load_photo
from integration.lora_patch.vlm import (
    LAYERS,
    TARGET_MODULES,
    adapter_of,
    decoder,
    encode,
    group_weights,
    load_base,
    prepare_row,
    special_tokens,
    use_adapter,
)
from tests.lora import update_lora

PROMPT = "You are ansel. Answer with one JSON object.\n\nAnalyze the provided image."
RESPONSE = '{"image_description":"Déjà vu: 3 trees","overall_score":7.5}'


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_loaded_base_is_frozen(base, tiny_base):
    assert base.path == tiny_base and base.name == str(tiny_base)
    assert base.config["model_type"] == "qwen3_vl"
    assert not tree_flatten(base.model.trainable_parameters()) and not base.model.training


def break_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def cut_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (break_config, "cannot be read as JSON"),
        (other_model, "model_type is 'llama'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tiny_base, tmp_path, damage, says):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    damage(folder)
    with pytest.raises(LoraError) as error:
        load_base(folder)
    assert says in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "plainname"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(LoraError, match="no model folder there"):
        load_base(name)


def test_grouping_the_weights_changes_no_value_and_holds_nothing_twice(tiny_base):
    """The modules' weights become views; the plain model's parameters are the file's, bit for bit."""
    base = load_base(tiny_base)
    weights = mx.load(str(tiny_base / "model.safetensors"))
    for i, (layer, groups) in enumerate(zip(base.model.layers, group_weights(base.model), strict=True)):
        for name in TARGET_MODULES:
            block, part = name.split(".")
            expected = weights[f"model.language_model.layers.{i}.{name}.weight"]
            assert mx.array_equal(layer[block][part].weight, expected)
        (((stacked,), packing),) = groups["qkv"]
        widths = [layer.self_attn[name].weight.shape[0] for name in ("q_proj", "k_proj", "v_proj")]
        assert stacked.shape[0] == sum(widths) and packing is None
    before = group_weights(base.model)[0]["qkv"][0][0][0]
    assert group_weights(base.model)[0]["qkv"][0][0][0] is before
    base.model.layers[0].self_attn.q_proj.weight = mx.zeros_like(base.model.layers[0].self_attn.q_proj.weight)
    assert not group_weights(base.model)[0]["qkv"][0][0][0][: widths[0]].any()  # a replaced weight is noticed


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(96, 128)], [(128, 64), (64, 96)], []])
def test_loss_mask_token_by_token(base, sizes):
    """The supervised tokens are the template's assistant turn: the response and its end of turn, nothing else."""
    photos = [photo(*size) for size in sizes]
    encoded = encode(base, PROMPT, photos, RESPONSE)
    tokenizer = base.processor.tokenizer
    ids, mask = encoded.input_ids, encoded.completion_mask
    assert ids.dtype == np.int32 and mask.dtype == bool and len(ids) == len(mask) == len(encoded)
    assert tokenizer.decode(ids[mask]) == RESPONSE + "<|im_end|>"
    assert [tokenizer.convert_ids_to_tokens(int(i)) for i in ids[mask]][-1] == "<|im_end|>"
    # One stretch at the end: every token before it is the prompt's, every one from it on is supervised.
    first = int(np.argmax(mask))
    assert mask[first:].all() and not mask[:first].any()

    # The template, given the whole conversation, writes the same text; only its newline after the turn is not trained.
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    whole = apply_chat_template(
        base.processor, base.config, messages, add_generation_prompt=False, num_images=len(photos)
    )
    placeholder = "<|image_pad|>"
    text = tokenizer.decode(ids)
    for grid in [] if encoded.image_grid_thw is None else encoded.image_grid_thw:
        text = text.replace(placeholder * (int(grid.prod()) // 4), placeholder, 1)
    assert text + "\n" == whole
    assert text.endswith(f"<|im_start|>assistant\n{RESPONSE}<|im_end|>")


def test_without_a_response_the_prompt_alone(base):
    with_response, without = encode(base, PROMPT, [photo(64, 64)], RESPONSE), encode(base, PROMPT, [photo(64, 64)])
    assert not without.completion_mask.any()
    np.testing.assert_array_equal(with_response.input_ids[: len(without)], without.input_ids)


NAMES = "<|im_end|> <|vision_start|> <|endoftext|> <|image_pad|>"


@pytest.mark.parametrize("place", ["prompt", "response"])
def test_names_of_special_tokens_in_a_text_are_text(base, place):
    plain = {"prompt": PROMPT, "response": RESPONSE}
    named = {**plain, place: f"{NAMES}{plain[place]}{NAMES}"}
    special = {base.processor.tokenizer.convert_tokens_to_ids(name) for name in special_tokens(base)}
    counts = []
    for texts in (plain, named):
        encoded = encode(base, texts["prompt"], [photo(64, 64)], texts["response"])
        counts.append([int(np.isin(encoded.input_ids, [one]).sum()) for one in sorted(special)])
        assert len(prepare_row(base, encoded).visual) == int(encoded.image_grid_thw.prod()) // 4
        text = base.processor.tokenizer.decode(encoded.input_ids)
        assert texts["prompt"] in text and text.endswith(f"assistant\n{texts['response']}<|im_end|>")
    assert counts[0] == counts[1]


def test_masked_spans_take_exactly_their_tokens_out_of_the_loss(base):
    start = RESPONSE.index("7.5")
    plain = encode(base, PROMPT, [photo(64, 64)], RESPONSE)
    masked = encode(base, PROMPT, [photo(64, 64)], RESPONSE, [(start, start + 3), (0, 2)])
    np.testing.assert_array_equal(masked.input_ids, plain.input_ids)
    gone = np.flatnonzero(plain.completion_mask & ~masked.completion_mask)
    assert not (masked.completion_mask & ~plain.completion_mask).any() and masked.completion_mask[-1]
    tokens = [base.processor.tokenizer.decode([token]) for token in plain.input_ids[gone]]
    assert tokens == ['{"image_description":"', "7.", "5"], "not the tokens that overlap the spans, or not them alone"


def test_image_tokens_of_a_12_megapixel_photo_are_bounded(base, tmp_path):
    """4000 x 3000 pixels: load_photo bounds the long side, the processor the rest."""
    path = tmp_path / "large.jpg"
    Image.new("RGB", (4000, 3000), "gray").save(path)
    picture = load_photo(path, 1024)
    assert max(picture.size) == 1024
    encoded = encode(base, PROMPT, [picture])
    tokens = int((encoded.input_ids == base.model.config.image_token_id).sum())
    assert tokens <= 1024 * 768 // 32**2
    assert tokens * 4 == len(encoded.pixel_values)


# -- the frozen features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(96, 128)], [(128, 64), (64, 96), (64, 64)]])
def test_features_equal_the_plain_path(base, sizes):
    """Image features, deepstack included, and position ids are those of mlx-vlm's own embedding of the example."""
    encoded = encode(base, PROMPT, [photo(*size, seed=i) for i, size in enumerate(sizes)], RESPONSE)
    row = prepare_row(base, encoded)
    plain = base.model.get_input_embeddings(
        mx.array(encoded.input_ids)[None],
        mx.array(encoded.pixel_values),
        image_grid_thw=mx.array(encoded.image_grid_thw),
    )
    np.testing.assert_array_equal(np.array(plain.inputs_embeds[0])[row.visual], np.array(row.features))
    assert (
        len(row.deepstack)
        == len(plain.deepstack_visual_embeds)
        == len(base.config["vision_config"]["deepstack_visual_indexes"])
    )
    for ours, theirs in zip(row.deepstack, plain.deepstack_visual_embeds, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))
    np.testing.assert_array_equal(np.array(plain.position_ids[:, 0]), row.position_ids)
    assert row.completion_mask is encoded.completion_mask


def test_cached_features_of_mlx_vlm_lose_the_deepstack(base):
    """Why the features are kept here: mlx-vlm's own cache of them gives other logits. If this fails, it was mended."""
    encoded = encode(base, PROMPT, [photo(96, 128)], RESPONSE)
    ids, pixels = mx.array(encoded.input_ids)[None], mx.array(encoded.pixel_values)
    grid = mx.array(encoded.image_grid_thw)
    plain = base.model(ids, pixels, image_grid_thw=grid).logits
    cached = base.model(ids, pixels, image_grid_thw=grid, cached_image_features=prepare_row(base, encoded).features)
    assert not mx.allclose(plain, cached.logits, atol=1e-4)


def test_text_alone_has_no_features(base):
    row = prepare_row(base, encode(base, PROMPT, [], RESPONSE))
    assert row.features is None and row.deepstack is None and len(row.visual) == 0
    np.testing.assert_array_equal(row.position_ids, np.tile(np.arange(len(row)), (3, 1)))


# -- LoRA -------------------------------------------------------------------------------------------------------------


def test_attaching_trains_the_adapter_alone(tiny_base):
    base = load_base(tiny_base)
    names = attach_lora(base, 4, 8, 0.1, seed=5)
    layers = len(base.model.layers)
    assert names == [f"{LAYERS}.{i}.{name}" for i in range(layers) for name in TARGET_MODULES]
    trainable = dict(tree_flatten(base.model.trainable_parameters()))
    values = lora_parameters(base.model)
    assert trainable.keys() == values.keys() == {f"{n}.{p}" for n in names for p in ("lora_a", "lora_b")}
    text = base.model.config.text_config
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    per_rank = (
        2 * (text.hidden_size + q) + 2 * (text.hidden_size + kv) + 3 * (text.hidden_size + text.intermediate_size)
    )
    assert sum(v.size for v in values.values()) == 4 * layers * per_rank
    for name, value in values.items():
        assert value.dtype == mx.float32
        if name.endswith("lora_b"):
            assert not value.any()
        else:
            assert 0.9 < mx.abs(value).max().item() * len(value) ** 0.5 <= 1
    adapter = adapter_of(base.model)
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.scale) == (4, 8, 0.1, 2.0)
    with pytest.raises(ValueError, match="already has an adapter"):
        attach_lora(base, 4, 8)


def test_the_seed_decides_the_adapter(tiny_base):
    def start(seed):
        base = load_base(tiny_base)
        attach_lora(base, 4, 8, seed=seed)
        return lora_parameters(base.model)

    first, again, other = start(1), start(1), start(2)
    assert all(mx.array_equal(again[name], value) for name, value in first.items())
    assert not any(mx.array_equal(other[name], value) for name, value in first.items() if name.endswith("lora_a"))


def test_unknown_target_modules_are_named(tiny_base):
    with pytest.raises(LoraError, match="lm_head.*choose from self_attn.q_proj"):
        attach_lora(load_base(tiny_base), 4, 8, target_modules=("lm_head",))


def test_switching_swaps_the_modules(tiny_base):
    base = load_base(tiny_base)
    attach_lora(base, 4, 8)
    values = lora_parameters(base.model)
    update_lora(base.model, {name: mx.ones_like(value) for name, value in values.items()})
    ids = mx.array([[5, 6, 7, 8]])
    adapted = base.model(ids).logits
    adapter = adapter_of(base.model)
    use_adapter(base, None)
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
    plain = load_base(tiny_base).model(ids).logits
    assert mx.array_equal(base.model(ids).logits, plain)
    use_adapter(base, adapter)
    assert mx.array_equal(base.model(ids).logits, adapted)
    assert not mx.allclose(adapted, plain)


def test_a_layer_is_described_as_the_config_says(base):
    config = json.loads((base.path / "config.json").read_text())["text_config"]
    spec = decoder(base.model).specs[0]
    assert (spec.heads, spec.kv_heads, spec.head_dim) == tuple(
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    assert dict(spec.widths)["down"] == (config["intermediate_size"], config["hidden_size"])
    assert spec.eps == config["rms_norm_eps"] and spec.lora == () and spec.rank == 0

"""Loss and LoRA gradients against mlx-vlm's own forward pass and automatic differentiation, float32, to 1e-5."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from PIL import Image

from common.model import kernels, layer, step
from common.model.lora import attach_lora, lora_parameters
from common.model.step import collate, loss_only, pack_lora, packed_loss_and_grads, unpack_lora
from integration.lora_patch.vlm import (
    TARGET_MODULES,
    Base,
    adapter_of,
    encode,
    load_base,
    prepare_row,
    use_adapter,
)
from tests.lora import loss_and_grads, update_lora

RESPONSES = ("0123456789" * 4, "A calm photograph. 7 8 9", "5" * 70)


def photos(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(sum(map(sum, sizes)))
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def adapted(folder, rank=4, dropout=0.0, modules=TARGET_MODULES) -> Base:
    """A base with an adapter whose B is not zero: a zero B would hide A's gradient."""
    base = load_base(folder)
    attach_lora(base, rank, 2 * rank, dropout, modules)
    values = lora_parameters(base.model)
    keys = iter(mx.random.split(mx.random.key(3), len(values)))
    update_lora(base.model, {n: 0.1 * mx.random.normal(v.shape, key=next(keys)) for n, v in values.items()})
    return base


def examples(base: Base) -> list:
    """Rows of different lengths: one photograph, two of different sizes, none."""
    pictures = [photos((96, 128)), photos((128, 64), (64, 96)), []]
    return [encode(base, "Look closely. " * (5 + 9 * i), p, RESPONSES[i]) for i, p in enumerate(pictures)]


def plain_loss(model: nn.Module, encoded: list) -> mx.array:
    """The sum over supervised tokens, by the plain model: vision tower, every logit, one example at a time."""
    total = mx.array(0.0)
    for e in encoded:
        ids = mx.array(e.input_ids)[None]
        image = {}
        if e.pixel_values is not None:
            image = dict(pixel_values=mx.array(e.pixel_values), image_grid_thw=mx.array(e.image_grid_thw))
        losses = nn.losses.cross_entropy(model(ids, **image).logits[0, :-1], ids[0, 1:])
        total = total + (losses * mx.array(e.completion_mask[1:])).sum()
    return total


def plain_grads(model: nn.Module, encoded: list) -> tuple[mx.array, dict[str, mx.array]]:
    values = lora_parameters(model)

    def loss(flat):
        update_lora(model, flat)
        return plain_loss(model, encoded)

    result = mx.value_and_grad(loss)(values)
    update_lora(model, values)
    mx.eval(result)
    return result


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert found[name].dtype == mx.float32 and found[name].shape == grad.shape
        error = mx.linalg.norm(found[name] - grad) / mx.linalg.norm(grad)
        assert error.item() < tolerance, f"{name}: {error.item():.1e}"


@pytest.fixture(scope="module")
def base(tiny_base):
    return adapted(tiny_base)


@pytest.fixture(scope="module")
def reference(base):
    """(encoded examples, their rows, the plain model's loss and gradients)"""
    encoded = examples(base)
    return encoded, [prepare_row(base, e) for e in encoded], *plain_grads(base.model, encoded)


# -- against the plain model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("multiple", [1, 128])
def test_batch_of_three(base, reference, checkpointing, multiple):
    """Padding, text beside one image and two images of different sizes, with and without checkpointing."""
    encoded, rows, expected, grads = reference
    loss, n, found = loss_and_grads(base.model, collate(base.model, rows, multiple), checkpointing=checkpointing)
    assert n == sum(int(e.completion_mask[1:].sum()) for e in encoded)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, grads)
    assert loss_only(base.model, collate(base.model, rows, multiple))[0].item() == pytest.approx(loss.item(), rel=1e-6)


def test_accumulation_equals_the_whole_batch(base, reference):
    _, rows, expected, grads = reference
    total, found, vector, packed = 0.0, None, pack_lora(base.model), None
    for row in rows:
        batch = collate(base.model, [row], 16)
        loss, _, found = loss_and_grads(base.model, batch, grads=found)
        packed = packed_loss_and_grads(base.model, batch, vector, grads=packed)[2]
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, grads)
    assert_same(unpack_lora(base.model, packed), grads)


def test_blocks_of_the_head_and_of_attention(base, reference, monkeypatch):
    """Block sizes that leave remainders: every path through the chunked head and the chunked attention."""
    _, rows, expected, grads = reference
    monkeypatch.setattr(step, "VOCAB_CHUNK", 700)
    monkeypatch.setattr(step, "ROW_CHUNK", 50)
    monkeypatch.setattr(layer, "CHUNK", 48)
    loss, _, found = loss_and_grads(base.model, collate(base.model, rows))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, grads)


@pytest.mark.parametrize("modules", [("self_attn.q_proj", "self_attn.v_proj"), ("self_attn.o_proj", "mlp.up_proj")])
def test_some_modules_only(tiny_base, modules):
    base = adapted(tiny_base, modules=modules)
    encoded = examples(base)[:1]
    expected, grads = plain_grads(base.model, encoded)
    batch = collate(base.model, [prepare_row(base, e) for e in encoded])
    loss, _, found = loss_and_grads(base.model, batch)
    assert len(found) == 2 * 2 * len(base.model.layers)  # A and B of two modules a layer
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, grads)


def quantized(base: Base, bits: dict[str, int]) -> None:
    """Quantize the language model, named projections with other bits than four."""

    def how(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 64, "bits": next((b for name, b in bits.items() if name in path), 4)}

    nn.quantize(base.model.language_model, class_predicate=how)


@pytest.mark.parametrize("bits", [{}, {"v_proj": 8, "down_proj": 8}])
def test_quantized_base(tiny_base, bits):
    """A 4-bit base, embedding and head included; and a mixed one, whose projections cannot be stacked."""
    base = load_base(tiny_base)
    quantized(base, bits)
    attach_lora(base, 4, 8)
    values = lora_parameters(base.model)
    update_lora(base.model, {n: 0.05 * mx.random.normal(v.shape, key=mx.random.key(i))
                             for i, (n, v) in enumerate(values.items())})  # fmt: skip
    encoded = examples(base)
    expected, grads = plain_grads(base.model, encoded)
    for checkpointing in (False, True):
        batch = collate(base.model, [prepare_row(base, e) for e in encoded])
        loss, _, found = loss_and_grads(base.model, batch, checkpointing=checkpointing)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert_same(found, grads)


def test_twenty_steps_follow_the_reference(tiny_base):
    """The loss of twenty steps of AdamW equals that of the plain model, automatic differentiation and mlx's AdamW."""
    base = load_base(tiny_base)
    attach_lora(base, 4, 8)
    encoded = examples(base)[:2]
    batch = collate(base.model, [prepare_row(base, e) for e in encoded])
    values, vector = lora_parameters(base.model), pack_lora(base.model)
    plain, ours = (mlx.optimizers.AdamW(1e-3, weight_decay=0.01, bias_correction=True) for _ in range(2))
    packed = {"lora": vector}
    for number in range(20):
        expected, grads = plain_grads(base.model, encoded)
        values = plain.apply_gradients({n: g / batch.n_tokens for n, g in grads.items()}, lora_parameters(base.model))
        update_lora(base.model, values)
        loss, n, grad = packed_loss_and_grads(base.model, batch, packed["lora"], checkpointing=number % 2 == 1)
        packed = ours.apply_gradients({"lora": grad / n}, packed)
        mx.eval(values, packed)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5), number
    assert loss.item() < 0.95 * plain_start(batch, base)


def plain_start(batch, base: Base) -> float:
    """The loss of the base alone, where an untrained adapter starts."""
    adapter = adapter_of(base.model)
    use_adapter(base, None)
    loss = loss_only(base.model, batch)[0].item()
    use_adapter(base, adapter)
    return loss


def test_bfloat16_stays_close(tiny_base, reference):
    """In bfloat16 the loss is within 0.5% of float32's and the whole gradient within 5%."""
    encoded, _, expected, grads = reference
    base = adapted(tiny_base)
    values = lora_parameters(base.model)
    base.model.set_dtype(mx.bfloat16)
    update_lora(base.model, values)
    batch = collate(base.model, [prepare_row(base, e) for e in encoded])
    loss, _, found = loss_and_grads(base.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    pairs = [(found[name].reshape(-1), grad.reshape(-1)) for name, grad in grads.items()]
    ours, plain = (mx.concatenate(side) for side in zip(*pairs, strict=True))
    assert (mx.linalg.norm(ours - plain) / mx.linalg.norm(plain)).item() < 0.05


def test_bfloat16_keeps_updates_below_its_rounding(tiny_base):
    """The first step's update, smaller than the rounding of the outputs, lowers the loss as it does in float32.

    A layer that rounds its output before it adds the update, as mlx-vlm's and PEFT's do, loses a good part of it.
    """
    base = load_base(tiny_base)
    for linear in (
        module for block in base.model.layers for module in (*block.self_attn.values(), *block.mlp.values())
    ):
        if isinstance(linear, nn.Linear):  # outputs about as large as those of a 4B model's layers
            linear.weight = (linear.weight * (2.0 * linear.weight.shape[1] ** -0.5 / linear.weight.std())).astype(
                mx.bfloat16
            )
    attach_lora(base, 16, 32)
    encoded = examples(base)[:1]
    start = lora_parameters(base.model)
    drops = {}
    for dtype in (mx.float32, mx.bfloat16):
        base.model.set_dtype(dtype)
        update_lora(base.model, start)
        batch = collate(base.model, [prepare_row(base, e) for e in encoded])
        before, _, grads = loss_and_grads(base.model, batch)
        update_lora(base.model, {n: v - 2e-4 * mx.sign(grads[n]) for n, v in start.items()})
        drops[dtype] = (before - loss_only(base.model, batch)[0]).item()
    assert drops[mx.bfloat16] == pytest.approx(drops[mx.float32], rel=0.1)


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_exactly_reproducible(tiny_base):
    """One seed: the same bits, with checkpointing and other padding the same masks. Another seed: another loss."""
    base = adapted(tiny_base, dropout=0.3)
    rows = [prepare_row(base, e) for e in examples(base)]
    vector = pack_lora(base.model)

    def run(seed, multiple=128, checkpointing=False):
        batch = collate(base.model, rows, multiple)
        loss, _, grads = packed_loss_and_grads(base.model, batch, vector, checkpointing=checkpointing, seed=seed)
        return np.array(loss), np.array(grads)

    (loss, grads), again, recomputed = run((1, 2)), run((1, 2)), run((1, 2), checkpointing=True)
    assert loss == again[0] == recomputed[0]
    np.testing.assert_array_equal(grads, again[1])
    np.testing.assert_allclose(grads, recomputed[1], rtol=1e-4, atol=1e-5 * np.abs(grads).max())
    np.testing.assert_allclose(run((1, 2), multiple=16)[0], loss, rtol=1e-6)
    assert abs(run((1, 3))[0] - loss) > 1e-4 * loss
    assert abs(run(None)[0] - loss) > 1e-4 * loss


def test_dropout_gradient_by_differences(tiny_base):
    """With its masks fixed by the seed, the loss is a plain function: its slope along a direction is the gradient's."""
    base = adapted(tiny_base, dropout=0.3)
    batch = collate(base.model, [prepare_row(base, e) for e in examples(base)])
    vector = pack_lora(base.model)
    _, _, grads = packed_loss_and_grads(base.model, batch, vector, seed=(7,))
    direction = grads / mx.linalg.norm(grads)

    def loss(t):
        return packed_loss_and_grads(base.model, batch, vector + t * direction, seed=(7,))[0].item()

    h = 4e-3
    slope = (loss(h) - loss(-h)) / (2 * h)
    assert slope == pytest.approx(mx.linalg.norm(grads).item(), rel=1e-3)


def test_dropout_mask_is_fair():
    """Each seed drops its share, rows and columns do not repeat, and what stays is scaled up."""
    rows = mx.arange(400, dtype=mx.uint32)
    masks = [np.array(kernels.dropout_mask(mx.array(s, mx.uint32), rows, 300, 0.05)) for s in (1, 2)]
    for mask in masks:
        assert mask.mean() == pytest.approx(0.95, abs=0.003)
        assert abs(np.corrcoef(mask[0::2].ravel(), mask[1::2].ravel())[0, 1]) < 0.01
        assert abs(np.corrcoef(mask[:, 0::2].ravel(), mask[:, 1::2].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(masks[0].ravel(), masks[1].ravel())[0, 1]) < 0.01
    kept = np.array(kernels.dropout(mx.ones((400, 300)), mx.array(1, mx.uint32), rows, 0.05))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.95)}


# -- the packed adapter -----------------------------------------------------------------------------------------------


def test_packing_is_lossless(base):
    values = lora_parameters(base.model)
    vector = pack_lora(base.model)
    assert vector.shape == (sum(v.size for v in values.values()),) and vector.dtype == mx.float32
    unpacked = unpack_lora(base.model, vector)
    assert list(unpacked) == list(values)
    assert all(mx.array_equal(unpacked[name], value) for name, value in values.items())
    assert mx.array_equal(pack_lora(base.model, unpacked), vector)


def test_initial_adapter_changes_nothing(tiny_base):
    """Before the first step base and base + adapter give the same logits to the bit, and the same loss."""
    base = load_base(tiny_base)
    encoded = examples(base)[0]
    image = dict(pixel_values=mx.array(encoded.pixel_values), image_grid_thw=mx.array(encoded.image_grid_thw))
    ids, row = mx.array(encoded.input_ids)[None], prepare_row(base, encoded)
    logits = base.model(ids, **image).logits
    loss = loss_only(base.model, collate(base.model, [row]))[0]
    attach_lora(base, 16, 32, dropout=0.05)
    assert mx.array_equal(base.model(ids, **image).logits, logits)
    assert loss_only(base.model, collate(base.model, [row]))[0].item() == loss.item()


def test_switching_the_adapter(base, reference):
    _, rows, expected, _ = reference
    batch = collate(base.model, rows)
    adapter = adapter_of(base.model)
    use_adapter(base, None)
    off = loss_only(base.model, batch)[0].item()
    use_adapter(base, adapter)
    assert loss_only(base.model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(off - expected.item()) > 1e-3 * off


# -- what a step computes ---------------------------------------------------------------------------------------------


def test_a_step_never_runs_the_vision_tower(base, reference, monkeypatch):
    _, rows, expected, _ = reference
    monkeypatch.setattr(base.model, "vision_tower", None)
    assert loss_and_grads(base.model, collate(base.model, rows))[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_untied_head(tmp_path, tiny_base):
    """A model whose output head is not the embedding."""
    import json

    folder = shutil.copytree(tiny_base, tmp_path / "untied")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(mx.load(str(folder / "model.safetensors")))
    embedding = weights["model.language_model.embed_tokens.weight"]
    weights["lm_head.weight"] = 0.05 * mx.random.normal(embedding.shape, key=mx.random.key(1))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    base = adapted(folder)
    encoded = examples(base)[:1]
    expected, grads = plain_grads(base.model, encoded)
    loss, _, found = loss_and_grads(base.model, collate(base.model, [prepare_row(base, e) for e in encoded]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, grads)

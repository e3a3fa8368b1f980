"""The optimizer, the order of the data and the weighting by tokens, held against independent computations."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from common.errors import UserError
from common.model.lora import attach_lora, lora_parameters
from common.model.step import collate, pack_lora, packed_loss_and_grads
from common.training import data_loader, memory
from common.training.distributed import Processes
from common.training.optimizer import AdamW, clip, learning_rate_at, warmup_within
from integration.lora_patch.photo import load_photo
from integration.lora_patch.vlm import Base, Row, encode, load_base
from tests.sample.make_tiny_model import random_model
from tests.training_sample import TRAIN, difference, log_of, train_here, write_dataset

PLAIN = ("--lora_dropout", 0, "--epochs", 2, "--learning_rate", 2e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with seven examples: batches of two leave one over; each test writes elsewhere."""
    return write_dataset(tmp_path_factory.mktemp("exact"))


# -- the steps --------------------------------------------------------------------------------------------------------


def reference_losses(folder: Path, base_folder: Path, batch: int, epochs: int, rate: float) -> list[float]:
    """Train with mlx-vlm's forward pass, nn.value_and_grad and mlx's AdamW, one example at a time, in plain code."""
    base = load_base(base_folder)
    attach_lora(base, 16, 32, 0.0)
    rows = [json.loads(line) for line in (folder / TRAIN).read_text().splitlines()]
    encoded = [encode(base, r["prompt"], [load_photo(folder / r["image_path"])], r["response"]) for r in rows]

    def summed_loss(model, example):
        ids = mx.array(example.input_ids)[None]
        image = dict(pixel_values=mx.array(example.pixel_values), image_grid_thw=mx.array(example.image_grid_thw))
        logits = model(ids, **image).logits[0, :-1]
        losses = nn.losses.cross_entropy(logits, ids[0, 1:])
        return (losses * mx.array(example.completion_mask[1:])).sum()

    optimizer = mlx.optimizers.AdamW(rate, weight_decay=0.01, bias_correction=True)
    losses, steps = [], -(-len(rows) // batch)
    for step in range(epochs * steps):
        order = data_loader.epoch_order(len(rows), step // steps, 0)[(step % steps) * batch :][:batch]
        tokens = sum(int(encoded[i].completion_mask[1:].sum()) for i in order)
        total, gradient = 0.0, None
        for i in order:
            loss, grads = nn.value_and_grad(base.model, summed_loss)(base.model, encoded[i])
            total += loss.item()
            gradient = grads if gradient is None else tree_map(mx.add, gradient, grads)
        gradient = tree_map(lambda g, tokens=tokens: g / tokens, gradient)
        norm = sum((g * g).sum().item() for _, g in tree_flatten(gradient)) ** 0.5
        gradient = tree_map(lambda g, norm=norm: g * min(1.0, 1.0 / (norm + 1e-6)), gradient)
        optimizer.learning_rate = rate * 0.5 * (1 + np.cos(np.pi * step / (epochs * steps)))
        optimizer.update(base.model, gradient)
        mx.eval(base.model.trainable_parameters())
        losses.append(total / tokens)
    return losses


def train_losses(adapter: Path) -> list[float]:
    return [row["loss"] for row in log_of(adapter) if row["kind"] == "train"]


def test_the_losses_are_those_of_mlx_vlms_forward_pass_and_mlx_adamw(data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    result = train_here(tiny_base, *PLAIN, "--batch_size", 3, "--output_dir", "reference")
    assert result.exit_code == 0, result.output
    expected = reference_losses(data, tiny_base, batch=3, epochs=2, rate=2e-3)
    assert len(expected) == 6 and expected[-1] < expected[0] - 0.2
    np.testing.assert_allclose(train_losses(Path("reference")), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        ("--batch_size", 2, "--gradient_accumulation_steps", 2),
        ("--batch_size", 1, "--gradient_accumulation_steps", 4),
        ("--batch_size", 4, "--micro_batch_size", 3),
        ("--batch_size", 4, "--grad_checkpointing", "on", "--pad_multiple", 64),
    ],
)
def test_the_same_global_batch_gives_the_same_adapter_however_it_is_laid_out(layout, data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    if not Path("four").exists():
        assert train_here(tiny_base, *PLAIN, "--batch_size", 4, "--output_dir", "four").exit_code == 0
    name = "four " + " ".join(map(str, layout))
    assert train_here(tiny_base, *PLAIN, *layout, "--output_dir", name).exit_code == 0
    np.testing.assert_allclose(train_losses(Path(name)), train_losses(Path("four")), rtol=1e-5)
    assert difference(Path(name), Path("four")) < 1e-3


def test_the_untrained_adapter_changes_nothing(data, tiny_base):
    base = load_base(tiny_base)
    row = json.loads((data / TRAIN).read_text().splitlines()[0])
    example = encode(base, row["prompt"], [load_photo(data / row["image_path"])], row["response"])
    image = dict(pixel_values=mx.array(example.pixel_values), image_grid_thw=mx.array(example.image_grid_thw))
    before = base.model(mx.array(example.input_ids)[None], **image).logits
    attach_lora(base, 16, 32, 0.05)
    after = base.model(mx.array(example.input_ids)[None], **image).logits
    assert mx.array_equal(before, after)
    assert all(
        (tensor != 0).any().item() == name.endswith("lora_a") for name, tensor in lora_parameters(base.model).items()
    )


# -- several processes ------------------------------------------------------------------------------------------------


def test_what_the_first_process_decides_all_do_and_it_alone_says_why_not(monkeypatch):
    told = []
    monkeypatch.setattr(Processes, "_text_from_first", lambda self, text: told.append(text) or told[0])

    def refused():
        raise UserError("no")

    assert [Processes(rank, 2).agreed(lambda: {"micro": 2}) for rank in (0, 1)] == [{"micro": 2}] * 2
    told.clear()
    with pytest.raises(UserError, match="no"):
        Processes(0, 2).agreed(refused)
    with pytest.raises(SystemExit) as end:
        Processes(1, 2).agreed(lambda: pytest.fail("only rank 0 decides"))
    assert end.value.code == 1


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("examples", "batch", "micro"), [(7, 2, 1), (12, 4, 4), (5, 8, 3), (1, 1, 1)])
def test_every_example_is_used_once_an_epoch(world, examples, batch, micro):
    lengths = [100 + 7 * (index % 5) for index in range(examples)]
    steps = data_loader.steps_per_epoch(examples, batch * world)
    for epoch in range(3):
        used = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            whole = []
            for rank in range(world):
                for group in data_loader.micro_batches(
                    lengths, step, 3, data_loader.Sharding(batch * world, micro, rank, world)
                ):
                    assert 0 < len(group) <= micro
                    whole += group
            assert sorted(whole) == sorted(
                data_loader.step_examples(examples, step, 3, data_loader.Sharding(batch * world, micro))
            )
            used += whole
        assert sorted(used) == list(range(examples))


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else():
    assert data_loader.epoch_order(50, 0, 1) == data_loader.epoch_order(50, 0, 1)
    orders = {data_loader.epoch_order(50, epoch, seed) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert data_loader.epoch_order(6, 0, 0) == (2, 0, 3, 5, 4, 1)  # the same on every machine, in every version


def test_warm_up_is_linear_at_most_a_tenth_and_the_cosine_ends_near_zero():
    assert [warmup_within(100, total) for total in (5, 90, 5000)] == [0, 9, 100]
    rates = [learning_rate_at(step, 100, 1.0, 10) for step in range(100)]
    np.testing.assert_allclose(rates[:11], [*np.arange(1, 11) / 10, 1.0], rtol=1e-12)
    np.testing.assert_allclose(rates[55], 0.5, rtol=1e-12)
    assert rates[-1] < 1e-3 and all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_adamw_is_mlx_adamw():
    mx.random.seed(0)
    values = mx.random.normal((64,))
    ours, theirs = AdamW(values, weight_decay=0.1), mlx.optimizers.AdamW(0.01, weight_decay=0.1, bias_correction=True)
    other = {"w": values}
    for _ in range(5):
        gradient = mx.random.normal((64,))
        ours.update(gradient, 0.01, mx.array(True))
        other = theirs.apply_gradients({"w": gradient}, other)
    np.testing.assert_allclose(np.array(ours.values), np.array(other["w"]), rtol=1e-5, atol=1e-6)
    state = [np.array(array) for array in ours.state().values()]
    ours.update(mx.full((64,), mx.nan), 0.01, mx.array(False))
    assert all((before == np.array(after)).all() for before, after in zip(state, ours.state().values(), strict=True))


def test_clipping_bounds_the_norm_and_reports_it():
    gradient, norm = clip(mx.array([3.0, 4.0]), 1.0)
    assert norm.item() == 5.0 and abs(mx.linalg.norm(gradient).item() - 1.0) < 1e-5
    gradient, _ = clip(mx.array([0.3, 0.4]), 1.0)
    assert gradient.tolist() == pytest.approx([0.3, 0.4])
    assert clip(mx.array([3.0, 4.0]), 0)[0].tolist() == [3.0, 4.0]


# -- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_estimated_peak_is_above_the_measured_and_not_far(checkpointing, bits, tiny_base):
    """What a step adds to what lies in memory already is estimated within 0.95 to 1.8 times."""
    config = json.loads((tiny_base / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 8192}
    config["vision_config"]["out_hidden_size"] = 256
    model = random_model(config, 0)
    if bits:
        nn.quantize(model.language_model, bits=bits, group_size=64)
    base = Base(model, None, config, tiny_base, "tiny")
    attach_lora(base, 8, 16, 0.05)
    length, pictured, supervised = 480, 96, 150
    row = Row(
        np.arange(length, dtype=np.int32),
        np.arange(length) >= length - supervised,
        np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)),
        np.arange(pictured, dtype=np.int32),
        mx.zeros((pictured, 256)),
        mx.zeros((2, pictured, 256)),
    )
    vector = pack_lora(model)
    mx.eval(vector, row.features, row.deepstack, model.parameters())
    before, _ = mx.get_active_memory(), mx.reset_peak_memory()
    mx.eval(packed_loss_and_grads(model, collate(model, [row], 16), vector, checkpointing=checkpointing, seed=(0,)))
    measured = mx.get_peak_memory() - before
    shape = memory.shape_of(model, 8, "cpu")
    plan = memory.estimate(shape, memory.Layout(1, checkpointing, 16, length), supervised)
    assert 0.95 < (plan.total - shape.weights) / measured < 1.8, (plan, measured)

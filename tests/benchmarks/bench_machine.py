"""Print what this machine needs for 100 photographs, as a row of README's table of machines.

    python tests/benchmarks/bench_machine.py                   # Qwen3-VL-4B's shape, 4-bit and 16-bit, random weights
    python tests/benchmarks/bench_machine.py --shape tiny      # a look at how it works, on any machine

Nothing is downloaded: speed and memory do not depend on the weights' values. Measured are a training step of one
example (1024x768 photograph, 2,642 tokens, 880 of them the response; rank 16 on all seven projections, the layout that
training itself chooses) and the decoding of an answer with the adapter. The time for 100 photographs is computed from
them: 80 examples three times, 20 held-out ones four times at a third of a step, the vision tower once for each.
The share of the limit needs the device's peak (--tflops, dense 16-bit): 4 operations for each weight and token, since
frozen weights need no gradient of their own.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from common.model.lora import attach_lora  # noqa: E402
from common.model.step import collate, pack_lora, packed_loss_and_grads  # noqa: E402
from common.training.memory import PAD_MULTIPLE, Layout, Planner, shape_of, size  # noqa: E402
from integration.lora_patch import vlm  # noqa: E402
from integration.lora_patch.engine import Engine, Request, prompt_row  # noqa: E402
from integration.lora_patch.memory import find_device  # noqa: E402
from tests.benchmarks import bench_generate  # noqa: E402

RESPONSE = {"tiny": 60, "4b": 880}  # tokens
TRAIN, HELD_OUT, EPOCHS = 80, 20, 3
STEPS, DECODED = 6, 96
RANK, ALPHA = 16, 32
HEADER = "| machine | base | fits | peak in training | tokens/s | of the limit | 100 photographs | one answer |"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--shape", type=click.Choice(["tiny", "4b"]), default="4b", show_default=True)
@click.option("--bits", type=click.Choice(["4", "16"]), multiple=True, default=("4", "16"), show_default=True)
@click.option("--tflops", type=float, help="the device's dense 16-bit peak, for the share of it that training reaches")
def main(shape: str, bits: tuple[str, ...], tflops: float | None) -> None:
    click.echo(HEADER + "\n|" + " --- |" * 8)
    for width in bits:
        click.echo(measured(shape, int(width), tflops))
        mx.clear_cache()


def measured(shape: str, bits: int, tflops: float | None) -> str:
    """Return the table's row for a base of ``bits`` bits a weight."""
    base, device = bench_generate.random_base(bench_generate.SHAPES[shape]), find_device()
    device = replace(device, offers=device.offers + mx.get_active_memory()) if device.backend == "cuda" else device
    if bits == 4:
        nn.quantize(base.model.language_model, 64, 4)
        mx.eval(base.model.parameters())
        vlm.group_weights(base.model)
    encoded = example(shape, base)
    for _ in range(2):  # the first compiles kernels
        started = time.perf_counter()
        row = vlm.prepare_row(base, encoded)
        vision = time.perf_counter() - started
    attach_lora(base, RANK, ALPHA)
    shape_there = shape_of(base.model, RANK, device.backend)
    base.model.vision_tower = None  # as in training, once the photographs' features are known
    name = f"| {device.name}, {size(device.offers)} | {bits}-bit, {size(shape_there.weights)} |"
    plan = Planner(shape_there, device, [len(row)], [targets_of(row)], PAD_MULTIPLE[device.backend], 1).fit()
    if plan is None:
        return f"{name} no | - | - | - | - | - |"
    step, peak = train(base, row, plan.layout)
    answer = decode(base, row, RESPONSE[shape])
    whole = TRAIN * EPOCHS * step + (EPOCHS + 1) * HELD_OUT * step / 3 + (TRAIN + HELD_OUT) * vision
    how = "yes, checkpointing" if plan.layout.checkpointing else "yes"
    share = f"{operations(base, row) / step / tflops / 1e12:.0%}" if tflops else "-"
    return f"{name} {how} | {size(peak)} | {len(row) / step:,.0f} | {share} | {whole / 60:.1f} min | {answer:.1f} s |"


def example(shape: str, base: vlm.Base) -> vlm.Encoded:
    """Return an encoded example: photograph, prompt, response."""
    encoded = bench_generate.photo(bench_generate.SHAPES[shape], base, 0)
    vocabulary = bench_generate.SHAPES[shape]["text"]["vocab_size"]
    response = np.random.default_rng(1).integers(20, vocabulary, RESPONSE[shape]).astype(np.int32)
    ids = np.concatenate([encoded.input_ids, response])
    return replace(encoded, input_ids=ids, completion_mask=np.arange(len(ids)) >= len(ids) - len(response))


def train(base: vlm.Base, row: vlm.Row, layout: Layout) -> tuple[float, int]:
    """Return (seconds of a step, median after the first two; peak bytes)."""
    optimizer, values, seconds = AdamW(2e-4), {"lora": pack_lora(base.model)}, []
    mx.eval(values)
    mx.clear_cache()
    mx.reset_peak_memory()
    for number in range(STEPS):
        started = time.perf_counter()
        batch = collate(base.model, [row], layout.multiple)
        loss, tokens, gradients = packed_loss_and_grads(
            base.model, batch, values["lora"], checkpointing=layout.checkpointing, seed=(0, number)
        )
        values = optimizer.apply_gradients({"lora": gradients / tokens}, values)
        mx.eval(values, optimizer.state, loss)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]), mx.get_peak_memory()


def decode(base: vlm.Base, row: vlm.Row, tokens: int) -> float:
    """Return the seconds of an answer of ``tokens`` tokens with the adapter, computed from a shorter one's."""
    vlm.use_adapter(base, None)
    engine, adapter = Engine(base), bench_generate.random_adapter(base, RANK)
    request = Request(prompt_row(row), "one")
    for _ in range(2):  # the first compiles kernels
        started, times = time.perf_counter(), []
        for number, _ in enumerate(engine.stream(request, DECODED, adapter, drafting=False)):
            times.append(time.perf_counter() - started)
            if number + 1 == DECODED:
                break
    return times[0] + (times[-1] - times[0]) / (len(times) - 1) * (tokens - 1)


def targets_of(row: vlm.Row) -> int:
    """Return the tokens that the loss counts."""
    return int(row.completion_mask[1:].sum())


def operations(base: vlm.Base, row: vlm.Row) -> float:
    """Return the multiplications and additions of a step, attention aside: 4 for each weight and token."""
    text = base.model.language_model.args
    head = text.head_dim
    q, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = text.hidden_size * (2 * q + 2 * kv + 3 * text.intermediate_size)
    return 4 * (text.num_hidden_layers * layer * len(row) + text.vocab_size * text.hidden_size * targets_of(row))


if __name__ == "__main__":
    main()

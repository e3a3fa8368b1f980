"""Hold the decoding kernel against plain MLX operations on an NVIDIA GPU, and time its steps.

    python tests/benchmarks/check_decode.py                  # two layers of Qwen3-VL-4B's width: right or wrong
    python tests/benchmarks/check_decode.py --layers 36      # and how fast
    python tests/benchmarks/check_decode.py --layers 36 --bits 4

Both run the same tokens over the same prompts: single steps of three rows, several tokens of each, then several of one
row; some are taken back. Prints the relative difference of the logits, 0.01 in bfloat16; exits with 1 above 0.03.
"""

import sys
import time
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from integration.lora_patch import vlm  # noqa: E402
from integration.lora_patch.decode_kernel import KernelBatch  # noqa: E402
from integration.lora_patch.engine import Engine  # noqa: E402
from integration.lora_patch.language_model import Batch  # noqa: E402
from tests.benchmarks import bench_generate as bench  # noqa: E402

LARGEST = 0.03


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--layers", default=2, show_default=True)
@click.option("--bits", type=click.Choice(["16", "4"]), default="16", show_default=True)
@click.option("--rank", default=16, show_default=True)
def main(layers: int, bits: str, rank: int) -> None:
    shape = dict(bench.SHAPES["4b"])
    shape["text"] = shape["text"] | {"num_hidden_layers": layers}
    base = bench.random_base(shape)
    if bits == "4":
        nn.quantize(base.model.language_model, 64, 4)
        mx.eval(base.model.parameters())
    engine, adapter = Engine(base), bench.random_adapter(base, rank)
    if engine.kernel_refusal:
        raise click.ClickException(f"no kernel here: {engine.kernel_refusal}")
    rows = [vlm.prepare_row(base, bench.photo(shape, base, number)) for number in range(8)]
    worst, copies = 0.0, engine.model.copies
    for arm, chosen, merged in (("base", None, False), ("adapter", adapter, False), ("adapter", adapter, True)):
        engine._ready.clear()
        engine.model.copies = lambda update, _, room=(1 << 60) * merged: copies(update, room)
        prepared, way, lora = engine._prepared(chosen)
        error = difference(engine, prepared, lora, rows)
        worst = max(worst, error)
        click.echo(f"{arm}, {way}: logits differ by {error:.4f}; " + timed(engine, prepared, lora, rows))
    raise SystemExit(worst > LARGEST)


def difference(engine: Engine, layers: list, lora: tuple, rows: list) -> float:
    """Return the largest relative difference of the kernel's logits from those of plain operations."""
    plain, fast, rng = (
        Batch(engine.model, layers),
        KernelBatch(engine.kernel, layers, lora, 3),
        np.random.default_rng(0),
    )
    for row in rows[:3]:
        plain.admit(row)
        fast.admit(row)
    worst = 0.0

    def compare(wanted: mx.array, found: mx.array) -> None:
        nonlocal worst
        wanted, found = wanted.astype(mx.float32), found.astype(mx.float32)
        worst = max(worst, float(mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)))

    for _ in range(4):
        tokens = mx.array(rng.integers(0, engine.vocabulary, 3).astype(np.int32))
        compare(plain.step(tokens, True)[1], fast.step(tokens, True)[1])
    tokens = rng.integers(0, engine.vocabulary, (3, 4)).tolist()
    compare(plain.verify(tokens, True)[1], fast.verify(tokens, True)[1])
    for batch in (plain, fast):
        batch.take_back([3, 0, 1])
    tokens = mx.array(rng.integers(0, engine.vocabulary, 3).astype(np.int32))
    compare(plain.step(tokens, True)[1], fast.step(tokens, True)[1])
    plain.keep([1])
    fast.keep([1])
    for width, back in ((7, 3), (2, 0)):
        tokens = rng.integers(0, engine.vocabulary, (1, width)).tolist()
        compare(plain.verify(tokens, True)[1], fast.verify(tokens, True)[1])
        plain.take_back([back])
        fast.take_back([back])
    return worst


def timed(engine: Engine, layers: list, lora: tuple, rows: list) -> str:
    """Return what single steps, a pass of eight tokens and a batch of eight rows take."""
    batch = KernelBatch(engine.kernel, layers, lora, 1)
    batch.admit(rows[0])
    single = [steps(batch, 1) for _ in range(2)][1]
    several = [passes(batch) for _ in range(2)][1]
    batch = KernelBatch(engine.kernel, layers, lora, 8)
    for row in rows:
        batch.admit(row)
    eight = [steps(batch, 8) for _ in range(2)][1]
    return f"a step {single * 1e3:.3f} ms, a pass of 8 {several * 1e3:.3f} ms, 8 rows {eight * 1e3:.3f} ms"


def passes(batch: KernelBatch, count: int = 16) -> float:
    """Return the seconds of a pass of eight tokens, read one by one as drafts are."""
    start = time.perf_counter()
    for _ in range(count):
        batch.verify([[1] * 8], False)[0].tolist()
        batch.take_back([7])
    return (time.perf_counter() - start) / count


def steps(batch: KernelBatch, rows: int, count: int = 96) -> float:
    """Return the seconds of a step, tokens read eight at a time as the engine does."""
    tokens = mx.array([5] * rows, mx.int32)
    mx.eval(tokens)
    mx.synchronize()
    start = time.perf_counter()
    for _ in range(count // 8):
        chain = []
        for _ in range(8):
            tokens, _ = batch.step(tokens, False)
            chain.append(tokens)
        mx.stack(chain).tolist()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()

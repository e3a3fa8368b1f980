"""Check and time what a CUDA device runs differently: the kernels of common/model/kernels.py and the fused attention.

    python tests/benchmarks/bench_kernels.py
    python tests/benchmarks/bench_kernels.py --tokens 512

Runs each on random bfloat16 values of the 4B model's shapes and compares it with the plain MLX operations in float32.
Prints the relative errors (bfloat16's rounding is 0.002) and the time of a call; exit code 1 if one is above 0.01.
On a device without CUDA the plain operations are compared with themselves in float32. Reads and writes no files.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from common.model import kernels, layer  # noqa: E402

HIDDEN, INNER, HEADS, KV, WIDTH, EPS = 2560, 9728, 32, 8, 128, 1e-6
LIMIT = 0.01


@click.command()
@click.option("--tokens", default=2688, show_default=True, help="Rows; a multiple of 128 for the fused attention.")
@click.option("--repeat", default=50, show_default=True, help="Timed calls of each.")
def main(tokens: int, repeat: int) -> None:
    """Check and time the CUDA kernels against plain MLX operations."""
    worst = 0.0
    for name, function, arguments in cases(tokens):
        errors = compare(function, arguments)
        worst = max(worst, *errors)
        shown = " ".join(f"{error:.1e}" for error in errors)
        click.echo(f"{name:24s} {time_of(function, arguments, repeat) * 1e6:8.1f} us   relative errors {shown}")
    if worst > LIMIT:
        raise click.ClickException(f"a relative error of {worst:.1e} is above {LIMIT}")


def cases(n: int) -> list[tuple[str, Callable, list[mx.array]]]:
    """Return (name, function, bfloat16 arguments) of everything that is checked."""
    mx.random.seed(0)

    def draw(*shape):
        return mx.random.normal(shape).astype(mx.bfloat16)

    angles = mx.random.uniform(0, 6, (1, n, 1, 1, WIDTH // 2))
    cos = mx.concatenate([mx.cos(angles)] * 2, axis=3).astype(mx.bfloat16)
    sin = mx.concatenate([-mx.sin(angles), mx.sin(angles)], axis=3).astype(mx.bfloat16)
    qkv, norms = draw(n, (HEADS + 2 * KV) * WIDTH), (draw(WIDTH), draw(WIDTH))
    grads = [draw(n, heads * WIDTH) for heads in (HEADS, KV, KV)]
    rows, seed = mx.arange(n, dtype=mx.uint32), mx.array(7, mx.uint32)
    # as the step has them: views of [B, L, H, d]
    q, k, v, do = (draw(1, n, heads, WIDTH).transpose(0, 2, 1, 3) for heads in (HEADS, KV, KV, HEADS))

    def heads(qkv, qn, kn, cos, sin):
        return kernels.heads(qkv, (qn, kn), (cos, sin), EPS, HEADS, KV)

    def heads_vjp(qkv, qn, kn, cos, sin, *grads):
        return kernels.heads_vjp(qkv, (qn, kn), (cos, sin), EPS, grads)

    def attention_vjp(q, k, v, do):
        return layer.attention_vjp(q, k, v, do, layer.fused_backward(q.dtype, WIDTH, n))

    return [
        ("swiglu", kernels.swiglu, [draw(n, 2 * INNER)]),
        ("swiglu_vjp", kernels.swiglu_vjp, [draw(n, 2 * INNER), draw(n, INNER)]),
        (
            "norm_vjp",
            lambda x, w, dy: kernels.norm_vjp(x, w, EPS, dy),
            [draw(n, HIDDEN), draw(HIDDEN), draw(n, HIDDEN)],
        ),
        (
            "norm_vjp and residual",
            lambda x, w, dy, r: kernels.norm_vjp(x, w, EPS, dy, r),
            [draw(n, HIDDEN), draw(HIDDEN), draw(n, HIDDEN), draw(n, HIDDEN)],
        ),
        (
            "heads",
            lambda qkv, qn, kn, cos, sin: kernels.heads(qkv, (qn, kn), (cos, sin), EPS, HEADS, KV),
            [qkv, *norms, cos, sin],
        ),
        ("heads_vjp", heads_vjp, [qkv, *norms, cos, sin, *grads]),
        ("dropout", lambda x: kernels.dropout(x, seed, rows, 0.05), [draw(n, INNER)]),
        ("attention", layer.attention, [q, k, v]),
        ("attention_vjp", attention_vjp, [q, k, v, do]),
    ]


def compare(function: Callable, arguments: list[mx.array]) -> list[float]:
    """Return the relative error of each result against the same in float32, which the kernels leave to MLX."""
    found = as_list(function(*arguments))
    exact = as_list(function(*(a.astype(mx.float32) for a in arguments)))
    return [
        (mx.linalg.norm(f.astype(mx.float32) - e) / mx.linalg.norm(e)).item()
        for f, e in zip(found, exact, strict=True)
    ]  # fmt: skip


def time_of(function: Callable, arguments: list[mx.array], repeat: int) -> float:
    """Return the seconds of a call in a chain of calls, each waiting for the one before."""
    seconds = []
    for _ in range(3):
        previous, start = None, time.perf_counter()
        for _ in range(repeat):
            given = list(arguments)
            if previous is not None:
                given[0] = mx.depends(given[0], previous)
            previous = as_list(function(*given))
        mx.eval(previous)
        seconds.append((time.perf_counter() - start) / repeat)
    return min(seconds)


def as_list(result) -> list[mx.array]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


if __name__ == "__main__":
    main()

"""Measure how often the intervals of common/evaluation/intervals.py hold the truth; prints the table of the docs.

    python -m tests.simulations.intervals              # 4,000 runs a row, several minutes
    python -m tests.simulations.intervals --runs 500
    python -m tests.simulations.intervals --shown      # what so many photographs can show, at once

A row is a statistic of one distribution: for 10, 20 and 50 photographs the share of runs, in percent, whose 95%
interval holds the truth, and of those whose one-sided limits do (from below, from above).
"""

import click
import numpy as np
from scipy import stats

from common.evaluation import intervals
from common.evaluation.gates import FORMAT_MARGIN
from common.evaluation.intervals import Figure

SIZES = (10, 20, 50)


def _mean(draw, truth, step=0.0):
    return lambda rng, n: intervals.mean(draw(rng, n), step), truth


def _scores(rng, n, rho, arms=1):
    """Draw correlated scores on the scale 1 to 10, in halves: a reference and ``arms`` outputs, [arms + 1, n]."""
    skill = rng.normal(size=n)
    outputs = [rho * skill + np.sqrt(1 - rho**2) * rng.normal(size=n) for _ in range(arms)]
    return np.stack([skill, *outputs])


def _ratio_difference(rng, n):
    tokens = rng.integers(500, 1200, n).astype(float)
    base = rng.gamma(20, 0.06, n)  # nats per token, a mean of 1.2
    ours = base - 0.1 + rng.normal(0, 0.15, n)
    return intervals.ratio_difference((ours * tokens, tokens), (base * tokens, tokens))


def _share_difference(rng, n, lost, gained):
    kind = rng.choice(4, n, p=[lost, gained, 0.1, 0.9 - lost - gained])
    return intervals.share_difference(np.isin(kind, (1, 3)).astype(float), np.isin(kind, (0, 3)).astype(float))


def _pairwise(rng, n):
    x, y = _scores(rng, n, 0.6)
    return intervals.pairs(((x[:, None] - x) * (y[:, None] - y) > 0).astype(float))


CASES = {
    "mean, normal": _mean(lambda rng, n: rng.normal(size=n), 0.0),
    "mean, uniform": _mean(lambda rng, n: rng.uniform(size=n), 0.5),
    "mean, errors of whole points": _mean(
        lambda rng, n: rng.choice(5, n, p=[0.3, 0.4, 0.2, 0.07, 0.03]).astype(float), 1.13, step=1.0
    ),
    "mean, absolute normal": _mean(lambda rng, n: np.abs(rng.normal(size=n)), np.sqrt(2 / np.pi)),
    "mean, exponential": _mean(lambda rng, n: rng.exponential(size=n), 1.0),
    "mean, lognormal (sigma 0.5)": _mean(lambda rng, n: rng.lognormal(0, 0.5, n), np.exp(0.125)),
    "mean, lognormal (sigma 1)": _mean(lambda rng, n: rng.lognormal(0, 1, n), np.exp(0.5)),
    "mean, mostly 0 (0.8), else 1 or 2": _mean(
        lambda rng, n: rng.choice(3, n, p=[0.8, 0.15, 0.05]).astype(float), 0.25, step=1.0
    ),
    "mean, mostly 0 (0.9), else 1 or 2": _mean(
        lambda rng, n: rng.choice(3, n, p=[0.9, 0.08, 0.02]).astype(float), 0.12, step=1.0
    ),
    "difference of losses a token": (_ratio_difference, -0.1),
    "median, lognormal (sigma 0.5)": (lambda rng, n: intervals.median(rng.lognormal(0, 0.5, n)), 1.0),
    "Pearson, rho 0.6": (lambda rng, n: intervals.correlation(*_scores(rng, n, 0.6), ranks=False), 0.6),
    "Spearman, rho 0.6": (
        lambda rng, n: intervals.correlation(*_scores(rng, n, 0.6), ranks=True),
        6 / np.pi * np.arcsin(0.3),
    ),
    "difference of Pearson, rho 0.6": (
        lambda rng, n: intervals.correlation_difference(*_scores(rng, n, 0.6, 2)[[1, 2, 0]], ranks=False),
        0.0,
    ),
    "difference of Spearman, rho 0.6": (
        lambda rng, n: intervals.correlation_difference(*_scores(rng, n, 0.6, 2)[[1, 2, 0]], ranks=True),
        0.0,
    ),
    "pairwise accuracy, rho 0.6": (_pairwise, 0.5 + np.arcsin(0.6) / np.pi),
    "share 0.7 (exact)": (lambda rng, n: intervals.share((rng.uniform(size=n) < 0.7).astype(float)), 0.7),
    "share 0.95 (exact)": (lambda rng, n: intervals.share((rng.uniform(size=n) < 0.95).astype(float)), 0.95),
    "difference of shares, 0.3": (lambda rng, n: _share_difference(rng, n, 0.1, 0.4), 0.3),
    "difference of shares, 0": (lambda rng, n: _share_difference(rng, n, 0.1, 0.1), 0.0),
}


def coverage(name: str, n: int, runs: int, seed: int = 1) -> tuple[float, float, float]:
    """Return the shares of ``runs`` in which the interval, the lower limit and the upper limit hold."""
    estimate, truth = CASES[name]
    rng, held = np.random.default_rng(seed), np.zeros(3)
    for _ in range(runs):
        figure: Figure = estimate(rng, n)
        if figure.low is None:
            continue
        held += [figure.low <= truth <= figure.high, figure.lower <= truth, truth <= figure.upper]
    return tuple(held / runs)


def what_can_be_shown(sizes: tuple[int, ...] = (10, 20, 50, 100, 200)) -> list[str]:
    """Return a Markdown table: for so many photographs, what the gates and intervals can show."""

    def share_gate(limit: float, n: int, side: int) -> list[int]:
        # the numbers of faults with which the one-sided limit (1: lower, 2: upper) meets the bound
        return [faults for faults in range(n + 1) if intervals.clopper_pearson(n - faults, n)[side] >= limit]

    def at_most(faults: list[int]) -> str:
        return str(max(faults)) if faults else "cannot pass"

    def lost(n: int) -> str:
        kept = [k for k in range(n) if intervals.bonett_price(0, k, n)[1] >= -FORMAT_MARGIN]
        return str(max(kept)) if kept else "cannot pass"

    rank = {n: intervals.fisher_limits(0.6, n, ranks=True) for n in sizes}
    rows = {
        "an answer without a fault in all of them: the true share is at least": [
            f"{100 * intervals.clopper_pearson(n, n)[1]:.1f}%" for n in sizes
        ],
        "95% gate: faults with which it passes": [at_most(share_gate(0.95, n, 1)) for n in sizes],
        "95% gate: faults from which on it fails": [str(max(share_gate(0.95, n, 2)) + 1) for n in sizes],
        "90% gate: faults with which it passes": [at_most(share_gate(0.90, n, 1)) for n in sizes],
        "not worse by 5 points: answers lost with which it passes": [lost(n) for n in sizes],
        "a mean: half the 95% interval, in standard deviations of one photograph": [
            f"{stats.t.ppf(0.975, n - 1) / n**0.5:.2f}" for n in sizes
        ],
        "a rank correlation of 0.60: its 95% interval": [f"{rank[n][0]:.2f} to {rank[n][3]:.2f}" for n in sizes],
    }
    head = ["| photographs | " + " | ".join(map(str, sizes)) + " |", "| --- |" + " ---: |" * len(sizes)]
    return head + [f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows.items()]


@click.command()
@click.option("--runs", default=4000, show_default=True)
@click.option("--only", default="", help="rows whose name holds this")
@click.option("--shown", is_flag=True, help="print what so many photographs can show, no coverage")
def main(runs: int, only: str, shown: bool) -> None:
    """Print the coverage of every interval, a Markdown table."""
    if shown:
        return click.echo("\n".join(what_can_be_shown()))
    click.echo("| statistic | " + " | ".join(f"n = {n}" for n in SIZES) + " |")
    click.echo("| --- |" + " ---: |" * len(SIZES))
    for name in CASES:
        if only in name:
            cells = (coverage(name, n, runs) for n in SIZES)
            texts = [f"{100 * both:.1f} ({100 * low:.1f}, {100 * high:.1f})" for both, low, high in cells]
            click.echo(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()

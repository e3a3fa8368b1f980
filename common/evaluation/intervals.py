"""How sure a figure is: bootstrap intervals over photographs, paired between two adapters, and exact ones for shares.

The unit is always the photograph: several outputs or examples of one photograph are averaged before they come here,
since they are not independent. Statistics are functions of index arrays, so that pairs are resampled together.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
MAX_DRAWS = 4_000_000  # resamples times photographs: bounds memory and time with thousands of photographs
SEED = 20  # fixed, so that the same outputs always give the same report


class Figure(NamedTuple):
    """A value with its 95% interval over ``n`` photographs; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict:
        return self._asdict()


def mean(values: np.ndarray) -> Figure:
    """Return the mean of ``values`` (float [n], NaN = not measured) with its bootstrap interval."""
    values = values[~np.isnan(values)]
    return _bootstrap(lambda at: values[at].mean(axis=-1), len(values))


def median(values: np.ndarray) -> Figure:
    """Return the median of ``values`` (float [n], NaN = not measured) with its bootstrap interval."""
    values = values[~np.isnan(values)]
    return _bootstrap(lambda at: np.median(values[at], axis=-1), len(values))


def quantile(values: np.ndarray, share: float) -> Figure:
    """Return the ``share`` quantile (linear interpolation between order statistics) with its bootstrap interval."""
    values = values[~np.isnan(values)]
    return _bootstrap(lambda at: np.quantile(values[at], share, axis=-1), len(values))


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Figure:
    """Return sum(numerators) / sum(denominators), e.g. the loss a token, with its bootstrap interval."""
    kept = ~(np.isnan(numerators) | np.isnan(denominators))
    above, below = numerators[kept], denominators[kept]
    return _bootstrap(lambda at: above[at].sum(axis=-1) / below[at].sum(axis=-1), len(above))


def ratio_difference(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> Figure:
    """Return the difference of two `ratio` figures over the photographs that both have, paired."""
    kept = ~np.isnan(np.stack([*ours, *theirs])).any(axis=0)
    a, b, c, d = (column[kept] for column in (*ours, *theirs))
    return _bootstrap(
        lambda at: a[at].sum(axis=-1) / b[at].sum(axis=-1) - c[at].sum(axis=-1) / d[at].sum(axis=-1), len(a)
    )


def rank_correlation(x: np.ndarray, y: np.ndarray) -> Figure:
    """Return Spearman's rank correlation (ties get their mean rank) with its bootstrap interval.

    Not defined (None) for fewer than three pairs or when one side is constant: a model that gives every photograph
    the same score has no correlation, not a bad one.
    """
    kept = ~(np.isnan(x) | np.isnan(y))
    x, y = x[kept], y[kept]
    if len(x) < 3:
        return Figure(None, None, None, len(x))
    return _bootstrap(lambda at: spearman(x[at], y[at]), len(x))


def rank_correlation_difference(ours: np.ndarray, theirs: np.ndarray, reference: np.ndarray) -> Figure:
    """Return the difference of two rank correlations with one reference, over the photographs that all have."""
    kept = ~np.isnan(np.stack([ours, theirs, reference])).any(axis=0)
    a, b, y = ours[kept], theirs[kept], reference[kept]
    if len(y) < 3:
        return Figure(None, None, None, len(y))
    return _bootstrap(lambda at: spearman(a[at], y[at]) - spearman(b[at], y[at]), len(y))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation along the last axis, NaN where a side is constant."""
    from scipy import stats

    x, y = (stats.rankdata(side, axis=-1) for side in (x, y))
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    spread = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), spread, out=np.full_like(spread, np.nan), where=spread > 0)


def pairs_mean(similarity: np.ndarray) -> Figure:
    """Return the mean of ``similarity`` [n, n] over pairs of different photographs, with its bootstrap interval."""
    count = len(similarity)
    if count < 2:
        return Figure(None, None, None, count)
    return _bootstrap(lambda at: _pairs(similarity, at), count)


def pairs_mean_difference(ours: np.ndarray, theirs: np.ndarray) -> Figure:
    """Return the difference of two `pairs_mean` figures over the same photographs, paired."""
    count = len(ours)
    if count < 2:
        return Figure(None, None, None, count)
    return _bootstrap(lambda at: _pairs(ours, at) - _pairs(theirs, at), count)


def _pairs(similarity: np.ndarray, at: np.ndarray) -> np.ndarray:
    # a photograph drawn twice is no pair with itself: only pairs of different photographs count
    counts = np.zeros((*at.shape[:-1], len(similarity)))
    np.add.at(counts, (*np.indices(at.shape)[:-1], at), 1.0)
    different = 1.0 - np.eye(len(similarity))
    weight = ((counts @ different) * counts).sum(axis=-1)
    total = ((counts @ (similarity * different)) * counts).sum(axis=-1)
    return np.divide(total, weight, out=np.full_like(weight, np.nan), where=weight > 0)


def share(passes: np.ndarray) -> Figure:
    """Return the mean of ``passes`` (float [n] in 0..1): exact binomial interval when each is 0 or 1, else bootstrap.

    The exact (Clopper-Pearson) interval is honest where the bootstrap is not: 12 of 12 still leaves room for a
    true share of 74%.
    """
    passes = passes[~np.isnan(passes)]
    if len(passes) and np.isin(passes, (0.0, 1.0)).all():
        from scipy import stats  # half a second that --help does without

        found = stats.binomtest(int(passes.sum()), len(passes)).proportion_ci(CONFIDENCE, method="exact")
        return Figure(float(passes.mean()), float(found.low), float(found.high), len(passes))
    return mean(passes)


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Figure:
    """Return ``statistic`` of all photographs with its percentile bootstrap interval (Efron & Tibshirani, ch. 13)."""
    if count == 0:
        return Figure(None, None, None, 0)
    value = float(statistic(np.arange(count)))
    if np.isnan(value):
        return Figure(None, None, None, count)
    if count == 1:
        return Figure(value, None, None, 1)
    resamples = int(np.clip(MAX_DRAWS // count, 500, RESAMPLES))
    drawn = statistic(np.random.default_rng(SEED).integers(0, count, (resamples, count)))
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Figure(value, None, None, count)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(value, float(low), float(high), count)

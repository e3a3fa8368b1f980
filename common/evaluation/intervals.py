"""How sure a figure is: limits over photographs, paired between two adapters.

The unit is the photograph: several outputs or examples of one are averaged before they come here, since they are not
independent. Each statistic has the method that covers the truth best with 10 to 50 photographs;
tests/simulations/intervals.py measures it, docs/evaluation.md has the results.

| statistic | method |
| --- | --- |
| share of yes and no | Clopper and Pearson (1934), exact |
| its paired difference | Bonett and Price (2012), adjusted Wald, https://doi.org/10.3102/1076998611411915 |
| mean, ratio of sums, their paired differences | bootstrap-t (Efron and Tibshirani 1993, section 12.5), `_stretched` |
| mean of coarse values that are all the same | exact limits of the share that may differ, by one step |
| median | order statistics, interpolated (Hettmansperger and Sheather 1986) |
| correlation | Fisher's z; Spearman's with the variance of Bonett and Wright (2000) |
| difference of correlations with one reference | Zou (2007), https://doi.org/10.1037/1082-989X.12.4.399 |
| mean over pairs of photographs | jackknife with Student's t |
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

# miss rates below and above: one-sided 95% limits (0.05) for gates, the two-sided 95% interval (0.025) for figures
LEVELS = np.array([0.025, 0.05, 0.95, 0.975])
ONE_SIDED = 1.6448536269514722  # standard errors of a one-sided 95% limit
RESAMPLES = 2000
SMALLEST_ERROR = 1 / 3  # of a resample, in standard errors of the figure
# So few photographs seldom show the tail that they come from: towards it, a limit moves out by STRETCH / sqrt(n) of its
# distance for each unit of skewness beyond chance. Both numbers are by simulation: intervals of skewed values hold as
# often as they say, those of symmetric ones stay as wide as they were, within a tenth at n = 10.
STRETCH, CHANCE = 2.0, 0.75  # CHANCE: in standard errors of the skewness of normal values
MAX_DRAWS = 2_000_000  # resamples times photographs: bounds memory and time with thousands of photographs
SEED = 20  # fixed, so that the same outputs always give the same report


@dataclass(frozen=True)
class Figure:
    """A value over ``n`` photographs; ``low`` and ``high`` are its 95% interval, ``lower`` and ``upper`` its one-sided
    95% limits, all in the figure's unit and None where they are not defined."""

    value: float | None
    n: int
    low: float | None = None
    lower: float | None = None
    upper: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, n: int, limits: np.ndarray) -> "Figure":
        """Make a figure from its value and its limits at `LEVELS`."""
        return cls(float(value), n, *(float(limit) for limit in limits))

    def map(self, function: Callable[[float], float]) -> "Figure":
        """Return the figure with a rising ``function`` applied to its value and limits."""
        sides = (self.value, self.low, self.lower, self.upper, self.high)
        value, *limits = (None if side is None else function(side) for side in sides)
        return Figure(value, self.n, *limits)

    def within(self, lowest: float, highest: float) -> "Figure":
        """Return the figure with limits no wider than what is possible."""
        return self.map(lambda side: min(max(side, lowest), highest))

    def to_dict(self) -> dict:
        return asdict(self)


def known(values: np.ndarray) -> np.ndarray:
    """Return the values that were measured: those that are not NaN."""
    return values[~np.isnan(values)]


# -- shares -----------------------------------------------------------------------------------------------------------


def share(passes: np.ndarray) -> Figure:
    """Return the mean of ``passes`` (float [n] in 0..1): exact limits when each is 0 or 1, else those of `mean`.

    The exact limits are honest where a bootstrap is not: 12 of 12 still leaves room for a true share of 74%.
    """
    passes = known(passes)
    if len(passes) and _is_binary(passes):
        return Figure.of(passes.mean(), len(passes), clopper_pearson(passes.sum(), len(passes)))
    return mean(passes, step=1.0).within(0.0, 1.0)


def clopper_pearson(successes: float, n: int) -> np.ndarray:
    """Return the exact limits of a binomial share at `LEVELS`, float [4]."""
    from scipy.special import betaincinv  # 0.2 s that --help does without

    at = LEVELS
    low = betaincinv(max(successes, 1e-300), n - successes + 1, at[:2]) if successes else np.zeros(2)
    high = betaincinv(successes + 1, n - successes, at[2:]) if successes < n else np.ones(2)
    return np.concatenate([low, high])


def share_difference(ours: np.ndarray, theirs: np.ndarray) -> Figure:
    """Return the difference of two shares over the photographs that both have, paired."""
    kept = ~np.isnan(ours + theirs)
    ours, theirs = ours[kept], theirs[kept]
    if not len(ours) or not (_is_binary(ours) and _is_binary(theirs)):
        return mean(ours - theirs, step=1.0).within(-1.0, 1.0)
    limits = bonett_price((ours > theirs).sum(), (ours < theirs).sum(), len(ours))
    return Figure.of((ours - theirs).mean(), len(ours), np.clip(limits, -1, 1))


def bonett_price(gained: float, lost: float, n: int) -> np.ndarray:
    """Return the limits of a paired difference of shares at `LEVELS`, float [4]: ``gained`` of ``n`` photographs are
    a yes for us alone, ``lost`` for them alone."""
    from scipy.special import ndtri

    gained, lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    return gained - lost + ndtri(LEVELS) * np.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))


def changed(figure: Figure) -> tuple[int, int]:
    """Return (gained, lost) photographs of a figure of `share_difference`, from its limits."""
    n, net = figure.n, figure.value * figure.n
    error = (figure.upper - figure.lower) / 2 / ONE_SIDED
    both = (error**2 * (n + 2) + (net / (n + 2)) ** 2) * (n + 2) - 2
    return round((both + net) / 2), round((both - net) / 2)


def _is_binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


# -- means and ratios -------------------------------------------------------------------------------------------------


def mean(values: np.ndarray, step: float = 0.0) -> Figure:
    """Return the mean of ``values`` (float [n], NaN = not measured).

    ``step``: the usual distance between two values of a coarse scale (a point of a score), 0 for a continuous one.
    Equal values of a coarse scale do not show that all are equal: their limits allow for the largest share of values,
    one step away, of which ``n`` would still show none.
    """
    values = known(values)
    if step and len(values) > 1 and np.ptp(values) <= 1e-12 * max(1.0, abs(values[0])):
        others = clopper_pearson(0, len(values))[2:]
        return Figure.of(values[0], len(values), values[0] + step * np.concatenate([-others[::-1], others]))
    return _bootstrap_t(values[:, None], lambda m: m[..., 0], lambda m: np.ones_like(m))


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Figure:
    """Return sum(numerators) / sum(denominators), e.g. the loss a token."""
    columns = np.stack([numerators, denominators], axis=1)
    return _bootstrap_t(columns[~np.isnan(columns).any(axis=1)], _ratio, _ratio_gradient)


def ratio_difference(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> Figure:
    """Return the difference of two `ratio` figures over the photographs that both have, paired."""
    columns = np.stack([*ours, *theirs], axis=1)
    return _bootstrap_t(
        columns[~np.isnan(columns).any(axis=1)],
        lambda m: _ratio(m[..., :2]) - _ratio(m[..., 2:]),
        lambda m: np.concatenate([_ratio_gradient(m[..., :2]), -_ratio_gradient(m[..., 2:])], axis=-1),
    )


def _ratio(m: np.ndarray) -> np.ndarray:
    return m[..., 0] / m[..., 1]


def _ratio_gradient(m: np.ndarray) -> np.ndarray:
    return np.stack([1 / m[..., 1], -m[..., 0] / m[..., 1] ** 2], axis=-1)


def _bootstrap_t(columns: np.ndarray, value_of: Callable, gradient_of: Callable) -> Figure:
    """Return a function of column means, with the limits of the studentized bootstrap, stretched by `_stretched`.

    ``columns`` [n, k] are resampled by row; ``value_of`` takes means [..., k] to values [...], ``gradient_of`` to
    gradients [..., k], from which the standard error of each resample follows (delta method).
    """
    n = len(columns)
    if n == 0:
        return Figure(None, 0)

    def studied(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # [..., n, k] -> values [...], their standard errors [...], each row's part in the value [..., n]
        means = drawn.mean(axis=-2)
        parts = ((drawn - means[..., None, :]) * gradient_of(means)[..., None, :]).sum(axis=-1)
        return value_of(means), np.sqrt((parts**2).sum(axis=-1) / (max(n - 1, 1) * n)), parts

    value, error, parts = studied(columns)
    if n == 1:
        return Figure(float(value), 1)
    if error <= 1e-12 * max(1.0, abs(value)):
        return Figure.of(value, n, np.full(4, value))
    resamples = int(np.clip(MAX_DRAWS // n, 500, RESAMPLES))
    values, errors, _ = studied(columns[np.random.default_rng(SEED).integers(0, n, (resamples, n))])
    # a resample of nearly equal photographs has hardly an error, and would stretch the limits without bound
    pivots = (values - value) / np.maximum(errors, SMALLEST_ERROR * error)
    return Figure.of(value, n, value + _stretched(-np.quantile(pivots, LEVELS[::-1]) * error, parts))


def _stretched(distances: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return the distances of limits from their value (float [4]) with those on the side of the long tail stretched.

    ``parts`` (float [n], mean 0): each photograph's part in the value, whose skewness says where the long tail is.
    """
    n = len(parts)
    if n < 3:
        return distances
    skewness = np.sqrt(n * (n - 1)) / (n - 2) * (parts**3).mean() / (parts**2).mean() ** 1.5
    beyond_chance = max(abs(skewness) - CHANCE * np.sqrt(6 / n), 0.0)
    return np.where(distances * skewness > 0, distances * (1 + STRETCH / np.sqrt(n) * beyond_chance), distances)


# -- medians ----------------------------------------------------------------------------------------------------------


def median(values: np.ndarray) -> Figure:
    """Return the median of ``values`` (float [n], NaN = not measured); limits from 5 values on.

    The limit lies between the order statistics k and k + 1 whose chances of missing enclose the level. Five values
    allow no 95% interval: theirs, from the lowest to the highest, is one of 94%.
    """
    values = np.sort(known(values))
    n = len(values)
    if n < 5:
        return Figure(float(np.median(values)) if n else None, n)
    lower = [_order_limit(values, level) for level in LEVELS[:2]]
    upper = [-_order_limit(-values[::-1], level) for level in LEVELS[1::-1]]
    return Figure.of(np.median(values), n, np.array([*lower, *upper]))


def _order_limit(values: np.ndarray, level: float) -> float:
    from scipy.special import bdtr

    n = len(values)
    misses = bdtr(np.arange(n // 2 + 1), n, 0.5)  # that the k-th lowest (from 0) lies above the median
    k = int((misses <= level).sum()) - 1
    if k < 0:
        return values[0]
    share = (level - misses[k]) / (misses[k + 1] - misses[k])
    rank = k + 1
    weight = (n - rank) * share / (rank + (n - 2 * rank) * share)
    return (1 - weight) * values[k] + weight * values[k + 1]


# -- correlations -----------------------------------------------------------------------------------------------------


def correlation(x: np.ndarray, y: np.ndarray, ranks: bool) -> Figure:
    """Return Pearson's correlation, or Spearman's with ``ranks`` (ties get their mean rank).

    Not defined (None) for fewer than four pairs or when one side is constant: a model that gives every photograph
    the same score has no correlation, not a bad one.
    """
    kept = ~np.isnan(x + y)
    value, n = _correlation(x[kept], y[kept], ranks), int(kept.sum())
    if n < 4 or value is None:
        return Figure(None, n)
    return Figure.of(value, n, fisher_limits(value, n, ranks))


def correlation_difference(ours: np.ndarray, theirs: np.ndarray, reference: np.ndarray, ranks: bool) -> Figure:
    """Return the difference of two correlations with one reference, over the photographs that all have."""
    kept = ~np.isnan(ours + theirs + reference)
    a, b, y, n = ours[kept], theirs[kept], reference[kept], int(kept.sum())
    r, s, between = _correlation(a, y, ranks), _correlation(b, y, ranks), _correlation(a, b, ranks)
    if n < 4 or r is None or s is None:
        return Figure(None, n)
    square = (1 - r**2) * (1 - s**2)
    both = ((between - r * s / 2) * (1 - r**2 - s**2 - between**2) + between**3) / square if square > 1e-12 else 0.0
    both = float(np.clip(both, -1, 1))  # the correlation of the two correlations (Olkin and Siotani 1976)
    if between > 1 - 1e-12:
        return Figure.of(r - s, n, np.full(4, r - s))  # the same ranks, or values, in both arms
    ours_at, theirs_at = fisher_limits(r, n, ranks) - r, fisher_limits(s, n, ranks) - s
    width = np.sqrt(np.maximum(ours_at**2 + theirs_at[::-1] ** 2 + 2 * both * ours_at * theirs_at[::-1], 0))
    return Figure.of(r - s, n, r - s + np.sign(LEVELS - 0.5) * width)


def _correlation(x: np.ndarray, y: np.ndarray, ranks: bool) -> float | None:
    if ranks:
        from scipy.stats import rankdata

        x, y = rankdata(x), rankdata(y)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def fisher_limits(value: float, n: int, ranks: bool) -> np.ndarray:
    """Return the limits of a correlation of ``n`` pairs at `LEVELS`, float [4]."""
    from scipy.special import ndtri

    error = np.sqrt((1 + value**2 / 2 if ranks else 1) / (n - 3))
    return np.tanh(np.arctanh(np.clip(value, -1 + 1e-15, 1 - 1e-15)) + ndtri(LEVELS) * error)


# -- pairs of photographs ---------------------------------------------------------------------------------------------


def pairs(values: np.ndarray, weights: np.ndarray | None = None) -> Figure:
    """Return the weighted mean of ``values`` [n, n] over pairs of different photographs (symmetric; 0/1 weights)."""
    from scipy.special import stdtrit

    n = len(values)
    weights = (np.ones_like(values) if weights is None else weights) * (1 - np.eye(n))
    total, weight = (weights * values).sum(), weights.sum()
    if n < 3 or weight == 0:
        return Figure(float(total / weight) if weight else None, n)
    value = total / weight
    rest = weight - 2 * weights.sum(axis=1)
    without = np.divide(total - 2 * (weights * values).sum(axis=1), rest, out=np.full(n, value), where=rest > 0)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return Figure.of(value, n, value + stdtrit(n - 1, LEVELS) * error)

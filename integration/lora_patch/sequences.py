"""Intervals that may be looked at after every job: confidence sequences for the difference of two arms.

An ordinary 95% interval holds at one planned look; who looks every day and stops when it leaves out zero is misled far
more often than 5%. A confidence sequence holds at all looks together. This is the asymptotic one of Waudby-Smith,
Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (Annals of
Statistics 52, 2024; arXiv 2103.06476), theorem 2.2:

    difference +- SE * sqrt(2 (1 + 1 / (t r)) * log(sqrt(t r + 1) / alpha))

where an ordinary interval has 1.96 SE. ``t`` is how much was seen so far, ``r`` sets where the sequence is tightest:
r = (-2 log alpha + log(1 - 2 log alpha)) / TIGHTEST, their equation for it.

Difference and SE are those of a regression on the arm with a constant for each stratum (jobs of one advisor drawn at
one share): where the share changes in the course of a test, an early week is never compared with a later one. SE is
robust to clusters (the photographs) with the correction HC2. t = 4 sum w^2, w = arm minus the stratum's share: the
number of jobs, counted as if they were divided half and half.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of the three sequences of a test together: each is computed at 1 - 0.05 / 3 (Bonferroni)
ALPHA = (1 - LEVEL) / 3
TIGHTEST = 300  # jobs
MIN_PHOTOGRAPHS = 10  # in each arm; an SE from fewer means little


@dataclass(frozen=True)
class Sequence:
    """The difference, adapter minus base, after the jobs so far; ``low`` and ``high`` are None where there are
    too few data, and ``lacking`` then says which."""

    value: float | None
    low: float | None
    high: float | None
    photographs: tuple[int, int]  # different ones: base, adapter
    lacking: str | None = None

    @property
    def sign(self) -> int:
        """Return 1 or -1 where the sequence leaves out zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def width(information: float, alpha: float = ALPHA) -> float:
    """Return how many standard errors the sequence reaches to either side; ``information``: t of the formula."""
    rate = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / TIGHTEST
    seen = information * rate
    return math.sqrt(2 * (1 + 1 / seen) * math.log(math.sqrt(seen + 1) / alpha))


def difference(values, adapter, photographs, strata, alpha: float = ALPHA) -> Sequence:
    """Return the confidence sequence of mean(adapter) - mean(base) within strata.

    ``values``: float [n]; ``adapter``: bool [n], the arm; ``photographs`` and ``strata``: int [n], labels of any kind.
    A stratum with one arm alone says nothing and is left out.
    """
    values, adapter = np.asarray(values, float), np.asarray(adapter, bool)
    photographs, strata = np.asarray(photographs), np.unique(np.asarray(strata), return_inverse=True)[1]
    sizes = np.bincount(strata)
    share = np.bincount(strata, adapter) / np.maximum(sizes, 1)
    both = ((share > 0) & (share < 1))[strata] if len(strata) else np.zeros(0, bool)
    values, adapter, strata = values[both], adapter[both], strata[both]
    photographs = np.unique(photographs[both], return_inverse=True)[1]
    seen = tuple(len(np.unique(photographs[adapter == arm])) for arm in (False, True))
    if not len(values):
        return Sequence(None, None, None, seen, _too_few(seen))
    w = adapter - share[strata]
    information = float(w @ w)
    means = np.bincount(strata, values) / np.maximum(np.bincount(strata), 1)
    centred = values - means[strata]
    value = float(w @ centred) / information
    if min(seen) < MIN_PHOTOGRAPHS:
        return Sequence(value, None, None, seen, _too_few(seen))
    leverage = w**2 / information + 1 / sizes[strata]
    influence = w * (centred - value * w) / np.sqrt(np.maximum(1 - leverage, 0.25))
    error = math.sqrt(float(np.square(np.bincount(photographs, influence)).sum())) / information
    if error < 1e-9:
        return Sequence(value, None, None, seen, "they do not vary")
    reach = error * width(4 * information, alpha)
    return Sequence(value, value - reach, value + reach, seen)


def share_difference(hits, adapter, photographs, strata, alpha: float = ALPHA) -> Sequence:
    """Return the sequence for a difference of shares, such as that of the valid answers; ``hits``: bool [n].

    One hit and one miss are added to each arm, as photographs of their own (Agresti and Caffo, The American
    Statistician 54, 2000): shares of 0 or 1 would have an interval of width zero. The value has none of them.
    """
    hits, adapter = np.asarray(hits, float), np.asarray(adapter, bool)
    found = difference(hits, adapter, photographs, strata, alpha)
    if found.lacking and found.value is None or min(found.photographs) < MIN_PHOTOGRAPHS:
        return found
    strata = np.unique(np.asarray(strata), return_inverse=True)[1]
    sizes, tuned = np.bincount(strata), np.bincount(strata, adapter)
    main = int(np.argmax(tuned * (sizes - tuned) / sizes))
    labels = np.unique(np.asarray(photographs), return_inverse=True)[1]
    added = difference(
        np.append(hits, [0, 1, 0, 1]),
        np.append(adapter, [False, False, True, True]),
        np.append(labels, labels.max() + 1 + np.arange(4)),
        np.append(strata, [main] * 4),
        alpha,
    )
    low, high = min(added.low, found.value), max(added.high, found.value)
    return Sequence(found.value, max(low, -1.0), min(high, 1.0), found.photographs)


def _too_few(seen: tuple[int, int]) -> str:
    return f"too few photographs ({seen[0]} answered by the base, {seen[1]} by the adapter; {MIN_PHOTOGRAPHS} needed)"

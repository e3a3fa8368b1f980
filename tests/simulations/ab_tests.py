"""How often A/B tests that are looked at after every job go wrong, and how soon they see a true difference.

    .venv/bin/python tests/simulations/ab_tests.py                 # 2,000 tests each; docs/ab_tests.md has its figures

`looks` computes the sequences of many tests at once, by running sums that one job changes; the tests hold it against
`integration.lora_patch.sequences`, which the report uses, at random looks.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from integration.lora_patch.sequences import ALPHA, MIN_PHOTOGRAPHS, TIGHTEST, difference  # noqa: E402


def photographs(rng: np.random.Generator, tests: int, jobs: int, repeats: float) -> np.ndarray:
    """Return int [tests, jobs]: which photograph a job is of; a share ``repeats`` are of one that was there before."""
    again = rng.random((tests, jobs)) < repeats
    again[:, 0] = False
    labels = np.cumsum(~again, axis=1) - 1
    earlier = (rng.random((tests, jobs)) * (labels + 1)).astype(int)
    return np.where(again, earlier, labels)


def looks(values: np.ndarray, adapter: np.ndarray, labels: np.ndarray, shares: bool = False, alpha: float = ALPHA):
    """Yield (jobs so far, difference [tests], reach [tests]) after each job of each test; reach is inf for too few.

    ``values`` float, ``adapter`` bool, ``labels`` int (photographs), all [tests, jobs]. ``shares``: with the hit and
    the miss that are added to each arm of a share.
    """
    tests, jobs = values.shape
    values, adapter = values.astype(float), adapter.astype(float)
    if shares:
        extra = labels.max() + 1 + np.arange(4)
        values = np.hstack([np.tile([0.0, 1, 0, 1], (tests, 1)), values])
        adapter = np.hstack([np.tile([0.0, 0, 1, 1], (tests, 1)), adapter])
        labels = np.hstack([np.tile(extra, (tests, 1)), labels])
    rows, clusters = np.arange(tests), int(labels.max()) + 1
    counts, sums = np.zeros((2, tests, clusters)), np.zeros((2, tests, clusters))  # by arm and photograph
    # totals over photographs of products of counts and sums; the variance is a form of these
    cc, cs, ss = (np.zeros((2, 2, tests)) for _ in range(3))
    n, total, seen = np.zeros((2, tests)), np.zeros((2, tests)), np.zeros((2, tests), int)
    rate = (-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / TIGHTEST
    skipped = 4 if shares else 0
    with np.errstate(divide="ignore", invalid="ignore"):
        for job in range(values.shape[1]):
            value, cluster = values[:, job], labels[:, job]
            for arm, own in ((1, adapter[:, job]), (0, 1 - adapter[:, job])):
                old_count, old_sum = counts[arm, rows, cluster], sums[arm, rows, cluster]
                if job >= skipped:
                    seen[arm] += (own > 0) & (old_count == 0)
                more = own * value
                other_count, other_sum = counts[1 - arm, rows, cluster], sums[1 - arm, rows, cluster]
                cc[arm, arm] += own * (2 * old_count + 1)
                ss[arm, arm] += more * (2 * old_sum + more)
                cs[arm, arm] += own * old_sum + more * old_count + own * more
                cc[arm, 1 - arm] += own * other_count
                ss[arm, 1 - arm] += more * other_sum
                cs[arm, 1 - arm] += own * other_sum
                cs[1 - arm, arm] += more * other_count
                counts[arm, rows, cluster] += own
                sums[arm, rows, cluster] += more
                n[arm] += own
                total[arm] += more
            if job < skipped:
                continue
            mean = total / n
            # influence of a job: (value - mean of its arm) / n of its arm, with HC2's n / (n - 1)
            weight = np.array([-1 / n[0], 1 / n[1]]) * np.sqrt(n / (n - 1))
            variance = 0.0
            for a in (0, 1):
                for b in (0, 1):
                    if a == b:
                        form = ss[a, a] - 2 * mean[a] * cs[a, a] + mean[a] ** 2 * cc[a, a]
                    else:
                        # cross totals are kept once, under either order
                        both_ss, both_cc = ss[0, 1] + ss[1, 0], cc[0, 1] + cc[1, 0]
                        form = both_ss - mean[b] * cs[b, a] - mean[a] * cs[a, b] + mean[a] * mean[b] * both_cc
                    variance = variance + weight[a] * weight[b] * form
            information = 4 * n[0] * n[1] / (n[0] + n[1])
            reach = np.sqrt(np.maximum(variance, 0) * 2 * (1 + 1 / (information * rate)))
            reach = reach * np.sqrt(np.log(np.sqrt(information * rate + 1) / alpha))
            reach = np.where((seen.min(0) < MIN_PHOTOGRAPHS) | ~np.isfinite(reach) | (reach < 1e-9), np.inf, reach)
            yield job + 1 - skipped, mean[1] - mean[0], reach

"""How often A/B tests that are looked at after every job go wrong, and how soon they see a true difference.

    .venv/bin/python tests/simulations/ab_tests.py                 # 2,000 tests each; docs/ab_tests.md has its figures

`looks` computes the sequences of many tests at once, by running sums that one job changes; the tests hold it against
`integration.lora_patch.sequences`, which the report uses, at random looks.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from integration.lora_patch.ab_test import LADDER, ABTest, broken_guardrails, next_share  # noqa: E402
from integration.lora_patch.sequences import (  # noqa: E402
    ALPHA,
    MIN_PHOTOGRAPHS,
    TIGHTEST,
    difference,
    share_difference,
)


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
            reach = np.sqrt(np.maximum(variance, 0)) * _widths(information, alpha)
            reach = np.where((seen.min(0) < MIN_PHOTOGRAPHS) | ~np.isfinite(reach) | (reach < 1e-9), np.inf, reach)
            yield job + 1 - skipped, mean[1] - mean[0], reach


def _widths(information: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Return `sequences.width` for many at once."""
    seen = information * (-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / TIGHTEST
    return np.sqrt(2 * (1 + 1 / seen) * np.log(np.sqrt(seen + 1) / alpha))


def simulate(
    rng: np.random.Generator,
    tests: int,
    jobs: int,
    effect: float = 0.0,
    share: float = 0.5,
    spread: float = 1.0,
    repeats: float = 0.25,
    invalid: tuple[float, float] = (0.03, 0.03),
    slower: float = 0.0,
) -> dict:
    """Return what share of so many tests raise an alarm within so many jobs, and how soon.

    Scores are normal with standard deviation ``spread`` (half of the variance is the photograph's), rounded to tenths
    within 0 and 10; seconds are lognormal with 0.3 (half of it the photograph's). ``effect`` in points, ``invalid``
    shares of base and adapter, ``slower`` in logarithms. Keys: score, valid, time (the sequence leaves out zero), any,
    plain (an ordinary 95% interval of the score leaves out zero at some look), first (jobs until the score's alarm).
    """
    labels, adapter = photographs(rng, tests, jobs, repeats), rng.random((tests, jobs)) < share

    def mixed(deviation: float) -> np.ndarray:
        own, photo = rng.normal(0, deviation * np.sqrt(0.5), (2, tests, jobs))
        return own + np.take_along_axis(photo, labels, axis=1)

    scores = np.clip(np.round(6.5 + effect * adapter + mixed(spread), 1), 0, 10)
    valid = rng.random((tests, jobs)) >= np.where(adapter, invalid[1], invalid[0])
    seconds = slower * adapter + mixed(0.3)
    alarms, first, plain = {}, np.full(tests, np.inf), np.zeros(tests, bool)
    for name, values in (("score", scores), ("valid", valid), ("time", seconds)):
        alarms[name] = np.zeros(tests, bool)
        for count, value, reach in looks(values, adapter, labels, shares=name == "valid"):
            now = np.abs(value) > reach
            if name == "score":
                first = np.where(now & ~alarms[name], count, first)
                arms = np.cumsum(adapter[:, :count], axis=1)[:, -1]
                information = 4 * arms * (count - arms) / count
                known = np.isfinite(reach)
                plain[known] |= np.abs(value[known]) > 1.96 * reach[known] / _widths(information[known])
            alarms[name] |= now
    some = np.logical_or.reduce(list(alarms.values()))
    rates = {name: float(found.mean()) for name, found in {**alarms, "any": some, "plain": plain}.items()}
    return rates | {"first": first}


def canaries(rng: np.random.Generator, tests: int, jobs: int, drift: float = 1.0, invalid: float = 0.03) -> dict:
    """Return what became of so many canaries (5%, 25%, 50%), looked at every 20 jobs, while all scores drift upwards.

    Neither arm is better: drift is the rise of the scores over the test, in points, which a comparison that pools the
    shares would take for the adapter's. ``invalid``: share of the adapter's answers; the base's is 3%. Keys: alarm
    (the scores' sequence leaves out zero at some look), ended (a guardrail was broken), wide (went to 50%), and jobs
    (median until it was at 50%).
    """
    alarm, ended, arrived = np.zeros(tests, bool), np.zeros(tests, bool), np.full(tests, np.inf)
    for at in range(tests):
        share, adapter, strata = LADDER[0], np.zeros(jobs, bool), np.zeros(jobs)
        scores = 6 + drift * np.arange(jobs) / jobs + rng.normal(0, 1, jobs)
        luck, draw, logs, own = rng.random(jobs), rng.random(jobs), rng.normal(0, 0.3, jobs), np.arange(jobs)
        for begin in range(0, jobs, 20):
            adapter[begin : begin + 20], strata[begin : begin + 20] = draw[begin : begin + 20] < share, share
            seen = slice(0, begin + 20)
            valid = luck[seen] >= np.where(adapter[seen], invalid, 0.03)
            arms = (adapter[seen], own[seen], strata[seen])
            sequences = difference(scores[seen], *arms), share_difference(valid, *arms), difference(logs[seen], *arms)
            test = ABTest([], share, *sequences)
            alarm[at] |= bool(test.score.sign)
            if broken_guardrails(test):
                ended[at] = True
                break
            share = next_share(test, LADDER) or share
            if share == LADDER[-1] and arrived[at] == np.inf:
                arrived[at] = begin + 20
    found = {"alarm": alarm, "ended": ended, "wide": np.isfinite(arrived)}
    return {name: float(rows.mean()) for name, rows in found.items()} | {"jobs": float(np.median(arrived))}


@click.command(help=__doc__.split("\n\n")[0])
def main() -> None:
    began = time.perf_counter()
    print("2,000 tests without a difference, looked at after each of 1,000 jobs: share with an alarm")
    print(" share  spread  repeats   score   valid    time     any  plain 95%")
    cases = (0.5, 1.0, 0.25), (0.5, 0.5, 0.0), (0.5, 1.0, 0.6), (0.25, 1.0, 0.25), (0.05, 1.0, 0.25)
    for share, spread, repeats in cases:
        found = simulate(np.random.default_rng(1), 2000, 1000, share=share, spread=spread, repeats=repeats)
        rates = "".join(f" {found[name]:>7.2%}" for name in ("score", "valid", "time", "any"))
        print(f"{share:>6.0%} {spread:>7} {repeats:>8.0%}{rates} {found['plain']:>10.1%}", flush=True)
    print("\n1,000 tests with a true difference of half a point: share that show it by so many jobs")
    horizons = (100, 200, 400, 800, 1600)
    print(f"{'share':>6} {'spread':>7}" + "".join(f" {jobs:>6}" for jobs in horizons) + "  median jobs")
    for share, spread in ((0.5, 0.5), (0.5, 1.0), (0.5, 1.5), (0.25, 1.0), (0.05, 1.0)):
        found = simulate(np.random.default_rng(2), 1000, max(horizons), effect=0.5, share=share, spread=spread)
        power = "".join(f" {(found['first'] <= jobs).mean():>6.0%}" for jobs in horizons)
        print(f"{share:>6.0%} {spread:>7}{power}  {np.median(found['first']):,.0f}", flush=True)
    print("\nThe same for the guardrails at 50%: sequences that leave out zero by 400 jobs")
    worse = simulate(np.random.default_rng(3), 1000, 400, invalid=(0.03, 0.2))
    slower = simulate(np.random.default_rng(4), 1000, 400, slower=np.log(1.25))
    print(f"20% invalid answers instead of 3%: {worse['valid']:.0%}; 25% slower: {slower['time']:.0%}")
    print("\n400 canaries of 3,000 jobs, scores rising by a point meanwhile, arms equal or 20% invalid instead of 3%")
    for invalid in (0.03, 0.2):
        found = canaries(np.random.default_rng(5), 400, 3000, invalid=invalid)
        rates = ", ".join(f"{name} {found[name]:.1%}" for name in ("alarm", "ended", "wide"))
        print(f"{invalid:.0%}: {rates}, at 50% after {found['jobs']:,.0f} jobs at the median", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()

"""An A/B test in the service: which jobs belong to it, what is shown by now, and what to do next.

Three differences are followed by confidence sequences (`sequences`), which hold at 95% together however often one
looks: the overall score, the share of valid answers, and the time of an answer. The last two are guardrails.
"""

import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np

from .arms import ARMS
from .report_jobs import AnsweredJob
from .sequences import Sequence, difference, share_difference

BASE, ADAPTER = ARMS[2:]  # ab_test_base, ab_test_fine_tuned
LADDER = (0.05, 0.25, 0.5)  # shares that a test is widened to where no schedule is given
LOSS = 0.02  # share of valid answers; a test that shows a greater loss has broken the guardrail
SLOWDOWN = 0.10  # relative; the same for the time of an answer
# A wider test needs less harm for each of its jobs: of all jobs, so much may be lost to it at most.
LOSS_OF_ALL, SLOWDOWN_OF_ALL = 0.025, 0.05
LITTLE = 0.25  # points; a smaller difference of scores does not matter
WANTED = 0.5  # points; the advice says how many jobs would show this difference


@dataclass(frozen=True)
class ABTest:
    """The jobs of the running test, and what they show."""

    jobs: list[AnsweredJob]
    share: float | None  # of the adapter's arm, at the last job
    score: Sequence
    valid: Sequence
    slowdown: Sequence  # of the seconds' logarithm: exp(value) - 1 is relative

    @property
    def since(self) -> str | None:
        """Return the day of the first job."""
        at = next((job.at for job in self.jobs if job.at), None)
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d") if at else None


@dataclass(frozen=True)
class Advice:
    """``action``: keep (the test as it is), widen, stop or roll back; ``share``: what it is to be widened to."""

    action: str
    sentence: str
    share: float | None = None
    exit_code: int | None = None  # of --watch; None while the test is to go on


def running_test(jobs: list[AnsweredJob]) -> ABTest:
    """Return the running test of each advisor's present version, put together; ``jobs`` oldest first.

    An advisor's test begins with its first job, or where another version took over: a sequence must not change its
    beginning, so the days that a report looks back do not move it.
    """
    own = [job for job in jobs if job.arm in (BASE, ADAPTER)]
    version, start = {}, {}
    for at, job in enumerate(own):
        if job.arm == ADAPTER and version.get(job.advisor, job.version) != job.version:
            start[job.advisor] = at
        if job.arm == ADAPTER:
            version[job.advisor] = job.version
    own = [job for at, job in enumerate(own) if at >= start.get(job.advisor, 0)]
    share = next((job.split for job in reversed(own) if job.split is not None), None)
    if share is None and own:
        share = sum(job.arm == ADAPTER for job in own) / len(own)
    return ABTest(own, share, *compare(own, ADAPTER))


def compare(jobs: list[AnsweredJob], adapter: str) -> tuple[Sequence, Sequence, Sequence]:
    """Return the sequences of score, valid share and log(seconds), arm ``adapter`` minus the other."""

    def arrays(kept: list[AnsweredJob]) -> tuple[np.ndarray, list[str], np.ndarray]:
        strata = {key: at for at, key in enumerate(dict.fromkeys((job.advisor, job.split) for job in kept))}
        return (
            np.array([job.arm == adapter for job in kept], bool),
            [job.photograph for job in kept],
            np.array([strata[job.advisor, job.split] for job in kept], int),
        )

    scored = [job for job in jobs if job.score is not None]
    timed = [job for job in jobs if job.seconds]
    return (
        difference([job.score for job in scored], *arrays(scored)),
        share_difference([job.valid for job in jobs], *arrays(jobs)),
        difference([math.log(job.seconds) for job in timed], *arrays(timed)),
    )


def advise(test: ABTest, schedule: tuple[float, ...] = LADDER) -> Advice:
    """Say what to do with a test by now. Pure: the same test and schedule give the same advice."""
    if broken := broken_guardrails(test):
        return Advice("roll back", f"Roll back: {broken}.", 0.0, exit_code=4)
    if test.score.low is None or test.valid.low is None:
        return Advice("keep", f"Keep the test as it is: {_lacking(test)}.")
    if test.score.sign:
        higher = "higher" if test.score.sign > 0 else "lower"
        size = f"{abs(test.score.value):.2f} points {higher} ({_from_to(test.score)})"
        text = f"Stop the test, it has its answer: the adapter's scores are {size}, and no guardrail is broken."
        more = "" if test.score.sign > 0 else " Roll back unless stricter scores are what it was trained for."
        return Advice("stop", text + more, exit_code=0 if test.score.sign > 0 else 3)
    if max(-test.score.low, test.score.high) < LITTLE:
        text = f"Stop the test: the scores differ by less than {LITTLE:g} points ({_from_to(test.score)})"
        return Advice("stop", f"{text}, and no guardrail is broken.", exit_code=5)
    wider = next_share(test, schedule)
    if wider is not None:
        return Advice("widen", f"Widen the test to {wider:.0%}: the guardrails hold at that share.", wider)
    reason = "nothing is decided"
    if (ahead := _after(test.share, schedule)) is not None:
        reason = f"that the guardrails hold at {ahead:.0%} is not shown yet"
    return Advice("keep", f"Keep the test as it is: {reason}; {_missing(test)}.")


def broken_guardrails(test: ABTest) -> str | None:
    """Return in words which guardrail is shown to be broken, None where none is."""
    broken = []
    if test.valid.high is not None and test.valid.high < -LOSS:
        broken.append(f"valid answers are {-test.valid.value:.1%} fewer, {-test.valid.high:.1%} at least")
    if test.slowdown.low is not None and test.slowdown.low > math.log(1 + SLOWDOWN):
        times = (math.expm1(value) for value in (test.slowdown.value, test.slowdown.low))
        broken.append("an answer takes {:.0%} longer, {:.0%} at least".format(*times))
    return " and ".join(broken) or None


def next_share(test: ABTest, schedule: tuple[float, ...]) -> float | None:
    """Return the next share of a schedule if the guardrails are shown to hold there; None to stay.

    They hold where the sequences leave out a loss of more than LOSS_OF_ALL of all jobs' valid answers, and of more
    than SLOWDOWN_OF_ALL of their time, at that share; scores that are shown to be lower hold it back as well.
    """
    ahead = _after(test.share, schedule)
    if ahead is None or broken_guardrails(test) or test.score.sign < 0:
        return None
    loss, slowdown = max(LOSS, LOSS_OF_ALL / ahead), max(SLOWDOWN, SLOWDOWN_OF_ALL / ahead)
    valid = test.valid.low is not None and test.valid.low > -loss
    in_time = test.slowdown.high is not None and test.slowdown.high < math.log1p(slowdown)
    return ahead if valid and in_time else None


def as_dict(test: ABTest, advice: Advice) -> dict:
    """Return test and advice as the report's JSON has them; slowdown relative: 0.1 is 10% longer."""
    slowdown = asdict(test.slowdown)
    slowdown |= {key: None if slowdown[key] is None else math.expm1(slowdown[key]) for key in ("value", "low", "high")}
    versions = sorted({job.version for job in test.jobs if job.arm == ADAPTER and job.version})
    differences = {"average_score": asdict(test.score), "valid_rate": asdict(test.valid), "slowdown": slowdown}
    counts = {"jobs": len(test.jobs), "since": test.since, "share": test.share, "versions": versions}
    return counts | {"differences": differences, "advice": asdict(advice)}


def _after(share: float | None, schedule: tuple[float, ...]) -> float | None:
    return next((ahead for ahead in schedule if share is not None and ahead > share + 0.005), None)


def _lacking(test: ABTest) -> str:
    for name, sequence in (("scores", test.score), ("answers", test.valid)):
        if sequence.lacking:
            return sequence.lacking if sequence.lacking.startswith("too few") else f"{name}: {sequence.lacking}"
    return "nothing is decided"


def _missing(test: ABTest) -> str:
    """Say how many more jobs would show a difference of half a point; the sequence narrows as 1 / sqrt(jobs)."""
    reach = (test.score.high - test.score.low) / 2
    more = math.ceil(len(test.jobs) * ((reach / WANTED) ** 2 - 1))
    if more <= 0:
        return f"a difference of {WANTED:g} points would be shown by now"
    return f"a difference of {WANTED:g} points would be shown by about {more:,} more jobs"


def _from_to(sequence: Sequence) -> str:
    return f"{sequence.low:+.2f} to {sequence.high:+.2f}"

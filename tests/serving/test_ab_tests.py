"""A/B tests that are looked at after every job: false alarms, the advice, and the canary that widens by itself."""

import argparse
import contextlib
import itertools
import sqlite3
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from integration.lora_patch import answering, hooks
from integration.lora_patch import canary as canary_module
from integration.lora_patch.ab_test import ADAPTER, BASE, LADDER, ABTest, advise, next_share, running_test
from integration.lora_patch.canary import Canary
from integration.lora_patch.flags import schedule
from integration.lora_patch.jobs import migrate
from integration.lora_patch.report_jobs import AnsweredJob, read_jobs
from integration.lora_patch.sequences import Sequence, difference, share_difference, width
from integration.lora_patch.switching import active
from tests.serving.test_answering import GOOD, JSON_PROMPT, request, serving
from tests.serving.test_report import analysis, fill, scattered
from tests.simulations.ab_tests import looks, photographs, simulate
from tests.standin.running import ROOT, make_db

# -- the sequences ----------------------------------------------------------------------------------------------------


def test_the_formula_at_a_worked_example():
    # r = (-2 log a + log(1 - 2 log a)) / 300 = (8.1887 + 2.2180) / 300 at a = 0.05 / 3; t r = 3.4689 at t = 100
    assert width(100) == pytest.approx((2 * (1 + 1 / 3.4689) * np.log(4.4689**0.5 * 60)) ** 0.5, abs=1e-3)
    assert width(1e9) > width(1e4) > width(300) and width(3) > width(30) > width(300)


def test_difference_and_error_are_those_of_the_regression_with_clusters():
    """By hand, two strata: ordinary least squares on the arm and the strata's constants, HC2 summed by photograph."""
    rng = np.random.default_rng(1)
    n = 120
    strata, labels = np.repeat([0, 1], [80, 40]), rng.integers(0, 60, n)
    arm = rng.random(n) < np.where(strata, 0.5, 0.2)
    values = 6 + strata * 2 + 0.3 * arm + rng.normal(0, 1, n)
    x = np.column_stack([arm, strata == 0, strata == 1]).astype(float)
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ values
    hat = np.einsum("ij,jk,ik->i", x, inverse, x)
    influence = (x @ inverse)[:, 0] * (values - x @ beta) / np.sqrt(1 - hat)
    error = np.sqrt(np.square(np.bincount(labels, influence)).sum())
    found = difference(values, arm, labels, strata)
    information = sum((strata == s).sum() * arm[strata == s].mean() * (1 - arm[strata == s].mean()) for s in (0, 1))
    assert found.value == pytest.approx(beta[0])
    assert found.high - found.value == pytest.approx(error * width(4 * information))


def test_a_share_that_changes_with_the_times_fools_nobody():
    """Early jobs score 5 and go to the base; later ones score 8 and go half and half: no difference in truth."""
    rng = np.random.default_rng(2)
    early, late = 400, 200
    strata = np.repeat([0, 1], [early, late])
    arm = rng.random(early + late) < np.where(strata, 0.5, 0.05)
    values = np.where(strata, 8.0, 5.0) + rng.normal(0, 0.5, early + late)
    pooled = difference(values, arm, np.arange(600), np.zeros(600))
    assert pooled.low > 1  # what a plain comparison would have said
    assert difference(values, arm, np.arange(600), strata).sign == 0


def test_too_few_and_nothing_that_varies_have_no_interval():
    arm = np.array([True, False] * 9)
    few = difference(np.random.default_rng(0).normal(size=18), arm, np.arange(18), np.zeros(18))
    assert few.value is not None and few.low is None and few.lacking.startswith("too few photographs (9 answered")
    # twenty jobs of two photographs are two photographs
    same = difference(np.arange(40.0), np.arange(40) % 2 == 0, np.arange(40) % 4 // 2, np.zeros(40))
    assert same.low is None and same.lacking.startswith("too few photographs (2 ")
    still = difference(np.ones(40), np.arange(40) % 2 == 0, np.arange(40), np.zeros(40))
    assert still.low is None and still.lacking == "they do not vary"
    for nothing in (difference([], [], [], []), share_difference([], [], [], [])):
        assert nothing.value is None and nothing.lacking.startswith("too few photographs (0 ")
    only = share_difference([True] * 30, [True] * 30, range(30), [0] * 30)
    assert only.value is None and only.low is None


def test_shares_of_one_have_an_interval():
    arm = np.arange(100) % 2 == 0
    found = share_difference(np.ones(100), arm, np.arange(100), np.zeros(100))
    assert found.value == 0 and found.low == -found.high and 0.05 < found.high < 0.2


def test_the_simulation_computes_what_the_report_computes():
    rng = np.random.default_rng(3)
    tests, jobs = 6, 150
    labels, arm = photographs(rng, tests, jobs, 0.3), rng.random((tests, jobs)) < 0.4
    values, hits = rng.normal(6, 1, (tests, jobs)), rng.random((tests, jobs)) < 0.95
    for count, value, reach in looks(values, arm, labels):
        for row in range(tests) if count in (20, 60, 150) else ():
            ours = difference(values[row, :count], arm[row, :count], labels[row, :count], np.zeros(count))
            assert ours.value == pytest.approx(value[row])
            assert (ours.high or np.inf) - (ours.value if ours.high else 0) == pytest.approx(reach[row])
    for count, value, reach in looks(hits, arm, labels, shares=True):
        for row in range(tests) if count in (60, 150) else ():
            added = np.append(labels[row, :count], 1000 + np.arange(4))
            ours = difference(
                np.append(hits[row, :count], [0, 1, 0, 1]),
                np.append(arm[row, :count], [False, False, True, True]),
                added,
                np.zeros(count + 4),
            )
            assert (ours.value, ours.high - ours.value) == (pytest.approx(value[row]), pytest.approx(reach[row]))


def test_at_most_5_in_100_of_2000_tests_without_a_difference_raise_an_alarm():
    """Looked at after every one of 300 jobs; a plain 95% interval raises one in a third of them."""
    found = simulate(np.random.default_rng(4), tests=2000, jobs=300)
    assert found["any"] <= 0.05 and found["plain"] > 0.25
    # and they are no empty promise: a point of difference is found by then, nearly always
    assert simulate(np.random.default_rng(5), tests=500, jobs=300, effect=1.0)["score"] > 0.9


# -- the advice -------------------------------------------------------------------------------------------------------

SEEN = (40, 40)
OPEN, EVEN = Sequence(0.1, -0.4, 0.6, SEEN), Sequence(0.0, -0.015, 0.015, SEEN)
STILL = Sequence(0.0, -0.02, 0.03, SEEN)
FEW = Sequence(0.1, None, None, (9, 9), "too few photographs (9 answered by the base, 9 by the adapter; 10 needed)")


def a_test(score=OPEN, valid=EVEN, slowdown=STILL, share=0.05) -> ABTest:
    return ABTest([_job()] * 200, share, score, valid, slowdown)


def _job(arm=BASE, score=6.0, version=None, advisor="ansel", **more) -> AnsweredJob:
    told = dict(
        recorded=True, photograph="p", at=None, split=None, valid=True, fallback=False, failed=False, seconds=9.0
    )
    return AnsweredJob(arm=arm, advisor=advisor, version=version, score=score, **(told | more))


@pytest.mark.parametrize(
    ("test", "action", "share", "code", "said"),
    [
        (a_test(), "widen", 0.25, None, "Widen the test to 25%: the guardrails hold at that share."),
        (a_test(share=0.25), "widen", 0.5, None, "Widen the test to 50%"),
        (a_test(share=0.5), "keep", None, None, "nothing is decided; a difference of 0.5 points would be shown by now"),
        (a_test(Sequence(0, -1, 1, SEEN), share=0.5), "keep", None, None, "by about 600 more jobs"),
        (a_test(score=FEW), "keep", None, None, "too few photographs (9 answered by the base, 9 by the adapter"),
        # a loss of 15 in 100 is not left out: at 25% too many jobs might be lost
        (a_test(valid=Sequence(0, -0.15, 0.15, SEEN)), "keep", None, None, "guardrails hold at 25% is not shown yet"),
        (a_test(slowdown=Sequence(0, -0.3, 0.3, SEEN)), "keep", None, None, "guardrails hold at 25% is not shown yet"),
        (a_test(Sequence(0.5, 0.1, 0.9, SEEN)), "stop", None, 0, "0.50 points higher (+0.10 to +0.90)"),
        (a_test(Sequence(-0.5, -0.9, -0.1, SEEN)), "stop", None, 3, "0.50 points lower (-0.90 to -0.10)"),
        (a_test(Sequence(0.1, -0.1, 0.2, SEEN)), "stop", None, 5, "differ by less than 0.25 points (-0.10 to +0.20)"),
        # the guardrails come first, whatever the scores
        (a_test(Sequence(2, 1, 3, SEEN), Sequence(-0.1, -0.2, -0.05, SEEN)), "roll back", 0.0, 4, "10.0% fewer, 5.0%"),
        (a_test(valid=Sequence(-0.1, -0.2, -0.01, SEEN)), "keep", None, None, "is not shown yet"),
        (a_test(slowdown=Sequence(0.2, 0.1, 0.3, SEEN)), "roll back", 0.0, 4, "takes 22% longer, 11% at least"),
    ],
)  # fmt: skip
def test_what_to_do_next(test, action, share, code, said):
    advice = advise(test)
    assert (advice.action, advice.share, advice.exit_code) == (action, share, code)
    assert said in advice.sentence and advice.sentence.endswith(".") and advice == advise(test)


def test_the_wider_the_test_the_less_harm_it_may_do():
    doubtful = a_test(valid=Sequence(0, -0.08, 0.08, SEEN))
    assert next_share(doubtful, LADDER) == 0.25  # 8 in 100 of a quarter of the jobs: 2 in 100 of all
    assert next_share(replace(doubtful, share=0.25), LADDER) is None  # 4 in 100 of all at 50%
    assert next_share(replace(a_test(), share=0.5), LADDER) is None
    assert next_share(a_test(score=Sequence(-0.5, -0.9, -0.1, SEEN)), LADDER) is None


def test_each_advisor_has_a_test_of_its_own_version():
    jobs = [
        _job(ADAPTER, version="v1"), _job(BASE), _job(ADAPTER, version="v2", score=8.0), _job(BASE, score=5.0),
        _job(ADAPTER, version="v1", advisor="weston"), _job(BASE, advisor="weston"), _job("base"),
    ]  # fmt: skip
    assert running_test(jobs).jobs == jobs[2:6] and running_test(jobs).share == 0.5
    # back to v1: what v1 and v2 did before is another test
    assert running_test([*jobs, _job(ADAPTER, version="v1")]).jobs == [*jobs[4:6], _job(ADAPTER, version="v1")]
    assert running_test([]).jobs == [] and running_test([]).share is None


# -- the canary -------------------------------------------------------------------------------------------------------


def test_a_schedule_is_shares_that_rise():
    assert schedule("5%,25%, 50%") == (0.05, 0.25, 0.5) == schedule("0.05,0.25,0.5") and schedule("100%") == (1.0,)
    for wrong in ("", "50%,5%", "0%,5%", "5%,5%", "5%,150%", "a", "5%,,6%", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no schedule"):
            schedule(wrong)


@pytest.fixture
def jobs(tmp_path):
    tables = (ROOT / "tests" / "standin" / "schemas" / "mondrian_json.db.sql").read_text()
    path = make_db(tmp_path / "mondrian.db", tables, rows=0)
    migrate(path)
    return path


def serve(jobs, canary: Canary, tuned: int, base: int, mean=6.0, **more) -> None:
    """Record so many jobs of both arms at the canary's share, each as quick as the other, and have it look."""
    for arm, count in ((ADAPTER, tuned), (BASE, base)):
        version = {"adapter_version": "v2", **more} if arm == ADAPTER else {}
        for at, score in enumerate(scattered(mean, count, seed=count)):
            fill(jobs, arm, [score], ab_test_split=canary.split, **({"model_duration": 9 + at % 3} | version))
    canary.look()


def test_a_canary_widens_while_the_guardrails_hold_and_goes_on_after_a_restart(jobs, monkeypatch):
    canary = Canary((0.05, 0.25, 0.5), jobs, {"v2"})
    serve(jobs, canary, 5, 60)
    assert canary.split == 0.05  # undecided: it stays
    serve(jobs, canary, 60, 300)
    assert canary.split == 0.25
    serve(jobs, canary, 5, 15)
    assert Canary((0.05, 0.25, 0.5), jobs, {"v2"}).split == 0.25
    assert Canary((0.05, 0.25, 0.5), jobs, {"v3"}).split == 0.05  # another version begins again
    state = canary.state()
    assert state["split"] == 0.25 and state["problem"] is None and state["looked"]


def test_a_canary_that_stays_says_why(jobs):
    """An adapter whose scores are lower held the canary at its share for good, and /health did not say so."""
    canary = Canary((0.2, 0.5), jobs, {"v2"})
    assert canary.state()["advice"] is None  # not looked yet
    serve(jobs, canary, 0, 300, mean=6.0)
    for score in scattered(5.0, 100):
        fill(jobs, ADAPTER, [score], ab_test_split=0.2, adapter_version="v2", model_duration=10.0)
    canary.look()
    assert canary.split == 0.2 and "the adapter's scores are" in canary.state()["advice"]


def test_a_canary_ends_when_a_guardrail_is_broken_and_stays_ended(jobs):
    canary = Canary((0.2, 0.5), jobs, {"v2"})
    serve(jobs, canary, 40, 100, model_fallback=1)
    assert canary.split == 0.0 and "valid answers are 100.0% fewer" in canary.state()["problem"]
    serve(jobs, canary, 0, 20)
    assert canary.split == 0.0 and Canary((0.2, 0.5), jobs, {"v2"}).split == 0.0


def test_a_canary_without_a_table_stays_where_it_is(tmp_path):
    canary = Canary((0.05, 0.5), tmp_path / "none.db", {"v2"})
    canary.look()
    assert canary.split == 0.05 and "no such database" in canary.state()["problem"]


def test_a_canary_looks_once_in_so_many_jobs_and_never_twice_at_a_time(jobs, monkeypatch):
    canary, looked = Canary((0.05, 0.5), jobs, {"v2"}), []
    monkeypatch.setattr(canary_module.threading.Thread, "start", lambda thread: looked.append(thread))
    for _ in range(2 * canary_module.EVERY):
        canary.note()
    assert len(looked) == 2
    with canary.looking:
        canary.look()
    assert canary.looked is None


class AtOnce(threading.Thread):
    """A thread that has run when it is started: what it does comes in the same order in every test run."""

    def start(self) -> None:
        self.run()


def test_a_schedule_through_the_service_widens_pauses_and_stops_when_validity_is_sabotaged(jobs, monkeypatch):
    """Hundreds of jobs: drawn at the share in force, answered, recorded in the table, which the canary then reads."""
    ticks = itertools.cycle((0.0, 9.0, 0.0, 10.0, 0.0, 11.0))  # seconds: answers take 9, 10 and 11
    monkeypatch.setattr(answering, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(canary_module.threading, "Thread", AtOnce)
    rows = [
        (f"job-{at}", "completed", "ansel", f"{at}.jpg", f"2026-11-24T10:00:00.{at:06}", analysis(score))
        for at, score in enumerate(scattered(6.0, 500))
    ]
    shares, sabotaged = [], set()

    @hooks.generation
    def run(full_prompt):
        use = active.get()
        if use is not None:
            use.happened = True
        return "{" if use is not None and len(shares) in sabotaged else GOOD

    def serve(count: int) -> float:
        for number in range(len(shares), len(shares) + count):
            with request(service):
                hooks.choose(f"job-{number}", "ansel")
                run(JSON_PROMPT)
            shares.append(service.split)
        return shares[-1]

    open_throughout = contextlib.closing(sqlite3.connect(jobs))  # else each job's connection would clear the log
    with open_throughout as db, serving(monkeypatch, [], ab_test_schedule=(0.25, 0.3, 0.5)) as (service, adapter, _):
        columns = "id, status, advisor, filename, completed_at, analysis_markdown"
        with db:
            db.executemany(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)
        adapter.breaker.bound = 1.0  # it would take the adapter out before the test has shown anything
        service.adapters.mode = "ab_test"
        service.recorder.open(jobs)
        service.begin_canary()
        assert serve(180) == 0.25  # not yet decided: it stays
        assert serve(100) == 0.3
        sabotaged.update(range(280, 500, 2))  # half of its answers from now on
        serve(60)
        assert serve(160) == 0.0 and list(dict.fromkeys(shares)) == [0.25, 0.3, 0.0]  # paused at 30%, then ended
        assert "fewer" in service.health()["ab_test_schedule"]["problem"]
    test = running_test(read_jobs(jobs, in_test=True))
    assert len(test.jobs) == 500 and {job.split for job in test.jobs} == {0.25, 0.3, 0.0}

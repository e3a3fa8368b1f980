"""Compare the arms from the jobs table: figures of each, what the running test shows by now, and what to do next."""

import contextlib
import math
import sqlite3
import statistics
import time
from pathlib import Path

from .ab_test import ADAPTER, BASE, LADDER, ABTest, Advice, advise, as_dict, compare, running_test
from .arms import ARMS
from .errors import LoraError
from .report_jobs import AnsweredJob, read_jobs

HEADINGS = ["arm", "jobs", "photographs", "average score", "valid", "failed", "fallbacks", "median s", "p95 s",
            "versions"]  # fmt: skip
FORMS = {"average_score": "{:+.2f}", "valid_rate": "{:+.1%}", "slowdown": "{:+.0%}"}
TITLES = {"average_score": "average score", "valid_rate": "valid answers", "slowdown": "time of an answer"}


def make_report(jobs: list[AnsweredJob], days: float, schedule: tuple[float, ...] = LADDER) -> dict:
    """Return the figures of each arm over the last ``days`` (0: all), and the running test since its beginning."""
    since = time.time() - days * 86400 if days else 0
    recent = [job for job in jobs if not since or (job.at or 0) >= since]
    names = [*ARMS, *sorted({job.arm for job in recent} - set(ARMS))]
    arms = {name: _figures(own) for name in names if (own := [job for job in recent if job.arm == name])}
    test, advice = running_test(jobs), None
    randomised = {BASE, ADAPTER} <= {job.arm for job in test.jobs}
    if randomised:
        advice = advise(test, schedule)
    elif {"base", "fine_tuned"} <= set(arms):
        own = [job for job in recent if job.arm in ("base", "fine_tuned")]
        test = ABTest(own, None, *compare(own, "fine_tuned"))
        advice = Advice("keep", "The jobs were not assigned at random, so compare with care.")
    return {
        "days": days,
        "jobs": len(recent),
        "unrecorded": sum(not job.recorded for job in recent),
        "arms": arms,
        "test": as_dict(test, advice) | {"randomised": randomised} if advice else None,
        "sentence": _sentence(days, arms, test, advice),
    }


def _figures(jobs: list[AnsweredJob]) -> dict:
    scores = [job.score for job in jobs if job.score is not None]
    seconds = sorted(job.seconds for job in jobs if job.seconds is not None)
    return {
        "count": len(jobs),
        "photographs": len({job.photograph for job in jobs}),
        "versions": sorted({job.version for job in jobs if job.version}),
        "scored": len(scores),
        "average_score": statistics.fmean(scores) if scores else None,
        "one_score": scores[0] if len(scores) >= 5 and len(set(scores)) == 1 else None,  # does not judge at all
        "valid": sum(job.valid for job in jobs),
        "valid_rate": sum(job.valid for job in jobs) / len(jobs),
        "failed": sum(job.failed for job in jobs),
        "fallbacks": sum(job.fallback for job in jobs),
        "timed": len(seconds),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "p95_seconds": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
    }


def _sentence(days: float, arms: dict, test: ABTest, advice: Advice | None) -> str:
    """Return what a person should know first."""
    if advice:
        began = f"since {test.since}" if test.since else "so far"
        adapter = sum(job.arm in (ADAPTER, "fine_tuned") for job in test.jobs)
        base = len(test.jobs) - adapter
        counts = f"{began[:1].upper() + began[1:]} the adapter answered {adapter:,} jobs and the base {base:,}."
        return f"{advice.sentence} {counts}"
    period = f"In the last {days:g} days" if days else "Over all jobs"
    if not arms:
        return f"{period} no job was finished."
    counts = ", ".join(f"{arm['count']} by {name}" for name, arm in arms.items())
    return f"{period} {counts} were finished; with one arm alone there is nothing to compare."


def cells(arm: dict) -> list[str]:
    """Return an arm's figures as text, in the order of HEADINGS after the first."""

    def shown(value, form):
        return "-" if value is None else format(value, form)

    return [
        str(arm["count"]),
        str(arm["photographs"]),
        shown(arm["average_score"], ".2f"),
        shown(arm["valid_rate"], ".1%"),
        str(arm["failed"]),
        str(arm["fallbacks"]),
        shown(arm["median_seconds"], ".1f"),
        shown(arm["p95_seconds"], ".1f"),
        " ".join(arm["versions"]) or "-",
    ]


def differences(report: dict) -> list[tuple[str, str]]:
    """Return (what, difference with its interval in words) for each figure of the test."""
    rows = []
    for name, form in FORMS.items() if report["test"] else ():
        found = report["test"]["differences"][name]
        text = "-" if found["value"] is None else form.format(found["value"])
        if found["low"] is not None:
            text += f" (from {form.format(found['low'])} to {form.format(found['high'])})"
        rows.append((TITLES[name], text + (f": {found['lacking']}" if found["lacking"] else "")))
    return rows


def notes(report: dict) -> list[str]:
    """Return what else a reader should know, a sentence each."""
    lines = []
    if report["test"] and report["test"]["randomised"]:
        lines.append("The intervals hold at 95% together, however often you look.")
    for name, arm in report["arms"].items():
        if arm["one_score"] is not None:
            same = f"All {arm['scored']} scores of {name} are {arm['one_score']:g}"
            lines.append(f"{same}: copied from the prompt's example?")
    if report["unrecorded"]:
        lines.append(f"{report['unrecorded']} jobs carry no recorded arm and are sorted by their mode.")
    return lines


def as_table(report: dict) -> str:
    """Return the report as plain text."""
    rows = [HEADINGS, *([name, *cells(arm)] for name, arm in report["arms"].items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if report["test"]:
        lines += ["", f"adapter minus base, {report['test']['jobs']:,} jobs"]
        lines += [f"  {title:<18}{text}" for title, text in differences(report)]
    return "\n".join([*lines, "", *notes(report), report["sentence"]])


def watch(database: Path, seconds: float, schedule: tuple[float, ...] = LADDER) -> int:
    """Look at the running test every ``seconds`` and print what changed; return the exit code once it has an answer.

    0: the scores are higher; 3: lower; 4: a guardrail is broken; 5: they differ by too little to matter.
    """
    said, jobs = None, read_jobs(database, in_test=True)
    while True:
        test = running_test(jobs)
        advice = advise(test, schedule)
        if advice.sentence != said:
            said = advice.sentence
            print(f"{time.strftime('%Y-%m-%d %H:%M')}  {len(test.jobs):,} jobs  {said}", flush=True)
        if advice.exit_code is not None:
            return advice.exit_code
        time.sleep(seconds)
        with contextlib.suppress(LoraError, sqlite3.Error):  # busy now: look again next time
            jobs = read_jobs(database, in_test=True)

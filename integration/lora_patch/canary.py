"""A canary: an A/B test that begins small and is widened by itself, only while its guardrails hold.

    --ab_test_schedule 5%,25%,50%

The test begins at the first share. It goes to the next one when the jobs so far show that the guardrails of `ab_test`
hold there; while that is not decided it stays, and it goes to 0 when a guardrail is broken.
"""

import dataclasses
import logging
import sqlite3
import threading
import time
from collections.abc import Collection
from pathlib import Path

from .ab_test import ADAPTER, advise, broken_guardrails, next_share, running_test
from .errors import LoraError, one_line
from .log import say
from .report_jobs import read_jobs

EVERY = 20  # recorded jobs of the test between two looks


class Canary:
    """The share of a test that widens by itself. Jobs are drawn at ``split``; `note` is called for each recorded one.

    A service that is started again continues at the share that the jobs table records for these ``versions``.
    """

    def __init__(self, shares: tuple[float, ...], database: Path, versions: Collection[str | None] = ()):
        self.shares, self.database = shares, database
        self.split, self.problem, self.looked, self.advice = shares[0], None, None, None
        self.noted, self.looking = 0, threading.Lock()
        try:
            jobs = running_test(read_jobs(database, in_test=True)).jobs
        except (LoraError, sqlite3.Error, OSError) as error:
            self.problem = one_line(error)
            return
        tested = next((job.version for job in reversed(jobs) if job.arm == ADAPTER), None)
        last = next((job.split for job in reversed(jobs) if job.split is not None), None)
        if tested in versions and last in (0.0, *shares):
            self.split = last

    def note(self) -> None:
        """Count a recorded job of the test; every so often look at all of them, in a thread of its own."""
        self.noted += 1
        if self.noted % EVERY == 0:
            threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        """Read the jobs table and decide; an error is kept for `state` and changes nothing."""
        if self.split == 0.0 or not self.looking.acquire(blocking=False):
            return
        try:
            test = dataclasses.replace(running_test(read_jobs(self.database, in_test=True)), share=self.split)
            self.problem, self.looked = None, time.strftime("%Y-%m-%dT%H:%M:%S")
            self.advice = advise(test, self.shares).sentence
            if broken := broken_guardrails(test):
                self.split, self.problem = 0.0, broken
                say(logging.WARNING, f"A/B test ended, the base answers everything: {broken}")
            elif wider := next_share(test, self.shares):
                say(logging.INFO, f"A/B test widened from {self.split:.0%} to {wider:.0%}: the guardrails hold")
                self.split = wider
        except (LoraError, sqlite3.Error, OSError) as error:
            self.problem = one_line(error)
        finally:
            self.looking.release()

    def state(self) -> dict:
        """Return what /health says: the schedule, the present share, the last look, what it showed in one sentence, and
        what prevents a decision or has ended the test."""
        state = {name: getattr(self, name) for name in ("split", "looked", "advice", "problem")}
        return {"schedule": list(self.shares)} | state

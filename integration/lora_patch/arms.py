"""Which model answers a job: the arms of an A/B test, and the circuit breaker that takes an adapter out."""

import contextvars
import hashlib
import time
from collections import deque
from dataclasses import dataclass, field

ARMS = ("base", "fine_tuned", "ab_test_base", "ab_test_fine_tuned")  # what the jobs table says of a job

REQUEST_MODES = {  # what a request of the service's family may say under "mode"
    **dict.fromkeys(("lora", "rag+lora", "rag_lora", "fine_tuned"), "fine_tuned"),
    **dict.fromkeys(("baseline", "base", "rag"), "base"),
    "ab_test": "ab_test",
}


def assign(job_id: str, split: float) -> str:
    """Return base or fine_tuned: the same job always gets the same; a share ``split`` of all jobs gets fine_tuned."""
    number = int.from_bytes(hashlib.sha256(f"mondrian-ab-test:{job_id}".encode()).digest()[:8], "big")
    return "fine_tuned" if number / 2**64 < split else "base"


class Breaker:
    """Takes an adapter out of service when too many of its last answers were bad, until somebody arms it again.

    It opens as soon as the bad answers exceed ``bound`` of a whole window: it does not wait for the window to fill.
    """

    def __init__(self, window: int, bound: float):
        self.window, self.bound = window, bound
        self.arm()

    def arm(self) -> None:
        self.answers, self.since, self.reason = deque(maxlen=self.window), None, None

    def note(self, problem: str | None) -> bool:
        """Count an answer; return True when this one opens the breaker."""
        self.answers.append(problem is not None)
        if self.since is None and sum(self.answers) > self.bound * self.window:
            self.since, self.reason = time.strftime("%Y-%m-%dT%H:%M:%S"), problem
            return True
        return False

    def state(self) -> dict:
        return {
            "state": "closed" if self.since is None else "open",
            "bad": sum(self.answers),
            "answers": len(self.answers),
            "since": self.since,
            "reason": self.reason,
        }


@dataclass
class Given:
    """One answer that a job got."""

    prompt: str
    is_analysis: bool  # its prompt asks for an analysis, which is what a service stores
    judged: bool  # it is the adapter's, or was meant to be
    problem: str | None
    fallback: bool  # it is the base's in place of the adapter's


@dataclass
class Job:
    """One request on its way through the service; it may ask the model several times, and stores one answer."""

    id: str | None
    advisor: str | None
    arm: str  # base or fine_tuned
    adapter: object | None  # the `Adapter` of its advisor, also when the arm is base
    in_test: bool = False
    split: float | None = None  # of a job in a test: the adapter's share of jobs when the arm was drawn
    version: str | None = None
    seconds: float = 0.0  # of generation, without waiting for the model
    problem: str | None = None  # of the newest answer, and in the end of the stored one
    fallback: bool = False  # the same: the base's in place of the adapter's
    given: list[Given] = field(default_factory=list)
    settled: bool = False  # the first answer is begun: the arm is decided for good
    concluded: bool = False  # judged by the last answer so far
    counted: bool = False

    @property
    def done(self) -> bool:
        return bool(self.given)

    @property
    def stored(self) -> Given:
        """The answer that the service stores: the last analysis, or the last of all where none was asked for."""
        return next((one for one in reversed(self.given) if one.is_analysis), self.given[-1])

    @property
    def model_used(self) -> str:
        return f"ab_test_{self.arm}" if self.in_test else self.arm


@dataclass
class Scope:
    """A request: the jobs chosen in it (more than one when several advisors judge one photograph)."""

    jobs: list = field(default_factory=list)
    is_open: bool = True  # more answers may come
    found: Job | None = None  # made from the request's fields, where the view chose none


scope_of_request = contextvars.ContextVar("lora_patch_scope", default=None)
is_carried = contextvars.ContextVar("lora_patch_carried", default=False)  # in a thread that answers for a request
is_worker = contextvars.ContextVar("lora_patch_worker", default=False)  # takes jobs of one request after another
fields_of_request = contextvars.ContextVar("lora_patch_fields", default=None)  # what it says, for its threads
job_of_request = contextvars.ContextVar("lora_patch_job", default=None)

"""Run a request's generation in its arm: one at a time; the base replaces a bad answer of an adapter."""

import contextlib
import functools
import logging
import threading
import time
import uuid
from collections import Counter

from .adapters import Adapter
from .answers import analysis_problem, asks_for_analysis, text_of
from .arms import ARMS, REQUEST_MODES, Given, Job, Scope, assign, is_carried, scope_of_request
from .calls import Call
from .errors import one_line
from .flags import flags
from .in_use import AdaptersInUse
from .jobs import Recorder
from .log import say
from .own_generation import Unknown, Wanted
from .streams import ReaderLeft, Relay, with_text
from .switching import Use, switched_on

MOST_REQUESTS = 1000  # that wait in a queue; older ones are forgotten
TAIL = 300  # characters of a prompt's end by which the passes of a service are told apart


class Answering:
    """Decides a job's arm and runs its generation."""

    def __init__(self, adapters: AdaptersInUse, recorder: Recorder):
        self.adapters, self.recorder = adapters, recorder
        self.generating = adapters.own.lock  # one generation at a time
        self.concluding, self.noting = threading.Lock(), threading.Lock()
        self.counts, self.prompts = Counter(), Counter()
        self.canary = None  # a `canary.Canary`: a test that is widened by itself
        self.requests: dict[str, tuple[dict, Scope | None]] = {}  # job's id -> its request's fields, and its scope
        self.stored: dict[str, bool] = {}  # end of a prompt -> whether its answer was the last of its job

    @property
    def split(self) -> float:
        """The share of jobs that a test gives to the adapter now."""
        return self.canary.split if self.canary is not None else self.adapters.split

    def begin_canary(self, split: float | None = None) -> None:
        """Begin, or continue, the schedule of --ab_test_schedule; a ``split`` that is given by hand ends it."""
        versions = {adapter.version for adapter in self.adapters.table.values()}
        if flags.ab_test_schedule and split is None and self.adapters.mode == "ab_test" and self.recorder.path:
            from .canary import Canary  # numpy: slow to import

            self.canary = Canary(flags.ab_test_schedule, self.recorder.path, versions)
        else:
            self.canary = None

    def choose(self, job_id: str | None, advisor: str | None, fields: dict) -> Job:
        """Make a job and choose its arm: by the request's own ``mode`` if it has one, else as the service's mode says.

        ``fields``: what the request says besides, see `routes.request_fields`.
        """
        if isinstance(advisor, dict):
            advisor = advisor.get("id")
        elif isinstance(advisor, list | tuple) and len(advisor) == 1:
            advisor = advisor[0]
        advisor = str(advisor).strip().lower() if advisor else None
        adapter = self.adapters.of(advisor)
        job = Job(str(job_id) if job_id else None, advisor, "base", adapter)
        if adapter is not None:
            mode = REQUEST_MODES.get(str(fields.get("mode") or "").strip().lower(), self.adapters.mode)
            if fields.get("override") in ("base", "fine_tuned") and flags.allow_arm_override:
                mode = fields["override"]
            if mode == "ab_test":
                job.in_test, job.split = True, self.split
                job.arm = assign(job.id or uuid.uuid4().hex, job.split)
            else:
                job.arm = mode
        scope = scope_of_request.get()
        if scope is not None:
            scope.jobs.append(job)
        return job

    def request_of(self, job_id: str) -> tuple[dict, Scope | None]:
        """Return, once, the fields and the scope of the request that left a job to a worker; ({}, None) without one."""
        with self.noting:
            return self.requests.pop(job_id, ({}, None))

    def note_request(self, job_ids: list[str], fields: dict) -> None:
        """Keep what a request said of jobs that another thread will answer, when the request is over."""
        with self.noting:
            for job_id in job_ids:
                self.requests[job_id] = fields, scope_of_request.get()
            while len(self.requests) > MOST_REQUESTS:
                self.requests.pop(next(iter(self.requests)))

    def generate(self, function, args: tuple, kwargs: dict, job: Job):
        """Run mlx_vlm.generate, or a function that returns an answer, in the job's arm; see `hooks.generation`."""
        call = Call(function, args, kwargs)
        with self._turn(job, call) as adapter:
            if adapter is None:
                return self._run(call, None)[0]
            error = None
            try:
                result, happened = self._run(call, adapter)
                problem = self._problem(result, happened, call)
            except Exception as raised:  # whatever went wrong with the adapter, the base may do better
                error, problem = raised, one_line(raised)
            if self._falls_back(job, problem):
                call.use_photo(call.prepared if job.in_test else call.photo)
                return self._run(call, None)[0]
            if error is not None:
                raise error
            return result

    def stream(self, function, args: tuple, kwargs: dict, job: Job):
        """The same for one that yields its answer, which is generated in a thread of its own.

        While a retry on the base is possible, the pieces come without text, so that the reader sees progress. The
        text comes with the last piece, once the answer is found to be valid: what was sent cannot be taken back.
        """
        relay = Relay()
        yield from relay.read(functools.partial(self._produce, Call(function, args, kwargs), job, relay))

    def _produce(self, call: Call, job: Job, relay: Relay) -> None:
        with self._turn(job, call) as adapter:
            if adapter is None:
                self._pieces(call, None, relay.put)
                return
            # a constrained answer is valid unless it is cut short: its text need not wait
            holds = flags.fallback_on_invalid and not flags.constrained and not self._is_intermediate(call.prompt)
            held, error = [], None

            def put(piece):
                if holds and held and (blank := with_text(held[-1], "")) is not None:
                    relay.put(blank)
                held.append(piece)
                if not holds:
                    relay.put(piece)

            try:
                happened = self._pieces(call, adapter, put)
                problem = self._problem(held, happened, call)
            except ReaderLeft:  # says nothing about the answer
                call.left = True
                raise
            except Exception as raised:
                error, problem = raised, one_line(raised)
            if self._falls_back(job, problem, can=holds):
                call.use_photo(call.prepared if job.in_test else call.photo)
                self._pieces(call, None, relay.put)
            elif error is not None:
                raise error
            elif holds:
                whole = with_text(held[-1], text_of(held) or "") if held else None
                for piece in held if whole is None else [whole]:
                    relay.put(piece)

    @contextlib.contextmanager
    def _turn(self, job: Job, call: Call):
        """Wait for the model, decide the arm, and yield the adapter to answer with. The lock covers nothing slow.

        The photograph of a tuned answer, and of both arms of a test, is the one that training would see.
        """
        seconds = None
        try:
            if job.arm == "fine_tuned" or job.in_test:
                call.prepare_photo(job.adapter.max_image_size)
            with self.generating:
                adapter = self._settle(job)
                if adapter is not None or job.in_test:
                    call.use_photo(call.prepared)
                job.problem, job.fallback = None, False
                begun = time.perf_counter()
                try:
                    yield adapter
                finally:
                    seconds = time.perf_counter() - begun
        finally:
            call.remove_files()
            if seconds is not None:
                job.seconds += seconds
                self._finish(job, call.prompt, seconds if adapter is not None and not call.left else None)

    def _settle(self, job: Job) -> Adapter | None:
        """Decide, once it is this job's turn, whether the adapter is used: its breaker may have opened meanwhile.

        Once decided, a job keeps its arm: all its answers come from one model.
        """
        if not job.settled and job.arm == "fine_tuned" and job.adapter.breaker.since is not None:
            job.arm, job.in_test, job.split = "base", False, None  # an answer of the base, but no part of the test
        job.settled = True
        if job.arm != "fine_tuned":
            return None
        job.version = job.adapter.version
        return job.adapter

    def _run(self, call: Call, adapter: Adapter | None):
        """Return (result, whether the adapter took part)."""
        use = Use(adapter) if adapter else None
        call.rewind()
        wanted = self._understood(call, adapter)
        if wanted is not None:
            try:
                return self.adapters.own.whole(wanted, adapter, self._is_bound(call)), adapter is not None
            except Exception as error:  # what the engine cannot do, mlx-vlm may; else its error is the service's
                self._engine_failed(call, error)
        with switched_on(use):
            result = call.function(*call.args, **call.kwargs)
        return result, bool(use and use.happened)

    def _pieces(self, call: Call, adapter: Adapter | None, put) -> bool:
        """Put the pieces of a generator's answer; return whether the adapter took part."""
        use = Use(adapter) if adapter else None
        call.rewind()
        with switched_on(use), contextlib.closing(self._steps(call, adapter, use)) as pieces:
            for piece in pieces:
                put(piece)
        return bool(use and use.happened)

    def _steps(self, call: Call, adapter: Adapter | None, use: Use | None):
        wanted, begun = self._understood(call, adapter), False
        if wanted is not None:
            try:
                for piece in self.adapters.own.pieces(wanted, adapter, self._is_bound(call)):
                    begun = True
                    yield piece
                if use is not None:
                    use.happened = True
                return
            except Exception as error:
                if begun:
                    raise
                self._engine_failed(call, error)
        yield from call.function(*call.args, **call.kwargs)

    def _engine_failed(self, call: Call, error: Exception) -> None:
        self.adapters.own.leave_to_mlx_vlm(call, f"the engine failed ({type(error).__name__})", one_line(error))

    def _understood(self, call: Call, adapter: Adapter | None) -> Wanted | None:
        """Return what this package's own generation is to answer; None where mlx-vlm's is."""
        try:
            return self.adapters.own.understand(call, adapter)
        except Unknown as reason:
            self.adapters.own.leave_to_mlx_vlm(call, str(reason))
            return None

    def _is_bound(self, call: Call) -> bool:
        """Tell whether --constrained is for this answer: not for one that the service itself goes on from."""
        return not self._is_intermediate(call.prompt)

    def _problem(self, result, happened: bool, call: Call) -> str | None:
        if not happened:
            return "no use of the adapter (is the model loaded through lora_patch.attach?)"
        text = text_of(result)
        if (text is None and result is not None) or self._is_intermediate(call.prompt):
            return None  # a result of a kind that we cannot look into, or one that is not what is stored
        return analysis_problem(text, call.prompt)

    def _falls_back(self, job: Job, problem: str | None, can: bool = True) -> bool:
        job.problem = problem
        job.fallback = problem is not None and flags.fallback_on_invalid and can
        if job.fallback:
            say(logging.WARNING, f"job {job.id!r}: {job.version} gave {problem}; the base answers instead")
        return job.fallback

    def _is_intermediate(self, prompt: str) -> bool:
        """Tell whether jobs of this service go on after an answer to this prompt: only what is stored is judged."""
        return self.stored.get(prompt[-TAIL:]) is False

    def _finish(self, job: Job, prompt: str, seconds: float | None) -> None:
        """Note an answer; ``seconds`` of one that the adapter is judged by, else None."""
        limit = flags.breaker_time_limit or getattr(flags.service, "model_timeout", None)
        if seconds is not None and job.problem is None and limit and seconds > float(limit):
            job.problem = f"an answer after {seconds:.0f} s, more than {float(limit):g} s"
        job.given.append(Given(prompt, asks_for_analysis(prompt), seconds is not None, job.problem, job.fallback))
        job.concluded = False
        scope = scope_of_request.get()
        if not is_carried.get() and (scope is None or not scope.is_open):
            self.conclude(job)

    def conclude_all(self, scope: Scope | None) -> None:
        """Conclude the jobs of a request; recorded again at its end, since the service may write the row again."""
        for job in scope.jobs if scope is not None else ():
            if job.done:
                self.conclude(job)

    def conclude(self, job: Job) -> None:
        """Judge and record a job that asks the model no more: by the answer that is stored."""
        stored = job.stored
        prompt = self.recorder.compare_prompt(stored.prompt, job.advisor) if job.adapter is not None else None
        with self.concluding:
            is_new, job.concluded = not job.concluded, True
            if is_new:
                job.problem, job.fallback = stored.problem, stored.fallback
                self._count(job, stored, prompt)
        self.recorder.record(job)
        if is_new and job.in_test and self.canary is not None:
            self.canary.note()

    def _count(self, job: Job, stored: Given, prompt: str | None) -> None:
        self.counts[job.model_used] += not job.counted
        job.counted = True
        self.counts["fallback"] += job.fallback
        self.counts["invalid"] += job.problem is not None
        if prompt is not None:
            self.prompts[prompt] += 1
        if len(self.stored) > 1000:
            self.stored.clear()
        for one in job.given:
            if one is not stored:
                self.stored.setdefault(one.prompt[-TAIL:], False)
        self.stored[stored.prompt[-TAIL:]] = True
        if stored.judged and job.adapter.breaker.note(job.problem):
            say(
                logging.ERROR,
                f"CIRCUIT BREAKER: {job.adapter.path} ({job.version}) gave too many bad answers, the last one: "
                f"{job.problem}; the base answers until POST /lora/rearm or a reload to another version",
            )

    def health(self) -> dict:
        """Return what /health says of the answers so far."""
        return {
            "ab_test_split": self.split,
            "ab_test_schedule": self.canary and self.canary.state(),
            "arms": {name: self.counts[name] for name in ARMS},
            "invalid": self.counts["invalid"],
            "fallbacks": self.counts["fallback"],
            "prompts": dict(self.prompts),
        }

"""Run a request's generation in its arm: one at a time, a bad answer of an adapter made good by the base."""

import functools
import logging
import threading
import time
import uuid
from collections import Counter

from .adapters import Adapter
from .answers import analysis_problem, text_of
from .arms import ARMS, Job, assign, scope_of_request
from .calls import Call, prepared
from .errors import one_line
from .flags import flags
from .in_use import AdaptersInUse
from .jobs import Recorder
from .log import say
from .switching import Use, switched_on


class Answering:
    """Decides a job's arm and runs its generation."""

    def __init__(self, adapters: AdaptersInUse, recorder: Recorder):
        self.adapters, self.recorder = adapters, recorder
        self.generating = threading.Lock()  # mlx-vlm keeps state in the model: one generation at a time
        self.counts, self.prompts = Counter(), Counter()

    def choose(self, job_id: str | None, advisor: str | None, override: str | None) -> Job:
        if isinstance(advisor, dict):
            advisor = advisor.get("id")
        elif isinstance(advisor, list | tuple) and len(advisor) == 1:
            advisor = advisor[0]
        advisor = str(advisor).strip().lower() if advisor else None
        adapter = self.adapters.of(advisor)
        job = Job(str(job_id) if job_id else None, advisor, "base", adapter)
        if adapter is not None and self.adapters.mode != "base":
            if override in ("base", "fine_tuned") and flags.allow_arm_override:
                job.arm = override
            elif self.adapters.mode == "fine_tuned":
                job.arm = "fine_tuned"
            else:
                job.in_test = True
                job.arm = assign(job.id or uuid.uuid4().hex, self.adapters.split)
        scope = scope_of_request.get()
        if scope is not None:
            scope.jobs.append(job)
        return job

    def generate(self, function, args: tuple, kwargs: dict, job: Job):
        """Run mlx_vlm.generate, or a function that returns an answer, in the job's arm; see `generation`."""
        call = Call(function, args, kwargs)
        with self.generating:
            use_adapter = self.settle(job)
            begun = time.perf_counter()
            try:
                with prepared(call, job.adapter.max_image_size if use_adapter or job.in_test else None):
                    if not use_adapter:
                        return self.run(call, None)[0]
                    result, problem, error = self.attempt(call, job.adapter)
                    self.judge(job, problem, time.perf_counter() - begun)
                    if problem is None or not flags.fallback_on_invalid:
                        if error is not None:
                            raise error
                        return result
                    say(logging.WARNING, f"job {job.id!r}: {job.version} gave {problem}; the base answers instead")
                    job.fallback = True
                    if job.in_test:  # the arms of a test see the same photograph
                        return self.run(call, None)[0]
                return self.run(call, None)[0]
            finally:
                job.seconds += time.perf_counter() - begun
                self.finish(job, call.prompt)

    def stream(self, function, args: tuple, kwargs: dict, job: Job):
        """The same for one that yields its answer. With a retry on the base in prospect, nothing of the adapter's is
        passed on before it has been found good: what has been sent cannot be taken back."""
        if job.arm == "fine_tuned" and flags.fallback_on_invalid:
            whole = functools.wraps(function)(lambda *positional, **named: list(function(*positional, **named)))
            yield from self.generate(whole, args, kwargs, job)
            return
        call = Call(function, args, kwargs)
        with self.generating:
            use_adapter = self.settle(job)
            begun, pieces, error, ended = time.perf_counter(), [], None, False
            use = Use(job.adapter) if use_adapter else None
            try:
                with prepared(call, job.adapter.max_image_size if use_adapter or job.in_test else None):
                    steps = function(*call.args, **call.kwargs)
                    while True:
                        with switched_on(use):  # set anew for each piece: between them this is the caller's context
                            try:
                                piece = next(steps)
                            except StopIteration:
                                ended = True
                                break
                        pieces.append(piece)
                        yield piece
            except Exception as problem:
                error, ended = one_line(problem), True
                raise
            finally:
                if use_adapter and ended:  # a reader who turned away says nothing about the answer
                    self.judge(job, error or self.problem_of(pieces, use.happened, call), time.perf_counter() - begun)
                job.seconds += time.perf_counter() - begun
                self.finish(job, call.prompt)

    def settle(self, job: Job) -> bool:
        """Decide, with the model in hand, whether the adapter is used: its breaker may have gone off in the queue."""
        if job.arm != "fine_tuned" or job.adapter is None:
            return False
        if job.adapter.breaker.since is not None:
            job.arm, job.in_test = "base", False  # an answer of the base, but no part of the test
            return False
        job.version = job.adapter.version
        return True

    def attempt(self, call: Call, adapter: Adapter):
        """Return (result, problem, exception) of an answer with the adapter."""
        try:
            result, happened = self.run(call, adapter)
        except Exception as error:  # whatever the adapter led to, the base may do better
            return None, one_line(error), error
        return result, self.problem_of(result, happened, call), None

    def problem_of(self, result, happened: bool, call: Call) -> str | None:
        if not happened:
            return "no use of the adapter (is the model loaded through lora_patch.attach?)"
        text = text_of(result)
        unknown = text is None and result is not None  # a result of a kind that we cannot look into
        return None if unknown else analysis_problem(text, call.prompt)

    def run(self, call: Call, adapter: Adapter | None):
        use = Use(adapter) if adapter else None
        call.rewind()
        with switched_on(use):
            result = call.function(*call.args, **call.kwargs)
        return result, bool(use and use.happened)

    def judge(self, job: Job, problem: str | None, seconds: float) -> None:
        limit = flags.breaker_time_limit or getattr(flags.service, "model_timeout", None)
        if problem is None and limit and seconds > float(limit):
            problem = f"an answer after {seconds:.0f} s, more than {float(limit):g} s"
        if problem is not None:
            self.counts["invalid"] += 1
        if job.adapter.breaker.note(problem):
            say(logging.ERROR, f"CIRCUIT BREAKER: {job.adapter.path} ({job.version}) gave too many bad answers, "
                f"the last one: {problem}; the base answers until POST /lora/rearm or a reload")  # fmt: skip

    def finish(self, job: Job, prompt: str) -> None:
        if not job.done:
            self.counts[job.model_used] += 1
        if job.fallback:
            self.counts["fallback"] += 1
        job.done = True
        if job.adapter is not None:
            self.prompts[self.recorder.compare_prompt(prompt, job.advisor)] += 1
        scope = scope_of_request.get()
        if scope is None or not scope.is_open:
            self.recorder.record(job)

    def health(self) -> dict:
        """Return what /health says of the answers so far."""
        return {
            "arms": {name: self.counts[name] for name in ARMS},
            "invalid": self.counts["invalid"],
            "fallbacks": self.counts["fallback"],
            "prompts": dict(self.prompts),
        }

"""What the service's Flask app gains: headers, /health's part, and the routes /lora/reload and /lora/rearm."""

import argparse
import functools
import json
import logging
import sys

from .answering import Answering
from .arms import Scope, job_of_request, scope_of_request
from .errors import LoraError, one_line
from .flags import MODES, share
from .in_use import distinct
from .log import say


def request_fields() -> dict:
    """Return advisor, job id and override as they stand in the Flask request that is being answered, if any."""
    flask = sys.modules.get("flask")
    if flask is None or not flask.has_request_context():
        return {}
    request = flask.request
    sources = [request.values, request.view_args or {}]
    if request.is_json and isinstance(request.get_json(silent=True), dict):
        sources.append(request.get_json(silent=True))

    def first(*names):
        return next((source[name] for name in names for source in sources if source.get(name)), None)

    return {
        "advisor": first("advisor", "advisor_id", "advisors"),
        "job_id": first("job_id", "jobId", "jobid", "id") or request.headers.get("X-Job-ID"),
        "mode": first("mode"),
        "override": request.headers.get("X-Lora-Arm") or first("lora_arm"),
    }


class Routes:
    """The hooks and routes of one app."""

    def __init__(self, service: Answering):
        self.service = service

    def add_to(self, app) -> None:
        app.before_request(self.before)
        app.after_request(self.after)
        app.add_url_rule("/lora/reload", "lora_reload", self.reload, methods=["POST"])
        app.add_url_rule("/lora/rearm", "lora_rearm", self.rearm, methods=["POST"])

    def before(self) -> None:
        scope_of_request.set(Scope())
        job_of_request.set(None)

    def after(self, response):
        flask = sys.modules["flask"]
        scope = scope_of_request.get()
        if response.status_code == 202:  # a job that a worker answers
            self._note(response)
        if scope is not None:
            if response.is_streamed:  # the model may be asked while the response is read
                response.call_on_close(functools.partial(self.close, scope))
            else:
                self.close(scope)
            if scope.jobs:
                job = scope.jobs[-1]
                response.headers["X-Model-Used"] = job.model_used
                if job.arm == "fine_tuned" and job.adapter is not None:
                    response.headers["X-Adapter-Version"] = job.adapter.version
                if job.fallback:
                    response.headers["X-Model-Fallback"] = "base"
        if flask.request.path.rstrip("/") == "/health" and response.is_json:
            content = response.get_json(silent=True)
            if isinstance(content, dict):
                content.setdefault("model_mode", self.service.adapters.mode)
                content["lora"] = self.health()
                response.set_data(json.dumps(content))
        return response

    def _note(self, response) -> None:
        """Keep what the request said of its job, whose id is the request's or the one that the view answers."""
        fields = request_fields()
        content = response.get_json(silent=True) if response.is_json else None
        job_id = (content.get("job_id") if isinstance(content, dict) else None) or fields.get("job_id")
        if job_id and fields.get("mode"):
            self.service.note_request([str(job_id)], fields)

    def close(self, scope: Scope) -> None:
        scope.is_open = False
        self.service.conclude_all(scope)

    def health(self) -> dict:
        service = self.service
        return service.adapters.health() | service.health() | service.recorder.health() | service.adapters.own.health()

    def reload(self):
        flask = sys.modules["flask"]
        if refused := self.refused():
            return refused
        asked = flask.request.get_json(silent=True)
        asked = asked if isinstance(asked, dict) else flask.request.values
        mode, split = asked.get("model_mode"), asked.get("ab_test_split")
        try:
            if mode is not None and mode not in MODES:
                raise LoraError(f"model_mode {str(mode)[:40]!r} is none of {', '.join(MODES)}")
            split = None if split is None else share(str(split))
            done = self.service.adapters.reload(mode, split)
            self.service.begin_canary(split)
            return flask.jsonify(done)
        except (ValueError, OSError, MemoryError, argparse.ArgumentTypeError) as error:
            say(logging.ERROR, f"reload refused, everything stays as it is: {one_line(error)}")
            mode = self.service.adapters.mode
            return flask.jsonify(status="refused", error=one_line(error), model_mode=mode), 409

    def rearm(self):
        if refused := self.refused():
            return refused
        for adapter in distinct(self.service.adapters.table):
            adapter.breaker.arm()
        say(logging.INFO, "circuit breakers armed again")
        return sys.modules["flask"].jsonify(status="armed", adapters=list(self.service.adapters.table))

    @staticmethod
    def refused():
        """Return a 403 unless the request comes straight from this machine, and not from a web page in its browser."""
        flask = sys.modules["flask"]
        headers = flask.request.headers
        address = (flask.request.remote_addr or "").removeprefix("::ffff:")
        forwarded = any(name in headers for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Origin"))
        if forwarded or not (address == "::1" or address.startswith("127.")):
            return flask.jsonify(error="only from the machine that the service runs on"), 403
        return None

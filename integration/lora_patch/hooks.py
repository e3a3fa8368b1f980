"""What the lines in the service call. Without our flags every function here returns at once and nothing changes."""

import contextvars
import functools
import inspect
import logging
import os
import sys
import threading

from .answering import Answering
from .arms import REQUEST_MODES, Job, fields_of_request, is_carried, is_worker, job_of_request, scope_of_request
from .calls import sweep_photos
from .errors import LoraError, one_line
from .flags import flags
from .in_use import AdaptersInUse
from .jobs import Recorder
from .log import say
from .routes import Routes, request_fields
from .sources import EVERYONE
from .switching import is_switchable, within

service = Answering(AdaptersInUse(), Recorder())  # of this process; unused without our flags


def attach(loaded, name: str | os.PathLike | None = None):
    """Prepare what mlx_vlm.load(name) returned, (model, processor, ...), for the adapters; returns it."""
    if flags.is_on and loaded[0] is not service.adapters.model:  # the call itself may have been followed at run time
        try:
            service.adapters.adopt(loaded[0], loaded[1] if len(loaded) > 1 else None, name)
        except LoraError as error:
            if threading.current_thread() is threading.main_thread():
                _refuse_to_start(error)
            raise
    return loaded


def generation(function):
    """Wrap mlx_vlm.generate or stream_generate so that it answers in the arm of the request that is being served.

    It is wrapped where it is called, so that our lock is taken last and released first, whatever locks the service
    has. It also decorates a function of the service's own that returns an answer.
    """
    if hasattr(function, "lora_patch"):
        return function

    @functools.wraps(function)
    def answer(*args, **kwargs):
        if not flags.is_on or within.get() or _asks_another_model(function, args, kwargs):
            return function(*args, **kwargs)
        if inspect.isgeneratorfunction(inspect.unwrap(function)):
            return _stream(function, args, kwargs)
        return service.generate(function, args, kwargs, _current_job())

    answer.lora_patch = True
    return answer


def _asks_another_model(function, args: tuple, kwargs: dict) -> bool:
    """Tell whether mlx_vlm is asked with a model that no adapter is for: a service may have a second one."""
    model = args[0] if args else kwargs.get("model")
    served = service.adapters.model
    if served is None or model is served or not (function.__module__ or "").startswith("mlx_vlm"):
        return False
    return hasattr(model, "named_modules") and not is_switchable(model)


def _refuse_to_start(error: LoraError):
    """End the process with one line and exit code 1."""
    if not [thread for thread in threading.enumerate() if thread.daemon]:
        sys.exit(f"lora_patch: {error}")
    # A thread of the service may be loading the model. The interpreter's end would stop it in the middle of MLX's
    # code, which C++ answers with an abort (exit code 134): there is nothing to clean up, so leave at once.
    print(f"lora_patch: {error}", file=sys.stderr, flush=True)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(1)


def _stream(function, args: tuple, kwargs: dict):
    yield from service.stream(function, args, kwargs, _current_job())  # chosen with the first piece, not before


def choose(job_id=None, advisor=None, mode=None) -> None:
    """Say, before the model is asked, which job this is and for which advisor: that decides its arm.

    ``mode`` is what a queue says of the job. The request itself may have said nothing, and the service have filled in
    its own default: a mode of the base is taken from the request alone.
    """
    if flags.is_on:
        fields = request_fields()
        if not fields:
            fields, scope = service.request_of(str(job_id))
            last = scope_of_request.get()
            if scope is not None or is_worker.get() or (last is not None and not last.is_open):
                scope_of_request.set(scope)
                is_worker.set(True)
        if not fields and REQUEST_MODES.get(str(mode).lower(), "base") != "base":
            fields = {"mode": mode}
        job = service.choose(job_id or fields.get("job_id"), advisor or fields.get("advisor"), fields)
        job_of_request.set(job)


def _current_job() -> Job:
    """Return the job that `choose` was called for; without such a call, one made from the request's own fields."""
    if (job := job_of_request.get()) is not None:
        return job
    scope = scope_of_request.get()
    if scope is not None and scope.found is not None:
        return scope.found
    fields = request_fields() or fields_of_request.get() or {}
    job = service.choose(fields.get("job_id"), fields.get("advisor"), fields)
    if scope is not None:
        scope.found = job
    return job


def carry(function):
    """Return the function as something that another thread can run for the same request."""
    if not flags.is_on:
        return function
    context = contextvars.copy_context()

    @functools.wraps(function)
    def carried(*args, **kwargs):
        def call():
            is_outermost, scope = not is_carried.get(), scope_of_request.get()
            is_carried.set(True)
            try:
                return function(*args, **kwargs)
            finally:
                if is_outermost and (scope is None or not scope.is_open):  # else the waiting thread does it
                    service.conclude_all(scope)

        return context.copy().run(call)

    return carried


def start(app, get_model=None, db_path=None):
    """Begin serving adapters: read and check them, load the model, migrate the jobs table, add the routes. Returns app.

    Exits with one line when fine_tuned cannot be served. Without our flags it does nothing.
    """
    if not flags.is_on or getattr(app, "_lora_patch", False):
        return app
    app._lora_patch = True
    adapters = service.adapters
    try:
        adapters.begin()
        adapters.fit(adapters.table)  # before the model is loaded: a refusal need not wait for gigabytes
        if adapters.table and adapters.model is None and get_model is not None:
            try:
                get_model()
            except LoraError:
                raise
            except Exception as error:  # the service would fail with its first request
                raise LoraError(f"{adapters.base_name}: cannot be loaded ({one_line(error)})") from error
        adapters.begin()  # raises an error that a thread of the service may have swallowed
    except LoraError as error:
        if adapters.mode == "fine_tuned":
            _refuse_to_start(error)
        adapters.fail(error)
    service.recorder.open(db_path)
    service.begin_canary()
    sweep_photos()
    Routes(service).add_to(app)
    for advisor, adapter in adapters.table.items():
        who = "every advisor" if advisor == EVERYONE else advisor
        ranks = ", ".join(map(str, adapter.ranks))
        say(logging.INFO, f"{who}: {adapter.path} ({adapter.version}, rank {ranks}, {adapter.nbytes / 1e6:.1f} MB)")
    split = f", split {service.split:g}" if adapters.mode == "ab_test" else ""
    say(logging.INFO, f"model mode {adapters.mode}{split}")
    return app

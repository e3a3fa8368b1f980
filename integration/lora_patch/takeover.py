"""Replace mlx_vlm's functions wherever the service's modules see them, and let its threads know their request.

The lines in a service file name its own calls. Modules of the service's own (`strategies/*.py`, a model manager) load
the model and ask it too; they get the same functions at run time. It begins when one of our flags is given.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import importlib.util
import inspect
import queue
import re
import sys
import threading

from .arms import fields_of_request, job_of_request, scope_of_request

NAMES = ("load", "generate", "stream_generate")
PUBLIC = ("mlx_vlm", "mlx_vlm.utils", "mlx_vlm.generate")  # where a service imports them from
LONGEST_ID = 200  # characters of a job's id; longer texts in a queue are something else
_begun = threading.Event()


def begin() -> None:
    """Begin to stand between the service and mlx_vlm, now or as soon as mlx_vlm is imported. Once a process."""
    if _begun.is_set():
        return
    _begun.set()
    _share_with_threads()
    if "mlx_vlm" in sys.modules:
        replace_functions()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Wait for the service to import mlx_vlm: importing it earlier would change in which environment it starts."""

    def find_spec(self, name, path=None, target=None):
        if name != "mlx_vlm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                replace_functions()

            spec.loader.exec_module = exec_module
        return spec


def replace_functions() -> None:
    """Put ours in place of mlx_vlm's functions, in its public modules and in all modules that imported them."""
    from .hooks import attach, generation

    ours = {}
    for module in filter(None, map(sys.modules.get, PUBLIC)):
        for name in NAMES:
            function = vars(module).get(name)
            if inspect.isfunction(function) and not hasattr(function, "lora_patch"):
                replacement = _load(function, attach) if name == "load" else generation(function)
                ours.setdefault(id(function), (function, replacement))
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_vlm.") and name not in PUBLIC:
            continue  # mlx_vlm's own calls stay its own
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in ours:
                setattr(module, attribute, ours[id(value)][1])


def _load(function, attach):
    @functools.wraps(function)
    def load(*args, **kwargs):
        name = args[0] if args else kwargs.get("path_or_hf_repo")
        return attach(function(*args, **kwargs), name)

    load.lora_patch = True
    return load


def _share_with_threads() -> None:
    """Let a thread that a request starts, or gives work to, know the request: its job decides the arm."""
    start, submit = threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit

    @functools.wraps(start)
    def started(self):
        own = self.run
        run = _of_this_request(own)
        if run is not own and not _loops(getattr(self, "_target", None) or type(self).run):
            self.run = run
        return start(self)

    @functools.wraps(submit)
    def submitted(self, function, /, *args, **kwargs):
        return submit(self, _of_this_request(function), *args, **kwargs)

    threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit = started, submitted
    put = queue.Queue.put

    @functools.wraps(put)
    def noted(self, item, *args, **kwargs):
        from .hooks import service
        from .routes import request_fields

        if scope_of_request.get() is not None:
            with contextlib.suppress(Exception):  # a malformed form is the view's to refuse
                if fields := request_fields():
                    service.note_request(_texts(item), fields)
        return put(self, item, *args, **kwargs)

    queue.Queue.put = noted


def _texts(item) -> list[str]:
    """Return the texts in what is put into a queue: one of them may be the job's id."""
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else (
        getattr(item, "__dict__", {}).values()
    )  # fmt: skip
    return [text for text in (item, *inner) if isinstance(text, str) and len(text) <= LONGEST_ID]


def _loops(function) -> bool:
    """Tell whether a thread outlives the request that started it: it takes one job after another from somewhere."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"\bwhile\b|\bin iter\(", inspect.getsource(inspect.unwrap(function))) is not None
    return False


def _of_this_request(function):
    """Return the function such that it runs for the request that is being answered; as it is where there is none."""
    from .routes import request_fields

    given = {variable: variable.get() for variable in (scope_of_request, job_of_request, fields_of_request)}
    if given[scope_of_request] is None and given[job_of_request] is None:
        return function
    given[fields_of_request] = request_fields() or given[fields_of_request]

    def run(*args, **kwargs):
        for variable, value in given.items():
            variable.set(value)
        return function(*args, **kwargs)

    return lambda *args, **kwargs: contextvars.copy_context().run(run, *args, **kwargs)

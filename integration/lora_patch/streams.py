"""Hand the pieces of an answer to its reader, from a separate thread: a slow reader delays nobody else."""

import atexit
import contextlib
import contextvars
import copy
import queue
import threading
import time
from concurrent.futures import Future

STALLED = 30.0  # seconds; a reader who takes nothing for so long while pieces wait is cut off
_END = object()


class ReaderLeft(Exception):
    """Nobody reads this answer any more."""


class Relay:
    """A queue between the thread that generates and the one that reads; its length is bounded by the answer's."""

    def __init__(self, stalled: float = STALLED):
        self.stalled = stalled
        self.pieces: queue.SimpleQueue = queue.SimpleQueue()
        self.left, self.error = False, None
        self.read_at = time.monotonic()

    def put(self, piece) -> None:
        """Hand over a piece; ReaderLeft when the reader has gone, or has stalled."""
        if not self.left and not self.pieces.empty() and time.monotonic() - self.read_at > self.stalled:
            self.left = True
            self.error = TimeoutError(f"nothing of the answer was read for {self.stalled:g} s; it was broken off")
        if self.left:
            raise ReaderLeft
        self.pieces.put(piece)

    def read(self, work):
        """Run ``work`` in a thread with the caller's context, and yield what it puts; its error is the reader's."""

        def run():
            try:
                work()
            except ReaderLeft:
                pass
            except BaseException as error:
                self.error = error
            finally:
                self.pieces.put(_END)

        threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
        try:
            while (piece := self.pieces.get()) is not _END:
                self.read_at = time.monotonic()
                yield piece
        finally:
            self.left = True
        if self.error is not None:
            raise self.error


def with_text(piece, text: str):
    """Return a piece of a stream with another text; None for one of a kind that has no text we know."""
    if isinstance(piece, str):
        return text
    if not isinstance(getattr(piece, "text", None), str):
        return None
    changed = copy.copy(piece)
    object.__setattr__(changed, "text", text)
    return changed


class Worker:
    """One thread that does what it is given, one after another; MLX's streams belong to the thread that made them.

    When the interpreter ends it is given up to five seconds to leave MLX: a thread that is stopped inside it would
    abort the process. Long work looks at ``closing``.
    """

    def __init__(self):
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.closing = False
        self.thread: threading.Thread | None = None

    def submit(self, function, *arguments) -> Future:
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="lora_patch", daemon=True)
            self.thread.start()
            atexit.register(self.close)
        done = Future()
        self.waiting.put((done, function, arguments))
        return done

    def close(self) -> None:
        self.closing = True
        with contextlib.suppress(TimeoutError):
            self.submit(int).result(timeout=5)

    def _work(self) -> None:
        while True:
            done, function, arguments = self.waiting.get()
            try:
                done.set_result(function(*arguments))
            except BaseException as error:
                done.set_exception(error)
            del done, function, arguments  # what an answer needed goes with it

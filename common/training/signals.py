"""SIGINT and SIGTERM: between two steps a request to stop, which saves first; anywhere else an end with one line."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal that came where there is no step to finish; no Exception, so that nothing on the way handles it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class StopRequest:
    """Within the block, SIGINT and SIGTERM raise `Stopped`; while `deferred`, the first one is remembered instead."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.deferring = False
        self.former: dict = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self.former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator["StopRequest"]:
        """While in the block, remember the first signal; a second one raises `Stopped`."""
        self.deferring = True
        try:
            yield self
        finally:
            self.deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferring or self:
            raise Stopped(number)
        self.signal = signal.Signals(number)

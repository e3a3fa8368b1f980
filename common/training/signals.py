"""Signals to stop. Between two steps they are requests: the run saves, then ends. Elsewhere they end it with one line.

A terminal or launcher that closes is such a request too: output that nobody reads any more is dropped.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import IO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal outside a step; no Exception, so that nothing on the way handles it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class StopRequest:
    """Within the block, `SIGNALS` raise `Stopped`; while `deferred`, the first one is remembered instead."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.deferring, self.saving, self.ending = False, False, False
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
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Output(stream, self) for stream in streams)
        try:
            yield self
        finally:
            self.deferring = False
            sys.stdout, sys.stderr = streams

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Within the block, which saves, no signal interrupts: a launcher sends a second one soon after the first."""
        self.saving = True
        try:
            yield
        finally:
            self.saving = False

    def ignore(self) -> None:
        """Ignore all further signals: this process is ending by itself, and saves first."""
        self.ending = True

    def reader_left(self, stream: IO) -> None:
        """Stop writing to a stream that nobody reads, and request a stop."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        self.signal = self.signal or signal.SIGHUP

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not (self.saving or self.ending) and (not self.deferring or self):
            raise Stopped(number)
        self.signal = self.signal or signal.Signals(number)


class _Output:
    """A text stream whose reader may leave."""

    def __init__(self, stream: IO, stop: StopRequest):
        self.stream, self.stop = stream, stop

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.stop.reader_left(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.stop.reader_left(self.stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

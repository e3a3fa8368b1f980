"""SIGINT and SIGTERM as a wish to stop, which the training loop grants between two steps."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within the block, the first signal is remembered and the second has its usual, immediate effect."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.former: dict = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self.former = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for other, handler in self.former.items():
            signal.signal(other, handler)

"""Whether an output has run into a repetition loop, told from its last tokens or words."""

import numpy as np

LOOP_LENGTH = 96  # a tail at least this long that only repeats itself is a loop ...
LOOP_REPEATS = 4  # ... of at least this many turns
LOOP_PERIOD = 192


def repeated_tail(items: list, longest: int = LOOP_PERIOD) -> int | None:
    """Return the period of the loop in which ``items`` (token ids or words) end, None when they do not.

    A loop is a tail of at least `LOOP_LENGTH` items made of at least `LOOP_REPEATS` turns of one period. JSON that
    is repetitive by design (the same keys for seven dimensions) never repeats its texts too, so it is not one.
    """
    if len(items) < LOOP_LENGTH:
        return None
    tail = np.asarray(items[-LOOP_REPEATS * longest :])
    for period in range(1, len(tail) // LOOP_REPEATS + 1):
        length = max(LOOP_LENGTH, LOOP_REPEATS * period)
        if length > len(tail):
            break
        if (tail[-length + period :] == tail[-length:-period]).all():
            return period
    return None

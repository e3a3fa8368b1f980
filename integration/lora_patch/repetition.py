"""Whether an output has run into a repetition loop: judged by its last tokens, or by the text itself."""

import re
import zlib
from collections import Counter

import numpy as np

LOOP_LENGTH = 96  # a tail at least this long that only repeats itself is a loop ...
LOOP_REPEATS = 4  # ... of at least this many turns
LOOP_PERIOD = 192
_RUN = re.compile(r"(?s)(\S.{0,40}?)(?:\s*\1){7,}")


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


def repeated_phrase(text: str) -> str | None:
    """Return a piece of what a text repeats until it says nothing else; None for an ordinary text."""
    if len(text) < 60:
        return None
    words = text.split()
    if len(words) >= 40:
        grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        if len(grams) < 0.5 * (len(words) - 3):
            return " ".join(grams.most_common(1)[0][0])[:60]
    # only what compresses like a loop is searched for one
    if len(text) > 2.5 * len(zlib.compress(text[:4000].encode("utf-8", "replace"), 1)):
        match = _RUN.search(text[:4000])
        if match and len(match[0]) >= 48:
            return match[1][:60]
    return None

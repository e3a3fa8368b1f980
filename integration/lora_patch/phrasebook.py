"""An adapter's phrasebook: the tokens of its own training responses, from which likely continuations are drafted.

    digest = write_phrasebook(folder / PHRASEBOOK, token_lists)      # at export
    adapter.phrasebook = read_phrasebook(folder / PHRASEBOOK)        # where the adapter is loaded; None without one

One safetensors file: int32 "tokens" [N], the responses one after another, each with its end of turn, and int32 "ends"
[responses]. 500 responses of 770 tokens take 1.5 MB. It holds text of the training responses, and no validation ones.
"""

import bisect
import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import LoraError, one_line

PHRASEBOOK = "phrasebook.safetensors"
LARGEST = 1 << 20  # tokens; what goes beyond is left out, the newest responses being kept
ORDERS = (7, 5, 3, 2, 1)  # lengths of the contexts that are looked up, longest first


class Continuations:
    """What mostly follows the last n tokens in a body of text, for each n of `ORDERS`: looked up in microseconds."""

    def __init__(self, lists: Iterable[Iterable[int]]):
        parts = [np.asarray(list(tokens), dtype=np.int64) for tokens in lists]
        self._tables = [(order, *_table(parts, order)) for order in ORDERS]

    def after(self, context: list[int]) -> tuple[int, float] | None:
        """Return the likeliest next token and how often (0 to 1) it came, by the longest context that is known."""
        for order, keys, following, share in self._tables:
            if len(context) < order:
                continue
            key = _hash(context[-order:])
            at = bisect.bisect_left(keys, key)
            if at < len(keys) and keys[at] == key:
                return following[at], share[at]
        return None


def write_phrasebook(path: Path, token_lists: Iterable[Iterable[int]]) -> str:
    """Write the token ids of the training responses; return the file's SHA-256."""
    kept, size = [], 0
    for tokens in reversed([np.asarray(list(tokens), dtype=np.int32) for tokens in token_lists]):
        if size + len(tokens) > LARGEST:
            break
        kept.append(tokens)
        size += len(tokens)
    kept.reverse()
    ends = np.cumsum([len(tokens) for tokens in kept]).astype(np.int32)
    tokens = np.concatenate(kept) if kept else np.zeros(0, np.int32)
    mx.save_safetensors(str(path), {"tokens": mx.array(tokens), "ends": mx.array(ends)})
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_phrasebook(path: Path) -> Continuations | None:
    """Return a phrasebook, None where there is no such file; `LoraError` for one that is damaged."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        found = mx.load(str(path))
        tokens, ends = np.array(found["tokens"]), np.array(found["ends"])
        if tokens.ndim != 1 or ends.ndim != 1 or tokens.dtype != np.int32 or ends.dtype != np.int32:
            raise ValueError("no lists of token ids")
        if len(ends) and (ends[-1] != len(tokens) or (np.diff(ends, prepend=0) < 0).any()):
            raise ValueError("the responses' ends do not fit the tokens")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise LoraError(f"{path}: no phrasebook: {one_line(error)}; export the adapter again, or remove it") from error
    return Continuations(np.split(tokens, ends[:-1]) if len(ends) else [])


_ADD, _MULTIPLY, _MASK = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, (1 << 64) - 1


def _hash(tokens: list[int]) -> int:
    """Return a 64-bit hash of a few tokens (multiply and shift, after D. Stafford's mixers), as `_hashes` has it."""
    found = 0
    for token in tokens:
        found = (found ^ (token + _ADD)) * _MULTIPLY & _MASK
        found ^= found >> 32
    return found


def _hashes(tokens: np.ndarray, order: int) -> np.ndarray:
    """Return the hash of each run of ``order`` tokens; overflow is meant."""
    if len(tokens) < order:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        found = np.zeros(len(tokens) - order + 1, dtype=np.uint64)
        for at in range(order):
            step = tokens[at : len(tokens) - order + 1 + at].astype(np.uint64)
            found = (found ^ (step + np.uint64(_ADD))) * np.uint64(_MULTIPLY)
            found ^= found >> np.uint64(32)
    return found


def _table(parts: list[np.ndarray], order: int) -> tuple[array, array, array]:
    """Return (hash of each context, ascending; its likeliest next token; that one's share)."""
    contexts = [_hashes(part[:-1], order) for part in parts]
    nexts = [part[order:] for part in parts if len(part) >= order]
    if not nexts or not sum(map(len, contexts)):
        return array("Q"), array("q"), array("d")
    keys, following = np.concatenate(contexts), np.concatenate(nexts)
    turn = np.lexsort((following, keys))
    keys, following = keys[turn], following[turn]
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]) | (following[1:] != following[:-1])])
    count = np.diff(np.r_[first, len(keys)])
    keys, following = keys[first], following[first]
    start = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    total = np.add.reduceat(count, start)
    best = np.lexsort((-count, keys))[start]  # within a key the most frequent comes first
    # arrays of Python's: bisected in a microsecond, where numpy takes ten for a single number
    return (
        array("Q", keys[start].astype(np.uint64).tobytes()),
        array("q", following[best].astype(np.int64).tobytes()),
        array("d", (count[best] / total).tobytes()),
    )

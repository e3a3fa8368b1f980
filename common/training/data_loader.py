"""Which examples each optimizer step takes, in which micro-batches, on which process; their rows read ahead."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.training.rows import HostRow, Prepared, prefetch


@dataclass(frozen=True)
class Sharding:
    """How a global batch is spread: over ``world`` processes, each taking micro-batches of at most ``micro`` rows."""

    global_batch: int
    micro: int
    rank: int = 0
    world: int = 1


def steps_per_epoch(examples: int, global_batch: int) -> int:
    """Return the optimizer steps of an epoch; the last may have fewer examples than ``global_batch``."""
    return -(-examples // global_batch)


@functools.lru_cache(maxsize=2)
def epoch_order(examples: int, epoch: int, seed: int) -> tuple[int, ...]:
    """Return the order of an epoch's examples: a function of seed and epoch alone, the same on every machine."""
    digest = functools.partial(hashlib.blake2b, digest_size=8)
    return tuple(sorted(range(examples), key=lambda index: digest(f"{seed} {epoch} {index}".encode()).digest()))


def step_examples(examples: int, step: int, seed: int, sharding: Sharding) -> tuple[int, ...]:
    """Return the examples of the global batch of optimizer step ``step`` (from 0, over all epochs)."""
    epoch, place = divmod(step, steps_per_epoch(examples, sharding.global_batch))
    order = epoch_order(examples, epoch, seed)
    return order[place * sharding.global_batch : (place + 1) * sharding.global_batch]


def micro_batches(lengths: list[int], step: int, seed: int, sharding: Sharding) -> list[list[int]]:
    """Return this process's micro-batches of example indices in optimizer step ``step``.

    Rows of similar length share a micro-batch, which pads least; every example of the epoch is in exactly one.
    """
    return _by_length(
        lengths, step_examples(len(lengths), step, seed, sharding)[sharding.rank :: sharding.world], sharding
    )


def evaluation_batches(lengths: list[int], sharding: Sharding) -> list[list[int]]:
    """Return this process's micro-batches of all examples, for the validation loss."""
    ordered = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return _by_length(lengths, ordered[sharding.rank :: sharding.world], sharding)


def _by_length(lengths: list[int], indices: Iterable[int], sharding: Sharding) -> list[list[int]]:
    own = sorted(indices, key=lambda index: (lengths[index], index))
    return [own[i : i + sharding.micro] for i in range(0, len(own), sharding.micro)]


def load_batches(prepared: Prepared, batches: Iterable[list[list[int]]]) -> Iterator[list[list[HostRow]]]:
    """Yield the rows of each step's micro-batches, read ahead so that the device does not wait for the disk."""

    def load(step: list[list[int]]) -> list[list[HostRow]]:
        return [[prepared.store.get(prepared.keys[index]) for index in micro] for micro in step]

    return prefetch(batches, load, depth=2)

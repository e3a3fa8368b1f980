"""From examples to the rows of each training step: prepared once, kept where there is room, never waited for."""

import functools
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from common.dataset import Example
from common.errors import refuse
from common.files import sha256_file
from common.tensors import HostArray, checksum, read_host_tensors, write_host_tensors
from integration.lora_patch.photo import PhotoError, load_photo
from integration.lora_patch.vlm import Base, Row, encode, prepare_row

Item, Loaded = TypeVar("Item"), TypeVar("Loaded")
DECODERS = 4  # threads that decode photographs; Pillow and the file system release the interpreter


def ahead(items: Iterable[Item], load: Callable[[Item], Loaded], depth: int, threads: int = 1) -> Iterator[Loaded]:
    """Yield ``load(item)`` in order, with up to ``depth`` of them loading or loaded ahead in other threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# -- rows, kept -------------------------------------------------------------------------------------------------------


class HostRow(NamedTuple):
    """A `Row` in host memory, where a reading thread may make it and many fit: the device holds those of one step."""

    tensors: dict[str, HostArray]

    @classmethod
    def of(cls, row: Row) -> "HostRow":
        tensors = {"input_ids": HostArray("I32", row.input_ids), "position_ids": HostArray("I32", row.position_ids)}
        tensors["completion_mask"] = HostArray("BOOL", row.completion_mask)
        tensors["visual"] = HostArray("I32", row.visual)
        for name in ("features", "deepstack"):
            if (array := getattr(row, name)) is not None:
                tensors[name] = HostArray.of(array)
        return cls(tensors)

    def to_row(self) -> Row:
        plain = [self.tensors[name].data for name in ("input_ids", "completion_mask", "position_ids", "visual")]
        images = [self.tensors[name].to_mlx() if name in self.tensors else None for name in ("features", "deepstack")]
        return Row(*plain, *images)

    @property
    def nbytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


class RowStore:
    """Prepared rows by key: in host memory up to ``limit`` bytes, the rest as safetensors in ``folder``.

    A file is written whole and carries a checksum; one that does not match is made again.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.used = Path(folder), limit, 0
        self.memory: dict[str, HostRow] = {}
        self.on_disk: set[str] = set()

    def put(self, key: str, row: HostRow) -> None:
        if self.used + row.nbytes <= self.limit:
            self.memory[key] = row
            self.used += row.nbytes
        elif key not in self.on_disk:
            write_host_tensors(self._path(key), row.tensors, {"crc32": checksum(row.tensors)})
            self.on_disk.add(key)

    def find(self, key: str) -> HostRow | None:
        """Return a row that this run or a killed one before it has made, if it is whole."""
        if key in self.memory:
            return self.memory[key]
        try:
            tensors, metadata = read_host_tensors(self._path(key))
        except (OSError, ValueError):
            return None
        if metadata.get("crc32") != checksum(tensors):
            return None
        self.on_disk.add(key)
        return HostRow(tensors)

    def get(self, key: str) -> HostRow:
        """Return a row that was put; called from the reading thread."""
        row = self.find(key)
        if row is None:
            raise OSError(f"{self._path(key)}: a prepared row is gone or damaged; go on with --resume to make it again")
        return row

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


# -- examples, prepared -----------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """The examples of one file, in its order, less those left out as too long; the rows lie in ``store``."""

    examples: list[Example]
    photos: list[tuple[str, ...]]  # SHA-256 of each example's photographs as they are on disk
    lengths: list[int]  # tokens
    targets: list[int]  # tokens that the loss counts
    keys: list[str]
    store: RowStore
    overlong: list[tuple[Example, int]]

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices: Iterable[int]) -> list[Row]:
        return [self.store.get(self.keys[index]).to_row() for index in indices]

    def without_overlong(self, max_length: int) -> "Prepared":
        """Return the same less the examples of more than ``max_length`` tokens, which go to ``overlong``."""
        fits = [index for index, length in enumerate(self.lengths) if length <= max_length]
        too_long = [(self.examples[i], n) for i, n in enumerate(self.lengths) if n > max_length]
        picked = [
            [values[i] for i in fits] for values in (self.examples, self.photos, self.lengths, self.targets, self.keys)
        ]
        return Prepared(*picked, self.store, self.overlong + too_long)


def hash_photos(examples: list[Example]) -> list[tuple[str, ...]]:
    """Return the SHA-256 of each example's photographs; UserError where a row says another one than the file has."""
    hashes, problems = [], []
    paths = [example.image_paths for example in examples]
    for example, found in zip(examples, ahead(paths, _hashes, DECODERS, DECODERS), strict=True):
        if example.sha256 and found != example.sha256:
            names = ", ".join(map(str, example.image_paths))
            problems.append(f"{example.source}: {names} has changed since the data were prepared; prepare them again")
        hashes.append(found)
    refuse(problems)
    return hashes


def _hashes(paths: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(sha256_file(path) for path in paths)


def prepare_examples(
    base: Base,
    identity: str,
    examples: list[Example],
    photos: list[tuple[str, ...]],
    store: RowStore,
    max_image_size: int,
    max_length: int | None,
    label: str,
    quiet: bool = False,
) -> Prepared:
    """Turn examples into rows: photographs decoded ahead in threads, the frozen vision tower run once for each.

    ``identity`` tells one base from another, for the keys. Examples of more than ``max_length`` tokens are left out
    whole. All unreadable photographs are named in one UserError.
    """
    prepared = Prepared([], [], [], [], [], store, [])
    problems: list[str] = []
    keys = [
        hashlib.sha256(json.dumps([identity, max_image_size, e.prompt, e.response, *hashes]).encode()).hexdigest()
        for e, hashes in zip(examples, photos, strict=True)
    ]

    def load(index: int):
        kept = store.find(keys[index])
        if kept is not None:
            return kept, None
        try:
            return None, [load_photo(path, max_image_size) for path in examples[index].image_paths]
        except PhotoError as error:
            return None, error

    loading = ahead(range(len(examples)), load, 2 * DECODERS, DECODERS)
    every = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
    bar = tqdm(loading, label, len(examples), leave=False, mininterval=every, unit="example", disable=quiet)
    for index, (row, pictures) in enumerate(bar):
        example = examples[index]
        if isinstance(pictures, PhotoError):
            problems.append(f"{example.source}: {pictures}")
        if problems:
            continue  # the run cannot go on: only look for further damage
        if row is None:
            encoded = encode(base, example.prompt, pictures, example.response)
            if max_length is not None and len(encoded) > max_length:
                prepared.overlong.append((example, len(encoded)))
                continue
            row = HostRow.of(prepare_row(base, encoded))
            store.put(keys[index], row)
        tokens = row.tensors["completion_mask"].data
        if max_length is not None and len(tokens) > max_length:
            prepared.overlong.append((example, len(tokens)))
            continue
        prepared.examples.append(example)
        prepared.photos.append(photos[index])
        prepared.lengths.append(len(tokens))
        prepared.targets.append(int(tokens[1:].sum()))
        prepared.keys.append(keys[index])
    refuse(problems)
    return prepared


# -- the order of training --------------------------------------------------------------------------------------------


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

    Rows of like length share a micro-batch, which pads least; every example of the epoch is in exactly one.
    """
    whole = step_examples(len(lengths), step, seed, sharding)
    own = sorted(whole[sharding.rank :: sharding.world], key=lambda index: (lengths[index], index))
    return [own[i : i + sharding.micro] for i in range(0, len(own), sharding.micro)]


def evaluation_batches(lengths: list[int], sharding: Sharding) -> list[list[int]]:
    """Return this process's micro-batches of all examples, for the validation loss."""
    own = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))[sharding.rank :: sharding.world]
    return [own[i : i + sharding.micro] for i in range(0, len(own), sharding.micro)]


def feed(prepared: Prepared, batches: Iterable[list[list[int]]]) -> Iterator[list[list[HostRow]]]:
    """Yield the rows of each step's micro-batches, read ahead so that the device does not wait for the disk."""

    def load(step: list[list[int]]) -> list[list[HostRow]]:
        return [[prepared.store.get(prepared.keys[index]) for index in micro] for micro in step]

    return ahead(batches, load, depth=2)


def padded(length: int, multiple: int) -> int:
    """Return ``length`` rounded up to a ``multiple``."""
    return -(-length // multiple) * multiple

"""From examples to rows: photographs decoded, the frozen vision tower run once, the result kept where there is room."""

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
from common.model.tensors import HostArray, checksum, read_host_tensors, write_host_tensors
from integration.lora_patch.photo import PhotoError, load_photo
from integration.lora_patch.vlm import Base, Row, encode, prepare_row

Item, Loaded = TypeVar("Item"), TypeVar("Loaded")
DECODERS = 4  # threads that decode photographs; Pillow and the file system release the interpreter
PLAIN = {"input_ids": "int32", "completion_mask": "bool", "position_ids": "int32", "visual": "int32"}


def prefetch(items: Iterable[Item], load: Callable[[Item], Loaded], depth: int, threads: int = 1) -> Iterator[Loaded]:
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


class HostRow(NamedTuple):
    """A `Row` in host memory, where a reading thread may make it and many fit: the device holds those of one step."""

    tensors: dict[str, HostArray]

    @classmethod
    def of(cls, row: Row) -> "HostRow":
        images = {name: getattr(row, name) for name in ("features", "deepstack") if getattr(row, name) is not None}
        tensors = {name: HostArray(dtype, getattr(row, name)) for name, dtype in PLAIN.items()}
        return cls(tensors | {name: HostArray.of(array) for name, array in images.items()})

    def to_row(self) -> Row:
        images = [self.tensors[name].to_mlx() if name in self.tensors else None for name in ("features", "deepstack")]
        return Row(*(self.tensors[name].data for name in PLAIN), *images)

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
        """Return a row that this run, or a killed one before it, has made; None if it is missing or damaged."""
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
            raise OSError(f"{self._path(key)}: a prepared row is gone or damaged; --resume makes it again")
        return row

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


@dataclass
class Prepared:
    """The examples of one file, in its order, less those left out as too long; the rows are in ``store``."""

    store: RowStore
    examples: list[Example]
    lengths: list[int]  # tokens
    targets: list[int]  # tokens that the loss counts
    keys: list[str]
    overlong: list[tuple[Example, int]]  # left out, with their length

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices: Iterable[int]) -> list[Row]:
        return [self.store.get(self.keys[index]).to_row() for index in indices]

    def without_overlong(self, max_length: int) -> "Prepared":
        """Return the same less the examples of more than ``max_length`` tokens, which go to ``overlong``."""
        fits = [index for index, length in enumerate(self.lengths) if length <= max_length]
        too_long = [(self.examples[i], n) for i, n in enumerate(self.lengths) if n > max_length]
        picked = [[values[i] for i in fits] for values in (self.examples, self.lengths, self.targets, self.keys)]
        return Prepared(self.store, *picked, self.overlong + too_long)


def hash_photos(examples: list[Example]) -> list[tuple[str, ...]]:
    """Return the SHA-256 of each example's photographs; UserError where a row says another one than the file has."""
    hashes, problems = [], []
    paths = [example.image_paths for example in examples]
    for example, found in zip(examples, prefetch(paths, _hashes, DECODERS, DECODERS), strict=True):
        if example.sha256 and found != example.sha256:
            names = ", ".join(map(str, example.image_paths))
            problems.append(f"{example.source}: {names} has changed since the data were prepared; prepare them again")
        hashes.append(found)
    refuse(problems)
    return hashes


def _hashes(paths: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(sha256_file(path) for path in paths)


@dataclass(frozen=True)
class RowMaker:
    """What turns examples into rows: base, sizes, and the store that keeps them."""

    base: Base
    store: RowStore
    identity: str  # of everything that decides a row's values besides the example: base, processor, software
    max_image_size: int  # pixels of the long side
    max_length: int | None  # tokens; None: any

    def prepare(
        self, examples: list[Example], photos: list[tuple[str, ...]], label: str, quiet: bool = False
    ) -> Prepared:
        """Turn examples into rows. ``photos``: SHA-256 of each one's files; ``label``: of the progress bar.

        Examples of more than ``max_length`` tokens are left out whole. All unreadable photographs are named in one
        UserError.
        """
        prepared = Prepared(self.store, [], [], [], [], [])
        problems: list[str] = []
        keys = [self._key(example, hashes) for example, hashes in zip(examples, photos, strict=True)]

        def load(index: int) -> tuple[HostRow | None, list | PhotoError | None]:
            if (kept := self.store.find(keys[index])) is not None:
                return kept, None
            try:
                return None, [load_photo(path, self.max_image_size) for path in examples[index].image_paths]
            except PhotoError as error:
                return None, error

        loading = prefetch(range(len(examples)), load, 2 * DECODERS, DECODERS)
        every = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
        bar = tqdm(loading, label, len(examples), leave=False, mininterval=every, unit="example", disable=quiet)
        for example, key, (row, pictures) in zip(examples, keys, bar, strict=True):
            if isinstance(pictures, PhotoError):
                problems.append(f"{example.source}: {pictures}")
            if problems:
                continue  # the run cannot start: only look for further damage
            encoded = None
            if row is None:
                encoded = encode(self.base, example.prompt, pictures, example.response, example.masked_spans)
            mask = row.tensors["completion_mask"].data if row else encoded.completion_mask
            if self.max_length is not None and len(mask) > self.max_length:
                prepared.overlong.append((example, len(mask)))
                continue
            if not mask[1:].any():
                problems.append(f"{example.source}: every token of the response is left out of the loss")
                continue
            self.store.put(key, row or HostRow.of(prepare_row(self.base, encoded)))
            prepared.examples.append(example)
            prepared.lengths.append(len(mask))
            prepared.targets.append(int(mask[1:].sum()))
            prepared.keys.append(key)
        refuse(problems)
        return prepared

    def _key(self, example: Example, hashes: tuple[str, ...]) -> str:
        parts = [self.identity, self.max_image_size, example.prompt, example.response, example.masked_spans, *hashes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

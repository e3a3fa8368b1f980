"""Photographs on disk: found by the names that jobs bear, decoded once, remembered by path, size and mtime.

    locator = Locator(source_dir)
    place = locator.find("uploads/<uuid>_photo.jpg")      # candidates inside the folder, or what is wrong
    photos = describe_all(paths, cache_path)              # {path: Photo}, all cores, with a progress bar

Nothing outside the folder is ever opened: not by "..", not by an absolute path, not through a symbolic link.
"""

import contextlib
import functools
import hashlib
import io
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sqlite3
import stat
import threading
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import click
from PIL import Image
from tqdm import tqdm

from common.data.near_duplicates import THUMB_LOAD, is_thumb, perceptual_hash, thumb_of
from common.errors import UserError
from integration.lora_patch.photo import PhotoError, load_photo

MAX_BYTES = 512_000_000  # of a photograph's file
MAX_PIXELS = 100_000_000  # of a format that cannot be decoded in part; `load_photo` bounds JPEG
_UUID_PREFIX = re.compile(r"^(?:[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}|[0-9a-fA-F]{32})_(?=.)")
_CACHE_VERSION = 3
_CHUNK = 8  # photographs that a worker is given at a time
MIN_SIDE = 16  # pixels; what is smaller is a placeholder, no photograph


# ------------------------------------------------------------------------------------------------ finding files


@dataclass(frozen=True)
class Place:
    """Where a name leads: candidates (several only when files of the same name differ in folder), or a problem."""

    candidates: list[str] = field(default_factory=list)
    problem: str | None = None  # "image_missing", "image_outside", "no_filename", "bad_filename"
    detail: str = ""


class Locator:
    """An index of the regular files below one folder; finding a name does not touch the disk again."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._real = os.path.realpath(folder)
        self._files: set[str] = set()  # paths relative to the folder, "/" between parts
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_folded: dict[str, list[str]] = defaultdict(list)
        self._leaving: set[str] = set()  # names of files and folders that are links out of the folder
        self._walk()

    def __len__(self) -> int:
        return len(self._files)

    def _walk(self) -> None:
        for parent, folders, files in os.walk(self.folder, onerror=_tell_unreadable):
            folders[:] = sorted(filter(_is_text, folders))
            relative = os.path.relpath(parent, self.folder).replace(os.sep, "/")
            for name in folders:
                if os.path.islink(os.path.join(parent, name)) and not self._is_inside(os.path.join(parent, name)):
                    self._leaving.add(_key(name))
            for name in sorted(filter(_is_text, files)):
                path = os.path.join(parent, name)
                try:
                    status = os.lstat(path)
                    if stat.S_ISLNK(status.st_mode):
                        if not self._is_inside(path):
                            self._leaving.add(_key(name))
                            continue
                        status = os.stat(path)
                except OSError:
                    continue  # gone, or a link that leads nowhere
                if stat.S_ISREG(status.st_mode):
                    self._add(name if relative == "." else f"{relative}/{name}")

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(self._real + os.sep)

    def _add(self, relative: str) -> None:
        self._files.add(relative)
        key = _key(relative.rsplit("/", 1)[-1])
        self._by_name[key].append(relative)
        self._by_folded[key.casefold()].append(relative)

    def by_name(self, name: str) -> str | None:
        """Return the path of the first file of exactly this name, in whichever subfolder."""
        found = self._by_name.get(_key(name))
        return str(self.folder / found[0]) if found else None

    def names(self) -> Iterable[str]:
        """Return the paths of all files."""
        return (str(self.folder / relative) for relative in sorted(self._files))

    def find(self, filename: object) -> Place:
        """Find the file that a job names: bare, relative, absolute from another machine, with an upload's prefix."""
        if filename is None or not str(filename).strip():
            return Place(problem="no_filename", detail="the job names no file")
        name = str(filename).strip()
        if "\0" in name or len(name) > 1024 or "\n" in name:
            return Place(problem="bad_filename", detail=f"{name[:60]!r}")
        parts, problem = self._parts(name)
        if problem:
            return Place(problem="image_outside", detail=name[:120])
        if not parts:
            return Place(problem="bad_filename", detail=f"{name[:60]!r}")
        if "/".join(parts) in self._files and not _is_absolute(name):
            return Place([str(self.folder / "/".join(parts))])
        bare = _UUID_PREFIX.sub("", parts[-1])
        for last in dict.fromkeys((parts[-1], bare)):
            for index, key in ((self._by_name, _key(last)), (self._by_folded, _key(last).casefold())):
                if index.get(key):
                    return Place([str(self.folder / path) for path in _nearest([*parts[:-1], last], index[key])])
        if self._leaving & {_key(part) for part in (*parts, bare)}:
            return Place(problem="image_outside", detail=f"{name[:100]}: a link leads out of {self.folder}")
        if "%" in name and (plain := unquote(name)) != name:  # a URL's spelling of it
            return self.find(plain)
        return Place(problem="image_missing", detail=name[:120])

    def _parts(self, name: str) -> tuple[list[str], bool]:
        """Return (parts of the path, whether it climbs out of the folder)."""
        if "\\" in name and name not in self._files:
            name = name.replace("\\", "/")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if parts and re.fullmatch(r"[A-Za-z]:", parts[0]):
            parts = parts[1:]
        if ".." not in parts:
            return parts, False
        if _is_absolute(name):
            return [], True
        inside = os.path.relpath(os.path.normpath(os.path.join(self._real, *parts)), self._real)
        return inside.split(os.sep), inside.split(os.sep)[0] == ".."


def _is_text(name: str) -> bool:
    """Tell whether a name is UTF-8; no job can name another, and no row hold its path."""
    try:
        name.encode()
        return True
    except UnicodeEncodeError:
        click.echo(f"{os.fsencode(name)!r}: the name is no UTF-8 text; skipped", err=True)
        return False


def _tell_unreadable(error: OSError) -> None:
    click.echo(f"{error.filename}: cannot be read ({error.strerror}); the files in it count as missing", err=True)


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) is not None


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes names decomposed


def _nearest(wanted: list[str], found: list[str]) -> list[str]:
    """Return those of several files of one name whose folders agree best with the path that was asked for."""

    def agreement(path: str) -> int:
        pairs = zip(reversed(wanted[:-1]), reversed(path.split("/")[:-1]), strict=False)
        count = 0
        for one, other in pairs:
            if _key(one) != _key(other):
                break
            count += 1
        return count

    if len(found) == 1:
        return found
    best = max(map(agreement, found))
    return [path for path in found if agreement(path) == best]


# ------------------------------------------------------------------------------------------------ looking at them


@dataclass(frozen=True)
class Photo:
    """What is known of a photograph's file; ``problem`` is None when it can be trained on."""

    size: int = 0  # bytes
    sha256: str = ""
    width: int = 0  # pixels, upright
    height: int = 0
    orientation: int = 1  # EXIF
    thumb: bytes = b""
    problem: str | None = None  # "image_unreadable", "image_bomb", "image_tiny"
    detail: str = ""

    @property
    def phash(self) -> str:
        """The perceptual hash in hex."""
        return f"{perceptual_hash(self.thumb):016x}" if is_thumb(self.thumb) else ""


def describe(path: str) -> Photo:
    """Read a file once, decode it for real, and hash it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                return Photo(size=size, problem="image_bomb", detail=f"a file of {size:,} bytes")
            data = file.read()
    except OSError as error:
        return Photo(problem="image_unreadable", detail=f"cannot be read ({error.strerror})")
    known = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_formats()) as image:
            (width, height), orientation, form = image.size, image.getexif().get(0x0112, 1), image.format
        if width * height > MAX_PIXELS and form != "JPEG":
            return Photo(**known, problem="image_bomb", detail=f"{form} of {width} x {height} pixels")
        if min(width, height) < MIN_SIDE:
            return Photo(**known, problem="image_tiny", detail=f"{width} x {height} pixels")
        picture = load_photo(io.BytesIO(data), THUMB_LOAD)
    except (OSError, ValueError, SyntaxError, MemoryError, OverflowError, Image.DecompressionBombError) as error:
        is_bomb = isinstance(error, Image.DecompressionBombError) or "bomb" in str(error)
        detail = _nature(data) if not is_bomb else " ".join(str(error).split(": ", 1)[-1].split())
        if isinstance(error, PhotoError) and not is_bomb:
            detail = f"damaged: {str(error).rsplit('(', 1)[-1].rstrip(')')}"
        return Photo(**known, problem="image_bomb" if is_bomb else "image_unreadable", detail=detail[:120])
    orientation = orientation if orientation in range(1, 9) else 1
    if orientation >= 5:
        width, height = height, width
    return Photo(**known, width=width, height=height, orientation=orientation, thumb=thumb_of(picture))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return what cameras and browsers write; Pillow would start Ghostscript for a .jpg that holds PostScript."""
    Image.init()
    return tuple(
        name for name in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000") if name in Image.OPEN
    )


def _nature(data: bytes) -> str:
    """Say what a file is that is no photograph."""
    start = data[:400].lstrip().lower()
    if not data:
        return "an empty file"
    if start.startswith((b"<!doctype html", b"<html")) or b"<html" in start:
        return "a web page, not a photograph"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "HEIC, which Pillow does not read; convert it to JPEG"
    return "not an image" + (" (text)" if start.isascii() and b"\0" not in start else "")


class PhotoCache:
    """What earlier runs found out about photographs, by path, size and mtime. A damaged cache is made again."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError:
                for suffix in ("", "-journal"):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
                self._open()
        except (OSError, sqlite3.DatabaseError) as error:
            raise UserError(f"{self.path}: cannot be written ({error}); free space or name another place") from error

    def _open(self) -> None:
        self._connection = sqlite3.connect(self.path, timeout=30)
        if self._connection.execute("PRAGMA user_version").fetchone()[0] == _CACHE_VERSION:
            return
        self._connection.execute("DROP TABLE IF EXISTS photos")
        self._connection.execute(
            "CREATE TABLE photos (path TEXT PRIMARY KEY, mtime INTEGER, size INTEGER, sha256 TEXT, "
            "width INTEGER, height INTEGER, orientation INTEGER, thumb BLOB, problem TEXT, detail TEXT)"
        )
        self._connection.execute(f"PRAGMA user_version = {_CACHE_VERSION}")
        self._connection.commit()

    def get(self, path: str) -> Photo | None:
        """Return what is known of a file that is still the same."""
        row = self._connection.execute("SELECT * FROM photos WHERE path = ?", (_cache_key(path),)).fetchone()
        if row is None or row[1:3] != _stamp(path):
            return None
        return Photo(*row[2:7], bytes(row[7]), *row[8:10])

    def put(self, photos: dict[str, Photo], stamps: dict[str, tuple[int, int]]) -> None:
        """Keep what was learnt; ``stamps`` were taken before the files were read."""
        if not photos:
            return
        rows = [
            (_cache_key(path), stamps[path][0], p.size, p.sha256, p.width, p.height, p.orientation, p.thumb)
            + (p.problem, p.detail)
            for path, p in photos.items()
            if p.size == stamps[path][1]  # a file that grew meanwhile is looked at again next time
        ]
        with self._connection:
            self._connection.executemany(f"INSERT OR REPLACE INTO photos VALUES ({','.join('?' * 10)})", rows)

    def close(self) -> None:
        self._connection.close()


def _cache_key(path: str) -> str:
    return os.path.abspath(path).encode("utf-8", "backslashreplace").decode()


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, -1)
    return status.st_mtime_ns, status.st_size


def describe_all(paths: Iterable[str], cache_path: str | os.PathLike, workers: int | None = None) -> dict[str, Photo]:
    """Return {path: Photo} for every path: from the cache where the file is unchanged, else decoded on all cores."""
    cache = PhotoCache(cache_path)
    photos: dict[str, Photo] = {}
    todo = []
    for path in paths:
        known = cache.get(path) if os.access(path, os.R_OK) else None
        if known is None or known.problem == "image_unreadable":  # another Pillow may read it today
            todo.append(path)
        else:
            photos[path] = known
    stamps = {path: _stamp(path) for path in todo}
    fresh: dict[str, Photo] = {}
    for path, photo in tqdm(_described(todo, workers), total=len(todo), desc="photographs", disable=not todo):
        photos[path] = fresh[path] = photo
        if len(fresh) == 200:  # an interrupted first pass continues here
            cache.put(fresh, stamps)
            fresh = {}
    cache.put(fresh, stamps)
    cache.close()
    return photos


def _described(paths: list[str], workers: int | None) -> Iterable[tuple[str, Photo]]:
    """Yield (path, Photo) in order. A file that kills its decoder costs its pool; those in flight with it are then
    looked at one by one, each in a process of its own, and a new pool takes the rest.
    """
    workers = min(workers or os.cpu_count() or 1, len(paths) // _CHUNK)
    if workers < 2:
        yield from ((path, describe(path)) for path in paths)
        return
    at = 0
    while at < len(paths):
        try:
            with worker_pool(workers) as pool:
                for photo in pool.map(describe, paths[at:], chunksize=_CHUNK):
                    yield paths[at], photo
                    at += 1
        except BrokenProcessPool:
            for path in paths[at : at + 2 * workers * _CHUNK]:
                yield path, _described_alone(path)
                at += 1


def _described_alone(path: str) -> Photo:
    try:
        with worker_pool(1) as pool:
            return pool.submit(describe, path).result()
    except BrokenProcessPool:
        return Photo(problem="image_unreadable", detail="the decoder crashed on it")


@contextlib.contextmanager
def worker_pool(workers: int, initializer: Callable | None = None, *arguments) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes that an interrupt ends quietly and at once."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (initializer, arguments))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(initializer: Callable | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the main process, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer:
        initializer(*arguments)


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone, however it ended."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

"""Files: written whole or not at all, found under the documented names, read row by row with line numbers."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import jsonlines
from tqdm import tqdm

from common.errors import UserError, refuse
from common.schemas import Column, fault
from integration.lora_patch.json_text import load_json, strings_in

MAX_LINE = 8_000_000  # bytes of a row; the longest real one has 40,000
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    r"""Open a temporary file that becomes ``path`` when the block succeeds, and is removed when it fails.

    The data reach the disk (fsync of file and folder) before the name does, so a crash leaves the old file or
    the new one. ``mode`` is "w" (UTF-8, newline "\n") or "wb". What a killed run left of the same file is removed.
    Raises UserError when the folder or disk refuses.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        descriptor, temporary = _locked_temporary(path)
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes files private; what the user gets follows the umask, as any other file
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or name another place"
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _locked_temporary(path: Path) -> tuple[int, str]:
    """Return (descriptor, path) of a new file that is locked for as long as this process writes it."""
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):  # else another run swept it before it was locked
            return descriptor, temporary
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove temporary files of ``path`` that no living process holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with write_atomic(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically; rows may be a generator and are never held together."""
    with write_atomic(path) as file:
        jsonl_writer(file).write_all(rows)


def jsonl_writer(file: IO[str]) -> jsonlines.Writer:
    """Return a writer of one JSON object a line; it refuses NaN."""
    return jsonlines.Writer(file, dumps=lambda row: json.dumps(row, ensure_ascii=False, allow_nan=False))


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Append one JSON object a line, on the disk when this returns. UserError when the disk refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            jsonl_writer(file).write_all(rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space, then run again") from error


def read_json(path: str | os.PathLike) -> Any:
    """Read one JSON document; UserError names the file, line and column of damage."""
    path = Path(path)
    try:
        return _load(path.read_text(encoding="utf-8-sig"))
    except _Damage as damage:
        line = f":{damage.line}" if damage.line else ""
        raise UserError(f"{path}{line}: {damage}; make the file again") from damage
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


class _Damage(ValueError):
    """What is wrong with a JSON text, and the line where it shows."""

    def __init__(self, problem: str, line: int = 0):
        super().__init__(problem)
        self.line = line


def _load(text: str) -> Any:
    """Return a JSON value that this project can write again: no NaN, no half characters, nothing nested too deeply."""
    try:
        value = load_json(text)
    except json.JSONDecodeError as error:
        raise _Damage(f"not valid JSON ({error.msg})", error.lineno) from None
    except ValueError as error:  # NaN, nested too deeply, or an integer of over 4,300 digits
        raise _Damage(f"not valid JSON ({str(error).split(':')[0]})") from None
    if "\\u" in text and any(map(_SURROGATE.search, strings_in(value))):
        raise _Damage("holds half a character (\\ud800 to \\udfff)")
    return value


class RowFile:
    """A JSONL file, or a JSON array of objects, read row by row; each row is checked against ``schema``."""

    def __init__(
        self, path: str | os.PathLike, schema: dict[str, Column] | None = None, mend: str = "mend or delete it"
    ):
        self.path, self.schema, self.mend = Path(path), schema or {}, mend
        with self._open() as file:
            self._is_array = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        self._array = self._read_array() if self._is_array else []

    def _open(self) -> IO[bytes]:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); check the path") from error

    def _read_array(self) -> list:
        value = read_json(self.path)
        return value if isinstance(value, list) else [value]

    def rows(self, label: str | None = None) -> Iterator[tuple[int, int, dict]]:
        """Yield (line from 1, place for `read`, row); all damaged rows are one UserError at the end, a line each.

        Nothing is yielded after the first damaged row. ``label`` shows a progress bar.
        """
        problems = []
        numbered = ((at + 1, at, row) for at, row in enumerate(self._array)) if self._is_array else self._lines(label)
        for number, place, row in numbered:
            problem = str(row) if isinstance(row, _Damage) else fault(row, self.schema)
            if problem:
                problems.append(f"{self.path}:{number}: {problem}; {self.mend}")
            elif not problems:
                yield number, place, row
        refuse(problems)

    def _lines(self, label: str | None) -> Iterator[tuple[int, int, Any]]:
        with self._open() as file, _progress(label, os.fstat(file.fileno()).st_size) as bar:
            number = place = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                start, place = place, place + len(line)
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):  # skipped in pieces, never held whole
                        line = file.readline(1_000_000)
                        place += len(line)
                    yield number, start, _Damage(f"a line of more than {MAX_LINE:,} bytes")
                elif line.strip():
                    yield number, start, _decoded(line)
                bar.update(place - start)

    def read(self, places: Iterable[int]) -> Iterator[dict]:
        """Yield the rows at the places given, in that order."""
        if self._is_array:
            yield from (self._array[place] for place in places)
            return
        with self._open() as file:
            for place in places:
                file.seek(place)
                yield json.loads(file.readline(MAX_LINE + 1).decode("utf-8-sig"))


def _decoded(line: bytes) -> Any:
    try:
        return _load(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _Damage(f"not UTF-8 text (byte {error.start})")
    except _Damage as damage:
        return damage


def _progress(label: str | None, size: int) -> tqdm:
    return tqdm(total=size, desc=label, unit="B", unit_scale=True, leave=False, disable=True if label is None else None)


def read_rows(path: str | os.PathLike, schema: dict[str, Column] | None = None) -> list[tuple[int, dict]]:
    """Read a JSONL file, or a JSON array of objects, as ``[(line number or array position from 1, object)]``.

    All damaged rows are collected into one UserError, ``path:line`` each.
    """
    return [(number, row) for number, _, row in RowFile(path, schema).rows()]


def is_file(path: Path) -> bool:
    """Tell whether there is a file of this name; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def find_input(path: str | os.PathLike, folders: tuple[str, ...] = ("training_data",)) -> Path:
    """Find an input under its documented name: as typed, as its .jsonl or .json sibling, or in ``folders``.

    Says on stderr when it is not where it was named; UserError when it is nowhere.
    """
    path = Path(path)
    names = [path.name, *(path.with_suffix(suffix).name for suffix in (".jsonl", ".json") if suffix != path.suffix)]
    places = [path.parent] + ([] if path.is_absolute() else [Path(folder) / path.parent for folder in folders])
    candidates = [place / name for place in places for name in names]
    for candidate in candidates:
        if is_file(candidate):
            if candidate != path:
                click.echo(f"{path} is not there; reading {candidate}", err=True)
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates[1:])
    raise UserError(f"{path}: no such file (also looked for {looked}); run the step before, or name the file")


def sha256_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files: written whole or not at all, found under the documented names, read row by row with line numbers."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import jsonlines

from common.errors import UserError, refuse


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that becomes ``path`` when the block ends well, and vanishes when it does not.

    The data reach the disk (fsync of file and folder) before the name does, so a crash leaves the old file or
    the new one. ``mode`` is "w" (UTF-8, newline "\\n") or "wb". Raises UserError when the folder or disk refuses.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
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
        jsonlines.Writer(file, dumps=lambda row: json.dumps(row, ensure_ascii=False, allow_nan=False)).write_all(rows)


def read_json(path: str | os.PathLike) -> Any:
    """Read one JSON document; UserError names the file, line and column of damage."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); make the file again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_rows(path: str | os.PathLike) -> list[tuple[int, dict]]:
    """Read a JSONL file, or a JSON array of objects, as ``[(line number or array position from 1, object)]``.

    All damaged rows are collected into one UserError, ``path:line`` each.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); name a .jsonl file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    rows, problems = (_array if text.lstrip().startswith("[") else _lines)(text)
    refuse([f"{path}:{line}: {problem}; mend or delete the row" for line, problem in problems])
    return rows


def _array(text: str) -> tuple[list, list]:
    try:
        array = list(enumerate(json.loads(text), start=1))
    except json.JSONDecodeError as error:
        return [], [(error.lineno, f"not valid JSON ({error.msg})")]
    return (
        [(at, row) for at, row in array if isinstance(row, dict)],
        [(at, "a JSON object was expected") for at, row in array if not isinstance(row, dict)],
    )


def _lines(text: str) -> tuple[list, list]:
    rows, problems = [], []
    # split on real line ends alone: U+2028 and its like are legal inside a JSON string
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append((number, f"not valid JSON ({getattr(error, 'msg', 'nested too deeply')})"))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append((number, "a JSON object was expected"))
    return rows, problems


def find_input(path: str | os.PathLike, folders: tuple[str, ...] = ("training_data",)) -> Path:
    """Find an input under its documented name: as typed, as its .jsonl or .json sibling, or in ``folders``.

    Says on stderr when it is not where it was named; UserError when it is nowhere.
    """
    path = Path(path)
    names = [path.name, *(path.with_suffix(suffix).name for suffix in (".jsonl", ".json") if suffix != path.suffix)]
    places = [path.parent] + ([] if path.is_absolute() else [Path(folder) / path.parent for folder in folders])
    candidates = [place / name for place in places for name in names]
    for candidate in candidates:
        if candidate.is_file():
            if candidate != path:
                click.echo(f"{path} is not there; reading {candidate}", err=True)
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates[1:])
    raise UserError(f"{path}: no such file (also looked for {looked}); run the step before, or name the file")


def sha256_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

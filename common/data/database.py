"""A Mondrian database, read while the service writes to it, from a folder that may be read-only, and never written.

    with open_database(path) as database:
        for row in database.jobs(columns): ...

A database in WAL mode keeps its newest rows in a `-wal` file beside it. With one there, SQLite's own locks give a
snapshot that neither blocks nor is blocked by the writer. Without one everything is in the main file, which is then
read as immutable, so that not even a `-shm` file appears beside it.
"""

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import click

from common.data.sources import MAX_TEXT, as_text
from common.errors import UserError
from integration.lora_patch.analysis import AnalysisError
from integration.lora_patch.errors import LoraError
from integration.lora_patch.prompts import Prompts, read_prompts

NEEDED = ("id", "filename", "advisor", "status")  # columns without which jobs cannot be linked
# what reading a damaged database raises; a message with damaged names in it is no UTF-8, and fails to be made
_DAMAGE = (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError)
_BATCH = 500  # rows fetched at a time
_PATIENCE = 15  # seconds to wait for a writer that locks readers out, and for a view to end


def find_databases(paths: tuple[str | os.PathLike, ...]) -> list[Path]:
    """Return the databases that were named; of a folder, every SQLite file in it that has a table ``jobs``.

    The newest (by its newest job) comes first. UserError for what is missing or not a Mondrian database.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _inside(path)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such database; name it with --db_path")
    found = list({file.resolve(): file for file in found}.values())
    newest = {}
    for file in found:
        with open_database(file) as database:
            newest[file] = database.newest() if len(found) > 1 else ""
    return sorted(found, key=lambda file: (newest[file], file.name), reverse=True)


def _inside(folder: Path) -> list[Path]:
    """Return the Mondrian databases in a folder; other databases are skipped, damaged ones are not."""
    found, problems = [], []
    for file in sorted(folder.glob("*.db")):
        try:
            with open_database(file):
                found.append(file)
        except NoMondrianDatabase as error:
            problems.append(error.message)
    if not found:
        raise UserError(problems[0] if problems else f"{folder}: no database (*.db) in it; name one with --db_path")
    for problem in problems:
        click.echo(f"skipped {problem}", err=True)
    return found


class NoMondrianDatabase(UserError):
    """A whole file that is no database, or one of something else."""


class Database:
    """An open database; use `open_database`."""

    def __init__(self, path: Path):
        self.path = path
        self._copy: tempfile.TemporaryDirectory | None = None
        self._before = _state(path)
        self._immutable = False
        self.connection = self._connect()
        self.columns = self._read_columns()
        self._keyed = self._has_rowid()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()
        if self._copy:
            self._copy.cleanup()

    def _connect(self) -> sqlite3.Connection:
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such database; name it with --db_path")
        try:
            with open(self.path, "rb") as file:
                header = file.read(20)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if header[:16] != b"SQLite format 3\0":
            raise NoMondrianDatabase(f"{self.path}: not an SQLite database; name Mondrian's mondrian.db")
        wal = Path(f"{self.path}-wal")
        in_wal_mode = header[18:20] == b"\x02\x02"
        if in_wal_mode and not wal.exists():
            self._immutable = True
            return self._open(self.path, "immutable=1")
        try:
            connection = self._open(self.path, "mode=ro")
            self._wait_for_writer(connection)
            if in_wal_mode:
                connection.execute("BEGIN")  # one snapshot for all that follows
            return connection
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise UserError(
                    f"{self.path}: its writer locks readers out; stop the service, or link a copy of the database"
                ) from error
            if not in_wal_mode or "malformed" in str(error):
                raise UserError(f"{self.path}: cannot be read ({error})") from error
        if wal.stat().st_size == 0:
            self._immutable = True
            return self._open(self.path, "immutable=1")
        # rows in the WAL, and a folder where SQLite cannot make its -shm file: read a copy of both
        self._copy = tempfile.TemporaryDirectory(prefix="mondrian-")
        copy = Path(self._copy.name) / "copy.db"
        try:
            shutil.copyfile(self.path, copy)
            shutil.copyfile(wal, f"{copy}-wal")
        except OSError as error:
            self._copy.cleanup()
            why = f"its newest rows in {wal.name} cannot be read: {error.strerror}"
            raise UserError(f"{self.path}: {why}; allow it, or link a copy of both files") from error
        return self._open(copy, "mode=ro")

    @staticmethod
    def _open(path: Path, how: str) -> sqlite3.Connection:
        uri = f"file:{quote(str(path.absolute()))}?{how}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_PATIENCE)
        connection.text_factory = bytes  # decoded later, where a damaged text can be reported with its row
        return connection

    def _wait_for_writer(self, connection: sqlite3.Connection) -> None:
        """Return once the database can be read; OperationalError when a writer still holds it after `_PATIENCE`."""
        connection.execute(f"PRAGMA busy_timeout = {int(1000 * min(1, _PATIENCE / 4))}")
        started, said = time.monotonic(), False
        while True:
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * _PATIENCE)}")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() - started > _PATIENCE:
                    raise
            if not said:
                click.echo(f"{self.path}: locked by its writer; waiting up to {_PATIENCE} seconds", err=True)
                said = True

    def _read_columns(self) -> list[str]:
        columns = [shown(row[1]).lower() for row in self._rows("PRAGMA table_info(jobs)")]  # SQLite ignores their case
        if not columns:
            raise NoMondrianDatabase(f"{self.path}: no table jobs in it; name Mondrian's database with --db_path")
        lacking = [name for name in NEEDED if name not in columns]
        if lacking:
            raise NoMondrianDatabase(
                f"{self.path}: table jobs lacks the column(s) {', '.join(lacking)}; is it Mondrian's? Where they have "
                f"other names ({', '.join(columns)[:200]}), make a view called jobs with these"
            )
        return columns

    def _has_rowid(self) -> bool:
        """Tell whether rows can be fetched by their rowid: not from a view, nor from a table WITHOUT ROWID.

        UserError where ``jobs`` is a view whose rows cannot be counted within `_PATIENCE`.
        """
        if self._value("SELECT type FROM sqlite_master WHERE name = 'jobs'") != "view":
            try:
                self.connection.execute("SELECT rowid FROM jobs LIMIT 1").fetchone()
                return True
            except _DAMAGE:
                return False
        ends = time.monotonic() + _PATIENCE
        self.connection.set_progress_handler(lambda: time.monotonic() > ends, 100_000)
        try:
            self.connection.execute("SELECT count(*) FROM jobs").fetchone()
        except sqlite3.OperationalError as error:
            raise UserError(f"{self.path}: jobs is a view that does not end ({error}); link a table of jobs") from error
        finally:
            self.connection.set_progress_handler(None, 0)
        return False

    def newest(self) -> str:
        """Return the time of the newest job, in a form that sorts; "" without one."""
        times = [name for name in ("created_at", "completed_at") if name in self.columns]
        if not times:
            return ""
        (values,) = self._rows(f"SELECT {', '.join(f'max({name})' for name in times)} FROM jobs")
        return max(sortable_time(shown(value)) for value in values if value is not None) if any(values) else ""

    def advisors(self) -> dict[str, int]:
        """Return {advisor: number of its jobs}, most jobs first."""
        rows = self._rows("SELECT CAST(advisor AS BLOB), count(*) FROM jobs GROUP BY 1 ORDER BY 2 DESC, 1")
        return {shown(name): count for name, count in rows}

    def prompts(self, advisor: str) -> Prompts:
        """Return the system prompt and the advisor's; UserError where their tables are damaged."""
        try:
            return read_prompts(self.connection, advisor)
        except LoraError as error:
            raise UserError(f"{self.path}: {error}") from error

    def count(self) -> int:
        """Return the number of jobs."""
        return int(self._value("SELECT count(*) FROM jobs") or 0)

    def jobs(self, columns: tuple[str, ...]) -> Iterator[dict]:
        """Yield each job: {"rowid", column: text, number, None or AnalysisError, ...}, by time of making, then by id.

        The order is the content's, not that in which rows happen to lie. Columns that this version lacks are None. A
        text that is too large or no UTF-8 comes as an AnalysisError.
        """
        here = [name for name in columns if name in self.columns]
        parts = []
        for name in here:  # what is too large is never loaded; length() of a text would stop at a NUL
            size = f"length(CAST({name} AS BLOB))"
            parts.append(f"CASE WHEN {size} > {4 * MAX_TEXT} THEN NULL ELSE {name} END, {size}")
        for values in self._in_order(", ".join(parts)):
            row: dict = dict.fromkeys(columns)
            row["rowid"] = values[0]
            for at, name in enumerate(here):
                row[name] = _column(values[1 + 2 * at], values[2 + 2 * at])
            yield row

    def _in_order(self, selected: str) -> Iterator[tuple]:
        """Yield (rowid, *selected) of each job in order; rows are fetched a few at a time, since without WAL an open
        read keeps the writer waiting.
        """
        made = next((name for name in ("created_at", "completed_at") if name in self.columns), "NULL")
        brief = f"substr({made}, 1, 40), substr(id, 1, 200)"
        if not self._keyed:
            yield from self._rows(f"SELECT NULL, {selected} FROM jobs ORDER BY {brief}, id")
            return
        order = [
            (sortable_time(shown(time_of)), shown(job), rowid)
            for rowid, time_of, job in self._rows(f"SELECT rowid, {brief} FROM jobs")
        ]
        order.sort()
        for start in range(0, len(order), _BATCH):
            keys = [int(rowid) for _, _, rowid in order[start : start + _BATCH]]
            where = f"rowid IN ({', '.join(map(str, keys))})"
            rows = {row[0]: row for row in self._rows(f"SELECT rowid, {selected} FROM jobs WHERE {where}")}
            yield from (rows[key] for key in keys if key in rows)  # a job that was deleted meanwhile is gone

    def _rows(self, query: str) -> Iterator[tuple]:
        try:
            yield from self.connection.execute(query)
        except _DAMAGE as error:
            raise UserError(f"{self.path}: cannot be read to its end ({error}); copy or repair the database") from error
        if self._immutable and _state(self.path) != self._before:
            raise UserError(f"{self.path}: the service began to write to it during the reading; run the command again")

    def _value(self, query: str) -> str | None:
        value = next(iter(self._rows(query)), (None,))[0]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None if value is None else str(value)


def open_database(path: str | os.PathLike) -> Database:
    """Open a database for reading only; UserError for what is missing, no SQLite, or no Mondrian database."""
    try:
        return Database(Path(path))
    except _DAMAGE as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or repair the database") from error


def _state(path: Path) -> tuple | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, os.path.exists(f"{path}-wal")


def _column(value, size):
    if value is None and size:
        return AnalysisError("too_large", f"{size:,} bytes")
    if isinstance(value, bytes):
        try:
            return as_text(value)
        except AnalysisError as error:
            return error
    return value


def shown(value) -> str:
    """Return any value of a row as a text that can be printed."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    text = str(value) if value is not None else "(none)"
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def sortable_time(value: str | None) -> str:
    """Return a time as it sorts, whichever form the service wrote it in ("2026-01-15 16:21:01" or ISO's T)."""
    return value.strip().replace("T", " ") if isinstance(value, str) else ""

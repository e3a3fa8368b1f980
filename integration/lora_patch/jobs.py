"""The jobs table of the service: the columns that it gains, and what is written into them."""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from pathlib import Path

from .arms import Job, Scope
from .errors import LoraError, one_line
from .flags import flags
from .log import say
from .prompts import build_prompt

COLUMNS = {  # added to the jobs table
    "model_used": "TEXT",  # base, fine_tuned, ab_test_base or ab_test_fine_tuned
    "adapter_version": "TEXT",
    "model_duration": "REAL",  # seconds of generation, a retry included, waiting for the model not
    "model_fallback": "INTEGER",  # 1: the fine-tuned answer was unusable, and the user got the base's
}


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open an existing database, ro or rw; a service that writes to it is waited for up to 5 seconds."""
    if not Path(path).is_file():
        raise LoraError(f"{path}: no such database")
    return sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode={mode}", uri=True, timeout=5, isolation_level=None)


def key_and_columns(db: sqlite3.Connection) -> tuple[str, set[str]]:
    """Return the jobs table's key column and all its columns."""
    names = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
    if not names:
        raise LoraError("no jobs table")
    key = next((name for name in ("id", "job_id") if name in names), None)
    if key is None:
        raise LoraError("the jobs table has neither id nor job_id")
    return key, set(names)


def _lock(db: sqlite3.Connection, seconds: float = 30) -> None:
    """Begin to write. SQLite's own waiting sleeps too long to get a turn beside a service that writes all the time."""
    end = time.monotonic() + seconds
    db.execute("PRAGMA busy_timeout = 0")
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.002)


def migrate(path: Path) -> list[str]:
    """Add the columns that the jobs table lacks; returns them. All or none, once only, beside a running service."""
    with contextlib.closing(connect(path, "rw")) as db:
        if set(COLUMNS) <= key_and_columns(db)[1]:
            return []
        _lock(db)
        missing = [name for name in COLUMNS if name not in key_and_columns(db)[1]]  # again, now under the lock
        for name in missing:
            db.execute(f"ALTER TABLE jobs ADD COLUMN {name} {COLUMNS[name]}")
        db.execute("COMMIT")
        return missing


class Recorder:
    """Writes into the jobs table which arm answered; what cannot be written now is tried again later."""

    def __init__(self):
        self.path: Path | None = None
        self.state = "not started"
        self.lost = 0  # jobs that never came to stand in the table
        self.pending: deque = deque(maxlen=1000)  # [value of each of COLUMNS, job id, tries]
        self.writing = threading.Lock()
        self.not_before, self.later = 0.0, None

    def record_all(self, scope: Scope | None) -> None:
        """Write the finished jobs of a request; again at its end, since the service may have written the row anew."""
        for job in scope.jobs if scope is not None else ():
            if job.done:
                self.record(job)

    def record(self, job: Job) -> None:
        if self.state == "on" and job.id is not None:
            self.pending.append([job.model_used, job.version, round(job.seconds, 3), int(job.fallback), job.id, 0])
            self.write_pending()

    def write_pending(self) -> None:
        """Write what is to be recorded; what cannot be written now (busy, or no such job yet) is tried again later."""
        with self.writing:
            if not self.pending or time.monotonic() < self.not_before:
                return
            try:
                with contextlib.closing(connect(self.path, "rw")) as db:
                    key = key_and_columns(db)[0]
                    assignments = ", ".join(f"{column} = ?" for column in COLUMNS)
                    for _ in range(len(self.pending)):
                        *values, tries = self.pending[0]
                        changed = db.execute(f"UPDATE jobs SET {assignments} WHERE {key} = ?", values).rowcount
                        self.pending.popleft()
                        if not changed and tries < 20:
                            self.pending.append([*values, tries + 1])
                        elif not changed:
                            self.lost += 1
            except (sqlite3.Error, LoraError) as error:
                self.not_before = time.monotonic() + 2  # the next requests do not wait for it one after another
                waiting = f"{len(self.pending)} job(s) wait to be recorded"
                say(logging.WARNING, f"{self.path}: {waiting} ({one_line(error)})")
            if self.pending and not (self.later and self.later.is_alive()):
                self.later = threading.Timer(2.1, self.write_later)
                self.later.daemon = True
                self.later.start()

    def write_later(self) -> None:
        self.later = None
        self.write_pending()

    def open(self, path: str | os.PathLike | None) -> None:
        """Find the database and add the columns; what stands in the way is said, and the service runs without."""
        path = flags.jobs_db or path or "mondrian.db"
        self.path = Path(path).absolute()
        try:
            added = migrate(self.path)
            self.state = "on"
            if added:
                say(logging.INFO, f"{self.path}: added {', '.join(added)} to the jobs table")
        except (sqlite3.Error, LoraError) as error:
            self.state = f"off: {one_line(error)}"
            say(logging.WARNING, f"{self.path}: the arms are not recorded ({one_line(error)}); see --jobs_db")

    def compare_prompt(self, prompt: str, advisor: str | None) -> str:
        """Say whether the service's prompt is the one that training builds from this database: as_trained or other."""
        if self.path is None or not prompt or advisor is None:
            return "unknown"
        try:
            with contextlib.closing(connect(self.path, "ro")) as db:
                system = db.execute("SELECT CAST(value AS TEXT) FROM config WHERE key = 'system_prompt'").fetchone()
                own = db.execute("SELECT CAST(prompt AS TEXT) FROM advisors WHERE id = ?", (advisor,)).fetchone()
        except (sqlite3.Error, LoraError):
            return "unknown"
        if not system or not own or not system[0] or not own[0]:
            return "unknown"
        return "as_trained" if build_prompt(system[0], advisor, own[0]) in prompt else "other"

    def health(self) -> dict:
        """Return what /health says of the recording."""
        return {"recording": self.state, "unrecorded": self.lost + len(self.pending)}

"""The jobs table of the service: the columns that it gains, and what is written into them."""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from pathlib import Path

from .arms import Job
from .errors import LoraError, one_line
from .flags import flags
from .log import say
from .prompts import Prompts, build_prompt, read_prompts

COLUMNS = {  # added to the jobs table
    "model_used": "TEXT",  # base, fine_tuned, ab_test_base or ab_test_fine_tuned
    "adapter_version": "TEXT",
    "model_duration": "REAL",  # seconds of generation, with a retry, without waiting for the model
    "model_fallback": "INTEGER",  # 1: the fine-tuned answer was unusable, and the user got the base's
    "ab_test_split": "REAL",  # of a job in a test: the share of jobs that the adapter got when its arm was drawn
}


def connect(path: Path, mode: str, timeout: float = 5) -> sqlite3.Connection:
    """Open an existing database, ro or rw; a service that writes to it is waited for up to ``timeout`` seconds."""
    if not Path(path).is_file():
        raise LoraError(f"{path}: no such database")
    return sqlite3.connect(
        f"{Path(path).resolve().as_uri()}?mode={mode}", uri=True, timeout=timeout, isolation_level=None
    )


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


TRIES = 20  # looks for a job's row, which a service may write late
FRESH = 60.0  # seconds that prompts are kept
WAIT = 0.2  # seconds that a request waits for a locked database; what it could not write is written later


class Recorder:
    """Writes into the jobs table which arm answered; what cannot be written now is tried again later."""

    def __init__(self):
        self.path: Path | None = None
        self.state = "not started"
        self.lost = 0  # jobs that never appeared in the table
        self.pending: deque = deque(maxlen=1000)  # [value of each of COLUMNS, job id, tries]
        self.writing = threading.Lock()
        self.not_before, self.later = 0.0, None
        self.prompts: dict[str, tuple[float, Prompts]] = {}  # advisor -> when they were read, the database's prompts

    def record(self, job: Job) -> None:
        if (self.state == "on" or self.state.startswith("waiting")) and job.id is not None:
            values = [job.model_used, job.version, round(job.seconds, 3), int(job.fallback), job.split]
            self.pending.append([*values, job.id, 0])
            self.write_pending()

    def write_pending(self) -> None:
        """Write what is to be recorded; what cannot be written now (busy, or no such job yet) is tried again later."""
        with self.writing:
            if not self.pending or time.monotonic() < self.not_before:
                return
            try:
                with contextlib.closing(connect(self.path, "rw", WAIT)) as db:
                    key = key_and_columns(db)[0]
                    found = self.state == "on" or self._finds_a_job(db, key)
                    assignments = ", ".join(f"{column} = ?" for column in COLUMNS)
                    for _ in range(len(self.pending) if found else 0):
                        *values, tries = self.pending[0]
                        changed = db.execute(f"UPDATE jobs SET {assignments} WHERE {key} = ?", values).rowcount
                        self.pending.popleft()
                        if not changed and tries < TRIES:
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

    def _finds_a_job(self, db: sqlite3.Connection, key: str) -> bool:
        """Migrate a database that the service does not name once one of its jobs is found there."""
        for entry in self.pending:
            if db.execute(f"SELECT 1 FROM jobs WHERE {key} = ?", (entry[-2],)).fetchone():
                self._migrate()
                return True
            entry[-1] += 1
        if any(entry[-1] > TRIES for entry in self.pending):
            self._give_up("none of this service's jobs is in it")
        return False

    def write_later(self) -> None:
        self.later = None
        self.write_pending()

    def open(self, path: str | os.PathLike | None) -> None:
        """Open the database that the flag or the service names, and add the columns.

        Where neither names one, mondrian.db in the working folder may belong to another program: it is left alone
        until a job of this service is found in it. Where recording fails, that is logged and the service runs on.
        """
        named = flags.jobs_db or path
        self.path = Path(named or "mondrian.db").absolute()
        try:
            with contextlib.closing(connect(self.path, "ro")) as db:
                columns = key_and_columns(db)[1]
            if named or set(COLUMNS) <= columns:
                self._migrate()
            else:
                self.state = "waiting for a job of this service"
                say(logging.WARNING, f"{self.path}: is not named by the service; the arms are recorded there once one "
                    "of its jobs is in it (--jobs_db names another database)")  # fmt: skip
        except (sqlite3.Error, LoraError) as error:
            self._give_up(one_line(error))

    def _migrate(self) -> None:
        added = migrate(self.path)
        self.state = "on"
        if added:
            say(logging.INFO, f"{self.path}: added {', '.join(added)} to the jobs table")

    def _give_up(self, reason: str) -> None:
        self.state = f"off: {reason}"
        self.pending.clear()
        say(logging.WARNING, f"{self.path}: the arms are not recorded ({reason}); see --jobs_db")

    def compare_prompt(self, prompt: str, advisor: str | None) -> str:
        """Say whether the service's prompt is the one that training builds from this database: as_trained or other."""
        texts = self._prompts_of(advisor) if self.path is not None and prompt and advisor is not None else None
        if texts is None or None in texts:
            return "unknown"
        return "as_trained" if build_prompt(texts.system_prompt, advisor, texts.advisor_prompt) in prompt else "other"

    def _prompts_of(self, advisor: str) -> Prompts | None:
        """Return the database's prompts, as they were at most a minute ago; None where they cannot be read now."""
        read_at, texts = self.prompts.get(advisor, (-FRESH, None))
        now = time.monotonic()
        if now - read_at >= FRESH and now >= self.not_before:
            try:
                with contextlib.closing(connect(self.path, "ro", WAIT)) as db:
                    db.execute("SELECT 1 FROM sqlite_master").fetchone()  # a locked one would look like an old one
                    texts = read_prompts(db, advisor)
                self.prompts[advisor] = now, texts
            except (sqlite3.Error, LoraError):
                self.not_before = now + 2
        return texts

    def health(self) -> dict:
        """Return what /health says of the recording."""
        return {"recording": self.state, "unrecorded": self.lost + len(self.pending)}

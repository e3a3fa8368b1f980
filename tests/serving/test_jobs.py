"""Assignment, breaker and answers' validity; the jobs table: migration under fire, recording."""

import contextlib
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from integration.lora_patch import jobs
from integration.lora_patch.answers import analysis_problem
from integration.lora_patch.arms import Breaker, Job, assign
from integration.lora_patch.errors import LoraError
from integration.lora_patch.jobs import COLUMNS, Recorder, migrate
from tests.standin.running import OLDEST, PATCH, ROOT, make_db

# -- assignment, breaker, validity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_split_holds_over_10_000_jobs(split):
    arms = [assign(f"7dcc520e-3d12-45f2-87f0-{n:012x}", split) for n in range(10_000)]
    assert arms == [assign(f"7dcc520e-3d12-45f2-87f0-{n:012x}", split) for n in range(10_000)]
    share = arms.count("fine_tuned") / 10_000
    assert abs(share - split) <= 4 * math.sqrt(split * (1 - split) / 10_000)  # one in 16,000 would be further off


def test_a_larger_split_moves_no_job_out_of_the_fine_tuned_arm():
    tuned = [{n for n in range(2000) if assign(str(n), split) == "fine_tuned"} for split in (0.2, 0.5, 0.8)]
    assert tuned[0] < tuned[1] < tuned[2]


def test_the_breaker_looks_at_a_sliding_window():
    breaker = Breaker(window=10, bound=0.3)
    for _ in range(20):  # three bad ones in ten, again and again, are within the bound
        assert not any(breaker.note(problem) for problem in ["bad"] * 3 + [None] * 7)
    assert [breaker.note("bad") for _ in range(5)] == [False, False, False, True, False]
    assert breaker.state()["state"] == "open" and breaker.state()["reason"] == "bad"
    breaker.arm()
    assert breaker.state() == {"state": "closed", "bad": 0, "answers": 0, "since": None, "reason": None}
    assert [breaker.note("bad") for _ in range(4)] == [False, False, False, True]  # need not wait for ten


JSON_PROMPT = 'Answer with {"dimensions": [{"name": "Composition", "score": 8}]}'
GOOD = '{"dimensions": [{"name": "Composition", "score": 8}, {"name": "Lighting", "score": 6.5}], "overall_score": 7.3}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, None),
        (f"```json\n{GOOD}\n```", None),
        ('{"dimensional_analysis": {"composition": {"score": "8/10"}}}', None),
        (f"<think>Is it {{good}}?</think>{GOOD} I hope that helps }}", None),
        (None, "no answer"),
        (" \n", "no answer"),
        (GOOD[:-3], "no JSON object"),
        ("[" * 5000 + "{" * 5000 + "}", "no JSON object"),
        ('{"error": "out of memory"}', "no scored dimensions"),
        ('{"dimensions": []}', "no scored dimensions"),
        ('{"dimensions": [{"name": "Composition", "score": 80}]}', "no scored dimensions"),
        ('{"dimensions": [{"name": "Composition", "score": NaN}]}', "no scored dimensions"),
        ('{"dimensions": [{"name": "Composition", "score": 8}, {"name": "Lighting"}]}', "no scored dimensions"),
    ],
)
def test_what_is_a_valid_answer(text, problem):
    assert analysis_problem(text, JSON_PROMPT) == problem


def test_validity_follows_the_prompt():
    html = '<div class="feedback-card"><h3>Composition <span class="dimension-score">(8/10)</span></h3></div>'
    assert analysis_problem(html, "Output valid HTML with feedback-card") is None
    assert analysis_problem(GOOD, "Output valid HTML with feedback-card") == "no scored feedback card"
    assert analysis_problem("A quiet lake at dawn.", "Describe the photograph.") is None


# -- migration ---------------------------------------------------------------------------------------------------------


def columns(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[1] for row in db.execute("PRAGMA table_info(jobs)")]


@pytest.mark.parametrize("name", ["mondrian.db", "mondrian_json.db"])
def test_both_eras_are_migrated_once(name, tmp_path):
    schema = (ROOT / "tests" / "standin" / "schemas" / f"{name}.sql").read_text()
    path = make_db(tmp_path / name, schema)
    assert migrate(path) == list(COLUMNS)
    assert migrate(path) == [] and columns(path)[-len(COLUMNS) :] == list(COLUMNS)


def test_a_half_migrated_table_is_completed(tmp_path):
    path = make_db(
        tmp_path / "m.db", OLDEST.replace("status TEXT", "status TEXT, model_used TEXT, model_duration REAL")
    )
    assert migrate(path) == ["adapter_version", "model_fallback", "ab_test_split"]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("CREATE TABLE other (id)", "no jobs table"),
        ("CREATE TABLE jobs (number INTEGER, status TEXT)", "neither id nor job_id"),
    ],
)
def test_a_table_that_cannot_be_migrated(schema, expected, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "m.db")) as db:
        db.execute(schema)
    with pytest.raises(LoraError, match=expected):
        migrate(tmp_path / "m.db")
    with pytest.raises(LoraError, match="no such database"):
        migrate(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_database_in_use_is_migrated_and_its_writer_not_stopped(tmp_path):
    path = make_db(tmp_path / "m.db")
    stop, written, failed = threading.Event(), [], []

    def write():
        db = sqlite3.connect(path, timeout=30)
        while not stop.is_set():
            try:
                with db:
                    db.execute("INSERT INTO jobs (id, status) VALUES (?, 'done')", (f"w{len(written)}",))
                    time.sleep(0.01)  # with the lock held
                written.append(1)
                time.sleep(0.002)
            except sqlite3.Error as error:
                failed.append(error)
        db.close()

    writers = [threading.Thread(target=write)]
    migrations = [threading.Thread(target=migrate, args=(path,)) for _ in range(4)]
    for thread in writers + migrations:
        thread.start()
    for thread in migrations:
        thread.join()
    stop.set()
    writers[0].join()
    assert not failed and columns(path).count("model_used") == 1 and set(COLUMNS) < set(columns(path))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (3 + len(written),)


def test_kill_in_the_middle_of_a_migration_leaves_a_working_database(tmp_path):
    """A process that migrates is killed at a dozen moments; each time the table is whole and can be migrated."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import pathlib; from lora_patch.jobs import migrate\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for path in sorted(pathlib.Path(sys.argv[1]).glob('*.db')): migrate(path)"
    )
    process_arguments = [sys.executable, "-c", code, str(tmp_path), str(PATCH.parent)]
    seen = set()
    for wait in (0.0, 0.002, 0.004, 0.008, 0.02, 0.2):
        for path in tmp_path.glob("*.db*"):
            path.unlink()
        paths = [make_db(tmp_path / f"{n:03}.db", rows=1) for n in range(12)]
        process = subprocess.Popen(process_arguments, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in paths:
            added = len(set(columns(path)) & set(COLUMNS))
            assert added in (0, len(COLUMNS))  # all or none
            seen.add(added)
            migrate(path)
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                db.execute("UPDATE jobs SET model_used = 'base' WHERE id = 'j0'")
    assert seen == {0, len(COLUMNS)}  # some were killed before, some after


# -- recording ---------------------------------------------------------------------------------------------------------


def recorded(path: Path, job_id: str):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(
            "SELECT model_used, adapter_version, model_fallback FROM jobs WHERE id = ?", (job_id,)
        ).fetchone()


def wait_for(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_job_whose_row_comes_later_or_while_the_database_is_locked_is_recorded_then(tmp_path):
    path = make_db(tmp_path / "m.db")
    service = Recorder()
    service.open(path)
    service.record(Job("late", "ansel", "fine_tuned", None, in_test=True, version="v2"))
    assert len(service.pending) == 1
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO jobs (id) VALUES ('late')")
    assert wait_for(lambda: recorded(path, "late") == ("ab_test_fine_tuned", "v2", 0))

    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    service.record(Job("j0", "ansel", "base", None))
    service.record(Job("j1", "ansel", "base", None))
    assert time.monotonic() - started < 4  # a short wait, and not one a request
    blocker.execute("COMMIT")
    blocker.close()
    assert wait_for(lambda: recorded(path, "j0") == recorded(path, "j1") == ("base", None, 0))
    assert not service.pending


def test_a_database_that_the_service_does_not_name_is_left_alone_until_it_holds_its_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "TRIES", 2)
    path = make_db(tmp_path / "mondrian.db")
    recorder = Recorder()
    recorder.open(None)
    assert recorder.state == "waiting for a job of this service" and "model_used" not in columns(path)
    recorder.record(Job("j1", "ansel", "fine_tuned", None, version="v2"))
    assert recorder.state == "on" and recorded(path, "j1") == ("fine_tuned", "v2", 0)

    other = make_db(tmp_path / "other" / "mondrian.db")
    monkeypatch.chdir(other.parent)
    recorder = Recorder()
    recorder.open(None)
    for number in range(3):
        recorder.record(Job(f"elsewhere-{number}", "ansel", "base", None))
    assert recorder.state == "off: none of this service's jobs is in it" and not recorder.pending
    assert "model_used" not in columns(other)
    named = Recorder()
    named.open(other)  # the service's own code says that this is its database
    assert named.state == "on" and "model_used" in columns(other)


def test_without_a_database_the_service_runs_and_says_so(tmp_path):
    service = Recorder()
    service.open(tmp_path / "none.db")
    service.record(Job("j0", "ansel", "base", None))
    assert service.state.startswith("off: ") and "no such database" in service.state and not service.pending

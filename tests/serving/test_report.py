"""The A/B report on the jobs table: figures, sequences, advice, eras, the page, and what is no database."""

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from integration.lora_patch.errors import LoraError
from integration.lora_patch.jobs import migrate
from integration.lora_patch.report import HEADINGS, watch
from integration.lora_patch.report_jobs import read_jobs
from tests.standin.running import PATCH, ROOT, make_db


def analysis(score: float) -> str:
    dimension = {"name": "Composition", "score": 7, "comment": "", "recommendation": ""}
    answer = json.dumps({"image_description": "A lake.", "dimensions": [dimension], "overall_score": score})
    return f"# Ansel Analysis\n\n## Summary\nA lake.\n\n## Full Analysis\n{answer}"


def fill(path: Path, arm: str | None, scores: list, days_ago: float = 1, **more) -> None:
    """Add jobs; a score of None is an answer that cannot be read."""
    at = (datetime.now(UTC) - timedelta(days=days_ago)).isoformat()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for score in scores:
            row = {"model_used": arm, "status": "completed", "created_at": at, "model_duration": 10.0, **more}
            row["analysis_markdown"] = "{broken" if score is None else analysis(score)
            names = ", ".join(["id", *row])
            marks = ", ".join("?" * (len(row) + 1))
            key = f"{arm}-{db.execute('SELECT count(*) FROM jobs').fetchone()[0]}"
            db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", (key, *row.values()))


def scattered(mean: float, count: int, seed: int = 0) -> list[float]:
    return [round(score, 2) for score in np.random.default_rng(seed).normal(mean, 0.5, count)]


@pytest.fixture
def jobs(tmp_path) -> Path:
    schema = (ROOT / "tests" / "standin" / "schemas" / "mondrian_json.db.sql").read_text()
    path = make_db(tmp_path / "mondrian.db", schema, rows=0)
    migrate(path)
    return path


def report(path: Path, *more: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PATCH), "report", "--db", str(path), *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True)


def found(path: Path, *more: object) -> dict:
    return json.loads(report(path, "--format", "json", *more).stdout)


def test_the_report_in_figures(jobs):
    fill(jobs, "ab_test_base", [5.0, 6.0, 7.0, 6.0, None])
    fill(jobs, "ab_test_fine_tuned", [7.0, 8.0, 7.5, 7.5], adapter_version="v2", model_duration=4.0)
    fill(jobs, "ab_test_fine_tuned", [9.0], adapter_version="v2", model_duration=30.0, model_fallback=1)
    fill(jobs, "base", [1.0] * 50, days_ago=8)
    report = found(jobs, "--days", 7)
    base, tuned = report["arms"]["ab_test_base"], report["arms"]["ab_test_fine_tuned"]
    assert report["jobs"] == 10 and (base["count"], tuned["count"]) == (5, 5) and "base" not in report["arms"]
    assert (base["average_score"], base["valid_rate"], base["median_seconds"]) == (6.0, 0.8, 10.0)
    # the answer that the base gave in the adapter's place counts against the adapter and not for its score
    assert (tuned["average_score"], tuned["valid_rate"], tuned["fallbacks"], tuned["versions"]) == (7.5, 0.8, 1, ["v2"])
    assert (tuned["median_seconds"], tuned["p95_seconds"]) == (4.0, 30.0)
    score = report["test"]["differences"]["average_score"]
    assert score["value"] == pytest.approx(1.5) and score["low"] is None and score["photographs"] == [4, 4]
    assert report["sentence"].startswith("Keep the test as it is: too few photographs (4 answered by the base, 4 by")


def test_failed_jobs_are_invalid_answers_of_their_arm(jobs):
    fill(jobs, "ab_test_fine_tuned", scattered(7, 10), adapter_version="v2")
    fill(jobs, "ab_test_fine_tuned", [None] * 10, adapter_version="v2", status="error", model_duration=None)
    fill(jobs, "ab_test_base", scattered(7, 10))
    fill(jobs, None, [None] * 7, status="error")  # no arm was chosen: nobody's
    fill(jobs, "ab_test_base", [None], status="processing", days_ago=0)  # under way
    fill(jobs, "ab_test_base", [None], status="processing", days_ago=2)  # the service died on it
    arms = found(jobs)["arms"]
    tuned, base = arms["ab_test_fine_tuned"], arms["ab_test_base"]
    assert (tuned["count"], tuned["valid_rate"], tuned["failed"], tuned["scored"]) == (20, 0.5, 10, 10)
    assert (base["count"], base["failed"]) == (11, 1)


def test_jobs_of_one_photograph_are_one_photograph(jobs):
    """By the file's bytes where it is there, else by the name without what an upload adds to it."""
    folder = jobs.parent / "uploads"
    folder.mkdir()
    uuids = [f"{n:08x}-1111-2222-3333-444444444444" for n in range(4)]
    for uuid, content in zip(uuids, (b"one", b"one", b"two", b"two"), strict=True):
        (folder / f"{uuid}_photo.jpg").write_bytes(content)
        fill(jobs, "ab_test_base", [6.0], filename=f"uploads/{uuid}_photo.jpg")
    name = "photo-FBE43B6E-41E7-47D7-A907-CF5A54325237"
    for ending in ("-5862d6f3", "-0599249b", ""):
        fill(jobs, "ab_test_base", [6.0], filename=f"{name}{ending}.jpg")
    for name in ("photo-db50ee7a.jpg", "photo-c3011c4a.jpg", "photo.jpg"):  # these names tell nothing
        fill(jobs, "ab_test_base", [6.0], filename=name)
    fill(jobs, "ab_test_base", [6.0, 6.0])  # no name at all
    assert found(jobs)["arms"]["ab_test_base"]["photographs"] == 2 + 1 + 3 + 2


def test_higher_scores_end_the_test(jobs):
    fill(jobs, "ab_test_base", scattered(6, 60, 1))
    fill(jobs, "ab_test_fine_tuned", scattered(7.5, 60, 2), adapter_version="v2")
    report_ = found(jobs)
    score = report_["test"]["differences"]["average_score"]
    assert 0 < score["low"] < score["value"] < score["high"]
    assert report_["test"]["advice"]["action"] == "stop"
    assert re.match(
        r"Stop the test, it has its answer: the adapter's scores are 1\.\d\d points higher", report_["sentence"]
    )
    assert "since" in report_["sentence"].lower() and report_["sentence"].endswith("60 jobs and the base 60.")


def test_a_test_begins_anew_with_another_version(jobs):
    fill(jobs, "ab_test_base", scattered(6, 30, 1), days_ago=9)
    fill(jobs, "ab_test_fine_tuned", scattered(9, 30, 2), days_ago=8, adapter_version="v2")
    fill(jobs, "ab_test_fine_tuned", scattered(6, 30, 3), days_ago=3, adapter_version="v3")
    fill(jobs, "ab_test_base", scattered(6, 30, 4), days_ago=2)
    test = found(jobs, "--days", 0)["test"]
    assert (test["jobs"], test["versions"]) == (60, ["v3"])
    assert test["since"] == (datetime.now(UTC) - timedelta(days=3)).strftime("%Y-%m-%d")
    # how far back the figures look does not change what is followed
    assert found(jobs, "--days", 1)["test"] == test


def test_arms_that_were_not_drawn_at_random_get_no_advice(jobs):
    fill(jobs, "base", scattered(6, 30, 1))
    fill(jobs, "fine_tuned", scattered(8, 30, 2))
    report_ = found(jobs)
    assert not report_["test"]["randomised"] and report_["test"]["differences"]["average_score"]["low"] > 0
    assert report_["sentence"].startswith("The jobs were not assigned at random, so compare with care.")


def test_the_report_as_table_and_page(jobs, tmp_path):
    fill(jobs, "ab_test_base", scattered(6, 20, 1))
    fill(jobs, "ab_test_fine_tuned", scattered(6, 20, 2), adapter_version="<b>v2</b>")
    table = report(jobs).stdout
    assert re.split(r"  +", table.splitlines()[0]) == HEADINGS
    assert re.search(r"average score     [+-]\d\.\d\d \(from -\d\.\d\d to \+\d\.\d\d\)", table)
    assert re.search(r"valid answers     \+0\.0% \(from -\d+\.\d% to \+\d+\.\d%\)", table)  # no width of zero
    assert "time of an answer +0%: they do not vary" in table
    page = tmp_path / "report.html"
    assert report(jobs, "--format", "html", "--output", page).stdout == ""
    text = page.read_text()
    assert "&lt;b&gt;v2" in text and "<b>v2" not in text and not re.search("https?:", text)
    assert "<th scope='col'>test: adapter</th>" in text and "<svg" in text


def test_scores_that_never_vary_are_pointed_out(jobs):
    fill(jobs, "ab_test_base", [7.4] * 12)
    fill(jobs, "ab_test_fine_tuned", [7.4] * 12)
    said = report(jobs).stdout
    assert "All 12 scores of ab_test_base are 7.4: copied from the prompt's example?" in said
    assert "Keep the test as it is: scores: they do not vary" in said


@pytest.mark.parametrize(
    ("tuned", "expected", "said"),
    [
        (dict(scores=scattered(7.5, 60, 2)), 0, "points higher"),
        (dict(scores=scattered(4.5, 60, 2)), 3, "points lower"),
        (dict(scores=[*scattered(6, 30, 2), *[None] * 30]), 4, "Roll back: valid answers are 50.0% fewer"),
        (dict(scores=scattered(6, 60, 2), model_duration=25.0), 4, "Roll back: an answer takes"),
    ],
)
def test_watch_ends_with_an_exit_code(jobs, tuned, expected, said):
    fill(jobs, "ab_test_base", scattered(6, 60, 1))
    fill(jobs, "ab_test_base", scattered(6, 2, 3), model_duration=11.0)
    fill(jobs, "ab_test_fine_tuned", adapter_version="v2", **tuned)
    done = report(jobs, "--watch", "0.1")
    assert (done.returncode, done.stdout.count("\n")) == (expected, 1) and said in done.stdout


def test_watch_goes_on_until_there_is_an_answer(jobs):
    fill(jobs, "ab_test_base", scattered(6, 60, 1))
    fill(jobs, "ab_test_fine_tuned", scattered(6, 5, 1), adapter_version="v2")
    command = [sys.executable, str(PATCH), "report", "--db", str(jobs), "--watch", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "Keep the test as it is: too few photographs" in process.stdout.readline()
    fill(jobs, "ab_test_fine_tuned", scattered(8, 60, 2), adapter_version="v2")
    assert "points higher" in process.communicate(timeout=20)[0] and process.returncode == 0


def test_the_older_eras_are_read_by_their_mode(tmp_path):
    html = (
        '<div class="feedback-card"><h3>Composition <span class="dimension-score">(8/10)</span></h3></div>'
        '<p class="overall-grade"><strong>8.1/10</strong></p>'
    )
    old = make_db(tmp_path / "old.db", (ROOT / "tests" / "standin" / "schemas" / "mondrian.db.sql").read_text(), rows=0)
    with contextlib.closing(sqlite3.connect(old)) as db, db:
        rows = [("a", "done", html), ("b", "done", "<p>Error: model unavailable</p>"), ("c", "error", "")]
        for key, status, text in rows:
            outputs = json.dumps({"ansel": text})
            names = "id, advisor, status, analysis_markdown, llm_outputs, created_at"
            row = (key, "ansel", status, text, outputs, "2025-12-20 18:17:31")
            db.execute(f"INSERT INTO jobs ({names}) VALUES (?, ?, ?, ?, ?, ?)", row)
    everything = found(old, "--days", 0)
    assert everything["arms"]["base"]["count"] == 2 and everything["arms"]["base"]["average_score"] == 8.1
    assert everything["arms"]["base"]["valid_rate"] == 0.5 and everything["unrecorded"] == 2
    assert found(old, "--days", 7)["sentence"] == "In the last 7 days no job was finished."


def test_a_database_in_a_folder_that_cannot_be_written(jobs, tmp_path):
    fill(jobs, "base", [5.0])
    folder = tmp_path / "frozen"
    folder.mkdir()
    shutil.copy(jobs, folder / "mondrian.db")
    (folder / "mondrian.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        assert found(folder / "mondrian.db")["jobs"] == 1
    finally:
        folder.chmod(0o755)


def test_what_is_no_database_is_said_in_one_line(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to look like one" * 20)
    for name in ("text.db", "none.db"):
        done = report(tmp_path / name)
        assert done.returncode == 1 and done.stderr.startswith(f"lora_patch: {tmp_path / name}: ")
        assert done.stderr.count("\n") == 1
    assert report(tmp_path / "none.db", "--schedule", "50%,5%").returncode == 2


def test_watch_survives_a_database_that_is_busy_for_a_moment(jobs, monkeypatch, capsys):
    fill(jobs, "ab_test_base", scattered(6, 60, 1))
    fill(jobs, "ab_test_fine_tuned", scattered(7.5, 60, 2), adapter_version="v2")
    found = [[], LoraError("busy"), sqlite3.OperationalError("locked"), read_jobs(jobs, in_test=True)]

    def read(path, in_test):
        now = found.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr("integration.lora_patch.report.read_jobs", read)
    assert watch(jobs, 0.01) == 0 and "points higher" in capsys.readouterr().out


def test_only_jobs_of_a_test_are_read_for_it(jobs, tmp_path):
    fill(jobs, "base", [6.0] * 3)
    fill(jobs, "ab_test_base", [6.0] * 2)
    assert [job.arm for job in read_jobs(jobs, in_test=True)] == ["ab_test_base"] * 2
    old = make_db(tmp_path / "old.db", "CREATE TABLE jobs (id TEXT PRIMARY KEY, status TEXT)", rows=3)
    assert read_jobs(old, in_test=True) == [] and len(read_jobs(old)) == 3


def test_scores_of_another_range_count_in_points_of_ten(jobs):
    with contextlib.closing(sqlite3.connect(jobs)) as db, db:
        db.execute("CREATE TABLE config (key, value)")
        db.execute("INSERT INTO config (key, value) VALUES ('system_prompt', 'Score each dimension from 0 to 100.')")
    fill(jobs, "ab_test_base", [80, 45.0, 700])
    assert [(job.valid, job.score) for job in read_jobs(jobs)] == [(True, 8.0), (True, 4.5), (True, None)]

"""The report on the arms from the jobs table: figures, intervals, eras, what is no database."""

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from integration.lora_patch.jobs import migrate
from integration.lora_patch.report import HEADINGS, _rate_difference, _t_quantile
from tests.standin.running import PATCH, ROOT, make_db


def analysis(score: float) -> str:
    dimension = {"name": "Composition", "score": 7, "comment": "", "recommendation": ""}
    answer = json.dumps({"image_description": "A lake.", "dimensions": [dimension], "overall_score": score})
    return f"# Ansel Analysis\n\n## Summary\nA lake.\n\n## Full Analysis\n{answer}"


def fill(path: Path, arm: str | None, scores: list, days_ago: float = 1, **more) -> None:
    at = (datetime.now(UTC) - timedelta(days=days_ago)).isoformat()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for score in scores:
            row = {"model_used": arm, "status": "completed", "created_at": at, "model_duration": 10.0, **more}
            row["analysis_markdown"] = "{broken" if score is None else analysis(score)
            names = ", ".join(["id", *row])
            marks = ", ".join("?" * (len(row) + 1))
            key = f"{arm}-{db.execute('SELECT count(*) FROM jobs').fetchone()[0]}"
            db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", (key, *row.values()))


@pytest.fixture
def jobs(tmp_path) -> Path:
    schema = (ROOT / "tests" / "standin" / "schemas" / "mondrian_json.db.sql").read_text()
    path = make_db(tmp_path / "mondrian.db", schema, rows=0)
    migrate(path)
    return path


def report(path: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PATCH), "report", "--db", str(path), *more]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_report_in_figures(jobs):
    fill(jobs, "ab_test_base", [5.0, 6.0, 7.0, 6.0, None])
    fill(jobs, "ab_test_fine_tuned", [7.0, 8.0, 7.5, 7.5], adapter_version="v2", model_duration=4.0)
    fill(jobs, "ab_test_fine_tuned", [9.0], adapter_version="v2", model_duration=30.0, model_fallback=1)
    fill(jobs, "ab_test_base", [1.0] * 50, days_ago=8)
    fill(jobs, "ab_test_base", [1.0] * 50, status="error")
    found = json.loads(report(jobs, "--days", "7", "--format", "json").stdout)
    base, tuned = found["arms"]["ab_test_base"], found["arms"]["ab_test_fine_tuned"]
    assert found["jobs"] == 10 and (base["count"], tuned["count"]) == (5, 5)
    assert (base["average_score"], base["valid_rate"], base["median_seconds"]) == (6.0, 0.8, 10.0)
    # the answer that the base gave in the adapter's place counts against the adapter and not for its score
    assert (tuned["average_score"], tuned["valid_rate"], tuned["fallbacks"], tuned["versions"]) == (7.5, 0.8, 1, ["v2"])
    assert (tuned["median_seconds"], tuned["p95_seconds"]) == (4.0, 30.0)
    score = found["difference"]["average_score"]
    # Welch by hand: variances 2/3 and 1/6, four each: error 0.4564, 4.4118 degrees of freedom, t = 2.6767
    assert score["value"] == pytest.approx(1.5) and score["high"] - score["value"] == pytest.approx(1.2217, abs=0.02)
    assert found["difference"]["valid_rate"]["value"] == 0 and found["difference"]["randomised"]
    assert found["sentence"].startswith(
        "In the last 7 days the fine-tuned model answered 5 jobs and the base 5; its scores are on average 1.50 higher "
    )
    assert "more than chance" in found["sentence"] and found["sentence"].endswith("10.0 s.")


@pytest.mark.parametrize(("freedom", "expected"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_the_quantile_of_t(freedom, expected):
    assert _t_quantile(freedom) == pytest.approx(expected, abs=0.02)


def test_newcombe_s_own_example():
    found = _rate_difference((48, 80), (56, 70))  # Newcombe 1998, table II (a): 0.0524 to 0.3339
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.0524, 0.3339)


def test_the_report_as_table_and_page(jobs, tmp_path):
    fill(jobs, "ab_test_base", [5.0, 6.0])
    fill(jobs, "ab_test_fine_tuned", [6.0, 5.0], adapter_version="<b>v2</b>")
    table = report(jobs).stdout
    assert re.split(r"  +", table.splitlines()[0]) == HEADINGS
    assert "chance alone can explain" in table
    page = tmp_path / "report.html"
    assert report(jobs, "--format", "html", "--output", page).stdout == ""
    text = page.read_text()
    assert (
        "<td>ab_test_fine_tuned</td>" in text and "&lt;b&gt;v2" in text and "<b>v2" not in text and "http" not in text
    )


def test_scores_that_never_vary_are_pointed_out(jobs):
    fill(jobs, "ab_test_base", [7.4] * 6)
    fill(jobs, "ab_test_fine_tuned", [7.4] * 6)
    said = report(jobs).stdout
    assert "all 6 scores of ab_test_base are 7.4: copied from the prompt's example?" in said
    assert "neither's scores vary, and they differ by 0.00" in said and "chance" not in said


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
    found = json.loads(report(old, "--days", "0", "--format", "json").stdout)
    assert found["arms"]["base"]["count"] == 2 and found["arms"]["base"]["average_score"] == 8.1
    assert found["arms"]["base"]["valid_rate"] == 0.5 and found["unrecorded"] == 2
    assert (
        json.loads(report(old, "--days", "7", "--format", "json").stdout)["sentence"]
        == "In the last 7 days no job was finished."
    )


def test_a_database_in_a_folder_that_cannot_be_written(jobs, tmp_path):
    fill(jobs, "base", [5.0])
    folder = tmp_path / "frozen"
    folder.mkdir()
    shutil.copy(jobs, folder / "mondrian.db")
    (folder / "mondrian.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        assert json.loads(report(folder / "mondrian.db", "--format", "json").stdout)["jobs"] == 1
    finally:
        folder.chmod(0o755)


def test_what_is_no_database_is_said_in_one_line(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to look like one" * 20)
    for name in ("text.db", "none.db"):
        done = report(tmp_path / name)
        assert done.returncode == 1 and done.stderr.startswith(f"lora_patch: {tmp_path / name}: ")
        assert done.stderr.count("\n") == 1

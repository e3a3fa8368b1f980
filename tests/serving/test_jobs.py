"""Assignment, breaker and answers' validity; the jobs table: migration under fire, recording, and the report."""

import contextlib
import json
import math
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from integration.lora_patch import service as lora_patch
from tests.standin.running import PATCH, ROOT, make_adapter

OLDEST = "CREATE TABLE jobs (id TEXT PRIMARY KEY, filename TEXT, advisor TEXT, status TEXT, analysis_markdown TEXT)"


# -- assignment, breaker, validity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_split_holds_over_10_000_jobs(split):
    arms = [lora_patch.assign(f"7dcc520e-3d12-45f2-87f0-{n:012x}", split) for n in range(10_000)]
    assert arms == [lora_patch.assign(f"7dcc520e-3d12-45f2-87f0-{n:012x}", split) for n in range(10_000)]
    share = arms.count("fine_tuned") / 10_000
    assert abs(share - split) <= 4 * math.sqrt(split * (1 - split) / 10_000)  # one in 16,000 would be further off


def test_a_larger_split_moves_no_job_out_of_the_fine_tuned_arm():
    tuned = [{n for n in range(2000) if lora_patch.assign(str(n), split) == "fine_tuned"} for split in (0.2, 0.5, 0.8)]
    assert tuned[0] < tuned[1] < tuned[2]


def test_the_breaker_looks_at_a_sliding_window():
    breaker = lora_patch.Breaker(window=10, bound=0.3)
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
    assert lora_patch.analysis_problem(text, JSON_PROMPT) == problem


def test_validity_follows_the_prompt():
    html = '<div class="feedback-card"><h3>Composition <span class="dimension-score">(8/10)</span></h3></div>'
    assert lora_patch.analysis_problem(html, "Output valid HTML with feedback-card") is None
    assert lora_patch.analysis_problem(GOOD, "Output valid HTML with feedback-card") == "no scored feedback card"
    assert lora_patch.analysis_problem("A quiet lake at dawn.", "Describe the photograph.") is None


@contextlib.contextmanager
def serving(monkeypatch, answers, **changed):
    """A service whose model is a function: what it does with each kind of answer of the adapter's."""
    service = lora_patch.Service()
    adapter = lora_patch.Adapter({}, "a", "v1", [4], "", None, 1024, lora_patch.Breaker(20, 0.25))
    service.table, service.mode = {"*": adapter}, "fine_tuned"
    monkeypatch.setattr(lora_patch, "_service", service)
    for name, value in {"use_fine_tuned": True, **changed}.items():
        monkeypatch.setitem(lora_patch.flags, name, value)

    @lora_patch.generation
    def run(full_prompt):
        use = lora_patch._active.get()
        if use is None:
            return "of the base"
        use.happened = True
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            time.sleep(answer)
            answer = GOOD
        return answer

    lora_patch._job.set(None)
    yield service, adapter, run
    lora_patch._job.set(None)


def test_a_bad_answer_or_an_exception_is_made_good_by_the_base(monkeypatch):
    with serving(monkeypatch, [GOOD, "{", ValueError("no such token")]) as (service, adapter, run):
        seen = []
        for number in range(3):
            lora_patch.choose(str(number), "ansel")
            seen.append((run(JSON_PROMPT), lora_patch._job.get().fallback))
        assert seen == [(GOOD, False), ("of the base", True), ("of the base", True)]
        assert service.counts["invalid"] == service.counts["fallback"] == 2 and sum(adapter.breaker.answers) == 2


def test_without_fallback_the_answer_or_exception_is_passed_on(monkeypatch):
    answers = ["{", ValueError("no such token")]
    with serving(monkeypatch, answers, fallback_on_invalid=False) as (service, adapter, run):
        lora_patch.choose("1", "ansel")
        assert run(JSON_PROMPT) == "{"
        with pytest.raises(ValueError, match="no such token"):
            run(JSON_PROMPT)
        assert sum(adapter.breaker.answers) == 2 and not service.generating.locked()


def test_a_slow_answer_counts_as_bad_but_is_used(monkeypatch):
    with serving(monkeypatch, [0.2, GOOD], breaker_time_limit=0.1) as (_, adapter, run):
        lora_patch.choose("1", "ansel")
        assert [run(JSON_PROMPT), run(JSON_PROMPT)] == [GOOD, GOOD]
        assert list(adapter.breaker.answers) == [True, False]


def test_an_adapter_that_took_no_part_is_not_claimed_to_have(monkeypatch):
    with serving(monkeypatch, []) as (service, adapter, _):
        lora_patch.choose("1", "ansel")
        assert lora_patch.generation(lambda full_prompt: GOOD)(JSON_PROMPT) == GOOD  # the base's, run again
        assert service.counts["fallback"] == 1 and sum(adapter.breaker.answers) == 1


def streaming(answers):
    """A generating function that yields: the adapter's answers piece by piece, or the base's."""

    @lora_patch.generation
    def run(full_prompt):
        use = lora_patch._active.get()
        if use is None:
            yield from ("of ", "the base")
            return
        use.happened = True
        yield from answers.pop(0)

    return run


def test_a_bad_stream_is_made_good_before_anything_of_it_is_passed_on(monkeypatch):
    with serving(monkeypatch, []) as (service, adapter, _):
        run = streaming([[GOOD[:9], GOOD[9:]], ["{", "broken"]])
        lora_patch.choose("1", "ansel")
        assert list(run(JSON_PROMPT)) == [GOOD[:9], GOOD[9:]]
        assert list(run(JSON_PROMPT)) == ["of ", "the base"]
        assert list(adapter.breaker.answers) == [False, True] and not service.generating.locked()


def test_a_stream_that_is_not_to_be_retried_flows_and_may_be_left(monkeypatch):
    with serving(monkeypatch, [], fallback_on_invalid=False) as (service, adapter, _):
        run = streaming([["{", "broken"], ["{", "left alone"], [GOOD]])
        lora_patch.choose("1", "ansel")
        assert list(run(JSON_PROMPT)) == ["{", "broken"]
        pieces = run(JSON_PROMPT)
        assert next(pieces) == "{" and service.generating.locked()
        assert lora_patch._active.get() is None  # between the pieces nobody else answers with the adapter
        pieces.close()
        assert not service.generating.locked() and list(run(JSON_PROMPT)) == [GOOD]
        assert list(adapter.breaker.answers) == [True, False]  # the reader who left is no bad answer


def test_a_request_cannot_choose_its_arm_unless_a_flag_allows_it(monkeypatch):
    with serving(monkeypatch, []) as (service, _, _):
        assert service.choose("1", "ansel", "base").model_used == "fine_tuned"
        monkeypatch.setitem(lora_patch.flags, "allow_arm_override", True)
        assert service.choose("1", "ansel", "base").model_used == "base"
        assert service.choose("1", "ansel", "nonsense").model_used == "fine_tuned"
        service.mode = "base"  # where there is no adapter in use, none can be chosen
        assert service.choose("1", "ansel", "fine_tuned").model_used == "base"


def test_a_model_config_is_followed_at_each_reload(monkeypatch, tmp_path, tiny_base):
    make_adapter(tmp_path / "models" / "a", tiny_base, 1)
    make_adapter(tmp_path / "models" / "b", tiny_base, 2)
    config = tmp_path / "model_config.json"

    def activate(name):
        models = {
            "base": {"lora_path": None},
            "a": {"lora_path": "models/a"},
            "b": {"lora_path": "models/b", "advisor": "Weston"},
        }
        config.write_text(json.dumps({"models": models, "active_model": name}))

    monkeypatch.setitem(lora_patch.flags, "model_config", str(config))
    activate("a")
    service = lora_patch.Service()
    service.begin()
    assert (service.mode, list(service.table)) == ("fine_tuned", ["*"])
    seen = []
    for name, asked in (
        ("b", None),
        ("base", None),
        ("a", None),
        ("a", "base"),
        ("b", None),
        ("b", "ab_test"),
        ("c", None),
    ):
        activate(name)
        try:
            service.reload(asked)
        except lora_patch.LoraError as error:
            assert "active_model 'c' is none of base, a, b" in str(error)
        seen.append((service.mode, list(service.table)))
    expected = [("fine_tuned", ["weston"]), ("base", []), ("fine_tuned", ["*"]), ("base", []), ("base", [])]
    assert seen == [*expected, ("ab_test", ["weston"]), ("ab_test", ["weston"])]


def test_an_unchanged_adapter_keeps_its_breaker_at_a_reload(monkeypatch, tmp_path, tiny_base):
    folder = make_adapter(tmp_path / "a", tiny_base, 1)
    monkeypatch.setitem(lora_patch.flags, "lora_path", str(folder))
    monkeypatch.setitem(lora_patch.flags, "model_mode", "fine_tuned")
    service = lora_patch.Service()
    service.begin()
    before = service.table["*"]
    before.breaker.since = "now"
    service.reload()
    assert service.table["*"] is before
    make_adapter(folder, tiny_base, 2)
    service.reload()
    assert service.table["*"] is not before and service.table["*"].breaker.since is None


# -- migration ---------------------------------------------------------------------------------------------------------


def make_db(path: Path, schema: str = OLDEST, rows: int = 3) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(schema)
        for number in range(rows):
            db.execute("INSERT INTO jobs (id, status) VALUES (?, 'done')", (f"j{number}",))
    return path


def columns(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[1] for row in db.execute("PRAGMA table_info(jobs)")]


@pytest.mark.parametrize("name", ["mondrian.db", "mondrian_json.db"])
def test_both_eras_are_migrated_once(name, tmp_path):
    schema = (ROOT / "tests" / "standin" / "schemas" / f"{name}.sql").read_text()
    path = make_db(tmp_path / name, schema)
    assert lora_patch.migrate(path) == list(lora_patch.COLUMNS)
    assert lora_patch.migrate(path) == [] and columns(path)[-4:] == list(lora_patch.COLUMNS)


def test_a_half_migrated_table_is_completed(tmp_path):
    path = make_db(
        tmp_path / "m.db", OLDEST.replace("status TEXT", "status TEXT, model_used TEXT, model_duration REAL")
    )
    assert lora_patch.migrate(path) == ["adapter_version", "model_fallback"]


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
    with pytest.raises(lora_patch.LoraError, match=expected):
        lora_patch.migrate(tmp_path / "m.db")
    with pytest.raises(lora_patch.LoraError, match="no such database"):
        lora_patch.migrate(tmp_path / "none.db")
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
    migrations = [threading.Thread(target=lora_patch.migrate, args=(path,)) for _ in range(4)]
    for thread in writers + migrations:
        thread.start()
    for thread in migrations:
        thread.join()
    stop.set()
    writers[0].join()
    assert not failed and columns(path).count("model_used") == 1 and set(lora_patch.COLUMNS) < set(columns(path))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (3 + len(written),)


def test_kill_in_the_middle_of_a_migration_leaves_a_working_database(tmp_path):
    """A process that migrates is killed at a dozen moments; each time the table is whole and can be migrated."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import service as lora_patch, pathlib, time\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for path in sorted(pathlib.Path(sys.argv[1]).glob('*.db')): lora_patch.migrate(path)"
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
            added = len(set(columns(path)) & set(lora_patch.COLUMNS))
            assert added in (0, 4)  # all or none
            seen.add(added)
            lora_patch.migrate(path)
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                db.execute("UPDATE jobs SET model_used = 'base' WHERE id = 'j0'")
    assert seen == {0, 4}  # some were killed before, some after


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
    service = lora_patch.Service()
    service.open_jobs(path)
    service.record(lora_patch.Job("late", "ansel", "fine_tuned", None, in_test=True, version="v2", done=True))
    assert len(service.pending) == 1
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO jobs (id) VALUES ('late')")
    assert wait_for(lambda: recorded(path, "late") == ("ab_test_fine_tuned", "v2", 0))

    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    service.record(lora_patch.Job("j0", "ansel", "base", None, done=True))
    service.record(lora_patch.Job("j1", "ansel", "base", None, done=True))
    assert time.monotonic() - started < 7  # one wait of five seconds, not one a request
    blocker.execute("COMMIT")
    blocker.close()
    assert wait_for(lambda: recorded(path, "j0") == recorded(path, "j1") == ("base", None, 0))
    assert not service.pending


def test_without_a_database_the_service_runs_and_says_so(tmp_path):
    service = lora_patch.Service()
    service.open_jobs(tmp_path / "none.db")
    service.record(lora_patch.Job("j0", "ansel", "base", None, done=True))
    assert service.recording.startswith("off: ") and "no such database" in service.recording and not service.pending


# -- report ------------------------------------------------------------------------------------------------------------


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
    lora_patch.migrate(path)
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
    assert lora_patch._t_quantile(freedom) == pytest.approx(expected, abs=0.02)


def test_newcombe_s_own_example():
    found = lora_patch._rate_difference((48, 80), (56, 70))  # Newcombe 1998, table II (a): 0.0524 to 0.3339
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.0524, 0.3339)


def test_the_report_as_table_and_page(jobs, tmp_path):
    fill(jobs, "ab_test_base", [5.0, 6.0])
    fill(jobs, "ab_test_fine_tuned", [6.0, 5.0], adapter_version="<b>v2</b>")
    table = report(jobs).stdout
    assert re.split(r"  +", table.splitlines()[0]) == lora_patch.HEADINGS
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

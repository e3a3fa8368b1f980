"""Whatever one row, one file or one writer does, linking goes on, or ends soon and in one line."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from common.data import database as database_module
from common.data.sources import AnalysisFiles, asked_by, find_analysis
from integration.lora_patch.analysis import AnalysisError
from integration.lora_patch.specification import DIMENSIONS7
from tests.data.test_html_analysis import CARDS, card, page
from tests.mondrian_case import SYSTEM_PROMPT, Tree, analysis
from tests.processes import alive
from tests.serving.test_prompts import SIX, example

ROOT = Path(__file__).resolve().parents[2]
WHOLE = page(CARDS)
TEXT = json.dumps(analysis(1))


ROWS = {
    "no_scores": '<div class="feedback-card">',
    "stub": WHOLE[: WHOLE.index('<div class="feedback-card">') + 20],
    "no_scores 2": page(f'<div class="feedback-card"><h3>Overall Grade</h3>{"<p>8/10</p>"}</div>'),
    "no_scores 3": "| Dimension | Comment |\n|---|---|\n| Composition | strong |\n| Lighting | flat |",
    "no_scores 4": {"dimensions": {"Composition": "strong", "Lighting": "flat"}, "image_description": "x"},
    "error_page": "Failed to parse model response",
    "error_page 2": "<html><body><p>Failed to parse model response: Expecting value</p></body></html>",
    "wrong_dimensions": page(card("", 8, "A.", "B.")),
    "too_large": '<div class="feedback-card">' + "<div>" * 4000,
    "reasoning_only": "<think></think>" * 1000,
    "missing_score 2": TEXT.replace('"score": ', '"score": ' + "7" * 4000, 1),
    "invalid_json": TEXT.replace('"score": ', '"score": ' + "7" * 12_000, 1),
    "wrong_dimensions 2": page(card("Composition", "8" * 12_000, "A.", "B.")),
    "no_scores 6": '{"a":1,}' * 32_000,
    "truncated_json": '{"dimensions":' * 18_000,
    "no_scores 5": '{"image":' * 60 + "1" + "}" * 60,
}


def test_no_row_ends_the_run_or_takes_long(tree: Tree):
    tree.link_beside_a_good_job(ROWS)
    assert [row["job_id"] for row in tree.rows("manifest")] == ["good"]


def test_folders_and_photographs_without_permission(tree: Tree, monkeypatch):
    """Permissions do not bind who runs the tests as root, so that the system's answers are made here."""
    tree.good(3)
    tree.link()
    closed: set[Path] = set()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed and allowed(path, mode))

    def opened(path, *args, **kwargs):
        if Path(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr("common.data.photos.open", opened, raising=False)
    closed.add(tree.source / "photo-1.jpg")  # although the cache knows it
    assert tree.link().exit_code == 0 and tree.reasons()["good-1"] == "image_unreadable"
    closed = {tree.source}
    result = tree.link()
    assert result.exit_code == 1 and f"Error: {tree.source}: the folder cannot be read" in result.stderr
    closed = {tree.files}
    assert f"Error: {tree.files}: the folder cannot be read" in tree.link().stderr


def test_rows_in_a_wal_that_cannot_be_read(tree: Tree, monkeypatch):
    tree.good(3)
    tree.connection.execute("PRAGMA journal_mode = wal")
    tree.connection.execute("UPDATE jobs SET status = 'done'")
    tree.connection.commit()
    connect = database_module.Database._open

    def refused(path, how):
        if how == "mode=ro":
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, how)

    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(database_module.Database, "_open", staticmethod(refused))
    monkeypatch.setattr(database_module.shutil, "copyfile", denied)
    result = tree.link()
    assert result.exit_code == 1
    assert "mondrian.db: its newest rows in mondrian.db-wal cannot be read: Permission denied" in result.stderr


WHOLE = json.dumps(analysis(1))
NAMED = ((2, "weston"), (1, "Ansel Adams"), (3, "okeefe"))
WRAPPED = {
    "double_encoded": json.dumps(WHOLE),
    "double_encoded in a frame": f"# Ansel Analysis\n\n## Full Analysis\n```json\n{json.dumps(WHOLE)}\n```",
    "double_encoded twice": json.dumps(json.dumps(WHOLE)),
    "double_encoded without quotes": json.dumps(WHOLE)[1:-1],
    "html_entities": WHOLE.replace('"', "&quot;"),
    "python_literal": str(analysis(1)),
    "wrapped": json.dumps({"analysis": analysis(1)}),
    "wrapped deep": json.dumps({"data": {"result": analysis(1)}}),
    "wrapped in a list": json.dumps({"data": [{"advisor": a, "response": json.dumps(analysis(n))} for n, a in NAMED]}),
    "wrapped in turns": json.dumps({"messages": [{"role": "user"}, {"role": "assistant", "content": WHOLE}]}),
    "other_keys, several at once": json.dumps([{"advisor": a, **analysis(n)} for n, a in NAMED]),
    "wrapped for several": json.dumps({"weston": analysis(2), "ansel": analysis(1)}),
    "comments": "{ // the answer\n" + WHOLE[1:],
    "key_names": WHOLE.replace("overall_score", "overallScore").replace('"name"', '"Title"').replace('"dim', '"Dim'),
    "dimension_names": WHOLE.replace("Focus &", "Focus &amp;"),
    "score_text": re.sub(r'"score": (\d+)', r'"score": "**\1/10**"', WHOLE),
}


PAGE = page("".join(card(name, 7, "It holds.", "Try more.") for name in DIMENSIONS7))


@pytest.mark.parametrize(
    "text", [json.dumps(PAGE), json.dumps({"html": PAGE}), PAGE.replace("<", "&lt;").replace(">", "&gt;")]
)
def test_pages_that_are_wrapped_in_something(text):
    job = {"id": "one", "analysis_markdown": text, "llm_outputs": None, "prompt": ""}
    found = find_analysis(job, "ansel", AnalysisFiles(None), asked_by((SYSTEM_PROMPT,), None))
    assert found.form == "html" and [d["score"] for d in found.analysis["dimensions"]] == [7] * 7


@pytest.mark.parametrize("name", WRAPPED)
def test_answers_that_are_wrapped_in_something(name):
    job = {"id": "one", "analysis_markdown": WRAPPED[name], "llm_outputs": None, "prompt": ""}
    found = find_analysis(job, "ansel", AnalysisFiles(None), asked_by((SYSTEM_PROMPT,), None))
    job = {**job, "analysis_markdown": None, "llm_outputs": WRAPPED[name]}
    assert find_analysis(job, "ansel", AnalysisFiles(None), asked_by((SYSTEM_PROMPT,), None)).analysis == analysis(1)
    assert found.analysis == analysis(1) and name.split()[0].strip(",") in found.mends


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({"weston": analysis(2)}), "wrong_advisor"),
        (json.dumps([{"advisor": a, **analysis(n)} for n, a in NAMED if n != 1]), "wrong_advisor"),
        (json.dumps([{"advisor": a, "response": WHOLE} for n, a in NAMED if n != 1]), "wrong_advisor"),
        (json.dumps({"response": WHOLE[:300]}), "truncated_json"),
        (json.dumps(WHOLE[:300]), "truncated_json"),
        ("{ // the answer\n" + WHOLE[1:].replace('"score":', '"score"='), "invalid_json"),
        (WHOLE.replace('"overall_score": ', '"overall_score": NaN, "x": '), "invalid_json"),
        ("<style>.feedback-card{}</style><p>Error: cannot connect to the model</p>", "error_page"),
        (json.dumps({"html": "<p>Error: cannot connect to the model</p>"}), "error_page"),
        ("{'a': " + "[" * 40_000 + "}", "no_object"),
    ],
)
def test_what_is_wrapped_and_no_answer_has_its_own_reason(text, reason):
    job = {"id": "one", "analysis_markdown": text, "llm_outputs": None, "prompt": ""}
    with pytest.raises(AnalysisError) as error:
        find_analysis(job, "ansel", AnalysisFiles(None), asked_by((SYSTEM_PROMPT,), None))
    assert error.value.reason == reason


HOSTILE = {
    "thoughts": "<think></think>" * 17_000,
    "open thoughts": "<think>" * 36_000,
    "digits": '{"dimensions":[{"name":"Composition","score":' + "7" * 250_000,
    "digits in cards": page(card("Composition", "7" * 200_000, "A.", "B.")),
    "commas": '{"a":1,}' * 32_000,
    "quotes": '{"' * 128_000,
    "escaped": '{\\"a\\": ' * 30_000,
    "angles": "<" * 256_000,
    "tags": '<div class="feedback-card">' + "<h1><div>" * 28_000,
    "turns": "assistant" + " " * 250_000,
    "prompt": "a" * 256_000,
    "braces and quotes": '{"{' * 80_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_reader_is_linear(name):
    prompt = "a" * 100_000 + "b" if name == "prompt" else HOSTILE[name]
    started = time.process_time()
    for column in ("analysis_markdown", "llm_outputs"):
        job = {"id": "one", "analysis_markdown": None, "llm_outputs": None, "prompt": prompt, column: HOSTILE[name]}
        with pytest.raises(AnalysisError) as error:
            find_analysis(job, "ansel", AnalysisFiles(None), asked_by((prompt,), None))
        assert error.value.reason != "unread", error.value.detail
    assert time.process_time() - started < 4


def test_a_fault_of_a_reader_is_the_rows_reason(tree: Tree, monkeypatch):
    def broken(text, advisor, highest):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("common.data.sources.html_to_analysis", broken)
    tree.job("good", "photo.jpg", analysis(1))
    tree.job("bad", "photo.jpg", page(CARDS))
    assert tree.link().exit_code == 0
    (row,) = tree.rows("manifest_rejected")
    assert (row["reason"], row["detail"]) == ("unread", "analysis_markdown: ZeroDivisionError: by zero")


def test_doubled_cards_count_once(tree: Tree):
    cards = "".join(card(name, 5, f"Comment {name}.", "Do it.") for name in SIX)
    tree.job(
        "one", "photo.jpg", page(cards + card(SIX[0], 9, "Again.", "Again.") + card("ColorHarmony", 6, "A.", "B."))
    )
    tree.link()
    (row,) = tree.rows("manifest")
    assert [d["score"] for d in row["analysis"]["dimensions"]] == [5] * 6 + [6]
    assert row["mends"] == ["doubled_cards", "dimension_names"]


def test_photographs_that_are_placeholders_or_programs(tree: Tree):
    Image.new("RGB", (1, 1)).save(tree.source / "pixel.jpg")
    marks = tree.folder / "ghostscript-ran"
    (tree.source / "script.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n"
        + f"({marks}) (w) file closefile showpage\n%%EOF\n".encode()
    )
    for name in ("pixel.jpg", "script.jpg", "photo.jpg"):
        tree.job(name, name, analysis(1))
    assert tree.link().exit_code == 0
    assert tree.reasons() == {"pixel.jpg": "image_tiny", "script.jpg": "image_unreadable"}
    assert not marks.exists()


def test_names_that_no_file_can_have_are_one_line(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    tree.job("long", "x" * 300 + ".jpg", "x" * 300 + ".md")
    assert tree.link().exit_code == 0
    for option in ("--db_path", "--source_dir", "--analysis_dir", "--output_dir"):
        result = tree.link(option, "x" * 5000)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), option
        assert result.stderr.startswith("Error: xxx") and len(result.stderr.splitlines()) == 1
        result = tree.link(option, str(tree.source / "\udcff"))
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), option


def test_names_that_are_no_text_are_passed_over(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    tree.job("inside", "inside.jpg", analysis(1))
    (Path(os.fsdecode(os.fsencode(tree.source) + b"/\xff"))).mkdir()
    photo = (tree.source / "photo.jpg").read_bytes()
    for name in (b"/source/\xff/inside.jpg", b"/source/\xfe.jpg", b"/analysis_md/\xfd.md"):
        Path(os.fsdecode(os.fsencode(tree.folder) + name)).write_bytes(photo)
    result = tree.link()
    assert result.exit_code == 0 and "b'\\xff': the name is no UTF-8 text; skipped" in result.stderr
    assert tree.reasons() == {"inside": "image_missing"}


def test_a_folder_that_cannot_be_read_is_told(tree: Tree, monkeypatch):
    tree.job("one", "photo.jpg", analysis(1))
    tree.job("two", tree.photo("closed/two.jpg", 2), analysis(2))
    scan = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    result = tree.link()
    assert (
        f"{tree.source}/closed: cannot be read (Permission denied); the files in it count as missing" in result.stderr
    )
    assert tree.reasons() == {"two": "image_missing"}


def test_the_order_of_rows_and_equal_times_change_nothing(tmp_path: Path):
    jobs = [(f"job-{i:02}", i) for i in range(8)]
    outputs = []
    for name, order in (("one", jobs), ("other", jobs[::-1])):
        tree = Tree(tmp_path / name)
        for job_id, seed in order:
            tree.job(
                job_id, tree.photo(f"{seed}.jpg", seed), analysis(seed), created_at=f"2026-01-01 00:0{seed // 4}:00"
            )
        tree.job("bad", "0.jpg", "Error: no", created_at="2026-01-01 00:00:00")
        tree.link()
        text = (tree.folder / "out/training_data_manifest.jsonl").read_text()
        outputs.append(text.replace(str(tree.folder), "."))
    assert outputs[0] == outputs[1]


def test_an_endless_view_is_refused(tree: Tree, monkeypatch):
    monkeypatch.setattr(database_module, "_PATIENCE", 0.3)
    tree.connection.executescript(
        "DROP TABLE jobs; CREATE VIEW jobs AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i AS id, 'photo.jpg' AS filename, 'ansel' AS advisor, 'done' AS status FROM n"
    )
    result = tree.link()
    assert result.exit_code == 1
    assert "mondrian.db: jobs is a view that does not end (interrupted); link a table of jobs" in result.stderr


def test_a_view_that_ends_is_read(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    tree.connection.executescript("ALTER TABLE jobs RENAME TO stored; CREATE VIEW jobs AS SELECT * FROM stored")
    assert tree.link().exit_code == 0
    assert [row["job_id"] for row in tree.rows("manifest")] == ["one"]


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_writer_that_locks_readers_out_is_waited_for_and_told(tree: Tree, monkeypatch, mode):
    monkeypatch.setattr(database_module, "_PATIENCE", 0.5)
    tree.connection.execute(f"PRAGMA journal_mode={mode}")
    tree.connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    tree.job("one", "photo.jpg", analysis(1))
    started = time.monotonic()
    result = tree.link()
    assert time.monotonic() - started < 30
    assert result.exit_code == 1
    waiting, error = result.stderr.strip().splitlines()
    assert waiting == f"{tree.folder}/mondrian.db: locked by its writer; waiting up to 0.5 seconds"
    assert error.startswith(f"Error: {tree.folder}/mondrian.db: its writer locks readers out; stop the service")


def test_a_schema_that_is_no_text_is_refused(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    tree.connection.close()
    path = tree.folder / "mondrian.db"
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE config", b"CREATE TA\xc8LE config"))
    result = tree.link()
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {path}: cannot be read (") and len(result.stderr.splitlines()) == 1


def test_workers_end_with_a_killed_run():
    code = (
        "import os, time\n"
        "from common.data.photos import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(2) as pool:\n"
        "        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)\n"
        "        time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    workers = [int(word) for word in run.stdout.readline().split()]
    assert workers and all(map(alive, workers))
    run.send_signal(signal.SIGKILL)
    run.wait()
    ends = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(map(alive, workers))


# ------------------------------------------------------------------------------------------------ what prompts ask for


def answer(names: tuple[str, ...], seed: int = 1, **more) -> dict:
    whole = analysis(seed, **more)
    by_name = {d["name"]: d for d in whole["dimensions"]}
    kept = [
        by_name.get(name, {"name": name, "score": 6, "comment": f"{name}.", "recommendation": "Do."}) for name in names
    ]
    return {**whole, "dimensions": kept}


def test_jobs_of_six_dimensions_whose_example_shows_one(tmp_path: Path):
    listed = "Analyze along 6 dimensions:\n" + "\n".join(f"{i}. **{name}** - see" for i, name in enumerate(SIX, 1))
    tree = Tree(tmp_path, system_prompt=f"{listed}\n{example(SIX[:1])}")
    tree.photo("photo.jpg", 1)
    tree.job("one", "photo.jpg", answer(SIX))
    tree.job("cut", "photo.jpg", answer(SIX[:3]))
    assert tree.link().exit_code == 0
    assert [len(row["analysis"]["dimensions"]) for row in tree.rows("manifest")] == [6]
    assert tree.reasons() == {"cut": "wrong_dimensions"}


def test_a_prompt_that_does_not_tell_asks_for_dimensions(tmp_path: Path):
    tree = Tree(tmp_path, system_prompt="Judge." + example(SIX[:1]))
    tree.photo("photo.jpg", 1)
    tree.job("one", "photo.jpg", answer(SIX))
    tree.job("seven", "photo.jpg", analysis(2))
    result = tree.link()
    assert tree.reasons() == {"one": "unknown_dimensions"}
    option = ",".join(SIX)
    assert f'If that is what their prompt asks for, link with --dimensions "{option}"' in result.stderr
    assert tree.link("--dimensions", option).exit_code == 0
    assert len(tree.rows("manifest")) == 2
    result = tree.link("--dimensions", "6")
    assert result.exit_code == 1 and result.stderr.startswith(
        'Error: --dimensions 6: write "7", "8", or different names'
    )


def test_keys_that_the_prompt_asks_for_stay_and_others_are_told(tmp_path: Path):
    prompt = example(SIX, 7.0, case_studies=["IMG_1"]).replace('"score"', '"quote_id": "Q", "score"')
    tree = Tree(tmp_path, system_prompt=prompt)
    given = answer(SIX, case_studies=["IMG_2"], mood="calm")
    given["dimensions"] = [{**d, "quote_id": "QUOTE_1", "aside": "x"} for d in given["dimensions"]]
    tree.job("one", tree.photo("photo.jpg", 1), given)
    tree.link()
    (row,) = tree.rows("manifest")
    assert row["analysis"]["case_studies"] == ["IMG_2"] and "mood" not in row["analysis"]
    assert {tuple(d) for d in row["analysis"]["dimensions"]} == {
        ("name", "score", "comment", "recommendation", "quote_id")
    }
    assert row["mends"] == ["other_keys"] and row["prompt_scores"] == [7.0] * 6


# ------------------------------------------------------------------------------------------------ --why


def test_why_shows_a_rows_texts_and_every_verdict(tree: Tree):
    tree.good(12)
    tree.job("bad-1", "nowhere.jpg", "Failed to parse model response\x1b[31m", prompt=SYSTEM_PROMPT)
    assert tree.link().exit_code == 0
    before = {path.name: path.read_bytes() for path in (tree.folder / "out").iterdir()}
    shown = tree.link("--why", "bad").output
    for text in (
        "Job bad-1 in",
        "filename: nowhere.jpg",
        "held against: Composition, Lighting",
        "-- raw text\nFailed to parse model response\\x1b[31m",
        "-- not usable: error_page, an error message of the service",
        "Left out: error_page",
        "Left out: image_missing",
    ):
        assert text in shown
    assert tree.prepare().exit_code == 0
    shown = tree.link("--why", "GOOD-3").output
    assert "-- read from analysis_markdown as json, mends: none" in shown
    assert '"image_description":"A ridge, number 3' in shown
    assert "Linked, with the photograph" in shown
    assert "Prepared (training_data_ansel_verdicts.jsonl): an example of" in shown
    assert {n: d for n, d in before.items() if n != ".photo_cache.db"}.items() <= {
        path.name: path.read_bytes() for path in (tree.folder / "out").iterdir()
    }.items()
    result = tree.link("--why", "nobody")
    assert result.exit_code == 1 and "no job whose id begins with 'nobody'" in result.stderr
    tree.connection.close()
    with sqlite3.connect(tree.folder / "mondrian.db") as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (13,)

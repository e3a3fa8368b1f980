"""Linking: every job is found or has its reason, from every place an analysis hides in, and nothing is written to."""

import hashlib
import json
import os
import sqlite3
import struct
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

import link_training_data
from common.data.database import open_database
from common.data.photos import Locator
from integration.lora_patch.specification import DIMENSIONS8
from tests.data.test_html_analysis import CARDS, card, page
from tests.mondrian_case import HTML_PROMPT, SYSTEM_PROMPT, Tree, analysis

UUID = "0361b22a-2f22-49af-991e-c26852ea600b"


def test_columns_and_advisors_in_other_letters(tmp_path: Path):
    tree = Tree(tmp_path)
    tree.good(6)
    for column in ("id", "filename", "advisor", "status", "analysis_markdown"):
        tree.connection.execute(f"ALTER TABLE jobs RENAME COLUMN {column} TO {column.upper()}")
    tree.connection.execute("UPDATE jobs SET advisor = 'Ansel'")
    tree.connection.commit()
    assert tree.link().exit_code == 0 and len(tree.rows("manifest")) == 6
    assert tree.prepare().exit_code == 0


def test_statuses_that_are_not_asked_for_are_named(tmp_path: Path):
    tree = Tree(tmp_path)
    tree.good(3)
    tree.connection.execute("UPDATE jobs SET status = 'success'")
    tree.connection.commit()
    result = tree.link()
    assert result.exit_code == 1 and "did not end well (see --status): success 3" in " ".join(result.output.split())
    assert tree.link("--status", "success").exit_code == 0


def test_a_manifest_row_is_whole(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1), completed_at="2026-01-02T10:00:00", mode="baseline", prompt=SYSTEM_PROMPT)
    result = tree.link()
    assert result.exit_code == 0, result.output
    (row,) = tree.rows("manifest")
    data = (tree.source / "photo.jpg").read_bytes()
    assert {**row, "image_thumb": None, "image_phash": None} == {
        "job_id": "one",
        "advisor": "ansel",
        "image_path": str(tree.source / "photo.jpg"),
        "image_exists": True,
        "image_size": len(data),
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "image_width": 160,
        "image_height": 120,
        "image_orientation": 1,
        "image_phash": None,
        "image_thumb": None,
        "analysis_path": None,
        "analysis_source": "analysis_markdown",
        "analysis_format": "json",
        "analysis": analysis(1),
        "overall_score": analysis(1)["overall_score"],
        "mends": [],
        "prompt_scores": [8, 7, 9, 6, 7, 8, 7],
        "prompt_overall": 7.4,
        "prompt_range": [1, 10],
        "status": "completed",
        "mode": "baseline",
        "created_at": "2026-01-01 00:01:00",
        "completed_at": "2026-01-02T10:00:00",
        "filename": "photo.jpg",
        "database": str(tree.folder / "mondrian.db"),
    }
    assert "1 job = 1 linked + 0 left out" in result.output


TEXT = json.dumps(analysis(1))
SOURCES = {
    "bare": ({"analysis_markdown": TEXT}, "analysis_markdown", []),
    "fenced": ({"analysis_markdown": f"```json\n{TEXT}\n```"}, "analysis_markdown", []),
    "heading": (
        {"analysis_markdown": f"# Ansel\n\n## Summary\nx\n\n## Full Analysis\n{TEXT}"},
        "analysis_markdown",
        [],
    ),
    "prose": ({"analysis_markdown": f"Here it is: {TEXT} Good luck!"}, "analysis_markdown", ["text_around"]),
    "thought": ({"analysis_markdown": f"<think>Hm {{}}</think>\n{TEXT}"}, "analysis_markdown", ["text_around"]),
    "echo": ({"analysis_markdown": f"user\n{SYSTEM_PROMPT}\nassistant\n{TEXT}"}, "analysis_markdown", ["text_around"]),
    "echo of its prompt": (
        {"analysis_markdown": SYSTEM_PROMPT + TEXT, "prompt": SYSTEM_PROMPT},
        "analysis_markdown",
        ["text_around"],
    ),
    "comma": ({"analysis_markdown": TEXT.replace("}]", "},]")}, "analysis_markdown", ["trailing_comma"]),
    "names": (
        {"analysis_markdown": TEXT.replace("Color Harmony", "ColorHarmony")},
        "analysis_markdown",
        ["dimension_names"],
    ),
    "blob": ({"analysis_markdown": TEXT.encode()}, "analysis_markdown", []),
    "nul": ({"analysis_markdown": f"\0{TEXT}"}, "analysis_markdown", ["nul_characters"]),
    "by advisor": ({"llm_outputs": json.dumps({"ansel": TEXT, "weston": "{}"})}, "llm_outputs", []),
    "object by advisor": ({"llm_outputs": json.dumps({"ansel": analysis(1)})}, "llm_outputs", []),
    "response": ({"llm_outputs": json.dumps({"prompt": SYSTEM_PROMPT, "response": TEXT})}, "llm_outputs", []),
    "error page, then response": (
        {"analysis_markdown": "<p>Error: no service</p>", "llm_outputs": json.dumps({"response": TEXT})},
        "llm_outputs",
        [],
    ),
    "too large, then response": (
        {"analysis_markdown": "x" * 10_000_000, "llm_outputs": json.dumps({"response": TEXT})},
        "llm_outputs",
        [],
    ),
    "stored": ({"analysis_markdown": "/Users/x/mondrian/stored.md"}, "stored_path", []),
    "analysis_file": ({"analysis_file": "C:\\mondrian\\stored.md", "analysis_markdown": ""}, "stored_path", []),
}


@pytest.mark.parametrize("name", SOURCES)
def test_places_an_analysis_hides_in(tree: Tree, name: str):
    columns, source, mends = SOURCES[name]
    (tree.files / "stored.md").write_text(f"```json\n{TEXT}\n```\n")
    tree.job("one", "photo.jpg", **{"markdown": columns.get("analysis_markdown"), **_others(columns)})
    assert tree.link().exit_code == 0
    (row,) = tree.rows("manifest")
    assert (row["analysis"], row["analysis_source"], row["mends"]) == (analysis(1), source, mends)


def _others(columns: dict) -> dict:
    return {name: value for name, value in columns.items() if name != "analysis_markdown"}


def test_the_file_of_its_name_comes_first(tree: Tree):
    path = tree.files / "sub" / "analysis-ansel-one.md"
    path.parent.mkdir()
    path.write_text(json.dumps(analysis(2)))
    (tree.files / "analysis-ansel-nobody.md").write_text(TEXT)
    tree.job("one", "photo.jpg", TEXT)
    result = tree.link()
    (row,) = tree.rows("manifest")
    assert (row["analysis_source"], row["analysis_path"], row["analysis"]) == ("analysis_file", str(path), analysis(2))
    assert "1 analysis file without a job, e.g. analysis-ansel-nobody.md" in result.output


def test_html_of_the_older_era(tmp_path: Path):
    tree = Tree(tmp_path, system_prompt=HTML_PROMPT)
    cards = "".join(card(name, 2 + i, f"Comment {i} & more.", f"Do {i}.") for i, name in enumerate(DIMENSIONS8))
    tree.job("one", tree.photo("a.jpg", 1), page(cards), status="done")
    assert tree.link().exit_code == 0
    (row,) = tree.rows("manifest")
    assert row["analysis_format"] == "html" and row["overall_score"] == 8.1
    assert row["analysis"]["dimensions"] == [
        {"name": name, "score": 2 + i, "comment": f"Comment {i} & more.", "recommendation": f"Do {i}."}
        for i, name in enumerate(DIMENSIONS8)
    ]


SIX = {**analysis(1), "dimensions": analysis(1)["dimensions"][:6]}
OTHER = json.dumps({"tonal_range": "wide", "composition": "good", "emotion": "calm"})
REASONS = {
    "error_page": "<h2>Analysis Results</h2><p>Error: Cannot connect to AI service</p>",
    "error_page 2": "<html><body><h1>502 Bad Gateway</h1></body></html>",
    "error_page 3": '{"error": "CUDA out of memory"}',
    "stub": "Unable to parse response",
    "reasoning_only": "<thought>The user wants",
    "reasoning_only 2": f"<thought>{TEXT}</thought>",
    "prompt_echo": SYSTEM_PROMPT,
    "prompt_echo 2": f"user\n{SYSTEM_PROMPT}\nassistant\n",
    "truncated_json": TEXT[:700],
    "truncated_json 2": "```json\n" + TEXT[:700],
    "invalid_json": TEXT.replace('"score":', '"score"', 1),
    "invalid_json 2": TEXT.replace('"overall_score": ', '"overall_score": NaN, "x": '),
    "misspelt_json": '{"image_description": "", "dimsions": [{"name": "Compositon", "scroe": null}]}',
    "misspelt_json 2": '{"image_description":"A","composition":{"score":8,"comment":""},"technica notes"}',
    "no_scores": OTHER,
    "no_scores 2": f"user\nAs an expert, analyze.\nassistant\n{OTHER}",
    "wrong_dimensions": SIX,
    "wrong_dimensions 2": {**analysis(1), "dimensions": analysis(1)["dimensions"] + analysis(1)["dimensions"][:1]},
    "missing_score": {**analysis(1), "dimensions": [{"name": d["name"]} for d in analysis(1)["dimensions"]]},
    "score_out_of_range": TEXT.replace('"score": ', '"score": 7', 1),
    "score_out_of_range 2": TEXT.replace('"score": ', '"score": -', 1),
    "not_text": b"\xff\xfe{}",
    "not_text 2": TEXT.replace("ridge", "ri\\ud800dge"),
    "too_large": "x" * 10_000_000,
    "wrong_advisor": page(CARDS, advisor="weston"),
    "missing_analysis_file": "/Users/x/analysis/nowhere.html",
    "no_object": "A long text. " * 60,
    "no_analysis": None,
    "no_analysis 2": " \n ",
}


def test_every_other_job_has_its_reason(tree: Tree):
    output = tree.link_beside_a_good_job(REASONS)
    report = json.loads((tree.folder / "out/training_data_manifest_report.json").read_text())
    assert report["jobs"] == report["linked"] + sum(reason["jobs"] for reason in report["reasons"].values())
    assert max(map(len, output.splitlines())) <= 100 + len(str(tree.folder))


def test_a_job_counts_once_and_shows_all_its_faults(tree: Tree):
    tree.job("good", "photo.jpg", analysis(1))
    tree.job("both", "nowhere.jpg", "Error: timeout")
    result = tree.link()
    (row,) = tree.rows("manifest_rejected")
    assert (row["reason"], row["also"]) == ("error_page", ["image_missing"])
    lines = [line.split()[:3] for line in result.output.splitlines()]
    assert ["error_page", "1", "1"] in lines and ["image_missing", "0", "1"] in lines


def test_filenames(tree: Tree):
    tree.photo("uploads/deep/a.jpg", 2)
    tree.photo("b.jpg", 3)
    tree.photo("x/same.jpg", 4)
    tree.photo("y/same.jpg", 5)
    tree.photo("x/twin.jpg", 6)
    tree.photo("y/twin.jpg", 6)
    found = {
        "bare": ("a.jpg", "uploads/deep/a.jpg"),
        "relative": ("uploads/deep/a.jpg", "uploads/deep/a.jpg"),
        "elsewhere": ("/Users/somebody/mondrian/source/uploads/a.jpg", "uploads/deep/a.jpg"),
        "windows": ("C:\\mondrian\\uploads\\a.jpg", "uploads/deep/a.jpg"),
        "prefixed": (f"uploads/{UUID}_b.jpg", "b.jpg"),
        "case": ("B.JPG", "b.jpg"),
        "inside": ("uploads/../b.jpg", "b.jpg"),
        "folder tells": ("old/y/same.jpg", "y/same.jpg"),
        "twins": ("twin.jpg", "x/twin.jpg"),
        "blob": (b"b.jpg", "b.jpg"),
        "url": ("file:///Users/x/source/%62.jpg", "b.jpg"),
    }
    lost = {
        "missing": ("c.jpg", "image_missing"),
        "up": ("../../etc/passwd", "image_outside"),
        "up in a url": ("..%2f..%2fetc%2fpasswd", "image_outside"),
        "up and absolute": ("/var/../../etc/passwd", "image_outside"),
        "ambiguous": ("same.jpg", "image_ambiguous"),
        "none": (None, "no_filename"),
        "empty": ("  ", "no_filename"),
        "nul": ("b.jpg\0.txt", "bad_filename"),
        "damaged": (b"\xff.jpg", "bad_filename"),
        "long": ("a" * 10_000_000, "bad_filename"),
        "number": (5, "image_missing"),
        "folder": ("uploads", "image_missing"),
    }
    for name, (filename, _) in {**found, **lost}.items():
        tree.job(name, filename, analysis(1))
    assert tree.link().exit_code == 0
    linked = {row["job_id"]: os.path.relpath(row["image_path"], tree.source) for row in tree.rows("manifest")}
    assert linked == {name: path for name, (_, path) in found.items()}
    assert tree.reasons() == {name: reason for name, (_, reason) in lost.items()}


def test_links_out_of_the_folder_are_refused(tree: Tree, tmp_path: Path):
    (tmp_path / "secret.jpg").write_bytes((tree.source / "photo.jpg").read_bytes())
    os.symlink(tmp_path / "secret.jpg", tree.source / "leaving.jpg")
    os.symlink(tmp_path, tree.source / "leaving")
    os.symlink(tree.source / "photo.jpg", tree.source / "staying.jpg")
    os.symlink("nowhere.jpg", tree.source / "dangling.jpg")
    for name in ("leaving.jpg", "leaving/secret.jpg", "staying.jpg", "dangling.jpg"):
        tree.job(name, name, analysis(1))
    tree.link()
    assert [row["job_id"] for row in tree.rows("manifest")] == ["staying.jpg"]
    assert tree.reasons() == {
        "leaving.jpg": "image_outside",
        "leaving/secret.jpg": "image_outside",
        "dangling.jpg": "image_missing",
    }
    assert not any("secret" in path for path in Locator(tree.source).names())


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in a few hundred KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_files_that_are_no_photographs(tree: Tree):
    photo = (tree.source / "photo.jpg").read_bytes()
    files = {
        "page.jpg": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "empty.jpg": b"",
        "cut.jpg": photo[: len(photo) // 2],
        "text.jpg": b"no picture",
        "bomb.png": bomb(20_000),
        "smaller-bomb.png": bomb(11_000),
    }
    for name, data in files.items():
        (tree.source / name).write_bytes(data)
        tree.job(name, name, analysis(1))
    os.mkfifo(tree.source / "pipe.jpg")
    tree.job("pipe.jpg", "pipe.jpg", analysis(1))
    tree.job("good", "photo.jpg", analysis(1))
    for _ in range(2):  # the second time from the cache
        tree.link()
        assert tree.reasons() == {
            "page.jpg": "image_unreadable",
            "empty.jpg": "image_unreadable",
            "cut.jpg": "image_unreadable",
            "text.jpg": "image_unreadable",
            "bomb.png": "image_bomb",
            "smaller-bomb.png": "image_bomb",
            "pipe.jpg": "image_missing",
        }
    details = {row["job_id"]: row["detail"] for row in tree.rows("manifest_rejected")}
    assert details["page.jpg"].endswith("a web page, not a photograph")


def test_statuses_modes_and_advisors(tree: Tree):
    rows = {
        "done": {"status": " Done "},
        "queued": {"status": "queued"},
        "lora": {"mode": "lora"},
        "mixed": {"mode": "rag+LoRA"},
        "model": {"model": "models/qwen3-vl-4b-lora-ansel"},
        "rag": {"mode": "rag"},
        "null": {"mode": None},
        "weston": {"advisor": "weston"},
        "several": {"advisor": "weston, Ansel"},
        "nobody": {"advisor": None},
    }
    for name, columns in rows.items():
        tree.job(name, "photo.jpg", analysis(1), **columns)

    def linked(*options: str) -> set[str]:
        assert tree.link(*options).exit_code == 0
        return {row["job_id"] for row in tree.rows("manifest")}

    assert linked() == {"done", "rag", "null", "several"}
    assert tree.reasons() == {
        "queued": "status",
        "lora": "mode",
        "mixed": "mode",
        "model": "mode",
        "weston": "other_advisor",
        "nobody": "other_advisor",
    }
    assert linked("--mode", "rag") == {"rag"}
    assert linked("--mode", "baseline") == {"done", "null", "several"}
    assert linked("--mode", "lora") == {"lora"}
    assert linked("--mode", "all", "--status", "queued") == {"queued"}
    assert linked("--mode", "all") == {"done", "lora", "mixed", "model", "rag", "null", "several"}
    assert linked("--advisor", "WESTON") == {"weston", "several"}


def test_columns_that_a_version_lacks(tree: Tree):
    for column in ("mode", "model", "llm_outputs", "prompt", "completed_at", "analysis_file"):
        tree.connection.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
    tree.job("one", "photo.jpg", analysis(1))
    assert tree.link("--mode", "rag").exit_code == 0  # no column, nothing to filter by
    assert tree.rows("manifest")[0]["prompt_scores"] == [8, 7, 9, 6, 7, 8, 7]  # from the system prompt


def test_rows_of_nothing(tree: Tree):
    tree.connection.execute("INSERT INTO jobs DEFAULT VALUES")
    tree.connection.execute("INSERT INTO jobs (id, advisor, status) VALUES (x'ff', 'ansel', 'done')")
    tree.connection.execute(
        "INSERT INTO jobs (advisor, filename, status, analysis_markdown) VALUES ('ansel', 5, 6, 7.5)"
    )
    tree.job(None, "photo.jpg", analysis(1))
    assert tree.link().exit_code == 0
    assert [row["job_id"] for row in tree.rows("manifest")] == ["rowid:4"]
    assert tree.reasons() == {"rowid:1": "other_advisor", "rowid:2": "no_analysis", "rowid:3": "status"}


def test_two_databases_of_one_installation(tree: Tree):
    tree.job("old", "photo.jpg", analysis(1), created_at="2025-12-20 18:17:31")
    tree.job("twice", "photo.jpg", analysis(1), created_at="2025-12-20 18:17:31")
    newer = Tree(tree.folder, "mondrian_json.db")
    newer.job("twice", "photo.jpg", analysis(2), created_at="2026-01-15T16:21:01.051326")
    result = tree.link()
    rows = {row["job_id"]: row for row in tree.rows("manifest")}
    assert rows["twice"]["analysis"] == analysis(2) and rows["old"]["analysis"] == analysis(1)
    assert tree.reasons() == {"twice": "duplicate_job"}
    assert "3 jobs = 2 linked + 1 left out" in result.output


def test_the_writer_is_not_blocked_and_its_rows_are_seen(tree: Tree):
    tree.connection.execute("PRAGMA journal_mode=WAL")
    tree.job("in the wal", "photo.jpg", analysis(1))
    with open_database(tree.folder / "mondrian.db") as database:
        jobs = database.jobs(("id",))
        assert next(jobs)["id"] == "in the wal"
        tree.connection.execute("PRAGMA busy_timeout = 0")
        tree.job("later", "photo.jpg", analysis(1))
        assert list(jobs) == []  # one snapshot
    assert tree.link().exit_code == 0
    assert len(tree.rows("manifest")) == 2


def test_a_resting_database_is_left_as_it_is(tree: Tree):
    tree.connection.execute("PRAGMA journal_mode=WAL")
    tree.job("one", "photo.jpg", analysis(1))
    tree.connection.close()
    before = {path.name: path.read_bytes() for path in tree.folder.iterdir() if path.is_file()}
    assert tree.link().exit_code == 0
    assert {path.name: path.read_bytes() for path in tree.folder.iterdir() if path.is_file()} == before


def test_the_same_input_gives_the_same_bytes(tree: Tree):
    tree.good(12)
    tree.job("bad", "photo.jpg", "Error: no")
    outputs = []
    for options in ((), ("--workers", "2"), ()):
        tree.link(*options)
        out = tree.folder / "out"
        outputs.append({path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")})
    assert outputs[0] == outputs[1] == outputs[2]
    (tree.folder / "out/.photo_cache.db").write_bytes(b"damaged")
    tree.link()
    assert (tree.folder / "out/training_data_manifest.jsonl").read_bytes() == outputs[0]["training_data_manifest.jsonl"]


def test_a_changed_photograph_is_looked_at_again(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    tree.link()
    before = tree.rows("manifest")[0]
    tree.photo("photo.jpg", 99)
    tree.link()
    assert tree.rows("manifest")[0]["image_sha256"] != before["image_sha256"]


def _database(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.db", None, "no such database; name it with --db_path"),
        ("text.db", b"hello", "not an SQLite database; name Mondrian's mondrian.db"),
        ("other.db", ["CREATE TABLE x (y)"], "no table jobs in it; name Mondrian's database with --db_path"),
        (
            "columns.db",
            ["CREATE TABLE jobs (id, filename)"],
            "table jobs lacks the column(s) advisor, status; is it Mondrian's?",
        ),
        ("empty.db", ["CREATE TABLE jobs (id, filename, advisor, status)"], "no jobs in it; name another database"),
    ],
)
def test_databases_that_are_none(tree: Tree, name: str, content, message: str):
    path = tree.folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        _database(path, *content)
    result = tree.link("--db_path", str(path)) if content is not None else None
    arguments = ["--db_path", str(path), "--advisor", "ansel", "--output_dir", str(tree.folder / "out")]
    result = CliRunner().invoke(link_training_data.main, arguments)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"Error: {path}: {message}")
    assert not list((tree.folder / "out").glob("*manifest*"))


def test_an_advisor_without_jobs(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    result = tree.link("--advisor", "okeefe")
    assert result.exit_code == 1
    assert result.stderr == "Error: advisor 'okeefe' has no jobs; those with jobs: ansel (1)\n"


def test_no_usable_job_leaves_the_old_manifest(tree: Tree):
    tree.job("one", "photo.jpg", analysis(1))
    tree.link()
    before = {path.name: path.read_bytes() for path in (tree.folder / "out").iterdir()}
    result = tree.link("--status", "failed")
    assert result.exit_code == 1
    assert "Error: none of 1 jobs can be used" in result.stderr
    assert {path.name: path.read_bytes() for path in (tree.folder / "out").iterdir()} == before

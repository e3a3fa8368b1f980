"""The pipeline on a real Mondrian tree, held against counts and texts that are found here by other means.

    make acceptance MONDRIAN=../shared/mondrian

Reads the tree that MONDRIAN names (its *.db, source/, analysis_md/) and writes to a temporary folder. Every figure is
derived from the tree in front of it by plain SQL and regular expressions, so other trees of the family can be named.
"""

import hashlib
import html
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from integration.lora_patch.prompts import build_prompt
from integration.lora_patch.specification import PromptSpecification

ROOT = Path(__file__).resolve().parents[2]
TREE = Path(os.environ["MONDRIAN"]).resolve()
HELD_BACK = ("lora", "fine_tuned")
OLDER_ERA_LACKS = ("key_strengths", "priority_improvements", "technical_notes")


def run(script: str, *arguments: object, ok: bool = True) -> str:
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def databases() -> list[sqlite3.Connection]:
    found = [sqlite3.connect(f"file:{path}?immutable=1", uri=True) for path in sorted(TREE.glob("*.db"))]
    assert found, f"no database in {TREE}"
    for connection in found:
        connection.row_factory = sqlite3.Row
    return found


def words(text: str) -> str:
    """Return a text as its words alone: tags, entities, quotes and white space do not count."""
    return " ".join(re.findall(r"\w+", html.unescape(re.sub(r"<[^>]*>", " ", text))))


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """Return (manifest rows, rejected rows, output folder) of all advisors."""
    folder = tmp_path_factory.mktemp("linked")
    run("link_training_data.py", "--advisor", "all", "--db_path", TREE, "--output_dir", folder)
    return rows(folder / "training_data_manifest.jsonl"), rows(folder / "training_data_manifest_rejected.jsonl"), folder


def test_every_job_is_in_one_of_the_two_places(linked):
    manifest, rejected, _ = linked
    jobs = Counter(row["id"] for database in databases() for row in database.execute("SELECT id FROM jobs"))
    assert Counter(row["job_id"] for row in manifest + rejected) == jobs


def test_every_usable_job_is_found(linked):
    """Usable: ended well, its photograph is there, and all its dimensions have a score and a text."""
    files = {path.name for path in (TREE / "source").rglob("*") if path.is_file()}
    expected = set()
    for database in databases():
        for job in database.execute("SELECT * FROM jobs WHERE status IN ('done', 'completed')"):
            name = os.path.basename(job["filename"] or "")
            here = name in files or re.sub(r"^[0-9a-f-]{36}_", "", name) in files
            mode = job["mode"] if "mode" in job.keys() else None  # noqa: SIM118 (sqlite3.Row)
            text = job["analysis_markdown"] or ""
            scores = re.findall(r'dimension-score">\(?\s*\d+\s*/\s*10|"score":\s*\d+', text)
            if here and mode not in HELD_BACK and len(scores) >= 7:
                expected.add(job["id"])
    assert {row["job_id"] for row in linked[0]} == expected


def test_converted_html_keeps_every_score_and_text(linked):
    jobs = {row["id"]: row for database in databases() for row in database.execute("SELECT * FROM jobs")}
    seen = 0
    for row in linked[0]:
        if row["analysis_format"] != "html":
            continue
        source = jobs[row["job_id"]]["analysis_markdown"]
        dimensions = row["analysis"]["dimensions"]
        scores = [int(score) for score in re.findall(r'dimension-score">\(?\s*(\d+)\s*/', source)]
        comments = re.findall(r'<p class="feedback-comment">(.*?)</p>', source, re.S)
        advice = re.findall(r"<strong>Recommendation:</strong>(.*?)</div>", source, re.S)
        assert [d["score"] for d in dimensions] == scores
        kept = words(json.dumps(row["analysis"], ensure_ascii=False))
        for text in comments + advice:
            assert words(text) in kept, (row["job_id"], text)
        overall = re.search(r"overall-grade[^\d]*([\d.]+)\s*/\s*10", source)
        assert row["analysis"]["overall_score"] == float(overall[1])
        seen += 1
    assert seen == sum(row["analysis_format"] == "html" for row in linked[0]) > 0


def test_the_prompt_is_the_services_byte_for_byte():
    """Jobs keep the prompt they were asked with: those made under today's texts must equal ours."""
    equal = 0
    for database in databases():
        system = database.execute("SELECT value FROM config WHERE key = 'system_prompt'").fetchone()[0]
        advisors = {row["id"]: row["prompt"] or "" for row in database.execute("SELECT id, prompt FROM advisors")}
        for job in database.execute(
            "SELECT advisor, prompt FROM jobs WHERE prompt LIKE '%Analyze the provided image.'"
        ):
            equal += job["prompt"] == build_prompt(system, job["advisor"], advisors[job["advisor"]])
    assert equal >= 10


def test_no_photograph_is_on_both_sides(linked):
    folder = linked[2]
    for advisor in sorted({row["advisor"] for row in linked[0]}):
        options = ("--advisor", advisor, "--manifest", folder / "training_data_manifest.jsonl", "--keep", "all")
        options += ("--accept_copied_scores",)
        run("prepare_training_data.py", *options, "--output_dir", folder, ok=False)
        sides = [folder / f"training_data_{advisor}_{side}.jsonl" for side in ("train", "val")]
        if not sides[0].exists():  # a single photograph cannot be split, which the script must refuse
            photos = {row["image_sha256"] for row in linked[0] if row["advisor"] == advisor}
            assert len(photos) == 1 and not sides[1].exists()
            continue
        train, val = ({digest(row["image_path"]) for row in rows(side)} for side in sides)
        assert train and val and not train & val


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_prepared_responses_are_what_their_prompt_demands(linked):
    """But for keys that the analysis never had (the HTML of the older era has neither strengths nor notes)."""
    folder, seen = linked[2], 0
    for meta in sorted(folder.glob("training_data_*_meta.json")):
        specification = PromptSpecification.from_dict(json.loads(meta.read_text(encoding="utf-8"))["specification"])
        for side in ("train", "val"):
            for row in rows(meta.with_name(meta.name.replace("_meta.json", f"_{side}.jsonl"))):
                problems = set(specification.check(row["response"]))
                lacking = {key for key in OLDER_ERA_LACKS if f'"{key}":' not in row["response"]}
                assert problems == {f"{key} is missing" for key in lacking}, row["job_id"]
                seen += 1
    assert seen

"""A small Mondrian tree built row by row, for tests that need to know each job."""

import json
import sqlite3
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

import link_training_data
import prepare_training_data
from integration.lora_patch.specification import DIMENSIONS7

COLUMNS = (
    "id TEXT PRIMARY KEY, filename, advisor, status, analysis_file, analysis_markdown, llm_outputs, created_at, "
    "completed_at, prompt, mode, model"
)
SYSTEM_PROMPT = (
    'Answer with JSON: {"image_description":"What is seen","dimensions":['
    + ",".join(
        f'{{"name":"{name}","score":{score},"comment":"What works","recommendation":"What to do"}}'
        for name, score in zip(DIMENSIONS7, (8, 7, 9, 6, 7, 8, 7), strict=True)
    )
    + '],"overall_score":7.4}'
)
HTML_PROMPT = (
    'You MUST output clean, valid HTML. <div class="feedback-card"><h3>Composition <span>(8/10)</span></h3></div>'
)


def picture(seed: int) -> Image.Image:
    """A soft random picture; another seed, another picture."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((160, 120), Image.Resampling.BICUBIC)


def analysis(seed: int, **changes) -> dict:
    """A whole analysis of seven dimensions; another seed, other scores and texts."""
    scores = [2 + (seed * 3 + i * (seed % 4 + 1)) % 8 for i in range(7)]
    dimensions = [
        {
            "name": name,
            "score": score,
            "comment": f"In picture {seed} the {name.lower()} holds the eye for a while.",
            "recommendation": f"Move a little to the left of stone {seed} for its {name.lower()}.",
        }
        for name, score in zip(DIMENSIONS7, scores, strict=True)
    ]
    whole = {
        "image_description": f"A ridge, number {seed}, in the light of a late afternoon.",
        "dimensions": dimensions,
        "overall_score": round(sum(scores) / 7 + 1e-9, 1),
        "key_strengths": [f"The light on ridge {seed} is well seen."],
        "priority_improvements": [f"The frame of ridge {seed} is too tight."],
        "technical_notes": f"A long lens, frame {seed}.",
    }
    return {**whole, **changes}


class Tree:
    """mondrian.db, source/ and analysis_md/ in a folder; rows are added until `commit`."""

    def __init__(self, folder: Path, name: str = "mondrian.db", system_prompt: str | None = SYSTEM_PROMPT):
        self.folder, self.source, self.files = folder, folder / "source", folder / "analysis_md"
        self.source.mkdir(parents=True, exist_ok=True)
        self.files.mkdir(exist_ok=True)
        self.connection = sqlite3.connect(folder / name)
        self.connection.executescript(
            f"CREATE TABLE jobs ({COLUMNS}); CREATE TABLE config (key, value); CREATE TABLE advisors (id, name, prompt)"
        )
        if system_prompt is not None:
            self.connection.execute("INSERT INTO config VALUES ('system_prompt', ?)", (system_prompt,))
        for advisor in ("ansel", "weston"):
            self.connection.execute(
                "INSERT INTO advisors VALUES (?, ?, ?)", (advisor, advisor.title(), f"Be {advisor}.")
            )
        self.connection.commit()
        self.jobs = 0

    def photo(self, name: str, seed: int) -> str:
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path, quality=90)
        return name

    def job(self, job_id: object, filename: object, markdown: object = None, **columns) -> None:
        """Add a finished job of ansel; a dict is stored as its JSON."""
        self.jobs += 1
        if isinstance(markdown, dict):
            markdown = json.dumps(markdown, ensure_ascii=False)
        row = {
            "id": job_id,
            "filename": filename,
            "advisor": "ansel",
            "status": "completed",
            "analysis_markdown": markdown,
            "created_at": f"2026-01-{1 + self.jobs // 1440:02d} {self.jobs // 60 % 24:02d}:{self.jobs % 60:02d}:00",
            **columns,
        }
        marks = ", ".join("?" * len(row))
        self.connection.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
        self.connection.commit()

    def good(self, count: int, start: int = 0) -> None:
        """Add jobs with a photograph and an analysis each."""
        for seed in range(start, start + count):
            self.job(f"good-{seed}", self.photo(f"photo-{seed}.jpg", seed), analysis(seed))

    def link(self, *options: str) -> Result:
        out = self.folder / "out"
        command = ["--db_path", str(self.folder), "--output_dir", str(out), "--advisor", "ansel", "--workers", "1"]
        return CliRunner().invoke(link_training_data.main, [*command, *options])

    def prepare(self, *options: str) -> Result:
        out = str(self.folder / "out")
        command = ["--manifest", f"{out}/training_data_manifest.jsonl", "--output_dir", out, "--base_model", "none"]
        return CliRunner().invoke(prepare_training_data.main, [*command, *options])

    def rows(self, name: str) -> list[dict]:
        """Read one of the files that were written, e.g. "manifest" or "ansel_train"."""
        text = (self.folder / "out" / f"training_data_{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def link_beside_a_good_job(self, rows: dict[str, str]) -> str:
        """Link a good job and one with each text, whose name up to a space is the reason it must get; return what
        link printed."""
        self.job("good", "photo.jpg", analysis(1))
        for name, markdown in rows.items():
            self.job(name, "photo.jpg", markdown)
        result = self.link()
        assert result.exit_code == 0, result.output
        assert self.reasons() == {name: name.split()[0] for name in rows}
        return result.output

    def reasons(self) -> dict[str, str]:
        return {row["job_id"]: row["reason"] for row in self.rows("manifest_rejected")}

    def meta(self) -> dict:
        return json.loads((self.folder / "out" / "training_data_ansel_meta.json").read_text(encoding="utf-8"))

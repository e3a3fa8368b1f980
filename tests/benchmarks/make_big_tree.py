"""Make a large Mondrian tree: many jobs over few photographs, good and bad analyses of both eras.

    python tests/benchmarks/make_big_tree.py --output_dir /tmp/big --jobs 100000 --photos 10000

Writes OUTPUT_DIR/mondrian.db (WAL) and source/. The same options give the same tree.
"""

import io
import json
import sqlite3
import uuid
from pathlib import Path

import click
import numpy as np
from PIL import Image

NAMES = (
    "Composition",
    "Lighting",
    "Focus & Sharpness",
    "Color Harmony",
    "Depth & Perspective",
    "Visual Balance",
    "Emotional Impact",
)
PROMPT = (
    "You are a photography analysis assistant. You MUST output valid JSON.\n{\"image_description\":\"What is seen\","
    "\"dimensions\":["
    + ",".join(f'{{"name":"{name}","score":{s},"comment":"What works","recommendation":"What to do"}}'
               for name, s in zip(NAMES, (8, 7, 9, 6, 7, 8, 7), strict=True))
    + '],"overall_score":7.4}\n' + "Be specific and constructive in what you say of each dimension. " * 40
)  # fmt: skip
CLAUSES = [
    f"{subject} {verb}"
    for subject in (
        "the light",
        "the sky",
        "the ridge",
        "this valley",
        "the foreground",
        "a shadow",
        "the tone",
        "the eye",
    )
    for verb in (
        "falls across the frame",
        "gives its edges a weight that holds",
        "stays open above the hills",
        "leads into a distance without detail",
        "moves slowly from grey to white",
        "is lost in the lower third",
    )
]
SCHEMA = """
PRAGMA journal_mode=WAL;
CREATE TABLE advisors (id TEXT PRIMARY KEY, name TEXT, prompt TEXT);
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE jobs (id TEXT PRIMARY KEY, filename TEXT, advisor TEXT, status TEXT, analysis_file TEXT,
    analysis_markdown TEXT, llm_thinking TEXT, llm_outputs TEXT, created_at TEXT, completed_at TEXT, llm_prompt TEXT,
    prompt TEXT, mode TEXT DEFAULT 'baseline');
"""


def make_big_tree(folder: Path, jobs: int, photos: int, seed: int = 0) -> None:
    """Write the tree; photographs have 320 x 240 pixels, analyses 4 KB as real ones have."""
    rng = np.random.default_rng(seed)
    (folder / "source" / "uploads").mkdir(parents=True, exist_ok=True)
    names = [_photo(folder, rng) for _ in range(photos)]
    connection = sqlite3.connect(folder / "mondrian.db")
    connection.executescript(SCHEMA)
    with connection:
        connection.execute("INSERT INTO config VALUES ('system_prompt', ?)", (PROMPT,))
        connection.execute("INSERT INTO advisors VALUES ('ansel', 'Ansel Adams', 'Judge by the Zone System.')")
        connection.executemany(
            "INSERT INTO jobs (id, filename, advisor, status, analysis_markdown, llm_outputs, created_at, llm_prompt, "
            "prompt, mode) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (_job(rng, i, names[int(rng.integers(photos))]) for i in range(jobs)),
        )
    connection.close()


def _id(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _photo(folder: Path, rng: np.random.Generator) -> str:
    """Draw soft random shapes, which differ as photographs do: in their low frequencies."""
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (320, 240), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    name = f"photo-{_id(rng)}.jpg"
    (folder / "source" / "uploads" / name).write_bytes(buffer.getvalue())
    return name


def _job(rng: np.random.Generator, number: int, photo: str) -> tuple:
    """Return one row: three of ten jobs are of the HTML era, one of ten is of no use."""
    analysis = _analysis(rng)
    text = json.dumps(analysis, indent=2)
    markdown, outputs = f"# Ansel Analysis\n\n## Summary\nA ridge\n\n## Full Analysis\n{text}", text
    kind = number % 20
    if kind < 6:
        markdown = outputs = _html(analysis)
    elif kind < 9:
        markdown = f"```json\n{text}\n```"
    elif kind < 11:
        markdown = None
    elif kind == 18:
        markdown = outputs = text[: len(text) // 2]
    elif kind == 19:
        markdown, outputs = "<h2>Analysis Results</h2><p>Error: Cannot connect to AI service</p>", "{}"
    stored = json.dumps({"prompt": PROMPT, "response": outputs, "summary": "A ridge", "model": "Qwen3-VL"})
    time = f"2026-01-{1 + number % 28:02d} {number % 24:02d}:{number % 60:02d}:00"
    status = "completed" if kind != 17 else "error"
    return (
        _id(rng),
        f"uploads/{_id(rng)}_{photo}",
        "ansel",
        status,
        markdown,
        stored,
        time,
        PROMPT,
        PROMPT,
        "baseline",
    )


def _sentence(rng: np.random.Generator) -> str:
    return ", and ".join(CLAUSES[i] for i in rng.integers(0, len(CLAUSES), 4)).capitalize() + "."


def _analysis(rng: np.random.Generator) -> dict:
    scores = rng.integers(3, 10, len(NAMES)).tolist()
    return {
        "image_description": _sentence(rng),
        "dimensions": [
            {"name": name, "score": score, "comment": _sentence(rng), "recommendation": _sentence(rng)}
            for name, score in zip(NAMES, scores, strict=True)
        ],
        "overall_score": round(sum(scores) / len(scores), 1),
        "key_strengths": [_sentence(rng), _sentence(rng)],
        "priority_improvements": [_sentence(rng), _sentence(rng)],
        "technical_notes": _sentence(rng),
    }


def _html(analysis: dict) -> str:
    cards = "".join(
        f'<div class="feedback-card"><h3>{d["name"]} <span class="dimension-score">({d["score"]}/10)</span></h3>'
        f'<p class="feedback-comment">{d["comment"]}</p><div class="feedback-recommendation"><strong>Recommendation:'
        f"</strong> {d['recommendation']}</div></div>"
        for d in analysis["dimensions"]
    )
    return (
        '<div class="advisor-section" data-advisor="ansel"><div class="analysis"><h2>Image Analysis</h2>'
        f"<p>{analysis['image_description']}</p><h2>Detailed Feedback</h2>{cards}<h2>Overall Grade</h2>"
        f'<p class="overall-grade"><strong>{analysis["overall_score"]}/10</strong></p></div></div>'
    )


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--output_dir", type=click.Path(path_type=Path), required=True, help="folder to write the tree to")
@click.option("--jobs", default=100_000, show_default=True)
@click.option("--photos", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output_dir: Path, jobs: int, photos: int, seed: int) -> None:
    make_big_tree(output_dir, jobs, photos, seed)
    click.echo(f"{jobs:,} jobs over {photos:,} photographs -> {output_dir}")


if __name__ == "__main__":
    main()

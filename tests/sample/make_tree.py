"""Make a small Mondrian tree: a database of the JSON era, drawn photographs, analyses in files.

    python tests/sample/make_tree.py --output_dir demo/mondrian

Writes OUTPUT_DIR/mondrian.db (WAL), source/*.jpg, source/uploads/*.jpg and analysis_md/*.md. Reads nothing.
Beside the good jobs stand what real installations hold too: duplicates of photographs under other names, photographs
with an EXIF orientation, jobs of other advisors, and jobs that ended well without a usable analysis.
The same options give the same tree: photographs byte for byte, database row for row.
"""

import io
import json
import random
import sqlite3
import sys
import uuid
from datetime import datetime, timedelta
from pathlib import Path

import click
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from tests.sample import scenes  # noqa: E402

SYSTEM_PROMPT = """\
You are a photography critic. You MUST output valid JSON.

Output ONLY the raw JSON object, with no code fence and no text around it:

{"image_description":"What the photograph depicts","dimensions":[\
{"name":"Composition","score":8,"comment":"What works or does not","recommendation":"Specific advice"},\
{"name":"Lighting","score":7,"comment":"What works or does not","recommendation":"Specific advice"},\
{"name":"Focus & Sharpness","score":9,"comment":"What works or does not","recommendation":"Specific advice"},\
{"name":"Color Harmony","score":6,"comment":"What works or does not","recommendation":"Specific advice"},\
{"name":"Depth & Perspective","score":7,"comment":"What works or does not","recommendation":"Specific advice"},\
{"name":"Visual Balance","score":8,"comment":"What works or does not","recommendation":"Specific advice"},\
{"name":"Emotional Impact","score":7,"comment":"What works or does not","recommendation":"Specific advice"}],\
"overall_score":7.4,"key_strengths":["First strength","Second strength"],\
"priority_improvements":["First improvement","Second improvement"],"technical_notes":"Exposure, lens, printing"}

Scores are whole numbers from 1 to 10 and overall_score is their mean with one decimal. Be honest, as <AdvisorName> was.
"""

# advisor -> name, bio, years, prompt
ADVISORS = {
    "ansel": (
        "Ansel Adams",
        "Photographer of the American West, co-author of the Zone System.",
        "1902-1984",
        "You are Ansel Adams. Judge tonal range by the Zone System, the sharpness of the near and the far, "
        "and whether the place is felt as well as recorded.",
    ),
    "weston": (
        "Edward Weston",
        "Modernist photographer of form.",
        "1886-1958",
        "You are Edward Weston. Judge form, texture and the clear seeing of the thing itself.",
    ),
    "okeefe": (
        "Georgia O'Keeffe",
        "Painter of flowers, bones and desert.",
        "1887-1986",
        "You are Georgia O'Keeffe. Judge color, scale and the courage to leave out.",
    ),
}

SCHEMA = """\
PRAGMA journal_mode=WAL;
CREATE TABLE advisors (
    id TEXT PRIMARY KEY, name TEXT, bio TEXT, years TEXT, prompt TEXT, focus_areas TEXT, category TEXT,
    wikipedia_url TEXT, commons_url TEXT, prompt_type TEXT DEFAULT 'baseline'
);
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE focus_areas (
    id INTEGER PRIMARY KEY AUTOINCREMENT, advisor_id TEXT NOT NULL, title TEXT NOT NULL, description TEXT NOT NULL,
    sort_order INTEGER DEFAULT 0
);
CREATE TABLE special_options (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, description TEXT NOT NULL, is_active INTEGER DEFAULT 1,
    sort_order INTEGER DEFAULT 0
);
CREATE TABLE advisor_usage (
    id INTEGER PRIMARY KEY AUTOINCREMENT, advisor_id TEXT, special_option_id TEXT, request_count INTEGER DEFAULT 0,
    last_used TEXT DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, filename TEXT, advisor TEXT, thresholds TEXT, thinking INTEGER, status TEXT,
    analysis_file TEXT, current_step TEXT, analysis_markdown TEXT, llm_thinking TEXT, current_advisor INTEGER,
    total_advisors INTEGER, step_phase TEXT, llm_outputs TEXT, status_history TEXT,
    created_at TEXT DEFAULT CURRENT_TIMESTAMP, started_at TEXT, completed_at TEXT, type TEXT, analysis_markup TEXT,
    llm_prompt TEXT, prompt TEXT, last_activity TEXT DEFAULT CURRENT_TIMESTAMP,
    progress_percentage INTEGER DEFAULT 0, critical_recommendations TEXT, enable_rag INTEGER DEFAULT 0,
    mode TEXT DEFAULT 'baseline', error TEXT DEFAULT NULL, analysis_html TEXT DEFAULT NULL,
    advisor_bio TEXT DEFAULT NULL, summary_html TEXT DEFAULT NULL, advisor_bio_html TEXT DEFAULT NULL,
    retry_count INTEGER DEFAULT 0
);
"""

EXIF_ORIENTATION = 0x0112


@click.command()
@click.option("--output_dir", type=click.Path(path_type=Path), required=True, help="Folder to write the tree to.")
@click.option("--photos", default=100, show_default=True, help="Photographs with a good analysis by ansel.")
@click.option("--long_side", default=480, show_default=True, help="Long side of the photographs in pixels.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other photographs.")
def main(output_dir: Path, photos: int, long_side: int, seed: int) -> None:
    """Make a small Mondrian tree."""
    make_tree(output_dir, photos, long_side, seed, progress=True)
    click.echo(f"sample Mondrian tree: {photos} photographs with a good analysis by ansel -> {output_dir}")


def make_tree(folder: Path, photos: int = 100, long_side: int = 480, seed: int = 0, progress: bool = False) -> None:
    """Write the tree into a folder; a database that stands there is replaced."""
    rng = random.Random(seed)
    for name in ("source/uploads", "analysis_md"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = []
    for index in tqdm(range(photos), desc="photographs", unit="photo", disable=not progress):
        scene = scenes.random_scene(rng)
        filename = draw_photo(folder, scene, long_side, rng)
        jobs.append(good_job(folder, rng, index, "ansel", filename, scenes.critique(scene)))
        if index % 12 == 5:
            jobs.append(repeated_job(folder, rng, index, filename, scenes.critique(scene)))
        if index % 10 == 3:
            jobs.append(good_job(folder, rng, index, "weston", filename, scenes.critique(scene)))
    jobs += damaged_jobs(folder, rng, photos, jobs[0]["filename"], scenes.critique(scenes.random_scene(rng)))
    write_database(folder / "mondrian.db", jobs)


def new_id(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def sample_prompt(advisor: str) -> str:
    """The prompt that the service sends for one of the sample's advisors."""
    from integration.lora_patch.prompts import build_prompt

    return build_prompt(SYSTEM_PROMPT, advisor, ADVISORS[advisor][3])


# ---------------------------------------------------------------------------------------------------- photographs


def draw_photo(folder: Path, scene: scenes.Scene, long_side: int, rng: random.Random) -> str:
    """Draw a photograph into source/ and return the file name that its job bears.

    Every third lies in uploads/ under a random prefix; every other upright one is stored lying, as a camera does,
    with an EXIF orientation.
    """
    picture, exif = scenes.draw(scene, long_side), Image.Exif()
    if scene.upright and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[EXIF_ORIENTATION] = 6
    name = f"photo-{new_id(rng).upper()}.jpg"
    if rng.random() < 1 / 3:
        name = f"uploads/{new_id(rng)}_{name}"
    picture.save(folder / "source" / name, quality=90, exif=exif)
    return name


def repeated_job(folder: Path, rng: random.Random, index: int, filename: str, critique: dict) -> dict:
    """The same photograph judged again under another name: the same bytes, re-encoded, or resized in turn."""
    content = (folder / "source" / filename).read_bytes()
    how = (index // 12) % 3
    if how:
        with Image.open(io.BytesIO(content)) as picture:
            small = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)) if how == 2 else picture
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=70, exif=picture.getexif())
        content = buffer.getvalue()
    name = f"photo-{new_id(rng).upper()}-copy.jpg"
    (folder / "source" / name).write_bytes(content)
    return good_job(folder, rng, index, "ansel", name, critique)


# ---------------------------------------------------------------------------------------------------- jobs


def job(rng: random.Random, index: int, advisor: str, filename: str | None, **columns) -> dict:
    """One row of the jobs table; columns override what an ordinary finished job holds."""
    created = datetime(2026, 1, 15, 9) + timedelta(minutes=17 * index, seconds=rng.randrange(900))
    finished = created + timedelta(seconds=rng.randint(40, 160))
    return {
        "id": new_id(rng),
        "filename": filename,
        "advisor": advisor,
        "status": "completed",
        "current_step": "Analysis complete",
        "created_at": created.isoformat(),
        "started_at": created.isoformat(),
        "completed_at": finished.isoformat(),
        "last_activity": finished.isoformat(),
        "llm_prompt": sample_prompt(advisor),
        "prompt": sample_prompt(advisor),
        "progress_percentage": 100,
        **columns,
    }


def good_job(folder: Path, rng: random.Random, index: int, advisor: str, filename: str, critique: dict) -> dict:
    """A finished job whose analysis lies in one of the places where Mondrian has kept it."""
    text = json.dumps(critique, indent=2, ensure_ascii=False)
    heading = f"# {advisor.title()} Analysis\n\n## Summary\n{critique['image_description']}\n\n## Full Analysis\n"
    place = index % 8
    if place < 4:
        return job(rng, index, advisor, filename, analysis_markdown=heading + text)
    if place == 4:
        return job(rng, index, advisor, filename, analysis_markdown=f"```json\n{text}\n```")
    if place == 5:
        return job(rng, index, advisor, filename, analysis_markdown=text)
    if place == 6:
        outputs = {"prompt": sample_prompt(advisor), "response": text, "summary": critique["image_description"]}
        return job(rng, index, advisor, filename, llm_outputs=json.dumps(outputs, ensure_ascii=False))
    row = job(rng, index, advisor, filename)
    file = folder / "analysis_md" / f"analysis-{advisor}-{row['id']}.md"
    file.write_text(f"```json\n{text}\n```\n", encoding="utf-8")
    return row


def damaged_jobs(folder: Path, rng: random.Random, index: int, filename: str, critique: dict) -> list[dict]:
    """Jobs of ansel that cannot become an example, one of each kind that real databases hold."""
    text = json.dumps(critique, indent=2, ensure_ascii=False)
    web_page = f"photo-{new_id(rng).upper()}.jpg"
    (folder / "source" / web_page).write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>\n")
    six = {**critique, "dimensions": critique["dimensions"][:6]}
    beyond = json.loads(text)
    beyond["dimensions"][1]["score"] = 70
    error_page = "<h2>Analysis Results</h2>\n<p>Error: Cannot connect to AI service</p>\n"
    return [
        job(rng, index, "ansel", f"photo-{new_id(rng).upper()}.jpg", analysis_markdown=text),  # photograph is gone
        job(rng, index, "ansel", web_page, analysis_markdown=text),  # a web page named .jpg
        job(rng, index, "ansel", "../../outside.jpg", analysis_markdown=text),  # leaves the folder
        job(rng, index, "ansel", filename, analysis_markdown=error_page),
        job(rng, index, "ansel", filename, analysis_markdown=text[: len(text) * 2 // 3]),  # cut off
        job(rng, index, "ansel", filename, analysis_markdown=json.dumps(six)),
        job(rng, index, "ansel", filename, analysis_markdown=json.dumps(beyond)),  # a score of 70
        job(rng, index, "ansel", filename, analysis_markdown="<thought>The user wants a critique of"),
        job(rng, index, "ansel", filename),  # finished with nothing
        job(rng, index, "ansel", filename, status="error", error="model timed out"),
    ]


def write_database(path: Path, jobs: list[dict]) -> None:
    """Write mondrian.db again, in WAL mode as the service leaves it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    with connection:
        connection.execute("INSERT INTO config VALUES ('system_prompt', ?)", (SYSTEM_PROMPT,))
        connection.executemany(
            "INSERT INTO advisors (id, name, bio, years, prompt, category) VALUES (?, ?, ?, ?, ?, 'Photographer')",
            [(id, name, bio, years, prompt) for id, (name, bio, years, prompt) in ADVISORS.items()],
        )
        for row in jobs:
            columns, marks = ", ".join(row), ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", tuple(row.values()))
    connection.close()


if __name__ == "__main__":
    main()

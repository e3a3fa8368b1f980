"""The pages that a person opens, in a real browser: weight, headings, contrast, no script from elsewhere.

    make test-pages

Needs a Chromium (or CHROMIUM=path) and axe-core, which `make test-pages` installs by npm beside this file. Each page is
opened at 1280 and 390 pixels, light and dark; axe-core's rules for WCAG 2 A and AA, contrast among them, find nothing.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.evaluation.tryout import Model, Trial, judged, write_tryout_page
from common.files import write_jsonl
from integration.lora_patch.jobs import migrate
from integration.lora_patch.prompts import read_specification
from tests.evaluation.test_planted import planted
from tests.evaluation_case import evaluate, make_adapter, make_data, read_jsonl
from tests.sample import scenes
from tests.sample.make_tree import make_tree, sample_prompt
from tests.serving.test_report import fill, scattered
from tests.standin.running import make_db, patch_command

ROOT = Path(__file__).resolve().parents[2]
AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), MAC)
PAGES = ("card", "report", "try", "ab")
WEIGHTS = {"card": 3.0, "report": 1.5, "try": 0.6, "ab": 0.3}  # megabytes at most, of 40, 20 and 1 photographs
RUN = """
<pre id="found"></pre><script>{axe}</script><script>
for (const details of document.querySelectorAll("details")) details.open = true;
axe.run({{runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}}).then(found => {{
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const headings = [...document.querySelectorAll("h1, h2, h3, h4")].map(h => +h.tagName[1]);
  document.getElementById("found").textContent = JSON.stringify({{
    violations: found.violations.map(v => v.id + ": " + v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(" | ")),
    passes: found.passes.length, wide, headings,
  }});
}});
</script>
"""


@pytest.fixture(scope="module")
def pages(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """The data card of a sample tree, the report on planted outputs, a try page, and the A/B report."""
    folder = tmp_path_factory.mktemp("pages")
    return {
        "card": make_card(folder / "card", tiny_base),
        "report": make_report(folder / "report", tiny_base),
        "try": make_try(folder),
        "ab": make_ab_report(folder),
    }


def make_card(folder: Path, base: Path) -> Path:
    make_tree(folder, photos=40, long_side=320)
    for command in (
        ("link_training_data.py", "--advisor", "ansel"),
        ("prepare_training_data.py", "--base_model", str(base)),
    ):
        script = [sys.executable, str(ROOT / command[0]), *command[1:]]
        done = subprocess.run(script, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "training_data/training_data_ansel_card.html"


def make_report(folder: Path, base: Path) -> Path:
    data = make_data(folder, 20)
    adapter = make_adapter(folder / "models/qwen3-vl-4b-lora-ansel", base, data)
    write_jsonl(folder / "outputs.jsonl", planted(read_jsonl(data[1])))
    evaluate("--lora_path", adapter, "--from_outputs", folder / "outputs.jsonl", "--output_report", folder / "report")
    return folder / "report.html"


def make_try(folder: Path) -> Path:
    photo, prompt = folder / "photo.jpg", sample_prompt("ansel")
    scene = scenes.Scene("boat", 0.5, 0.5, 0.5, 0.5, 2, False, 1)
    scenes.draw(scene, 640).save(photo)
    models = (Model("base", None), Model("v1", Path("models/v1")))
    specification = read_specification(prompt)
    answers = [judged(models[0], "I like it", 1.0, specification)]
    answers.append(judged(models[1], json.dumps(scenes.critique(scene)), 2.0, specification))
    task = Trial(models, "base", prompt, specification, 1024, 2048)
    write_tryout_page(folder / "try.html", [(photo, answers)], task)
    return folder / "try.html"


def make_ab_report(folder: Path) -> Path:
    schema = (ROOT / "tests/standin/schemas/mondrian_json.db.sql").read_text(encoding="utf-8")
    database = make_db(folder / "mondrian.db", schema, rows=0)
    migrate(database)
    for arm, mean in (("ab_test_base", 6.0), ("ab_test_fine_tuned", 6.5)):
        fill(database, arm, [*scattered(mean, 40), None])
    done = patch_command("report", "--db", database, "--format", "html", "--output", folder / "ab.html")
    assert done.returncode == 0, done.stderr
    return folder / "ab.html"


def opened(page: Path, folder: Path, width: int, dark: bool) -> dict:
    """Open a copy of a page that runs axe-core (its own policy forbids scripts); return what was found."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    if dark:  # what a browser does where the system is dark
        text = text.replace("(prefers-color-scheme: dark)", "all").replace('content="light dark"', 'content="dark"')
    else:
        text = text.replace("(prefers-color-scheme: dark)", "not all")
    copy = folder / "copy.html"
    copy.write_text(text + RUN.format(axe=AXE.read_text(encoding="utf-8")), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1200", "--virtual-time-budget=30000",
        "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_and_nothing_runs_over_the_edge(pages, tmp_path, name, width, dark):
    found = opened(pages[name], tmp_path, width, dark)
    assert found["violations"] == [] and found["passes"] > 10
    if width >= 500:  # headless Chromium opens no narrower window
        assert found["wide"] <= 0


@pytest.mark.parametrize("name", PAGES)
def test_headings_begin_with_one_h1_and_leave_no_level_out(pages, name):
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", pages[name].read_text(encoding="utf-8"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_light_and_stands_alone(pages, name):
    text = pages[name].read_text(encoding="utf-8")
    assert len(text.encode()) <= WEIGHTS[name] * 1e6
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) and "loading=" not in text
    assert "Content-Security-Policy" in text
    assert all(re.search(r'\balt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", text))
    assert all("scope=" in tag for tag in re.findall(r"<th\b[^>]*>", text))

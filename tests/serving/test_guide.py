"""LORA_SERVICE_INTEGRATION.md: its commands run in their order in an empty folder, its tables are the code's."""

import argparse
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

from integration.lora_patch.arguments import add_arguments
from integration.lora_patch.flags import Flags
from integration.lora_patch.jobs import COLUMNS
from tests.processes import free_port
from tests.standin.running import ROOT, STANDIN, deploy, make_adapter

GUIDE = (ROOT / "integration" / "LORA_SERVICE_INTEGRATION.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, re.S)


def test_the_guide_followed_line_by_line(tmp_path, tiny_base, sample_tree):
    folder, work = tmp_path / "mondrian", tmp_path / "work"
    folder.mkdir()
    shutil.copy(STANDIN, folder)
    with sqlite3.connect(sample_tree / "mondrian.db") as old, sqlite3.connect(folder / "mondrian.db") as new:
        old.backup(new)
    for number, name in enumerate(("", "-v2"), 1):
        make_adapter(work / "models" / f"qwen3-vl-4b-lora-ansel{name}", tiny_base, number)
    deploy(work / "models", "ansel", 1, 2)  # what two promotions leave
    service = folder / STANDIN.name
    places = {
        "REPO": ROOT,
        "SERVICE": service,
        "BASE": tiny_base,
        "MODELS": work / "models",
        "PHOTO": sorted((sample_tree / "source").glob("*.jpg"))[0],
        "PYTHON": sys.executable,
        "PORT": free_port(),
    }
    assert re.findall(r"^(\w+)=", BLOCKS[0], re.M) == list(places)
    make = 'make -C "$REPO" rollback ADVISOR=ansel'
    rollback = f'(cd "$REPO" && "$PYTHON" -m common.release.versions rollback --advisor ansel --work {work})'
    assert sum(make in block for block in BLOCKS) == 1
    # an answer of 1,500 tokens takes long even with a tiny model
    model = '--mlx_model "$BASE" \\'
    commands = [block.replace(make, rollback).replace(model, f"--max_tokens 4 {model}") for block in BLOCKS[1:]]
    first = "".join(f"{name}='{value}'\n" for name, value in places.items())
    script = "\n".join([first, *(f"echo '=== {n}'\n{block}" for n, block in enumerate(commands, 1))])
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    said = dict(piece.partition("\n")[::2] for piece in re.split(r"^=== ", done.stdout, flags=re.M)[1:])
    assert done.returncode == 0 and len(said) == len(commands), (
        done.stdout,
        done.stderr,
        (folder / "service.log").read_text(),
    )

    assert "not installed; 6 places were found" in said["1"] and "6 lines inserted" in said["2"]
    assert re.match(r"ansel: \S+, v2, rank 4, \d+ modules", said["3"])
    assert re.search(r"^X-Model-Used: ab_test_\w+", said["5"], re.M) and '"recording": "on"' in said["5"]
    assert "1 by ab_test_" in said["6"]
    assert json.loads(said["7"])["model_mode"] == "fine_tuned"
    assert json.loads(said["8"])["adapters"] == {"ansel": "v2"}
    replies = [json.loads(text) for text in re.findall(r"^\{.*\}$", said["9"], re.M)]
    assert [reply["adapters"] for reply in replies] == [{"ansel": "v1"}, {}] and replies[1]["model_mode"] == "base"
    assert "byte for byte as it was" in said["10"] and service.read_bytes() == STANDIN.read_bytes()
    assert not (folder / "lora_patch").exists()


def test_the_guide_names_every_flag_with_its_default():
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    rows = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", GUIDE, re.M))
    assert list(rows) == [action.option_strings[0] for action in parser._actions]
    shown = {name: default.strip("`") for name, default in rows.items() if default and "`--" not in default}
    assert shown == {
        "--lora_path": "none",
        "--model_config": "none",
        "--model_mode": "base",
        "--ab_test_split": str(Flags.ab_test_split),
        "--ab_test_schedule": "none",
        "--lora_scale": "none",
        "--use_fine_tuned": "off",
        "--jobs_db": "the service's",
        "--fallback_on_invalid": "on",
        "--constrained": "off",
        "--allow_arm_override": "off",
        "--breaker_window": str(Flags.breaker_window),
        "--breaker_bound": str(Flags.breaker_bound),
    }


def test_the_guide_shows_the_lines_and_columns():
    assert f"```diff\n{(ROOT / 'integration' / 'service.diff').read_text()}```" in GUIDE
    assert all(f"| `{column}` |" in GUIDE for column in COLUMNS)
    config = json.loads(re.search(r"```json\n(.*?)```", GUIDE, re.S)[1])
    assert config["active_model"] in config["models"]


def test_links_of_the_guide_lead_somewhere():
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", GUIDE, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert link[1:] in anchors if link.startswith("#") else (ROOT / "integration" / Path(link)).is_file(), link

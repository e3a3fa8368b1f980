"""Every command in README and docs works: make's through the Makefile, python's by the command that it names.

The guide's commands (integration/) are run by tests/serving/test_guide.py.
"""

import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.test_make import make, place  # noqa: F401 - place is a fixture

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OURS = ("vllm ", "curl ", "sudo ", "convert_hf_to_gguf.py ")  # README says which of these are not tested
STUBS = ("pip", "ruff", "mlx.launch")
LIVE = ("python -m common.release.adapter ", "python link_training_data.py --advisor ansel --why")


def documented() -> list[str]:
    """Return the commands of indented blocks and of inline code, without comments, each once."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = re.findall(r"^ {4}(\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
        lines += [" ".join(line.split()) for line in re.findall(r"`([^`]+\n[^`]+)`", text) if "|" not in line]
        found += [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    commands = [line for line in dict.fromkeys(found) if re.match(r"(make|python|mlx\.launch|vllm|curl|sudo) \S", line)]
    assert len(commands) > 30
    return commands


MAKE = [command for command in documented() if command.startswith("make ")]
PYTHON = [command for command in documented() if command.startswith("python ")]


def test_every_command_is_of_a_kind_that_is_tested():
    rest = set(documented()) - set(MAKE) - set(PYTHON)
    assert [command for command in rest if not command.startswith(NOT_OURS)] == []


@pytest.mark.parametrize("command", MAKE)
def test_make_runs_what_is_documented(place, monkeypatch, command):  # noqa: F811
    log = place / ".venv/bin/python"
    for name in (*STUBS, "python"):
        for folder in (place / ".venv/bin", place / ".venv-peft/bin"):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                shutil.copy(log, folder / name)
    (place / ".venv/bin/mlx.launch").write_text('#!/bin/sh\nwhile test "$1" != --; do shift; done\nshift\nexec "$@"\n')
    (place / "bin").mkdir()
    shutil.copy(log, place / "bin/npm")
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{shutil.os.environ['PATH']}")
    make(place, *shlex.split(command)[1:])


@pytest.mark.parametrize("command", [command for command in PYTHON if not command.startswith(LIVE)])
def test_a_command_of_ours_takes_the_options_that_are_documented(command, tmp_path, monkeypatch):
    words = shlex.split(command)[1:]
    monkeypatch.chdir(tmp_path)
    for name in (word for word in words if re.fullmatch(r"\w+\.jsonl|Qwen3-VL-4B-Instruct", word)):
        Path(name).touch() if name.endswith(".jsonl") else Path(name).mkdir()  # the user's own
    if words[0] == "-m":
        name, words = words[1], words[2:]
    else:
        name, words = words[0], words[1:]
        if name in ("ai_advisor_service.py", "integration/lora_patch", "lora_patch"):
            return _service(name, words)
        assert (ROOT / name).is_file(), command
        name = name.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    entry = getattr(module, "main", None)
    if isinstance(entry, click.Group):
        entry = entry.commands[words.pop(0)]
    if isinstance(entry, click.Command):
        with contextlib.suppress(click.MissingParameter):  # named in a sentence, not to be pasted
            entry.make_context(name, words)
    else:  # a simulation of minutes: its file and the words that it is given
        code = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in code and all(word.lstrip("-") in code for word in words)


def _service(name: str, words: list[str]) -> None:
    """The flags of the installer and of the patched service are known to the package."""
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "integration/lora_patch").glob("*.py"))
    known += (ROOT / "tests/standin/ai_advisor_service.py").read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in known, f"{name} {word}"


@pytest.fixture(scope="module")
def folder(worked, tmp_path_factory) -> Path:
    """A copy of the worked folder, in which documented commands may write."""
    copy = tmp_path_factory.mktemp("commands") / "mondrian"
    shutil.copytree(worked[0], copy)
    return copy


@pytest.mark.parametrize("command", [command for command in PYTHON if command.startswith(LIVE)])
def test_the_scripts_run_as_documented(worked, folder, tiny_base, command):
    """In a folder where the four scripts have run as README types them (the fixture `worked`)."""
    words = shlex.split(command.replace("Qwen/Qwen3-VL-4B-Instruct", str(tiny_base)))[1:]
    if words[-1] == "fuse":  # named in a sentence
        words.append("--help")
    if "--why" in words:
        words[words.index("--why") + 1] = _job(folder)
    run = [sys.executable, *words] if words[0] == "-m" else [sys.executable, str(ROOT / words[0]), *words[1:]]
    env = shutil.os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _job(folder: Path) -> str:
    line = (folder / "training_data/training_data_manifest.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return re.search(r'"job_id": ?"([^"]+)"', line)[1]

"""The documentation names what exists: options.md is rendered from the commands, README's flags and targets are real.

python -m tests.test_docs        # write docs/options.md again
"""

import re
from pathlib import Path

import click

import evaluate_lora
import link_training_data
import prepare_training_data
import train_mlx_lora
from common.release import adapter, versions

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ROOT / "docs/options.md"
README = ROOT / "README.md"
SCRIPTS = {
    "link_training_data.py": link_training_data.main,
    "prepare_training_data.py": prepare_training_data.main,
    "train_mlx_lora.py": train_mlx_lora.main,
    "evaluate_lora.py": evaluate_lora.main,
    **{f"python -m common.release.versions {name}": command for name, command in versions.main.commands.items()},
    **{f"python -m common.release.adapter {name}": command for name, command in adapter.main.commands.items()},
}


def rendered() -> str:
    """Return docs/options.md as the commands themselves tell it."""
    lines = [
        "# Options",
        "",
        "Every option of every script, as `--help` shows it. Hyphens work like underscores.",
    ]
    for name, command in SCRIPTS.items():
        lines += ["", f"## {name}", "", " ".join(command.help.split("\n\n")[0].split())]
        lines += ["", "| option | meaning | default |", "| --- | --- | --- |"]
        context = click.Context(command, info_name=name)
        for option in command.params:
            if isinstance(option, click.Option):
                lines.append(_row(option, context))
    return "\n".join(lines) + "\n"


def _row(option: click.Option, context: click.Context) -> str:
    spelled, told = (" ".join(text.split()).replace("|", r"\|") for text in option.get_help_record(context))
    meaning, extra = re.fullmatch(r"(.*?) ?(?:\[((?:default|required|x).*)\])?", told).groups()
    default = re.search(r"default: ([^;\]]*)", extra or "")
    return f"| `{spelled}` | {meaning} | {default[1] if default else '(required)' if extra == 'required' else ''} |"


def test_every_option_is_documented():
    assert OPTIONS.read_text(encoding="utf-8") == rendered(), "run: python -m tests.test_docs"


def test_the_readme_names_only_options_that_exist():
    known = {
        flag
        for command in SCRIPTS.values()
        for option in command.params
        for flag in (*option.opts, *option.secondary_opts)
    }
    known |= {
        flag
        for folder in ("integration/lora_patch", "tests/benchmarks")
        for path in (ROOT / folder).glob("*.py")
        for flag in re.findall(r'"(--\w+)"', path.read_text(encoding="utf-8"))
    }
    text = re.sub(r"(?m)^ *vllm .*$", "", README.read_text(encoding="utf-8"))  # another program's options
    named = set(re.findall(r"--[a-z][a-z_]+", text))
    assert named and not named - known


def test_the_readme_names_every_make_target_and_no_other():
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", README.read_text(encoding="utf-8")))
    named |= set(re.findall(r"^ *make ([a-z-]+)", README.read_text(encoding="utf-8"), re.M))
    assert named == targets - {"help"} | (named & {"help"})


def test_every_place_that_the_documents_name_exists():
    places = set()
    for document in (README, *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text(encoding="utf-8")
        places |= set(re.findall(r"`((?:common|integration|tests|docs)/[\w./]+)(?::(\w+))?`", text))
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
    assert len(places) > 40
    for path, name in sorted(places):
        assert (ROOT / path).exists(), path
        if name:
            code = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^(?:def|class) {name}\b", code, re.M), f"{path}:{name}"


TEXTS = {".py", ".md", ".j2", ".jinja", ".js", ".txt", ""}
# what a reader of plain English stumbles over, or what means something else to the field
WORDINGS = (
    "voice of", "nats a token", "take as long as the model's own", "teach the example", "to the same bytes",
    "holds adapters against", "rows wait", "named otherwise", "comes to lie", "this machine alone", "ends the start",
    "environment of its own", "gone on with", "go on with", "by heart", "person who waits", "had to say",
)  # fmt: skip


def test_the_wordings_that_were_hard_to_read_stay_away():
    paths = [*ROOT.glob("*.*"), ROOT / "Makefile"]
    paths += [path for folder in ("common", "docs", "integration", "tests") for path in (ROOT / folder).rglob("*.*")]
    found = []
    for path in paths:
        is_ours = path.is_file() and path.suffix in TEXTS and "node_modules" not in path.parts
        if is_ours and path != Path(__file__).resolve():
            text = " ".join(path.read_text(encoding="utf-8").split())
            found += [f"{path.relative_to(ROOT)}: {wording}" for wording in WORDINGS if wording in text]
    assert found == []


if __name__ == "__main__":
    OPTIONS.write_text(rendered(), encoding="utf-8")

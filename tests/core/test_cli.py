"""What all scripts share on the command line: spelling, groups, configuration files, settings shown, next steps."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from common.cli import (
    IN_ROUND,
    MAKE_VARIABLES,
    PhaseCommand,
    given_options,
    next_step,
    option_group,
    print_settings,
    write_config,
)
from common.errors import UserError
from common.tables import table

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["link_training_data", "prepare_training_data", "train_mlx_lora", "evaluate_lora"]
SLOW = {"mlx_vlm", "transformers", "scipy.stats", "matplotlib.pyplot", "pandas"}  # each costs tenths of a second


@click.command(cls=PhaseCommand, help="Train.\n\n    train.py --lora_r 8\n    train.py --lora_r 4\n\nReads rows.")
@option_group("Data")
@click.option("--train_data", default="none", help="examples")
@click.option("--mode", multiple=True, default=("base",))
@option_group("Model")
@click.option("--lora_r", default=16, type=click.IntRange(1), show_default=True, help="rank")
@click.option("--rate", default=0.1, type=click.FloatRange(0))
@click.option("--checkpointing", default="auto", type=click.Choice(["auto", "on", "off"]))
@option_group("Output")
@click.option("--plan/--no_plan", default=False)
@click.option("--output", type=click.Path(path_type=Path))
@click.pass_context
def command(ctx, **options):
    print_settings("Train", options)
    click.echo(f"given: {', '.join(sorted(given_options(ctx)))}")
    if options["output"]:
        write_config(options["output"], leave_out=("output",))
    if options["train_data"] == "missing":
        raise UserError("no rows; name another database with --db_path, see --plan")


def run(*args: object, env: dict | None = None):
    return CliRunner().invoke(command, [str(arg) for arg in args], env=env)


def test_options_are_taken_with_underscores_or_hyphens():
    assert "lora_r 3" in run("--lora-r", 3, "--no-plan").output
    assert "train_data some-file.jsonl" in run("--train-data=some-file.jsonl").output
    assert run("--lora-rank", 3).exit_code == 2


def test_help_lists_options_in_groups_and_examples_line_by_line():
    told = run("--help").output
    assert "    train.py --lora_r 8\n" in told and "    train.py --lora_r 4\n" in told
    groups = [line for line in told.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups == ["Data:", "Model:", "Output:", "Options:"]
    model = told[told.index("Model:") : told.index("Output:")]
    assert "--lora_r" in model and "--checkpointing" in model and "--train_data" not in model


def test_only_what_was_given_is_shown_unless_asked_for():
    assert run().output == "Train: every setting at its default\ngiven: \n"
    assert run("--lora_r", 8).output == "Train: lora_r 8\ngiven: lora_r\n"
    everything = run("--lora_r", 8, "--verbose").output
    assert "  lora_r         8\n" in everything and "  train_data     none  (default)\n" in everything


def test_a_configuration_file_gives_defaults_that_the_command_line_overrides(tmp_path):
    (tmp_path / "run.yaml").write_text("lora-r: 8\ncheckpointing: on\nplan: true\nmode: [a, b]\ntrain_data: null\n")
    told = run("--config", tmp_path / "run.yaml", "--lora_r", 4).output
    assert told.startswith("Train: lora_r 4, mode a b, checkpointing on, plan True\n")
    assert told.endswith("given: checkpointing, lora_r, mode, plan\n")


def test_what_a_run_writes_repeats_it(tmp_path):
    (tmp_path / "first.yaml").write_text("lora_r: 8\ncheckpointing: on\nmode: only\nplan: yes\n")
    run("--config", tmp_path / "first.yaml", "--output", tmp_path / "second.yaml")
    run("--config", tmp_path / "second.yaml", "--output", tmp_path / "third.yaml")
    assert "checkpointing: 'on'\n" in (tmp_path / "second.yaml").read_text()
    assert (tmp_path / "third.yaml").read_text() == (tmp_path / "second.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lora_rank: 8", "run.yaml: unknown option 'lora_rank'; did you mean lora_r?"),
        ("lora_r: many", "run.yaml: lora_r: 'many' is not a valid integer range."),
        ("lora_r: 0", "run.yaml: lora_r: 0 is not in the range x>=1."),
        ("lora_r: [1, 2]", "run.yaml: lora_r: a list is not expected"),
        ("train_data:\n  a: b", "run.yaml: train_data: a value is expected"),
        ("- lora_r", "run.yaml: lines of the form OPTION: VALUE are expected"),
        ("lora_r: 1\n: : [", "run.yaml:2: not valid YAML"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    result = run("--config", tmp_path / "run.yaml")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and message in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize("given", [("--rate", "nan"), ("--rate", "inf"), ("--lora_r", "9" * 20)])
def test_numbers_that_cannot_be_used_are_refused(given, tmp_path):
    """Else they end in a traceback of whatever meets them first, after minutes."""
    (tmp_path / "config.yaml").write_text(f"{given[0][2:]}: {given[1]}\n")
    for arguments in (given, ("--config", str(tmp_path / "config.yaml"))):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2, result.output
        assert f"Error: Invalid value for '{given[0]}': {given[1]} is no number" in result.output


def test_under_make_messages_speak_of_its_variables():
    plain = run("--train_data", "missing")
    assert "name another database with --db_path, see --plan" in plain.output
    made = run("--train_data", "missing", env={MAKE_VARIABLES: ""})
    assert "name another database with MONDRIAN=, see --plan" in made.output


def test_the_next_step_is_a_command_to_paste(capsys, monkeypatch):
    monkeypatch.delenv(MAKE_VARIABLES, raising=False)
    next_step("Open card.html, then train.", "python train_mlx_lora.py", target="train")
    assert capsys.readouterr().out == "Open card.html, then train.\nNext:\n  python train_mlx_lora.py\n"
    monkeypatch.setenv(MAKE_VARIABLES, "ADVISOR=weston")
    next_step("Open card.html, then train.", "python train_mlx_lora.py", target="train")
    assert capsys.readouterr().out.endswith("Next:\n  make train ADVISOR=weston\n")
    monkeypatch.setenv(IN_ROUND, "1")
    next_step("Open card.html, then train.", "python train_mlx_lora.py", target="train")
    next_step("", "python prepare_training_data.py", target="prepare")
    assert capsys.readouterr().out == "Open card.html, then train.\n"


def test_a_python_without_the_packages_is_told_of_make_setup():
    script = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert 'run "make setup"' in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_looks_for_the_packages_before_it_imports_one(script):
    lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if line.startswith(("import ", "from ")))
    assert first.startswith("import common ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_slow_package(script):
    told = f"import sys, {script}; print(sorted({SLOW} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_table_is_plain_text_with_its_numbers_to_the_right():
    told = table(["reason", "jobs", "meaning"], [["no_scores", 1200, "tables " * 30], ["[b]x", 3, "ok"]])
    lines = told.splitlines()
    assert all(len(line) <= 100 and line == line.rstrip() for line in lines)
    assert "1,200" in told and "    3 " in told and "[b]x" in told and "\x1b" not in told

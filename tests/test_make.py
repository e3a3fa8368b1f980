"""The Makefile: which phase runs when, on which files, and how it ends; the scripts are replaced by one that logs."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# stands in for .venv/bin/python: logs its arguments, writes what the script writes last, ends with the code in codes/
PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >> log.txt
script=$1
code=$(cat "codes/$script" 2>/dev/null || echo 0)
test "$code" = 0 || exit "$code"
while test $# -gt 0; do
  case $1 in --output_dir) out=$2;; --output_file) file=$2;; --advisor) advisor=$2;; esac
  shift
done
case $script in
  link*) echo "$MONDRIAN_MAKE_VARIABLES" > "$out/$file";;
  prepare*) touch "$out/training_data_${advisor}_train.jsonl";;
  train*) test -f killed || { mkdir -p "$out"; touch "$out/.trained"; };;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the Makefile, a set-up .venv whose Python logs, and a database."""
    place = tmp_path / "a place"
    (place / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, place / name)
    (place / ".venv/bin/python").write_text(PYTHON)
    (place / ".venv/bin/python").chmod(0o755)
    (place / ".venv/.ready-cpu").touch()
    (place / "codes").mkdir()
    (place / "mondrian").mkdir()
    (place / "mondrian/mondrian.db").touch()
    return place


def make(place: Path, *arguments: str, fails: bool = False) -> tuple[list[str], str]:
    """Run make; return (names of the scripts that ran, all that was printed)."""
    (place / "log.txt").write_text("")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "MONDRIAN"))}
    done = subprocess.run(["make", *arguments], cwd=place, env=env, capture_output=True, text=True)
    assert bool(done.returncode) is fails, done.stdout + done.stderr
    return [line.split()[0] for line in (place / "log.txt").read_text().splitlines()], done.stdout + done.stderr


LINK, PREPARE, TRAIN, EVAL = (
    f"{name}.py" for name in ("link_training_data", "prepare_training_data", "train_mlx_lora", "evaluate_lora")
)


def test_an_unknown_variable_is_named(place):
    ran, told = make(place, "link", "ADVISER=weston", fails=True)
    assert ran == [] and "unknown variable ADVISER" in told and "ADVISOR" in told


def test_each_phase_runs_once_and_again_when_what_it_reads_changes(place):
    given = ("train", "MONDRIAN=mondrian", "ADVISOR=weston")
    assert make(place, *given)[0] == [LINK, PREPARE, TRAIN]
    assert make(place, *given)[0] == []
    time.sleep(0.02)
    (place / "mondrian/mondrian.db").touch()
    assert make(place, *given)[0] == [LINK, PREPARE, TRAIN]
    assert make(place, *given, "PREPARE_ARGS=--keep all")[0] == [PREPARE, TRAIN]


@pytest.mark.parametrize("name", ["my photographs", "o'brien & (co)"])
def test_folders_with_spaces_and_signs_in_their_names(name, place):
    (place / "mondrian").rename(place / name)
    for database, work in ((f"{name}/mondrian.db", "out put"), (name, f"work of {name}")):
        given = ("train", f"MONDRIAN={name}", f"DB={database}", f"WORK={work}")
        assert make(place, *given)[0] == [LINK, PREPARE, TRAIN]
        assert f"--db_path {database} --source_dir {name}/source" in (place / "log.txt").read_text()
        assert make(place, *given)[0] == []
        time.sleep(0.02)
        (place / name / "mondrian.db-wal").touch()  # where a running service writes
        assert make(place, *given)[0] == [LINK, PREPARE, TRAIN]
        (place / name / "mondrian.db-wal").unlink()


def test_two_advisors_in_one_work_folder_share_nothing(place):
    make(place, "train", "MONDRIAN=mondrian", "ADVISOR=weston")
    ours = {path: path.stat().st_mtime_ns for path in (place / "training_data").rglob("*") if path.is_file()}
    assert make(place, "train", "MONDRIAN=mondrian", "ADVISOR=ansel")[0] == [LINK, PREPARE, TRAIN]
    assert {path: path.stat().st_mtime_ns for path in ours} == ours
    assert make(place, "train", "MONDRIAN=mondrian", "ADVISOR=weston")[0] == []
    reports = [place / f"evaluation/{advisor}" for advisor in ("ansel", "weston")]
    for advisor, report in zip(("ansel", "weston"), reports, strict=True):
        make(place, "eval", f"ADVISOR={advisor}")
        assert (
            f"--output_report ./{report.relative_to(place)}/comparison_report.json" in (place / "log.txt").read_text()
        )


def test_an_evaluation_judges_the_adapter_that_is_there(place):
    make(place, "train", "MONDRIAN=mondrian")
    time.sleep(0.02)
    (place / "mondrian/mondrian.db").touch()
    assert make(place, "eval", "MONDRIAN=mondrian")[0] == [EVAL]
    assert make(place, "eval", "MONDRIAN=elsewhere")[0] == [EVAL]
    log = (place / "log.txt").read_text()
    assert "--val_data" not in log and "--base_model" not in log
    make(place, "eval", "VERSION=v2", "BASE_MODEL=other")
    log = (place / "log.txt").read_text()
    assert "--lora_path ./models/qwen3-vl-4b-lora-ansel-v2 --base_model other" in log


def test_without_an_adapter_evaluation_trains_one(place):
    assert make(place, "eval", "MONDRIAN=mondrian")[0] == [LINK, PREPARE, TRAIN, EVAL]


@pytest.mark.parametrize(("code", "fails"), [(0, False), (3, False), (4, False), (1, True), (2, True), (130, True)])
def test_a_finished_evaluation_does_not_end_in_an_error_of_make(place, code, fails):
    make(place, "train", "MONDRIAN=mondrian")
    (place / "codes" / EVAL).write_text(str(code))
    told = make(place, "eval", fails=fails)[1]
    assert ("Error" in told) is fails


def test_a_killed_training_is_not_taken_for_a_finished_one(place):
    (place / "killed").touch()
    told = make(place, "train", "MONDRIAN=mondrian", fails=True)[1]
    assert "Training did not finish; the same make command continues it." in told
    (place / "killed").unlink()
    assert make(place, "train", "MONDRIAN=mondrian")[0] == [TRAIN]


def test_a_failed_preparation_runs_again(place):
    (place / "codes" / PREPARE).write_text("1")
    make(place, "train", "MONDRIAN=mondrian", fails=True)
    (place / "codes" / PREPARE).write_text("0")
    assert make(place, "train", "MONDRIAN=mondrian")[0] == [PREPARE, TRAIN]


def test_the_scripts_know_the_variables_that_were_given(place):
    make(place, "link", "MONDRIAN=mondrian", "ADVISOR=mary ellen", "PYTHON=python3")
    told = (place / "training_data/training_data_mary ellen_manifest.jsonl").read_text()
    assert told == 'ADVISOR="mary ellen" MONDRIAN=mondrian\n'


def test_try_takes_photographs_with_and_without_spaces(place):
    (place / "my cat.jpg").touch()
    make(place, "try", "PHOTO=my cat.jpg", "VERSION=v1,v2")
    log = (place / "log.txt").read_text()
    assert "--photo my cat.jpg --lora_path" in log and "--versions v1,v2" in log
    make(place, "try", "PHOTO=a.jpg b.jpg")
    assert "--photo a.jpg --photo b.jpg" in (place / "log.txt").read_text()
    ran, told = make(place, "try", fails=True)
    assert ran == [] and "make try PHOTO=me.jpg" in told


def test_strict_and_json_reach_the_commands(place):
    logs = []
    for target in ("promote", "iterate", "versions", "eval"):
        for variables in ((), ("STRICT=1", "JSON=1")):
            make(place, target, "MONDRIAN=mondrian", *variables)
            logs.append((place / "log.txt").read_text().splitlines()[-1])
    assert [("--strict" in log, "--json" in log) for log in logs[1::2]] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert not any("--strict" in log or "--json" in log for log in logs[::2])

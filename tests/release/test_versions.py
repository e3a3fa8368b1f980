"""Versions and which is in use: promotion decides from the report again, rollback goes back, nothing is overwritten."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common.cli import IN_ROUND
from common.errors import UserError
from common.evaluation import comparison, gates
from common.files import read_json, sha256_file, write_json, write_jsonl
from common.release import promotion, rounds
from common.release.versions import main
from integration.lora_patch import versions
from integration.lora_patch.names import is_advisor
from tests.evaluation_case import evaluate, make_adapter, make_data, read_jsonl

QUICK = ("--max_tokens", 16, "--timing_examples", 0)
LOSS_ALONE = "".join(
    f"[{name}]\nenabled = false\n" for name in ("base_format", "tuned_format", "inference_time", "overhead")
)


def run(work: Path, command: str, *arguments: object) -> Result:
    given = [command, "--advisor", "ansel", "--work", str(work), *map(str, arguments)]
    result = CliRunner().invoke(main, given)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A folder with v1 (zeros), v2 (better) and v3 (sabotaged), each evaluated against the version before it."""
    work = tmp_path_factory.mktemp("rounds")
    data, models = make_data(work), work / "models"
    (work / "gates.toml").write_text(LOSS_ALONE)
    for number, climb in ((1, 0.0), (2, -3.0), (3, 3.0)):
        folder = make_adapter(
            versions.version_folder(models, "ansel", number), tiny_base, data, climb=climb, seed=number
        )
        deployed = versions.version_folder(models, "ansel", number - 1) if number > 1 else "none"
        out = work / "evaluation" / f"ansel-v{number}" / "comparison_report.json"
        arguments = ("--gates", work / "gates.toml", "--deployed", deployed, "--output_report", out, *QUICK)
        result = evaluate("--lora_path", folder, *arguments)
        assert result.exit_code == (4 if climb > 0 else 0), result.output
    return work


@pytest.fixture
def work(made, tmp_path):
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def record(work: Path) -> dict:
    return read_json(work / "models" / "ansel" / "deployed.json")


def test_promote_writes_the_record_that_the_service_reads(work):
    result = run(work, "promote", "--version", "v1")
    assert result.exit_code == 0, result.output
    found = record(work)
    folder = work / "models" / "ansel" / found["adapter"]
    assert (found["version"], found["advisor"], found["schema_version"], found["history"]) == ("v1", "ansel", 1, [])
    assert folder.resolve() == (work / "models" / "qwen3-vl-4b-lora-ansel").resolve()
    assert found["sha256"] == versions.adapter_hashes(folder)
    assert set(found["sha256"]) == {"adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"}
    assert found["base_fingerprint"] == read_json(folder / "training_args.json")["base_fingerprint"]
    kept = work / "models" / "ansel" / found["report"]
    assert read_json(kept)["verdict"]["promotable"] and kept.with_suffix(".html").is_file()
    assert "gate base_format was switched off" in found["rule"] and found["rule"] in result.output
    assert f"--lora_path {work.resolve()}/models/ansel/deployed.json" in result.output


def test_promote_and_roll_back_through_the_versions(work):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    assert run(work, "promote", "--version", "2").exit_code == 0
    assert record(work)["version"] == "v2"
    assert [earlier["version"] for earlier in record(work)["history"]] == ["v1"]
    assert "is in use already" in run(work, "promote", "--version", "v2").output
    assert run(work, "rollback").output == "ansel: back from v2 to v1\n"
    assert record(work)["version"] == "v1" and record(work)["history"] == []
    assert record(work)["rolled_back"]["version"] == "v2"
    assert run(work, "rollback").output == "ansel: back from v1 to the base alone\n"
    assert record(work)["adapter"] is None
    nothing = run(work, "rollback")
    assert nothing.exit_code == 1 and "nothing to go back from" in nothing.stderr


def test_sabotaged_version_is_not_promoted(work):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    assert run(work, "promote", "--version", "v2").exit_code == 0
    before = (work / "models" / "ansel" / "deployed.json").read_bytes()
    result = run(work, "promote")  # v3 is the newest
    assert result.exit_code == 1
    assert "v3 of ansel is not promoted, v2 stays in use" in result.stderr
    assert "Validation loss not worse than deployed: fail" in result.stderr
    assert (work / "models" / "ansel" / "deployed.json").read_bytes() == before


def test_report_that_only_claims_to_pass_is_computed_again(work):
    path = work / "evaluation" / "ansel-v3" / "comparison_report.json"
    report = read_json(path)
    for row in report["gates"]:
        row["verdict"] = "pass"
    report["verdict"] = {"passed": True, "failed": [], "comparisons": [], "cannot_conclude": []}
    write_json(path, report)
    result = run(work, "promote", "--version", "v3")
    assert result.exit_code == 1 and "Validation loss not worse than the base's: fail" in result.stderr


def test_adapter_changed_after_its_evaluation_is_not_promoted(work):
    folder = work / "models" / "qwen3-vl-4b-lora-ansel-v2"
    report = work / "evaluation" / "ansel-v2" / "comparison_report.json"
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"lora_dropout": 0.5})
    assert "no report of v2 as it is now" in run(work, "promote", "--version", "v2").stderr
    result = run(work, "promote", "--version", "v2", "--report", report)
    assert result.exit_code == 1 and "the adapter's files have changed since" in result.stderr


def test_report_against_another_version_than_the_one_in_use_does_not_count(work):
    assert run(work, "promote", "--version", "v2").exit_code == 0
    result = run(work, "promote", "--version", "v1")  # evaluated when nothing was in use
    assert result.exit_code == 1 and "does not compare with v2, which is in use" in result.stderr


def test_recorded_outputs_promote_nothing(work):
    path = work / "evaluation" / "ansel-v1" / "comparison_report.json"
    write_json(path, read_json(path) | {"recorded_outputs": "planted.jsonl"})
    result = run(work, "promote", "--version", "v1")
    assert result.exit_code == 1 and "not by running the model" in result.stderr


def test_stricter_gates_can_be_asked_for(work, tmp_path):
    gates = tmp_path / "strict.toml"
    gates.write_text("[tuned_format]\nat_least = 0.95\n")
    result = run(work, "promote", "--version", "v1", "--gates", gates)
    assert result.exit_code == 1 and "Tuned format compliance: fail" in result.stderr


def test_version_in_use_that_was_tampered_with_is_noticed(work):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    assert run(work, "promote", "--version", "v2").exit_code == 0
    with open(work / "models" / "qwen3-vl-4b-lora-ansel" / "adapters.safetensors", "ab") as file:
        file.write(b"x")
    result = run(work, "rollback")
    assert result.exit_code == 1 and "has changed or is gone (adapters.safetensors)" in result.stderr
    assert record(work)["version"] == "v2"


def test_list_shows_every_version_with_its_figures(work):
    run(work, "promote", "--version", "v1")
    output = run(work, "list").output
    rows = [line.split() for line in output.splitlines() if re.match(r"v\d", line)]
    assert [row[0] for row in rows[:3]] == ["v1", "v2", "v3"] and rows[0][1] == "*" and rows[1][2] == "3+10"
    assert [row[-1] for row in rows[:3]] == ["pass", "likely", "fail"]
    text = " ".join(output.split())
    assert "v1 is in use since" in text and "promoted as pass by the rule: every gate pass or likely" in text
    assert "models/ansel/deployed.json, put there by" in text and "history.jsonl" in text


def test_list_without_versions_says_how_to_train_one(tmp_path):
    result = run(tmp_path, "list")
    assert result.exit_code == 1 and "make train ADVISOR=ansel" in result.stderr


def test_unfinished_and_renamed_folders_are_no_versions(work):
    models = work / "models"
    (models / "qwen3-vl-4b-lora-ansel-v4").mkdir()
    shutil.copytree(models / "qwen3-vl-4b-lora-ansel-v2", models / "qwen3-vl-4b-lora-ansel-v2.replaced-1")
    shutil.copytree(models / "qwen3-vl-4b-lora-ansel-v2", models / "qwen3-vl-4b-lora-anselm")
    assert list(versions.find_versions(models, "ansel")) == [1, 2, 3]
    assert versions.parse_folder(models / "qwen3-vl-4b-lora-ansel-v12") == ("ansel", 12)
    assert "there is no finished version v4" in run(work, "promote", "--version", "v4", "--report", "x.json").stderr


def test_damaged_record_is_one_line(work):
    place = work / "models" / "ansel" / "deployed.json"
    place.parent.mkdir(exist_ok=True)
    for text, problem in (
        ("{", "cannot be read as JSON"),
        ("[]", "a JSON object"),
        ('{"schema_version": 9}', "schema 9"),
    ):
        place.write_text(text)
        result = run(work, "rollback")
        assert result.exit_code == 1 and problem in result.stderr


def test_second_round_at_the_same_time_is_kept_out(work):
    with promotion.locked(work / "models", "ansel"):
        result = run(work, "promote", "--version", "v1")
    assert result.exit_code == 1 and "another round, promotion or rollback is running" in result.stderr


@pytest.mark.parametrize("advisor", ["../x", "a/b", ".hidden", ""])
def test_advisor_is_a_name_and_no_path(tmp_path, advisor):
    result = CliRunner().invoke(main, ["list", "--advisor", advisor, "--work", str(tmp_path)])
    assert result.exit_code == 2


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def phases(monkeypatch, tiny_base):
    """The phases of a round, recorded; training writes an adapter whose quality the test sets, evaluation is real."""
    done = {"commands": [], "climb": -3.0, "data": None}

    def fake(title, script: str, arguments: list[str], more: str, accept: tuple = (), hosts=None) -> None:
        done["commands"].append((script, arguments, more))
        if hosts:
            assert "hosts" not in done
            done["hosts"] = (script, hosts)
        given = dict(zip(arguments[::2], arguments[1::2], strict=False))
        if script == "prepare_training_data.py":
            folder = Path(given["--output_dir"])
            for path, side in zip(done["data"], ("train", "val"), strict=True):
                target = folder / f"training_data_ansel_{side}.jsonl"  # the advisor's own
                if path != target:
                    shutil.copy(path, target)
        if script == "train_mlx_lora.py":
            make_adapter(Path(given["--output_dir"]), tiny_base, done["data"], climb=done["climb"], seed=9)
            (Path(given["--output_dir"]) / ".trained").touch()
        if script == "evaluate_lora.py":
            evaluate(*arguments, *QUICK, "--gates", done["gates"])

    monkeypatch.setattr(rounds, "_run", fake)
    return done


def test_round_trains_the_next_version_and_promotes_it(work, phases, tiny_base):
    phases.update(data=make_data(work), gates=work / "gates.toml")
    assert run(work, "promote", "--version", "v1").exit_code == 0
    shutil.rmtree(work / "models" / "qwen3-vl-4b-lora-ansel-v3")
    result = run(
        work,
        "iterate",
        "--mondrian",
        work,
        "--base_model",
        tiny_base,
        "--train_args",
        "--epochs 5",
        "--hosts",
        "hosts.json",
    )
    # v1 is in use, v2 exists: the next is v3, and it is compared with v1
    scripts = [script for script, _, _ in phases["commands"]]
    assert scripts == ["link_training_data.py", "prepare_training_data.py", "train_mlx_lora.py", "evaluate_lora.py"]
    assert phases["commands"][2][2] == "--epochs 5"
    assert phases["hosts"] == ("train_mlx_lora.py", Path("hosts.json"))  # no other phase is distributed
    assert str(work / "models" / "qwen3-vl-4b-lora-ansel-v3") in phases["commands"][2][1]
    assert phases["commands"][3][1][phases["commands"][3][1].index("--deployed") + 1].endswith("qwen3-vl-4b-lora-ansel")
    assert result.exit_code == 0, result.output
    assert (record(work)["version"], record(work)["history"][0]["version"]) == ("v3", "v1")
    told = " ".join(result.output.split("\n\n")[-1].split())
    assert "it is in use now in place of v1 (likely)." in told and "make rollback ADVISOR=ansel" in told
    assert f"--lora_path {work.resolve()}/models/ansel/deployed.json" in told


def test_round_keeps_the_version_in_use_when_a_gate_fails(work, phases, tiny_base):
    phases.update(data=make_data(work), gates=work / "gates.toml", climb=3.0)
    assert run(work, "promote", "--version", "v1").exit_code == 0
    hashes = {number: versions.adapter_hashes(path) for number, path in _all(work).items()}
    result = run(work, "iterate", "--base_model", tiny_base)
    assert result.exit_code == 4 and not result.stderr
    told = " ".join(result.output.split("\n\n")[-1].split())
    assert told.startswith("v4 of ansel was trained on 3 examples and judged on 10 held-out photographs; it is not")
    assert "Validation loss not worse than deployed: fail" in told and "not promoted, v1 stays in use" in told
    assert told.endswith(".html")
    assert record(work)["version"] == "v1"
    assert list((work / "models" / "ansel" / "reports").glob("v4-*.html"))
    assert {number: versions.adapter_hashes(path) for number, path in _all(work).items() if number < 4} == hashes


@pytest.mark.parametrize("climb", [3.0, -3.0])
def test_version_that_was_never_promoted_is_not_written_down_as_in_use(work, phases, tiny_base, climb):
    """v1 exists and was never promoted: the round compares with the base alone, and its record names no v1."""
    phases.update(data=make_data(work), gates=work / "gates.toml", climb=climb)
    for number in (2, 3):
        shutil.rmtree(versions.version_folder(work / "models", "ansel", number))
    result = run(work, "iterate", "--base_model", tiny_base)
    given = next(arguments for script, arguments, _ in phases["commands"] if script == "evaluate_lora.py")
    assert given[given.index("--deployed") + 1] == "none"
    if climb > 0:
        assert result.exit_code == 4 and "not promoted, the base alone stays in use" in " ".join(result.output.split())
        assert record(work)["adapter"] is None
    else:
        assert result.exit_code == 0 and record(work)["version"] == "v2"
        assert run(work, "rollback").output == "ansel: back from v2 to the base alone\n"


def test_phases_of_a_round_do_not_say_what_the_round_does_itself(monkeypatch):
    """Evaluation printed "Next: promote" above a paragraph that said that the version is in use."""
    given = {}

    def start(command, check, env):
        given.update(env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rounds.subprocess, "run", start)
    rounds._run("1/4 link", "link_training_data.py", [], "")
    assert given[IN_ROUND] and given["PATH"]


def test_a_strict_round_evaluates_strictly(work, phases, tiny_base):
    """Evaluation said "Ready to promote" of what the round then did not promote."""
    likely = work / "likely.toml"  # ten answers, none in the format: that few are, not shown to be
    likely.write_text(LOSS_ALONE + '[few]\nfigure = "format.strict"\nat_most = 0.1\n')
    phases.update(data=make_data(work), gates=likely)
    result = run(work, "iterate", "--base_model", tiny_base, "--strict")
    report = read_json(work / "evaluation" / "ansel-v4" / "comparison_report.json")["verdict"]
    assert (report["promotable"], report["strict"], report["word"]) == (False, True, "likely")
    assert result.exit_code == 3 and "not promoted" in result.output


def test_held_out_photographs_never_become_training_data(work, phases, tiny_base):
    train, val = make_data(work)
    write_jsonl(train, [*read_jsonl(train), read_jsonl(val)[4]])
    phases.update(data=(train, val), gates=work / "gates.toml")
    result = run(work, "iterate", "--base_model", tiny_base)
    assert result.exit_code == 1
    assert "training_data_ansel_train.jsonl:4: held out from v1" in result.stderr
    assert "train_mlx_lora.py" not in [script for script, _, _ in phases["commands"]]


def test_round_on_unchanged_data_says_so(made, capsys):
    have = versions.find_versions(made / "models", "ansel")
    rounds._tell_unchanged(made / "training_data" / "train.jsonl", have)
    assert "the training data are those of v3" in capsys.readouterr().out
    rounds._tell_unchanged(made / "training_data" / "val.jsonl", have)
    rounds._tell_unchanged(made / "training_data" / "train.jsonl", {})
    assert capsys.readouterr().out == ""


def _all(work: Path) -> dict[int, Path]:
    return versions.find_versions(work / "models", "ansel")


def test_record_is_plain_json(work):
    run(work, "promote", "--version", "v1")
    text = (work / "models" / "ansel" / "deployed.json").read_text()
    assert json.loads(text)["version"] == "v1" and text.endswith("}\n")


@pytest.mark.parametrize(
    "damage",
    [
        {"promoted_at": 5},
        {"history": ["v1"]},
        {"history": [{"version": "v1"}]},
        {"history": [{"version": "v1", "adapter": "../x", "sha256": []}]},
        {"report": 7},
        {"rolled_back": "v3"},
        {"sha256": {"adapter_config.json": None}},
        "[]",
        "",
    ],
)
def test_a_record_that_a_hand_has_spoilt_ends_in_one_line(work, damage):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    place = work / "models" / "ansel" / "deployed.json"
    place.write_text(json.dumps(record(work) | damage) if isinstance(damage, dict) else damage)
    spoilt = place.read_bytes()
    for command in (("list",), ("promote", "--version", "v2"), ("rollback",)):
        result = run(work, *command)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
        assert result.stderr.startswith(f"Error: {place}: ") and "restore the file" in result.stderr
    assert place.read_bytes() == spoilt


def test_a_record_of_an_earlier_form_is_read(work):
    """Without who, when and by which rule; and that of no version, without anything else."""
    assert run(work, "promote", "--version", "v1").exit_code == 0
    place = work / "models" / "ansel" / "deployed.json"
    old = {key: record(work)[key] for key in ("schema_version", "advisor", "version", "adapter", "sha256", "history")}
    write_json(place, old)
    assert "v1 is in use since a time that it does not tell" in " ".join(run(work, "list").stdout.split())
    assert run(work, "rollback").output == "ansel: back from v1 to the base alone\n"
    write_json(place, {"schema_version": 1, "adapter": None})
    assert run(work, "list").exit_code == 0
    assert run(work, "promote", "--version", "v1").exit_code == 0 and record(work)["version"] == "v1"


def test_history_whose_last_line_has_no_end_gains_a_line_of_its_own(work):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    path = work / "models" / "ansel" / "history.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert run(work, "rollback").exit_code == 0
    assert [row["action"] for row in read_jsonl(path)] == ["promoted", "rolled back"]


def test_there_is_no_version_0(work):
    result = run(work, "promote", "--version", "v0")
    assert result.exit_code == 1 and result.stderr == "Error: --version v0: v1, v2, ... was expected\n"


def test_history_keeps_who_when_what_and_by_which_rule(work):
    for command in (("promote", "--version", "v1"), ("promote", "--version", "v2"), ("rollback",)):
        assert run(work, *command).exit_code == 0
    path = work / "models" / "ansel" / "history.jsonl"
    lines = read_jsonl(path)
    assert [(line["action"], line["before"], line["version"]) for line in lines] == [
        ("promoted", None, "v1"), ("promoted", "v1", "v2"), ("rolled back", "v2", "v1"),
    ]  # fmt: skip
    for line in lines:
        assert "@" in line["by"] and line["at"].endswith("+00:00") and line["verdict"] in ("pass", "likely")
        kept = path.parent / line["report"]
        assert sha256_file(kept) == line["report_sha256"] and line["rule"].startswith("every gate pass or likely")
    before = path.read_bytes()
    assert run(work, "promote", "--version", "v1").exit_code == 0  # in use already: nothing to write
    assert path.read_bytes() == before
    assert run(work, "rollback").exit_code == 0
    assert path.read_bytes().startswith(before)


def test_record_without_its_line_in_the_history_is_written_down_first(work):
    """A crash between the two, or a record from before there was a history."""
    assert run(work, "promote", "--version", "v1").exit_code == 0
    path = work / "models" / "ansel" / "history.jsonl"
    path.unlink()
    assert run(work, "rollback").exit_code == 0
    assert [(line["action"], line["version"]) for line in read_jsonl(path)] == [
        ("found in use", "v1"), ("rolled back", None),
    ]  # fmt: skip


def test_list_as_json(work):
    run(work, "promote", "--version", "v1")
    found = json.loads(run(work, "list", "--json").output)["versions"]
    assert [(row["version"], row["verdict"], row["in_use"]) for row in found] == [
        ("v1", "pass", True), ("v2", "likely", False), ("v3", "fail", False),
    ]  # fmt: skip
    assert found[0]["record"].endswith("models/ansel/deployed.json") and found[1]["record"] is None
    assert found[0]["promotions"][0]["action"] == "promoted" and found[0]["figures"]["loss.nats"]["n"] == 10


def rejudged(monkeypatch, verdict: str) -> None:
    """Have one gate come out with this verdict when promotion judges the report again."""

    def decide(wanted, summary):
        rows = gates.decide(wanted, summary)
        return [row | ({"verdict": verdict} if row["name"] == "base_loss" else {}) for row in rows]

    monkeypatch.setattr(comparison, "decide", decide)


def test_likely_is_promotable_and_strict_wants_pass(work, monkeypatch):
    rejudged(monkeypatch, "likely")
    strict = run(work, "promote", "--version", "v1", "--strict")
    assert strict.exit_code == 1 and "Validation loss not worse than the base's: likely" in strict.stderr
    assert run(work, "promote", "--version", "v1").exit_code == 0
    assert record(work)["verdict"] == "likely"


def test_advisor_with_a_dot_has_versions_like_any_other(tmp_path):
    models = tmp_path / "models"
    for name in ("mary.ellen", "mary.ellen-v2", "mary.ellen.replaced-1", "mary"):
        folder = models / f"qwen3-vl-4b-lora-{name}"
        folder.mkdir(parents=True)
        (folder / "training_args.json").write_text("{}")
    assert list(versions.find_versions(models, "mary.ellen")) == [1, 2]
    assert versions.parse_folder(models / "qwen3-vl-4b-lora-mary.ellen-v2") == ("mary.ellen", 2)
    assert versions.parse_folder(models / "qwen3-vl-4b-lora-mary.ellen.replaced-1") == (None, 1)
    assert all(map(is_advisor, ("mary.ellen", "o_keeffe", "\u00e9lan", "a-b")))
    assert not any(map(is_advisor, ("ansel-v2", "ansel.replaced-1", "-x", "a/b", "ansel\n", "")))


def test_record_means_the_same_from_every_folder(work, monkeypatch, tmp_path):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    absolute = versions.deployed_folder(work / "models" / "ansel" / "deployed.json")
    for folder in (work, work / "models", work / "models" / "ansel"):
        monkeypatch.chdir(folder)
        relative = Path(os.path.relpath(work / "models" / "ansel" / "deployed.json"))
        assert versions.deployed_folder(relative).resolve() == absolute.resolve()
    shutil.move(work / "models", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert versions.deployed_folder(Path("elsewhere/ansel/deployed.json")).is_dir()


def test_training_without_its_end_marker_is_not_evaluated(work, phases, tiny_base, monkeypatch):
    """mlx.launch exits 0 after a process of its was killed."""
    phases.update(data=make_data(work), gates=work / "gates.toml")
    monkeypatch.setattr(Path, "touch", lambda path: None)
    result = run(work, "iterate", "--base_model", tiny_base, "--hosts", "hosts.json")
    assert result.exit_code == 1 and "training did not finish" in result.stderr
    assert "evaluate_lora.py" not in [script for script, _, _ in phases["commands"]]


def test_round_that_was_interrupted_goes_on_with_its_version(work, phases, tiny_base, monkeypatch):
    phases.update(data=make_data(work), gates=work / "gates.toml")
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_evaluate", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(work, "iterate", "--base_model", tiny_base).exit_code == 130
    result = run(work, "iterate", "--base_model", tiny_base)
    assert "Round for ansel: v4" in result.output and 5 not in _all(work)
    assert "the training data are those of v4" not in result.output
    assert not (work / "models" / "ansel" / "round.json").exists()


def test_two_advisors_in_one_folder_share_no_file(work, tiny_base, monkeypatch):
    """Each phase is told names of the advisor's own for all that it writes."""
    written = {}

    def record(title, script, arguments, more, **rest):
        given = dict(zip(arguments[::2], arguments[1::2], strict=False))
        named = {
            key: given[key] for key in ("--output_file", "--manifest", "--train_data", "--val_data") if key in given
        }
        named |= {key: given[key] for key in ("--output_report",) if key in given}
        if script != "link_training_data.py" and script != "prepare_training_data.py":
            named["folder"] = given.get("--output_dir") or given["--lora_path"]
        written.setdefault(given.get("--advisor") or advisor, []).extend(map(str, named.values()))
        if script == "train_mlx_lora.py":
            Path(given["--output_dir"]).mkdir()
            (Path(given["--output_dir"]) / ".trained").touch()

    monkeypatch.setattr(rounds, "_run", record)
    monkeypatch.setattr(rounds, "refuse_held_out", lambda *given: None)
    monkeypatch.setattr(rounds, "_tell_unchanged", lambda *given: None)
    for advisor in ("ansel", "mary.ellen"):
        options = rounds.RoundOptions(advisor=advisor, work=work, base_model=str(tiny_base))
        with pytest.raises(UserError, match="evaluation wrote no report"):
            rounds.run_round(options)
    ansel, mary = (set(written[advisor]) for advisor in ("ansel", "mary.ellen"))
    assert len(ansel) == len(mary) == 6 and not ansel & mary
    assert "training_data_mary.ellen_manifest.jsonl" in mary
    assert str(work / "models" / "qwen3-vl-4b-lora-mary.ellen") in mary


@pytest.mark.parametrize("content", [{"version": 2}, {"version": "x"}, [], {"version": 0}])
def test_what_is_left_of_a_decided_round_or_damaged_is_not_gone_on_with(work, content):
    assert run(work, "promote", "--version", "v1").exit_code == 0
    assert run(work, "promote", "--version", "v2").exit_code == 0
    path = work / "models" / "ansel" / "round.json"
    write_json(path, content)
    assert rounds._interrupted(path, versions.version_folder(work / "models", "ansel", 2)) is None
    write_json(path, {"version": 3})
    assert rounds._interrupted(path, versions.version_folder(work / "models", "ansel", 2)) == 3

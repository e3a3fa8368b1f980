"""Versions and which is in use: promotion decides from the report anew, rollback goes back, nothing is overwritten."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common.files import read_json, write_json, write_jsonl
from common.release import rounds, versions
from tests.evaluation_case import evaluate, make_adapter, make_data, read_jsonl

QUICK = ("--max_tokens", 16, "--timing_examples", 0)
LOSS_ALONE = "".join(
    f"[{name}]\nenabled = false\n" for name in ("base_format", "tuned_format", "inference_time", "overhead")
)


def run(work: Path, command: str, *arguments: object) -> Result:
    given = [command, "--advisor", "ansel", "--work", str(work), *map(str, arguments)]
    result = CliRunner().invoke(versions.main, given)
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
        assert result.exit_code == (1 if climb > 0 else 0), result.output
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
    assert read_json(kept)["verdict"]["passed"] and kept.with_suffix(".html").is_file()
    assert "note: gate base_format was switched off" in result.output


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
    lines = run(work, "list").output.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["*", "v1"], ["v2", "3"], ["v3", "3"]]
    assert "not evaluated" not in "".join(lines)
    assert lines[3].split("nats a token")[1].split()[-3:-1] == ["2", "failed"]


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
    for text, problem in (("{", "not valid JSON"), ("[]", "a JSON object"), ('{"schema_version": 9}', "schema 9")):
        place.write_text(text)
        result = run(work, "rollback")
        assert result.exit_code == 1 and problem in result.stderr


def test_second_round_at_the_same_time_is_kept_out(work):
    with versions.locked(work / "models", "ansel"):
        result = run(work, "promote", "--version", "v1")
    assert result.exit_code == 1 and "another round, promotion or rollback is running" in result.stderr


@pytest.mark.parametrize("advisor", ["../x", "a/b", ".hidden", ""])
def test_advisor_is_a_name_and_no_path(tmp_path, advisor):
    result = CliRunner().invoke(versions.main, ["list", "--advisor", advisor, "--work", str(tmp_path)])
    assert result.exit_code == 2


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def phases(monkeypatch, tiny_base):
    """The phases of a round, recorded; training writes an adapter whose quality the test sets, evaluation is real."""
    done = {"commands": [], "climb": -3.0, "data": None}

    def fake(title, script: str, arguments: list[str], more: str, may_fail: bool = False, hosts=None) -> None:
        done["commands"].append((script, arguments, more))
        if hosts:
            assert "hosts" not in done
            done["hosts"] = (script, hosts)
        given = dict(zip(arguments[::2], arguments[1::2], strict=False))
        if script == "prepare_training_data.py":
            folder = Path(given["--output_dir"])
            for path, side in zip(done["data"], ("train", "val"), strict=True):
                target = folder / f"training_data_ansel_{side}.jsonl"
                if path != target:
                    shutil.copy(path, target)
        if script == "train_mlx_lora.py":
            make_adapter(Path(given["--output_dir"]), tiny_base, done["data"], climb=done["climb"], seed=9)
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


def test_round_keeps_the_version_in_use_when_a_gate_fails(work, phases, tiny_base):
    phases.update(data=make_data(work), gates=work / "gates.toml", climb=3.0)
    assert run(work, "promote", "--version", "v1").exit_code == 0
    hashes = {number: versions.adapter_hashes(path) for number, path in _all(work).items()}
    result = run(work, "iterate", "--base_model", tiny_base)
    assert result.exit_code == 1
    assert "v4 of ansel is not promoted, v1 stays in use" in result.stderr
    assert "Validation loss not worse than deployed: fail" in result.stderr
    assert record(work)["version"] == "v1"
    assert list((work / "models" / "ansel" / "reports").glob("v4-*.html"))
    assert {number: versions.adapter_hashes(path) for number, path in _all(work).items() if number < 4} == hashes


def test_round_without_a_record_is_measured_against_the_newest_and_can_be_rolled_back_to_it(work, phases, tiny_base):
    phases.update(data=make_data(work), gates=work / "gates.toml")
    for number in (2, 3):
        shutil.rmtree(work / "models" / f"qwen3-vl-4b-lora-ansel-v{number}")
    result = run(work, "iterate", "--base_model", tiny_base)
    assert result.exit_code == 0, result.output
    assert record(work)["version"] == "v2"
    assert run(work, "rollback").output == "ansel: back from v2 to v1\n"


@pytest.mark.parametrize(
    ("earlier", "stays", "adapter"), [(1, "v1", "../qwen3-vl-4b-lora-ansel"), (0, "the base alone", None)]
)
def test_rejected_version_is_never_the_one_that_the_service_takes(work, phases, tiny_base, earlier, stays, adapter):
    """Where no record is, the service takes the newest version: a round leaves none without a record."""
    phases.update(data=make_data(work), gates=work / "gates.toml", climb=3.0)
    for number in range(earlier + 1, 4):
        shutil.rmtree(versions.version_folder(work / "models", "ansel", number))
    result = run(work, "iterate", "--base_model", tiny_base)
    assert result.exit_code == 1
    assert f"v{earlier + 1} of ansel is not promoted, {stays} stays in use" in result.stderr
    assert record(work)["adapter"] == adapter


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

"""After a power cut, and after damage to any file of a run's folder, a run resumes exactly or says why not."""

import json
import os
import shutil

import pytest

import train_mlx_lora
from common.training import loop
from common.training.checkpoint import Checkpoints
from common.training.log import read_log
from tests.training.power_cut import Disk
from tests.training_sample import adapter_bytes, log_of, train_here, write_dataset

SETTINGS = ("--epochs", 3, "--save_freq", 3, "--output_dir", "run")  # 4 steps an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base):
    """A folder with data and the adapter of an uninterrupted run; not to be written to."""
    folder = write_dataset(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_here(tiny_base, *SETTINGS).exit_code == 0
    return folder


class PowerCut(BaseException):
    pass


CUTS = {  # where the power fails: before the step of this number, or while the adapter is delivered
    "after the first checkpoint": 4,
    "in the middle": 7,
    "before the last step": 11,
    "in the delivery": None,
}


@pytest.mark.parametrize("when", CUTS)
def test_a_power_cut_loses_nothing_that_a_checkpoint_holds(when, whole, tiny_base, tmp_path, monkeypatch):
    data = shutil.copytree(whole, tmp_path / "data", ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(data)
    with monkeypatch.context() as patch:
        disk = Disk(data, patch)
        dispatch, write = loop.dispatch, train_mlx_lora.deliver

        def cut(run, step, *arguments):
            if step == CUTS[when]:
                raise PowerCut
            return dispatch(run, step, *arguments)

        def cut_late(run):
            patch.setattr("common.training.export.write_card", lambda *_: (_ for _ in ()).throw(PowerCut))
            write(run)

        patch.setattr(loop, "dispatch", cut)
        patch.setattr(train_mlx_lora, "deliver", cut_late)
        with pytest.raises(PowerCut):
            train_here(tiny_base, *SETTINGS)
        survived = disk.after_power_cut(tmp_path / "survived")
    monkeypatch.chdir(survived)
    assert not (survived / "run/.trained").exists()
    result = train_here(tiny_base, *SETTINGS, "--resume")
    assert result.exit_code == 0, result.output
    assert "continuing after step" in result.output
    assert adapter_bytes(survived / "run") == adapter_bytes(whole / "run")
    kept = [(row["kind"], row["step"], row["loss"]) for row in log_of(whole / "run")]
    assert [(row["kind"], row["step"], row["loss"]) for row in log_of(survived / "run")] == kept


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def undelivered(whole, tmp_path, monkeypatch):
    """A run that has taken its last step but whose adapter is not delivered, as the working directory."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    for name in ("training_args.json", "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors",
                 "README.md", ".trained"):  # fmt: skip
        (folder / "run" / name).unlink()
    monkeypatch.chdir(folder)
    return folder / "run"


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "null": lambda path: path.write_text("null\n"),
    "other types": lambda path: path.write_text('{"state.json": 5, "step": "x", "kind": [], "loss": null}\n'),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", ["gone", "empty", "other types"])
def test_a_damaged_log_costs_nothing(damage, undelivered, whole, tiny_base):
    DAMAGE[damage](undelivered / "training_log.jsonl")
    result = train_here(tiny_base, *SETTINGS, "--resume")
    assert result.exit_code == 0, result.output
    assert adapter_bytes(undelivered) == adapter_bytes(whole / "run")
    result, expected = (json.loads((run / "training_args.json").read_text()) for run in (undelivered, whole / "run"))
    assert result["verdict"] == expected["verdict"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "log.jsonl", "adapter.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(name, damage, undelivered, capsys):
    newest = undelivered / "checkpoints/step-000012"
    DAMAGE[damage](newest / name)
    found, state = Checkpoints(undelivered / "checkpoints", 2).newest()
    assert found.name == "step-000009" and state["position"]["step"] == 9
    assert f"{newest} is damaged (" in capsys.readouterr().err


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(undelivered, whole, tiny_base):
    (undelivered / "checkpoints/step-000012/manifest.json").write_text("[]")
    result = train_here(tiny_base, *SETTINGS, "--resume")
    assert result.exit_code == 0 and "continuing after step 9" in result.output, result.output
    assert adapter_bytes(undelivered) == adapter_bytes(whole / "run")


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_whole_lines_of_a_damaged_log_are_read(damage, undelivered):
    path = undelivered / "training_log.jsonl"
    rows = read_log(path, 12)
    assert len(rows) == 16
    DAMAGE[damage](path)
    assert read_log(path, 12) == (rows[: len(read_log(path, 12))] if damage == "cut" else [])


def test_a_checkpoint_of_a_version_without_a_log_and_no_log_beside_it_ends_well(undelivered, whole, tiny_base):
    """Nothing is known of the losses then but the best one: the verdict says so."""
    checkpoint = undelivered / "checkpoints/step-000012"
    (checkpoint / "log.jsonl").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["log.jsonl"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(undelivered / "training_log.jsonl", 0)
    result = train_here(tiny_base, *SETTINGS, "--resume")
    assert result.exit_code == 0, result.output
    assert "Warning: the log of this run is lost" in result.output
    assert "Warning: the base model's validation loss is lost" in result.output
    assert adapter_bytes(undelivered) == adapter_bytes(whole / "run")

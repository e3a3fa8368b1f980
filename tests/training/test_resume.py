"""Nothing is lost: killed, stopped, out of disk or resumed on other data, a run goes on exactly or says why not."""

import contextlib
import errno
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

import train_mlx_lora
from common.errors import UserError
from common.model.tensors import HostArray
from common.records import software_versions
from common.training import loop
from common.training.checkpoint import STATE_KEYS, Checkpoints, damage
from common.training.run_folder import TRAINED, RunFolder
from tests.training_sample import (
    TRAIN,
    VAL,
    adapter_bytes,
    edit_row,
    log_of,
    train_here,
    trainer_command,
    write_dataset,
)

SETTINGS = ("--epochs", 4, "--save_freq", 3, "--batch_size", 1, "--gradient_accumulation_steps", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_base):
    """A folder with data, and the adapter of an uninterrupted run in whole/; each test writes elsewhere."""
    folder = write_dataset(tmp_path_factory.mktemp("resume"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_here(tiny_base, *SETTINGS, "--output_dir", "whole").exit_code == 0
    return folder


def finish_here(base: Path, name: str) -> None:
    """Resume the run in ``name`` and expect the bytes of the uninterrupted one."""
    result = train_here(base, *SETTINGS, "--output_dir", name, "--resume")
    assert result.exit_code == 0, result.output
    assert adapter_bytes(Path(name)) == adapter_bytes(Path("whole"))


def steps_logged(adapter: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (adapter / "training_log.jsonl").read_text().count('"train"')
    return 0


def test_killed_at_random_moments_it_ends_with_the_same_bytes(data, tiny_base, monkeypatch):
    """SIGKILL in a loop, at moments that no test chose; every time the newest checkpoint is whole."""
    monkeypatch.chdir(data)
    rng, killed, adapter = random.Random(), 0, Path("killed")
    command = trainer_command(tiny_base, *SETTINGS, "--output_dir", "killed", "--resume")
    for target in (3, 10):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            while run.poll() is None and steps_logged(adapter) < target:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
            run.send_signal(signal.SIGKILL)
        killed += run.returncode == -signal.SIGKILL
        folders = [path for path in (adapter / "checkpoints").glob("step-*")]
        assert all(damage(path) is None for path in folders)
    assert killed
    finish_here(tiny_base, "killed")
    whole, resumed = log_of(data / "whole"), log_of(adapter)
    assert [(row["kind"], row["step"], row["loss"]) for row in whole] == [
        (row["kind"], row["step"], row["loss"]) for row in resumed
    ]


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    command = trainer_command(tiny_base, *SETTINGS, "--output_dir", "a stop")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and steps_logged(Path("a stop")) < 2:
            time.sleep(0.002)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate()
    assert run.returncode == 143, errors
    found, state = Checkpoints(Path("a stop/checkpoints"), 2).newest()
    step = state["position"]["step"]
    assert errors.splitlines()[-2:] == [
        f"SIGTERM: stopped after step {step} of 16, saved in a stop/checkpoints/{found.name}; continue with:",
        "  python " + shlex.join([*command[1:], "--resume"]),
    ]
    finish_here(tiny_base, "a stop")


def test_control_c_does_so_too(data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    dispatch = loop.dispatch

    def interrupted_in_step_5(run, step, *arguments):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return dispatch(run, step, *arguments)

    monkeypatch.setattr(loop, "dispatch", interrupted_in_step_5)
    result = train_here(tiny_base, *SETTINGS, "--output_dir", "interrupted")
    assert result.exit_code == 130
    assert "SIGINT: stopped after step 5 of 16, saved in interrupted/checkpoints/step-000005" in result.stderr
    monkeypatch.setattr(loop, "dispatch", dispatch)
    del result  # its traceback holds the run, and with it the folder's lock
    finish_here(tiny_base, "interrupted")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(data, tiny_base, monkeypatch):
    """The kernel refuses the second checkpoint's bytes, through a limit on the size of files."""
    monkeypatch.chdir(data)
    save, soft_hard = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk(self, step, *rest):
        if step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft_hard[1]))
        try:
            return save(self, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)

    monkeypatch.setattr(Checkpoints, "save", save_on_a_small_disk)
    result = train_here(tiny_base, *SETTINGS, "--output_dir", "full")
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: the checkpoint of step 4 could not be written: ")
    assert message.endswith("full/checkpoints/step-000003 is whole: free space, then --resume")
    assert [path.name for path in Path("full/checkpoints").iterdir()] == ["step-000003"]
    monkeypatch.setattr(Checkpoints, "save", save)
    del result  # its traceback holds the run, and with it the folder's lock
    finish_here(tiny_base, "full")


def test_killed_while_delivering_it_delivers_on_resume(data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    shutil.copytree("whole", "undelivered")
    Path("undelivered/.loss_curve.png.killed.tmp").touch()
    for name in ("training_args.json", "adapters.safetensors", "adapter_config.json"):
        Path("undelivered", name).unlink()
    result = train_here(tiny_base, *SETTINGS, "--output_dir", "undelivered", "--resume")
    assert result.exit_code == 0 and "continuing after step 16" in result.output
    assert not list(Path("undelivered").glob("*.tmp"))
    assert adapter_bytes(data / "undelivered") == adapter_bytes(data / "whole")


def test_rows_on_disk_give_the_same_adapter_and_are_mended(data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    options = (*SETTINGS, "--output_dir", "disk", "--feature_cache", "disk")
    monkeypatch.setattr(
        train_mlx_lora, "train_loop", lambda run, stop: (_ for _ in ()).throw(UserError("stopped here"))
    )
    assert train_here(tiny_base, *options).exit_code == 1
    rows = sorted(Path(".disk.cache").iterdir())
    assert len(rows) == 10
    damaged = bytearray(rows[0].read_bytes())
    damaged[-1] ^= 1  # what a bad disk does
    rows[0].write_bytes(damaged)
    rows[1].write_bytes(rows[1].read_bytes()[:100])  # what a power loss does
    monkeypatch.undo()
    monkeypatch.chdir(data)
    assert train_here(tiny_base, *options).exit_code == 0
    assert adapter_bytes(data / "disk") == adapter_bytes(data / "whole")
    assert not Path(".disk.cache").exists()


# -- what may not be resumed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, tiny_base):
    """A folder with data and a run that was stopped after its first epoch."""
    folder = write_dataset(tmp_path_factory.mktemp("unfinished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_mlx_lora, "deliver", lambda run: None)
        assert train_here(tiny_base, "--epochs", 1, "--output_dir", "run").exit_code == 0
    (folder / "run" / TRAINED).unlink()
    return folder


@pytest.fixture
def stopped(unfinished, tmp_path, monkeypatch):
    shutil.copytree(unfinished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def drop_row(folder):
    lines = (folder / TRAIN).read_text().splitlines(keepends=True)
    (folder / TRAIN).write_text("".join(lines[:-1]))


def other_photo(folder):
    Image.new("RGB", (128, 128), "red").save(folder / "photos/0.jpg")
    edit_row(folder / TRAIN, 0, image_sha256="")


CHANGES = {
    "a row less": (drop_row, "the training data was 7 examples, SHA-256", "(1 photographs gone, 0 new)"),
    "another photograph": (other_photo, "the training data was 7 examples", "(1 photographs gone, 1 new)"),
    "another text": (
        lambda folder: edit_row(folder / TRAIN, 0, response="{}"),
        "the training data was 7 examples",
        "(the texts or their order changed)",
    ),
    "no validation": (
        lambda folder: (folder / VAL).unlink(),
        "the validation data was 3 examples, SHA-256",
        "now none",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_on_changed_data_is_refused_with_the_difference(name, stopped, tiny_base):
    change, *words = CHANGES[name]
    change(stopped)
    before = {path: path.read_bytes() for path in (stopped / "run").rglob("*") if path.is_file()}
    result = train_here(tiny_base, "--output_dir", "run", "--resume")
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: run: cannot resume another run's checkpoint: ")
    assert all(word in message for word in words), message
    assert {path: path.read_bytes() for path in (stopped / "run").rglob("*") if path.is_file()} == before


def test_resuming_with_other_settings_is_refused_with_all_differences(stopped, tiny_base):
    result = train_here(tiny_base, "--output_dir", "run", "--resume", "--lora_r", 8, "--epochs", 5, "--save_freq", 7)
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]
    assert "lora_r was 16, now 8" in message and "epochs was 1, now 5" in message and "save_freq" not in message


def test_resuming_with_another_base_is_refused(stopped, tiny_base, make_tiny_model, tmp_path):
    other = make_tiny_model(tmp_path / "other", "--seed", "9")
    result = train_here(other, "--output_dir", "run", "--resume")
    assert result.exit_code == 1
    assert "the adapter's base has the same shape but other weights" in result.stderr.splitlines()[-1]


def test_the_advice_for_a_full_device_can_be_followed(data, tiny_base, monkeypatch):
    """Its options change the layout in memory: allowed on resume, with a word on exactness; the data stay the same."""
    monkeypatch.chdir(data)
    steps, compute = iter(range(100)), loop.packed_loss_and_grads

    def full(*arguments, **options):
        if next(steps) == 9:
            raise RuntimeError("[malloc] Unable to allocate 99 bytes")
        return compute(*arguments, **options)

    options = ("--epochs", 4, "--save_freq", 3, "--batch_size", 2, "--output_dir", "full device")
    monkeypatch.setattr(loop, "packed_loss_and_grads", full)
    result = train_here(tiny_base, *options)
    assert result.exit_code == 1
    assert "--resume --grad_checkpointing on --micro_batch_size 1" in result.stderr.splitlines()[-1]
    monkeypatch.setattr(loop, "packed_loss_and_grads", compute)
    del result  # its traceback holds the run, and with it the folder's lock
    advice = ("--resume", "--grad_checkpointing", "on", "--micro_batch_size", 1, "--pad_multiple", 32)
    result = train_here(tiny_base, *options, *advice)
    assert result.exit_code == 0, result.output
    assert "the layout in memory is another than before" in result.stderr and "continuing after step 9" in result.output
    layout = json.loads(Path("full device/training_args.json").read_text())["layout"]
    assert (layout["micro"], layout["checkpointing"], layout["multiple"]) == (1, True, 32)
    seen = [row["step"] for row in log_of(Path("full device")) if row["kind"] == "train"]
    assert seen == list(range(1, 17))


def weights(folder: Path) -> None:
    """Change one number in the middle of the largest tensor, far beyond its first 4 KiB."""
    tensors = mx.load(str(folder / "model.safetensors"))
    name = max(tensors, key=lambda name: tensors[name].size)
    flat = tensors[name].reshape(-1)
    flat[flat.size // 2] += 1
    tensors[name] = flat.reshape(tensors[name].shape)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


def chat_template(folder: Path) -> None:
    for path in folder.glob("chat_template.*"):
        path.write_text(path.read_text().replace("assistant", "critic"))


def tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"] = value["model"]["merges"][:-200]
    path.write_text(json.dumps(value))


def vision_tower(folder: Path) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    name = next(name for name in sorted(tensors) if "visual" in name or "vision" in name)
    tensors[name] = tensors[name] * 2
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


BASES = {
    weights: "other weights",
    vision_tower: "other weights",
    chat_template: "chat template",
    tokenizer: "tokenizer is another",
}


@pytest.mark.parametrize("change", BASES, ids=lambda change: change.__name__)
def test_resuming_after_the_base_changed_in_place_is_refused(change, stopped, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    state = stopped / "run/checkpoints/step-000004/state.json"
    assert train_here(base, "--output_dir", "run", "--resume").exit_code == 0, "a copy is the same base"
    change(base)
    (stopped / "run/training_args.json").unlink()
    result = train_here(base, "--output_dir", "run", "--resume")
    assert result.exit_code == 1 and state.exists()
    assert BASES[change] in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize("change", [vision_tower, chat_template, tokenizer], ids=lambda change: change.__name__)
def test_rows_that_a_killed_run_left_on_disk_serve_no_other_base(change, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(write_dataset(tmp_path / "data", train=2, val=1))
    base = shutil.copytree(tiny_base, tmp_path / "base")
    options = ("--output_dir", "run", "--feature_cache", "disk", "--epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train_mlx_lora, "train_loop", lambda run, stop: (_ for _ in ()).throw(UserError("killed")))
        assert train_here(base, *options).exit_code == 1
    before = set(Path(".run.cache").iterdir())
    assert len(before) == 3
    change(base)
    with monkeypatch.context() as patch:
        patch.setattr(train_mlx_lora, "train_loop", lambda run, stop: (_ for _ in ()).throw(UserError("killed")))
        assert train_here(base, *options).exit_code == 1
    assert len(set(Path(".run.cache").iterdir()) - before) == 3


def test_an_unfinished_run_is_not_overwritten_unasked(stopped, tiny_base):
    result = train_here(tiny_base, "--output_dir", "run")
    assert result.exit_code == 1
    assert "run: holds an unfinished run (step 4); give --resume" in result.stderr.splitlines()[-1]


def test_a_finished_adapter_without_checkpoints_is_not_lost_by_resuming(data, tiny_base, monkeypatch):
    monkeypatch.chdir(data)
    shutil.copytree("whole", "bare")
    shutil.rmtree("bare/checkpoints")
    result = train_here(tiny_base, *SETTINGS, "--output_dir", "bare", "--resume")
    assert result.exit_code == 1 and "bare: holds a finished adapter" in result.stderr.splitlines()[-1]
    assert adapter_bytes(Path("bare")) == adapter_bytes(Path("whole"))


def test_two_runs_do_not_share_a_folder(stopped, tiny_base):
    folder = RunFolder(stopped / "run", 2)
    folder.claim(fresh=False)
    try:
        result = train_here(tiny_base, "--output_dir", "run", "--resume")
        other = train_here(tiny_base, "--output_dir", "run", "--overwrite")
    finally:
        folder.lock.close()
    for refused in (result, other):
        assert refused.exit_code == 1 and "another run is training here" in refused.stderr.splitlines()[-1]
    assert not Path("run.replaced-1").exists()


def test_the_lock_of_a_process_that_is_ending_is_waited_for(tmp_path):
    """A killed process holds it until its memory is given back; the other one saves in its stead."""
    assert not RunFolder(tmp_path / "nothing", 2).take(0.1)
    first, second = RunFolder(tmp_path / "run", 2), RunFolder(tmp_path / "run", 2)
    first.claim(fresh=True)
    assert not second.take(0.2)
    threading.Timer(0.3, first.lock.close).start()
    assert second.take(5)


def test_other_versions_are_said(stopped, tiny_base, monkeypatch):
    monkeypatch.setattr("common.training.setup.software_versions", lambda: dict.fromkeys(software_versions(), "9.9"))
    result = train_here(tiny_base, "--output_dir", "run", "--resume")
    assert "; mlx-vlm 0.7.10, now 9.9" in result.stderr and "the adapter may differ in rounding" in result.stderr


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saved(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(
            step, {"adapter": {"a": HostArray.of(mx.full((4,), step))}}, {**dict.fromkeys(STATE_KEYS), "step": step}, []
        )


def test_the_newest_whole_checkpoint_is_found_whatever_happened_to_the_others(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=9)
    assert checkpoints.newest() is None
    saved(checkpoints, 1, 2, 3, 4, 5)
    (checkpoints.path(5) / "manifest.json").unlink()  # half removed
    tensors = checkpoints.path(4) / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")  # a bad disk
    (checkpoints.path(3) / "state.json").unlink()
    (tmp_path / ".writing-1-000006").mkdir()  # a kill in mid-write
    path, state = checkpoints.newest()
    assert path == checkpoints.path(2) and state["step"] == 2
    errors = capsys.readouterr().err
    assert "adapter.safetensors has changed since it was written" in errors and "state.json is missing" in errors
    checkpoints.sweep()
    assert not (tmp_path / ".writing-1-000006").exists()


def test_the_newest_are_kept_and_a_step_can_come_by_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved(checkpoints, 10, 20, 30, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000030"]
    assert damage(checkpoints.path(20)) is None


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved(checkpoints, 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.training.checkpoint.write_manifest", full)
    with pytest.raises(UserError) as error:
        saved(checkpoints, 2)
    assert error.value.message == (
        f"the checkpoint of step 2 could not be written: No space left on device; {checkpoints.path(1)} is whole: "
        "free space, then --resume"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_checkpoint_tells_all_that_a_run_is(stopped):
    _, state = Checkpoints(stopped / "run/checkpoints", 2).newest()
    assert set(state) == {
        "schema_version", "position", "random_state", "settings", "layout", "processes", "train_data", "val_data",
        "base_fingerprint", "versions",
    }  # fmt: skip
    assert state["random_state"] == {"seed": 0, "step": 4}
    assert json.loads(json.dumps(state)) == state

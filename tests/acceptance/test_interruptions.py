"""Training interrupted in every way: many kills of one process, and the loss of one of two at a real adapter's size.

    KILLS=100 python -m pytest -s tests/acceptance/test_interruptions.py

Makes a tiny base and a small training set in a temporary folder. The kills come at random moments of the whole run,
every third one in its last second, while the adapter is delivered; every run must end with the bytes of one that was
not interrupted. The two processes train 33 million parameters, as rank 16 on all projections of Qwen3-VL-4B does.
Linux only: a process is forked for each kill, and a full disk is a limit on the size of files.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.training.checkpoint import Checkpoints, damage
from tests.training.ring import Ring
from tests.training_sample import ROOT, TRAIN, adapter_bytes, write_dataset

KILLS = int(os.environ.get("KILLS", 20))
SETTINGS = ("--epochs", "3", "--save_freq", "3")
LARGE = ("--lora_r", 8064, "--batch_size", 1, "--epochs", 1, "--learning_rate", 1e-4, "--no_auto_memory")
WITHIN = 30  # seconds


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("interrupted"))
    made = [sys.executable, str(ROOT / "tests/sample/make_tiny_model.py"), "--output_dir", str(folder / "base")]
    subprocess.run(made, check=True, capture_output=True)
    return folder


def start(folder: Path, name: str) -> int:
    """Fork a process that trains, with everything imported already; return its id."""
    import transformers.models.qwen3_vl  # noqa: F401

    import train_mlx_lora

    if pid := os.fork():
        return pid
    with open(folder / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.argv = ["train_mlx_lora.py", "--train_data", TRAIN, "--base_model", "base", "--output_dir", name, *SETTINGS]
    sys.argv += ["--resume"]
    try:
        train_mlx_lora.main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(0)


def ended(pid: int) -> int | None:
    """Return the exit code of a child, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def test_kills_at_every_moment_end_with_the_same_bytes(data):
    rng, began = random.Random(7), time.monotonic()
    pid = start(data, "whole")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - began
    assert code == 0, (data / "output.txt").read_text()
    killed, runs, late = 0, 0, 0
    while killed < KILLS:
        name = f"run {runs}"
        runs += 1
        finished = False
        while not finished:
            pid, wants_late = start(data, name), rng.random() < 1 / 3
            last, until = data / name / "checkpoints/step-000012", time.monotonic() + rng.uniform(0, seconds)
            while ended_with(pid) is None:
                if last.is_dir() if wants_late else time.monotonic() > until:
                    time.sleep(rng.uniform(0, 1) if wants_late else 0)
                    os.kill(pid, signal.SIGKILL)
                    late += wants_late
                    wants_late, until = False, float("inf")
                time.sleep(0.002)
            code = CODES.pop(pid)
            finished = code == 0
            killed += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), (data / "output.txt").read_text()
            assert (data / name / ".trained").exists() == finished
            folders = list((data / name / "checkpoints").glob("step-*"))
            assert all(damage(folder) is None for folder in folders)
        assert adapter_bytes(data / name) == adapter_bytes(data / "whole")
    print(f"\n{killed} kills over {runs} runs, {late} of them in the last second: all ended with the same bytes")


CODES: dict[int, int] = {}


def ended_with(pid: int) -> int | None:
    if pid not in CODES and (code := ended(pid)) is not None:
        CODES[pid] = code
    return CODES.get(pid)


def full_disk(pid: int) -> None:
    """Refuse a process all further bytes in large files, as a full disk does."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))


LOSSES = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "halted": lambda pid: os.kill(pid, signal.SIGSTOP),
    "out of disk": full_disk,
    "asked to stop": lambda pid: os.kill(pid, signal.SIGTERM),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_process_of_two_ends_both_with_a_checkpoint(loss, rank, data):
    name = f"{loss} {rank}"
    more = {"out of disk": ("--save_freq", 1), "asked to stop": ("--epochs", 3)}.get(loss, ())
    ring = Ring(data, data / "base", name, (*LARGE, *more))
    ring.reach(2, 600)
    LOSSES[loss](ring.pids()[rank])
    if (loss, rank) == ("out of disk", 1):  # it writes nothing while it trains: a full disk is none of its business
        assert ring.wait(900) == 0 and (data / name / ".trained").exists(), ring.output
        return
    seconds = ring.wait_for_the_end(WITHIN if loss != "asked to stop" else 300)  # two more steps, to agree
    print(f"\n{name}: both ended after {seconds:.1f} s")
    found = Checkpoints(data / name / "checkpoints", 2).newest()
    assert found and found[1]["position"]["step"] >= 1, ring.output
    assert not (data / name / ".trained").exists()
    ring = Ring(data, data / "base", name, (*LARGE, *more, "--resume"))
    assert ring.wait(900) == 0 and (data / name / ".trained").exists(), ring.output

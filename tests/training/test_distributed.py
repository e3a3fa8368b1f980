"""Two processes of one run: when one is killed, halted or asked to stop, both end and the run resumes exactly."""

import os
import signal
from pathlib import Path

import numpy as np

from common.training.checkpoint import Checkpoints
from tests.training.ring import Ring
from tests.training_sample import adapter_bytes, difference, log_of, train_here, write_dataset

# seven examples over two processes of one: in the last step of an epoch the second process has no row;
# 262,000 parameters: enough for MLX to wait for ever in an all-reduce with a process that is gone
PLAIN = ("--lora_dropout", 0, "--epochs", 2, "--learning_rate", 2e-3, "--lora_r", 64)


def step_saved(adapter: Path) -> int:
    found = Checkpoints(adapter / "checkpoints", 2).newest()
    return found[1]["position"]["step"] if found else 0


def test_two_processes_equal_one_and_end_together(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(write_dataset(tmp_path / "data"))
    assert train_here(tiny_base, *PLAIN, "--batch_size", 2, "--output_dir", "one").exit_code == 0
    options = (*PLAIN, "--batch_size", 1)
    ring = Ring(Path.cwd(), tiny_base, "two", options)
    assert ring.wait(240) == 0, ring.output
    assert ring.output.count("2 processes") == 1 and ring.output.count("Training loss fell") == 1
    one, two = log_of(Path("one")), log_of(Path("two"))
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in two]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
    assert difference(Path("two"), Path("one")) < 1e-3

    adapter = Path("ended")
    ring = Ring(Path.cwd(), tiny_base, adapter.name, options)
    ring.reach(2)
    os.kill(ring.pids()[1], signal.SIGKILL)
    ring.wait_for_the_end(30)
    assert step_saved(adapter) >= 2, ring.output
    assert "process 1 has ended: this one ends too; saved in ended/checkpoints/step-00000" in ring.output
    assert "continue with:\n  mlx.launch -n 2 -- python " in ring.output
    assert not (adapter / ".trained").exists(), "the launcher's exit code says nothing"

    ring = Ring(Path.cwd(), tiny_base, adapter.name, (*options, "--resume"))
    ring.reach(5)
    os.kill(ring.pids()[0], signal.SIGSTOP)
    ring.wait_for_the_end(30)
    assert "process 0 has not answered for" in ring.output, ring.output
    assert step_saved(adapter) >= 5, "the other process has saved in its stead"

    ring = Ring(Path.cwd(), tiny_base, adapter.name, (*options, "--resume"))
    ring.reach(6)
    ring.pids()
    os.killpg(ring.process.pid, signal.SIGTERM)  # the launcher, and with it the reader of their output, is gone first
    ring.wait_for_the_end(30)
    assert step_saved(adapter) >= 6, ring.output

    ring = Ring(Path.cwd(), tiny_base, adapter.name, (*options, "--resume"))
    assert ring.wait(240) == 0 and (adapter / ".trained").exists(), ring.output
    assert adapter_bytes(adapter) == adapter_bytes(Path("two"))

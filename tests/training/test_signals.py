"""Signals at every moment of a run: one line, the shell's exit code, and nothing lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_mlx_lora
from common.training import loop
from common.training.run import Run
from common.training.signals import Stopped, StopRequest
from tests.training_sample import ROOT, train_here, write_dataset

SETTINGS = ("--epochs", 1, "--output_dir", "run")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(write_dataset(tmp_path / "data", train=3, val=1))
    return tmp_path / "data"


def signalled(number: signal.Signals, function):
    """Return ``function`` with a signal to this process at its start."""

    def wrapped(*arguments, **options):
        os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["load_base", "prepare_rows", "deliver"])
def test_a_signal_outside_the_loop_ends_with_one_line(phase, number, data, tiny_base, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_mlx_lora, phase, signalled(number, getattr(train_mlx_lora, phase)))
        result = train_here(tiny_base, *SETTINGS)
    assert result.exit_code == 128 + number
    state = "stopped before anything was saved"
    if phase == "deliver":
        state = "stopped at once; the last checkpoint is run/checkpoints/step-000002"
    line, command = result.stderr.splitlines()[-2:]
    assert line == f"{number.name}: {state}; continue with:"
    assert command.startswith("  python ") and command.endswith(" --resume")
    del result  # its traceback holds the run, and with it the folder's lock
    assert not Path("run/.trained").exists()
    assert train_here(tiny_base, *SETTINGS, "--resume").exit_code == 0 and Path("run/.trained").exists()


def test_a_second_signal_does_not_wait_for_the_step(data, tiny_base, monkeypatch):
    monkeypatch.setattr(loop, "dispatch", signalled(signal.SIGINT, signalled(signal.SIGTERM, loop.dispatch)))
    result = train_here(tiny_base, *SETTINGS)
    assert result.exit_code == 143 and "SIGTERM: stopped before anything was saved" in result.stderr


def test_a_second_signal_while_saving_waits(data, tiny_base, monkeypatch):
    """As `mlx.launch` sends it to the others when one process has ended."""
    save = Run.save
    monkeypatch.setattr(loop, "dispatch", signalled(signal.SIGTERM, loop.dispatch))
    monkeypatch.setattr(Run, "save", signalled(signal.SIGTERM, save))
    result = train_here(tiny_base, *SETTINGS)
    assert result.exit_code == 143 and "SIGTERM: stopped after step 1 of 2, saved in run/checkpoints" in result.stderr


def test_handlers_are_as_before_after_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal is signal.SIGTERM
        with pytest.raises(Stopped, match="SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_asks_for_a_stop(tmp_path):
    """As when a launcher or a terminal dies: what nobody reads is dropped, and the loop goes on to its next save."""
    program = (
        "import os, sys\nfrom common.training.signals import StopRequest\n"
        "with StopRequest() as stop, stop.deferred():\n"
        "    for n in range(3):\n        print('x' * 100_000, flush=True)\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').write(stop.signal.name)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as run:
        run.stdout.read(1000)
        run.stdout.close()
    assert run.returncode == 0 and (tmp_path / "saved").read_text() == "SIGHUP"


def test_control_c_during_imports_is_one_line(tmp_path):
    program = (
        "import common, os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background ignores it
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "Interrupted\n")

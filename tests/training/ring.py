"""For the tests: a training run of two processes on this machine, started by mlx.launch."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.processes import alive, free_port
from tests.training_sample import ROOT, TRAIN


class Ring:
    """`mlx.launch -n 2` of the trainer in ``folder``, its output collected in the background."""

    def __init__(self, folder: Path, base: Path, name: str, options: tuple):
        launcher = [sys.executable, str(Path(sys.executable).with_name("mlx.launch"))]
        launch = [*launcher, "-n", "2", "--starting-port", str(free_port()), "--"]
        script = [sys.executable, str(ROOT / "train_mlx_lora.py"), "--train_data", TRAIN, "--base_model", str(base)]
        self.adapter, self.output = folder / name, ""
        self.process = subprocess.Popen(
            [*launch, *script, "--output_dir", name, *map(str, options)],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.ranks: list[int] = []
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        for line in self.process.stdout:
            self.output += line

    def pids(self) -> list[int]:
        """Return the trainers' process ids by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, StopIteration):
                if os.getsid(int(path.name)) == self.process.pid:
                    environment = (path / "environ").read_bytes().split(b"\0")
                    rank = next(word for word in environment if word.startswith(b"MLX_RANK="))
                    found[int(rank[9:])] = int(path.name)
        self.ranks = [found[rank] for rank in sorted(found)] or self.ranks
        return self.ranks

    def reach(self, step: int, seconds: float = 120) -> None:
        """Wait until the log has the line of a training step."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if (self.adapter / "training_log.jsonl").read_text().count('"train"') >= step:
                    return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached: {self.output}")

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def wait_for_the_end(self, seconds: float) -> float:
        """Wait until launcher and trainers are gone; return how long it took."""
        started = time.monotonic()
        try:
            while self.process.poll() is None or any(map(alive, self.ranks)):
                if time.monotonic() - started > seconds:
                    raise AssertionError(f"still running after {seconds} s: {self.output}")
                time.sleep(0.05)
            return time.monotonic() - started
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave nothing running."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)

"""How an interrupted run ends: with one line on what is saved, the command that resumes it, and the signal's code."""

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from common.cli import MAKE_VARIABLES
from common.training.checkpoint import Checkpoints
from common.training.distributed import Processes, addresses
from common.training.options import TrainingOptions
from common.training.run import Run


def leave(
    number: signal.Signals | None, options: TrainingOptions, processes: Processes, run: Run | None = None
) -> NoReturn:
    """Exit after a signal, with the shell's code for it. ``run``: its last step has just been saved."""
    number = number or signal.SIGTERM  # it was another process that was asked to stop
    if processes.first:
        checkpoints = Checkpoints(Path(options.output_dir) / "checkpoints", options.keep_checkpoints)
        if run:
            saved = checkpoints.path(run.position.step)
            state = f"stopped after step {run.position.step} of {run.total_steps}, saved in {saved}"
        elif options.plan or not checkpoints.steps():
            state = "stopped before anything was saved"
        else:
            state = f"stopped at once; the last checkpoint is {checkpoints.path(checkpoints.steps()[0])}"
        with contextlib.suppress(BrokenPipeError):
            click.echo(f"{number.name}: {state}; continue with:\n  {resume_command(processes)}", err=True)
    sys.exit(128 + number)


def resume_command(processes: Processes) -> str:
    """Return the command that continues this run, as it was started: by make, by mlx.launch or alone."""
    if (variables := os.environ.get(MAKE_VARIABLES)) is not None:
        return f"make train {variables}".strip()
    own = [argument for argument in sys.argv if argument not in ("--overwrite", "--resume")]
    return shlex.join([*launcher(processes), "python", *own, "--resume"])


def launcher(processes: Processes) -> list[str]:
    """Return the words that start several processes; [] for one."""
    if processes.world == 1:
        return []
    hosts = addresses() or [os.environ.get("NCCL_HOST_IP", "")]
    local = all(address.startswith("127.") for address in hosts)
    return ["mlx.launch", *(["-n", str(processes.world)] if local else ["--hostfile", "HOSTFILE"]), "--"]

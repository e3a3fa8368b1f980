"""How long linking and preparing take, and how much memory, for 1,000, 10,000 and 100,000 jobs.

    python tests/benchmarks/bench_link.py

Makes a tree for each size (a tenth as many photographs as jobs) in a temporary folder and runs the real commands on
it: link twice, first with nothing remembered of the photographs, then again; then prepare. CPU seconds are those of
all its processes, which on a busy machine tell more than the clock. Memory is the sum over the processes, sampled
twenty times a second (on Linux; elsewhere the largest process).
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from tests.benchmarks.make_big_tree import make_big_tree  # noqa: E402


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--jobs", multiple=True, type=int, default=(1_000, 10_000, 100_000), show_default=True)
@click.option("--work_dir", type=click.Path(path_type=Path), help="folder for the trees  [default: a temporary one]")
def main(jobs: tuple[int, ...], work_dir: Path | None) -> None:
    click.echo(
        f"{'jobs':>8}  {'photos':>7}  {'command':<18}  {'seconds':>8}  {'CPU s':>7}  {'jobs/s':>8}  {'peak MB':>8}"
    )
    for count in jobs:
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            tree, out = Path(folder) / "tree", Path(folder) / "training_data"
            make_big_tree(tree, count, max(10, count // 10))
            link = ["link_training_data.py", "--advisor", "ansel", "--db_path", tree, "--output_dir", out]
            prepare = [
                "prepare_training_data.py",
                "--manifest",
                out / "training_data_manifest.jsonl",
                "--output_dir",
                out,
            ]
            for name, command in (("link, first pass", link), ("link, again", link), ("prepare", prepare)):
                seconds, cpu, peak = measured(command)
                row = f"{count:>8,}  {max(10, count // 10):>7,}  {name:<18}  {seconds:>8.1f}  {cpu:>7.1f}"
                click.echo(f"{row}  {count / seconds:>8,.0f}  {peak / 1e6:>8,.0f}")
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)


def measured(command: list) -> tuple[float, float, float]:
    """Run a script; return (seconds, CPU seconds, peak bytes)."""
    start, before = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise click.ClickException(f"{command[0]} failed:\n{output[-2000:]}")
    if not peak[0]:
        unit = 1 if sys.platform == "darwin" else 1024
        peak[0] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return seconds, _cpu_seconds() - before, peak[0]


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _tree_memory(process.pid))
        time.sleep(0.05)


def _tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 where /proc does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize() + sum(_tree_memory(int(child)) for child in children)


if __name__ == "__main__":
    main()

"""The connection by which processes of one run notice that another is lost."""

import socket
import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from common.training import watchdog
from common.training.distributed import Processes
from common.training.watchdog import FAREWELL, SILENCE, Peer
from tests.training_sample import ROOT


class Threads:
    """Processes as threads: what `Processes` agrees on by MLX goes through a barrier here."""

    def __init__(self, world: int):
        self.barrier, self.values = threading.Barrier(world, timeout=10), [0.0] * world

    def process(self, rank: int) -> Processes:
        threads, world = self, len(self.values)

        class Thread(Processes):
            def sum(self, array: mx.array) -> mx.array:
                threads.values[rank] = array.item()
                threads.barrier.wait()
                return mx.array(sum(threads.values))

            def agreed(self, decide):
                if rank == 0:
                    threads.answer = decide()
                threads.barrier.wait()
                return threads.answer

        return Thread(rank, world)


def connect(world: int) -> list:
    """Return what connecting gives in each of ``world`` processes: peers, or an OSError."""
    found, threads = [None] * world, Threads(world)

    def run(rank: int) -> None:
        try:
            found[rank] = watchdog._connect(threads.process(rank))
        except OSError as error:
            found[rank] = error

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(20)
    return found


def test_every_process_is_connected_with_the_first(monkeypatch):
    monkeypatch.setattr(watchdog, "_address", lambda: "127.0.0.1")
    first, *others = connect(3)
    assert sorted(peer.rank for peer in first) == [1, 2] and [[p.rank for p in peers] for peers in others] == [[0], [0]]
    everyone = first + sum(others, [])
    assert [peer.exchange(peer.heard) for peer in everyone] == [None] * 4
    for peer in everyone:
        peer.connection.close()


def test_where_one_cannot_connect_nobody_watches(monkeypatch):
    monkeypatch.setattr(watchdog, "_address", lambda: "203.0.113.1")  # no address of this machine (RFC 5737)
    assert all(isinstance(found, OSError) for found in connect(2))


@pytest.fixture
def pair():
    """A peer and the other end of its connection."""
    own, other = socket.socketpair()
    own.setblocking(False)
    with own, other:
        yield Peer(1, own, "host", 1), other


def test_a_process_is_lost_when_it_ends_without_farewell_or_is_silent(pair):
    peer, other = pair
    start = peer.heard
    assert peer.exchange(start + SILENCE / 2) is None and other.recv(9)
    assert peer.exchange(start + SILENCE + 1) == f"has not answered for {SILENCE:.0f} s"
    other.send(watchdog.ALIVE)
    assert peer.exchange(start + SILENCE + 2) is None
    other.close()
    assert peer.exchange(start + SILENCE + 3) == "has ended"


def test_a_process_that_says_farewell_is_not_missed(pair):
    peer, other = pair
    other.send(FAREWELL)
    other.close()
    assert peer.exchange(peer.heard + 10 * SILENCE) is None
    assert peer.exchange(peer.heard + 20 * SILENCE) is None


LOST = 'RuntimeError("[ring] connection to a peer was lost")'
# the run's last step takes a while to save; meanwhile MLX reports the lost connection to the main thread, and the
# launcher asks this process to end
PROGRAM = """
import os, signal, socket, threading, time
from pathlib import Path
from types import SimpleNamespace
from common.training.setup import device_errors
from common.training.signals import StopRequest
from common.training.watchdog import Peer, Watchdog

class SlowRun:
    def rescue(self):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return Path("run/checkpoints/step-00000005")

ours, theirs = socket.socketpair()
ours.setblocking(False)
with StopRequest() as stop, Watchdog(SimpleNamespace(world=1, first=True), stop) as watchdog, device_errors(watchdog):
    watchdog.processes.world, watchdog.run = 2, SlowRun()
    watchdog.peers = [Peer(1, ours, socket.gethostname(), 0)]
    if {watched}:
        threading.Thread(target=watchdog.end, args=(watchdog.peers[0], "has ended")).start()
        time.sleep(0.1)
    theirs.close()
    raise {error}
"""


@pytest.mark.parametrize(
    ("watched", "error"),
    [(True, LOST), (False, LOST), (True, "SystemExit(1)")],
)
def test_a_lost_process_ends_the_other_with_one_line_and_its_last_step(watched, error):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(watched=watched, error=error)], cwd=ROOT, capture_output=True, text=True
    )
    line, *command = done.stderr.splitlines()
    assert line == "process 1 has ended: this one ends too; saved in run/checkpoints/step-00000005; continue with:"
    assert done.returncode == 1 and len(command) == 1 and command[0].startswith("  mlx.launch ")

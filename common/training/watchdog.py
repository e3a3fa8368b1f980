"""Ends the processes of a distributed run together: MLX waits for ever in an all-reduce with one that is lost.

While MLX waits, Python's signal handlers do not run, so a thread does the watching: each process sends rank 0 a byte a
second, and rank 0 answers. A process that ends without a farewell, or is silent, is lost; the others then save the
last whole step and exit. Nothing is added to a training step.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import click
import mlx.core as mx

from common.training.distributed import Processes, addresses
from common.training.leaving import resume_command
from common.training.run import Run
from common.training.signals import StopRequest

INTERVAL = 1.0  # seconds between two signs of life
SILENCE = 10.0  # seconds after which a process counts as lost
GRACE = 2.0  # seconds for an error of this process's own to be reported: it may have ended the other one
SAVING = 45.0  # seconds at most for the last step to be saved; a second or two on an idle disk
ALIVE, FAREWELL = b".", b"!"


@dataclass
class Peer:
    """Another process: its rank, the connection to it, and where it runs."""

    rank: int
    connection: socket.socket
    host: str
    pid: int
    heard: float = field(default_factory=time.monotonic)
    parted: bool = False

    def exchange(self, now: float) -> str | None:
        """Send and receive signs of life; return how the process was lost, None while it is there."""
        try:
            while data := self.connection.recv(4096):
                self.heard, self.parted = now, self.parted or FAREWELL in data
            return None if self.parted else "has ended"
        except BlockingIOError:
            pass
        except OSError:
            return None if self.parted else "has ended"
        with contextlib.suppress(OSError):
            self.connection.send(ALIVE)
        return None if self.parted or now - self.heard < SILENCE else f"has not answered for {SILENCE:.0f} s"


class Watchdog:
    """Within the block, watches the other processes; does nothing for a single one. Set ``run`` when there is one."""

    def __init__(self, processes: Processes, stop: StopRequest):
        self.processes, self.stop, self.peers, self.closing = processes, stop, [], threading.Event()
        self.ending = threading.Lock()  # held by the thread that ends this process
        self.run: Run | None = None

    def __enter__(self) -> "Watchdog":
        if self.processes.world > 1:
            try:
                self.peers = _connect(self.processes)
            except OSError as error:
                click.echo(f"no connection between the processes ({error}): if one is lost, end the others", err=True)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        with self.ending:  # where the watching thread is ending this process, it does not get past here
            pass
        if kind is None:
            self.part()
        for peer in self.peers:
            peer.connection.close()
        self.run = None  # and with it the lock of its folder

    def part(self) -> None:
        """Tell the others that this process is done with them."""
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.connection.send(FAREWELL)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.closing.wait(INTERVAL):
            now = time.monotonic()
            for peer in self.peers:
                if now - before > 3 * INTERVAL:
                    peer.heard = now  # this process was halted itself, perhaps all of them were
                reason = peer.exchange(now)
                if reason and not self.closing.wait(GRACE if "ended" in reason else 0):
                    self.end(peer, reason)
            before = now

    def end(self, peer: Peer | None = None, reason: str = "") -> None:
        """Save the last whole step where it can be saved, say so, and end this process at once.

        Both threads can get here: MLX reports a lost connection to the main thread as well, sometimes.
        """
        self.stop.ignore()  # the launcher ends the other processes as soon as one has ended
        self.ending.acquire()  # the first thread here ends the process; it never releases the lock
        peer, reason = (peer, reason) if peer else self._lost()
        if peer and peer.host == socket.gethostname() and "answered" in reason:
            with contextlib.suppress(OSError):  # halted: it would live on, and the launcher would wait for it
                os.kill(peer.pid, signal.SIGKILL)
        saved: list[Path] = []
        saver = threading.Thread(target=lambda: saved.extend(self._save()), daemon=True)
        saver.start()
        saver.join(SAVING)
        lost = f"process {peer.rank} {reason}" if peer else "another process has ended"
        if saved or self.processes.first:
            kept = f"; saved in {saved[0]}" if saved else ""
            line = f"{lost}: this one ends too{kept}; continue with:\n  {resume_command(self.processes)}"
            with contextlib.suppress(OSError, ValueError):
                click.echo(line, err=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(1)  # the main thread is in MLX and does not come back

    def _lost(self) -> tuple[Peer | None, str]:
        """Return the process that is lost, and how; None where that is not known."""
        reasons = ((peer, peer.exchange(time.monotonic())) for peer in self.peers)
        return next(((peer, reason) for peer, reason in reasons if reason), (None, ""))

    def _save(self) -> list[Path]:
        shared = self.processes.first or any(peer.host == socket.gethostname() for peer in self.peers if not peer.rank)
        path = self.run.rescue() if self.run and shared else None
        return [path] if path else []


def _connect(processes: Processes) -> list[Peer]:
    """Connect every process with rank 0. OSError, on all of them, where one of them cannot."""
    peers, problem = [], "another process could not connect"
    own, listener = {"rank": processes.rank, "host": socket.gethostname(), "pid": os.getpid()}, None
    try:
        listener = socket.create_server((_address(), 0), backlog=processes.world) if processes.first else None
    except OSError as error:
        problem = str(error)
    address = listener.getsockname()[:2] if listener else None
    offer = processes.agreed(lambda: {**own, "address": address, "key": secrets.token_hex(16)})
    try:
        if listener:
            peers = _accept(listener, processes.world - 1, offer["key"])
        elif offer["address"]:
            connection = socket.create_connection(offer["address"], timeout=SILENCE)
            connection.sendall(json.dumps({**own, "key": offer["key"]}).encode() + b"\n")
            connection.setblocking(False)
            peers = [Peer(0, connection, offer["host"], offer["pid"])]
    except OSError as error:
        problem = str(error)
    if processes.sum(mx.array([float(bool(peers))])).item() < processes.world:
        raise OSError(problem)
    return peers


def _accept(listener: socket.socket, number: int, key: str) -> list[Peer]:
    """Return the other processes, each of which has shown the ``key``; OSError when they do not come in time."""
    peers, until = [], time.monotonic() + SILENCE
    with listener:
        while len(peers) < number:
            listener.settimeout(max(0.01, until - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(INTERVAL)
            with contextlib.suppress(OSError, ValueError, KeyError), connection.makefile("rb") as file:
                hello = json.loads(file.readline(1000))
                if secrets.compare_digest(hello.pop("key"), key):
                    connection.setblocking(False)
                    peers.append(Peer(connection=connection, **hello))
    return peers


def _address() -> str:
    """Return the address under which the others reach rank 0, as the launcher told them."""
    if "NCCL_HOST_IP" in os.environ:
        return os.environ["NCCL_HOST_IP"]
    known = addresses()
    return known[0].rpartition(":")[0] if known else socket.gethostname()

"""Data-parallel training over MLX's own engine: ring between machines, NCCL between GPUs, or a single process.

Started by `mlx.launch -n 2 python train_mlx_lora.py ...` (or --hostfile); without it there is one process and
nothing here costs anything.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from common.errors import UserError
from integration.lora_patch.errors import LoraError

LAUNCHED_BY = ("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Processes:
    """The processes that train together. Only ``rank`` 0 writes files and prints."""

    rank: int = 0
    world: int = 1
    group: object = None

    def __str__(self) -> str:
        return f"{self.world} process{'es' * (self.world > 1)}"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, array: mx.array) -> mx.array:
        """Return the sum over all processes (lazily)."""
        return array if self.world == 1 else mx.distributed.all_sum(array, group=self.group)

    def from_first(self, array: mx.array) -> mx.array:
        """Return rank 0's array; the others pass one of the same shape and dtype."""
        return array if self.world == 1 else self.sum(array if self.first else mx.zeros_like(array))

    def wait(self) -> None:
        """Return when all processes have reached this point."""
        if self.world > 1:
            self.sum(mx.array(0.0)).item()

    def agreed(self, decide: Callable[[], Any]) -> Any:
        """Return what ``decide`` (a JSON value) says on rank 0; on a UserError all end, and rank 0 reports it."""
        if self.world == 1:
            return decide()
        answer, error = {}, None
        if self.first:
            try:
                answer = {"value": decide()}
            except (UserError, LoraError) as refusal:
                error = refusal
        answer = json.loads(self._text_from_first(json.dumps(answer)))
        if error:
            raise error
        if "value" not in answer:
            raise SystemExit(1)
        return answer["value"]

    def _text_from_first(self, text: str) -> str:
        data = text.encode() if self.first else b""
        size = int(self.sum(mx.array([len(data)], dtype=mx.int32)).item())
        values = np.zeros(size, dtype=np.int32)
        values[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        return bytes(np.array(self.sum(mx.array(values))).astype(np.uint8)).decode()


def join_processes() -> Processes:
    """Join the processes that `mlx.launch` or mpirun started with this one; alone if there are none."""
    if not any(name in os.environ for name in LAUNCHED_BY):
        return Processes()
    # named, so that a missing engine is an error and not a silent group of one
    backend = "nccl" if "NCCL_HOST_IP" in os.environ else "ring" if "MLX_HOSTFILE" in os.environ else "any"
    group = mx.distributed.init(strict=True, backend=backend)
    return Processes(group.rank(), group.size(), group)


def addresses() -> list[str]:
    """Return the addresses (host:port) in the hostfile of MLX's ring, rank 0's first; [] where there is none."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return [str(address) for host in hosts for address in host]
    except (KeyError, OSError, ValueError, TypeError):
        return []


def is_peer_lost(error: BaseException) -> bool:
    """Tell whether an error only says that another process has ended."""
    return "connection to a peer was lost" in str(error)

"""Safetensors files written whole, the same bytes for the same tensors, and read into host memory from any thread."""

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, safe_open, serialize

from common.files import write_atomic


class HostArray(NamedTuple):
    """A tensor in host memory. ``data`` holds bfloat16 as uint16, since numpy has no such type."""

    dtype: str  # "float32", "bfloat16", "bool", ...
    data: np.ndarray

    @classmethod
    def of(cls, array: mx.array) -> "HostArray":
        """Copy an MLX array to the host (evaluates it)."""
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        return cls(str(array.dtype).rpartition(".")[2], np.array(raw))

    def to_mlx(self) -> mx.array:
        """Copy to an MLX array of the same dtype and shape."""
        array = mx.array(self.data)
        return array.view(mx.bfloat16) if self.dtype == "bfloat16" else array


def save_tensors(path: str | os.PathLike, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` atomically; equal tensors give equal files. UserError when the disk refuses."""
    write_host_tensors(path, {name: HostArray.of(array) for name, array in tensors.items()}, metadata)


def write_host_tensors(
    path: str | os.PathLike, tensors: dict[str, HostArray], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors that are in host memory, atomically. UserError when the disk refuses (full, read-only)."""
    held = {name: np.ascontiguousarray(tensor.data) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(dtype=tensor.dtype, shape=tensor.data.shape, data_ptr=data.ctypes.data, data_len=data.nbytes)
        for (name, tensor), data in zip(tensors.items(), held.values(), strict=True)
    }
    with write_atomic(path, "wb") as file:
        file.write(serialize(specs, metadata))


def read_host_tensors(path: str | os.PathLike) -> tuple[dict[str, HostArray], dict[str, str]]:
    """Read (tensors, metadata) without touching MLX, so that a thread can do it. ValueError for a damaged file."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        tensors = {name: _host_array(**tensor) for name, tensor in deserialize(Path(path).read_bytes())}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    return tensors, metadata


def _host_array(dtype: str, shape: list[int], data: bytes) -> HostArray:
    """``dtype`` is the format's name: F32, BF16, U8, BOOL, ..."""
    name = {"BF16": "bfloat16", "BOOL": "bool"}.get(dtype)
    name = name or {"F": "float", "I": "int", "U": "uint"}[dtype[0]] + dtype[1:]
    return HostArray(name, np.frombuffer(data, "uint16" if name == "bfloat16" else name).reshape(shape))


def checksum(tensors: dict[str, HostArray]) -> str:
    """Return a CRC-32 over all values, to notice a file that power loss or a bad disk has changed."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(np.ascontiguousarray(tensor.data).data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"

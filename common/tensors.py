"""Safetensors files written whole, the same bytes for the same tensors, and read into host memory from any thread.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, raw little-endian data).
"""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from common.files import write_atomic

MLX_TYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I64": mx.int64, "I32": mx.int32,
    "I8": mx.int8, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8, "BOOL": mx.bool_,
}  # fmt: skip
NUMPY_TYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I8": np.int8, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in MLX_TYPES.items()}


class HostArray(NamedTuple):
    """A tensor in host memory; ``data`` holds bfloat16 as uint16, since numpy has no such type."""

    dtype: str  # safetensors name
    data: np.ndarray

    @classmethod
    def of(cls, array: mx.array) -> "HostArray":
        """Copy an MLX array to the host (evaluates it)."""
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        return cls(NAMES[array.dtype], np.array(raw))

    def to_mlx(self) -> mx.array:
        """Copy to an MLX array of the same dtype and shape."""
        array = mx.array(self.data)
        return array.view(mx.bfloat16) if self.dtype == "BF16" else array


def save_tensors(path: str | os.PathLike, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` atomically, in the order of their names: equal tensors give equal files."""
    write_host_tensors(path, {name: HostArray.of(array) for name, array in tensors.items()}, metadata)


def write_host_tensors(
    path: str | os.PathLike, tensors: dict[str, HostArray], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors that are in host memory, atomically. UserError when the disk refuses (full, read-only)."""
    header, offset = {"__metadata__": metadata or {}}, 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.data.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.data.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # readers map the data in place and want it aligned
    with write_atomic(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in sorted(tensors.items()):
            file.write(np.ascontiguousarray(tensor.data).data)


def read_host_tensors(path: str | os.PathLike) -> tuple[dict[str, HostArray], dict[str, str]]:
    """Read (tensors, metadata) without touching MLX, so that a thread can do it. ValueError for a damaged file."""
    data = Path(path).read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, tensor in header.items():
            first, last = tensor["data_offsets"]
            kind = NUMPY_TYPES[tensor["dtype"]]
            flat = np.frombuffer(data, kind, (last - first) // np.dtype(kind).itemsize, 8 + length + first)
            tensors[name] = HostArray(tensor["dtype"], flat.reshape(tensor["shape"]))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    return tensors, metadata


def checksum(tensors: dict[str, HostArray]) -> str:
    """Return a CRC-32 over all values, to notice a file that power loss or a bad disk has changed."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(np.ascontiguousarray(tensor.data).data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"

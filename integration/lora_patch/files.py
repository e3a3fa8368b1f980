"""Reading foreign files with bounds, and replacing our own as a whole."""

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import LoraError, one_line

if TYPE_CHECKING:
    import numpy as np

MAX_JSON = 32 << 20  # bytes; a tokenizer with its vocabulary has 11 MB
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes, by the names of the safetensors format
MAX_HEADER = 100_000_000  # bytes; the limit that the safetensors format itself sets


def read_json(path: Path) -> dict:
    """Return a JSON object; LoraError for a file that is missing, too large, damaged or holds something else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise LoraError(f"{path}: larger than {MAX_JSON >> 20} MB; that is no configuration")
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # as Windows writes it
    except LoraError:
        raise
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise LoraError(f"{path}: a JSON object was expected")
    return content


def safetensors_header(file: BinaryIO, path: Path) -> tuple[dict, int]:
    """Read a safetensors file's header: ({tensor name: dtype, shape, data_offsets}, where the data start).

    Format: 8 bytes little-endian length, then that much JSON (huggingface.co/docs/safetensors). Raises LoraError.
    """
    size = path.stat().st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise LoraError(f"{path}: not a safetensors file (a header of {length:,} bytes in a file of {size:,})")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, last = tensor["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length or not isinstance(tensor["shape"], list):
                raise ValueError(f"tensor {name} lies outside the file")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoraError(f"{path}: damaged safetensors header ({one_line(error)})") from error
    return header, 8 + length


def as_float32(dtype: str, raw: bytes | memoryview) -> "np.ndarray":
    """Return the numbers of a tensor that a safetensors file holds as F32, F16 or BF16, as float32 [n]."""
    import numpy as np  # slow to import

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4", copy=False)


def write_file(path: Path, raw: bytes) -> None:
    """Replace a file's content in one step, its permissions kept."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o7777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

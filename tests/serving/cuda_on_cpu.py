"""The decoding kernel's own source on a CPU, in the place of a GPU: compiled by g++ with cuda_on_cpu.h.

cpu = Cpu(folder, blocks=8)
kernel = DecodeKernel(model, cpu.gpu)
cpu.seed = 3                                 # another order of the GPU's threads
"""

import ctypes
import hashlib
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np

from integration.lora_patch.decode_kernel import INPUTS, OUTPUTS, Dimensions, Gpu, body, program, scratch, shared_bytes

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]
TYPES = {
    "tokens": "int", "meta": "int", "table": "int64_t", "norms": "decode::bf", "lora": "decode::bf",
    "keys": "decode::bf", "values": "decode::bf", "frequencies": "float", "scratch": "unsigned", "next": "int",
    "meta_next": "int", "logits": "float",
}  # fmt: skip


class Cpu:
    """Runs steps of a kernel as a GPU with ``blocks`` multiprocessors would, in an order drawn from ``seed``."""

    def __init__(self, folder: Path, blocks: int):
        self.folder, self.blocks, self.seed = folder, blocks, 0
        self.changes: dict[str, str] = {}  # texts of the kernel to replace, to see that a mistake is found
        self.gpu = Gpu(blocks, self.addresses, self.compiled)
        self._libraries: dict[str, ctypes.CDLL] = {}

    def addresses(self, arrays: list[mx.array]) -> mx.array:
        mx.eval(arrays)
        self.held = arrays  # memory stays where it is while somebody holds it
        return mx.array(np.array([address(array) for array in arrays], np.int64))

    def compiled(self, dims: Dimensions, rank: int, rows: int, with_logits: bool):
        """Return what `mx.fast.cuda_kernel` would: a function of inputs and shapes that runs one step."""
        library = self.library(dims, rank, rows, with_logits)
        assert library.shared_bytes() == shared_bytes(dims, rank, rows)
        assert library.scratch_bytes() == scratch(dims).nbytes

        def run(inputs, output_shapes, output_dtypes, grid, threadgroup):
            assert grid[0] == self.blocks * threadgroup[0]
            mx.eval(inputs)
            outputs = [mx.full(shape, -1, how) for shape, how in zip(output_shapes, output_dtypes, strict=True)]
            mx.eval(outputs)
            pointers = (ctypes.c_void_p * len(INPUTS + OUTPUTS))(*map(address, [*inputs, *outputs]))
            fault = library.run(pointers, self.blocks, threadgroup[0], ctypes.c_ulonglong(self.seed))
            assert not fault, fault.decode()
            assert outputs[1].min().item() >= 0, "no block was the last: nothing was written for the next step"
            return outputs

        return run

    def library(self, dims: Dimensions, rank: int, rows: int, with_logits: bool) -> ctypes.CDLL:
        text = program('#include "cuda_on_cpu.h"\n', dims, rank, rows)
        for old, new in self.changes.items():
            assert text.count(old) == 1, (text.count(old), old)
            text = text.replace(old, new)
        named = "".join(
            f"  auto {name} = reinterpret_cast<{TYPES[name]}*>(static_cast<void**>(p)[{at}]);\n"
            for at, name in enumerate(INPUTS + OUTPUTS)
        )
        text += f"static void body(void* p) {{\n{named}  {body(with_logits)}\n}}\n" + (
            'extern "C" long shared_bytes() { return decode::SHARED; }\n'
            'extern "C" long scratch_bytes() { return decode::S_END; }\n'
            'extern "C" const char* run(void** p, int blocks, int threads, unsigned long long seed) {\n'
            "  return cpu::run(body, p, blocks, threads, decode::SHARED, seed) ? nullptr : cpu::m.fault;\n}\n"
        )
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        if name not in self._libraries:
            source, made = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
            source.write_text(text, encoding="utf-8")
            include = f"-I{Path(__file__).parent}"
            subprocess.run(["g++", *FLAGS, include, str(source), "-o", str(made)], check=True)
            library = ctypes.CDLL(str(made))
            library.shared_bytes.restype = library.scratch_bytes.restype = ctypes.c_long
            library.run.restype = ctypes.c_char_p
            self._libraries[name] = library
        return self._libraries[name]


def address(array: mx.array) -> int:
    """Return where an array's values lie; the array has been computed."""
    found = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(found, copy=False).ctypes.data

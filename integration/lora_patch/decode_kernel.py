"""Decoding on NVIDIA GPUs by one kernel a step (decode.cu): all layers, the output head and the choice of the token.

    kernel = DecodeKernel(model, base)             # `refusal` says beforehand why there can be none
    batch = KernelBatch(kernel, layers, update)    # rows that are decoded together, as `language_model.Batch`

For compute capabilities 9 to 11, bfloat16 activations. Prefill runs as plain MLX operations.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .language_model import LanguageModel, Update, group_updates
from .memory import room
from .vlm import GROUPS, Packing, Row, stored_matrix

SOURCES = ("decode.cu", "decode_attention.cu", "decode_product.cu", "decode_step.cu")  # after decode_ptx.cu
ROWS = 16  # tokens a step at most
THREADS, WARPS = 256, 8
CHUNKS = 20  # of 32 inputs, that a warp holds at a time; more of them take several passes
SUB = {16: 128, 4: 160}  # columns that a block attends to at a time, as in decode.cu; by bits
SHARED_LIMIT = 227 << 10  # bytes of shared memory that a block may have
AHEAD = 8  # steps that are started before their tokens are read
GROWTH = 512  # columns by which the key-value cache grows
RANKS = (8, 16, 32)  # of an adapter; others are padded to the next


@dataclass(frozen=True)
class Dimensions:
    """What decode.cu is compiled for."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    blocks: int  # of the grid
    bits: int  # of a matrix's value, as the kernel reads it: 16 or 4
    eps: float

    def inputs(self) -> tuple[int, int, int]:
        return self.hidden, self.heads * self.head_dim, self.intermediate


def refusal(model: LanguageModel) -> str | None:
    """Return why the kernel cannot run a model here, None if it can."""
    if not mx.cuda.is_available() or mx.default_device() != mx.gpu:
        return "no CUDA"
    if mx.device_info().get("compute_capability_major", 0) not in (9, 10, 11):  # 12 has 99 KiB of shared memory a block
        return "a GPU of another compute capability than 9, 10 or 11"
    if model.dtype != mx.bfloat16 or len(set(model.shapes)) > 1:
        return f"activations of {model.dtype}"
    blocks = multiprocessors()
    dims = dimensions(model, blocks)
    if quantized(model) and copied_bytes(dims) > room():
        return "quantized matrices, and too little memory for copies as the kernel reads them"
    if any(width % (32 * WARPS) for width in dims.inputs()) or dims.head_dim not in (64, 128):
        return "matrices of another width"
    wide = max(-(-dims.hidden // blocks) > 32, -(-(dims.heads + 2 * dims.kv_heads) * dims.head_dim // blocks) > 64)
    group = dims.heads // dims.kv_heads
    # see decode.cu: ATTENTION, and OWN_K in decode_attention.cu
    if group > 8 or group * dims.head_dim > 2 * (dims.head_dim + SUB[16] + 64) or group * dims.head_dim % (16 * WARPS):
        return "too many or too few heads to one of keys"
    if wide or blocks < dims.kv_heads or shared_bytes(dims, 0, 8) > SHARED_LIMIT:
        return "matrices too large for the GPU's blocks"
    return None


def packings(model: LanguageModel) -> set[Packing | None]:
    """Return how the matrices are stored that a step reads."""
    found = {how for shape in model.shapes for _, stored in shape.packing for how in stored}
    return found | {model.parts.head_packing, stored_matrix(model.parts.embed)[1]}


def quantized(model: LanguageModel) -> bool:
    """Whether any matrix is quantized: the kernel then reads a copy of all, made once, of 4 bits or of 16."""
    return packings(model) != {None}


def four_bits(model: LanguageModel) -> bool:
    """Whether the kernel can read the matrices in 4 bits each."""
    return all(how and how.bits == 4 and how.mode == "affine" and how.group_size % 32 == 0 for how in packings(model))


def copied_bytes(dims: Dimensions) -> int:
    """Return the bytes of a quantized base's copies as the kernel reads them."""
    hidden, attended, intermediate = dims.inputs()
    outputs = [(attended + 2 * dims.kv_heads * dims.head_dim, hidden), (hidden, attended), (2 * intermediate, hidden),
               (hidden, intermediate)]  # fmt: skip

    def size(rows: int, inputs: int) -> int:
        parts = inputs // (32 * _chunks(inputs))
        return rows * (2 * inputs if dims.bits == 16 else parts * _four_bit_row(inputs))

    return dims.layers * sum(size(*matrix) for matrix in outputs) + size(dims.vocabulary, hidden)


def dimensions(model: LanguageModel, blocks: int) -> Dimensions:
    shape, spec = model.shapes[0], model.parts.specs[0]
    widths = dict(spec.widths)
    return Dimensions(
        len(model.shapes), widths["q"][0], shape.heads, shape.kv_heads, shape.head_dim, widths["gate"][1],
        model.parts.head[0].shape[0], blocks,
        4 if four_bits(model) else 16, shape.eps,
    )  # fmt: skip


# -- the kernels ------------------------------------------------------------------------------------------------------

_ADDRESSES = 32


@functools.cache
def _address_kernel():
    names = [f"a{i}" for i in range(_ADDRESSES)]
    source = "\n".join(f"out[{i}] = (long long){name};" for i, name in enumerate(names))
    return mx.fast.cuda_kernel("addresses", names, ["out"], source, ensure_row_contiguous=False)


def addresses(arrays: list[mx.array]) -> mx.array:
    """Return where the arrays' values lie in device memory, int64 [len(arrays)]; good while nothing moves them."""
    found = []
    for at in range(0, len(arrays), _ADDRESSES):
        part = arrays[at : at + _ADDRESSES]
        (out,) = _address_kernel()(
            inputs=part + [part[-1]] * (_ADDRESSES - len(part)), output_shapes=[(_ADDRESSES,)],
            output_dtypes=[mx.int64], grid=(1, 1, 1), threadgroup=(1, 1, 1),
        )  # fmt: skip
        found.append(out[: len(part)])
    return mx.concatenate(found)


@functools.cache
def multiprocessors() -> int:
    source = 'unsigned n; asm("mov.u32 %0, %nsmid;" : "=r"(n)); out[0] = n;'
    (out,) = mx.fast.cuda_kernel("multiprocessors", ["x"], ["out"], source)(
        inputs=[mx.zeros((1,))], output_shapes=[(16,)], output_dtypes=[mx.int32], grid=(1, 1, 1), threadgroup=(1, 1, 1)
    )
    return out[0].item()


INPUTS = ("tokens", "meta", "table", "norms", "lora", "keys", "values", "frequencies", "scratch")
OUTPUTS = ("next", "meta_next", "logits")  # logits only where they are wanted


def program(instructions: str, dims: Dimensions, rank: int, rows: int) -> str:
    """Return the kernel's text; ``instructions``: what defines the functions of decode_ptx.cu."""
    names = ("LAYERS", "E", "HEADS", "KV", "DIM", "F", "V", "BLOCKS", "BITS")
    constants = dict(zip(names, astuple(dims)[:-1], strict=True)) | {"RANK": rank, "MB": rows, "CHUNKS": CHUNKS}
    text = "".join(f"constexpr int {name} = {value};\n" for name, value in constants.items())
    text = f"namespace decode {{\n{text}constexpr float EPS = {dims.eps:.9e}f;\n}}\n"
    return instructions + text + "".join(map(_source, SOURCES))


def body(with_logits: bool) -> str:
    """Return the kernel's call, in names of `INPUTS` and `OUTPUTS`."""
    return (
        "decode::step({tokens, meta, (const long*)table, norms, lora, (decode::bf*)keys, (decode::bf*)values, "
        f"frequencies, (char*)scratch, next, meta_next, {'logits' if with_logits else 'nullptr'}}});"
    )


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@functools.cache
def _step_kernel(dims: Dimensions, rank: int, rows: int, with_logits: bool):
    header = program("#include <cuda_bf16.h>\n" + _source("decode_ptx.cu"), dims, rank, rows)
    call, outputs = body(with_logits), OUTPUTS if with_logits else OUTPUTS[:2]
    # MLX keeps compiled kernels on disk by their name
    name = f"decode_{hashlib.sha256((header + call).encode()).hexdigest()[:16]}"
    return mx.fast.cuda_kernel(
        name, list(INPUTS), list(outputs), call, header, ensure_row_contiguous=False,
        shared_memory=shared_bytes(dims, rank, rows),
    )  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """What runs the kernel: the GPU that MLX uses, or in tests a CPU in its place."""

    blocks: int  # of the grid
    addresses: Callable[[list[mx.array]], mx.array]
    compiled: Callable[[Dimensions, int, int, bool], Callable]  # (dimensions, rank, rows at most, logits wanted)


def _chunks(inputs: int) -> int:
    whole = inputs // (32 * WARPS)
    return whole // next(n for n in range(1, whole + 1) if whole % n == 0 and whole // n <= CHUNKS)


def _four_bit_row(inputs: int) -> int:
    """Return the bytes of a row in 4 bits that a warp takes at a time, an odd number of 16 bytes."""
    return (_chunks(inputs) * 20 + 15) // 16 // 2 * 32 + 16


def shared_bytes(dims: Dimensions, rank: int, rows: int) -> int:
    """Return the shared memory of a block, as decode.cu lays it out."""

    def up_to(count, of):
        return -(-count // of) * of

    def pitch(inputs):
        if dims.bits == 4:
            return _four_bit_row(inputs)
        size = _chunks(inputs) * 64
        return size if size % 128 else size + (32 if rank else 64)

    hidden, attended, intermediate = dims.inputs()
    own_hidden, own_inner = -(-hidden // dims.blocks), -(-intermediate // dims.blocks)
    own_qkv = -(-(attended + 2 * dims.kv_heads * dims.head_dim) // dims.blocks)
    slot = max(16 * pitch(hidden), 8 * pitch(attended), 8 * pitch(intermediate))
    held = 64 if rank > 16 or (rank and rows > 8) else 80
    sub = SUB[dims.bits]
    attention = 16 * (dims.head_dim * 2 + 64 + sub * 2 + 64 + (sub + 8) * 4) + 192
    slots = 6 if dims.bits == 4 else 2
    total = slots * WARPS * slot + max(held * 2 * (WARPS + (rank > 0)) * 8 * 4, attention)
    if rank:
        total += max(up_to(own_hidden, 16) * 3 * rank, up_to(own_inner, 16) * rank) * 2
        total += rows * up_to(max(own_hidden, own_inner), 16) * 2 + rows * 3 * rank * 2
        total += max(own_qkv, own_hidden, 2 * own_inner) * rank * 2
    total += rows * dims.head_dim // 2 * 4 + WARPS * rows * 4
    return total + slots * WARPS * 8 + (dims.layers * 4 + 1) * 8 + 8 + 256 + 16 * 32 + 80


def scratch(dims: Dimensions) -> mx.array:
    """Return the kernel's scratch memory, all zero."""
    hidden, attended, intermediate = dims.inputs()
    qkv, group = attended + 2 * dims.kv_heads * dims.head_dim, dims.heads // dims.kv_heads
    plain = 4096 + 16 * (4 * hidden + 4 * qkv + 2 * attended + 2 * intermediate) + 256 * 16 * 8
    plain += dims.kv_heads * 32 * 16 * group * (8 + dims.head_dim * 4) + 4 * 4 * 16 * 96 * 8
    return mx.zeros(plain // 4, mx.uint32)


class DecodeKernel:
    """One base as the kernel sees it: addresses of its matrices, its norms, and scratch memory."""

    def __init__(self, model: LanguageModel, gpu: Gpu | None = None):
        self.model, self.gpu = model, gpu or Gpu(multiprocessors(), addresses, _step_kernel)
        self.dims = dimensions(model, self.gpu.blocks)
        shape, parts = model.shapes[0], model.parts
        norms = [
            layer[name] for layer in model.plain for name in ("input_norm", "post_norm", "q_norm", "k_norm")
        ]  # fmt: skip
        self.norms = mx.concatenate([*norms, parts.norm])
        turns = shape.theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.frequencies = mx.array(turns.astype(np.float32))
        self.scratch = scratch(self.dims)
        self.nothing = mx.zeros((8,), mx.bfloat16)
        mx.eval(self.norms, self.frequencies, self.scratch, self.nothing)
        copies = self._repacked if self.dims.bits == 4 else self._unpacked
        self.copies = [copies(at) for at in range(self.dims.layers)] if quantized(model) else None
        self.head = self._copy(parts.head, parts.head_packing)
        self.embedding = self.head if model.tied else self._copy(*stored_matrix(parts.embed))

    def _copy(self, matrix: tuple, how: Packing | None) -> mx.array:
        if self.dims.bits == 4:
            return _repacked([(matrix, how)])
        return matrix[0] if how is None else _dequantized(matrix, how)

    def _repacked(self, at: int) -> list[mx.array]:
        """Return a layer's matrices by group, in 4 bits as the kernel reads them."""
        stored = dict(self.model.shapes[at].packing)
        return [_repacked(list(zip(self.model.plain[at][group], stored[group], strict=True))) for group in GROUPS]

    def _unpacked(self, at: int) -> list[mx.array]:
        """Return a layer's matrices [outputs, inputs] by group, in 16 bits."""
        found, stored = [], dict(self.model.shapes[at].packing)
        for group in GROUPS:
            matrices = zip(self.model.plain[at][group], stored[group], strict=True)
            parts = [_dequantized(matrix, how) if how else matrix[0].T for matrix, how in matrices]
            found.append(mx.contiguous(mx.concatenate(parts)))
        mx.eval(found)
        return found

    def rank_of(self, update: Update | None) -> int | None:
        """Return the rank for which an adapter's update can stand beside the matrices, None if it cannot."""
        if not update:
            return 0
        own = max(a.shape[1] for a, _, _ in update.values())
        found = next((rank for rank in RANKS if rank >= own), None)
        fits = found and shared_bytes(self.dims, found, 8) <= SHARED_LIMIT
        return found if fits else None

    def packed(self, update: Update, rank: int) -> mx.array:
        """Lay an adapter out for the kernel: by layer and group A [inputs, members * rank] ([rank, inputs] for o), with
        the weights of the norm before it, then B [outputs, rank]."""
        found, norms = [], {"qkv": "input_norm", "gate_up": "post_norm"}
        for i in range(self.dims.layers):
            for group, own, widths in group_updates(self.model, update, i):
                norm = self.model.plain[i][norms[group]].astype(mx.float32) if group in norms else mx.ones(1)
                a = [_padded(pair, widths[at], rank)[0] * norm[:, None] for at, pair in enumerate(own)]
                b = [_padded(pair, widths[at], rank)[1].T for at, pair in enumerate(own)]
                # the columns as the tensor cores take them, see decode.cu: add_z
                a = a[0].T if group == "o" else mx.concatenate(a, axis=1).reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]]
                found += [a.reshape(-1), mx.concatenate(b).reshape(-1)]
        packed = mx.concatenate(found).astype(mx.bfloat16)
        mx.eval(packed)
        return packed

    def table(self, layers: list[dict]) -> mx.array:
        """Return the addresses of all matrices of ``layers``, looked up again: memory that the host reads may move."""
        # stored [outputs, inputs]; the layers hold transposed views of that
        if self.copies is None:
            arrays = [layer[group][0][0] for layer in layers for group in GROUPS]
        else:
            arrays = [matrix for layer in self.copies for matrix in layer]
        return self.gpu.addresses([*arrays, self.head, self.embedding])

    def longest(self, rank: int) -> int:
        """Return how many rows a step can have."""
        return ROWS if shared_bytes(self.dims, rank, ROWS) <= SHARED_LIMIT else 8


def _repacked(matrices: list[tuple[tuple, Packing]]) -> mx.array:
    """Return matrices [outputs, inputs], one under the other, as uint32 [warp and pass, outputs, words].

    Words: the values that a warp takes of a row, eight a word (the first of each pair in the low half), then scale and
    bias of each 32, then padding.
    """
    words, sides = [], []
    for (values, scales, biases), how in matrices:
        nibbles = [values >> 4 * at & 15 for at in range(8)]
        words.append(sum((nibbles[at] << 4 * (at // 2) + 16 * (at % 2) for at in range(1, 8)), nibbles[0]))
        pair = [side.astype(mx.bfloat16).view(mx.uint16).astype(mx.uint32) for side in (scales, biases)]
        sides.append(mx.repeat(pair[0] | pair[1] << 16, how.group_size // 32, axis=1))
    words, sides = mx.concatenate(words), mx.concatenate(sides)
    inputs, chunks = words.shape[1] * 8, _chunks(words.shape[1] * 8)
    parts = [part.reshape(len(part), -1, width) for part, width in ((words, chunks * 4), (sides, chunks))]
    rows = mx.concatenate(parts, axis=2)
    rows = mx.pad(rows, [(0, 0), (0, 0), (0, _four_bit_row(inputs) // 4 - rows.shape[2])])
    found = mx.contiguous(rows.swapaxes(0, 1))
    mx.eval(found)
    return found


def _dequantized(matrix: tuple, how: Packing) -> mx.array:
    found = mx.dequantize(*matrix, group_size=how.group_size, bits=how.bits, mode=how.mode).astype(mx.bfloat16)
    mx.eval(found)
    return found


def _padded(pair: tuple | None, widths: tuple[int, int], rank: int) -> tuple[mx.array, mx.array]:
    """Return a module's A [inputs, rank] and scaled B [rank, outputs] in float32, zero where it has none."""
    if pair is None:
        return mx.zeros((widths[0], rank)), mx.zeros((rank, widths[1]))
    (a, b, scale), more = pair, (0, rank - pair[0].shape[1])
    return mx.pad(a.astype(mx.float32), [(0, 0), more]), mx.pad(scale * b.astype(mx.float32), [more, (0, 0)])


class KernelBatch:
    """Rows that are decoded together, each in its own sequence of the cache; see `language_model.Batch`."""

    ahead = AHEAD

    def __init__(self, kernel: DecodeKernel, layers: list[dict], lora: tuple[mx.array | None, int], rows: int):
        """``lora``: an adapter as `DecodeKernel.packed` and its rank, or (None, 0); ``rows`` at most."""
        self.kernel, self.layers, (self.lora, self.rank) = kernel, layers, lora
        self.table = kernel.table(layers)
        self.sequences, self.columns = rows, 0
        self.keys = self.values = None  # [layers, sequences, kv_heads, columns, head_dim]; values: the last two swapped
        self.rows: list[int] = []  # sequence of each row
        self.used, self.positions = np.zeros(0, np.int64), np.zeros(0, np.int64)  # columns; M-RoPE's next position
        self.meta = None  # of the next step, on the device; None after the rows have changed

    def longest_draft(self, rows: int) -> int:
        """Return how many tokens of a row one pass can verify: 8, for which the kernel is fastest, of a single row.
        Passes over several tokens of several rows were not tried on a GPU."""
        return 8 if rows == 1 else 1

    def admit(self, row: Row) -> mx.array:
        """Prefill a prompt and add it to the batch; return the logits of its first token, [1, V]."""
        x, keys, values = self.kernel.model.prefill(self.layers, row)
        logits = self.kernel.model.logits(x)
        sequence = next(at for at in range(self.sequences) if at not in self.rows)
        self._make_room(len(row) + GROWTH)
        self.keys[:, sequence, :, : len(row)] = mx.concatenate(keys)
        self.values[:, sequence, :, :, : len(row)] = mx.concatenate(values).swapaxes(-1, -2)
        self.rows.append(sequence)
        self.used = np.append(self.used, len(row))
        self.positions = np.append(self.positions, int(row.position_ids.max()) + 1)
        self.meta = None
        mx.eval(logits, self.keys, self.values)
        return logits

    def step(self, tokens: mx.array, wanted: bool) -> tuple[mx.array, mx.array | None]:
        """Run each row's newest token, int32 [B]; return the next greedy ones and, if ``wanted``, logits [B, V]."""
        return self._run(tokens, 1, wanted)

    def verify(self, tokens: list[list[int]], wanted: bool) -> tuple[mx.array, mx.array | None]:
        """Run several tokens of each row at once; return what greedily follows each, [B, L], and logits [B, L, V]."""
        width = len(tokens[0])
        self.meta = None
        best, logits = self._run(mx.array(np.array(tokens, np.int32).reshape(-1)), width, wanted)
        self.meta = None
        return best.reshape(len(tokens), width), None if logits is None else logits.reshape(len(tokens), width, -1)

    def take_back(self, counts: list[int]) -> None:
        """Forget the last tokens of each row's last `verify`."""
        self.used = self.used - np.array(counts)
        self.positions = self.positions - np.array(counts)

    def keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[at] for at in rows]
        self.used, self.positions, self.meta = self.used[rows], self.positions[rows], None

    def _run(self, tokens: mx.array, width: int, wanted: bool) -> tuple[mx.array, mx.array | None]:
        kernel, count = self.kernel, len(self.rows) * width
        self._make_room(int(self.used.max()) + width)
        if self.meta is None:
            self.meta = self._meta(width)
        run = kernel.gpu.compiled(kernel.dims, self.rank, 8 if count <= 8 else ROWS, wanted)
        shapes, dtypes = [(ROWS,), (64,)], [mx.int32, mx.int32]
        if wanted:
            shapes, dtypes = [*shapes, (count, kernel.dims.vocabulary)], [*dtypes, mx.float32]
        lora = kernel.nothing if self.lora is None else self.lora
        best, self.meta, *logits = run(
            inputs=[tokens, self.meta, self.table, kernel.norms, lora, self.keys, self.values, kernel.frequencies,
                    kernel.scratch],
            output_shapes=shapes, output_dtypes=dtypes, grid=(kernel.gpu.blocks * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )  # fmt: skip
        self.used, self.positions = self.used + width, self.positions + width
        return best[:count], logits[0] if logits else None

    def _meta(self, width: int) -> mx.array:
        """Return int32 [64]: the cache's columns and sequences, rows of the step, tokens a sequence; then (sequence,
        column, position) a row."""
        found = np.zeros(64, np.int32)
        found[:4] = self.columns, self.sequences, len(self.rows) * width, width
        at = np.arange(width)
        parts = [
            np.stack([np.full(width, sequence), used + at, position + at], axis=1)
            for sequence, used, position in zip(self.rows, self.used, self.positions, strict=True)
        ]
        found[4 : 4 + 3 * len(parts) * width] = np.concatenate(parts).reshape(-1)
        return mx.array(found)

    def _make_room(self, columns: int) -> None:
        if columns <= self.columns:
            return
        wanted = -(-columns // GROWTH) * GROWTH
        dims = self.kernel.dims
        if self.keys is None:
            shape = dims.layers, self.sequences, dims.kv_heads
            self.keys = mx.zeros((*shape, wanted, dims.head_dim), mx.bfloat16)
            self.values = mx.zeros((*shape, dims.head_dim, wanted), mx.bfloat16)
        else:
            mx.eval(self.keys, self.values)
            mx.synchronize()  # steps under way write into the old arrays
            more = (0, wanted - self.columns)
            self.keys = mx.pad(self.keys, [(0, 0)] * 3 + [more, (0, 0)])
            self.values = mx.pad(self.values, [(0, 0)] * 4 + [more])
        mx.eval(self.keys, self.values)
        self.columns, self.meta = wanted, None

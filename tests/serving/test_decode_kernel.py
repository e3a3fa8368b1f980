"""The CUDA kernel that decodes a token, run on the CPU from its own source, against plain MLX operations.

cuda_on_cpu.h plays the GPU: what is tested is the text that NVIDIA GPUs run, and the code that packs its arguments. The
logits' bits must not depend on the order in which the GPU's threads come along: every seed is another order.
"""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from integration.lora_patch import decode_kernel
from integration.lora_patch.decode_kernel import DecodeKernel, KernelBatch
from integration.lora_patch.language_model import Batch, LanguageModel
from integration.lora_patch.vlm import LAYERS, TARGET_MODULES, Row
from tests.benchmarks.bench_generate import SHAPES, random_base
from tests.serving.cuda_on_cpu import Cpu

TOLERANCE = 0.02  # norm of the logits' difference over their norm; bfloat16 gives 0.01
VOCABULARY = 500
BLOCKS = {0: 8, 8: 8, 16: 9}  # of the grid, by rank
# rows join and leave; one passes column 160, from where on the kernel's attention takes a second turn
JOINING = [("admit", 190), ("admit", 158), ("step",), ("admit", 33), ("step",), ("step",), ("keep", [2, 1]), ("step",),
           ("admit", 17), ("verify", 2, 1), ("step",)]  # fmt: skip
SHORT = [("admit", 5), ("admit", 33), ("step",), ("keep", [1]), ("verify", 3, 1), ("step",)]
# one row, several tokens at a time, some of them taken back
DRAFTS = [("admit", 58), *(("verify", width, width // 2) for width in range(2, 9)), ("step",)]


def random_model(bits: int = 16, rounded: bool = False) -> LanguageModel:
    """Return a model of 16-bit matrices (``rounded``: to what 4 bits hold) or of 4-bit ones."""
    text = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY)  # fmt: skip
    base = random_base(SHAPES["tiny"] | {"text": text, "rope": [12, 10, 10], "dtype": mx.bfloat16})
    language_model = base.model.language_model

    def drawn(w: mx.array) -> mx.array:
        if w.ndim == 1:  # norms that all are one would hide that they are used
            return mx.random.uniform(0.6, 1.4, w.shape, w.dtype)
        return mx.dequantize(*mx.quantize(w, 64, 4), 64, 4) if rounded else w

    language_model.update(tree_map(drawn, language_model.parameters()))
    if bits == 4:
        nn.quantize(language_model, 64, 4)
    return LanguageModel(base)


def random_update(model: LanguageModel, rank: int, wanted: str = "") -> dict:
    """Return an adapter's update as strong as the matrices: of all modules, or of layer 1's that ``wanted`` names."""
    rng, update = np.random.default_rng(rank), {}
    for layer, spec in enumerate(model.parts.specs):
        for name, (inputs, outputs) in spec.widths:
            if not wanted or (layer == 1 and name in wanted.split()):
                module = next(module for module in TARGET_MODULES if f".{name}_proj" in module)
                a, b = rng.normal(0, inputs**-0.5, (inputs, rank)), rng.normal(0, rank**-0.5, (rank, outputs))
                update[f"{LAYERS}.{layer}.{module}"] = mx.array(a), mx.array(b), 0.5
    return update


def prompt(length: int) -> Row:
    rng, none = np.random.default_rng(length), np.zeros(0, np.int32)
    positions = np.arange(length) + np.array([[0], [3], [1]])  # past the columns, as after a photograph
    return Row(rng.integers(0, VOCABULARY, length), np.zeros(length, bool), positions, none, None, None)


def played(batch: Batch | KernelBatch, script: list[tuple], wanted: bool = True) -> list[tuple]:
    """Return (greedy tokens, logits) of each step of a script."""
    rng, rows, found = np.random.default_rng(0), 0, []
    for what, *options in script:
        if what == "admit":
            batch.admit(prompt(*options))
            rows += 1
        elif what == "keep":
            batch.keep(*options)
            rows = len(options[0])
        else:
            width = options[0] if options else 1
            tokens = rng.integers(0, VOCABULARY, (rows, width))
            if what == "verify":
                best, logits = batch.verify(tokens.tolist(), wanted)
                batch.take_back([options[1]] * rows)
            else:
                best, logits = batch.step(mx.array(tokens[:, 0].astype(np.int32)), wanted)
            mx.eval(best, logits)
            found.append((best, None if logits is None else logits.astype(mx.float32)))
    return found


class Case:
    """A model with an adapter, or none, on a CPU that plays the GPU."""

    def __init__(self, model: LanguageModel, cpu: Cpu, rank: int = 0, update: dict | None = None):
        self.model, self.cpu, self.kernel = model, cpu, DecodeKernel(model, cpu.gpu)
        self.update, self.layers, self.lora = update, model.layers(update), (None, 0)
        if update:
            assert self.kernel.rank_of(update) == rank
            self.lora = self.kernel.packed(update, rank), rank

    def runs(self, script: list[tuple], seed: int = 1, wanted: bool = True, rows: int = 3) -> list[tuple]:
        self.cpu.seed = seed
        return played(KernelBatch(self.kernel, self.layers, self.lora, rows), script, wanted)

    def check(self, script: list[tuple], seeds: tuple[int, ...] = (1,), rows: int = 3) -> None:
        plain, first = played(Batch(self.model, self.model.layers(self.update)), script), None
        for seed in seeds:
            fast = self.runs(script, seed, rows=rows)
            first = first or fast
            for (_, wanted), (best, logits), (_, before) in zip(plain, fast, first, strict=True):
                assert mx.array_equal(logits, before, equal_nan=True), (
                    f"another order of threads, seed {seed}, changes the logits"
                )
                assert mx.array_equal(best, mx.argmax(logits, axis=-1))
                difference = mx.linalg.norm(logits - wanted) / mx.linalg.norm(wanted)
                assert difference.item() < TOLERANCE


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model()


@pytest.fixture(scope="module")
def cpus(model, tmp_path_factory) -> dict[int, Cpu]:
    """A CPU for each rank, by rank; what is compiled for them is compiled side by side."""
    folder = tmp_path_factory.mktemp("kernels")
    found = {rank: Cpu(folder, blocks) for rank, blocks in BLOCKS.items()}
    wanted = [(0, 8, True), (0, 8, False), (8, 8, True), (8, 16, True), (16, 8, True)]
    with ThreadPoolExecutor(2) as pool:
        dims = {rank: decode_kernel.dimensions(model, blocks) for rank, blocks in BLOCKS.items()}
        list(pool.map(lambda which: found[which[0]].library(dims[which[0]], *which), wanted))
    return found


@pytest.fixture(scope="module")
def base(model, cpus) -> Case:
    return Case(model, cpus[0])


@pytest.fixture(scope="module")
def rank_8(model, cpus) -> Case:
    return Case(model, cpus[8], 8, random_update(model, 8))


def test_base_with_rows_that_join_and_leave(base):
    base.check(JOINING, seeds=(1, 2))


def test_several_tokens_of_a_row(base):
    base.check(DRAFTS, seeds=(1, 2))


@pytest.mark.parametrize("rows", [1, 8])
def test_rows(base, rows):
    base.check([*(("admit", 3 + 5 * row) for row in range(rows)), ("step",), ("step",)], rows=rows)


def test_adapter(rank_8):
    rank_8.check(JOINING, seeds=(1, 2))
    rank_8.check(DRAFTS[:1] + DRAFTS[-2:])


def test_adapter_in_16_rows(rank_8):
    rank_8.check([*(("admit", 3 + 5 * row) for row in range(16)), ("step",), ("step",)], (1,), 16)


def test_adapter_of_rank_16(model, cpus):
    Case(model, cpus[16], 16, random_update(model, 16)).check(SHORT)


def test_a_head_of_a_that_has_no_room(model, cpus):
    """As of rank 32: what attention gives to z is then multiplied with A in device memory."""
    cpu = Cpu(cpus[8].folder, BLOCKS[8])
    cpu.changes = {"HEAD_A_FITS = ATTENTION + HEAD_A <= PARTS": "HEAD_A_FITS = false"}
    Case(model, cpu, 8, random_update(model, 8)).check(SHORT[:3])


def test_adapter_of_some_modules(model, cpus):
    """Of a rank that is padded, in one layer, without keys, gates and attention's outputs."""
    Case(model, cpus[8], 8, random_update(model, 5, "q v up down")).check(JOINING[:3])


@pytest.mark.parametrize("read", [4, 16])
def test_quantized_base(cpus, monkeypatch, read):
    """In 4 bits as they are stored, and unpacked."""
    if read == 16:
        monkeypatch.setattr(decode_kernel, "four_bits", lambda model: False)
    case, rounded = Case(random_model(bits=4), cpus[0]), random_model(rounded=True)
    assert case.kernel.dims.bits == read
    copies = [*(matrix for layer in case.kernel.copies for matrix in layer), case.kernel.head]
    assert sum(copy.nbytes for copy in copies) == decode_kernel.copied_bytes(case.kernel.dims)
    # MLX's product with 4-bit matrices sums in 16 bits on a CPU, and is off by more than the kernel
    case.model = case.kernel.model = rounded
    case.layers = rounded.plain
    case.check(SHORT)


def test_adapter_beside_a_quantized_base(cpus, monkeypatch):
    monkeypatch.setattr(decode_kernel, "CHUNKS", 2)
    model, rounded = random_model(bits=4), random_model(rounded=True)
    case = Case(model, cpus[8], 8, random_update(model, 8))
    case.model = case.kernel.model = rounded
    case.layers = rounded.layers(case.update)
    case.check(JOINING[:5], (1, 2))


def test_cache_that_grows(base, monkeypatch):
    monkeypatch.setattr(decode_kernel, "GROWTH", 32)
    base.check([("admit", 63), *[("verify", 8, 0)] * 5, ("admit", 7), ("step",)])


def test_tokens_without_logits(base):
    with_logits, without = base.runs(SHORT), base.runs(SHORT, wanted=False)
    for (best, _), (alone, logits) in zip(with_logits, without, strict=True):
        assert logits is None and mx.array_equal(best, alone)


def test_inputs_in_several_passes(base, monkeypatch):
    """More inputs than a warp holds at once, as the 9,728 of Qwen3-VL-4B's last projection."""
    monkeypatch.setattr(decode_kernel, "CHUNKS", 2)
    base.check(JOINING[:3])


def test_a_missing_barrier_is_found(model, cpus):
    """A block's threads that do not wait for the one that has seen the grid's barrier read values too early."""
    cpu = Cpu(cpus[0].folder, BLOCKS[0])
    found = "      ticket() = before ^ 0x80000000u;\n    }\n"
    cpu.changes = {found + "    __syncthreads();\n": found}
    with pytest.raises(AssertionError):
        Case(model, cpu).check(SHORT[:3])

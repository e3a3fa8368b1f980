"""What a training run needs in memory and what the device has: estimated from shapes before the first step.

Sizes are bytes. The estimate counts what lives at the peak of a step: the base, the adapter with its gradients and
moments, the activations that the backward pass needs, and the layer or output head that is being computed.
"""

import re
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from common.errors import UserError
from common.model.layer import CHUNK
from common.model.step import IN_FLIGHT as QUEUED
from common.model.step import ROW_CHUNK, VOCAB_CHUNK, round_up
from integration.lora_patch.memory import Device

GB = 1e9
PAD_MULTIPLE = {"metal": 32, "cuda": 128, "cpu": 16}  # CUDA's fused attention backward wants 128; else padding is waste
FORWARD = {"metal": "chunked", "cuda": "chunked", "cpu": "full"}
IN_FLIGHT = QUEUED + 1  # layers whose temporaries exist at once
OUT_OF_MEMORY = re.compile(r"out of memory|malloc|unable to allocate|insufficient memory|bad_alloc", re.I)


def size(count: float) -> str:
    """Return bytes as people read them: 12.3 GB, 260 MB, 0.4 MB."""
    if count >= GB:
        return f"{count / GB:.1f} GB"
    return f"{count / 1e6:.{0 if count >= 1e7 else 1}f} MB"


# -- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """What of model and adapter decides the memory."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    itemsize: int  # bytes of an activation
    quantized: bool
    weights: int  # bytes of the base, vision tower included
    trainable: int  # LoRA parameters
    rank: int
    deepstack: int  # levels of the vision tower that are added to the first layers
    # scores: "fused": never formed; "chunked": in the backward pass alone; "full": in the forward pass too, all of them
    attention: str


def shape_of(model: nn.Module, rank: int, backend: str) -> ModelShape:
    """Read the shape from a loaded model; the adapter need not be attached yet."""
    text = model.language_model.args
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = model.language_model.model.norm.weight.dtype
    arrays = [a for name, a in tree_flatten(model.parameters()) if not name.endswith(("lora_a", "lora_b"))]
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        itemsize=dtype.size,
        quantized=any(array.dtype == mx.uint32 for array in arrays),
        weights=sum(array.nbytes for array in arrays),
        trainable=text.num_hidden_layers * rank * adapter_width(text, head_dim),
        rank=rank,
        deepstack=len(model.config.vision_config.deepstack_visual_indexes),
        # CUDA's fused backward takes 16-bit values and heads of at most 128; the CPU's forward is not fused either
        attention="fused" if backend == "cuda" and dtype.size == 2 and head_dim <= 128 else FORWARD[backend],
    )


def adapter_width(text, head_dim: int) -> int:
    """Return the sum of input and output widths of a layer's seven projections: LoRA parameters per rank."""
    q, kv = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    return 7 * text.hidden_size + 2 * q + 2 * kv + 3 * text.intermediate_size


@dataclass(frozen=True)
class Layout:
    """How a step lies in memory; a resumed run keeps it, since other micro-batches would round differently."""

    micro: int  # rows on the device at once
    checkpointing: bool
    multiple: int  # tokens: rows are padded to multiples of it
    max_length: int  # tokens of the longest row


@dataclass(frozen=True)
class Plan:
    """A layout, and the bytes that it is estimated to need."""

    layout: Layout
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{size(self.total)} ({', '.join(f'{name} {size(part)}' for name, part in self.parts.items())})"


def estimate(shape: ModelShape, layout: Layout, targets: int) -> Plan:
    """Estimate the peak of a step of ``layout``; ``targets``: supervised tokens in each of its rows, at most."""
    rows, micro = round_up(layout.max_length, layout.multiple), layout.micro
    tokens, supervised = micro * rows, round_up(micro * targets, layout.multiple)
    d, q, kv, inner = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    item, adapter = shape.itemsize, shape.trainable
    # kept for the backward pass, in values a token and layer: see "keep" in common/model/layer.py
    products = q + 2 * kv + 2 * inner
    kept = 2 * d + 7 * shape.rank + (0 if layout.checkpointing else products)
    # temporaries of the layers that are under way at once; a quarter of them is always float32
    values = 4 * d + 4 * q + 5 * inner + (products if layout.checkpointing else 0)
    layer = IN_FLIGHT * tokens * values * (3 * item + 4) // 4
    # float32 scores and what becomes of them: of a block of queries, or of all
    scores = {"fused": 0, "chunked": 8 * min(CHUNK, rows), "full": max(8 * min(CHUNK, rows), 5 * rows)}
    layer += 4 * micro * shape.heads * scores[shape.attention] * rows
    # the output head: logits of a block of rows, and float32 passes over a block of the vocabulary
    block = min(supervised, ROW_CHUNK)
    head = block * (shape.vocabulary * item + 3 * min(VOCAB_CHUNK, shape.vocabulary) * 4)
    if shape.quantized:  # matrices unpacked for their products
        layer += IN_FLIGHT * item * (2 * d * q + 2 * d * kv + 3 * d * inner)
        head += item * shape.vocabulary * d
    parts = {
        "base": shape.weights,
        "adapter and AdamW": adapter * (4 + 8 + item),
        "activations": shape.layers * tokens * kept * item + 2 * tokens * d * item * (1 + shape.deepstack),
        "temporaries": max(head, layer + 8 * adapter, 20 * adapter),
    }
    return Plan(layout, parts)


@dataclass(frozen=True)
class Planner:
    """Finds the layout with which the rows of a run fit its device, given what the user fixed."""

    shape: ModelShape
    device: Device
    lengths: list[int]  # tokens of each row
    targets: list[int]  # of them, those that the loss counts
    multiple: int  # tokens: rows are padded to multiples of it
    batch_size: int
    micro: int | None = None  # None: the memory decides
    checkpointing: bool | None = None  # None: the memory decides

    def estimate(self, micro: int, checkpointing: bool) -> Plan:
        layout = Layout(micro, checkpointing, self.multiple, max(self.lengths))
        return estimate(self.shape, layout, max(self.targets))

    def fit(self) -> Plan | None:
        """Return the fastest layout that fits, or None; for no rows None.

        Checkpointing recomputes every layer and costs about a third of the speed; smaller micro-batches cost little.
        """
        if not self.lengths:
            return None
        halves = {-(-self.batch_size // parts) for parts in range(1, self.batch_size + 1)}
        for checkpointing in [False, True] if self.checkpointing is None else [self.checkpointing]:
            for micro in [self.micro] if self.micro else sorted(halves, reverse=True):
                plan = self.estimate(micro, checkpointing)
                if plan.total <= self.device.budget:
                    return plan
        return None

    def up_to(self, length: int) -> "Planner":
        """Return the same for the rows of at most ``length`` tokens."""
        kept = [at for at, own in enumerate(self.lengths) if own <= length]
        return replace(self, lengths=[self.lengths[at] for at in kept], targets=[self.targets[at] for at in kept])

    def longest(self) -> int:
        """Return the length of the longest row that fits with every means of saving memory; 0 if none does."""
        for length, target in sorted(zip(self.lengths, self.targets, strict=True), reverse=True):
            if replace(self, lengths=[length], targets=[target], batch_size=1).fit():
                return length
        return 0

    def too_large(self) -> UserError:
        """Return the error that names the flags to change, with numbers."""
        plan = self.estimate(self.micro or 1, self.checkpointing is not False)
        advice = []
        if self.micro not in (None, 1):
            advice.append("--micro_batch_size 1")
        if self.checkpointing is False:
            saved = plan.total - self.estimate(plan.layout.micro, True).total
            advice.append(f"--grad_checkpointing on (saves {size(saved)})")
        if length := replace(self, micro=1, checkpointing=True).longest():
            kept = len(self.up_to(length).lengths)
            advice.append(f"--max_seq_length {length} (keeps {kept} of {len(self.lengths)} examples)")
        advice.append("--max_image_size 768 (44% fewer image tokens than 1024)")
        halved = 22 * self.shape.trainable / 2  # values, gradients, moments
        if halved > 0.02 * self.device.budget:
            advice.append(f"half the --lora_r (saves {size(halved)})")
        if not self.shape.quantized:
            advice.append(f"a 4-bit --base_model (saves about {size(0.7 * self.shape.weights)})")
        return UserError(
            f"{self.device.name} has {size(self.device.budget)} for training and this run needs about {plan}, at "
            f"micro-batch {plan.layout.micro} with{'' if plan.layout.checkpointing else 'out'} checkpointing. "
            "Try " + ", or ".join(advice)
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a RuntimeError of MLX's, or a MemoryError, means that the device is full."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))

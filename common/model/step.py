"""Loss and LoRA gradients of a micro-batch, computing only what the loss needs.

    batch = collate(base.model, rows)
    loss_sum, n_tokens, grads = loss_and_grads(base.model, batch, checkpointing=True, seed=(run_seed, step, micro))
    loss_sum, n_tokens = loss_only(base.model, batch)

Sums, not means: the caller divides by the tokens of the whole global batch. A trainer keeps the adapter as one
float32 vector instead (`pack_lora`, `packed_loss_and_grads`, `unpack_lora`): one optimizer kernel, one norm and one
all-reduce in place of 504 each. No files are read or written.
"""

import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.model import kernels, layer
from common.model.lora import lora_parameters
from integration.lora_patch.vlm import Decoder, LayerSpec, Packing, Row, decoder

PAD_MULTIPLE = 128  # CUDA's fused attention backward exists only for lengths that are multiples of 128
IN_FLIGHT = 1  # layers queued on the device ahead of the one it works on; 2 and 4 are no faster, and take 1 GB each
VOCAB_CHUNK = 16384  # columns of the output head at a time
ROW_CHUNK = 1024  # supervised positions at a time


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Rows padded to one length L, ready for the decoder. R counts the positions whose next token is supervised."""

    hidden: mx.array  # [B * L, D]: token embeddings, image features in place
    deepstack: list[mx.array]  # K arrays [B * L, D], zero outside the image tokens
    rope: tuple[mx.array, mx.array]  # cos and sin [B, L, 1, 2, d / 2], sin's first half negated
    rows: mx.array  # uint32 [B * L]: names a position (row of the batch, place in it) for dropout, whatever the padding
    targets: mx.array  # int32 [R]: the positions that predict a supervised token
    labels: mx.array  # int32 [R]: the token each of them has to predict
    weights: mx.array  # float32 [R]: 1, or 0 for padding
    n_tokens: int  # supervised tokens, padding excluded
    shape: tuple[int, int]  # B, L

    @property
    def arrays(self) -> list[mx.array]:
        """Everything lazy in here: what `mx.async_eval` takes to fetch the batch ahead of its step."""
        return [self.hidden, *self.deepstack, *self.rope, self.rows, self.targets, self.labels, self.weights]


def collate(model: nn.Module, rows: list[Row], multiple: int = PAD_MULTIPLE) -> Batch:
    """Pad rows on the right to a common multiple of ``multiple`` and merge text and image features (lazily).

    Right padding needs no mask: attention is causal, so no real token ever sees a padded one.
    """
    parts = decoder(model)
    length = round_up(max(len(row) for row in rows), multiple)
    ids = np.zeros((len(rows), length), dtype=np.int32)
    positions = np.zeros((3, len(rows), length), dtype=np.int32)
    slots = np.zeros((len(rows), length), dtype=np.int32)  # 0: text; n: the n-th image feature of the batch
    targets, labels, seen = [], [], 0
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.input_ids
        positions[:, i, : len(row)] = row.position_ids
        slots[i, row.visual] = np.arange(seen + 1, seen + 1 + len(row.visual))
        seen += len(row.visual)
        predicts = np.flatnonzero(row.completion_mask[1:])
        targets.append(predicts + i * length)
        labels.append(row.input_ids[predicts + 1])
    targets, labels = np.concatenate(targets), np.concatenate(labels)
    hidden, slots = parts.embed(mx.array(ids)), mx.array(slots)
    deepstack = []
    pictured = [row for row in rows if row.features is not None]
    if pictured:
        features = mx.concatenate([row.features for row in pictured]).astype(hidden.dtype)
        hidden = mx.where((slots > 0)[..., None], _by_slot(features, slots), hidden)
        if pictured[0].deepstack is not None:
            levels = mx.concatenate([row.deepstack for row in pictured], axis=1).astype(hidden.dtype)
            deepstack = [_by_slot(level, slots).reshape(-1, hidden.shape[-1]) for level in levels]
    extra = max(multiple, round_up(len(targets), multiple)) - len(targets)
    names = np.arange(len(rows))[:, None] * 2**20 + np.arange(length)
    return Batch(
        hidden.reshape(-1, hidden.shape[-1]),
        deepstack,
        _rope(*parts.rotary(hidden, mx.array(positions))),
        mx.array(names.reshape(-1).astype(np.uint32)),
        mx.array(np.pad(targets, (0, extra)).astype(np.int32)),
        mx.array(np.pad(labels, (0, extra)).astype(np.int32)),
        mx.array(np.pad(np.ones(len(targets), dtype=np.float32), (0, extra))),
        len(targets),
        (len(rows), length),
    )


def round_up(n: int, multiple: int) -> int:
    """Return ``n`` rounded up to a ``multiple``."""
    return -(-n // multiple) * multiple


def _by_slot(features: mx.array, slots: mx.array) -> mx.array:
    return mx.concatenate([mx.zeros_like(features[:1]), features])[slots]


def _rope(cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    shape = (*cos.shape[:2], 1, 2, cos.shape[-1] // 2)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    return cos, mx.concatenate([-sin[..., :1, :], sin[..., 1:, :]], axis=-2)


# -- the adapter as one vector ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """One matrix of every layer: a stretch of the vector, [layers, rows, columns]."""

    part: str  # "lora_a": a group's A matrices side by side; "lora_b": one projection's B
    of: tuple[str, ...]  # the projections
    start: int
    shape: tuple[int, int, int]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def take(self, vector: mx.array) -> mx.array:
        return vector[self.start : self.stop].reshape(self.shape)


@lru_cache
def _blocks(spec: LayerSpec, layers: int) -> tuple[_Block, ...]:
    """Return the vector's layout: all A first, so that one kernel casts and scales them, then all B."""
    widths, blocks, at = dict(spec.widths), [], 0
    for group in layer.adapted(spec):
        names = tuple(layer.members(spec, group))
        blocks.append(_Block("lora_a", names, at, (layers, widths[names[0]][0], len(names) * spec.rank)))
        at = blocks[-1].stop
    for group in layer.adapted(spec):
        for name in layer.members(spec, group):
            blocks.append(_Block("lora_b", (name,), at, (layers, spec.rank, widths[name][1])))
            at = blocks[-1].stop
    return tuple(blocks)


def _layout(parts: Decoder) -> tuple[_Block, ...]:
    spec = parts.specs[0]
    if any((s.widths, s.lora, s.rank) != (spec.widths, spec.lora, spec.rank) for s in parts.specs):
        raise ValueError("the decoder layers differ in shape or in adapted projections")
    return _blocks(spec, len(parts.specs))


def pack_lora(model: nn.Module, values: dict[str, mx.array] | None = None) -> mx.array:
    """Return ``values`` (the model's own LoRA parameters, if None) as one float32 vector."""
    values, parts = lora_parameters(model) if values is None else values, decoder(model)
    pieces = []
    for block in _layout(parts):
        for names in parts.names:
            matrices = [values[f"{names[name]}.{block.part}"] for name in block.of]
            pieces.append(mx.concatenate(matrices, axis=1).reshape(-1))
    return mx.concatenate(pieces).astype(mx.float32)


def unpack_lora(model: nn.Module, vector: mx.array | np.ndarray) -> dict[str, mx.array | np.ndarray]:
    """Return the matrices of a packed vector by parameter name, as in `lora_parameters`; of MLX or numpy, as given."""
    split = np.split if isinstance(vector, np.ndarray) else mx.split
    parts, values = decoder(model), {}
    for block in _layout(parts):
        for names, held in zip(parts.names, block.take(vector), strict=True):
            for name, matrix in zip(block.of, split(held, len(block.of), axis=1), strict=True):
                values[f"{names[name]}.{block.part}"] = matrix
    return {name: values[name] for name in lora_parameters(model)}


# -- loss and gradients -----------------------------------------------------------------------------------------------


def packed_loss_and_grads(
    model: nn.Module,
    batch: Batch,
    vector: mx.array,
    *,
    checkpointing: bool = False,
    seed: tuple[int, ...] | None = None,
    grads: mx.array | None = None,
) -> tuple[mx.array, int, mx.array]:
    """Return (summed cross-entropy float32 [], supervised tokens, gradient of that sum, a vector like ``vector``).

    ``vector``: the adapter, float32 (`pack_lora`). ``seed`` names the dropout masks (run, step, micro-batch ...); None
    switches dropout off. ``checkpointing`` keeps only the inputs of each layer's two halves, for a fifth more time.
    ``grads`` are added to.
    """
    parts = decoder(model)
    queue = _Queue()
    x, kept, noise, lora = _run_forward(parts, batch, vector, "inputs" if checkpointing else "all", seed, queue)
    loss, dx = _head(parts, x, batch, queue, True)
    del x
    queue.push(loss, dx)
    last = len(parts.specs) - 1
    new = [None] * (last + 1)
    for i in range(last, -1, -1):
        spec = parts.specs[i]
        fused = layer.fused_backward(dx.dtype, spec.head_dim, batch.shape[1])
        run = layer.backward(spec, fused, i > 0)
        targets = batch.targets if i == last else None
        weights, where = (parts.grouped[i], lora[i]), (batch.rope, noise[i], batch.rows, targets)
        dx, new[i] = run(dx, kept.pop(), weights, where)
        queue.push(dx, *(array for pair in new[i] for array in pair))
    total = _join_grads(parts, new)
    return loss, batch.n_tokens, total if grads is None else grads + total


def loss_only(model: nn.Module, batch: Batch, vector: mx.array | None = None) -> tuple[mx.array, int]:
    """Return (summed cross-entropy float32 [], supervised tokens): validation, without dropout.

    Of the adapter in ``vector``, or as the model stands: its own adapter if that is on, else the base alone.
    """
    parts = decoder(model)
    if vector is None and any(spec.lora for spec in parts.specs):
        vector = pack_lora(model)
    queue = _Queue()
    x = _run_forward(parts, batch, vector, "nothing", None, queue)[0]
    return _head(parts, x, batch, queue, False)[0], batch.n_tokens


class _Queue:
    """Keeps the device busy without letting the host run ahead of it.

    A buffer of queued work is allocated when it is queued and freed when the device is done. Unbounded, the host queues
    a whole backward pass and the peak grows by every layer's temporaries (30 GB instead of 17 for the 4B model);
    without a queue the device idles while Python prepares the next layer.
    """

    def __init__(self):
        self.waiting = deque()

    def push(self, *arrays: mx.array | None) -> None:
        arrays = [a for a in arrays if a is not None]
        mx.async_eval(arrays)
        self.waiting.append(arrays)
        if len(self.waiting) > IN_FLIGHT:
            mx.eval(self.waiting.popleft())


def _run_forward(parts, batch, vector, keep, seed, queue):
    x = batch.hidden
    lora = _split_lora(parts, vector, x.dtype)
    dropping = seed is not None and any(spec.dropout > 0 for spec in parts.specs)
    noise = list(layer.seeds(seed, len(parts.specs))) if dropping else [None] * len(parts.specs)
    kept = []
    for i, spec in enumerate(parts.specs):
        targets = batch.targets if i == len(parts.specs) - 1 else None
        weights, where = (parts.grouped[i], lora[i]), (batch.rope, noise[i], batch.rows, targets)
        x, held = layer.forward(spec, keep)(x, weights, where)
        if i < len(batch.deepstack):
            x = x + (batch.deepstack[i] if targets is None else batch.deepstack[i][targets])
        kept.append(held)
        queue.push(x, *(a for name, a in held.items() if name != "z"))
    return x, kept, noise, lora


def _split_lora(parts: Decoder, vector: mx.array | None, dtype: mx.Dtype) -> list[list[tuple]]:
    """Cut the vector into each layer's [(A times the LoRA scale, B blocks) of each group], in the compute dtype.

    Float32 matrices would promote every activation that they meet. All layers at once: a kernel for each kind of
    matrix instead of one for each matrix.
    """
    layout = _layout(parts) if vector is not None else ()
    if not layout:
        return [[] for _ in parts.specs]
    spec, n_a = parts.specs[0], max(block.stop for block in layout if block.part == "lora_a")
    cast = mx.concatenate([(vector[:n_a] * spec.lora_scale).astype(dtype), vector[n_a:].astype(dtype)])
    a = {block.of: block.take(cast) for block in layout if block.part == "lora_a"}
    b = {block.of[0]: block.take(cast) for block in layout if block.part == "lora_b"}
    groups = []
    for group in layer.adapted(spec):
        width, places = layer.columns(spec, group)
        names = layer.members(spec, group)
        rows = [mx.pad(b[name], [(0, 0), (0, 0), (places[name][0], width - places[name][1])]) for name in names]
        groups.append((a[tuple(names)], rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=1)))
    return [[(a[i], b[i]) for a, b in groups] for i in range(len(parts.specs))]


def _join_grads(parts: Decoder, layers: list[list[tuple]]) -> mx.array:
    """Return the vector of each layer's [(A, B blocks) gradients of each group], float32, with the LoRA scale on A."""
    spec, a, b = parts.specs[0], [], []
    for g, group in enumerate(layer.adapted(spec)):
        a.append(mx.stack([pairs[g][0] for pairs in layers]).reshape(-1))
        blocks = mx.stack([pairs[g][1] for pairs in layers])
        for i, name in enumerate(layer.members(spec, group)):
            start, stop = layer.columns(spec, group)[1][name]
            b.append(blocks[:, i * spec.rank : (i + 1) * spec.rank, start:stop].reshape(-1))
    return mx.concatenate(
        [mx.concatenate(a).astype(mx.float32) * spec.lora_scale, mx.concatenate(b).astype(mx.float32)]
    )


# -- the output head --------------------------------------------------------------------------------------------------


def _head(
    parts: Decoder, x: mx.array, batch: Batch, queue: _Queue, with_grad: bool
) -> tuple[mx.array, mx.array | None]:
    """Return the weighted sum of cross-entropies of x [R, D], and its gradient in x.

    The gradient of the logits is formed at once, so the head is multiplied twice, not three times, and never gets a
    gradient. Blocks of rows and of vocabulary bound the memory to the logits of ROW_CHUNK rows, in x's dtype; a
    quantized head is unpacked block by block.
    """
    n = mx.fast.rms_norm(x, parts.norm, parts.eps)
    loss, gradients = mx.array(0.0), []
    for start in range(0, len(x), ROW_CHUNK):
        cut = slice(start, start + ROW_CHUNK)
        part, d = _head_rows(parts, n[cut], batch.labels[cut], batch.weights[cut], queue, with_grad)
        loss = loss + part
        gradients.append(d)
    if not with_grad:
        return loss, None
    dn = gradients[0] if len(gradients) == 1 else mx.concatenate(gradients)
    return loss, kernels.norm_vjp(x, parts.norm, parts.eps, dn)


def _head_rows(parts, n, labels, weights, queue, with_grad):
    blocks, sums, target = [], [], mx.zeros(labels.shape)
    for start in range(0, parts.head[0].shape[0], VOCAB_CHUNK):
        w = tuple(m[start : start + VOCAB_CHUNK] for m in parts.head)
        local = labels - start
        logits, total, target = _logits(parts.head_packing)(n, w, local, target)
        sums.append(total)
        blocks.append((logits, w, local))
        queue.push(logits, total, target)
    lse = mx.logsumexp(mx.stack(sums), axis=0)
    loss = ((lse - target) * weights).sum()
    if not with_grad:
        return loss, None
    dn = mx.zeros_like(n)
    while blocks:
        logits, w, local = blocks.pop()
        dn = _logits_vjp(parts.head_packing)(dn, logits, w, local, lse, weights)
        del logits
        queue.push(dn)
    return loss, dn


@lru_cache
def _logits(packing: Packing | None):
    """Return f(n [R, D], block of the head, labels - its start, target [R]) -> (logits, log-sum-exp, target logits)."""

    def f(n, w, local, target):
        logits = n @ layer.matrix(w, packing, n.dtype).T
        inside = (local >= 0) & (local < logits.shape[1])
        safe = mx.where(inside, local, 0)
        picked = mx.take_along_axis(logits, safe[:, None], axis=1)[:, 0].astype(mx.float32)
        # The fused cross-entropy accumulates in float32; its log-sum-exp is what is wanted here.
        return logits, _cross_entropy(logits, safe) + picked, target + mx.where(inside, picked, 0)

    return layer.compiled(f)


@lru_cache
def _logits_vjp(packing: Packing | None):
    """Return f(dn, logits, block of the head, labels - its start, log-sum-exp, weights) -> dn plus the block's part."""

    def f(dn, logits, w, local, lse, weights):
        hit = mx.arange(logits.shape[1])[None] == local[:, None]
        d = (mx.exp(logits.astype(mx.float32) - lse[:, None]) - hit) * weights[:, None]
        return mx.addmm(dn, d.astype(dn.dtype), layer.matrix(w, packing, dn.dtype))

    return layer.compiled(f)


def _cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    if not mx.metal.is_available() and not mx.cuda.is_available():
        logits = logits.astype(mx.float32)  # the CPU's fallback reduces in the dtype of the logits
    return mx.fast.cross_entropy(logits, labels)

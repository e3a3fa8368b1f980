"""Loss and LoRA gradients of a micro-batch, computing only what the loss needs.

    batch = collate(base.model, rows)
    loss_sum, n_tokens, grads = loss_and_grads(base.model, batch, checkpointing=True, seed=(run_seed, step, micro))
    loss_sum, n_tokens = loss_only(base.model, batch)

Sums, not means: the caller divides by the tokens of the whole global batch. A trainer keeps the adapter as one
float32 vector instead (`pack_lora`, `packed_loss_and_grads`, `unpack_lora`): one optimizer kernel, one norm and one
all-reduce in place of 504 each. No files are read or written.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common import layer
from common.vlm import Decoder, Packing, Row, decoder, lora_parameters

PAD_MULTIPLE = 128  # CUDA's fused attention backward exists only for lengths that are multiples of 128
IN_FLIGHT = 2  # layers queued on the device ahead of the one it works on
VOCAB_CHUNK = 16384  # columns of the output head at a time
ROW_CHUNK = 2048  # supervised positions at a time


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
    length = _round_up(max(len(row) for row in rows), multiple)
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
    extra = max(multiple, _round_up(len(targets), multiple)) - len(targets)
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


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _by_slot(features: mx.array, slots: mx.array) -> mx.array:
    return mx.concatenate([mx.zeros_like(features[:1]), features])[slots]


def _rope(cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    shape = (*cos.shape[:2], 1, 2, cos.shape[-1] // 2)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    return cos, mx.concatenate([-sin[..., :1, :], sin[..., 1:, :]], axis=-2)


# -- the adapter as one vector ----------------------------------------------------------------------------------------


def _places(parts: Decoder) -> Iterator[tuple[str, int, tuple[int, int], slice]]:
    """Yield (parameter name, start in the vector, shape of the block there, columns of the block) of each matrix.

    The vector holds every layer's A blocks, then every layer's B blocks, so that each half is cast (and A scaled)
    by one kernel.
    """
    start = 0
    for part, letter in enumerate("ab"):
        for spec, names in zip(parts.specs, parts.names, strict=True):
            for slot in layer.slots(spec)[part]:
                held = layer.members(spec, slot.key[1]) if letter == "a" else [slot.key[1]]
                width = slot.shape[1] // len(held)
                for i, name in enumerate(held):
                    yield f"{names[name]}.lora_{letter}", start, slot.shape, slice(i * width, (i + 1) * width)
                start += slot.shape[0] * slot.shape[1]


def pack_lora(model: nn.Module, values: dict[str, mx.array] | None = None) -> mx.array:
    """Return ``values`` (the model's own LoRA parameters, if None) as one float32 vector."""
    values = lora_parameters(model) if values is None else values
    blocks = {}
    for name, start, _, _ in _places(decoder(model)):
        blocks.setdefault(start, []).append(values[name])
    return mx.concatenate([mx.concatenate(b, axis=1).reshape(-1) for b in blocks.values()]).astype(mx.float32)


def unpack_lora(model: nn.Module, vector: mx.array) -> dict[str, mx.array]:
    """Return the matrices of a packed vector by parameter name, as in `lora_parameters`."""
    return {
        name: vector[start : start + shape[0] * shape[1]].reshape(shape)[:, columns]
        for name, start, shape, columns in _places(decoder(model))
    }


# -- loss and gradients -----------------------------------------------------------------------------------------------


def loss_and_grads(
    model: nn.Module,
    batch: Batch,
    *,
    checkpointing: bool = False,
    seed: tuple[int, ...] | None = None,
    grads: dict[str, mx.array] | None = None,
) -> tuple[mx.array, int, dict[str, mx.array]]:
    """Return (summed cross-entropy float32 [], supervised tokens, gradients of that sum by parameter name, float32).

    ``seed`` names the dropout masks (run, step, micro-batch ...); None switches dropout off. ``grads`` are added to.
    ``checkpointing`` keeps only the inputs of each layer's two halves, for about a third more work.
    """
    vector = pack_lora(model)
    loss, n, new = packed_loss_and_grads(model, batch, vector, checkpointing=checkpointing, seed=seed)
    new = unpack_lora(model, new)
    if grads is not None:
        new = {name: grads[name] + g for name, g in new.items()}
    return loss, n, new


def packed_loss_and_grads(
    model: nn.Module,
    batch: Batch,
    vector: mx.array,
    *,
    checkpointing: bool = False,
    seed: tuple[int, ...] | None = None,
    grads: mx.array | None = None,
) -> tuple[mx.array, int, mx.array]:
    """The same for an adapter given as one vector (`pack_lora`), which the gradients come back as."""
    parts = decoder(model)
    queue = _Queue()
    x, kept, noise, lora = _run_forward(parts, batch, vector, "inputs" if checkpointing else "all", seed, queue)
    loss, dx = _head(parts.head_packing, parts.eps, True)(x, parts.norm, parts.head, batch.labels, batch.weights)
    queue.push(loss, dx)
    new = [None] * len(parts.specs)
    last = len(parts.specs) - 1
    for i in range(last, -1, -1):
        spec = parts.specs[i]
        fused = layer.fused_backward(dx.dtype, spec.head_dim, batch.shape[1])
        run = layer.backward(spec, fused, i > 0)
        targets = batch.targets if i == last else None
        dx, new[i] = run(dx, kept.pop(), parts.frozen[i], lora[i], batch.rope, noise[i], batch.rows, targets)
        queue.push(dx, *(new[i] or ()))
    total = mx.concatenate([g[half] for half in (0, 1) for g in new if g is not None])
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
    return _head(parts.head_packing, parts.eps, False)(x, parts.norm, parts.head, batch.labels, batch.weights), batch.n_tokens


class _Queue:
    """Keeps the device busy without letting the host run ahead of it.

    Buffers of queued work are all allocated at once. Unbounded, the host queues a whole backward pass and the peak
    grows by every layer's temporaries (22 GB in place of 12 on the 4B model); waiting for each layer leaves the device
    idle while Python prepares the next. Two layers in flight do neither.
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
        x, held = layer.forward(spec, keep)(x, parts.frozen[i], lora[i], batch.rope, noise[i], batch.rows, targets)
        if i < len(batch.deepstack):
            x = x + (batch.deepstack[i] if targets is None else batch.deepstack[i][targets])
        kept.append(held)
        queue.push(x, *(a for name, a in held.items() if name != "z"))
    return x, kept, noise, lora


def _split_lora(parts: Decoder, vector: mx.array | None, dtype: mx.Dtype) -> list[tuple]:
    """Cut the vector into each layer's (A times the LoRA scale, B), in the compute dtype.

    Float32 matrices would promote every activation that they meet.
    """
    sizes = [[sum(s.shape[0] * s.shape[1] for s in half) for half in layer.slots(spec)] for spec in parts.specs]
    if vector is None:
        return [()] * len(sizes)
    n_a = sum(a for a, _ in sizes)
    scale = next(spec.lora_scale for spec in parts.specs if spec.lora)
    a, b = (vector[:n_a] * scale).astype(dtype), vector[n_a:].astype(dtype)
    at = np.cumsum([(0, 0), *sizes], axis=0).tolist()
    return [(a[s:e], b[t:f]) for (s, t), (e, f) in zip(at, at[1:], strict=False)]


# -- the output head --------------------------------------------------------------------------------------------------


@lru_cache
def _head(packing: Packing | None, eps: float, with_grad: bool):
    return mx.compile(partial(_head_loss, packing, eps, with_grad))


def _head_loss(packing, eps, with_grad, x, norm, head, labels, weights):
    """Return the weighted sum of cross-entropies of x [R, D], and its gradient in x.

    The gradient of the logits is formed at once, so the head is multiplied twice, not three times, and never gets a
    gradient. Blocks of rows and of vocabulary bound the memory to the bfloat16 logits of ROW_CHUNK rows.
    """
    n = mx.fast.rms_norm(x, norm, eps)
    loss, dn = mx.array(0.0), []
    for start in range(0, len(x), ROW_CHUNK):
        stop = min(start + ROW_CHUNK, len(x))
        part, label, weight = n[start:stop], labels[start:stop], weights[start:stop]
        loss, d = _head_rows(packing, with_grad, loss, part, head, label, weight)
        dn.append(d)
    if not with_grad:
        return loss
    dn = mx.concatenate(dn)
    return loss, layer._norm_vjp(x, norm, eps, dn)


def _head_rows(packing, with_grad, loss, n, head, labels, weights):
    vocabulary = head[0].shape[0]
    blocks, sums, target = [], [], 0
    for start in range(0, vocabulary, VOCAB_CHUNK):
        stop = min(start + VOCAB_CHUNK, vocabulary)
        w = layer.matrix(tuple(m[start:stop] for m in head), packing, n.dtype)
        logits = n @ w.T
        inside = (labels >= start) & (labels < stop)
        local = mx.where(inside, labels - start, 0)
        picked = mx.take_along_axis(logits, local[:, None], axis=1)[:, 0].astype(mx.float32)
        # The fused cross-entropy accumulates in float32; its log-sum-exp is what is wanted here.
        sums.append(_cross_entropy(logits, local) + picked)
        target = target + mx.where(inside, picked, 0)
        blocks.append((logits, w, local, inside))
    lse = mx.logsumexp(mx.stack(sums), axis=0)
    loss = loss + ((lse - target) * weights).sum()
    if not with_grad:
        return loss, None
    dn = None
    for logits, w, local, inside in blocks:
        hit = (mx.arange(logits.shape[1])[None] == local[:, None]) & inside[:, None]
        d = (mx.exp(logits.astype(mx.float32) - lse[:, None]) - hit) * weights[:, None]
        d = d.astype(n.dtype)
        dn = d @ w if dn is None else mx.addmm(dn, d, w)
    return loss, dn


def _cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    if not mx.metal.is_available() and not mx.cuda.is_available():
        logits = logits.astype(mx.float32)  # the CPU's fallback reduces in the dtype of the logits
    return mx.fast.cross_entropy(logits, labels)

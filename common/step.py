"""Loss and LoRA gradients of a micro-batch, computing only what the loss needs.

    batch = collate(base.model, rows)
    loss_sum, n_tokens, grads = loss_and_grads(base.model, batch, checkpointing=True, seed=(run_seed, step, micro))
    loss_sum, n_tokens = loss_only(base.model, batch)

Sums, not means: the caller divides by the tokens of the whole global batch. No files are read or written.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.vlm import Decoder, LayerSpec, Packing, Row, decoder

PAD_MULTIPLE = 128  # CUDA's fused attention backward exists only for lengths that are multiples of 128


@dataclass
class Batch:
    """Rows padded to one length L, ready for the decoder. R counts the positions whose next token is supervised."""

    hidden: mx.array  # [B, L, D]: token embeddings, image features in place
    deepstack: list[mx.array]  # K arrays [B, L, D], zero outside the image tokens
    cos: mx.array  # [B, L, head_dim]
    sin: mx.array  # [B, L, head_dim]
    targets: mx.array  # int32 [R]: rows of hidden.reshape(B * L, D) that predict a supervised token
    labels: mx.array  # int32 [R]: the token each of them has to predict
    weights: mx.array  # float32 [R]: 1, or 0 for padding
    n_tokens: int  # supervised tokens, padding excluded


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
            deepstack = [_by_slot(level, slots) for level in levels]
    cos, sin = parts.rotary(hidden, mx.array(positions))
    extra = _round_up(len(targets), multiple) - len(targets)
    return Batch(
        hidden, deepstack, cos, sin,
        mx.array(np.pad(targets, (0, extra)).astype(np.int32)),
        mx.array(np.pad(labels, (0, extra)).astype(np.int32)),
        mx.array(np.pad(np.ones(len(targets), dtype=np.float32), (0, extra))),
        len(targets),
    )  # fmt: skip


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _by_slot(features: mx.array, slots: mx.array) -> mx.array:
    return mx.concatenate([mx.zeros_like(features[:1]), features])[slots]


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
    """
    parts = decoder(model)
    flat = {f"{name}.{p}": parts.lora[i][short][j] for i, full in enumerate(parts.names)
            for short, name in full.items() for j, p in enumerate(("lora_a", "lora_b"))}  # fmt: skip

    def loss(flat):
        lora = [{short: (flat[f"{name}.lora_a"], flat[f"{name}.lora_b"]) for short, name in full.items()}
                for full in parts.names]  # fmt: skip
        return _loss(parts, lora, batch, checkpointing, seed)

    value, new = mx.value_and_grad(loss)(flat)
    if grads is not None:
        new = {name: grads[name] + g for name, g in new.items()}
    return value, batch.n_tokens, new


def loss_only(model: nn.Module, batch: Batch) -> tuple[mx.array, int]:
    """Return (summed cross-entropy float32 [], supervised tokens): validation, without dropout."""
    parts = decoder(model)
    return _loss(parts, parts.lora, batch, False, None), batch.n_tokens


def _loss(parts: Decoder, lora: list[dict], batch: Batch, checkpointing: bool, seed) -> mx.array:
    x = batch.hidden
    for i, spec in enumerate(parts.specs):
        run = mx.checkpoint(_layer(spec, i, seed)) if checkpointing else _layer(spec, i, seed)
        x = run(lora[i], parts.frozen[i], x, batch.cos, batch.sin)
        if i < len(batch.deepstack):
            x = x + batch.deepstack[i]
    x = mx.fast.rms_norm(x.reshape(-1, x.shape[-1])[batch.targets], parts.norm, parts.eps)
    logits = _project(parts.head, parts.head_packing, x)
    losses = mx.fast.cross_entropy(logits.astype(mx.float32), batch.labels)
    return (losses * batch.weights).sum()


def _project(matrix: tuple, packing: Packing | None, x: mx.array) -> mx.array:
    if packing is None:
        return x @ matrix[0].T
    w = mx.dequantize(*matrix, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    return x @ w.T


def _layer(spec: LayerSpec, index: int, seed):
    packing = dict(spec.packing)

    def linear(name, lora, frozen, x):
        y = _project(frozen[name], packing[name], x)
        if name not in lora:
            return y
        a, b = (m.astype(x.dtype) for m in lora[name])
        slot = list(packing).index(name)
        if seed is not None and spec.dropout > 0:
            key = mx.random.key(hash((*seed, index, slot)) & (2**63 - 1))
            x = x * mx.random.bernoulli(1 - spec.dropout, x.shape, key).astype(x.dtype) / (1 - spec.dropout)
        return y + spec.lora_scale * ((x @ a) @ b)

    def run(lora, frozen, x, cos, sin):
        batch, length, _ = x.shape
        n = mx.fast.rms_norm(x, frozen["input_norm"], spec.eps)
        q = linear("q", lora, frozen, n).reshape(batch, length, spec.heads, spec.head_dim)
        k = linear("k", lora, frozen, n).reshape(batch, length, spec.kv_heads, spec.head_dim)
        v = linear("v", lora, frozen, n).reshape(batch, length, spec.kv_heads, spec.head_dim)
        q = _rotate(mx.fast.rms_norm(q, frozen["q_norm"], spec.eps), cos, sin)
        k = _rotate(mx.fast.rms_norm(k, frozen["k_norm"], spec.eps), cos, sin)
        q, k, v = (m.transpose(0, 2, 1, 3) for m in (q, k, v))
        o = mx.fast.scaled_dot_product_attention(q, k, v, scale=spec.head_dim**-0.5, mask="causal")
        h = x + linear("o", lora, frozen, o.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        n = mx.fast.rms_norm(h, frozen["post_norm"], spec.eps)
        gate, up = linear("gate", lora, frozen, n), linear("up", lora, frozen, n)
        return h + linear("down", lora, frozen, nn.silu(gate) * up)

    return run


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    turned = mx.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]

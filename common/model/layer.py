"""A Qwen3-VL decoder layer with LoRA: its forward pass and a hand-written vector-Jacobian product.

    y, kept = forward(spec, "all")(x, frozen, lora, rope, noise, rows, targets)
    dx, grads = backward(spec, fused, True)(dy, kept, frozen, lora, rope, noise, rows, targets)

Why by hand: the frozen matrices need no gradient, so a projection's backward is one product with W and a few of
rank r, and what is kept for it is listed in `_forward`. All layers share one compiled trace a shape, traced in a tenth
of a second; only the first step on a machine waits for its CUDA kernels (39 s, 9 s once they are on disk). The whole
step as one compiled graph is slower (0.19 s, not 0.13) and takes minutes to compile. Reads and writes no files.
"""

from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from common.model import kernels
from integration.lora_patch.vlm import GROUPS, LayerSpec, Packing

CHUNK = 256  # queries a block of the chunked attention: 88 MB of float32 scores at 32 heads and 2,688 keys


# -- the adapter ------------------------------------------------------------------------------------------------------


def members(spec: LayerSpec, group: str) -> list[str]:
    """Return the group's projections that carry an adapter, in order."""
    return [name for name in GROUPS[group] if name in spec.lora]


def adapted(spec: LayerSpec) -> list[str]:
    """Return the groups that carry an adapter, in order: the order of a layer's adapter arrays."""
    return [group for group in GROUPS if members(spec, group)]


@lru_cache
def columns(spec: LayerSpec, group: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return (outputs of the whole group, where each projection's outputs lie among them)."""
    widths, at, places = dict(spec.widths), 0, {}
    for name in GROUPS[group]:
        places[name] = (at, at + widths[name][1])
        at += widths[name][1]
    return at, places


# -- projections ------------------------------------------------------------------------------------------------------


def matrix(parts: tuple, packing: Packing | None, dtype: mx.Dtype) -> mx.array:
    """Return a frozen [out, in] matrix; a quantized one is unpacked for the moment.

    At thousands of tokens the product is bound by arithmetic: unpacking takes 60 microseconds and the product after it
    210, the quantized product of MLX 890 (one MLP matrix, H200). The same matrix serves the backward pass.
    """
    if packing is None:
        return parts[0]
    full = mx.dequantize(*parts, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    return full.astype(dtype)


class _Projections:
    """The layer's matrices, adapters and dropout masks, as one traced call sees them.

    A group's B matrices stand as the blocks of one matrix [members * rank, outputs], so that a group is one linear map:
    y = x W^T + (drop(x) A) B, A times the LoRA scale.
    """

    def __init__(self, spec, frozen, lora, noise, dtype):
        self.spec, self.frozen, self.noise, self.dtype = spec, frozen, noise, dtype
        self.lora = dict(zip(adapted(spec), lora, strict=True))

    def weight(self, group):
        packing = dict(self.spec.grouped)[group]
        parts = [matrix(part, how, self.dtype) for part, how in zip(self.frozen[group], packing, strict=True)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def low(self, group, x, rows):
        """Return the group's A products of the dropped-out input: [N, members * rank], or None without an adapter."""
        return self.drop(group, x, rows) @ self.lora[group][0] if group in self.lora else None

    def drop(self, group, x, rows):
        """Apply the group's dropout mask to x, or to a gradient on its way back."""
        if self.noise is None:
            return x
        return kernels.dropout(x, self.noise[list(GROUPS).index(group)], rows, self.spec.dropout)

    def forward(self, group, x, z, residual=None):
        """Return the group's outputs side by side, plus ``residual``.

        The small product comes first and the large one adds to it. That costs no pass over the memory, and it keeps the
        update: in bfloat16 an output of 1 is rounded to 0.004, and an update added after that rounding, 0.0009 after
        the first step at 2e-4, is mostly lost. Added inside, before the one rounding, it is kept on average; the
        residual, larger still, comes last for the same reason.
        """
        w = self.weight(group).T
        y = x @ w if z is None else _add_product(z @ self.lora[group][1], x, w)
        return y if residual is None else residual + y

    def backward(self, group, dy, rows):
        """Return the gradients of (the group's input, its A products) for the outputs' gradient."""
        if group not in self.lora:
            return dy @ self.weight(group), None
        a, b = self.lora[group]
        dz = dy @ b.T
        if self.noise is None:
            return _add_product(dz @ a.T, dy, self.weight(group)), dz
        return _add_product(self.drop(group, dz @ a.T, rows), dy, self.weight(group)), dz

    def gradients(self, group, x, z, dy, dz, rows):
        """Return the gradients of (A, without the scale; B, whose blocks off the diagonal mean nothing), or None."""
        return None if dz is None else (self.drop(group, x, rows).T @ dz, z.T @ dy)


def _add_product(c, a, b):
    """Return c + a b, rounded once."""
    if c.dtype == mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return mx.addmm(c, a, b)
    # The CPU's addmm sums 16-bit values in 16 bits.
    return (c.astype(mx.float32) + a.astype(mx.float32) @ b.astype(mx.float32)).astype(c.dtype)


# -- dropout ----------------------------------------------------------------------------------------------------------


def seeds(seed: tuple[int, ...], layers: int) -> mx.array:
    """Return uint32 [layers, 4] mask seeds of one micro-batch from the numbers that name it."""
    words = np.random.SeedSequence([int(n) & 0xFFFFFFFF for n in seed]).generate_state(layers * len(GROUPS))
    return mx.array(words.reshape(layers, len(GROUPS)))


# -- attention --------------------------------------------------------------------------------------------------------


def fused_backward(dtype: mx.Dtype, head_dim: int, length: int) -> bool:
    """Whether MLX differentiates attention without forming the scores: CUDA, half precision, multiples of 128."""
    return mx.cuda.is_available() and dtype in (mx.bfloat16, mx.float16) and head_dim <= 128 and length % 128 == 0


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention; q [B, H, L, d], k and v [B, H_kv, L, d]."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


def attention_vjp(q, k, v, do, fused: bool):
    """Return (output, dq, dk, dv) for the output's gradient ``do`` [B, H, L, d]."""
    if fused:
        (o,), (dq, dk, dv) = mx.vjp(attention, [q, k, v], [do])
        return o, dq, dk, dv
    return _chunked_vjp(q, k, v, do)


def _chunked_vjp(q, k, v, do):
    """The same in blocks of queries, so that no [L, L] score matrix ever exists.

    For Metal and the CPU, where MLX differentiates attention through the full score matrix. A block of queries sees
    the keys up to its own end, so the work is half of the square.
    """
    batch, heads, length, width = q.shape
    groups, scale = k.shape[1], width**-0.5
    q = q.reshape(batch, groups, heads // groups, length, width)
    do = do.reshape(q.shape)
    k, v = k[:, :, None], v[:, :, None]
    outputs, dqs, dk, dv = [], [], 0, 0
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        qc, dc, kc, vc = q[..., start:end, :], do[..., start:end, :], k[..., :end, :], v[..., :end, :]
        scores = (qc * scale) @ kc.swapaxes(-1, -2)
        visible = mx.arange(start, end)[:, None] >= mx.arange(end)[None]
        p32 = mx.softmax(mx.where(visible, scores.astype(mx.float32), -mx.inf), axis=-1)
        p = p32.astype(q.dtype)
        dp = (dc @ vc.swapaxes(-1, -2)).astype(mx.float32)
        ds = (p32 * (dp - (p32 * dp).sum(-1, keepdims=True)) * scale).astype(q.dtype)
        outputs.append(p @ vc)
        dqs.append(ds @ kc)
        tail = [(0, 0)] * 3 + [(0, length - end), (0, 0)]
        dk = dk + mx.pad((ds.swapaxes(-1, -2) @ qc).sum(2, keepdims=True), tail)
        dv = dv + mx.pad((p.swapaxes(-1, -2) @ dc).sum(2, keepdims=True), tail)
    shape = (batch, heads, length, width)
    o, dq = (mx.concatenate(m, axis=3).reshape(shape) for m in (outputs, dqs))
    return o, dq, dk[:, :, 0], dv[:, :, 0]


# -- the layer --------------------------------------------------------------------------------------------------------


def _heads(spec, qkv, frozen, rope):
    """Return q [B, H, L, d], k and v [B, H_kv, L, d] of the packed projections, normalised and rotated."""
    cos, sin = rope
    norms = frozen["q_norm"], frozen["k_norm"]
    flat = kernels.heads(qkv, norms, rope, spec.eps, spec.heads, spec.kv_heads)
    return tuple(m.reshape(*cos.shape[:2], -1, spec.head_dim).transpose(0, 2, 1, 3) for m in flat)


def _flat(x):
    """Turn [B, H, L, d] into [B * L, H * d]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)


def _rows_of(x, targets):
    return x if targets is None else x[targets]


def _forward(spec, keep, x, weights, batch):
    (frozen, lora), (rope, noise, rows, targets) = weights, batch
    p = _Projections(spec, frozen, lora, noise, x.dtype)
    z = {}
    n = mx.fast.rms_norm(x, frozen["input_norm"], spec.eps)
    z["qkv"] = p.low("qkv", n, rows)
    qkv = p.forward("qkv", n, z["qkv"])
    o = _rows_of(_flat(attention(*_heads(spec, qkv, frozen, rope))), targets)
    rows = _rows_of(rows, targets)
    z["o"] = p.low("o", o, rows)
    h = p.forward("o", o, z["o"], _rows_of(x, targets))
    n = mx.fast.rms_norm(h, frozen["post_norm"], spec.eps)
    z["gate_up"] = p.low("gate_up", n, rows)
    gate_up = p.forward("gate_up", n, z["gate_up"])
    act = kernels.swiglu(gate_up)
    z["down"] = p.low("down", act, rows)
    y = p.forward("down", act, z["down"], h)
    kept = {"nothing": {}, "inputs": {"x": x, "h": h}, "all": {"x": x, "h": h, "qkv": qkv, "gate_up": gate_up}}[keep]
    if kept:
        kept["z"] = {group: m for group, m in z.items() if m is not None}
    return y, kept


def _backward(spec, fused, need_dx, dy, kept, weights, batch):
    (frozen, lora), (rope, noise, rows, targets) = weights, batch
    x, h, z = kept["x"], kept["h"], kept["z"]
    p = _Projections(spec, frozen, lora, noise, x.dtype)
    late = _rows_of(rows, targets)
    grads = {}

    n = mx.fast.rms_norm(h, frozen["post_norm"], spec.eps)
    gate_up = kept["gate_up"] if "gate_up" in kept else p.forward("gate_up", n, z.get("gate_up"))
    dact, dz = p.backward("down", dy, late)
    act, dgate_up = kernels.swiglu_vjp(gate_up, dact)
    grads["down"] = p.gradients("down", act, z.get("down"), dy, dz, late)
    dn, dz = p.backward("gate_up", dgate_up, late)
    grads["gate_up"] = p.gradients("gate_up", n, z.get("gate_up"), dgate_up, dz, late)
    dh = kernels.norm_vjp(h, frozen["post_norm"], spec.eps, dn, dy)

    n = mx.fast.rms_norm(x, frozen["input_norm"], spec.eps)
    qkv = kept["qkv"] if "qkv" in kept else p.forward("qkv", n, z.get("qkv"))
    do, dz = p.backward("o", dh, late)
    if targets is not None:
        do = mx.zeros((len(x), do.shape[1]), do.dtype).at[targets].add(do)
    do = do.reshape(*rope[0].shape[:2], -1, spec.head_dim).transpose(0, 2, 1, 3)
    # The output of attention comes back from its own backward pass, so that the forward pass need not keep it.
    o, *dheads = attention_vjp(*_heads(spec, qkv, frozen, rope), do, fused)
    grads["o"] = p.gradients("o", _rows_of(_flat(o), targets), z.get("o"), dh, dz, late)
    norms = frozen["q_norm"], frozen["k_norm"]
    dqkv = kernels.heads_vjp(qkv, norms, rope, spec.eps, [_flat(m) for m in dheads])
    dn, dz = p.backward("qkv", dqkv, rows)
    grads["qkv"] = p.gradients("qkv", n, z.get("qkv"), dqkv, dz, rows)
    if targets is not None:
        dh = mx.zeros(x.shape, dh.dtype).at[targets].add(dh)
    dx = kernels.norm_vjp(x, frozen["input_norm"], spec.eps, dn, dh) if need_dx else None
    return dx, [grads[group] for group in adapted(spec)]


def compiled(f):
    """Compile ``f`` on a GPU. On the CPU each fused kernel costs a run of g++, a minute in all, and saves nothing."""
    return f if mx.default_device() == mx.Device(mx.cpu) else mx.compile(f)


@lru_cache
def forward(spec: LayerSpec, keep: str):
    """Return f(x, (frozen, lora), (rope, noise, rows, targets)) -> (y, kept), compiled once a shape.

    x [N, D] with N = B * L; ``frozen`` and ``lora`` the layer's arrays (see `common.model.step`) in x's dtype; ``rope``
    (cos, sin) [B, L, 1, 2, d / 2], sin's first half negated; ``noise`` uint32 [4] or None; ``rows`` uint32 [N];
    ``targets`` int32 [R] or None: the last layer computes its second half at those rows alone. ``keep`` says what the
    backward pass will find: "nothing", "inputs" (of the two halves: checkpointing) or "all" (no product is repeated).
    """
    return compiled(partial(_forward, spec, keep))


@lru_cache
def backward(spec: LayerSpec, fused: bool, need_dx: bool):
    """Return f(dy, kept, (frozen, lora), (rope, noise, rows, targets)) -> (dx, [(A, B) gradients of each group])."""
    return compiled(partial(_backward, spec, fused, need_dx))

"""A Qwen3-VL decoder layer with LoRA: its forward pass and a hand-written vector-Jacobian product.

    y, kept = forward(spec, "all")(x, frozen, lora, rope, noise, rows, targets)
    dx, grads = backward(spec, fused, True)(dy, kept, frozen, lora, rope, noise, rows, targets)

Why by hand: the frozen matrices need no gradient, so a projection's backward is one product with W and a few of
rank r; automatic differentiation of the same layer keeps three times the memory and runs twice the kernels. All
layers share one compiled trace per shape, which takes a second; a compiled whole step takes minutes on CUDA.
Reads and writes no files.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from common.vlm import LayerSpec, Packing

# Projections that share an input share one product with their A matrices, and one dropout mask.
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
CHUNK = 256  # queries a block of the chunked attention: 88 MB of float32 scores at 32 heads and 2,688 keys


# -- the adapter as one vector ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where one matrix lies in a layer's part of the packed adapter."""

    key: tuple[str, str]  # ("a", group): the group's A matrices side by side; ("b", projection)
    start: int
    shape: tuple[int, int]

    def of(self, vector: mx.array) -> mx.array:
        """Return the matrix as a view."""
        return vector[self.start : self.start + self.shape[0] * self.shape[1]].reshape(self.shape)


@lru_cache
def slots(spec: LayerSpec) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Return the A slots (one a group, [in, members * rank]) and the B slots (one a projection, [rank, out])."""
    widths = dict(spec.widths)
    a, b, at_a, at_b = [], [], 0, 0
    for group in GROUPS:
        names = members(spec, group)
        if names:
            shape = (widths[names[0]][0], len(names) * spec.rank)
            a.append(Slot(("a", group), at_a, shape))
            at_a += shape[0] * shape[1]
        for name in names:
            shape = (spec.rank, widths[name][1])
            b.append(Slot(("b", name), at_b, shape))
            at_b += shape[0] * shape[1]
    return tuple(a), tuple(b)


def members(spec: LayerSpec, group: str) -> list[str]:
    """Return the group's projections that carry an adapter, in order."""
    return [name for name in GROUPS[group] if name in spec.lora]


# -- projections ------------------------------------------------------------------------------------------------------


def matrix(parts: tuple, packing: Packing | None, dtype: mx.Dtype) -> mx.array:
    """Return a frozen [out, in] matrix; a quantized one is unpacked for the moment.

    At thousands of tokens the product is bound by arithmetic, so unpacking (a few percent of its time) and one
    full-speed product beat a quantized product, and the same matrix serves the backward pass.
    """
    if packing is None:
        return parts[0]
    full = mx.dequantize(*parts, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    return full.astype(dtype)


class _Projections:
    """The layer's matrices, adapters and dropout masks, as one traced call sees them."""

    def __init__(self, spec, frozen, lora, noise, dtype):
        self.spec, self.noise = spec, noise
        packing = dict(spec.packing)
        self.w = {name: (frozen[name], packing[name], dtype) for name in packing}
        self.a = {slot.key[1]: slot.of(lora[0]) for slot in slots(spec)[0]}
        self.b = {slot.key[1]: slot.of(lora[1]) for slot in slots(spec)[1]}

    def weight(self, name):
        return matrix(*self.w[name])

    def low(self, group, x, rows):
        """Return the group's A products of the dropped-out input, scaled: [N, members * rank], or None."""
        return self.drop(group, x, rows) @ self.a[group] if group in self.a else None

    def drop(self, group, x, rows):
        """Apply the group's dropout mask to x, or to a gradient on its way back."""
        if self.noise is None:
            return x
        keep = dropout_mask(self.noise[list(GROUPS).index(group)], rows, x.shape[-1], self.spec.dropout)
        return mx.where(keep, x * (1 / (1 - self.spec.dropout)), 0).astype(x.dtype)

    def part(self, z, group, name):
        """Return one projection's columns of the group's A products."""
        names = members(self.spec, group)
        return z if len(names) == 1 else mx.split(z, len(names), axis=1)[names.index(name)]

    def forward(self, group, x, z):
        """Return the outputs of the group's projections."""
        outputs = []
        for name in GROUPS[group]:
            y = x @ self.weight(name).T
            outputs.append(mx.addmm(y, self.part(z, group, name), self.b[name]) if name in self.b else y)
        return outputs

    def backward(self, group, x, z, dys, rows, need_dx=True):
        """Return (gradient of x, {A and B gradients; A's without the scale})."""
        grads, dzs, dx = {}, [], None
        for name, dy in zip(GROUPS[group], dys, strict=True):
            if need_dx:
                w = self.weight(name)
                dx = dy @ w if dx is None else mx.addmm(dx, dy, w)
            if name in self.b:
                grads["b", name] = self.part(z, group, name).T @ dy
                dzs.append(dy @ self.b[name].T)
        if dzs:
            dz = dzs[0] if len(dzs) == 1 else mx.concatenate(dzs, axis=1)
            grads["a", group] = self.drop(group, x, rows).T @ dz
            if need_dx and self.noise is None:
                dx = mx.addmm(dx, dz, self.a[group].T)
            elif need_dx:
                dx = dx + self.drop(group, dz @ self.a[group].T, rows)
        return dx, grads


# -- dropout ----------------------------------------------------------------------------------------------------------


def _mix(h: mx.array) -> mx.array:
    """Mix the bits of uint32 (the finalizer `lowbias32` of C. Wellons' hash prospector)."""
    h = (h ^ (h >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    h = (h ^ (h >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return h ^ (h >> 16)


def dropout_mask(seed: mx.array, rows: mx.array, width: int, rate: float) -> mx.array:
    """Return bool [N, width], true where an input stays: a hash of (seed, row, column).

    Counter-based, in plain integer arithmetic: recomputation, another device and another padding give the same mask,
    and inside a fused kernel it costs no memory traffic. ``rows`` is uint32 [N], a row's identity in the batch.
    """
    down = _mix(rows * mx.array(0x9E3779B1, mx.uint32) + seed)
    across = _mix(mx.arange(width, dtype=mx.uint32) * mx.array(0x85EBCA77, mx.uint32) + (seed ^ 0x5BD1E995))
    return _mix(down[:, None] ^ across[None, :]) >= mx.array(round(rate * 2**32), mx.uint32)


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


def _rotate(x, cos, sin):
    """Turn the halves of [B, L, H, d] by the angles of cos and sin [B, L, 1, 2, d / 2] (sin's first half negated).

    The halves are swapped by a view (a reversed axis of two), so the whole rotation is one fused kernel.
    """
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape)


def _norm_vjp(x, weight, eps, dy):
    """Gradient of x through an RMSNorm whose weight is frozen (so its gradient is never formed)."""
    return mx.vjp(lambda m: mx.fast.rms_norm(m, None, eps), [x], [(dy * weight).astype(x.dtype)])[1][0]


# -- the layer --------------------------------------------------------------------------------------------------------


def _heads(spec, q, k, v, frozen, rope):
    """Normalise and rotate; [N, H * d] each to [B, H, L, d]."""
    cos, sin = rope
    shape = (*cos.shape[:2], -1, spec.head_dim)
    q = _rotate(mx.fast.rms_norm(q.reshape(shape), frozen["q_norm"], spec.eps), cos, sin)
    k = _rotate(mx.fast.rms_norm(k.reshape(shape), frozen["k_norm"], spec.eps), cos, sin)
    return tuple(m.transpose(0, 2, 1, 3) for m in (q, k, v.reshape(shape)))


def _rows_of(x, targets):
    return x if targets is None else x[targets]


def _forward(spec, keep, x, frozen, lora, rope, noise, rows, targets):
    p = _Projections(spec, frozen, lora, noise, x.dtype)
    z = {}
    n = mx.fast.rms_norm(x, frozen["input_norm"], spec.eps)
    z["qkv"] = p.low("qkv", n, rows)
    q, k, v = p.forward("qkv", n, z["qkv"])
    o = attention(*_heads(spec, q, k, v, frozen, rope)).transpose(0, 2, 1, 3).reshape(len(x), -1)
    o, rows = _rows_of(o, targets), _rows_of(rows, targets)
    z["o"] = p.low("o", o, rows)
    h = _rows_of(x, targets) + p.forward("o", o, z["o"])[0]
    n = mx.fast.rms_norm(h, frozen["post_norm"], spec.eps)
    z["gate_up"] = p.low("gate_up", n, rows)
    gate, up = p.forward("gate_up", n, z["gate_up"])
    act = _swiglu(gate, up)
    z["down"] = p.low("down", act, rows)
    y = h + p.forward("down", act, z["down"])[0]
    names = {"nothing": (), "inputs": ("x", "h"), "all": ("x", "h", "q", "k", "v", "gate", "up")}[keep]
    kept = dict(x=x, h=h, q=q, k=k, v=v, gate=gate, up=up)
    kept = {name: kept[name] for name in names}
    if names:
        kept["z"] = {group: m for group, m in z.items() if m is not None}
    return y, kept


def _swiglu(gate, up):
    g = gate.astype(mx.float32)
    return (g * mx.sigmoid(g) * up.astype(mx.float32)).astype(gate.dtype)


def _swiglu_vjp(gate, up, dact):
    g, u, d = (m.astype(mx.float32) for m in (gate, up, dact))
    s = mx.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).astype(gate.dtype), (d * g * s).astype(gate.dtype)


def _backward(spec, fused, need_dx, dy, keep, frozen, lora, rope, noise, rows, targets):
    x, h, z = keep["x"], keep["h"], keep["z"]
    p = _Projections(spec, frozen, lora, noise, x.dtype)
    late = _rows_of(rows, targets)
    n = mx.fast.rms_norm(h, frozen["post_norm"], spec.eps)
    gate, up = (keep["gate"], keep["up"]) if "gate" in keep else p.forward("gate_up", n, z.get("gate_up"))
    dact, grads = p.backward("down", _swiglu(gate, up), z.get("down"), [dy], late)
    dn, new = p.backward("gate_up", n, z.get("gate_up"), _swiglu_vjp(gate, up, dact), late)
    grads.update(new)
    dh = dy + _norm_vjp(h, frozen["post_norm"], spec.eps, dn)

    cos, sin = rope
    batch, length = cos.shape[:2]
    n = mx.fast.rms_norm(x, frozen["input_norm"], spec.eps)
    flat_q, flat_k, flat_v = (keep[m] for m in "qkv") if "q" in keep else p.forward("qkv", n, z.get("qkv"))
    q, k, v = _heads(spec, flat_q, flat_k, flat_v, frozen, rope)
    # The output's gradient needs W_o alone; the output itself comes back from the attention's own backward pass.
    do = dh @ p.weight("o")
    if "o" in p.b:
        dz = dh @ p.b["o"].T
        grads["b", "o"] = z["o"].T @ dh
        do = do + p.drop("o", dz @ p.a["o"].T, late) if noise is not None else mx.addmm(do, dz, p.a["o"].T)
    if targets is not None:
        do = mx.zeros((len(x), do.shape[1]), do.dtype).at[targets].add(do)
        dh = mx.zeros(x.shape, dh.dtype).at[targets].add(dh)
    do = do.reshape(batch, length, spec.heads, spec.head_dim).transpose(0, 2, 1, 3)
    o, dq, dk, dv = attention_vjp(q, k, v, do, fused)
    if "o" in p.b:
        o = _rows_of(o.transpose(0, 2, 1, 3).reshape(len(x), -1), targets)
        grads["a", "o"] = p.drop("o", o, late).T @ dz

    dq, dk, dv = (m.transpose(0, 2, 1, 3) for m in (dq, dk, dv))
    dq, dk = (_rotate(m, cos, -sin) for m in (dq, dk))
    dq = _norm_vjp(flat_q.reshape(dq.shape), frozen["q_norm"], spec.eps, dq)
    dk = _norm_vjp(flat_k.reshape(dk.shape), frozen["k_norm"], spec.eps, dk)
    dys = [m.reshape(len(x), -1) for m in (dq, dk, dv)]
    dn, new = p.backward("qkv", n, z.get("qkv"), dys, rows, need_dx)
    grads.update(new)
    dx = dh + _norm_vjp(x, frozen["input_norm"], spec.eps, dn) if need_dx else None
    return dx, _pack_grads(spec, grads)


def _pack_grads(spec, grads):
    """Return the layer's (A, B) gradients as float32 vectors in the adapter's layout."""
    a, b = slots(spec)
    if not a:
        return None
    ga, gb = (mx.concatenate([grads[slot.key].reshape(-1) for slot in part]) for part in (a, b))
    return ga.astype(mx.float32) * spec.lora_scale, gb.astype(mx.float32)


@lru_cache
def forward(spec: LayerSpec, keep: str):
    """Return f(x, frozen, lora, rope, noise, rows, targets) -> (y, kept), compiled once a shape.

    x [N, D] with N = B * L; ``lora`` the layer's (A times the LoRA scale, B) as packed vectors in x's dtype; ``rope``
    (cos, sin) [B, L, 1, 2, d / 2], sin's first half negated; ``noise`` uint32 [4] or None; ``rows`` uint32 [N];
    ``targets`` int32 [R] or None: the last layer computes its second half at those rows alone. ``keep`` says what the
    backward pass will find: "nothing", "inputs" (of the two halves: checkpointing) or "all" (no product is repeated).
    """
    return mx.compile(partial(_forward, spec, keep))


@lru_cache
def backward(spec: LayerSpec, fused: bool, need_dx: bool):
    """Return f(dy, kept, frozen, lora, rope, noise, rows, targets) -> (dx, (A gradients, B gradients))."""
    return mx.compile(partial(_backward, spec, fused, need_dx))

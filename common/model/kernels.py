"""The memory-bound parts of a decoder layer: one CUDA kernel each, and the same in MLX operations everywhere else.

    q, k, v = heads(qkv, (q_norm, k_norm), (cos, sin), eps, n_heads, n_kv)

Why kernels: of an H200's 4.3 TB/s, MLX's fused graphs reach 0.6 to 1 here, and they write what two results share to
memory in float32 (SwiGLU's backward pass: 333 microseconds instead of 86). With the projections that share an input
stacked, they took the step of the 4B model from 145 to 128 ms, dropout's from 14 ms to 9. Arithmetic
is float32 inside, rounded once at the end. Reads and writes no files.
"""

import re
from functools import lru_cache

import mlx.core as mx

_HEADER = """
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
__device__ __forceinline__ void load8(const bf16* p, float* v) {
  uint4 raw = *reinterpret_cast<const uint4*>(p);
  const __nv_bfloat162* h = reinterpret_cast<const __nv_bfloat162*>(&raw);
  for (int i = 0; i < 4; i++) { float2 f = __bfloat1622float2(h[i]); v[2 * i] = f.x; v[2 * i + 1] = f.y; }
}
__device__ __forceinline__ void store8(bf16* p, const float* v) {
  uint4 raw;
  __nv_bfloat162* h = reinterpret_cast<__nv_bfloat162*>(&raw);
  for (int i = 0; i < 4; i++) { h[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]); }
  *reinterpret_cast<uint4*>(p) = raw;
}
"""
_THREADS = 256


def _on_cuda(*arrays: mx.array) -> bool:
    """Whether the kernels apply: a CUDA device and bfloat16 throughout."""
    if not mx.cuda.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return False
    return all(a.dtype == mx.bfloat16 for a in arrays)


@lru_cache
def _kernel(name, source, inputs, outputs, eps: float = 0.0, header: str = "", **sizes: int):
    """Compile ``source`` with its constants; the name carries them, so that every set of them is its own kernel."""
    constants = "".join(f"constexpr int {key} = {value};\n" for key, value in sizes.items())
    constants += f"constexpr float EPS = {float(eps)!r};\n"
    return mx.fast.cuda_kernel(
        name=re.sub(r"\W", "_", "_".join([name, f"{eps:g}", *(str(value) for value in sizes.values())])),
        input_names=list(inputs),
        output_names=list(outputs),
        header=_HEADER + header,
        source=constants + source,
    )


def _launch(kernel, inputs, shapes, threads, block=_THREADS):
    """Run one thread for each of ``threads`` (kernels guard the rest of the last block)."""
    grid = -(-threads // block) * block
    return kernel(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=[mx.bfloat16] * len(shapes),
        grid=(grid, 1, 1),
        threadgroup=(block, 1, 1),
    )


# -- dropout ----------------------------------------------------------------------------------------------------------

_MIX = """
__device__ __forceinline__ unsigned mix(unsigned h) {
  h = (h ^ (h >> 16)) * 0x7feb352du; h = (h ^ (h >> 15)) * 0x846ca68bu; return h ^ (h >> 16);
}
"""


def dropout(x: mx.array, seed: mx.array, rows: mx.array, rate: float) -> mx.array:
    """Zero a share ``rate`` of x [N, W] and scale up the rest; the same for a gradient on its way back.

    The mask is a hash of (seed, row, column), in plain integer arithmetic: recomputation, another device and another
    padding give the same mask, and it is never stored. ``rows`` is uint32 [N], a row's identity in the batch; ``seed``
    a uint32 scalar.
    """
    width, threshold = x.shape[1], round(rate * 2**32)
    if not _on_cuda(x) or width % 8:
        return mx.where(dropout_mask(seed, rows, width, rate), x * (1 / (1 - rate)), 0).astype(x.dtype)
    source = """
    long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long)x_shape[0] * (W / 8)) return;
    unsigned row = (unsigned)(i / (W / 8)), column = (unsigned)(i % (W / 8)) * 8;
    unsigned down = mix(rows[row] * 0x9e3779b1u + seed[0]), across = seed[0] ^ 0x5bd1e995u;
    float a[8];
    load8(x + i * 8, a);
    for (int j = 0; j < 8; j++)
      a[j] = mix(down ^ mix((column + j) * 0x85ebca77u + across)) >= (unsigned)THRESHOLD ? a[j] * SCALE : 0.0f;
    store8(y + i * 8, a);
    """
    source = source.replace("THRESHOLD", f"{threshold}u").replace("SCALE", f"{1 / (1 - rate)!r}f")
    kernel = _kernel(f"dropout_{threshold}", source, ("x", "seed", "rows"), ("y",), header=_MIX, W=width)
    return _launch(kernel, [x, seed.reshape(1), rows], [x.shape], x.size // 8)[0]


def _mix(h: mx.array) -> mx.array:
    """Mix the bits of uint32 (the finalizer `lowbias32` of C. Wellons' hash prospector)."""
    h = (h ^ (h >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    h = (h ^ (h >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return h ^ (h >> 16)


def dropout_mask(seed: mx.array, rows: mx.array, width: int, rate: float) -> mx.array:
    """Return the mask of `dropout`, bool [N, width]: true where a value stays."""
    down = _mix(rows * mx.array(0x9E3779B1, mx.uint32) + seed)
    across = _mix(mx.arange(width, dtype=mx.uint32) * mx.array(0x85EBCA77, mx.uint32) + (seed ^ 0x5BD1E995))
    return _mix(down[:, None] ^ across[None, :]) >= mx.array(round(rate * 2**32), mx.uint32)


# -- SwiGLU -----------------------------------------------------------------------------------------------------------


def swiglu(gate_up: mx.array) -> mx.array:
    """silu(gate) * up; ``gate_up`` [N, 2 F] holds the two side by side, the result is [N, F]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if not _on_cuda(gate_up) or width % 8:
        gate, up = (m.astype(mx.float32) for m in mx.split(gate_up, 2, axis=1))
        return (gate * mx.sigmoid(gate) * up).astype(gate_up.dtype)
    source = """
    long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long)gate_up_shape[0] * (F / 8)) return;
    long row = i / (F / 8); int column = (int)(i % (F / 8)) * 8;
    const bf16* at = gate_up + row * 2 * F + column;
    float g[8], u[8];
    load8(at, g); load8(at + F, u);
    for (int j = 0; j < 8; j++) g[j] = g[j] / (1.0f + __expf(-g[j])) * u[j];
    store8(act + row * F + column, g);
    """
    kernel = _kernel("swiglu", source, ("gate_up",), ("act",), F=width)
    return _launch(kernel, [gate_up], [(rows, width)], rows * width // 8)[0]


def swiglu_vjp(gate_up: mx.array, dact: mx.array) -> tuple[mx.array, mx.array]:
    """Return (the output again [N, F], the gradient of gate_up [N, 2 F]) for the output's gradient ``dact``."""
    rows, width = dact.shape
    if not _on_cuda(gate_up, dact) or width % 8:
        gate, up = (m.astype(mx.float32) for m in mx.split(gate_up, 2, axis=1))
        s, d = mx.sigmoid(gate), dact.astype(mx.float32)
        grads = mx.concatenate([d * up * s * (1 + gate * (1 - s)), d * gate * s], axis=1)
        return (gate * s * up).astype(gate_up.dtype), grads.astype(gate_up.dtype)
    source = """
    long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long)dact_shape[0] * (F / 8)) return;
    long row = i / (F / 8); int column = (int)(i % (F / 8)) * 8;
    long at = row * 2 * F + column;
    float g[8], u[8], d[8];
    load8(gate_up + at, g); load8(gate_up + at + F, u); load8(dact + row * F + column, d);
    for (int j = 0; j < 8; j++) {
      float s = 1.0f / (1.0f + __expf(-g[j])), silu = g[j] * s, up = u[j];
      u[j] = d[j] * silu;
      d[j] = d[j] * up * s * (1.0f + g[j] * (1.0f - s));
      g[j] = silu * up;
    }
    store8(act + row * F + column, g); store8(grad + at, d); store8(grad + at + F, u);
    """
    kernel = _kernel("swiglu_vjp", source, ("gate_up", "dact"), ("act", "grad"), F=width)
    act, grad = _launch(kernel, [gate_up, dact], [(rows, width), (rows, 2 * width)], rows * width // 8)
    return act, grad


# -- RMSNorm ----------------------------------------------------------------------------------------------------------


def norm_vjp(x: mx.array, weight: mx.array, eps: float, dy: mx.array, residual: mx.array | None = None) -> mx.array:
    """Return the gradient of x [N, D] through an RMSNorm whose weight is frozen, plus ``residual``."""
    rows, width = x.shape
    given = [x, weight, dy] + ([] if residual is None else [residual])
    if not _on_cuda(*given) or width % 256 or width > 8192:
        dx = _norm_vjp(x, weight, eps, dy)
        return dx if residual is None else dx + residual
    source = """
    long at = (long)blockIdx.x * D + threadIdx.x * 8;
    float a[8], w[8], d[8];
    load8(x + at, a); load8(weight + threadIdx.x * 8, w); load8(dy + at, d);
    float square = 0.0f, dot = 0.0f;
    for (int j = 0; j < 8; j++) { d[j] *= w[j]; square += a[j] * a[j]; dot += a[j] * d[j]; }
    for (int s = 16; s > 0; s >>= 1) {
      square += __shfl_xor_sync(0xffffffff, square, s); dot += __shfl_xor_sync(0xffffffff, dot, s);
    }
    __shared__ float squares[32], dots[32];
    if (threadIdx.x % 32 == 0) { squares[threadIdx.x / 32] = square; dots[threadIdx.x / 32] = dot; }
    __syncthreads();
    square = 0.0f; dot = 0.0f;
    for (int s = 0; s < D / 256; s++) { square += squares[s]; dot += dots[s]; }
    float scale = rsqrtf(square / D + EPS);
    dot *= scale * scale / D;
    for (int j = 0; j < 8; j++) d[j] = scale * (d[j] - a[j] * dot);
    RESIDUAL
    store8(dx + at, d);
    """
    add = "load8(residual + at, w); for (int j = 0; j < 8; j++) d[j] += w[j];"
    names = ("x", "weight", "dy") + (() if residual is None else ("residual",))
    kernel = _kernel(
        f"norm_vjp_{len(names)}", source.replace("RESIDUAL", "" if residual is None else add), names, ("dx",),
        eps=eps, D=width,
    )  # fmt: skip
    return _launch(kernel, given, [x.shape], rows * width // 8, width // 8)[0]


def _norm_vjp(x, weight, eps, dy):
    # Without its weight in the graph, MLX does not form the weight's gradient.
    return mx.vjp(lambda m: mx.fast.rms_norm(m, None, eps), [x], [(dy * weight).astype(x.dtype)])[1][0]


# -- queries and keys: RMSNorm a head, then the rotation --------------------------------------------------------------

# Sixteen threads a head of 128, eight values each; a value's partner in the rotation is eight threads away.
_HEAD_PART = """
    long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    long head = i / 16; int lane = (int)(i % 16);
    long token = head / (H + 2 * K); int h = (int)(head % (H + 2 * K));
    bool inside = token < (long)qkv_shape[0];
    if (!inside) { token = 0; h = 0; }
    const bf16* from = qkv + (token * (H + 2 * K) + h) * 128 + lane * 8;
"""


def heads(qkv, norms, rope, eps: float, n_heads: int, n_kv: int) -> tuple[mx.array, mx.array, mx.array]:
    """Normalise and rotate: qkv [N, (H + 2 K) d] to q [N, H d], k and v [N, K d].

    ``norms``: weights of the query's and the key's norm, [d] each. ``rope``: cos and sin, [B, L, 1, 2, d / 2] with
    N = B * L, sin's first half negated.
    """
    (q_norm, k_norm), (cos, sin) = norms, rope
    rows, width = qkv.shape[0], q_norm.shape[0]
    sizes = [n_heads * width, n_kv * width, n_kv * width]
    if not _on_cuda(qkv, q_norm, k_norm, cos, sin) or width != 128:
        q, k, v = mx.split(qkv, [sizes[0], sizes[0] + sizes[1]], axis=1)
        shape = (*cos.shape[:2], -1, width)
        q = rotate(mx.fast.rms_norm(q.reshape(shape), q_norm, eps), cos, sin)
        k = rotate(mx.fast.rms_norm(k.reshape(shape), k_norm, eps), cos, sin)
        return q.reshape(rows, -1), k.reshape(rows, -1), v
    source = (
        _HEAD_PART
        + """
    float a[8], w[8], c[8], s[8];
    load8(from, a);
    float square = 0.0f;
    for (int j = 0; j < 8; j++) square += a[j] * a[j];
    for (int m = 8; m > 0; m >>= 1) square += __shfl_xor_sync(0xffffffff, square, m);
    float scale = rsqrtf(square / 128 + EPS);
    load8((h < H ? q_norm : k_norm) + lane * 8, w);
    load8(cosine + token * 128 + lane * 8, c); load8(sine + token * 128 + lane * 8, s);
    float rotated[8];
    for (int j = 0; j < 8; j++) {
      float y = a[j] * scale * w[j];
      rotated[j] = y * c[j] + __shfl_xor_sync(0xffffffff, y, 8) * s[j];
    }
    if (!inside) return;
    if (h < H) store8(q + (token * H + h) * 128 + lane * 8, rotated);
    else if (h < H + K) store8(k + (token * K + h - H) * 128 + lane * 8, rotated);
    else store8(v + (token * K + h - H - K) * 128 + lane * 8, a);
    """
    )
    names = ("qkv", "q_norm", "k_norm", "cosine", "sine")
    kernel = _kernel("heads", source, names, ("q", "k", "v"), eps=eps, H=n_heads, K=n_kv)
    given = [qkv, q_norm, k_norm, cos, sin]
    return tuple(_launch(kernel, given, [(rows, size) for size in sizes], rows * (n_heads + 2 * n_kv) * 16))


def heads_vjp(qkv, norms, rope, eps: float, gradients) -> mx.array:
    """Return the gradient of qkv for ``gradients`` of q, k and v ([N, H d], [N, K d] twice)."""
    (q_norm, k_norm), (cos, sin), (dq, dk, dv) = norms, rope, gradients
    width = q_norm.shape[0]
    n_heads, n_kv = dq.shape[1] // width, dk.shape[1] // width
    if not _on_cuda(qkv, q_norm, k_norm, cos, sin, dq, dk, dv) or width != 128:
        shape = (*cos.shape[:2], -1, width)
        parts = mx.split(qkv, [dq.shape[1], dq.shape[1] + dk.shape[1]], axis=1)
        pairs = zip(parts[:2], (q_norm, k_norm), (dq, dk), strict=True)
        grads = [_norm_vjp(x.reshape(shape), w, eps, rotate(d.reshape(shape), cos, -sin)) for x, w, d in pairs]
        return mx.concatenate([*(g.reshape(len(qkv), -1) for g in grads), dv], axis=1)
    source = (
        _HEAD_PART
        + """
    float a[8], d[8], w[8], c[8], s[8];
    load8(from, a);
    const bf16* grad = h < H ? dq + (token * H + h) * 128
                     : h < H + K ? dk + (token * K + h - H) * 128 : dv + (token * K + h - H - K) * 128;
    load8(grad + lane * 8, d);
    load8((h < H ? q_norm : k_norm) + lane * 8, w);
    load8(cosine + token * 128 + lane * 8, c); load8(sine + token * 128 + lane * 8, s);
    float square = 0.0f, dot = 0.0f, back[8];
    for (int j = 0; j < 8; j++) {
      back[j] = (d[j] * c[j] - __shfl_xor_sync(0xffffffff, d[j], 8) * s[j]) * w[j];
      square += a[j] * a[j]; dot += a[j] * back[j];
    }
    for (int m = 8; m > 0; m >>= 1) {
      square += __shfl_xor_sync(0xffffffff, square, m); dot += __shfl_xor_sync(0xffffffff, dot, m);
    }
    float scale = rsqrtf(square / 128 + EPS);
    dot *= scale * scale / 128;
    if (!inside) return;
    if (h < H + K) for (int j = 0; j < 8; j++) d[j] = scale * (back[j] - a[j] * dot);
    store8(out + (token * (H + 2 * K) + h) * 128 + lane * 8, d);
    """
    )
    names = ("qkv", "q_norm", "k_norm", "cosine", "sine", "dq", "dk", "dv")
    kernel = _kernel("heads_vjp", source, names, ("out",), eps=eps, H=n_heads, K=n_kv)
    given = [qkv, q_norm, k_norm, cos, sin, dq, dk, dv]
    return _launch(kernel, given, [qkv.shape], len(qkv) * (n_heads + 2 * n_kv) * 16)[0]


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the halves of [B, L, H, d] by the angles of cos and sin [B, L, 1, 2, d / 2] (sin's first half negated).

    The halves are swapped by a view (a reversed axis of two), so that the rotation is one fused operation.
    """
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape)

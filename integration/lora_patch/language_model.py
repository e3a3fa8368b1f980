"""The language model as plain MLX operations, as few as possible: prefill, and steps of one or several tokens.

    model = LanguageModel(base)
    layers = model.layers(update, copies)  # the base's matrices, an adapter's update beside them or in merged copies
    batch = Batch(model, layers); logits = batch.admit(row); logits = batch.step(tokens)

Runs wherever MLX does. Projections that share an input are one product. What an operation costs here is mostly that
there is one: on an accelerator a step of one token is shorter than the host's time for its hundreds of primitives.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .vlm import GROUPS, LAYERS, TARGET_MODULES, Base, LayerSpec, Packing, Row, decoder

GROWTH = 256  # columns by which the key-value cache grows
_NAMES = {name.split(".")[1].removesuffix("_proj"): name for name in TARGET_MODULES}

Update = dict[str, tuple[mx.array, mx.array, float]]  # module name -> A [inputs, rank], B [rank, outputs], scale
Copies = frozenset[tuple[int, str]]  # (layer, group) of the matrices into copies of which an update is merged


@dataclass(frozen=True)
class Shape:
    """All of a layer that is not an array; equal shapes share compiled functions."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    packing: tuple[tuple[str, tuple[Packing | None, ...]], ...]  # per group: of each matrix that it is stored as
    theta: float  # base of the rotation's angles


class LanguageModel:
    """The arrays of a base's language model, laid out for decoding; nothing is held twice."""

    def __init__(self, base: Base):
        self.parts = decoder(base.model)
        self.theta = float(base.model.language_model.args.rope_theta)
        self.dtype = self.parts.norm.dtype
        self.tied = bool(base.model.language_model.args.tie_word_embeddings)
        self.shapes = [Shape(s.heads, s.kv_heads, s.head_dim, s.eps, s.grouped, self.theta) for s in self.parts.specs]
        self.plain = [
            self._laid_out(grouped, spec) for grouped, spec in zip(self.parts.grouped, self.parts.specs, strict=True)
        ]
        mx.eval(self.plain)
        self.head = _transposed([self.parts.head], [self.parts.head_packing])[0]
        self.compiled = mx.default_device() == mx.gpu

    def _laid_out(self, grouped: dict, spec: LayerSpec) -> dict:
        packing = dict(spec.grouped)
        return {
            name: _transposed(value, packing[name]) if name in packing else value for name, value in grouped.items()
        }

    # -- an adapter ---------------------------------------------------------------------------------------------------

    def layers(self, update: Update | None, copies: Copies = frozenset()) -> list[dict]:
        """Return each layer's arrays with an adapter's update: merged into ``copies``, else beside the base's matrices.

        Merged copies are made from the untouched base, W + s B A, rounded once to the base's type.
        """
        if not update:
            return self.plain
        found = []
        for i, plain in enumerate(self.plain):
            layer = dict(plain)
            for group, own, widths in group_updates(self, update, i):
                if any(own):
                    self._add(layer, group, own, widths, (i, group) in copies)
            mx.eval(layer)
            found.append(layer)
        return found

    def _add(self, layer: dict, group: str, own: list, widths: list, merged: bool) -> None:
        a, b = stacked(own, widths)
        if merged:
            (w,) = layer[group][0]
            layer[group] = [(mx.contiguous((w.astype(mx.float32) + a @ b).T.astype(w.dtype)).T,)]
        else:
            # A lies transposed in memory: a matrix-vector product is twice as fast so on CUDA
            layer[group + ".a"] = mx.contiguous(a.astype(self.dtype).T).T
            layer[group + ".b"] = mx.contiguous(b.astype(self.dtype))

    def changed(self, update: Update | None) -> Copies:
        """Return which matrices an adapter changes."""
        layers = range(len(self.plain) if update else 0)
        return frozenset((i, group) for i in layers for group, own, _ in group_updates(self, update, i) if any(own))

    def copies(self, update: Update | None, room: int) -> Copies:
        """Return of which matrices merged copies fit in ``room`` bytes: the smallest first, since each saves a step two
        operations, whatever its size. A quantized matrix is never copied."""
        sizes = {
            (i, group): self.plain[i][group][0][0].nbytes
            for i, group in self.changed(update)
            if dict(self.parts.specs[i].grouped)[group] == (None,)
        }
        found = sorted(sizes, key=lambda at: (sizes[at], at))
        fitting = np.cumsum([sizes[at] for at in found]) <= room
        return frozenset(found[: int(fitting.sum())])

    # -- the pieces of a pass -----------------------------------------------------------------------------------------

    def embed(self, tokens: mx.array) -> mx.array:
        return self.parts.embed(tokens)

    def logits(self, x: mx.array) -> mx.array:
        """Return [..., V] of the last layer's outputs [..., D]."""
        return _product(mx.fast.rms_norm(x, self.parts.norm, self.parts.eps), self.head, self.parts.head_packing)

    def prefill(self, layers: list[dict], row: Row) -> tuple[mx.array, list[mx.array], list[mx.array]]:
        """Run a prompt; return its last output [1, D] and each layer's keys and values [1, heads, L, head_dim]."""
        x, at = self.embed(mx.array(row.input_ids)), mx.array(row.visual)
        if row.features is not None:
            x[at] = row.features.astype(x.dtype)
        cos, sin = self.parts.rotary(x[None], mx.array(row.position_ids)[:, None])
        keys, values = [], []
        for i, (shape, layer) in enumerate(zip(self.shapes, layers, strict=True)):
            before, after = _halves(shape, 1, False)
            q, key, value = before(layer, x, (cos, sin))
            attended = mx.fast.scaled_dot_product_attention(q, key, value, scale=shape.head_dim**-0.5, mask="causal")
            x = after(layer, x, attended)
            keys.append(key)
            values.append(value)
            if row.deepstack is not None and i < len(row.deepstack):
                x = x.at[at].add(row.deepstack[i].astype(x.dtype))
        return x[-1:], keys, values

    def step(self, layers: list[dict], cache: "Cache", tokens: mx.array, positions: np.ndarray) -> mx.array:
        """Run tokens int32 [B, L] whose first ones stand at ``positions`` [B] of M-RoPE; return outputs [B * L, D]."""
        x, offset = self.embed(tokens.reshape(-1)), mx.array(positions.astype(np.int32))
        mask = cache.advance(tokens.shape[1])
        for i, (shape, layer) in enumerate(zip(self.shapes, layers, strict=True)):
            # compiled where that pays: on an accelerator, where a step is shorter than Python's own time
            before, after = _halves(shape, len(tokens), self.compiled)
            q, key, value = before(layer, x, offset)
            x = after(layer, x, _attend(q, *cache.write(i, key, value), shape.head_dim**-0.5, mask))
        return x


def update_of(adapter) -> Update | None:
    """Return what an adapter adds, by module: of `vlm.LoraModules`, of `adapters.Adapter`, or of none."""
    if adapter is None:
        return None
    if hasattr(adapter, "layers"):
        return adapter.layers
    return {name: (module.lora_a, module.lora_b, adapter.scale) for name, module in adapter.modules.items()}


def group_updates(model: LanguageModel, update: Update, layer: int) -> Iterator[tuple[str, list, list]]:
    """Yield (group, its projections' updates or None, their (inputs, outputs)) of a layer."""
    widths = dict(model.parts.specs[layer].widths)
    for group, names in GROUPS.items():
        own = [update.get(f"{LAYERS}.{layer}.{_NAMES[name]}") for name in names]
        yield group, own, [widths[name] for name in names]


def stacked(own: list, widths: list[tuple[int, int]]) -> tuple[mx.array, mx.array]:
    """Return a group's A side by side [inputs, ranks] and its scaled B as blocks [ranks, outputs], float32."""
    outputs = sum(width for _, width in widths)
    a, b, at = [], [], 0
    for pair, (_, width) in zip(own, widths, strict=True):
        if pair is not None:
            a.append(pair[0].astype(mx.float32))
            b.append(mx.pad(pair[2] * pair[1].astype(mx.float32), [(0, 0), (at, outputs - at - width)]))
        at += width
    return mx.concatenate(a, axis=1), mx.concatenate(b)


# -- products and halves of a layer -----------------------------------------------------------------------------------


def _transposed(matrices: list[tuple], packing) -> list[tuple]:
    return [matrix if how else (matrix[0].T,) for matrix, how in zip(matrices, packing, strict=True)]


def _product(x: mx.array, matrix: tuple, packing: Packing | None) -> mx.array:
    if packing is None:
        return x @ matrix[0]
    return mx.quantized_matmul(
        x, *matrix, transpose=True, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )


def _add_product(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    if c.dtype == mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return mx.addmm(c, a, b)
    return c + a @ b  # the CPU's addmm sums 16-bit values in 16 bits


@functools.cache
def _halves(shape: Shape, rows: int, compiled: bool):
    """Return a decoder layer as two functions of arrays, what comes before and what comes after attention:

    (layer, x [B * L, D], rope) -> queries, keys, values [B, heads, L, head_dim]
    (layer, x, attended [B, heads, L, head_dim]) -> x

    ``rope``: offsets int32 [B] of consecutive positions, or (cos, sin) [B, L, head_dim]. The key-value cache is written
    between them, outside the compiled parts: it grows by a column each step, and a write at an index that is an array
    copies the whole cache on CUDA.
    """
    packing, heads, kv_heads, width = dict(shape.packing), shape.heads, shape.kv_heads, shape.head_dim

    def linear(group, layer, x, residual=None):
        a, b = layer.get(group + ".a"), layer.get(group + ".b")
        parts = [(matrix, how) for matrix, how in zip(layer[group], packing[group], strict=True)]
        if len(parts) == 1 and parts[0][1] is None:
            (w,) = parts[0][0]
            if a is not None:
                # the small product first, the large one adds to it: a small update is not lost in rounding
                residual = (x @ a) @ b if residual is None else _add_product(residual, x @ a, b)
            return x @ w if residual is None else _add_product(residual, x, w)
        y = [_product(x, matrix, how) for matrix, how in parts]
        y = y[0] if len(y) == 1 else mx.concatenate(y, axis=-1)
        if a is not None:
            y = _add_product(y, x @ a, b)
        return y if residual is None else residual + y

    def turn(x, rope):
        if isinstance(rope, tuple):
            return _rotate(x, *rope)
        return mx.fast.rope(x, width, traditional=False, base=shape.theta, scale=1.0, offset=rope)

    def before(rows, layer, x, rope):
        n = mx.fast.rms_norm(x, layer["input_norm"], shape.eps)
        y = linear("qkv", layer, n).reshape(rows, -1, heads + 2 * kv_heads, width).transpose(0, 2, 1, 3)
        q, k, v = mx.split(y, [heads, heads + kv_heads], axis=1)
        q = turn(mx.fast.rms_norm(q, layer["q_norm"], shape.eps), rope)
        return q, turn(mx.fast.rms_norm(k, layer["k_norm"], shape.eps), rope), v

    def after(layer, x, attended):
        x = linear("o", layer, attended.transpose(0, 2, 1, 3).reshape(len(x), -1), x)
        n = mx.fast.rms_norm(x, layer["post_norm"], shape.eps)
        gate, up = mx.split(linear("gate_up", layer, n), 2, axis=-1)
        return linear("down", layer, nn.silu(gate) * up, x)

    before = functools.partial(before, rows)
    return (mx.compile(before), mx.compile(after)) if compiled else (before, after)


def _attend(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Return attention's output [B, heads, L, head_dim]; ``mask``: bool, True where seen; None where all is seen."""
    if mask is None or not _BY_HAND:
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    # with a mask CUDA's fused attention falls back to something twice as slow as this (8 rows of 2,304 columns)
    batch, heads, length, width = q.shape
    grouped = (q * scale).reshape(batch, keys.shape[1], -1, length, width)
    scores = mx.where(mask[:, :, None], grouped @ keys[:, :, None].swapaxes(-1, -2), -mx.inf)
    return (mx.softmax(scores, axis=-1, precise=True) @ values[:, :, None]).reshape(batch, heads, length, width)


_BY_HAND = mx.default_device() == mx.gpu and not mx.metal.is_available()


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn x [B, H, L, d] by the angles of its positions, [B, L, head_dim]."""
    half = x.shape[-1] // 2
    turned = mx.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None] + turned * sin[:, None]


# -- rows that are decoded together -----------------------------------------------------------------------------------


class Batch:
    """Rows that are decoded together, with their keys and values; rows join and leave between steps."""

    ahead = 1  # steps that are started before the tokens of the last one are read

    def __init__(self, model: LanguageModel, layers: list[dict]):
        self.model, self.layers = model, layers
        self.cache = Cache(len(layers))
        self.positions = np.zeros(0, np.int64)  # of each row's next token, in M-RoPE's count

    def longest_draft(self, rows: int) -> int:
        """Return how many tokens of a row one pass can verify."""
        return 16 if rows == 1 else 4

    def admit(self, row: Row) -> mx.array:
        """Prefill a prompt and add it to the batch; return the logits of its first token, [1, V]."""
        x, keys, values = self.model.prefill(self.layers, row)
        self.cache.add(keys, values)
        self.positions = np.append(self.positions, int(row.position_ids.max()) + 1)
        logits = self.model.logits(x)
        mx.eval(logits, keys, values)
        return logits

    def step(self, tokens: mx.array, wanted: bool) -> tuple[mx.array, mx.array]:
        """Run each row's newest token, int32 [B]; return the next greedy ones and the logits [B, V] (``wanted`` or
        not: here they come anyway)."""
        logits = self.model.logits(self.model.step(self.layers, self.cache, tokens[:, None], self.positions))
        self.positions = self.positions + 1
        return mx.argmax(logits, axis=-1).astype(mx.int32), logits

    def verify(self, tokens: list[list[int]], wanted: bool) -> tuple[mx.array, mx.array]:
        """Run several tokens of each row at once; return what greedily follows each, [B, L], and logits [B, L, V]."""
        x = self.model.step(self.layers, self.cache, mx.array(np.array(tokens, np.int32)), self.positions)
        logits = self.model.logits(x).reshape(len(tokens), len(tokens[0]), -1)
        self.positions = self.positions + len(tokens[0])
        return mx.argmax(logits, axis=-1).astype(mx.int32), logits

    def take_back(self, counts: list[int]) -> None:
        """Forget the last tokens of each row's last `verify`."""
        self.cache.take_back(counts)
        self.positions = self.positions - np.array(counts)

    def keep(self, rows: list[int]) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows] if rows else self.positions[:0]


class Cache:
    """Keys and values of the running rows, right-aligned: row b holds its columns pads[b] .. used - 1, without its
    ``holes``: there stood guesses that did not hold while another row's did."""

    def __init__(self, layers: int):
        self.keys: list[mx.array] = [None] * layers  # [B, heads, columns, head_dim]
        self.values: list[mx.array] = [None] * layers
        self.used, self.added = 0, 0
        self.pads = np.zeros(0, dtype=np.int32)
        self.holes = np.zeros((0, 0), dtype=bool)  # [B, used]

    def add(self, keys: list[mx.array], values: list[mx.array]) -> None:
        """Add one prefilled row ([1, heads, L, head_dim] a layer) at the end of the batch."""
        length = keys[0].shape[2]
        columns = max(self.used, length)
        for store, new in ((self.keys, keys), (self.values, values)):
            for i, array in enumerate(new):
                old = [] if store[i] is None else [_aligned(store[i][:, :, : self.used], columns)]
                store[i] = mx.concatenate([*old, _aligned(array, columns)])
        self.pads = np.append(self.pads + (columns - self.used), columns - length).astype(np.int32)
        self.holes = np.pad(self.holes, [(0, 1), (columns - self.used, 0)])
        self.used = columns

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but ``rows``, and the columns that only dropped rows used."""
        if not rows:
            self.__init__(len(self.keys))
            return
        self.pads, self.holes = self.pads[rows], self.holes[rows]
        first, at = int(self.pads.min()), mx.array(rows)
        kept = slice(first, self.used)
        if self.holes.all(axis=0)[kept].any():  # as where one row is left: all of its holes go
            kept = np.flatnonzero(~self.holes.all(axis=0)[kept]) + first
        columns = kept if isinstance(kept, slice) else mx.array(kept)
        for store in (self.keys, self.values):
            for i, array in enumerate(store):
                store[i] = array[at][:, :, columns]
        self.holes = self.holes[:, kept]
        self.pads, self.used = self.pads - first, self.holes.shape[1]

    def take_back(self, counts: list[int]) -> None:
        """Forget the last columns of each row, ``counts`` of them."""
        least = min(counts)
        self.used -= least
        self.holes = self.holes[:, : self.used]
        for row, count in enumerate(counts):
            self.holes[row, self.used - (count - least) :] = True

    def advance(self, count: int = 1) -> mx.array | None:
        """Make room for ``count`` more columns; return the mask of the columns that each new one sees, bool
        [B, 1, count or 1, used], or None where every row sees all of them."""
        if self.used + count > self.keys[0].shape[2]:
            for store in (self.keys, self.values):
                for i, array in enumerate(store):
                    store[i] = mx.pad(array, [(0, 0), (0, 0), (0, GROWTH), (0, 0)])
        self.used, self.added = self.used + count, count
        self.holes = np.pad(self.holes, [(0, 0), (0, count)])
        if count == 1 and not self.pads.any() and not self.holes.any():
            return None
        seen = (np.arange(self.used) >= self.pads[:, None, None]) & ~self.holes[:, None]
        seen = seen & (np.arange(self.used) <= self.used - count + np.arange(count)[:, None])
        return mx.array(seen[:, None])

    def write(self, layer: int, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array]:
        """Write the newest columns of a layer; return all its keys and values, [B, heads, used, head_dim]."""
        for store, new in ((self.keys, key), (self.values, value)):
            store[layer][:, :, self.used - self.added : self.used] = new
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]


def _aligned(array: mx.array, columns: int) -> mx.array:
    """Pad [B, heads, L, head_dim] on the left to ``columns``."""
    return mx.pad(array, [(0, 0), (0, 0), (columns - array.shape[2], 0), (0, 0)])

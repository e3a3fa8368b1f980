"""Batched generation: what many photographs get from one base and several adapters, fast and as one by one.

    decoding = Decoding(base)                       # the adapter that is on, or the base alone
    for answer in decoding.generate(requests, batch_size=8, max_tokens=1024): ...

mlx-vlm's own `batch_generate` runs the vision tower anew in every call and pads the prompts to one length; here each
prompt is prefilled on its own from features computed once (`vlm.prepare_row`), and rows join and leave the running
batch one by one: a finished row costs no further step, and its place goes to the next prompt. Each row's tokens
depend on the row alone, up to the rounding of a batched matrix product (the same in float32 as far as a greedy choice
can tell; in bfloat16 two tokens whose logits lie within rounding may swap).
"""

import collections
import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .repetition import repeated_tail
from .vlm import Base, LayerSpec, Packing, Row, decoder, stop_tokens

GROWTH = 256  # columns by which the key-value cache grows
LOOP_CHECK = 32  # tokens between two looks for a repetition loop


@dataclass
class Request:
    """One answer wanted: a prompt row (`prompt_row`), which sample of it, and the grammar it must keep to, if any."""

    row: Row
    key: str  # names the photograph and prompt: handed back with the answer, and part of a sample's seed
    sample: int = 0
    grammar: "Grammar | None" = None


@dataclass
class Answer:
    """What came: token ids without the end of turn, and why it ended ("stop", "length" or "loop")."""

    key: str
    sample: int
    tokens: list[int]
    finish: str


@dataclass
class _Slot:
    """One row of the running batch."""

    request: Request
    position: int  # of the newest token, in M-RoPE's count; it is not in the cache yet
    tokens: list[int] = field(default_factory=list)
    matcher: object = None


def prompt_row(row: Row) -> Row:
    """Return the prompt's part of a row that holds a response too; features are shared, not copied."""
    length = int(np.argmax(row.completion_mask)) if row.completion_mask.any() else len(row)
    return Row(
        row.input_ids[:length],
        row.completion_mask[:length] & False,
        row.position_ids[:, :length],
        row.visual,
        row.features,
        row.deepstack,
    )


def answer_text(base: Base, tokens: list[int]) -> str:
    """Return the text of generated tokens; special tokens stay visible, since a reader of JSON trips over them."""
    return base.processor.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Decoding:
    """Generation with the language model as it stands when this is made: the base, or base and adapter."""

    def __init__(self, base: Base):
        self.base = base
        self.parts = decoder(base.model)
        self.stop = stop_tokens(base)
        dtype = self.parts.norm.dtype

        def laid_out(matrix: mx.array) -> mx.array:  # see vlm.build_adapter for the transposed view
            return mx.contiguous(matrix.T.astype(dtype)).T

        # cast and scaled once here instead of at each step: a float32 adapter would promote every activation it meets
        self.lora = [
            {name: (laid_out(a), laid_out(spec.lora_scale * b)) for name, (a, b) in layer.items()}
            for spec, layer in zip(self.parts.specs, self.parts.lora, strict=True)
        ]

    def text(self, tokens: list[int]) -> str:
        return answer_text(self.base, tokens)

    def generate(
        self,
        requests: Iterable[Request],
        batch_size: int,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Answer]:
        """Yield an `Answer` a request as each ends, not in their order.

        Greedy at temperature 0; else sampled, each row from its own random stream (seed, row's photograph and prompt,
        sample), so that a sample does not depend on what else is in the batch.
        """
        pending = collections.deque(requests)
        slots: list[_Slot] = []
        cache = _Cache(len(self.parts.specs))
        tokens = None
        while pending or slots:
            while pending and len(slots) < batch_size:
                slot, token = self._admit(pending.popleft(), cache, temperature, seed)
                slots.append(slot)
                tokens = token if tokens is None else mx.concatenate([tokens, token])
            following = None
            if not any(slot.matcher for slot in slots):
                # launched before the tokens are read, so that the accelerator never waits for Python
                following = self._step(slots, cache, tokens, temperature, seed)
                mx.async_eval(following)
            kept = []
            for at, (slot, token) in enumerate(zip(slots, tokens.tolist(), strict=True)):
                finish = self._take(slot, token, max_tokens)
                if finish:
                    yield Answer(slot.request.key, slot.request.sample, slot.tokens, finish)
                else:
                    kept.append(at)
            if following is None and kept:
                # under a grammar the next mask depends on this token, so finished rows are dropped first
                slots, tokens = _keep(kept, slots, tokens, cache)
                following, kept = self._step(slots, cache, tokens, temperature, seed), list(range(len(slots)))
            slots, tokens = _keep(kept, slots, following, cache)

    def stream(self, request: Request, max_tokens: int) -> Iterator[int]:
        """Yield one request's greedy tokens one by one, as a service that has nothing else to do."""
        cache = _Cache(len(self.parts.specs))
        slot, tokens = self._admit(request, cache, 0.0, 0)
        while True:
            following = None if slot.matcher else self._step([slot], cache, tokens, 0.0, 0)
            if following is not None:
                mx.async_eval(following)
            finish = self._take(slot, token := tokens.item(), max_tokens)
            if finish == "stop":
                return
            yield token
            if finish:
                return
            tokens = self._step([slot], cache, tokens, 0.0, 0) if following is None else following

    def _take(self, slot: _Slot, token: int, max_tokens: int) -> str | None:
        """Add a token to a row; return why the row ends, None while it goes on."""
        if token in self.stop:
            return "stop"
        slot.tokens.append(token)
        if slot.matcher:
            slot.matcher.consume(token)
        if len(slot.tokens) >= max_tokens:
            return "loop" if repeated_tail(slot.tokens) else "length"
        if len(slot.tokens) % LOOP_CHECK == 0 and repeated_tail(slot.tokens):
            return "loop"
        return None

    def _admit(self, request: Request, cache: "_Cache", temperature: float, seed: int) -> tuple[_Slot, mx.array]:
        """Prefill one prompt and add it to the batch; return its slot and its first token, int32 [1], not yet read."""
        row, keys, values = request.row, [], []
        x, cos, sin, at = self._merged(row)
        for i, spec in enumerate(self.parts.specs):
            before, after = _halves(spec, compiled=False)
            q, key, value = before(self.lora[i], self.parts.frozen[i], x, cos, sin)
            attended = _attend(q, key, value, spec.head_dim**-0.5, "causal")
            x = after(self.lora[i], self.parts.frozen[i], x, attended)
            keys.append(key)
            values.append(value)
            if row.deepstack is not None and i < len(row.deepstack):
                x = x.at[:, at].add(row.deepstack[i].astype(x.dtype))
        cache.add(keys, values)
        slot = _Slot(request, int(row.position_ids.max()) + 1)
        slot.matcher = request.grammar.matcher() if request.grammar else None
        token = self._choose(self._logits(x[:, -1]), [slot], temperature, seed)
        mx.eval(token, keys, values)
        return slot, token

    def _merged(self, row: Row) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return a prompt's embeddings [1, L, D] with the image features in place, cos, sin and the image positions."""
        x, at = self.parts.embed(mx.array(row.input_ids))[None], mx.array(row.visual)
        if row.features is not None:
            x[:, at] = row.features.astype(x.dtype)
        return x, *self.parts.rotary(x, mx.array(row.position_ids)[:, None]), at

    def _step(self, slots: list[_Slot], cache: "_Cache", tokens: mx.array, temperature: float, seed: int) -> mx.array:
        """Run the newest token of every row; return the next ones, int32 [B]."""
        positions = np.array([slot.position for slot in slots], dtype=np.int32)
        x = self.parts.embed(tokens)[:, None]
        # text advances time, height and width of M-RoPE alike
        cos, sin = self.parts.rotary(x, mx.array(np.broadcast_to(positions[:, None], (3, len(slots), 1))))
        mask = cache.advance()
        for i, spec in enumerate(self.parts.specs):
            # compiled where that pays: on an accelerator, where a step is shorter than Python's own time
            before, after = _halves(spec, compiled=mx.default_device() == mx.gpu)
            q, key, value = before(self.lora[i], self.parts.frozen[i], x, cos, sin)
            attended = _attend(q, *cache.write(i, key, value), spec.head_dim**-0.5, mask)
            x = after(self.lora[i], self.parts.frozen[i], x, attended)
        for slot in slots:
            slot.position += 1
        return self._choose(self._logits(x[:, -1]), slots, temperature, seed)

    def _logits(self, x: mx.array) -> mx.array:
        return _project(self.parts.head, self.parts.head_packing, mx.fast.rms_norm(x, self.parts.norm, self.parts.eps))

    def _choose(self, logits: mx.array, slots: list[_Slot], temperature: float, seed: int) -> mx.array:
        """Return the next token of each row, int32 [B], from its logits [B, V]."""
        if any(slot.matcher for slot in slots):
            allowed = np.stack([slot.matcher.allowed(logits.shape[-1]) for slot in slots])
            logits = mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))
        if temperature <= 0:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        noise = [mx.random.gumbel(logits.shape[-1:], key=mx.random.key(_stream_seed(slot, seed))) for slot in slots]
        # Gumbel's trick: argmax of logits / T + noise is a draw from softmax(logits / T)
        return mx.argmax(logits.astype(mx.float32) / temperature + mx.stack(noise), axis=-1).astype(mx.int32)


class _Cache:
    """Keys and values of the running rows, right-aligned: row b holds its columns pads[b] .. used - 1."""

    def __init__(self, layers: int):
        self.keys: list[mx.array] = [None] * layers  # [B, heads, columns, head_dim]
        self.values: list[mx.array] = [None] * layers
        self.used = 0
        self.pads = np.zeros(0, dtype=np.int32)

    def add(self, keys: list[mx.array], values: list[mx.array]) -> None:
        """Add one prefilled row ([1, heads, L, head_dim] a layer) at the end of the batch."""
        length = keys[0].shape[2]
        columns = max(self.used, length)
        for store, new in ((self.keys, keys), (self.values, values)):
            for i, array in enumerate(new):
                old = [] if store[i] is None else [_aligned(store[i][:, :, : self.used], columns)]
                store[i] = mx.concatenate([*old, _aligned(array, columns)])
        self.pads = np.append(self.pads + (columns - self.used), columns - length).astype(np.int32)
        self.used = columns

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but ``rows``, and the columns that only dropped rows used."""
        if not rows:
            self.__init__(len(self.keys))
            return
        self.pads = self.pads[rows]
        first, at = int(self.pads.min()), mx.array(rows)
        for store in (self.keys, self.values):
            for i, array in enumerate(store):
                store[i] = array[at, :, first : self.used]
        self.pads = self.pads - first
        self.used -= first

    def advance(self) -> mx.array | None:
        """Make room for one more column; return the mask of the columns each row sees, bool [B, 1, 1, used], or None
        where every row sees all of them."""
        if self.used == self.keys[0].shape[2]:
            for store in (self.keys, self.values):
                for i, array in enumerate(store):
                    store[i] = mx.pad(array, [(0, 0), (0, 0), (0, GROWTH), (0, 0)])
        self.used += 1
        if not self.pads.any():
            return None
        return mx.array((np.arange(self.used) >= self.pads[:, None])[:, None, None])

    def write(self, layer: int, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array]:
        """Write the newest column of a layer; return all its keys and values, [B, heads, used, head_dim]."""
        for store, new in ((self.keys, key), (self.values, value)):
            store[layer][:, :, self.used - 1 : self.used] = new
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]


def _aligned(array: mx.array, columns: int) -> mx.array:
    """Pad [B, heads, L, head_dim] on the left to ``columns``."""
    return mx.pad(array, [(0, 0), (0, 0), (columns - array.shape[2], 0), (0, 0)])


def _keep(kept: list[int], slots: list[_Slot], tokens: mx.array, cache: _Cache) -> tuple[list[_Slot], mx.array | None]:
    if len(kept) == len(slots):
        return slots, tokens
    cache.keep(kept)
    return [slots[at] for at in kept], tokens[mx.array(kept)] if kept else None


@functools.cache
def _halves(spec: LayerSpec, compiled: bool):
    """Return a decoder layer as two functions of arrays, what comes before and what comes after attention:

    (lora, frozen, x [B, L, D], cos, sin) -> queries, keys, values [B, heads, L, head_dim]
    (lora, frozen, x, attended [B, heads, L, head_dim]) -> x

    ``lora``: (A, scaled B) by projection. The key-value cache is written between them, outside the compiled parts: it
    grows by a column each step, and a write at an index that is an array copies the whole cache on CUDA.
    """
    packing = dict(spec.packing)

    def linear(name, lora, frozen, x):
        y = _project(frozen[name], packing[name], x)
        if name not in lora:
            return y
        a, b = lora[name]
        return y + (x @ a) @ b  # mx.addmm is slower here on CUDA

    def before(lora, frozen, x, cos, sin):
        n = mx.fast.rms_norm(x, frozen["input_norm"], spec.eps)
        q, k, v = (linear(name, lora, frozen, n).reshape(*x.shape[:2], -1, spec.head_dim) for name in "qkv")
        q = _rotate(mx.fast.rms_norm(q, frozen["q_norm"], spec.eps).transpose(0, 2, 1, 3), cos, sin)
        k = _rotate(mx.fast.rms_norm(k, frozen["k_norm"], spec.eps).transpose(0, 2, 1, 3), cos, sin)
        return q, k, v.transpose(0, 2, 1, 3)

    def after(lora, frozen, x, attended):
        x = x + linear("o", lora, frozen, attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        n = mx.fast.rms_norm(x, frozen["post_norm"], spec.eps)
        gated = nn.silu(linear("gate", lora, frozen, n)) * linear("up", lora, frozen, n)
        return x + linear("down", lora, frozen, gated)

    return (mx.compile(before), mx.compile(after)) if compiled else (before, after)


def _attend(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """Return attention's output [B, heads, L, head_dim]; ``mask``: bool array, "causal", or None where all is seen."""
    if mask is None or isinstance(mask, str) or not _BY_HAND:
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    # with a mask CUDA's fused attention falls back to something twice as slow as this (8 rows of 2,304 columns)
    batch, heads, length, width = q.shape
    grouped = (q * scale).reshape(batch, keys.shape[1], -1, width)
    scores = mx.where(mask, grouped @ keys.swapaxes(-1, -2), -mx.inf)
    return (mx.softmax(scores, axis=-1, precise=True) @ values).reshape(batch, heads, length, width)


_BY_HAND = mx.default_device() == mx.gpu and not mx.metal.is_available()


def _project(matrix: tuple, packing: Packing | None, x: mx.array) -> mx.array:
    if packing is None:
        return x @ matrix[0].T
    return mx.quantized_matmul(
        x, *matrix, transpose=True, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn x [B, heads, L, head_dim] by the angles of its positions, [B, L, head_dim]."""
    half = x.shape[-1] // 2
    turned = mx.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None] + turned * sin[:, None]


def _stream_seed(slot: _Slot, seed: int) -> int:
    name = f"{seed} {slot.request.key} {slot.request.sample} {slot.position}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


def answer_schema(dimensions: Iterable[str]) -> dict:
    """Return the JSON schema of the answer that a prompt with these dimensions asks for, keys in their order."""
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": 5}

    def closed(properties: dict) -> dict:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    scored = [
        closed(
            {
                "name": {"const": name},
                "score": {"type": "integer", "minimum": 1, "maximum": 10},
                "comment": text,
                "recommendation": text,
            }
        )
        for name in dimensions
    ]
    listed = {"type": "array", "prefixItems": scored, "items": False, "minItems": len(scored), "maxItems": len(scored)}
    return closed(
        {
            "image_description": text,
            "dimensions": listed,
            "overall_score": {"type": "number", "minimum": 1, "maximum": 10},
            "key_strengths": texts,
            "priority_improvements": texts,
            "technical_notes": text,
        }
    )


class Grammar:
    """The JSON grammar of an answer: llguidance, compiled once and matched by each row on its own."""

    def __init__(self, base: Base, schema: dict):
        # imported here: only a constrained run needs it
        import llguidance
        import llguidance.hf

        self._llguidance = llguidance
        tokenizer = base.processor.tokenizer
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer)
        # without free whitespace: the canonical response is compact
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        )

    def matcher(self) -> "_Matcher":
        return _Matcher(self._llguidance.LLMatcher(self._tokenizer, self._grammar), self._tokenizer.vocab_size)


class _Matcher:
    """Where one row stands in the grammar."""

    def __init__(self, matcher, vocabulary: int):
        self._matcher = matcher
        self._bits = np.zeros((1, -(-vocabulary // 32)), dtype=np.int32)

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Return which tokens may follow, bool [vocabulary]; the end of turn alone once the object is closed."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        found = np.unpackbits(self._bits.view(np.uint8), bitorder="little").astype(bool)
        return np.pad(found, (0, max(0, vocabulary - len(found))))[:vocabulary]

    def consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        if self._matcher.get_error():
            raise ValueError(f"the grammar refuses token {token}: {self._matcher.get_error()}")

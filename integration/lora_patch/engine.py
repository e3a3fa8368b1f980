"""The generation engine: answers of one base and any number of adapters, fast and exact, for evaluation and service.

    engine = Engine(base)
    for token in engine.stream(Request(row, "photograph"), 1024, adapter): ...
    for answer in engine.generate(requests, batch_size=8, max_tokens=1024, adapter=adapter): ...

mlx-vlm's own generation runs the vision tower again in every call and pads the prompts of a batch to one length; here a
prompt is prefilled on its own from features computed once (`vlm.prepare_row`), and rows join and leave the running
batch one by one: a finished row costs no further step, and its place goes to the next prompt. Each row's tokens depend
on the row alone, up to the rounding of a product of several rows (the same in float32 as far as a greedy choice can
tell; in bfloat16 two tokens whose logits lie within rounding may swap). Drafting (drafting.py) verifies several guessed
tokens in one pass; what comes out is what greedy decoding gives without it.
"""

import collections
import hashlib
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import decode_kernel
from .decode_kernel import DecodeKernel, KernelBatch
from .drafting import Drafter, Pace
from .errors import one_line
from .grammar import Grammar, Matcher
from .language_model import Batch, LanguageModel, update_of
from .memory import room
from .repetition import repeated_tail
from .vlm import Base, Row, stop_tokens

LOOP_CHECK = 32  # tokens between two looks for a repetition loop
WARM_UP = 16  # tokens of an answer that only has kernels compiled


@dataclass
class Request:
    """One answer wanted: a prompt row (`prompt_row`), which sample of it, and the grammar it must keep to, if any."""

    row: Row
    key: str  # names the photograph and prompt: handed back with the answer, and part of a sample's seed
    sample: int = 0
    grammar: Grammar | None = None
    watched: tuple[int, ...] = ()  # token ids whose log-probabilities are wanted along the answer
    schema: Grammar | None = None  # of the usual answer, for drafting alone: the answer is not bound to it


@dataclass
class Answer:
    """What came: token ids without the end of turn, and why it ended ("stop", "length" or "loop")."""

    key: str
    sample: int
    tokens: list[int]
    finish: str
    watched: np.ndarray | None = None  # float32 [len(tokens), ids]: log-probabilities where each token was chosen
    passes: int = 0  # of the model, the prefill among them


@dataclass
class _Slot:
    """One row of the running batch."""

    request: Request
    position: int  # of the newest token in M-RoPE's count, for the random stream of a sample
    tokens: list[int] = field(default_factory=list)
    matcher: Matcher | None = None
    drafter: Drafter | None = None
    seen: list[mx.array] = field(default_factory=list)  # log-probabilities of the watched ids, [n, ids] each
    passes: int = 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else each row from a random stream of its own."""

    temperature: float = 0.0
    seed: int = 0


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


def supports(model) -> str | None:
    """Return why the engine cannot serve a model that mlx-vlm has loaded, in one line; None if it can."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "qwen3_vl":
        return f"the model's type is {kind}, not qwen3_vl"
    try:
        text = model.language_model.args
        scaling = text.rope_scaling or {}
        model.language_model.get_rope_index, model.vision_tower.patch_embed.proj.weight  # noqa: B018
        attention = model.layers[0].self_attn
        attention.q_norm, attention.rotary_emb, attention.n_kv_heads  # noqa: B018
    except (AttributeError, IndexError) as error:
        return f"this mlx-vlm keeps its parts elsewhere: {error}"
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "mrope"):
        return f"its positions are scaled by {scaling.get('rope_type', scaling.get('type'))}"
    return None


class Engine:
    """Generation over one base. One thread at a time: callers hold their lock for a whole call."""

    def __init__(self, base: Base):
        self.base = base
        self.model = LanguageModel(base)
        self.kernel_refusal = decode_kernel.refusal(self.model)  # why steps run as plain MLX operations
        self.kernel = None if self.kernel_refusal else DecodeKernel(self.model)
        self.stop = stop_tokens(base)
        self._bits = mx.array(np.left_shift(1, np.arange(32)).astype(np.uint32))  # of a word of a mask
        # by kind of answer: with an adapter, with a phrasebook, under a grammar; and by rows that run together
        self.paces: dict[tuple[bool, bool, bool, int], Pace] = {}
        self._ready: dict[int, tuple] = {}  # id of an adapter -> a weak reference to it, its layers, how they are held

    def text(self, tokens: list[int]) -> str:
        return answer_text(self.base, tokens)

    def way(self, adapter) -> str:
        """Return how an adapter's update is applied: "merged" into copies of the matrices that it changes, "beside" the
        base's, or "merged in 72 of 144 matrices" and beside the others; "base" for none."""
        return self._prepared(adapter)[1]

    def generate(
        self,
        requests: Iterable[Request],
        batch_size: int,
        max_tokens: int,
        sampling: Sampling = Sampling(),
        adapter=None,
        drafting: bool = True,
    ) -> Iterator[Answer]:
        """Yield an `Answer` a request as each ends, not in their order.

        A sample does not depend on what else is in the batch: its random stream is made of the seed, the row's
        photograph and prompt, and the sample's number.
        """
        for slot, _, finish in self._decode(requests, batch_size, max_tokens, sampling, adapter, drafting):
            if finish:
                count = len(slot.tokens)
                watched = np.concatenate([np.array(part) for part in slot.seen])[:count] if slot.seen else None
                yield Answer(slot.request.key, slot.request.sample, slot.tokens, finish, watched, slot.passes)

    def stream(self, request: Request, max_tokens: int, adapter=None, drafting: bool = True) -> Iterator[int]:
        """Yield one request's greedy tokens as they are verified; the end of turn is not among them."""
        for _, tokens, _ in self._decode([request], 1, max_tokens, Sampling(), adapter, drafting):
            yield from tokens

    def warm_up(self, row: Row, adapter=None, logits: bool = False) -> float | None:
        """Answer a few tokens of ``row``, so that no later answer waits for a kernel's compiler; return the seconds.

        None where there is no kernel. ``logits``: for answers under a grammar too.

        A kernel that fails here is given up for good: steps then run as plain MLX operations.
        """
        if self.kernel is None:
            return None
        paces, self.paces, started = self.paces, {}, time.perf_counter()  # what is measured here is no measure
        try:
            for watched in [(), (0,)][: 1 + logits]:
                list(self.generate([Request(row, "", watched=watched)], 1, WARM_UP, adapter=adapter))
        except Exception as error:
            self.kernel, self.kernel_refusal = None, f"it failed: {one_line(error)}"
            self._ready.clear()
        finally:
            self.paces = paces
        return time.perf_counter() - started

    def tokens_a_pass(self) -> dict[str, float]:
        """Return what a pass through the model brought in drafted answers, prefill among them: "base" and "adapter"."""
        found = {}
        for arm in (False, True):
            kinds = [pace for (adapted, *_), pace in self.paces.items() if adapted == arm and pace.passes]
            if kinds:
                passes = sum(pace.passes for pace in kinds)
                found["adapter" if arm else "base"] = round(sum(pace.tokens for pace in kinds) / passes, 2)
        return found

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _decode(self, requests, batch_size, max_tokens, sampling, adapter, drafting):
        """Yield (row, its newest tokens, why it ends or None) as rows get on."""
        pending, slots = collections.deque(requests), []
        batch = self._batch(adapter, min(batch_size, max(1, len(pending))))
        phrasebook = getattr(adapter, "phrasebook", None)
        kind = adapter is not None, phrasebook is not None
        tokens = None  # the newest of each row, int32 [B], perhaps not computed yet
        read_at = None  # when the last tokens were read, if single steps came of them
        while pending or slots:
            while pending and len(slots) < batch_size:
                request = pending.popleft()
                slot = _Slot(request, int(request.row.position_ids.max()) + 1)
                slot.matcher = request.grammar.matcher() if request.grammar else None
                if drafting and sampling.temperature <= 0:
                    pace = self.paces.setdefault((*kind, slot.matcher is not None, 1), Pace())
                    slot.drafter = Drafter(pace, phrasebook, request.schema, slot.matcher)
                logits = batch.admit(request.row)
                token = self._choose(mx.argmax(logits, axis=-1).astype(mx.int32), logits, [slot], sampling)
                slots.append(slot)
                tokens = token if tokens is None else mx.concatenate([tokens, token])
                read_at = None
            mx.async_eval(tokens)  # apart from the next step: what is started with one is read only after its end
            pace = self._pace(batch, slots, kind)
            drafter = slots[0].drafter if pace and len(slots) == 1 else None
            watching = drafter and pace.resting and drafter.watching
            verifies = pace and (drafter.foresees(slots[0].tokens) if watching else not pace.resting)
            chain, following, launched = [tokens], None, None
            # launched before the tokens are read, so that the accelerator never waits for Python
            if not verifies and any(slot.matcher for slot in slots):
                launched = self._step(batch, slots, tokens, sampling)
                mx.async_eval(launched[1])  # the greedy tokens are not asked for: the grammar chooses
            elif not verifies:
                left = max_tokens - max(len(slot.tokens) for slot in slots)
                for _ in range(1 if watching else max(1, min(batch.ahead, left - 1))):
                    chain.append(self._choose(*self._step(batch, slots, chain[-1], sampling), slots, sampling))
                following = chain.pop()
                mx.async_eval(following)
            alive = list(range(len(slots)))
            for row in [tokens.tolist()] if len(chain) == 1 else mx.stack(chain).tolist():
                for at in list(alive):
                    slot, token = slots[at], row[at]
                    finish = self._take(slot, token, max_tokens)
                    if finish:
                        alive.remove(at)
                    yield slot, [] if finish == "stop" else [token], finish
            kept, now = alive, time.perf_counter()
            if pace and (read_at or not verifies):
                pace.step(len(chain), (now - read_at) / len(chain) if read_at else None)
            read_at = None if verifies else now
            if launched and kept:
                following = self._choose(*launched, slots, sampling)  # among what may follow the tokens just read
            elif verifies and kept:
                slots, tokens = _keep(kept, slots, tokens, batch)
                following, gains = self._drafted(batch, slots, pace, max_tokens)
                for slot, (gained, finish) in zip(slots, gains, strict=True):
                    yield slot, gained, finish
                kept = [at for at, (_, finish) in enumerate(gains) if not finish]
            slots, tokens = _keep(kept, slots, following, batch)

    def _step(self, batch, slots: list[_Slot], tokens: mx.array, sampling: Sampling) -> tuple:
        """Run the newest token of every row; return the greedy ones after them, int32 [B], and logits [B, V] (None
        where nobody wants them), not yet computed."""
        wanted = sampling.temperature > 0 or any(slot.matcher or slot.request.watched for slot in slots)
        for slot in slots:
            slot.position += 1
            slot.passes += 1
        return batch.step(tokens, wanted)

    def _pace(self, batch, slots: list[_Slot], kind: tuple[bool, bool]) -> Pace | None:
        """Return how fast these rows get on together; None where nothing can be drafted for them.

        Without a phrasebook a batch hardly gains (docs/benchmarks.md), so it does not try.
        """
        bound = any(slot.matcher for slot in slots)
        if batch.longest_draft(len(slots)) < 2 or not all(slot.drafter for slot in slots):
            return None
        if len(slots) > 1 and (bound or not kind[1]):
            return None
        return self.paces.setdefault((*kind, bound, len(slots)), Pace())

    def _drafted(
        self, batch, slots: list[_Slot], pace: Pace, max_tokens: int
    ) -> tuple[mx.array | None, list[tuple[list[int], str | None]]]:
        """Verify a guess of what follows each row's newest token; return the tokens after them, int32 [B] (for the loop
        to take), and of each row the tokens that held and why it ends, None while it goes on."""
        started = time.perf_counter()
        longest = min(batch.longest_draft(len(slots)), max_tokens - max(len(slot.tokens) for slot in slots)) - 1
        guesses = [slot.drafter.guess(slot.tokens, longest) for slot in slots]
        chances = np.zeros((len(slots), longest))
        for row, (_, known) in zip(chances, guesses, strict=True):
            row[: len(known)] = known
        length = pace.length(list(chances.mean(axis=0)))
        drafts = [draft[:length] for draft, _ in guesses]
        matcher = slots[0].matcher  # of the only row, if any
        if matcher:
            drafts[0] = drafts[0][: matcher.legal(drafts[0])]
        length = max(map(len, drafts))
        verified = time.perf_counter()
        found, logits = self._verify(batch, slots, drafts)
        pace.note(length + 1, time.perf_counter() - verified)
        held = [
            next((at for at, token in enumerate(draft) if token != tokens[at]), len(draft))
            for draft, tokens in zip(drafts, found, strict=True)
        ]
        if min(held) < length:
            batch.take_back([length - count for count in held])
        gains = []
        for at, (slot, draft, count) in enumerate(zip(slots, drafts, held, strict=True)):
            slot.drafter.note(len(draft), count)
            slot.passes += 1
            slot.position += count + 1
            if slot.request.watched:
                slot.seen.append(_log_probabilities(logits[at, : count + 1], slot.request.watched))
            gained, finish = [], None
            for token in draft[:count]:
                finish = self._take(slot, token, max_tokens)
                if finish != "stop":
                    gained.append(token)
                if finish:
                    break
            gains.append((gained, finish))
        pace.judge(1 + sum(len(gained) for gained, _ in gains) / len(slots), time.perf_counter() - started)
        return mx.array([tokens[count] for tokens, count in zip(found, held, strict=True)], mx.int32), gains

    def _verify(self, batch, slots: list[_Slot], drafts: list[list[int]]) -> tuple[list[list[int]], mx.array | None]:
        """Run each row's newest token and its draft; return what greedily follows each of them, and logits [B, L, V]
        (None where nobody wants them)."""
        length, matcher = max(map(len, drafts)), slots[0].matcher
        runs = [
            [slot.tokens[-1], *draft, *[0] * (length - len(draft))] for slot, draft in zip(slots, drafts, strict=True)
        ]
        best, logits = batch.verify(runs, any(slot.matcher or slot.request.watched for slot in slots))
        if matcher:
            mx.async_eval(logits)
            best = mx.argmax(self._among(self._masks(matcher, drafts[0]), logits[0]), axis=-1)[None]
        return best.tolist(), logits

    def _masks(self, matcher: Matcher, draft: list[int]) -> list[np.ndarray]:
        """Return which tokens may stand at each place of a draft, which may follow, and after it."""
        masks = [matcher.allowed(self.vocabulary)]
        for token in draft:
            matcher.consume(token)
            masks.append(matcher.allowed(self.vocabulary))
        matcher.back(len(draft))
        return masks

    def _among(self, masks: list[np.ndarray], logits: mx.array) -> mx.array:
        """Return logits [n, V] with -inf where a mask of `Matcher.allowed`, one a row, has no bit."""
        width = logits.shape[-1]
        allowed = (mx.array(np.stack(masks))[:, :, None] & self._bits) != 0
        allowed = allowed.reshape(len(masks), -1)[:, :width]
        return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))

    def _take(self, slot: _Slot, token: int, max_tokens: int) -> str | None:
        """Add a token to a row; return why the row ends, None while it goes on."""
        finish = None
        if token in self.stop:
            finish = "stop"
        else:
            slot.tokens.append(token)
            if slot.matcher:
                slot.matcher.consume(token)
            is_last = len(slot.tokens) >= max_tokens
            if (is_last or len(slot.tokens) % LOOP_CHECK == 0) and repeated_tail(slot.tokens):
                finish = "loop"
            elif is_last:
                finish = "length"
        if finish and slot.drafter:
            slot.drafter.pace.count(len(slot.tokens), slot.passes)
        return finish

    def _choose(self, best: mx.array, logits: mx.array, slots: list[_Slot], sampling: Sampling) -> mx.array:
        """Return the next token of each row, int32 [B]; ``best``: the greedy ones, of logits [B, V]."""
        if any(slot.matcher for slot in slots):
            width = logits.shape[-1]
            free = np.full(-(-width // 32), -1, np.int32).view(np.uint32)
            masks = [slot.matcher.allowed(width) if slot.matcher else free for slot in slots]
            logits = self._among(masks, logits)
            best = mx.argmax(logits, axis=-1).astype(mx.int32)
        for at, slot in enumerate(slots):
            if slot.request.watched:
                slot.seen.append(_log_probabilities(logits[at : at + 1], slot.request.watched))
        if sampling.temperature <= 0:
            return best
        keys = [mx.random.key(_stream_seed(slot, sampling.seed)) for slot in slots]
        noise = [mx.random.gumbel(logits.shape[-1:], key=key) for key in keys]
        # Gumbel's trick: argmax of logits / T + noise is a draw from softmax(logits / T)
        return mx.argmax(logits.astype(mx.float32) / sampling.temperature + mx.stack(noise), axis=-1).astype(mx.int32)

    # -- the model and its adapters -----------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        return self.base.model.language_model.args.vocab_size

    def _batch(self, adapter, rows: int) -> Batch | KernelBatch:
        layers, _, lora = self._prepared(adapter)
        if self.kernel is None or lora is None or rows > self.kernel.longest(lora[1]):
            return Batch(self.model, layers)
        return KernelBatch(self.kernel, layers, lora, rows)

    def _prepared(self, adapter) -> tuple[list[dict], str, tuple | None]:
        """Return an adapter's layers, how its update is applied, and (matrices, rank) for the kernel if it can."""
        if adapter is None:
            return self.model.plain, "base", (None, 0)
        held = self._ready.get(id(adapter))
        if held is None or held[0]() is not adapter:
            update, key = update_of(adapter), id(adapter)
            changed, copies = self.model.changed(update), self.model.copies(update, room())
            forget = weakref.ref(adapter, lambda _: self._ready.pop(key, None))
            lora = (None, 0)
            if self.kernel and copies != changed:
                rank = self.kernel.rank_of(update)
                lora = (self.kernel.packed(update, rank), rank) if rank else None
                copies = frozenset() if rank else copies  # the kernel adds the whole update by itself
            way = f"merged in {len(copies)} of {len(changed)} matrices" if copies else "beside"
            held = forget, (self.model.layers(update, copies), "merged" if copies == changed else way, lora)
            self._ready[key] = held
        return held[1]


def _log_probabilities(logits: mx.array, ids: tuple[int, ...]) -> mx.array:
    """Return [n, ids] of logits [n, V]."""
    logits = logits.astype(mx.float32)
    found = logits[:, mx.array(ids)] - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.async_eval(found)  # so that the logits need not be kept
    return found


def _keep(kept: list[int], slots: list[_Slot], tokens: mx.array | None, batch) -> tuple[list[_Slot], mx.array | None]:
    if len(kept) == len(slots):
        return slots, tokens
    batch.keep(kept)
    return [slots[at] for at in kept], tokens[mx.array(kept)] if kept else None


def _stream_seed(slot: _Slot, seed: int) -> int:
    name = f"{seed} {slot.request.key} {slot.request.sample} {slot.position}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])

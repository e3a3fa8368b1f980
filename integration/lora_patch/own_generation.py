"""Answer the service's greedy requests with this package's own generation, and leave the others to mlx-vlm.

A request is known when it is mlx_vlm.generate or stream_generate of the served Qwen3-VL with temperature 0, one user
message and its photographs. Everything else falls back: each reason is logged once and counted in /health.
"""

import contextlib
import dataclasses
import inspect
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .adapters import Adapter
from .calls import Call
from .errors import LoraError, one_line
from .flags import flags
from .log import say
from .prompts import demands_html, read_specification
from .streams import Worker
from .switching import within

SENTINEL = "\ufdd0"  # a character that no text may hold (Unicode 23.7): where a template puts the prompt
WITHOUT_EFFECT = ("top_p", "top_k", "min_p", "seed", "prefill_step_size", "verbose")  # on one greedy answer
NEUTRAL = {"repetition_penalty": (None, 1.0), "audio": (None,), "video": (None,), "max_kv_size": (None,)}
DEFAULT_MAX_TOKENS = 256  # mlx-vlm's own


class Unknown(Exception):
    """A request that this package's generation does not know; the message says why in one line."""


@dataclass
class Wanted:
    """A request as it is understood."""

    text: str  # of the user, without the chat template
    photos: list  # as they stand among the arguments: paths, pictures, bytes
    max_tokens: int


class OwnGeneration:
    """The engine over the model that the service has loaded. ``lock``: one generation at a time, also by mlx-vlm."""

    def __init__(self):
        self.lock = threading.Lock()  # mlx-vlm keeps state in the model, and the engine answers one by one
        # MLX's streams, and what was compiled for them, belong to a thread: all of the engine's work is done in one
        self.thread = Worker()
        self.engine = self.base = None  # an engine.Engine, a vlm.Base
        self.reason: str | None = "the model is not loaded yet"  # why it serves nothing
        self.ways: dict[str, str] = {}  # digest of each adapter that it can serve -> how its update is applied
        self.answered, self.fallbacks = 0, Counter()
        self._templates: dict[int, tuple[str, str]] = {}  # photographs -> what stands before and after the text
        self._grammars: dict[object, object] = {}  # by prompt, and by what it asks for

    def adopt(self, model, processor, name: str | None) -> None:
        """Take over the model that the service has loaded."""
        self.engine = self.base = None
        self.ways.clear()
        self._templates.clear()
        self._grammars.clear()
        try:
            from mlx_vlm.generate import GenerationResult, wired_limit  # noqa: F401 - asked for here, used in `_pieces`
            from mlx_vlm.tokenizer_utils import make_streaming_detokenizer  # noqa: F401

            from .engine import Engine, supports
            from .vlm import Base

            self.reason = supports(model)
            if self.reason is None:
                self.base = Base(model, processor, model.config, Path(name or "."), str(name))
                self.engine = self.thread.submit(Engine, self.base).result()
                self.thread.submit(self._warm_up, None).result()
        except Exception as error:  # whatever another mlx-vlm version does otherwise: its own generation serves then
            self.reason = f"this mlx-vlm is not known: {one_line(error)}"
        if self.reason is not None:
            self._say(self.reason)

    def prepare(self, adapter: Adapter) -> None:
        """Make an adapter ready for the served model, so that a request finds it so.

        Takes the lock, unless the service loads its model within a generation and so holds it already.
        """
        if self.engine is None:
            return
        try:
            with contextlib.nullcontext() if within.get() else self.lock:
                self.ways[adapter.digest] = self.thread.submit(self._made_ready, adapter).result()
        except (LoraError, ValueError, KeyError) as error:  # on modules besides the language model's projections
            self._say(f"{adapter.path}: {one_line(error)}")

    def _made_ready(self, adapter: Adapter) -> str:
        self._warm_up(adapter)
        return self.engine.way(adapter)

    def _warm_up(self, adapter: Adapter | None) -> None:
        """Have the GPU's kernels compiled now, so that the first request does not wait for that."""
        if self.engine.kernel_refusal is not None:
            return
        from PIL import Image

        from . import vlm

        encoded = vlm.encode(self.base, "A photograph.", [Image.new("RGB", (256, 256))])
        seconds = self.engine.warm_up(vlm.prepare_row(self.base, encoded), adapter, flags.constrained)
        what = f"not compiled: {failed}" if (failed := self.engine.kernel_refusal) else f"compiled in {seconds:.1f} s"
        say(logging.INFO, f"the GPU's kernel for {adapter.version if adapter else 'the base'} is {what}")

    def understand(self, call: Call, adapter: Adapter | None) -> Wanted:
        """Return what a call asks for; Unknown when it is another's to answer."""
        if self.reason is not None:
            raise Unknown(self.reason)
        if adapter is not None and adapter.digest not in self.ways:
            raise Unknown(f"{adapter.path}: an adapter that the engine cannot apply")
        function = inspect.unwrap(call.function)
        if not call.is_of_mlx_vlm:
            raise Unknown(f"{function.__name__} is a function of the service's")
        given = inspect.signature(function).bind(*call.args, **call.kwargs).arguments
        given |= given.pop("kwargs", {})
        if given.pop("model") is not self.base.model or given.pop("processor") is None:
            raise Unknown("another model than the one that was loaded last")
        if given.get("temperature") != 0:
            raise Unknown("sampling (a temperature other than 0)")
        known = {"prompt", "image", "max_tokens", "temperature", *WITHOUT_EFFECT}
        for name in sorted(given.keys() - known):
            if name not in NEUTRAL or given[name] not in NEUTRAL[name]:
                raise Unknown(f"the argument {name}")
        photos = given.get("image")
        photos = list(photos) if isinstance(photos, list | tuple) else [] if photos is None else [photos]
        _, text, _ = self.parts(given["prompt"], len(photos))
        return Wanted(text, photos, int(given.get("max_tokens") or DEFAULT_MAX_TOKENS))

    def parts(self, prompt: str, photos: int) -> tuple[str, str, str]:
        """Split a formatted prompt into the template's head, the user's text, and the template's tail."""
        if photos not in self._templates:
            from mlx_vlm.prompt_utils import apply_chat_template

            whole = apply_chat_template(self.base.processor, self.base.config, SENTINEL, num_images=photos)
            head, _, tail = whole.partition(SENTINEL)
            self._templates[photos] = head, tail
        head, tail = self._templates[photos]
        if not isinstance(prompt, str) or len(prompt) < len(head + tail):
            raise Unknown("a prompt without the chat template")
        if not (prompt.startswith(head) and prompt.endswith(tail)):
            raise Unknown("a prompt that is not one user message in the chat template")
        return head, prompt[len(head) : len(prompt) - len(tail)], tail

    def pieces(self, wanted: Wanted, adapter: Adapter | None, bound: bool) -> Iterator:
        """Yield what `_pieces` yields, which is made in the engine's thread; closing it ends the answer."""
        pieces, left = queue.SimpleQueue(), threading.Event()

        def work():
            try:
                for piece in self._pieces(wanted, adapter, bound):
                    pieces.put(piece)
                    if left.is_set():
                        return
            finally:
                pieces.put(None)

        done = self.thread.submit(work)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            left.set()
            done.result()

    def _pieces(self, wanted: Wanted, adapter: Adapter | None, bound: bool) -> Iterator:
        """Yield mlx-vlm's results for a request, as its stream_generate does: a token each, and a last one.

        ``bound``: with --constrained the answer keeps to the grammar; else the grammar serves drafting alone.
        """
        import mlx.core as mx
        from mlx_vlm.generate import GenerationResult, wired_limit
        from mlx_vlm.tokenizer_utils import make_streaming_detokenizer

        from .engine import Request

        started = time.perf_counter()
        row = self._row(wanted)
        detokenizer, tokens, count = make_streaming_detokenizer(self.base.processor), [], len(row)
        begun = None
        fields = {field.name for field in dataclasses.fields(GenerationResult)}

        def result(text: str, finish: str | None):
            seconds = time.perf_counter() - begun
            made = {
                "text": text,
                "token": tokens[-1] if tokens else None,
                "prompt_tokens": count,
                "generation_tokens": len(tokens),
                "total_tokens": count + len(tokens),
                "prompt_tps": count / max(begun - started, 1e-9),
                "generation_tps": len(tokens) / max(seconds, 1e-9),
                "peak_memory": mx.get_peak_memory() / 1e9,
                "finish_reason": finish,
                "token_ids": list(tokens) if finish else None,
            }
            return GenerationResult(**{name: value for name, value in made.items() if name in fields})

        grammar = self.grammar(wanted.text)
        request = Request(row, "", grammar=grammar if bound and flags.constrained else None, schema=grammar)
        with wired_limit(self.base.model):  # on a Mac, so that the weights are not paged out meanwhile
            for token in self.engine.stream(request, wanted.max_tokens, adapter):
                if self.thread.closing:
                    break
                begun = begun or time.perf_counter()
                tokens.append(token)
                detokenizer.add_token(token)
                yield result(detokenizer.last_segment, None)
        begun = begun or time.perf_counter()
        detokenizer.finalize()
        self.answered += 1
        yield result(detokenizer.last_segment, "length" if len(tokens) >= wanted.max_tokens else "stop")

    def whole(self, wanted: Wanted, adapter: Adapter | None, bound: bool):
        """Return mlx-vlm's result for a request, as its generate does."""
        pieces = self.thread.submit(lambda: list(self._pieces(wanted, adapter, bound))).result()
        pieces[-1].text = "".join(piece.text for piece in pieces)
        return pieces[-1]

    def grammar(self, text: str):
        """Return the grammar of the analysis that a prompt asks for, None where it asks for none that can be read."""
        if text in self._grammars:
            return self._grammars[text]
        found = None
        try:
            asked = None if demands_html(text) else read_specification(text)
            if asked and asked not in self._grammars:
                from .grammar import Grammar, answer_schema

                self._grammars[asked] = Grammar(self.base, answer_schema(asked))
            found = self._grammars.get(asked)
        except LoraError as error:
            if flags.constrained:
                say(logging.INFO, f"not constrained: {one_line(error)}")
        except ImportError as error:  # llguidance comes with mlx-vlm
            say(logging.WARNING, f"neither constrained nor drafted by its schema: {one_line(error)}")
        if len(self._grammars) > 500:  # prompts with text of the request in them are all different
            self._grammars.clear()
        self._grammars[text] = found
        return found

    def leave_to_mlx_vlm(self, call: Call, reason: str, detail: str = "") -> None:
        """Count a fallback, and break up names of special tokens in the user's text: mlx-vlm takes them for tokens.

        This package's own generation encodes them as text. ``detail`` is logged and not counted: it may name a file.
        """
        self._say(reason, detail)
        self.fallbacks[reason] += 1
        if self.base is None or not isinstance(call.prompt, str):
            return
        from . import vlm

        try:
            head, text, tail = self.parts(call.prompt, len(call.photos()))
        except Unknown:
            return
        plain = text
        for name in vlm.special_tokens(self.base):
            plain = plain.replace(name, name.replace("<|", "< |", 1))
        if plain != text:
            call.use_prompt(head + plain + tail)

    def health(self) -> dict:
        """Return what /health says of it."""
        return {
            "generation": {
                "in_use": self.reason is None,
                "reason": self.reason,
                "kernel": self.engine and (self.engine.kernel_refusal or "in use"),
                "tokens_a_pass": self.engine.tokens_a_pass() if self.engine else {},
                "answered": self.answered,
                "by_mlx_vlm": dict(self.fallbacks),
                "constrained": flags.constrained,
            }
        }

    def _row(self, wanted: Wanted):
        from mlx_vlm.utils import load_image

        from . import vlm

        photos = [load_image(photo) for photo in wanted.photos]
        return vlm.prepare_row(self.base, vlm.encode(self.base, wanted.text, photos))

    def _say(self, reason: str, detail: str = "") -> None:
        if reason not in self.fallbacks:
            say(logging.INFO, f"answered by mlx-vlm's own generation: {reason}{detail and f': {detail}'}")
            self.fallbacks[reason] += 0

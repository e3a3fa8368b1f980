"""Answer the service's greedy requests with this package's own generation, and leave the others to mlx-vlm.

A request is known when it is mlx_vlm.generate or stream_generate of the served Qwen3-VL with temperature 0, one user
message and its photographs. Everything else falls back: each reason is logged once and counted in /health.
"""

import dataclasses
import importlib
import inspect
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .adapters import Adapter, as_uniform
from .calls import Call
from .errors import LoraError, one_line
from .flags import flags
from .log import say
from .prompts import demands_html, read_specification

SENTINEL = "\ufdd0"  # a character that no text may hold (Unicode 23.7): where a template puts the prompt
WITHOUT_EFFECT = ("top_p", "top_k", "min_p", "seed", "prefill_step_size", "verbose")  # on one greedy answer
NEUTRAL = {"repetition_penalty": (None, 1.0), "audio": (None,), "video": (None,), "max_kv_size": (None,)}
DEFAULT_MAX_TOKENS = 256  # mlx-vlm's own


def _decoding():
    """Import generation.py without its taking the place of the function `lora_patch.generation`."""
    module = importlib.import_module(f"{__package__}.generation")
    vars(sys.modules[__package__]).pop("generation", None)
    return module


class Unknown(Exception):
    """A request that this package's generation does not know; the message says why in one line."""


@dataclass
class Wanted:
    """A request as it is understood."""

    text: str  # of the user, without the chat template
    photos: list  # as they stand among the arguments: paths, pictures, bytes
    max_tokens: int


class OwnGeneration:
    """One model of the service's, and the adapters prepared for it. One thread at a time may generate."""

    def __init__(self):
        self.base = None  # a vlm.Base
        self.reason: str | None = "the model is not loaded yet"  # why it serves nothing
        self.prepared: dict[str, object] = {}  # digest -> vlm.Adapter
        self.answered, self.fallbacks = 0, Counter()
        self.placing = threading.Lock()  # while an adapter's modules stand in the model
        self._templates: dict[int, tuple[str, str]] = {}  # photographs -> what stands before and after the text
        self._grammars: dict[tuple, object] = {}

    def adopt(self, model, processor, name: str | None) -> None:
        """Take over the model that the service has loaded."""
        self.base, self.prepared = None, {}
        self._templates.clear()
        self._grammars.clear()
        try:
            from . import vlm

            if getattr(getattr(model, "config", None), "model_type", None) != "qwen3_vl":
                raise Unknown(f"a model of type {getattr(getattr(model, 'config', None), 'model_type', None)}")
            self.base = vlm.Base(model, processor, model.config, Path(name or "."), str(name))
            vlm.decoder(model)  # its parts are where this package looks for them
            self.reason = None
        except Exception as error:  # whatever another mlx-vlm version does otherwise: its own generation serves then
            self.base, self.reason = None, one_line(error)
            self._say(self.reason)

    def prepare(self, adapter: Adapter) -> None:
        """Make an adapter ready for the served model, so that a request finds it so."""
        if self.base is None or adapter.digest in self.prepared:
            return
        from . import vlm

        try:
            tensors, rank, scale = as_uniform(adapter.layers)
            self.prepared[adapter.digest] = vlm.build_adapter(self.base, tensors, rank, scale * rank)
        except LoraError as error:  # on modules besides the projections of the language model
            self._say(one_line(error))

    def understand(self, call: Call, adapter: Adapter | None) -> Wanted:
        """Return what a call asks for; Unknown when it is another's to answer."""
        if self.reason is not None:
            raise Unknown(self.reason)
        if adapter is not None and adapter.digest not in self.prepared:
            raise Unknown(f"{adapter.path} is on modules besides the language model's projections")
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

    def pieces(self, wanted: Wanted, adapter: Adapter | None, grammar) -> Iterator:
        """Yield mlx-vlm's results for a request, as its stream_generate does: a token each, and a last one."""
        import mlx.core as mx
        from mlx_vlm.generate import GenerationResult
        from mlx_vlm.tokenizer_utils import make_streaming_detokenizer

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

        for token in self._tokens(row, wanted.max_tokens, adapter, grammar):
            begun = begun or time.perf_counter()
            tokens.append(token)
            detokenizer.add_token(token)
            yield result(detokenizer.last_segment, None)
        begun = begun or time.perf_counter()
        detokenizer.finalize()
        self.answered += 1
        yield result(detokenizer.last_segment, "length" if len(tokens) >= wanted.max_tokens else "stop")

    def whole(self, wanted: Wanted, adapter: Adapter | None, grammar):
        """Return mlx-vlm's result for a request, as its generate does."""
        pieces = list(self.pieces(wanted, adapter, grammar))
        pieces[-1].text = "".join(piece.text for piece in pieces)
        return pieces[-1]

    def grammar(self, text: str):
        """Return the grammar of the analysis that a prompt asks for, None without --constrained or if there is none."""
        if not flags.constrained or self.base is None or demands_html(text):
            return None
        try:
            dimensions = tuple(read_specification(text).dimensions)
        except LoraError as error:
            self._say(f"not constrained: {one_line(error)}")
            return None
        if dimensions not in self._grammars:
            decoding = _decoding()
            self._grammars[dimensions] = decoding.Grammar(self.base, decoding.answer_schema(dimensions))
        return self._grammars[dimensions]

    def leave_to_mlx_vlm(self, call: Call, reason: str) -> None:
        """Count a fallback, and break up names of special tokens in the user's text: mlx-vlm takes them for tokens.

        This package's own generation encodes them as text.
        """
        self._say(reason)
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

    def _tokens(self, row, max_tokens: int, adapter: Adapter | None, grammar) -> Iterator[int]:
        from . import vlm

        decoding = _decoding()
        with self.placing:
            vlm.use_adapter(self.base, self.prepared[adapter.digest] if adapter else None)
            try:
                yield from decoding.Decoding(self.base).stream(decoding.Request(row, "", grammar=grammar), max_tokens)
            finally:
                vlm.use_adapter(self.base, None)

    def _say(self, reason: str) -> None:
        if reason not in self.fallbacks:
            say(logging.INFO, f"answered by mlx-vlm's own generation: {reason}")
            self.fallbacks[reason] += 0

"""The raw outputs of a comparison, made by the model: one base in memory, the adapters switched over it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from common.errors import UserError
from common.evaluation.expected_scores import DIGITS, expected_scores
from common.evaluation.generations import Item
from common.model.step import collate, loss_only
from integration.lora_patch import engine, vlm
from integration.lora_patch.adapters import as_uniform, read_adapter
from integration.lora_patch.engine import Answer, Engine, Request, prompt_row
from integration.lora_patch.errors import LoraError
from integration.lora_patch.grammar import Grammar, answer_schema
from integration.lora_patch.photo import load_photo
from integration.lora_patch.phrasebook import PHRASEBOOK, read_phrasebook
from integration.lora_patch.sources import adapter_in

GRAMMAR = "+grammar"  # an arm of this ending decodes under the JSON grammar
WARM_UP = 8  # tokens generated before anything is timed: kernels are compiled in the first


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded, and how photographs are prepared for that."""

    max_tokens: int
    batch_size: int = 8
    temperature: float = 0.0
    seed: int = 0
    max_image_size: int = 1024


class ModelSource:
    """The base, the candidate and, if there is one, the deployed adapter; see `generations.OutputSource`."""

    def __init__(self, base: vlm.Base, adapters: dict[str, Path], sampling: Decoding, constrained: bool, facts: dict):
        """``adapters``: folder by arm ("candidate", ...); ``facts``: what identifies base and software, for the log."""
        self.base, self.sampling, self.facts = base, sampling, facts
        self.load_seconds: dict[str, float] = {}
        self.adapters: dict[str, vlm.LoraModules | None] = {"base": None}
        self.hashes: dict[str, object] = facts["adapters"]
        for arm, folder in adapters.items():
            self.adapters[arm] = self._load(arm, folder)
        self.engine = Engine(base)
        ids = base.processor.tokenizer.convert_tokens_to_ids(list(DIGITS))
        self._digits = tuple(ids) if len(set(ids)) == len(DIGITS) else ()  # a tokenizer without single digits
        free = list(self.adapters)
        self.arms = free + ([arm + GRAMMAR for arm in free if arm != "deployed"] if constrained else [])
        self._rows: dict[str, vlm.Row] = {}
        self._warm: set[str] = set()  # arms whose kernels are compiled
        self._timed = 0  # photographs timed so far
        self._grammars: dict[tuple[str, ...], Grammar] = {}

    def _load(self, arm: str, folder: Path) -> vlm.LoraModules:
        start = time.perf_counter()
        try:
            layers = read_adapter(adapter_in(folder)).layers
        except LoraError as error:  # the service has an option for what an old file does not tell; here it is converted
            asked, convert = "say which with", "convert it first with python -m common.release.adapter convert"
            raise UserError(str(error).replace(asked, convert)) from error
        tensors, rank, scale = as_uniform(layers)
        adapter = vlm.build_adapter(self.base, _evened(self.base, tensors, rank), rank, scale * rank)
        adapter.phrasebook = read_phrasebook(folder / PHRASEBOOK)
        self.load_seconds[arm] = time.perf_counter() - start
        return adapter

    def settings(self, arm: str) -> dict:
        return {
            "arm": arm.removesuffix(GRAMMAR),
            "grammar": arm.endswith(GRAMMAR),
            "base": self.facts["base"],
            "adapter": self.hashes.get(arm.removesuffix(GRAMMAR)),
            "software": self.facts["software"],
            "device": self.facts["device"],
            **vars(self.sampling),
        }

    def outputs(self, arm: str, items: list[Item], samples: int) -> Iterator[dict]:
        by_key, how = {item.key: item for item in items}, self.sampling
        bound = arm.endswith(GRAMMAR)
        watched = self._digits if how.temperature <= 0 and not bound else ()
        requests = [
            Request(prompt_row(self._row(item)), item.key, sample, self._schema(item) if bound else None, watched)
            for item in items
            for sample in range(samples)
        ]
        sampling = engine.Sampling(how.temperature, how.seed)
        answers = self.engine.generate(requests, how.batch_size, how.max_tokens, sampling, self._adapter(arm))
        for answer in answers:
            yield {
                "kind": "output",
                "arm": arm,
                "example": by_key[answer.key].index,
                "sample": answer.sample,
                "text": self.engine.text(answer.tokens),
                "finish": answer.finish,
                "tokens": len(answer.tokens),
                **self._expected(answer, by_key[answer.key]),
            }

    def _expected(self, answer: Answer, item: Item) -> dict:
        low, high = item.specification.score_range
        if answer.watched is None or low < 1 or high != 10:  # made for scores from 1 to 10
            return {}
        pieces = [self.engine.text([token]) for token in answer.tokens]
        found = expected_scores(self.engine.text(answer.tokens), pieces, answer.watched)
        return {"expected_scores": found} if found else {}

    def losses(self, arm: str, items: list[Item]) -> Iterator[dict]:
        if arm.endswith(GRAMMAR):
            return  # a grammar changes what is generated, not what the model thinks of the reference
        vlm.use_adapter(self.base, self._adapter(arm))
        for item in items:
            total, tokens = loss_only(self.base.model, collate(self.base.model, [self._row(item)]))
            value = float(total)
            # a model broken by its adapter has no loss: null in the report, and every gate on it fails
            value = value if abs(value) < float("inf") else None
            yield {"kind": "loss", "arm": arm, "example": item.index, "sum": value, "tokens": int(tokens)}

    def timings(self, items: list[Item]) -> Iterator[dict]:
        """Time whole requests one at a time, as the service serves them: photograph file to last token.

        An arm under the grammar carries a free run of the same adapter ("free"), to which its cost is compared.
        """
        for item in items:
            # each photograph begins with another arm, so that none has the warmer machine
            first, self._timed = self._timed % len(self.arms), self._timed + 1
            order = self.arms[first:] + self.arms[:first]
            for arm in order:
                if arm not in self._warm:
                    self._time(arm, item, WARM_UP)
                    self._warm.add(arm)
                yield {"kind": "timing", "arm": arm, "example": item.index, **self._time(arm, item)}

    def _time(self, arm: str, item: Item, max_tokens: int | None = None) -> dict:
        self._schema(item)  # compiled before the clock starts, as the service has it from its first request
        free = self._measured(self._stream(arm, item, False, max_tokens))
        if not arm.endswith(GRAMMAR):
            return free
        return self._measured(self._stream(arm, item, True, max_tokens)) | {"free": free}

    def _measured(self, tokens: Iterator[int]) -> dict:
        mx.synchronize()
        mx.reset_peak_memory()
        start, first, found = time.perf_counter(), None, []
        for token in tokens:
            found.append(token)
            first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "first_token_seconds": first or seconds,
            "tokens": len(found),
            "peak_bytes": mx.get_peak_memory(),
            "text": self.engine.text(found),
        }

    def _stream(self, arm: str, item: Item, bound: bool, max_tokens: int | None) -> Iterator[int]:
        encoded, schema = vlm.encode(self.base, item.example.prompt, self._photos(item)), self._schema(item)
        row = vlm.prepare_row(self.base, encoded)
        # the service drafts by the schema of the answer, whether it is bound to it or not
        request = Request(row, item.key, grammar=schema if bound else None, schema=schema)
        yield from self.engine.stream(request, max_tokens or self.sampling.max_tokens, self._adapter(arm))

    def _adapter(self, arm: str) -> vlm.LoraModules | None:
        return self.adapters[arm.removesuffix(GRAMMAR)]

    def _row(self, item: Item) -> vlm.Row:
        """Return an example's features, computed once and shared by all arms while its part of the work lasts."""
        if item.key not in self._rows:
            example = item.example
            encoded = vlm.encode(self.base, example.prompt, self._photos(item), example.response, example.masked_spans)
            self._rows[item.key] = vlm.prepare_row(self.base, encoded)
        return self._rows[item.key]

    def release(self) -> None:
        """Forget the features of the photographs that are done with."""
        self._rows.clear()
        mx.clear_cache()  # on Metal freed buffers stay with MLX and out of the system's reach

    def _photos(self, item: Item) -> list:
        return [load_photo(path, self.sampling.max_image_size) for path in item.example.image_paths]

    def _schema(self, item: Item) -> Grammar:
        """Return the grammar of the answer that an example's prompt asks for."""
        asked = item.specification
        if asked not in self._grammars:
            self._grammars[asked] = Grammar(self.base, answer_schema(asked))
        return self._grammars[asked]


def _evened(base: vlm.Base, tensors: dict[str, mx.array], rank: int) -> dict[str, mx.array]:
    """Return an adapter's tensors with updates of zero where some layers lack a projection that others have.

    The compiled layers take every layer alike; a product with zeros changes no number.
    """
    projections = {name.split(".layers.")[-1].split(".", 1)[-1] for name in tensors}
    projections = {name.rpartition(".")[0] for name in projections}
    evened = dict(tensors)
    for module, linear in vlm.plain_modules(base.model).items():
        if module.split(".layers.")[-1].split(".", 1)[-1] in projections and f"{module}.lora_a" not in tensors:
            inputs, outputs = vlm.linear_size(linear)
            evened |= {f"{module}.lora_a": mx.zeros((inputs, rank)), f"{module}.lora_b": mx.zeros((rank, outputs))}
    return evened

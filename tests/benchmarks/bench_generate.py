"""Time generation on a model of random weights: mlx-vlm's, torch's compiled step, and this project's engine.

    python tests/benchmarks/bench_generate.py                                   # a tiny shape, any machine
    python tests/benchmarks/bench_generate.py --shape 4b --answers FILE --tokenizer FOLDER    # Qwen3-VL-4B's, a GPU

One table, all rows from one run: tokens/s of all rows while decoding, seconds with vision and prefill divided by the
answers made in them (whole ones for one row, 256 tokens each in a batch), the share of the limit that reading the
weights sets, operations that MLX is given a step, tokens a pass, and the peak of MLX's memory. Random weights accept
no draft, so answers are replayed: everything is computed, and the token taken is the answer's. --answers names a file
with a JSON object a line: "tokens" (ids), or "response" (text) with --tokenizer; "photo" keeps a phrasebook from the
answers about the same photograph. Without it, the sample's answers are cut into words. Constrained rows keep to the
grammar of the answer's dimensions as the service does with --constrained; they need --tokenizer, and answers that the
grammar allows or that can be written in its form. Base and adapter take turns answer by answer. Reads those files,
writes none.
"""

import contextlib
import functools
import io
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_vlm.generate import generate_step
from mlx_vlm.models.qwen3_vl import Model, ModelConfig, TextConfig, VisionConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from common.model.lora import attach_lora, lora_parameters  # noqa: E402
from integration.lora_patch import engine as engines  # noqa: E402
from integration.lora_patch import vlm  # noqa: E402
from integration.lora_patch.engine import Engine, Request  # noqa: E402
from integration.lora_patch.grammar import Grammar, answer_schema  # noqa: E402
from integration.lora_patch.phrasebook import Continuations  # noqa: E402
from integration.lora_patch.specification import PromptSpecification  # noqa: E402
from tests.sample import scenes  # noqa: E402

SHAPES = {
    "tiny": {
        "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096},
        "rope": [6, 5, 5],
        "vision": {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 256,
                   "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "dtype": mx.float32, "grid": (8, 8), "prompt": 96,
    },
    "4b": {
        "text": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        "rope": [24, 20, 20],
        "vision": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
                   "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
        "dtype": mx.bfloat16, "grid": (48, 64), "prompt": 992,
    },
}  # fmt: skip


HEADER = "| | arm | bits | rows | tokens/s | s an answer | of the limit | operations a step | tokens a pass | peak GB |"
# the tiny widths under the vocabulary of the real tokenizer
NARROW = {"num_hidden_layers": 2, "vocab_size": SHAPES["4b"]["text"]["vocab_size"]}
SHAPES["narrow"] = SHAPES["tiny"] | {"text": SHAPES["tiny"]["text"] | NARROW}


@dataclass(frozen=True)
class Way:
    """A row of the table for each arm of the engine."""

    part: str
    name: str
    batched: bool = False
    drafting: bool = False
    bound: bool = False  # under the grammar, as with --constrained


WAYS = (
    Way("single", "engine"),
    Way("drafts", "engine, drafts", drafting=True),
    Way("batch", "engine, batch", batched=True),
    Way("batch", "engine, batch, drafts", batched=True, drafting=True),
    Way("constrained", "engine, constrained", bound=True),
    Way("constrained", "engine, constrained, drafts", drafting=True, bound=True),
    Way("constrained", "engine, batch, constrained", batched=True, bound=True),
)
PARTS = ("peers", *dict.fromkeys(way.part for way in WAYS))
COMPARED = 48  # tokens of mlx-vlm's answers, which take ten times as long


@dataclass
class Bench:
    """What all rows are measured with."""

    base: vlm.Base
    photos: list[vlm.Encoded]
    answers: list[dict]  # as `read_answers` returns them
    parts: tuple[str, ...]
    adapter: object
    bits: int
    limit: float  # seconds in which the weights can be read once
    repeats: int
    rows: list[str]
    peak: dict[str, int]  # bytes, by arm, of the rows that are printed next

    def row(self, way: str, arm: str, batch: int, rate: float, seconds: float, operations="", tokens_a_pass="") -> None:
        share = f"{rate / batch * self.limit:.0%}" if not tokens_a_pass else ""
        cells = [way, arm, self.bits, batch, f"{rate:,.0f}", f"{seconds:.2f}", share, operations, tokens_a_pass]
        self.rows.append("| " + " | ".join(map(str, [*cells, f"{self.peak[arm] / 1e9:.3g}"])) + " |")
        click.echo(self.rows[-1])

    @contextlib.contextmanager
    def measuring(self, arm: str) -> Iterator[None]:
        """Keep the peak memory of what is run here for the arm's row; base and adapter take turns before it."""
        mx.reset_peak_memory()
        yield
        self.peak[arm] = max(self.peak.get(arm, 0), mx.get_peak_memory())


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny", show_default=True)
@click.option(
    "--answers", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSONL, see above"
)
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="folder of the tokenizer for them")
@click.option("--bits", multiple=True, type=click.Choice(["16", "4"]), default=("16", "4"), show_default=True)
@click.option("--batch_size", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="answers a row; the median is printed")
@click.option("--rank", default=16, show_default=True, help="of the adapter, on all seven projections")
@click.option("--parts", multiple=True, type=click.Choice(PARTS), default=PARTS, help="of the table  [default: all]")
def main(shape, file, tokenizer, bits, batch_size, repeats, rank, parts) -> None:
    engines.LOOP_CHECK = 1 << 60
    answers = read_answers(file, tokenizer, SHAPES[shape]["text"]["vocab_size"])
    if "constrained" in parts:
        unlawful = sum(not answer["lawful"] for answer in answers)
        why = "" if tokenizer else ": without --tokenizer there is no grammar"
        click.echo(f"  constrained: {unlawful} of {len(answers)} answers are left out{why}", err=True)
    click.echo(HEADER + "\n|" + " --- |" * 10)
    for width in map(int, bits):
        base = random_base(SHAPES[shape])
        if width == 4:
            nn.quantize(base.model.language_model, 64, 4)
            mx.eval(base.model.parameters())
        photos = [photo(SHAPES[shape], base, number) for number in range(batch_size)]
        adapter = random_adapter(base, rank)
        limit = weight_bytes(base) / bandwidth(SHAPES[shape]["dtype"] == mx.bfloat16)
        bench = Bench(base, photos, answers, parts, adapter, width, limit, repeats, [], {})
        if "peers" in parts:
            guarded(mlx_vlm_rows, bench)
        guarded(engine_rows, bench, batch_size)
        del base, bench, adapter
        mx.clear_cache()
    if "peers" in parts and "16" in bits:
        guarded(torch_rows, SHAPES[shape]["text"], len(photos[0]), max(len(a["tokens"]) for a in answers), limit)
    click.echo(json.dumps({"device": mx.device_info().get("device_name"), "mlx": mx.__version__}))


def guarded(measure, *arguments) -> None:
    """Run a part of the table; a part that fails says so and leaves the others."""
    try:
        measure(*arguments)
    except Exception as error:
        click.echo(f"| {measure.__name__} failed: {type(error).__name__}: {str(error)[:300]} |")


# -- answers ----------------------------------------------------------------------------------------------------------


def read_answers(file: Path | None, tokenizer: Path | None, vocabulary: int) -> list[dict]:
    if file is None:
        rng = random.Random(0)
        found = [{"response": json.dumps(scenes.critique(scenes.random_scene(rng))), "photo": at} for at in range(24)]
    else:
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if tokenizer:
        from transformers import AutoTokenizer

        encode = AutoTokenizer.from_pretrained(tokenizer).encode
    else:
        names: dict[str, int] = {}
        encode = lambda text: [names.setdefault(w, 20 + len(names)) % vocabulary for w in re.findall(r" ?\w+|\W", text)]  # noqa: E731, E501
    answers = []
    for at, row in enumerate(found):
        tokens = row.get("tokens") or encode(row["response"])
        schema, lawful = None, None
        if tokenizer and (names := dimension_names(row.get("response"))):
            schema = grammar_of(names, tokenizer)
            lawful = next(iter(lawful_tokens(schema, tokens, names, row["response"], encode)), None)
        answers.append({"tokens": tokens, "photo": row.get("photo", at), "schema": schema, "lawful": lawful})
    return answers


def dimension_names(response: str | None) -> tuple[str, ...] | None:
    """Return the dimensions of an answer, by which its grammar is known; None without any."""
    try:
        return tuple(part["name"] for part in json.loads(response or "")["dimensions"])
    except (ValueError, KeyError, TypeError):
        return None


def lawful_tokens(schema: Grammar, tokens: list[int], names: tuple[str, ...], response: str, encode) -> Iterator[list]:
    """Yield the tokens of an answer that its grammar allows one by one: as it stands, then in the schema's form."""
    if schema.matcher().follows(tokens):
        yield tokens
    with contextlib.suppress(KeyError, TypeError, ValueError):  # it lacks a part, or has one of another kind
        tokens = encode(PromptSpecification(names).render(json.loads(response)))
        if schema.matcher().follows(tokens):
            yield tokens


@functools.cache
def grammar_of(names: tuple[str, ...], tokenizer: Path) -> Grammar:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tokenizer)
    return Grammar(
        SimpleNamespace(processor=SimpleNamespace(tokenizer=found)), answer_schema(PromptSpecification(names))
    )


class Replay(Engine):
    """An engine that computes everything and takes the tokens of given answers; a request's key is its answer's."""

    def replay(self, answers: list[dict]) -> None:
        self.known = [answer["tokens"] + [0] * 64 for answer in answers]
        self.answers = [mx.array(np.array(tokens, np.int32)) for tokens in self.known]
        mx.eval(self.answers)

    def _place(self, slot) -> int:
        return slot.position - int(slot.request.row.position_ids.max()) - 1  # of the next token in its answer

    def _choose(self, best, logits, slots, sampling):
        best = super()._choose(best, logits, slots, sampling)
        wanted = [self.answers[int(slot.request.key)][self._place(slot) :][:1] for slot in slots]
        return (wanted[0] if len(wanted) == 1 else mx.concatenate(wanted)) + 0 * best

    def _verify(self, batch, slots, drafts):
        found, logits = super()._verify(batch, slots, drafts)
        after = [(self.known[int(slot.request.key)], self._place(slot) + 1) for slot in slots]
        return [known[at : at + len(row)] for row, (known, at) in zip(found, after, strict=True)], logits


# -- the rows ---------------------------------------------------------------------------------------------------------


def engine_rows(bench: Bench, batch_size: int) -> None:
    """Time the engine in each of `WAYS`; base and adapter take turns."""
    engine, arms = Replay(bench.base), {"base": None, "adapter": bench.adapter}
    click.echo(
        f"  engine: {engine.kernel_refusal or 'one kernel a step'}; adapter {engine.way(bench.adapter)}", err=True
    )
    operations = {arm: step_operations(engine, adapter, bench) for arm, adapter in arms.items()}
    for way in WAYS:
        answers, count = bench.answers, bench.repeats
        if way.bound:
            answers = [answer | {"tokens": answer["lawful"]} for answer in answers if answer["lawful"]]
            count = min(2, count)
        if way.part not in bench.parts or not answers:
            continue
        engine.replay(answers)
        chosen = [0, 0] if way.batched else [at * len(answers) // count for at in range(count)]
        found, bench.peak = {arm: [] for arm in arms}, {}
        for turn, at in enumerate([chosen[0], *chosen]):  # the first compiles
            others = [answer["tokens"] for answer in answers if answer["photo"] != answers[at]["photo"]]
            bench.adapter.phrasebook = Continuations(others) if way.drafting else None
            numbers = [number % len(answers) for number in range(batch_size)] if way.batched else [at]
            tokens = (24 if turn == 0 else 256) if way.batched else len(answers[at]["tokens"])
            for arm in list(arms)[:: 1 if turn % 2 else -1]:
                with bench.measuring(arm):
                    result = replayed(engine, bench, answers, numbers, arms[arm], tokens, way)
                if turn:
                    found[arm].append(result)
        for arm, results in found.items():
            rate, seconds, tokens_a_pass = (statistics.median(part) for part in zip(*results, strict=True))
            shown = f"{tokens_a_pass:.2f}" if way.drafting else ""
            steps = "" if way.batched or way.bound else operations[arm]
            bench.row(way.name, arm, len(numbers), rate, seconds, steps, shown)


def replayed(
    engine: Replay, bench: Bench, answers: list[dict], numbers: list[int], adapter, tokens: int, way: Way
) -> tuple[float, float, float]:
    """Return, of the beginnings of some answers, (tokens/s of all rows while decoding, seconds with vision and prefill
    divided by the answers, tokens a row and pass)."""
    mx.synchronize()
    start, requests = time.perf_counter(), []
    for encoded, number in zip(bench.photos, numbers, strict=False):
        schema = answers[number]["schema"]
        row = vlm.prepare_row(bench.base, encoded)
        requests.append(Request(row, str(number), grammar=schema if way.bound else None, schema=schema))
    first, slots = None, {}
    for slot, _, _ in engine._decode(requests, len(requests), tokens, engines.Sampling(), adapter, way.drafting):
        first = first or time.perf_counter()
        slots[id(slot)] = slot
    end, size = time.perf_counter(), len(requests)
    for slot in slots.values():
        assert slot.tokens == answers[int(slot.request.key)]["tokens"][:tokens], "the replay went astray"
    count, passes = (sum(part) for part in zip(*((len(s.tokens), s.passes) for s in slots.values()), strict=True))
    return (count - size) / (end - first), (end - start) / size, count / passes


def step_operations(engine: Engine, adapter, bench: Bench) -> int:
    """Return how many operations MLX is given for one step of one token."""
    batch = engine._batch(adapter, 1)
    batch.admit(vlm.prepare_row(bench.base, bench.photos[0]))
    best, _ = batch.step(mx.array([5], mx.int32), False)
    graph = io.StringIO()
    mx.export_to_dot(graph, best)
    mx.eval(best)
    return len(re.findall("label =", graph.getvalue()))


def mlx_vlm_rows(bench: Bench) -> None:
    """Time mlx-vlm's own generation, the first tokens of an answer."""
    for arm, adapter in (("base", None), ("adapter", bench.adapter)):
        vlm.use_adapter(bench.base, adapter)
        bench.peak = {}
        try:
            list(mlx_vlm_tokens(bench.base, bench.photos[0], 4))
            with bench.measuring(arm):
                start = time.perf_counter()
                times = [time.perf_counter() for _ in mlx_vlm_tokens(bench.base, bench.photos[0], COMPARED)]
        finally:
            vlm.use_adapter(bench.base, None)
        step = (times[-1] - times[8]) / (len(times) - 9)
        whole = times[0] - start + step * statistics.mean(len(answer["tokens"]) for answer in bench.answers)
        bench.row("mlx-vlm", arm, 1, 1 / step, whole)


def mlx_vlm_tokens(base: vlm.Base, encoded: vlm.Encoded, tokens: int) -> Iterator[int]:
    ids, grid = mx.array(encoded.input_ids)[None], mx.array(encoded.image_grid_thw)
    steps = generate_step(
        ids, base.model, mx.array(encoded.pixel_values), None, max_tokens=tokens, temperature=0.0, image_grid_thw=grid
    )
    for token, _ in steps:
        yield int(token)


def torch_rows(text: dict, prompt: int, tokens: int, limit: float) -> None:
    """Time torch.compile with CUDA graphs and a static cache, where torch is present: the steps alone."""
    try:
        import torch
    except ImportError:
        click.echo("| torch is not installed |")
        return
    if not torch.cuda.is_available():
        click.echo("| torch has no GPU |")
        return
    from tests.benchmarks.torch_decode import steps_per_second

    for arm, rank in (("base", 0), ("adapter", 16)):
        rate = steps_per_second(text, rank, prompt, prompt + tokens)
        cells = ["torch.compile, CUDA graphs", arm, 16, 1, f"{rate:,.0f}", "", f"{rate * limit:.0%}", "", "", ""]
        click.echo("| " + " | ".join(map(str, cells)) + " |")


def weight_bytes(base: vlm.Base) -> int:
    """Return the bytes of the language model that a step reads: all but the embedding, unless it is the head too."""
    return sum(array.nbytes for _, array in tree_flatten(base.model.language_model.parameters()))


def bandwidth(accelerator: bool) -> float:
    """Return the bytes a second at which this device reads memory."""
    array = mx.ones((1 << (30 if accelerator else 24), 2), mx.bfloat16)
    mx.eval(array)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        mx.eval(array.max())
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


# -- the model --------------------------------------------------------------------------------------------------------


def random_base(shape: dict) -> vlm.Base:
    """Return a base of random weights in the shape's dtype; its stop tokens are none."""
    text = dict(
        model_type="qwen3_vl_text", rms_norm_eps=1e-6, max_position_embeddings=32768, rope_theta=5_000_000,
        rope_scaling={"mrope_interleaved": True, "mrope_section": shape["rope"], "rope_type": "default"},
        tie_word_embeddings=True, attention_bias=False, hidden_act="silu", **shape["text"],
    )  # fmt: skip
    vision = dict(model_type="qwen3_vl", in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                  hidden_act="gelu_pytorch_tanh", initializer_range=0.02, **shape["vision"])  # fmt: skip
    ids = dict(image_token_id=10, video_token_id=11, vision_start_token_id=12, vision_end_token_id=13)
    config = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "vocab_size": text["vocab_size"], **ids}
    parts = {"text_config": TextConfig.from_dict(text), "vision_config": VisionConfig.from_dict(vision)}
    mx.random.seed(0)
    model = Model(ModelConfig.from_dict({**config, **parts}))
    for module in (model.vision_tower, model.language_model):  # cast part by part: float32 copies must not pile up
        module.update(tree_map(lambda weight: weight.astype(shape["dtype"]), module.parameters()))
        mx.eval(module.parameters())
    model.freeze()
    model.eval()
    stopping = SimpleNamespace(eos_token_ids=[])
    processor = SimpleNamespace(tokenizer=SimpleNamespace(stopping_criteria=stopping))
    return vlm.Base(model, processor, config, Path("."), "random")


def photo(shape: dict, base: vlm.Base, number: int) -> vlm.Encoded:
    """Return an encoded prompt: a random photograph, then random text, some tokens longer for each number."""
    rng = np.random.default_rng(number)
    height, width = shape["grid"]
    image = np.full(height * width // 4, 10)
    text = rng.integers(20, shape["text"]["vocab_size"], shape["prompt"] + 3 * number)
    ids = np.concatenate([[12], image, [13], text]).astype(np.int32)
    pixels = rng.normal(0, 1, (height * width, 3 * 2 * 16 * 16)).astype(np.float32)
    return vlm.Encoded(ids, np.zeros(len(ids), dtype=bool), pixels, np.array([[1, height, width]], dtype=np.int32))


def random_adapter(base: vlm.Base, rank: int) -> vlm.LoraModules:
    attach_lora(base, rank=rank, alpha=2 * rank)
    tensors = lora_parameters(base.model)
    for name in tensors:
        if name.endswith("lora_b"):
            tensors[name] = 0.01 * mx.random.normal(tensors[name].shape)
    vlm.use_adapter(base, None)
    return vlm.build_adapter(base, tensors, rank, 2 * rank)


if __name__ == "__main__":
    main()

"""Batched generation on a tiny Qwen3-VL: the same tokens as one by one, and as mlx-vlm's own generation."""

import gc
import io
import json
import random
import re
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from integration.lora_patch import engine as engine_module
from integration.lora_patch import language_model, vlm
from integration.lora_patch.adapters import as_uniform, read_adapter
from integration.lora_patch.engine import Engine, Request, Sampling, prompt_row, supports
from integration.lora_patch.grammar import Grammar, answer_schema
from integration.lora_patch.language_model import Cache
from integration.lora_patch.sources import Source, adapter_in
from integration.lora_patch.specification import DIMENSIONS7, PromptSpecification
from tests.evaluation_case import make_adapter, make_data
from tests.sample import scenes

PROMPTS = [f"Describe the photograph. {'Look at the light. ' * n}" for n in range(10)]
TOKENS = 80


@pytest.fixture(scope="module")
def stirred(tiny_base, tmp_path_factory):
    """An adapter so strong that greedy output varies: random weights alone repeat one token for ever."""
    folder = tmp_path_factory.mktemp("stirred")
    return make_adapter(folder / "adapter", tiny_base, make_data(folder, 1, 1), b_scale=1.0, seed=3)


@pytest.fixture(scope="module")
def base(tiny_base, stirred):
    return vlm.load_base(tiny_base)


@pytest.fixture(scope="module")
def adapter(base, stirred):
    tensors, rank, scale = as_uniform(read_adapter(adapter_in(stirred)).layers)
    return vlm.build_adapter(base, tensors, rank, scale * rank)


@pytest.fixture(scope="module")
def engine(base):
    return Engine(base)


def mlx_vlms(base, adapter, prompt: str, photo) -> list[int]:
    """Return what mlx-vlm's own generation answers."""
    vlm.use_adapter(base, adapter)
    try:
        return list(vlm.stream(base, prompt, [photo], TOKENS))
    finally:
        vlm.use_adapter(base, None)


@pytest.fixture(scope="module")
def photos():
    rng = random.Random(5)
    return [scenes.draw(scenes.random_scene(rng), 64 + 12 * at) for at in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def requests(base, photos):
    rows = [
        vlm.prepare_row(base, vlm.encode(base, prompt, [photo], "An answer."))
        for prompt, photo in zip(PROMPTS, photos, strict=True)
    ]
    return [Request(prompt_row(row), str(at)) for at, row in enumerate(rows)]


@pytest.fixture(scope="module")
def one_by_one(engine, adapter, requests):
    return tokens(engine, requests, 1, adapter=adapter, drafting=False)


def tokens(engine: Engine, requests: list[Request], batch_size: int, max_tokens: int = TOKENS, **options) -> dict:
    answers = engine.generate(requests, batch_size, max_tokens, **options)
    return {(answer.key, answer.sample): answer.tokens for answer in answers}


def test_batch_of_eight_gives_the_same_greedy_tokens(engine, adapter, requests, one_by_one):
    # ten prompts of ten lengths: rows join the running batch late, and leave it one by one
    assert tokens(engine, requests, 8, adapter=adapter) == one_by_one
    assert len({tuple(found) for found in one_by_one.values()}) == len(requests)


def test_greedy_tokens_are_mlx_vlms_own(base, adapter, photos, one_by_one):
    for at in (0, 4, 9):
        assert mlx_vlms(base, adapter, PROMPTS[at], photos[at]) == one_by_one[str(at), 0]


def test_prompt_row_is_the_prompt_alone(base, photos):
    with_answer = prompt_row(vlm.prepare_row(base, vlm.encode(base, PROMPTS[0], [photos[0]], "An answer.")))
    alone = vlm.prepare_row(base, vlm.encode(base, PROMPTS[0], [photos[0]]))
    assert with_answer.input_ids.tolist() == alone.input_ids.tolist()
    assert with_answer.position_ids.tolist() == alone.position_ids.tolist()
    assert not with_answer.completion_mask.any()


def test_adapters_are_switched_call_by_call_over_one_base(engine, base, adapter, photos, requests, one_by_one):
    plain = tokens(engine, requests[:4], 4)
    assert mlx_vlms(base, None, PROMPTS[2], photos[2])[: len(plain["2", 0])] == plain["2", 0]
    assert all(plain[key] != one_by_one[key] for key in plain)
    assert tokens(engine, requests[:4], 4, adapter=adapter) == {key: one_by_one[key] for key in plain}


def test_update_beside_the_matrices_gives_what_merged_copies_give(base, adapter, requests, one_by_one, monkeypatch):
    apart = Engine(base)
    monkeypatch.setattr(engine_module, "room", lambda: 0)
    assert tokens(apart, requests, 3, adapter=adapter) == one_by_one
    monkeypatch.undo()
    assert (apart.way(adapter), apart.way(None), Engine(base).way(adapter)) == ("beside", "base", "merged")


def test_copies_are_merged_as_far_as_memory_goes_the_smallest_first(base, adapter, requests, one_by_one, monkeypatch):
    model, update = Engine(base).model, language_model.update_of(adapter)
    whole = sum(module.linear.weight.nbytes for module in adapter.modules.values())
    assert model.copies(update, whole) == model.changed(update)
    assert len(model.copies(update, whole - 1)) == len(model.changed(update)) - 1
    assert model.copies(update, 0) == model.copies(None, whole) == frozenset()
    sizes = {group: model.plain[0][group][0][0].nbytes for group in vlm.GROUPS}
    half = len(model.plain) * sum(sorted(sizes.values())[:2])
    assert sum(sizes[group] for _, group in model.copies(update, half)) == half
    assert "gate_up" not in {group for _, group in model.copies(update, half)}  # the largest
    monkeypatch.setattr(engine_module, "room", lambda: half)
    partly, layers = Engine(base), len(model.plain)
    assert partly.way(adapter) == f"merged in {2 * layers} of {4 * layers} matrices"
    assert tokens(partly, requests[:4], 3, adapter=adapter) == {(str(at), 0): one_by_one[str(at), 0] for at in range(4)}


def test_layers_of_an_adapter_go_with_it(base, stirred):
    engine, read = Engine(base), read_adapter(adapter_in(stirred))
    assert engine.way(read) == "merged"
    assert len(engine._ready) == 1
    del read
    gc.collect()
    assert not engine._ready


def test_every_form_in_which_the_service_reads_adapters(engine, stirred, adapter, requests, one_by_one):
    read = read_adapter(adapter_in(stirred))
    keys = [("0", 0), ("1", 0)]
    assert tokens(engine, requests[:2], 2, adapter=read) == {key: one_by_one[key] for key in keys}
    # half of it twice is the whole; some modules alone are another model
    half = read_adapter(Source(((stirred, 0.5), (stirred, 0.5)), "both"))
    assert tokens(engine, requests[:2], 2, adapter=half) == {key: one_by_one[key] for key in keys}
    some = read_adapter(adapter_in(stirred))
    some.layers = {name: pair for at, (name, pair) in enumerate(some.layers.items()) if at % 3}
    beside = Engine(engine.base)
    beside.model.copies = lambda update, room: frozenset()
    found = tokens(engine, requests[:2], 2, adapter=some)
    assert found == tokens(beside, requests[:2], 2, adapter=some)
    assert found["0", 0] != one_by_one["0", 0]


@pytest.mark.parametrize("mixed", [False, True])
def test_quantized_base_gives_mlx_vlms_tokens(tiny_base, stirred, photos, mixed):
    base = vlm.load_base(tiny_base)
    kind = lambda path, module: hasattr(module, "to_quantized") and (not mixed or "v_proj" not in path)  # noqa: E731
    nn.quantize(base.model.language_model, 64, 4, class_predicate=kind)
    tensors, rank, scale = as_uniform(read_adapter(adapter_in(stirred)).layers)
    adapter = vlm.build_adapter(base, tensors, rank, scale * rank)
    rows = [
        vlm.prepare_row(base, vlm.encode(base, prompt, [photo]))
        for prompt, photo in zip(PROMPTS[:3], photos, strict=False)
    ]
    engine = Engine(base)
    assert engine.way(adapter) == "beside"
    found = tokens(engine, [Request(row, str(at)) for at, row in enumerate(rows)], 3, adapter=adapter)
    for at in range(3):
        assert mlx_vlms(base, adapter, PROMPTS[at], photos[at])[: len(found[str(at), 0])] == found[str(at), 0]


def test_samples_depend_on_seed_and_row_alone(engine, adapter, requests):
    options = {"adapter": adapter, "max_tokens": 24}
    pairs = [Request(request.row, request.key, sample) for request in requests[:4] for sample in range(2)]
    together = tokens(engine, pairs, 8, sampling=Sampling(1.0, 1), **options)
    assert tokens(engine, pairs[::-1], 3, sampling=Sampling(1.0, 1), **options) == together
    assert tokens(engine, pairs, 8, sampling=Sampling(1.0, 2), **options) != together
    assert len({tuple(found) for found in together.values()}) == len(pairs)


def test_a_finished_row_costs_no_further_step(base, adapter, requests, one_by_one, monkeypatch):
    engine, widths, step = Engine(base), [], Engine._step
    monkeypatch.setattr(
        Engine, "_step", lambda self, batch, slots, *rest: widths.append(len(slots)) or step(self, batch, slots, *rest)
    )
    # a token that one row alone generates within its first twelve is made an end of turn
    firsts = {key: one_by_one[key, 0][:12] for key in "012345"}
    key, end = next(
        (key, token)
        for key, found in firsts.items()
        for token in found
        if not any(token in other for name, other in firsts.items() if name != key)
    )
    engine.stop = engine.stop | {end}
    at = firsts[key].index(end)
    found = tokens(engine, requests[:6], 6, max_tokens=12, adapter=adapter, drafting=False)
    assert found[key, 0] == firsts[key][:at]
    # one step was under way when the end was read; from then on five rows
    assert widths == [6] * (at + 1) + [5] * (11 - at)


def test_endless_repetition_ends_as_a_loop(engine, requests):
    answers = list(engine.generate(requests[:2], 2, 400))  # random weights repeat themselves
    assert {answer.finish for answer in answers} == {"loop"}
    assert all(len(answer.tokens) < 400 for answer in answers)


def test_token_limit_ends_as_length(engine, adapter, requests):
    answers = list(engine.generate(requests[:3], 2, 7, adapter=adapter))
    assert [(answer.finish, len(answer.tokens)) for answer in answers] == [("length", 7)] * 3


def test_stream_gives_the_same_tokens(engine, adapter, requests, one_by_one):
    for drafting in (False, True):
        assert list(engine.stream(requests[1], TOKENS, adapter, drafting)) == one_by_one["1", 0]


def test_grammar_makes_even_random_weights_comply(engine, adapter, base, requests):
    grammar = Grammar(base, answer_schema(PromptSpecification(DIMENSIONS7)))
    bound = [Request(request.row, request.key, 0, grammar) for request in requests[:3]]
    answers = list(engine.generate(bound, 3, 1200, Sampling(1.0, 4), adapter))
    finished = [engine.text(answer.tokens) for answer in answers if answer.finish == "stop"]
    assert finished
    assert [PromptSpecification(DIMENSIONS7).check(text) for text in finished] == [[]] * len(finished)
    # what did not end in time is still the beginning of an object
    assert all(engine.text(answer.tokens).startswith('{"image_description":"') for answer in answers)


def test_rows_under_a_grammar_take_the_best_of_the_tokens_that_it_allows(engine, adapter, base, requests):
    """Greedily, as computed here by hand, whatever other rows do."""
    grammar = Grammar(base, answer_schema(PromptSpecification(DIMENSIONS7)))
    expected = {}
    for request in requests[:2]:
        batch, matcher, found = engine._batch(adapter, 1), grammar.matcher(), []
        logits = batch.admit(request.row)
        for _ in range(TOKENS):
            bits = np.unpackbits(matcher.allowed(engine.vocabulary).view(np.uint8), bitorder="little")
            allowed = bits[: engine.vocabulary].astype(bool)
            found.append(int(np.where(allowed, np.array(logits[0]), -np.inf).argmax()))
            matcher.consume(found[-1])
            logits = batch.step(mx.array(found[-1:], mx.int32), True)[1]
        expected[request.key, 0] = found
    free = tokens(engine, requests[2:3], 1, adapter=adapter)
    bound = [Request(request.row, request.key, grammar=grammar) for request in requests[:2]]
    for size in (1, 3):
        assert tokens(engine, [*bound, requests[2]], size, adapter=adapter, drafting=False) == expected | free


@pytest.mark.parametrize("bound", [False, True])
def test_a_step_is_under_way_before_its_token_is_read(engine, base, requests, monkeypatch, bound):
    """The accelerator waits neither for Python nor for a matcher; and what is read was started without what follows,
    since MLX has an array read only after all that was started with it (the time of a step would be wrong too)."""
    happened, step, take, start = [], Engine._step, Engine._take, mx.async_eval
    monkeypatch.setattr(Engine, "_step", lambda *given: happened.append("step") or step(*given))
    monkeypatch.setattr(Engine, "_take", lambda *given: happened.append("take") or take(*given))
    monkeypatch.setattr(mx, "async_eval", lambda *given: happened.append("start") or start(*given))
    grammar = Grammar(base, answer_schema(PromptSpecification(DIMENSIONS7))) if bound else None
    list(engine.generate([Request(requests[0].row, "0", grammar=grammar)], 1, 3, drafting=False))
    assert happened == ["start", "step", "start", "take"] * 3


def test_a_guess_that_the_tokenizer_does_not_know_leaves_the_matcher_whole(engine, base):
    matcher = Grammar(base, answer_schema(PromptSpecification(DIMENSIONS7))).matcher()
    opening = base.processor.tokenizer.encode('{"image_description":"', add_special_tokens=False)
    assert matcher.legal([*opening, 1 << 20]) == len(opening)
    assert matcher.legal([1 << 20]) == 0
    assert matcher.follows(opening)


def test_watched_log_probabilities_are_those_of_a_forward_pass(engine, adapter, base, requests, one_by_one):
    watched = (5, 17, 300)
    request = Request(requests[1].row, "1", watched=watched)
    ids = np.concatenate([request.row.input_ids, one_by_one["1", 0][:20]]).astype(np.int32)
    prompt = request.row
    whole = vlm.Row(ids, None, None, prompt.visual, prompt.features, prompt.deepstack)
    after = request.row.position_ids.max() + 1 + np.arange(20)
    whole.position_ids = np.concatenate([request.row.position_ids, np.tile(after, (3, 1))], axis=1).astype(np.int32)
    layers = engine._prepared(adapter)[0]
    length = len(request.row.input_ids)
    for drafting in (False, True):
        (answer,) = engine.generate([request], 1, 20, adapter=adapter, drafting=drafting)
        assert answer.watched.shape == (20, 3)
        for at in (0, 7, 19):
            part = vlm.Row(
                ids[: length + at], None, whole.position_ids[:, : length + at], whole.visual, whole.features,
                whole.deepstack,
            )  # fmt: skip
            logits = engine.model.logits(engine.model.prefill(layers, part)[0])[0]
            wanted = (logits - mx.logsumexp(logits))[mx.array(watched)]
            assert np.allclose(answer.watched[at], np.array(wanted), atol=2e-4)


def test_what_the_engine_cannot_serve_is_told_in_a_line(base):
    assert supports(base.model) is None
    other = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    assert supports(other) == "the model's type is llava, not qwen3_vl"
    moved = SimpleNamespace(config=SimpleNamespace(model_type="qwen3_vl"))
    assert "keeps its parts elsewhere" in supports(moved)


@pytest.mark.parametrize(("bits", "merged", "added"), [(0, 4, 0), (0, 2, 4), (0, 0, 8), (4, 4, 8)])
def test_adapter_adds_few_primitives_to_a_step(tiny_base, stirred, photos, bits, merged, added):
    """``merged``: groups of a layer for whose copies there is memory."""
    base = vlm.load_base(tiny_base)
    if bits:
        nn.quantize(base.model.language_model, 64, bits)
    engine, read = Engine(base), read_adapter(adapter_in(stirred))
    sizes = sorted(engine.model.plain[0][group][0][0].nbytes for group in vlm.GROUPS)
    fitting, copies = len(engine.model.plain) * sum(sizes[:merged]), engine.model.copies
    engine.model.copies = lambda update, room: copies(update, fitting)
    row = vlm.prepare_row(base, vlm.encode(base, PROMPTS[0], [photos[0]]))
    counts = [step_primitives(engine, adapter, row) for adapter in (None, read)]
    layers = len(engine.model.shapes)
    assert counts[1] - counts[0] == added * layers
    # norms, rotation and attention, single operations on an accelerator, count a hundred here: the CPU spells them out
    assert counts[0] <= 135 * layers + 80


def step_primitives(engine: Engine, adapter, row: vlm.Row) -> int:
    """Return how many operations MLX is given for one step of one token."""
    batch = engine._batch(adapter, 1)
    batch.admit(row)
    mx.eval(batch.cache.keys, batch.cache.values)
    best, _ = batch.step(mx.array([5]), False)
    graph = io.StringIO()
    mx.export_to_dot(graph, best)
    return len(re.findall("label =", graph.getvalue()))


def test_schema_lists_the_dimensions_in_order():
    listed = answer_schema(PromptSpecification(("B", "A")))["properties"]["dimensions"]
    assert [item["properties"]["name"]["const"] for item in listed["prefixItems"]] == ["B", "A"]
    assert (listed["minItems"], listed["maxItems"]) == (2, 2)
    json.dumps(listed)


def test_cache_keeps_rows_aligned_when_others_come_and_go():
    cache = Cache(1)
    row = lambda length, value: [mx.full((1, 1, length, 2), value)]  # noqa: E731
    cache.add(row(3, 1.0), row(3, 1.0))
    cache.add(row(5, 2.0), row(5, 2.0))
    assert (cache.used, cache.pads.tolist()) == (5, [2, 0])
    mask = cache.advance()
    assert mask[:, 0, 0].tolist() == [[False, False, True, True, True, True], [True] * 6]
    keys, _ = cache.write(0, mx.full((2, 1, 1, 2), 9.0), mx.full((2, 1, 1, 2), 9.0))
    assert keys[1, 0, :, 0].tolist() == [2.0] * 5 + [9.0]
    cache.keep([0])
    assert cache.advance() is None  # the one row that is left sees every column
    cache.used -= 1
    assert (cache.used, cache.pads.tolist()) == (4, [0])
    assert cache.keys[0][0, 0, :3].tolist() == [[1.0, 1.0]] * 3
    cache.keep([])
    assert cache.used == 0
    cache.add(row(2, 3.0), row(2, 3.0))
    assert (cache.used, cache.pads.tolist()) == (2, [0])

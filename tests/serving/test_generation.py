"""Batched generation on a tiny Qwen3-VL: the same tokens as one by one, and as mlx-vlm's own generation."""

import json
import random

import mlx.core as mx
import mlx.nn as nn
import pytest

from common.analysis import DIMENSIONS7, check_strict
from integration.lora_patch import vlm
from integration.lora_patch.adapters import as_uniform, read_adapter
from integration.lora_patch.generation import Decoding, Grammar, Request, _Cache, answer_schema, prompt_row
from integration.lora_patch.sources import adapter_in
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
    """The base with that adapter on."""
    base = vlm.load_base(tiny_base)
    tensors, rank, scale = as_uniform(read_adapter(adapter_in(stirred)).layers)
    vlm.use_adapter(base, vlm.build_adapter(base, tensors, rank, scale * rank))
    return base


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
def one_by_one(base, requests):
    return tokens(Decoding(base), requests, 1)


def tokens(decoding: Decoding, requests: list[Request], batch_size: int, **options) -> dict:
    answers = decoding.generate(requests, batch_size, options.pop("max_tokens", TOKENS), **options)
    return {(answer.key, answer.sample): answer.tokens for answer in answers}


def test_batch_of_eight_gives_the_same_greedy_tokens(base, requests, one_by_one):
    # ten prompts of ten lengths: rows join the running batch late, and leave it one by one
    assert tokens(Decoding(base), requests, 8) == one_by_one
    assert len({tuple(found) for found in one_by_one.values()}) == len(requests)


def test_greedy_tokens_are_mlx_vlms_own(base, photos, one_by_one):
    for at in (0, 4, 9):
        assert list(vlm.stream(base, PROMPTS[at], [photos[at]], TOKENS)) == one_by_one[str(at), 0]


def test_prompt_row_is_the_prompt_alone(base, photos):
    with_answer = prompt_row(vlm.prepare_row(base, vlm.encode(base, PROMPTS[0], [photos[0]], "An answer.")))
    alone = vlm.prepare_row(base, vlm.encode(base, PROMPTS[0], [photos[0]]))
    assert with_answer.input_ids.tolist() == alone.input_ids.tolist()
    assert with_answer.position_ids.tolist() == alone.position_ids.tolist()
    assert not with_answer.completion_mask.any()


def test_adapter_is_switched_over_one_base(base, photos, requests, one_by_one):
    adapter = vlm.adapter_of(base.model)
    vlm.use_adapter(base, None)
    try:
        plain = tokens(Decoding(base), requests[:4], 4)
        assert list(vlm.stream(base, PROMPTS[2], [photos[2]], TOKENS))[: len(plain["2", 0])] == plain["2", 0]
    finally:
        vlm.use_adapter(base, adapter)
    assert all(plain[key] != one_by_one[key] for key in plain)
    assert tokens(Decoding(base), requests[:4], 4) == {key: one_by_one[key] for key in plain}


def test_quantized_base_gives_mlx_vlms_tokens(tiny_base, stirred, photos):
    base = vlm.load_base(tiny_base)
    nn.quantize(base.model.language_model, 64, 4)
    tensors, rank, scale = as_uniform(read_adapter(adapter_in(stirred)).layers)
    vlm.use_adapter(base, vlm.build_adapter(base, tensors, rank, scale * rank))
    rows = [
        vlm.prepare_row(base, vlm.encode(base, prompt, [photo]))
        for prompt, photo in zip(PROMPTS[:3], photos, strict=False)
    ]
    found = tokens(Decoding(base), [Request(row, str(at)) for at, row in enumerate(rows)], 3)
    for at in range(3):
        assert list(vlm.stream(base, PROMPTS[at], [photos[at]], TOKENS))[: len(found[str(at), 0])] == found[str(at), 0]


def test_samples_depend_on_seed_and_row_alone(base, requests):
    decoding, options = Decoding(base), {"temperature": 1.0, "max_tokens": 24}
    pairs = [Request(request.row, request.key, sample) for request in requests[:4] for sample in range(2)]
    together = tokens(decoding, pairs, 8, seed=1, **options)
    assert tokens(decoding, pairs[::-1], 3, seed=1, **options) == together
    assert tokens(decoding, pairs, 8, seed=2, **options) != together
    assert len({tuple(found) for found in together.values()}) == len(pairs)


def test_a_finished_row_costs_no_further_step(base, requests, one_by_one, monkeypatch):
    decoding, widths, step = Decoding(base), [], Decoding._step
    monkeypatch.setattr(
        Decoding, "_step", lambda self, slots, *rest: widths.append(len(slots)) or step(self, slots, *rest)
    )
    # a token that one row alone generates within its first twelve is made an end of turn
    firsts = {key: one_by_one[key, 0][:12] for key in "012345"}
    key, end = next(
        (key, token)
        for key, found in firsts.items()
        for token in found
        if not any(token in other for name, other in firsts.items() if name != key)
    )
    decoding.stop = decoding.stop | {end}
    at = firsts[key].index(end)
    found = tokens(decoding, requests[:6], 6, max_tokens=12)
    assert found[key, 0] == firsts[key][:at]
    # one step was under way when the end was read; from then on five rows
    assert widths == [6] * (at + 1) + [5] * (11 - at)


def test_endless_repetition_ends_as_a_loop(base, requests):
    adapter = vlm.adapter_of(base.model)
    vlm.use_adapter(base, None)  # random weights repeat themselves
    answers = list(Decoding(base).generate(requests[:2], 2, 400))
    vlm.use_adapter(base, adapter)
    assert {answer.finish for answer in answers} == {"loop"}
    assert all(len(answer.tokens) < 400 for answer in answers)


def test_token_limit_ends_as_length(base, requests):
    answers = list(Decoding(base).generate(requests[:3], 2, 7))
    assert [(answer.finish, len(answer.tokens)) for answer in answers] == [("length", 7)] * 3


def test_stream_gives_the_same_tokens(base, requests, one_by_one):
    assert list(Decoding(base).stream(requests[1], TOKENS)) == one_by_one["1", 0]


def test_grammar_makes_even_random_weights_comply(base, requests):
    grammar = Grammar(base, answer_schema(DIMENSIONS7))
    bound = [Request(request.row, request.key, 0, grammar) for request in requests[:3]]
    decoding = Decoding(base)
    answers = list(decoding.generate(bound, 3, 1200, temperature=1.0, seed=4))
    finished = [decoding.text(answer.tokens) for answer in answers if answer.finish == "stop"]
    assert finished
    assert [check_strict(text, DIMENSIONS7) for text in finished] == [[]] * len(finished)
    # what did not end in time is still the beginning of an object
    assert all(decoding.text(answer.tokens).startswith('{"image_description":"') for answer in answers)


def test_schema_lists_the_dimensions_in_order():
    listed = answer_schema(["B", "A"])["properties"]["dimensions"]
    assert [item["properties"]["name"]["const"] for item in listed["prefixItems"]] == ["B", "A"]
    assert (listed["minItems"], listed["maxItems"]) == (2, 2)
    json.dumps(listed)


def test_cache_keeps_rows_aligned_when_others_come_and_go():
    cache = _Cache(1)
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

"""Drafts change how fast an answer comes, never what it is; the phrasebook is a plain file, checked when read."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest

from integration.lora_patch import phrasebook, vlm
from integration.lora_patch.adapters import read_adapter
from integration.lora_patch.drafting import FIRST, PAUSE, RETIMED, WINDOW, Drafter, Pace
from integration.lora_patch.engine import Engine, Request
from integration.lora_patch.errors import LoraError
from integration.lora_patch.grammar import Grammar, answer_schema
from integration.lora_patch.phrasebook import Continuations, read_phrasebook, write_phrasebook
from integration.lora_patch.sources import adapter_in
from integration.lora_patch.specification import PromptSpecification
from tests.evaluation_case import make_adapter, make_data

ANSWERS, TOKENS = 240, 20
DIMENSIONS = ("Composition", "Lighting")


@pytest.fixture(scope="module")
def engine(tiny_base):
    return Engine(vlm.load_base(tiny_base))


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """An adapter so strong that greedy output varies: random weights alone repeat one token for ever."""
    folder = tmp_path_factory.mktemp("stirred")
    return read_adapter(
        adapter_in(make_adapter(folder / "adapter", tiny_base, make_data(folder, 1, 1), b_scale=1.0, seed=3))
    )


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return [Request(text_row(rng.integers(20, 250, rng.integers(4, 24))), str(at)) for at in range(ANSWERS)]


@pytest.fixture(scope="module")
def plain(engine, adapter, requests):
    """What greedy decoding gives without drafts."""
    answers = engine.generate(requests, 24, TOKENS, adapter=adapter, drafting=False)
    return {answer.key: answer.tokens for answer in answers}


@pytest.fixture
def always(monkeypatch):
    """Draft from the first token on, whatever a pass costs."""
    monkeypatch.setattr("integration.lora_patch.drafting.FIRST", 0)
    monkeypatch.setattr(Pace, "length", lambda self, chances: len(chances))
    monkeypatch.setattr(Pace, "judge", lambda self, *rest: None)


def propose(drafter: Drafter, tokens: list[int], longest: int) -> list[int]:
    draft, chances = drafter.guess(tokens, longest)
    return draft[: drafter.pace.length(chances)]


def text_row(ids) -> vlm.Row:
    ids = np.asarray(ids, dtype=np.int32)
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    return vlm.Row(ids, np.zeros(len(ids), bool), positions, np.zeros(0, np.int32), None, None)


def test_hundreds_of_answers_are_the_same_with_drafts(engine, adapter, requests, plain, always):
    # of every third answer the phrasebook knows all, of the others what they share with those
    adapter.phrasebook = Continuations([plain[str(at)] for at in range(0, ANSWERS, 3)])
    passes = tokens = 0
    try:
        for request in requests:
            (answer,) = engine.generate([request], 1, TOKENS, adapter=adapter)
            assert answer.tokens == plain[request.key]
            passes, tokens = passes + answer.passes, tokens + len(answer.tokens)
    finally:
        del adapter.phrasebook
    assert len({tuple(found) for found in plain.values()}) > ANSWERS / 2
    assert passes < 0.8 * tokens


@pytest.mark.parametrize("batch_size", [2, 8])
def test_hundreds_of_answers_are_the_same_with_drafts_in_batches(engine, adapter, requests, plain, always, batch_size):
    adapter.phrasebook = Continuations([plain[str(at)] for at in range(0, ANSWERS, 3)])
    try:
        answers = list(engine.generate(requests, batch_size, TOKENS, adapter=adapter))
    finally:
        del adapter.phrasebook
    assert {answer.key: answer.tokens for answer in answers} == plain
    assert sum(answer.passes for answer in answers) < 0.9 * sum(len(answer.tokens) for answer in answers)


def test_the_base_drafts_from_its_own_text(engine, requests, always):
    (alone,) = engine.generate(requests[:1], 1, TOKENS, drafting=False)
    (drafted,) = engine.generate(requests[:1], 1, TOKENS)
    assert drafted.tokens == alone.tokens
    assert drafted.passes < alone.passes


def test_an_answer_bound_to_a_grammar_is_the_same_with_drafts(engine, adapter, requests, always):
    grammar = Grammar(engine.base, answer_schema(PromptSpecification(DIMENSIONS)))
    for request in requests[:3]:
        bound = Request(request.row, request.key, grammar=grammar)
        (alone,) = engine.generate([bound], 1, 60, adapter=adapter, drafting=False)
        (drafted,) = engine.generate([bound], 1, 60, adapter=adapter)
        assert (drafted.tokens, drafted.finish) == (alone.tokens, alone.finish)
        assert drafted.passes < alone.passes  # what the schema forces needs no pass of its own


def test_an_end_of_turn_within_a_draft_ends_the_answer(engine, adapter, requests, plain, always, monkeypatch):
    key = next(key for key, found in plain.items() if found[12] not in found[:12])
    monkeypatch.setattr(engine, "stop", engine.stop | {plain[key][12]})
    adapter.phrasebook = Continuations([plain[key]])
    try:
        streamed = list(engine.stream(requests[int(key)], TOKENS, adapter))
        (answer,) = engine.generate([requests[int(key)]], 1, TOKENS, adapter=adapter)
    finally:
        del adapter.phrasebook
    assert streamed == answer.tokens == plain[key][:12]
    assert answer.finish == "stop"


def test_drafting_pauses_where_it_does_not_pay_and_in_later_answers_too():
    pace = Pace(single=1.0, timed=FIRST)

    def passes(seconds: float) -> bool:
        """Verify two tokens a pass for as long as it takes to judge; return whether drafting rests then."""
        pace.judged.clear()
        for _ in range(WINDOW):
            assert not pace.resting
            pace.judge(2, seconds)
        return pace.resting

    assert not passes(1.9)
    assert passes(2.2)
    pace.step(PAUSE - 1, None)
    assert pace.resting
    pace.step(1, None)
    assert passes(2.2)  # it was tried again; for twice as long now
    pace.step(PAUSE, None)
    assert pace.resting
    pace.judge(PAUSE, 9.0)  # a pass within a pause, over what the schema forces, is not judged
    assert not passes(1.9)


def test_single_steps_are_timed_at_first_and_now_and_then():
    pace = Pace()
    drafter = Drafter(pace, None, None, None)
    pace.step(FIRST, None)  # no time could be told
    assert pace.resting and not drafter.watching
    pace.step(FIRST, 0.5)
    assert not pace.resting and pace.single == 0.5
    pace.count(RETIMED - 1, 400)
    assert not pace.resting
    pace.count(1, 1)
    assert pace.resting
    assert (pace.tokens, pace.passes) == (RETIMED, 401)


class Forcing:
    """A schema that forces the last three of every four tokens of an answer."""

    def __init__(self, answer: list[int]):
        self.answer, self.at = answer, 0

    def matcher(self) -> "Forcing":
        return Forcing(self.answer)

    def follows(self, tokens: list[int]) -> bool:
        self.at += len(tokens)
        return True

    def forced(self) -> list[int]:
        return self.answer[self.at : -(-self.at // 4) * 4]


def test_what_the_schema_forces_is_verified_in_a_pause_too(engine, adapter, requests, plain, monkeypatch):
    monkeypatch.setattr(Pace, "cost", lambda self, tokens: 1.1 * self.single)
    for key in ("0", "1", "2"):
        engine.paces[True, False, False, 1] = pace = Pace(1.0, timed=FIRST, off=10**6)
        request = Request(requests[int(key)].row, key, schema=Forcing(plain[key]))
        (answer,) = engine.generate([request], 1, TOKENS, adapter=adapter)
        assert answer.tokens == plain[key]
        # of three forced tokens the first is under way when they are foreseen, the answer so far may guess on
        assert 3 in pace.met and min(pace.met) > 1
        assert answer.passes < 0.8 * TOKENS
    engine.paces.clear()


def test_answers_under_a_grammar_are_timed_and_drafted_too(engine, requests):
    """One step is launched ahead there, as elsewhere; the choice after it waits for the token before it."""
    engine.paces.clear()
    grammar = Grammar(engine.base, answer_schema(PromptSpecification(DIMENSIONS)))
    for _ in range(2):
        list(engine.generate([Request(requests[0].row, "0", grammar=grammar)], 1, 40))
    pace = engine.paces[False, False, True, 1]
    assert pace.single and pace.met
    engine.paces.clear()


def test_the_first_pass_of_a_width_does_not_count():
    pace = Pace()
    for seconds in (9.0, 0.01, 0.012, 7.0):  # it compiled; something else kept the machine busy at last
        pace.note(4, seconds)
    assert pace.seconds[4] == pytest.approx(0.9 * 0.0102 + 0.1 * 0.0204)


def test_a_draft_is_as_long_as_its_chances_are_worth():
    sure, unsure = [[1, 2, 3, 4, 5, 6]], [[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 6]]
    pace = Pace(1.0, seconds={1: 1.0, 8: 1.7})  # 0.1 a token
    assert propose(Drafter(pace, Continuations(sure), None, None), [1], 8) == [2, 3, 4, 5, 6]
    assert propose(Drafter(pace, Continuations(unsure), None, None), [1], 8)[0] == 2
    pace.seconds[8] = 1 + 0.5 * 7  # half a step a token: one chance in four is too little
    assert propose(Drafter(pace, Continuations(unsure), None, None), [1], 8) == [2]
    assert propose(Drafter(pace, Continuations(sure), None, None), [1], 2) == [2, 3]
    pace.seconds[2] = pace.seconds[8] = 3.0  # two tokens for the time of three: none is worth it
    assert propose(Drafter(pace, Continuations(unsure), None, None), [1], 8) == []
    assert pace.length([0.9, 0.9, 0.9]) == 3  # four tokens for it are
    assert pace.cost(16) == pytest.approx(3.8)


def test_the_schema_is_followed_until_an_answer_leaves_it(engine):
    grammar = Grammar(engine.base, answer_schema(PromptSpecification(DIMENSIONS)))
    encode = lambda text: engine.base.processor.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    pace = Pace(single=1.0, timed=FIRST)
    drafter, tokens = Drafter(pace, None, grammar, None), encode('{"')
    assert engine.text(tokens + propose(drafter, tokens, 32)) == '{"image_description":"'
    assert drafter.watching
    forced = Drafter(pace, None, Forcing([1, 2, 3, 4, 5, 6, 7, 8]), None)
    assert forced.foresees([1]) and not forced.foresees([1, 2, 3])  # one token alone is under way already
    pace.seconds = {width: 99.0 for width in range(1, 33)}
    assert not Drafter(pace, None, Forcing([1, 2, 3, 4]), None).foresees([1])  # a pass costs too much
    pace.seconds.clear()
    tokens += encode("scene")
    assert propose(drafter, tokens, 16) == []
    assert not drafter.watching


def test_continuations_prefer_long_contexts_and_frequent_tokens():
    found = Continuations([[1, 2, 3, 4, 9], [7, 2, 3, 5], [8, 2, 3, 5]])
    assert found.after([2, 3]) == (5, pytest.approx(2 / 3))
    assert found.after([1, 2, 3]) == (4, 1.0)
    assert found.after([99]) is None
    assert Continuations([]).after([1]) is None
    tokens = np.arange(50) * 7919
    assert phrasebook._hashes(tokens, 5).tolist() == [
        phrasebook._hash(tokens[at : at + 5].tolist()) for at in range(46)
    ]


def test_phrasebook_is_written_and_read(tmp_path, monkeypatch):
    path = tmp_path / phrasebook.PHRASEBOOK
    digest = write_phrasebook(path, [[1, 2, 3], [4, 5]])
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_phrasebook(path).after([1, 2]) == (3, 1.0)
    assert read_phrasebook(path).after([3]) is None  # answers do not run into each other
    assert read_phrasebook(tmp_path / "none.safetensors") is None
    monkeypatch.setattr(phrasebook, "LARGEST", 4)  # the newest responses are kept
    write_phrasebook(path, [[1, 2, 3], [4, 5], [6, 7]])
    assert read_phrasebook(path).after([1, 2]) is None
    assert read_phrasebook(path).after([4]) == (5, 1.0)


@pytest.mark.parametrize("damage", ["cut", "ends", "floats", "names"])
def test_damaged_phrasebook_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / phrasebook.PHRASEBOOK
    write_phrasebook(path, [[1, 2, 3]])
    tokens, ends = mx.array([1, 2, 3], mx.int32), mx.array([3], mx.int32)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        made = {
            "ends": {"tokens": tokens, "ends": ends + 1},
            "floats": {"tokens": tokens.astype(mx.float32), "ends": ends},
            "names": {"tokens": tokens},
        }
        mx.save_safetensors(str(path), made[damage])
    with pytest.raises(LoraError, match="no phrasebook") as refused:
        read_phrasebook(path)
    assert "\n" not in str(refused.value)

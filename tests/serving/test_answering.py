"""A request through the service: retry, stream, passes, breaker, its own mode; nothing slow under the lock."""

import contextlib
import json
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest

from integration.lora_patch import hooks
from integration.lora_patch.adapters import Adapter
from integration.lora_patch.answering import Answering
from integration.lora_patch.arms import Breaker, Scope, is_worker, job_of_request, scope_of_request
from integration.lora_patch.errors import LoraError
from integration.lora_patch.flags import flags
from integration.lora_patch.in_use import AdaptersInUse
from integration.lora_patch.jobs import Recorder
from integration.lora_patch.streams import ReaderLeft, Relay
from integration.lora_patch.switching import active
from tests.standin.running import make_adapter, make_db

JSON_PROMPT = 'Answer with {"dimensions": [{"name": "Composition", "score": 8}]}'
GOOD = '{"dimensions": [{"name": "Composition", "score": 8}, {"name": "Lighting", "score": 6.5}], "overall_score": 7.3}'


@contextlib.contextmanager
def serving(monkeypatch, answers, **changed):
    """A service whose model is a function: what it does with each kind of answer of the adapter's."""
    service = Answering(AdaptersInUse(), Recorder())
    adapter = Adapter({}, "a", "v1", [4], "", None, 1024, {}, None, Breaker(20, 0.25))
    service.adapters.table, service.adapters.mode = {"*": adapter}, "fine_tuned"
    monkeypatch.setattr(hooks, "service", service)
    for name, value in {"use_fine_tuned": True, **changed}.items():
        monkeypatch.setattr(flags, name, value)

    @hooks.generation
    def run(full_prompt):
        use = active.get()
        if use is None:
            return "of the base"
        use.happened = True
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            time.sleep(answer)
            answer = GOOD
        return answer

    job_of_request.set(None)
    yield service, adapter, run
    job_of_request.set(None)


def test_a_bad_answer_or_an_exception_is_made_good_by_the_base(monkeypatch):
    with serving(monkeypatch, [GOOD, "{", ValueError("no such token")]) as (service, adapter, run):
        seen = []
        for number in range(3):
            hooks.choose(str(number), "ansel")
            seen.append((run(JSON_PROMPT), job_of_request.get().fallback))
        assert seen == [(GOOD, False), ("of the base", True), ("of the base", True)]
        assert service.counts["invalid"] == service.counts["fallback"] == 2 and sum(adapter.breaker.answers) == 2


def test_without_fallback_the_answer_or_exception_is_passed_on(monkeypatch):
    answers = ["{", ValueError("no such token")]
    with serving(monkeypatch, answers, fallback_on_invalid=False) as (service, adapter, run):
        hooks.choose("1", "ansel")
        assert run(JSON_PROMPT) == "{"
        with pytest.raises(ValueError, match="no such token"):
            run(JSON_PROMPT)
        assert sum(adapter.breaker.answers) == 2 and not service.generating.locked()


def test_a_slow_answer_counts_as_bad_but_is_used(monkeypatch):
    with serving(monkeypatch, [0.2, GOOD], breaker_time_limit=0.1) as (_, adapter, run):
        hooks.choose("1", "ansel")
        assert [run(JSON_PROMPT), run(JSON_PROMPT)] == [GOOD, GOOD]
        assert list(adapter.breaker.answers) == [True, False]


def test_an_adapter_that_took_no_part_is_not_claimed_to_have(monkeypatch):
    with serving(monkeypatch, []) as (service, adapter, _):
        hooks.choose("1", "ansel")
        assert hooks.generation(lambda full_prompt: GOOD)(JSON_PROMPT) == GOOD  # the base's, run again
        assert service.counts["fallback"] == 1 and sum(adapter.breaker.answers) == 1


# -- streams ----------------------------------------------------------------------------------------------------------


def streaming(answers):
    """A generating function that yields: the adapter's answers piece by piece, or the base's."""

    @hooks.generation
    def run(full_prompt):
        use = active.get()
        if use is None:
            yield from ("of ", "the base")
            return
        use.happened = True
        yield from answers.pop(0)

    return run


def test_a_bad_stream_is_made_good_before_its_text_is_passed_on(monkeypatch):
    """The pieces keep coming, so that progress shows; the text of a good answer comes with the last of them."""
    with serving(monkeypatch, []) as (service, adapter, _):
        run = streaming([[GOOD[:9], GOOD[9:20], GOOD[20:]], ["{", "broken"]])
        hooks.choose("1", "ansel")
        assert list(run(JSON_PROMPT)) == ["", "", GOOD]
        assert list(run(JSON_PROMPT)) == ["", "of ", "the base"]
        assert list(adapter.breaker.answers) == [False, True] and not service.generating.locked()


def test_pieces_of_mlx_vlm_keep_all_but_their_text(monkeypatch):
    pieces = [SimpleNamespace(text=text, token=n, finish_reason=None) for n, text in enumerate((GOOD[:9], GOOD[9:]))]
    pieces[1].finish_reason = "stop"
    with serving(monkeypatch, []):
        hooks.choose("1", "ansel")
        seen = list(streaming([pieces])(JSON_PROMPT))
        assert [(piece.text, piece.token, piece.finish_reason) for piece in seen] == [("", 0, None), (GOOD, 1, "stop")]
        odd = [3, {"text": "{"}]  # of a kind that we cannot look into: passed on as they are, once all are there
        assert list(streaming([odd])(JSON_PROMPT)) == odd


def test_a_reader_who_is_slow_or_leaves_holds_up_nobody(monkeypatch):
    with serving(monkeypatch, [], fallback_on_invalid=False) as (service, adapter, _):
        go_on, closed = threading.Event(), []

        def endless():
            try:
                for number in range(10**6):
                    go_on.wait()
                    yield "{" if number else GOOD
            finally:
                closed.append(True)

        run = streaming([["{", "broken"], endless(), [GOOD]])
        hooks.choose("1", "ansel")
        assert list(run(JSON_PROMPT)) == ["{", "broken"]
        slow = run(JSON_PROMPT)
        go_on.set()
        assert next(slow) == GOOD
        assert active.get() is None  # the reader's own thread answers as the base
        slow.close()
        assert list(run(JSON_PROMPT)) == [GOOD]  # waits until the one that nobody reads has ended
        assert closed and list(adapter.breaker.answers) == [True, False]  # who left says nothing about the answer


def test_the_lock_is_free_while_a_client_reads(monkeypatch):
    with serving(monkeypatch, [], fallback_on_invalid=False) as (service, _, _):
        run = streaming([["a"] * 50, [GOOD]])
        hooks.choose("1", "ansel")
        slow = run(JSON_PROMPT)
        assert next(slow) == "a"
        started = time.monotonic()
        assert list(run(JSON_PROMPT)) == [GOOD]
        assert time.monotonic() - started < 10 and list(slow) == ["a"] * 49


def test_a_reader_who_stalls_is_cut_off():
    relay, made = Relay(stalled=0.2), []

    def work():
        while True:
            relay.put(len(made))
            made.append(1)
            time.sleep(0.01)

    pieces = relay.read(work)
    assert next(pieces) == 0
    time.sleep(0.5)
    count = len(made)
    time.sleep(0.1)
    assert len(made) == count < 40
    with pytest.raises(TimeoutError, match="nothing of the answer was read for 0.2 s"):
        list(pieces)
    with pytest.raises(ReaderLeft):
        relay.put(1)


def test_an_error_in_a_stream_reaches_its_reader(monkeypatch):
    with serving(monkeypatch, [], fallback_on_invalid=False) as (service, _, _):

        @hooks.generation
        def run(full_prompt):
            yield "{"
            raise ValueError("no such token")

        hooks.choose("1", "ansel")
        pieces = run(JSON_PROMPT)
        assert next(pieces) == "{"
        with pytest.raises(ValueError, match="no such token"):
            next(pieces)
        assert not service.generating.locked()


# -- what is judged, and recorded --------------------------------------------------------------------------------------


@contextlib.contextmanager
def request(service):
    """What `routes.Routes` does around a request."""
    scope = Scope()
    tokens = scope_of_request.set(scope), job_of_request.set(None)
    try:
        yield
    finally:
        scope.is_open = False
        service.conclude_all(scope)
        scope_of_request.reset(tokens[0])
        job_of_request.reset(tokens[1])


SCORES_FIRST = JSON_PROMPT + "\nGive only the scores, as text."
LAST = JSON_PROMPT + "\nWrite the analysis."


def test_of_a_service_with_two_passes_only_the_stored_answer_is_judged(monkeypatch):
    answers = [answer for _ in range(20) for answer in ("Composition 8", GOOD)]
    with serving(monkeypatch, answers, breaker_window=20) as (service, adapter, run):
        seen = []
        for number in range(20):
            with request(service):
                hooks.choose(str(number), "ansel")
                seen.append((run(SCORES_FIRST), run(LAST)))
        # the first job teaches which answer is the stored one: until then the first pass's was asked for again
        assert seen[0] == ("of the base", GOOD) and set(seen[1:]) == {("Composition 8", GOOD)}
        assert list(adapter.breaker.answers) == [False] * 20
        assert service.counts["fine_tuned"] == 20 and not service.counts["invalid"] + service.counts["fallback"]
        answers += ["Composition 8", "{"]
        with request(service):
            hooks.choose("20", "ansel")
            assert [run(SCORES_FIRST), run(LAST)] == ["Composition 8", "of the base"]
        assert service.counts["fallback"] == 1 and sum(adapter.breaker.answers) == 1


def test_a_summary_after_the_analysis_is_not_what_is_stored(monkeypatch):
    answers = [GOOD, "A quiet lake.", "{", "A lake."]
    with serving(monkeypatch, answers) as (service, adapter, run):
        for number in range(2):
            with request(service):
                hooks.choose(str(number), "ansel")
                seen = [run(JSON_PROMPT), run("Say it in one sentence.")]
        assert seen == ["of the base", "A lake."]  # the second analysis was bad, and noticed
        assert list(adapter.breaker.answers) == [False, True] and service.counts["fallback"] == 1


def test_the_job_in_which_the_breaker_opens_is_recorded_as_what_answered(monkeypatch):
    """It opens between two passes of a job, by another job: both answers are the adapter's, and so is the record."""
    with serving(monkeypatch, ["Composition 8", GOOD, GOOD]) as (service, adapter, run):
        service.stored[SCORES_FIRST[-300:]] = False
        rows = []
        monkeypatch.setattr(service.recorder, "record", lambda job: rows.append((job.id, job.model_used, job.version)))
        with request(service):
            hooks.choose("1", "ansel")
            run(SCORES_FIRST)
            adapter.breaker.since = "now"
            assert run(LAST) == GOOD
        with request(service):
            hooks.choose("2", "ansel")
            assert run(LAST) == "of the base"
        assert rows == [("1", "fine_tuned", "v1"), ("2", "base", None)]


def test_a_job_answered_in_a_thread_is_concluded_at_the_threads_end(monkeypatch):
    with serving(monkeypatch, ["Composition 8", GOOD] * 2) as (service, adapter, run):

        def work():
            inner = threading.Thread(target=hooks.carry(lambda: run(SCORES_FIRST)))  # a thread for a time limit
            inner.start()
            inner.join()
            run(LAST)

        for number in range(2):
            with request(service):
                hooks.choose(str(number), "ansel")
                thread = threading.Thread(target=hooks.carry(work))
            thread.start()  # the request is answered already
            thread.join()
        assert list(adapter.breaker.answers) == [False, False] and service.counts["fine_tuned"] == 2


def test_requests_do_not_wait_for_a_locked_database(monkeypatch, tmp_path):
    with serving(monkeypatch, [GOOD] * 4) as (service, _, run):
        service.recorder.open(make_db(tmp_path / "mondrian.db"))
        with contextlib.closing(sqlite3.connect(tmp_path / "mondrian.db", isolation_level=None)) as blocker:
            blocker.execute("PRAGMA locking_mode = EXCLUSIVE")
            blocker.execute("BEGIN EXCLUSIVE")
            started = time.monotonic()
            for number in range(4):
                with request(service):
                    hooks.choose(f"j{number % 3}", "ansel")
                    assert run(JSON_PROMPT) == GOOD
            assert time.monotonic() - started < 10
            blocker.execute("COMMIT")


def test_many_requests_at_once_are_all_counted(monkeypatch):
    answers = ["{", GOOD] * 200
    with serving(monkeypatch, answers) as (service, adapter, run):
        adapter.breaker = Breaker(1000, 1.0)

        def work(first):
            for number in range(first, first + 50):
                with request(service):
                    hooks.choose(str(number), "ansel")
                    run(JSON_PROMPT)

        threads = [threading.Thread(target=work, args=(50 * n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert service.counts["fine_tuned"] == 400 and service.counts["invalid"] == service.counts["fallback"] == 200
        assert len(adapter.breaker.answers) == 400 and sum(adapter.breaker.answers) == 200


# -- the request's own mode --------------------------------------------------------------------------------------------


def test_a_request_cannot_choose_its_arm_by_header_unless_a_flag_allows_it(monkeypatch):
    with serving(monkeypatch, []) as (service, _, _):
        assert service.choose("1", "ansel", {"override": "base"}).model_used == "fine_tuned"
        monkeypatch.setattr(flags, "allow_arm_override", True)
        assert service.choose("1", "ansel", {"override": "base"}).model_used == "base"
        assert service.choose("1", "ansel", {"override": "nonsense"}).model_used == "fine_tuned"
        service.adapters.table = {}  # where there is no adapter in use, none can be chosen
        assert service.choose("1", "ansel", {"override": "fine_tuned"}).model_used == "base"


@pytest.mark.parametrize("default", ["base", "fine_tuned", "ab_test"])
def test_the_mode_of_a_request_decides_and_the_flag_is_the_default(default, monkeypatch):
    with serving(monkeypatch, []) as (service, _, _):
        service.adapters.mode, service.adapters.split = default, 1.0
        expected = {
            "baseline": "base",
            "rag": "base",
            "lora": "fine_tuned",
            "rag+lora": "fine_tuned",
            "RAG_LoRA": "fine_tuned",
            "ab_test": "ab_test_fine_tuned",
        }
        assert {mode: service.choose("1", "ansel", {"mode": mode}).model_used for mode in expected} == expected
        plain = "ab_test_fine_tuned" if default == "ab_test" else default
        assert [service.choose("1", "ansel", {"mode": mode}).model_used for mode in (None, "", "sepia")] == [plain] * 3


def test_a_schedule_draws_the_arms_and_is_recorded(monkeypatch, tmp_path):
    with serving(monkeypatch, [GOOD] * 30, ab_test_schedule=(0.25, 1.0)) as (service, _, run):
        service.adapters.mode = "ab_test"
        service.recorder.open(make_db(tmp_path / "mondrian.db", rows=8))
        service.begin_canary()
        looks = []
        monkeypatch.setattr(service.canary, "note", lambda: looks.append(1))
        for number in range(8):
            with request(service):
                hooks.choose(f"j{number}", "ansel")
                run(JSON_PROMPT)
            service.canary.split = 0.25 if number < 3 else 1.0
        with contextlib.closing(sqlite3.connect(tmp_path / "mondrian.db")) as db:
            rows = db.execute("SELECT ab_test_split, model_used FROM jobs ORDER BY id").fetchall()
        assert [row[0] for row in rows] == [0.25] * 4 + [1.0] * 4
        assert {row[1] for row in rows[4:]} == {"ab_test_fine_tuned"} and len(looks) == 8
        assert service.health()["ab_test_split"] == 1.0
        service.begin_canary(split=0.5)  # by hand
        assert service.canary is None and service.split == service.adapters.split


# -- reload -----------------------------------------------------------------------------------------------------------


def test_a_model_config_is_followed_at_each_reload(monkeypatch, tmp_path, tiny_base):
    make_adapter(tmp_path / "models" / "a", tiny_base, 1)
    make_adapter(tmp_path / "models" / "b", tiny_base, 2)
    config = tmp_path / "model_config.json"

    def activate(name):
        models = {
            "base": {"lora_path": None},
            "a": {"lora_path": "models/a"},
            "b": {"lora_path": "models/b", "advisor": "Weston"},
        }
        config.write_text(json.dumps({"models": models, "active_model": name}))

    monkeypatch.setattr(flags, "model_config", str(config))
    activate("a")
    service = AdaptersInUse()
    service.begin()
    assert (service.mode, list(service.table)) == ("fine_tuned", ["*"])
    seen = []
    for name, asked in (
        ("b", None),
        ("base", None),
        ("a", None),
        ("a", "base"),
        ("b", None),
        ("b", "ab_test"),
        ("c", None),
    ):
        activate(name)
        try:
            service.reload(asked)
        except LoraError as error:
            assert "active_model 'c' is none of base, a, b" in str(error)
        seen.append((service.mode, list(service.table)))
    expected = [("fine_tuned", ["weston"]), ("base", []), ("fine_tuned", ["*"]), ("base", []), ("base", [])]
    assert seen == [*expected, ("ab_test", ["weston"]), ("ab_test", ["weston"])]


def test_an_unchanged_adapter_keeps_its_breaker_at_a_reload(monkeypatch, tmp_path, tiny_base):
    folder = make_adapter(tmp_path / "a", tiny_base, 1)
    monkeypatch.setattr(flags, "lora_path", str(folder))
    monkeypatch.setattr(flags, "model_mode", "fine_tuned")
    service = AdaptersInUse()
    service.begin()
    before = service.table["*"]
    before.breaker.since = "now"
    service.reload()
    assert service.table["*"] is before
    make_adapter(folder, tiny_base, 2)
    service.reload()
    assert service.table["*"] is not before and service.table["*"].breaker.since is None


def test_what_failed_to_load_is_loaded_again(monkeypatch, tmp_path, tiny_base):
    folder = make_adapter(tmp_path / "a", tiny_base, 1)
    monkeypatch.setattr(flags, "lora_path", str(folder))
    adapters = AdaptersInUse()
    with monkeypatch.context() as broken:
        broken.setattr("integration.lora_patch.in_use.find_sources", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapters.begin()
    adapters.begin()
    assert list(adapters.table) == ["*"] and adapters.mode == "base"  # there for requests that ask for it


def test_base_by_hand_takes_the_adapters_out(monkeypatch, tmp_path, tiny_base):
    monkeypatch.setattr(flags, "lora_path", str(make_adapter(tmp_path / "a", tiny_base, 1)))
    service = Answering(AdaptersInUse(), Recorder())
    service.adapters.begin()
    assert service.choose("1", "ansel", {"mode": "lora"}).model_used == "fine_tuned"
    service.adapters.reload("base")
    assert service.choose("1", "ansel", {"mode": "lora"}).model_used == "base"


def test_a_worker_knows_what_the_request_of_its_job_said(monkeypatch):
    """Its mode of the base counts only if the request named it: a service fills in its own default."""
    with serving(monkeypatch, [GOOD] * 9) as (service, adapter, run):
        service.adapters.mode = "ab_test"
        scope = Scope()
        scope_of_request.set(scope)
        service.note_request(["asked"], {"mode": "baseline"})
        service.note_request(["silent"], {"advisor": "ansel"})
        scope_of_request.set(None)
        is_worker.set(False)
        arms = {}
        for job_id, mode in (("asked", "baseline"), ("silent", "baseline"), ("unknown", "rag"), ("stored", "lora")):
            hooks.choose(job_id, "ansel", mode)
            run(JSON_PROMPT)
            job = job_of_request.get()
            arms[job_id] = job.model_used.removesuffix("_base").removesuffix("_fine_tuned")
        assert arms == {"asked": "base", "silent": "ab_test", "unknown": "ab_test", "stored": "fine_tuned"}
        assert [job.id for job in scope.jobs] == ["asked", "silent"] and not service.requests
        for number in range(3000):
            service.note_request([str(number)], {"mode": "lora"})
        assert len(service.requests) == 1000 and "2999" in service.requests
        scope_of_request.set(None)
        is_worker.set(False)

"""The service's requests answered by this package's own generation: the same as mlx-vlm's, and what is left to it."""

import logging
import subprocess
import sys
import threading
import time

import mlx_vlm
import pytest
from PIL import Image

from integration.lora_patch import engine, hooks, vlm
from integration.lora_patch.adapters import read_adapter
from integration.lora_patch.answering import Answering
from integration.lora_patch.arms import Breaker, job_of_request
from integration.lora_patch.flags import flags
from integration.lora_patch.in_use import AdaptersInUse
from integration.lora_patch.jobs import Recorder
from integration.lora_patch.language_model import Batch
from integration.lora_patch.sources import adapter_in
from integration.lora_patch.vlm import special_tokens
from tests.sample.make_tree import sample_prompt
from tests.standin.running import make_adapter

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return mlx_vlm.load(str(tiny_base))


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter") / "qwen3-vl-4b-lora-ansel", tiny_base, 1)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.radial_gradient("L").convert("RGB").resize((200, 150)).save(path)
    return str(path)


@pytest.fixture
def service(loaded, folder, monkeypatch):
    """A service in this process, whose jobs are answered with the adapter unless their mode is base."""
    service = Answering(AdaptersInUse(), Recorder())
    adapters = service.adapters
    adapters.started, adapters.mode = True, "fine_tuned"
    adapters.table = {"*": read_adapter(adapter_in(folder))}
    adapters.table["*"].breaker = Breaker(20, 1.0)
    monkeypatch.setattr(hooks, "service", service)
    for name, value in {"use_fine_tuned": True, "fallback_on_invalid": False}.items():
        monkeypatch.setattr(flags, name, value)
    adapters.adopt(*loaded, None)
    job_of_request.set(None)
    yield service
    job_of_request.set(None)


def formatted(loaded, text, photos=1):
    return mlx_vlm.apply_chat_template(loaded[1], loaded[0].config, text, num_images=photos)


def ask(function, arm, *args, **kwargs):
    """Ask as a service does whose job has this arm."""
    hooks.service.adapters.mode = arm
    hooks.choose("job", "ansel")
    found = hooks.generation(function)(*args, **kwargs)
    return found if function is mlx_vlm.generate else list(found)


@pytest.mark.parametrize("arm", ["base", "fine_tuned"])
@pytest.mark.parametrize("photos", [0, 1, 2])
def test_answers_are_those_of_mlx_vlm(arm, photos, service, loaded, folder, photo, tiny_base):
    model, processor = loaded
    theirs = mlx_vlm.load(str(tiny_base), adapter_path=str(folder) if arm == "fine_tuned" else None)
    theirs[0].eval()
    prompt, images = formatted(loaded, sample_prompt("ansel"), photos), [photo] * photos or None
    how = {"max_tokens": MAX_TOKENS, "temperature": 0.0}
    expected = mlx_vlm.generate(*theirs, prompt, images, **how)
    found = ask(mlx_vlm.generate, arm, model, processor, prompt, images, **how)
    for name in ("text", "token", "token_ids", "prompt_tokens", "generation_tokens", "finish_reason"):
        assert getattr(found, name) == getattr(expected, name), name
    pieces = ask(mlx_vlm.stream_generate, arm, model, processor, prompt, image=images, **how)
    theirs = list(mlx_vlm.stream_generate(*theirs, prompt, image=images, **how))
    assert [(p.text, p.token, p.finish_reason) for p in pieces] == [(p.text, p.token, p.finish_reason) for p in theirs]
    assert service.adapters.own.answered == 2 and not service.adapters.own.fallbacks
    health = hooks.service.adapters.health() | hooks.service.adapters.own.health()
    assert health["generation"]["in_use"] and health["generation"]["kernel"] == "no CUDA"
    assert health["adapters"]["*"]["applied"] == "merged"
    # this arm alone has answered; each answer's first token comes with the prefill
    assert list(health["generation"]["tokens_a_pass"]) == [{"fine_tuned": "adapter"}.get(arm, arm)]
    assert health["generation"]["tokens_a_pass"].popitem()[1] >= 1


def test_every_request_may_come_in_a_thread_of_its_own(service, loaded, photo):
    """MLX's streams belong to threads; a service's requests come in ever new ones."""
    prompt, seen = formatted(loaded, sample_prompt("ansel")), []

    def work(temperature):
        for function in (mlx_vlm.generate, mlx_vlm.stream_generate):
            for arm in ("base", "fine_tuned"):
                found = ask(function, arm, *loaded, prompt, [photo], max_tokens=4, temperature=temperature)
                texts = [piece.text for piece in found] if isinstance(found, list) else [found.text]
                seen.append((temperature, arm, "".join(texts)))

    for temperature in (0.0, 0.0, 1e-6):  # the last is mlx-vlm's to answer, over the same weights
        thread = threading.Thread(target=work, args=(temperature,))
        thread.start()
        thread.join()
    assert len(seen) == 12 and len({text for _, arm, text in seen if arm == "base"}) == 1
    assert service.adapters.own.answered == 8


def test_a_service_that_ends_while_it_answers_ends_at_once(tmp_path, tiny_base, folder, photo):
    """Neither an abort inside MLX (-6) nor a wait for the answer's end."""
    code = """if True:
        import sys, threading, time, mlx_vlm
        base, folder, photo = sys.argv[1:]
        from integration.lora_patch import engine, hooks, vlm
        from integration.lora_patch.flags import flags
        flags.lora_path, flags.model_mode, flags.fallback_on_invalid = folder, "fine_tuned", False
        model, processor = hooks.attach(mlx_vlm.load(base), base)
        prompt = mlx_vlm.apply_chat_template(processor, model.config, "Say much.", num_images=1)
        def work():
            pieces = hooks.generation(mlx_vlm.stream_generate)(
                model, processor, prompt, [photo], max_tokens=10**6, temperature=0.0)
            for piece in pieces:
                print("piece", flush=True)
        threading.Thread(target=work, daemon=True).start()
        sys.stdin.readline()
        sys.exit(3)
    """
    command = [sys.executable, "-c", code, str(tiny_base), str(folder), photo]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "piece\n"
    started = time.monotonic()
    _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 3 and time.monotonic() - started < 30, said


def test_the_two_arms_differ(service, loaded, photo):
    prompt = formatted(loaded, sample_prompt("ansel"))
    texts = {ask(mlx_vlm.generate, arm, *loaded, prompt, photo, max_tokens=8, temperature=0).text
             for arm in ("base", "fine_tuned")}  # fmt: skip
    assert len(texts) == 2


UNKNOWN = {
    "a temperature": ({"temperature": 0.7}, "sampling (a temperature other than 0)"),
    "the checkpoint's temperature": ({"temperature": None}, "sampling (a temperature other than 0)"),
    "a repetition penalty": ({"repetition_penalty": 1.2}, "the argument repetition_penalty"),
    "another size": ({"resize_shape": (64, 64)}, "the argument resize_shape"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_it_does_not_know_is_left_to_mlx_vlm_and_said_once(kind, service, loaded, photo, caplog):
    changed, reason = UNKNOWN[kind]
    how = {"max_tokens": 3, "temperature": 0.0} | changed
    how = {name: value for name, value in how.items() if value is not None}
    caplog.set_level(logging.INFO, "lora_patch")
    for _ in range(2):
        ask(mlx_vlm.generate, "fine_tuned", *loaded, formatted(loaded, "What is there?"), [photo], **how)
        assert job_of_request.get().model_used == "fine_tuned"  # by mlx-vlm, the adapter switched on
    assert [record.message for record in caplog.records].count(f"answered by mlx-vlm's own generation: {reason}") == 1
    health = service.adapters.own.health()["generation"]
    assert health["by_mlx_vlm"] == {reason: 2} and health["answered"] == 0
    assert list(service.adapters.table["*"].breaker.answers) == [False, False]


def test_prompts_of_another_form_and_functions_of_the_service_are_left_to_it(service, loaded, photo):
    prompt = formatted(loaded, "What?").replace(
        "<|im_start|>user", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    ask(mlx_vlm.generate, "base", *loaded, prompt, [photo], max_tokens=2, temperature=0.0)
    hooks.generation(lambda prompt: "an answer")("What?")
    assert dict(service.adapters.own.fallbacks) == {
        "a prompt that is not one user message in the chat template": 1,
        "<lambda> is a function of the service's": 1,
    }


def test_a_model_may_be_loaded_within_the_function_that_answers(service, loaded):
    """The first request of a service that has no loader of its own: the lock is held already."""

    @hooks.generation
    def run_model_mlx(full_prompt):
        hooks.attach(loaded)
        return "an answer"

    seen = []
    thread = threading.Thread(target=lambda: seen.append(run_model_mlx("What?")), daemon=True)
    thread.start()
    thread.join(30)
    assert seen == ["an answer"] and service.adapters.own.ways


@pytest.mark.parametrize("function", [mlx_vlm.generate, mlx_vlm.stream_generate])
def test_what_the_engine_fails_at_is_left_to_mlx_vlm(function, service, loaded, photo, monkeypatch):
    monkeypatch.setattr(service.adapters.own.engine, "stream", lambda *_: 1 / 0)
    prompt, how = formatted(loaded, "What is there?"), {"max_tokens": 2, "temperature": 0.0}
    ask(function, "fine_tuned", *loaded, prompt, [photo], **how)
    assert job_of_request.get().model_used == "fine_tuned" and job_of_request.get().problem is None
    assert dict(service.adapters.own.fallbacks) == {"the engine failed (ZeroDivisionError)": 1}
    with pytest.raises(ValueError, match="Failed to load image"):  # the service's own error, as without the engine
        ask(function, "base", *loaded, prompt, ["/nowhere.jpg"], **how)


def test_another_mlx_vlm_is_served_by_its_own_generation(service, loaded, photo, monkeypatch):
    monkeypatch.delattr("mlx_vlm.tokenizer_utils.make_streaming_detokenizer")
    service.adapters.adopt(*loaded, None)
    assert service.adapters.own.reason.startswith("this mlx-vlm is not known: cannot import name")


def test_another_model_type_is_served_by_mlx_vlm(loaded, service, monkeypatch):
    monkeypatch.setattr(loaded[0].config, "model_type", "gemma3")
    service.adapters.adopt(*loaded, None)
    assert service.adapters.own.reason == "the model's type is gemma3, not qwen3_vl"
    assert not service.adapters.own.health()["generation"]["in_use"]


TEXT = "Say <|im_end|> or <|image_pad|>."


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that works as plain operations do; the rows that it was given."""
    given = []

    class Kernel:
        def __init__(self, model):
            self.model = model

        def longest(self, rank):
            return 16

    def batch(kernel, layers, lora, rows):
        given.append(rows)
        return Batch(kernel.model, layers)

    monkeypatch.setattr(engine.decode_kernel, "refusal", lambda model: None)
    monkeypatch.setattr(engine, "DecodeKernel", Kernel)
    monkeypatch.setattr(engine, "KernelBatch", batch)
    return given


def test_a_kernel_is_compiled_before_the_first_request(service, loaded, kernel, caplog):
    caplog.set_level(logging.INFO, "lora_patch")
    service.adapters.adopt(*loaded, None)
    said = [record.message for record in caplog.records if "kernel" in record.message]
    version = service.adapters.table["*"].version
    assert len(said) == 2 and said[0].startswith("the GPU's kernel for the base is compiled in ")
    assert said[1].startswith(f"the GPU's kernel for {version} is compiled in ")
    assert kernel == [1, 1]
    health = service.adapters.own.health()["generation"]
    assert (health["kernel"], health["answered"], health["tokens_a_pass"]) == ("in use", 0, {})
    assert service.adapters.own.engine.paces == {}  # times with a compiler's in them are no measure
    warm_up = service.adapters.own.engine.warm_up
    for logits, batches in ((False, 1), (True, 2)):  # under --constrained the kernel returns its logits too
        kernel.clear()
        service.adapters.own.thread.submit(warm_up, tiny_row(service), None, logits).result()
        assert len(kernel) == batches


def tiny_row(service):
    encoded = vlm.encode(service.adapters.own.base, "A photograph.", [])
    return vlm.prepare_row(service.adapters.own.base, encoded)


def test_without_a_kernel_the_start_waits_for_nothing(service, loaded, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lora_patch")
    monkeypatch.setattr(engine.Engine, "_decode", lambda *_: 1 / 0)
    service.adapters.adopt(*loaded, None)
    assert service.adapters.own.reason is None
    assert not [record for record in caplog.records if "kernel" in record.message]


def test_a_kernel_that_fails_at_the_start_is_given_up(service, loaded, kernel, photo, monkeypatch, caplog):
    prompt, how = formatted(loaded, "What is there?"), {"max_tokens": 6, "temperature": 0.0}
    expected = ask(mlx_vlm.generate, "fine_tuned", *loaded, prompt, [photo], **how).text
    monkeypatch.setattr(engine, "KernelBatch", lambda *_: 1 / 0)
    caplog.set_level(logging.INFO, "lora_patch")
    service.adapters.adopt(*loaded, None)
    assert service.adapters.own.health()["generation"]["kernel"] == "it failed: division by zero"
    assert "the GPU's kernel for the base is not compiled: it failed: division by zero" in caplog.messages
    assert ask(mlx_vlm.generate, "fine_tuned", *loaded, prompt, [photo], **how).text == expected
    assert service.adapters.own.answered > 0 and not service.adapters.own.fallbacks


def test_names_of_special_tokens_in_a_text_are_text(service, loaded, photo, monkeypatch):
    """They would end the turn, or put the photograph in another place."""
    own = service.adapters.own
    rows = []
    make = own._row
    monkeypatch.setattr(own, "_row", lambda wanted: rows.append(make(wanted)) or rows[-1])
    ask(mlx_vlm.generate, "base", *loaded, formatted(loaded, TEXT), [photo], max_tokens=1, temperature=0.0)
    tokenizer = loaded[1].tokenizer
    ids = [int(i) for i in rows[0].input_ids]
    plain = [int(i) for i in make(own_wanted(own, loaded, "Say.", photo)).input_ids]
    for name in ("<|im_end|>", "<|image_pad|>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == plain.count(tokenizer.convert_tokens_to_ids(name))
    assert TEXT in tokenizer.decode(ids)


def own_wanted(own, loaded, text, photo):
    from integration.lora_patch.calls import Call

    arguments = (*loaded, formatted(loaded, text), [photo])
    return own.understand(Call(mlx_vlm.generate, arguments, {"temperature": 0.0}), None)


def test_names_of_special_tokens_are_broken_up_for_mlx_vlm(service, loaded, photo, monkeypatch):
    seen = []

    def generate(model, processor, prompt, image=None, audio=None, video=None, verbose=False, **kwargs):
        seen.append(prompt)
        return "{}"

    prompt = formatted(loaded, TEXT)
    ask(generate, "base", *loaded, prompt, [photo], temperature=0.9)
    assert seen[0] == prompt.replace("<|im_end|> or <|image_pad|>", "< |im_end|> or < |image_pad|>")
    assert "<|im_end|>" in special_tokens(service.adapters.own.base)


def test_a_constrained_answer_keeps_to_the_grammar(service, loaded, photo, monkeypatch):
    prompt, how = formatted(loaded, sample_prompt("ansel")), {"max_tokens": 24, "temperature": 0.0}
    free = ask(mlx_vlm.generate, "fine_tuned", *loaded, prompt, [photo], **how).text
    monkeypatch.setattr(flags, "constrained", True)
    bound = ask(mlx_vlm.generate, "fine_tuned", *loaded, prompt, [photo], **how).text
    assert bound.startswith('{"image_description":"') and not free.startswith("{")
    pieces = ask(mlx_vlm.stream_generate, "fine_tuned", *loaded, prompt, [photo], **how)
    assert "".join(piece.text for piece in pieces) == bound
    assert any(piece.text for piece in pieces[:-1])  # its text need not wait
    told = ask(mlx_vlm.generate, "base", *loaded, formatted(loaded, "What is there?"), [photo], **how).text
    assert not told.startswith("{")  # no analysis is asked for


def test_a_second_model_of_the_service_answers_as_it_is(service, loaded, tmp_path, make_tiny_model, photo):
    """One that the adapters do not fit: neither a refusal, nor an answer with an adapter, nor a job of its own."""
    folder = make_tiny_model(tmp_path / "captions", "--seed", "7")
    other = mlx_vlm.load(str(folder))
    assert hooks.attach(other, folder) is other and service.adapters.model is loaded[0]
    prompt, how = formatted(other, "What is there?"), {"max_tokens": 4, "temperature": 0.0}
    expected = mlx_vlm.generate(*other, prompt, [photo], **how).text
    assert ask(mlx_vlm.generate, "fine_tuned", *other, prompt, [photo], **how).text == expected
    assert not job_of_request.get().given and service.adapters.own.answered == 0
    ask(mlx_vlm.generate, "fine_tuned", *loaded, formatted(loaded, "What is there?"), [photo], **how)
    assert job_of_request.get().model_used == "fine_tuned" and service.adapters.own.answered == 1


def test_nothing_is_said_of_a_base_that_is_not_known_yet(folder):
    adapters = AdaptersInUse()
    adapters.fit({"*": read_adapter(adapter_in(folder))})
    assert not adapters.warned and adapters.model is None

"""A person's own photographs: base and adapter side by side, on the terminal and on a page."""

import io
import json
import re

import pytest
from rich.console import Console

from common.evaluation import tryout
from common.evaluation.tryout import Model, ModelAnswer, judged, make_task, show_result
from integration.lora_patch.prompts import read_specification
from tests.evaluation_case import evaluate, make_adapter, make_data
from tests.sample import scenes
from tests.sample.make_tree import sample_prompt

QUICK = ("--max_tokens", 12)


@pytest.fixture(scope="module")
def case(tiny_base, tmp_path_factory):
    """A folder with two versions of an adapter, their data, and a photograph that is not in it."""
    folder = tmp_path_factory.mktemp("try")
    data = make_data(folder)
    for name, seed in (("qwen3-vl-4b-lora-ansel", 1), ("qwen3-vl-4b-lora-ansel-v2", 2)):
        make_adapter(folder / "models" / name, tiny_base, data, b_scale=0.3, seed=seed)
    scenes.draw(scenes.Scene("boat", 0.5, 0.5, 0.5, 0.5, 2, False, 1), 96).save(folder / "me & you.jpg")
    return folder


def test_base_and_newest_version_answer_and_the_page_stands_alone(case):
    result = evaluate(
        "--photo", case / "me & you.jpg", "--lora_path", case / "models", "--output_report", case / "a/r.json", *QUICK
    )
    assert result.exit_code == 0, result.output
    assert re.search(r" base +v2 ", result.output) and f"Open {case / 'a/try.html'}" in result.output
    page = (case / "a/try.html").read_text()
    assert "data:image/jpeg;base64," in page and "me &amp; you.jpg" in page and "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "You are Ansel Adams" in page  # the prompt


def test_versions_are_compared_with_one_another(case):
    result = evaluate(
        *("--photo", case / "me & you.jpg", "--photo", case / "me & you.jpg", "--versions", "v1,v2"),
        *("--lora_path", case / "models", "--output_report", case / "b/r.json", *QUICK),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r" v1 +v2 ", result.output) and not re.search(r" base ", result.output)
    assert (case / "b/try.html").read_text().count("<img ") == 2


def test_the_version_in_use_comes_before_a_newer_one(case, monkeypatch):
    monkeypatch.setattr(tryout, "deployed_folder", lambda record: case / "models/qwen3-vl-4b-lora-ansel")
    task = make_task(case / "models", "ansel", None, None, None, "auto")
    assert [model.name for model in task.models] == ["base", "v1"]
    assert task.prompt == sample_prompt("ansel") and task.max_image_size == 128 and task.max_tokens == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--photo", "gone.jpg"), "gone.jpg: no such photograph"),
        (("--versions", "v1,v7"), "no v7 of ansel; there are v1, v2"),
        (("--advisor", "weston"), "advisors with an adapter: ansel"),
        (("--lora_path", "nowhere"), "nowhere: no such folder; train an adapter first"),
    ],
)
def test_what_is_missing_is_named_in_one_line(case, arguments, message):
    given = {"--photo": case / "me & you.jpg", "--lora_path": case / "models"} | dict([arguments])
    result = evaluate(*(part for pair in given.items() for part in pair), *QUICK)
    assert result.exit_code == 1 and message in result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_without_a_photograph_an_adapter_must_be_named():
    result = evaluate()
    assert result.exit_code == 2 and "Missing option '--lora_path'" in result.output


def test_scores_stand_in_columns_and_a_broken_answer_says_why(capsys):
    answers, prompt = [], read_specification(sample_prompt("ansel"))
    critique = scenes.critique(scenes.Scene("boat", 0.9, 0.9, 0.9, 0.9, 2, False, 1))
    for name, text in (("base", f"```json\n{json.dumps(critique)}\n```"), ("v1", json.dumps(critique)), ("v2", "no")):
        answers.append(judged(Model(name, None), text, 1.25, prompt))
    assert [bool(answer.problem) for answer in answers] == [True, False, True]
    show_result(tryout.Path("me.jpg"), answers)
    shown = capsys.readouterr().out
    lighting = next(line for line in shown.splitlines() if line.split()[:1] == ["Lighting"])
    score = f"{critique['dimensions'][1]['score']}"
    assert lighting.split()[1:] == [score, score, "-"]
    assert "v2: not in the service's format" in shown and "\x1b" not in shown
    assert isinstance(answers[0], ModelAnswer) and max(map(len, shown.splitlines())) <= 100


def test_on_a_terminal_the_answers_are_shown_while_they_are_written(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, height=20)
    monkeypatch.setattr("rich.console.Console", lambda: terminal)
    task = tryout.Trial((Model("base", None), Model("v1", None)), "base", "prompt", None, 64, 9)
    answers = tryout.show_live(tryout.Path("me.jpg"), task, lambda model, photo: iter([model.name, " says", " this"]))
    assert [answer.text for answer in answers] == ["base says this", "v1 says this"]
    assert "base says this" in screen.getvalue() and "v1 says" in screen.getvalue()

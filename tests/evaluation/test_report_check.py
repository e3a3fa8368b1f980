"""A report that a hand has spoilt ends in one line that says where, never in a traceback."""

import json
import random

import pytest

from common.errors import UserError
from common.evaluation.comparison import read_report, recomputed
from common.evaluation.gates import DEFAULT_GATES
from common.evaluation.report_check import report_fault
from tests.fuzz.damage import damaged_json


@pytest.fixture(scope="module")
def whole(worked) -> dict:
    return json.loads((worked[0] / "evaluation" / "comparison_report.json").read_text(encoding="utf-8"))


def test_a_whole_report_has_no_fault(whole):
    assert report_fault(whole) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["examples"][1].pop("loss"), "examples[1]: loss missing"),
        (lambda r: r["examples"][0].update(prompt="x"), "examples[0]: its prompt is not among the prompts"),
        (lambda r: r["examples"][0]["outputs"].pop("base"), "examples[0]: outputs are not of the report's arms"),
        (lambda r: r["examples"][0]["outputs"]["base"][0].pop("text"), "examples[0].outputs.base: text missing"),
        (lambda r: r["timings"][0].update(seconds="2"), 'timings[0]: seconds is "2"; a number above 0 was expected'),
        (lambda r: r["examples"][0]["loss"]["base"].update(tokens=0), "examples[0].loss.base: tokens is 0; a whole"),
        (lambda r: r["examples"][2]["outputs"].update(candidate=[]), "examples[2].outputs.candidate: none, though"),
        (lambda r: r["timings"][0].update(free={"seconds": 1}), "timings[0].free: first_token_seconds, tokens missing"),
        (lambda r: r["prompts"]["prompt-1"].update(specification={}), "prompts.prompt-1: no prompt specification"),
        (lambda r: r.update(arms=[]), "arms is a list; an object was expected"),
        (lambda r: r["arms"].pop("base"), "arms: base and candidate are needed"),
    ],
)
def test_damage_is_named(whole, tmp_path, change, says):
    report = json.loads(json.dumps(whole))
    change(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError) as error:
        read_report(tmp_path / "report.json")
    assert error.value.message.startswith(f"{tmp_path}/report.json: {says}")


def test_damage_at_random(whole, tmp_path):
    dice, path, text, ends = random.Random(5), tmp_path / "report.json", json.dumps(whole), []
    for _ in range(12):
        path.write_text(damaged_json(dice, text), encoding="utf-8", errors="surrogatepass")
        try:
            recomputed(read_report(path), DEFAULT_GATES)
            ends.append("read")
        except UserError as error:
            assert "\n" not in error.message
            ends.append("refused")
    assert {*ends} == {"read", "refused"}

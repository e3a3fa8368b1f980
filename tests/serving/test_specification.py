"""One specification checks an answer and writes one, and the two agree for every form that a prompt can ask for."""

import json
from dataclasses import replace

import pytest

from integration.lora_patch.prompts import read_specification
from integration.lora_patch.specification import DIMENSIONS7, Field, PromptSpecification
from tests.mondrian_case import analysis
from tests.serving.test_prompts import SIX, example

OBJECT = json.dumps(
    {
        "image_description": "What is seen",
        "dimensional_analysis": {
            name: {"score": "8/10", "comment": "What works", "recommendation": "What to do"}
            for name in ("composition", "lighting", "focus_sharpness")
        },
        "overall_grade": "8.1/10",
    }
)


@pytest.mark.parametrize("prompt", [example(SIX), example(SIX, 7.0), example(SIX, "7/10"), example(SIX, "7"), OBJECT])
def test_what_is_written_is_compliant_and_comes_back(prompt):
    specification = read_specification(prompt)
    answer = specification.render(analysis(3))
    assert specification.check(answer) == []
    assert specification.check(answer.replace("overall", "over_all")) != []
    assert PromptSpecification.from_dict(json.loads(json.dumps(specification.to_dict()))) == specification


def test_an_answer_has_the_prompts_keys_scores_and_spelling():
    specification = read_specification(OBJECT)
    dimensions = {d["name"]: d for d in analysis(1)["dimensions"]}
    written = json.loads(specification.render(analysis(1)))
    assert list(written) == ["image_description", "dimensional_analysis", "overall_grade"]
    assert written["dimensional_analysis"]["focus_sharpness"] == {
        "score": f"{dimensions['Focus & Sharpness']['score']}/10",
        "comment": dimensions["Focus & Sharpness"]["comment"],
        "recommendation": dimensions["Focus & Sharpness"]["recommendation"],
    }
    decimal = read_specification(example(SIX, 7.0)).render(analysis(1))
    assert f'"score":{dimensions["Composition"]["score"]}.0' in decimal and '"overall_score":' in decimal


def test_a_dimension_may_be_named_under_another_key():
    specification = read_specification(example(SIX).replace('"name"', '"dimension"').replace('"comment"', '"feedback"'))
    written = json.loads(specification.render(analysis(1)))
    assert [list(d) for d in written["dimensions"]] == [["dimension", "score", "feedback", "recommendation"]] * 6
    assert specification.check(json.dumps(written)) == []


def test_keys_beyond_the_usual_travel():
    prompt = "quote_id is OPTIONAL." + example(SIX, case_studies=["IMG_1"]).replace(
        '"score"', '"quote_id": "Q", "score"'
    )
    specification = read_specification(prompt)
    source = analysis(2, case_studies=["IMG_2"])
    source["dimensions"][0]["quote_id"] = "QUOTE_1"
    written = json.loads(specification.render(source))
    assert written["case_studies"] == ["IMG_2"] and written["dimensions"][0]["quote_id"] == "QUOTE_1"
    assert specification.check(json.dumps(written)) == []
    del source["case_studies"], source["dimensions"][1]["comment"]
    assert specification.lacking(source) == ["case_studies", "Lighting's comment"]
    assert specification.check(specification.render(source))[0] == "case_studies is missing"


def test_projection_recomputes_the_overall_score():
    specification = PromptSpecification(SIX)
    result, dropped = specification.project(analysis(1))
    assert dropped and tuple(d["name"] for d in result["dimensions"]) == SIX
    scores = [d["score"] for d in result["dimensions"]]
    assert abs(result["overall_score"] - sum(scores) / 6) <= 0.05 + 1e-9
    same, dropped = PromptSpecification().project(analysis(1))
    assert not dropped and same == analysis(1)
    with pytest.raises(KeyError, match="Mood"):
        PromptSpecification(("Mood",)).project(analysis(1))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"technical_notes": ""}, "technical_notes is not a text, or empty"),
        ({"key_strengths": "one"}, "key_strengths is not a list of texts, or empty"),
        ({"overall_score": 12}, "overall_score is not a number from 1 to 10"),
        ({"overall_score": True}, "overall_score is not a number from 1 to 10"),
        ({"mood": "calm"}, "mood is no key of an analysis"),
        ({"dimensions": "none"}, "dimensions is not a list of objects"),
        ({"dimensions": analysis(1)["dimensions"][::-1]}, "dimensions are not the 7 asked for, in their order"),
        ({"dimensions": [{**d, "score": 7.5} for d in analysis(1)["dimensions"]]}, "Composition: the score is not"),
        ({"dimensions": [{**d, "comment": " "} for d in analysis(1)["dimensions"]]}, "Composition: comment is not"),
        ({"dimensions": [{**d, "mood": "x"} for d in analysis(1)["dimensions"]]}, "Composition: keys are not name"),
    ],
)
def test_strict_reading(change, problem):
    found = PromptSpecification().check(json.dumps(analysis(1, **change)))
    assert found and found[0].startswith(problem)


def test_the_object_stands_alone():
    answer = PromptSpecification().render(analysis(1))
    assert PromptSpecification().check(answer) == []
    assert PromptSpecification().check(f"```json\n{answer}\n```") != []
    assert PromptSpecification().check(f"<thinking>Hm.</thinking>\n{answer}") != []
    assert replace(PromptSpecification(), thinking=True).check(f"<thinking>Hm.</thinking>\n{answer}") == []
    assert PromptSpecification().check('{"overall_score": NaN}') == ["not a JSON object alone: NaN is no JSON number"]
    assert PromptSpecification().check('{"a":' * 90_000) != []
    assert PromptSpecification().check('{"a":' * 900 + "1" + "}" * 900) == ["not a JSON object"]
    decimal = replace(PromptSpecification(), fields=(Field("overall_score", "decimal"),))
    assert decimal.check('{"overall_score": 7.0}') == [] and decimal.check('{"overall_score": 7}') != []


@pytest.mark.parametrize(
    "damage",
    [
        {"dimensions": 5}, {"dimensions": []}, {"fields": None},
        {"fields": [{"name": "x", "kind": "y", "required": 1}]},
        {"fields": [{"name": "x", "kind": [], "required": 1}]}, {"example_scores": ["x"]}, {"example_overall": "x"},
    ],
)  # fmt: skip
def test_a_damaged_record_is_told(damage):
    whole = PromptSpecification(DIMENSIONS7).to_dict()
    assert PromptSpecification.from_dict(whole) == PromptSpecification()
    for value in (whole | damage, [], None, {}):
        with pytest.raises(ValueError, match="no prompt specification"):
            PromptSpecification.from_dict(value)

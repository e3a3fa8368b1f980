"""The range of scores is read from what prompts say of scores, and from nothing else that they say."""

import pytest

from integration.lora_patch.analysis import number, parse_lenient
from integration.lora_patch.answers import analysis_problem
from integration.lora_patch.errors import LoraError
from integration.lora_patch.grammar import answer_schema
from integration.lora_patch.prompts import DEFAULT_SYSTEM_PROMPT, read_specification, told_range
from integration.lora_patch.score_range import parse_score_range, read_score_range
from integration.lora_patch.specification import PromptSpecification
from tests.mondrian_case import analysis
from tests.serving.test_prompts import HTML, SIX, example

BANDS = "Scoring:\n- 90-100: exceptional\n- 75-89: strong\n- 60-74: average\n- 0-59: weak\n"


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("Rate each dimension on a scale of 0 to 100.", (0, 100)),
        ("Scores are whole numbers between 0 and 100", (0, 100)),
        ('{"score": <1-5>, "comment": "2-3 sentences"}', (1, 5)),
        ("Give each dimension a rating out of 5 stars.", (1, 5)),
        ("Give 1 to 5 stars.", (1, 5)),
        ("Rate from one to five.", (1, 5)),
        ("Rate on a five-point scale.", (1, 5)),
        ("Scores must be decimals between 0.0 and 1.0.", (0, 1)),
        ("Score in [0, 100].", (0, 100)),
        ("Give a score out of 100.", (0, 100)),
        ("The maximum score is 100.", (0, 100)),
        ("Grade: X/20", (0, 20)),
        (BANDS, (0, 100)),
        ("Score it, where 1 is poor and 7 is excellent.", (1, 7)),
        ("Score as a percentage (0-100%).", (0, 100)),
        ("Score range is 3-10, NOT 7-10. Most 6-8, reserve 9-10. Reduce scores by 2-3 points.", (1, 10)),
        ("All scores must be integers from 1-10.\nBe Ansel.\n- 9-10: rare\n- 0-8: the rest", (1, 10)),
        ("Most scores should be 6-8.", None),
        ("Reduce scores by 2-3 points.", None),
        ("Score what you see. Use f/8, 1/100s, and 2-3 sentences; stand 3-5 feet away.", None),
        ("Provide 2-3 specific actions to enhance scale.", None),
    ],
)
def test_what_prompts_say_of_scores(says, found):
    assert read_score_range(says) == found


def test_the_scores_of_the_example_decide():
    assert told_range(DEFAULT_SYSTEM_PROMPT) == told_range(HTML) == (1, 10)
    assert told_range("Judge." + example(SIX, 85, overall_score=85)) == (0, 100)
    assert told_range("Judge." + example(SIX, 0.8, overall_score=0.8)) == (0, 1)
    assert told_range("Judge. Score 1-5." + example(SIX, 8)) is None
    assert read_specification("Judge." + example(SIX, 8)).score_range == (1, 10)


def test_an_option_names_the_range():
    assert read_specification("Judge." + example(SIX, 8), None, "0-100").score_range == (0, 100)
    assert parse_score_range(" 0.0 to 1.0 ") == (0, 1)
    with pytest.raises(LoraError, match="--score_range 9: write the lowest and the highest score"):
        parse_score_range("9")


@pytest.mark.parametrize(
    ("text", "highest", "found"),
    [("8/10", 10, 8), ("8.5", 10, 8.5), ("4/5", 5, 4), ("4 out of 5 stars", 5, 4), ("85%", 100, 85), ("4/5", 10, None)],
)
def test_scores_as_texts(text, highest, found):
    assert number(text, highest) == found


@pytest.mark.parametrize(("score", "says"), [(85, ""), ("85/100", ""), (0.8, ""), (4, "Scores: 1-5."), ("4/5", "")])
def test_answers_in_another_range(score, says):
    overall = score if isinstance(score, str) else float(score)
    specification = read_specification(says + example(SIX, score, overall_score=overall))
    low, high = specification.score_range
    whole = analysis(3)
    for item in whole["dimensions"]:
        item["score"] = round(item["score"] * high / 10, 2) if high == 1 else max(1, int(item["score"] * high / 10))
    whole["overall_score"] = round(high * 0.6, 2)
    answer = specification.render(whole)
    assert specification.check(answer) == []
    assert specification.points(high) == 10
    written = next(field for field in specification.dimension_fields if field.name == "score")
    assert f"from {low:g} to {high:g}" in written.fault(high * 2, specification.score_range)
    found, _ = parse_lenient(answer, highest=high)
    assert [d["score"] for d in found["dimensions"]] == [
        d["score"] for d in specification.project(whole)[0]["dimensions"]
    ]
    assert PromptSpecification.from_dict(specification.to_dict()) == specification


def test_records_from_before_ranges_mean_1_to_10():
    record = PromptSpecification().to_dict()
    del record["score_range"]
    assert PromptSpecification.from_dict(record) == PromptSpecification()
    for wrong in ([1], [10, 1], ["1", "10"]):
        with pytest.raises(ValueError, match="no prompt specification"):
            PromptSpecification.from_dict(PromptSpecification().to_dict() | {"score_range": wrong})


def test_the_service_lets_a_wider_range_pass():
    percent = "Scores: 0-100." + example(SIX, 85)
    assert analysis_problem(example(SIX, 85), percent) is None
    assert analysis_problem(example(SIX, 850), percent) == "no scored dimensions"
    assert analysis_problem(example(SIX, 85), "Score the dimensions.") == "no scored dimensions"


def test_the_grammar_has_the_prompts_keys_and_scores():
    specification = read_specification("Scores: 0-100." + example(SIX, "85/100"))
    schema = answer_schema(specification)
    assert list(schema["properties"]) == ["image_description", "dimensions", "overall_score"]
    first = schema["properties"]["dimensions"]["prefixItems"][0]["properties"]
    assert first["name"] == {"const": "Composition"} and "100/100" in first["score"]["enum"]
    percent = answer_schema(read_specification("Scores: 0-100." + example(SIX, 85)))
    scored = percent["properties"]["dimensions"]["prefixItems"][0]["properties"]["score"]
    assert scored == {"type": "integer", "minimum": 0, "maximum": 100}

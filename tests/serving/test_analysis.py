"""The canonical analysis: every shape in, one shape out, nothing invented; objects in a text."""

import json

import pytest

from integration.lora_patch.analysis import AnalysisError, canonical, parse_lenient
from integration.lora_patch.json_text import find_objects
from integration.lora_patch.specification import canonical_name
from tests.mondrian_case import analysis


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("ColorHarmony", "Color Harmony"),
        ("focus_sharpness", "Focus & Sharpness"),
        ("Focus and Sharpness", "Focus & Sharpness"),
        ("Colour harmony", "Color Harmony"),
        ("depthPerspective", "Depth & Perspective"),
        ("VISUAL BALANCE", "Visual Balance"),
        ("Cultural  Respect", "Cultural Respect"),
    ],
)
def test_names(written, name):
    assert canonical_name(written) == name


def test_a_whole_analysis_stays_as_it_is():
    assert canonical(analysis(3)) == (analysis(3), [])


def test_the_object_shape_becomes_the_list():
    source = {
        "dimensional_analysis": {
            name: {"score": "8/10", "comment": f"About {name}.", "recommendation": "Try it."}
            for name in ("composition", "focus_sharpness")
        },
        "overall_grade": "7.5/10",
        "image_description": "A ridge.",
    }
    result, mends = canonical(source)
    assert result == {
        "image_description": "A ridge.",
        "dimensions": [
            {"name": "Composition", "score": 8, "comment": "About composition.", "recommendation": "Try it."},
            {"name": "Focus & Sharpness", "score": 8, "comment": "About focus_sharpness.", "recommendation": "Try it."},
        ],
        "overall_score": 7.5,
    }
    assert mends == ["score_text"]


def test_nothing_is_invented():
    bare = {"dimensions": [{"name": "Lighting", "score": 6.5}], "overall_score": "B+"}
    assert canonical(bare) == ({"dimensions": [{"name": "Lighting", "score": 6.5}]}, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"tonal_range": "wide", "composition": "good"}, "no_scores"),
        ({"dimensions": None}, "no_scores"),
        ({"image_description": "", "dimsions": []}, "misspelt_json"),
        ({"dimensions": [{"name": "Lighting"}]}, "missing_score"),
        ({"dimensions": [{"name": "Lighting", "scroe": 7}]}, "missing_score"),
        ({"dimensions": [{"name": "Lighting", "score": True}]}, "missing_score"),
        ({"dimensions": [{"name": "Lighting", "score": float("inf")}]}, "missing_score"),
        ({"dimensions": [{"score": 7}]}, "misspelt_json"),
        ({"dimensions": ["Lighting"]}, "misspelt_json"),
    ],
)
def test_what_is_no_analysis_says_why(value, reason):
    with pytest.raises(AnalysisError) as error:
        canonical(value)
    assert error.value.reason == reason


def test_objects_in_a_text():
    text = 'Say {"a": 1,} or {broken} or {"b": "}"} and {"c": {"d": [1, 2,]}}'
    assert [(value, mends) for value, mends, _, _ in find_objects(text)] == [
        ({"a": 1}, ["trailing_comma"]),
        ({"b": "}"}, []),
        ({"c": {"d": [1, 2]}}, ["trailing_comma"]),
    ]


@pytest.mark.parametrize(
    "text", ['{"a":' * 40_000, "{" * 200_000, '{"a":{"b":1,,}' * 15_000, '{"a":"\\' * 30_000, "[" * 200_000]
)
def test_hostile_texts_end_soon(text):
    assert parse_lenient(text) == (None, [])


def test_lenient_reading_names_its_mends():
    text = "Here:\n```json\n" + json.dumps(analysis(2)).replace("}]", "},]").replace("ridge", "rid\nge") + "\n```"
    result, mends = parse_lenient(text)
    assert result["dimensions"] == analysis(2)["dimensions"]
    assert mends == ["text_around", "trailing_comma", "raw_control_characters"]

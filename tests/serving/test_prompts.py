"""The prompt is the service's, and what it demands of an answer is read from it, whichever form its example has."""

import json
import sqlite3

import pytest

from integration.lora_patch.errors import LoraError
from integration.lora_patch.prompts import (
    DEFAULT_SYSTEM_PROMPT,
    UnreadablePrompt,
    build_prompt,
    demands_html,
    read_prompts,
    read_specification,
)
from integration.lora_patch.specification import DIMENSIONS7, DIMENSIONS8, KEYS

SIX = tuple(name for name in DIMENSIONS7 if name != "Color Harmony")
HTML = """You MUST output clean, valid HTML. <div class="feedback-card">
<h3>Composition <span class="dimension-score">(8/10)</span></h3>
<h3>Focus & Sharpness <span class="dimension-score">(9/10)</span></h3>
<h3>Mood <span class="dimension-score">(7/10)</span></h3>
<p class="overall-grade"><strong>8.1/10</strong></p> as <AdvisorName> would"""


def example(names: tuple[str, ...], score: object = 7, **more) -> str:
    listed = [{"name": name, "score": score, "comment": "What works", "recommendation": "What to do"} for name in names]
    fields = {"image_description": "What is seen", "dimensions": listed, "overall_score": 6.8}
    return json.dumps({**fields, **more}, indent=2)


def test_the_prompt_is_built_byte_for_byte():
    assert build_prompt("You judge as <AdvisorName>.\n", "weston", "See form.\n") == (
        "You judge as weston.\n\n\nSee form.\n\n\nAnalyze the provided image."
    )


def test_the_built_in_prompt():
    found = read_specification(DEFAULT_SYSTEM_PROMPT)
    assert (found.dimensions, found.example_scores, found.example_overall) == (DIMENSIONS7, (), None)
    assert tuple(field.name for field in found.fields) == KEYS
    assert [(field.name, field.kind) for field in found.dimension_fields][1] == ("score", "whole")
    assert not demands_html(DEFAULT_SYSTEM_PROMPT)


def test_the_html_example():
    found = read_specification(HTML)
    assert found.dimensions == ("Composition", "Focus & Sharpness", "Mood")
    assert (found.example_scores, found.example_overall) == ((8, 9, 7), 8.1)
    assert demands_html(HTML)


TASKS = "\n".join(f"TASK {i} - {name}: change it.\n  USE: light\n" for i, name in enumerate(SIX, 1))
BOLD = "\n".join(f"{i}. **{name}** - CHANGE it. AVOID: mood, light." for i, name in enumerate(SIX, 1))
RULES = "\n## RULES\n1. Each recommendation = UNIQUE action\n2. Scores: 3-10 range\n3. **Mood** - none\n"
BULLETS = "Dimensions:\n" + "\n".join(f"- {name}: see it" for name in SIX) + "\nRules:\n- Scores: whole\n"
COMMAS = f"Judge along six dimensions: {', '.join(SIX[:-1])} and {SIX[-1]}. Be brief, kind, and clear.\n"
HEADINGS = "\n".join(f"### {name}\nLook at it.\n" for name in SIX)
ADVISOR = "\nYou are Ansel.\n1. **Tonal Range** - tones\n2. **Composition** - lines\n3. **Light** - direction\n"


@pytest.mark.parametrize("shown", [1, 3, 6])
@pytest.mark.parametrize(
    "listed", [TASKS, BOLD, BULLETS, COMMAS, HEADINGS], ids=["tasks", "bold", "bullets", "commas", "headings"]
)
def test_dimensions_that_the_text_lists_and_the_example_does_not(listed, shown):
    prompt = f"Analyze ONE photo along 6 INDEPENDENT dimensions.\n{listed}{RULES}{example(SIX[:shown])}{ADVISOR}"
    assert read_specification(prompt).dimensions == SIX
    assert read_specification(prompt.replace("6 INDEPENDENT", "INDEPENDENT")).dimensions == SIX


def test_an_example_that_is_cut_short():
    elided = example(SIX[:1]).replace("}\n  ]", "},\n    ...\n  ]")
    assert read_specification(COMMAS + elided).dimensions == SIX
    stub = 'First:\n{"image_description": "...", "dimensions": [...]}\nStructure:\n'
    assert read_specification(stub + example(DIMENSIONS7)).dimensions == DIMENSIONS7
    assert read_specification(COMMAS + '{"dimensions": [...], "overall_score": 7.4}').dimensions == SIX


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("Judge." + example(SIX[:1]) + ADVISOR, "does not say which dimensions it asks for and its example shows Comp"),
        ("Judge along 6 dimensions." + example(SIX[:3]), "asks for 6 dimensions and its example shows Composition, L"),
        ("Judge.", "does not say which dimensions it asks for and shows none"),
    ],
)
def test_a_prompt_that_does_not_tell_asks_for_the_option(prompt, says):
    with pytest.raises(UnreadablePrompt, match=says) as error:
        read_specification(prompt)
    assert "--dimensions NAME,NAME" in str(error.value) and "\n" not in str(error.value)
    assert read_specification(prompt, "composition, Lighting,Mood").dimensions == ("Composition", "Lighting", "Mood")
    assert read_specification(prompt, "8").dimensions == DIMENSIONS8


@pytest.mark.parametrize("dimensions", ["6", ",", "Mood,mood ,Mood"])
def test_dimensions_that_are_none(dimensions):
    with pytest.raises(LoraError, match="--dimensions"):
        read_specification("Judge.", dimensions)


def test_keys_and_the_form_of_scores():
    prompt = "Scores: 7.0 (NEVER 7). NOTE: quote_id is OPTIONAL.\n" + example(SIX, 7.0, case_studies=[{"id": "IMG_1"}])
    prompt = prompt.replace('"score": 7.0,', '"score": 7.0,\n "quote_id": "Q",', 1).replace(
        "overall_score", "overall_grade"
    )
    found = read_specification(prompt)
    assert [(f.name, f.kind, f.required) for f in found.fields] == [
        ("image_description", "text", True),
        ("dimensions", "list", True),
        ("overall_grade", "decimal", True),
        ("case_studies", "any", True),
    ]
    assert [(f.name, f.kind, f.required) for f in found.dimension_fields] == [
        ("name", "text", True),
        ("score", "decimal", True),
        ("quote_id", "text", False),
        ("comment", "text", True),
        ("recommendation", "text", True),
    ]
    assert found.extra_keys == {"case_studies", "quote_id"}


@pytest.mark.parametrize(
    ("score", "kind"), [(7, "whole"), (7.5, "number"), (7.0, "decimal"), ("7/10", "of_ten"), ("7", "quoted")]
)
def test_how_a_score_is_written(score, kind):
    found = read_specification(example(SIX, score))
    assert found.dimension_fields[1].kind == kind
    assert found.example_scores == (float(str(score).split("/")[0]),) * 6


def test_prompts_are_read_as_text_or_blob_and_may_be_absent():
    connection = sqlite3.connect(":memory:")
    assert read_prompts(connection, "ansel") == (None, None)
    connection.executescript("CREATE TABLE config (key TEXT, value); CREATE TABLE advisors (id TEXT, prompt TEXT)")
    connection.execute("INSERT INTO config VALUES ('system_prompt', ?)", ("Größe\n".encode(),))
    connection.execute("INSERT INTO advisors VALUES ('ansel', 'See light.')")
    assert read_prompts(connection, "ansel") == ("Größe\n", "See light.")
    assert read_prompts(connection, "nobody").advisor_prompt is None

"""Intervals, judgement and figures on inputs whose right answer is known."""

import json

import numpy as np
import pytest
from scipy import stats

from common.analysis import DIMENSIONS7, compact_json
from common.evaluation import intervals
from common.evaluation import scoring as judge
from common.evaluation.gates import DEFAULT_GATES, decide, failed, format_value, load_gates
from integration.lora_patch.repetition import repeated_tail

NAN = float("nan")


def analysis(score: int = 7) -> dict:
    dimension = {"score": score, "comment": "The light falls well.", "recommendation": "Wait for evening."}
    return {
        "image_description": "A lake under clouds.",
        "dimensions": [{"name": name, **dimension} for name in DIMENSIONS7],
        "overall_score": float(score),
        "key_strengths": ["Light"],
        "priority_improvements": ["Depth"],
        "technical_notes": "Fine grain.",
    }


# -- intervals --------------------------------------------------------------------------------------------------------


def test_mean_leaves_out_what_was_not_measured():
    figure = intervals.mean(np.array([1.0, NAN, 3.0]))
    assert (figure.value, figure.n) == (2.0, 2)
    assert (figure.low, figure.high) == (1.0, 3.0)


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(5, 2, 400)
    figure = intervals.mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert figure.low == pytest.approx(values.mean() - half, abs=0.03)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_interval_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(2)
    figures = [intervals.mean(rng.normal(0, 1, 40)) for _ in range(200)]
    covered = sum(figure.low <= 0 <= figure.high for figure in figures)
    assert 175 <= covered <= 199


def test_share_of_twelve_of_twelve_keeps_its_doubt():
    figure = intervals.share(np.ones(12))
    assert figure.value == figure.high == 1.0
    assert figure.low == pytest.approx(0.025 ** (1 / 12))  # Clopper-Pearson's closed form for all successes


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(3)
    x, y = rng.integers(1, 11, 50).astype(float), rng.integers(1, 11, 50).astype(float)
    assert intervals.rank_correlation(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_rank_correlation_of_a_constant_is_not_defined():
    assert intervals.rank_correlation(np.full(9, 7.0), np.arange(9.0)).value is None


def test_ratio_weights_by_tokens():
    figure = intervals.ratio(np.array([10.0, 300.0]), np.array([10.0, 100.0]))
    assert figure.value == pytest.approx(310 / 110)


def test_pairs_drawn_twice_are_no_pair_with_themselves():
    likeness = np.array([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0]])
    figure = intervals.pairs_mean(likeness)
    assert figure.value == pytest.approx(0.2)
    assert figure.high == pytest.approx(0.2)


# -- one output -------------------------------------------------------------------------------------------------------

GOOD = compact_json(analysis())
SPANISH = (
    "La luz de la tarde cae sobre el lago y las nubes que se ven en el fondo dan al conjunto una calma que es rara. "
)
BROKEN = [
    ("strict", GOOD, "stop", []),
    ("fence", f"```json\n{GOOD}\n```", "stop", ["code_fence"]),
    ("prose before", f"Here it is: {GOOD}", "stop", ["prose"]),
    ("prose after", f"{GOOD} I hope this helps.", "stop", ["prose"]),
    ("no JSON", "A fine photograph.", "stop", ["prose"]),
    ("nothing", "", "stop", ["prose"]),
    ("a list", "[]", "stop", ["prose"]),
    ("broken", GOOD[:-1] + ",", "stop", ["broken_json"]),
    ("truncated", GOOD[:200], "length", ["truncated"]),
    ("whole but endless", GOOD, "length", ["truncated"]),
    ("loop told", '{"image_description":"a', "loop", ["repetition_loop"]),
    ("loop seen", "so very " * 100, "length", ["repetition_loop"]),
    (
        "key missing",
        json.dumps({k: v for k, v in analysis().items() if k != "technical_notes"}),
        "stop",
        ["wrong_schema"],
    ),
    ("key added", json.dumps(analysis() | {"mood": "calm"}), "stop", ["wrong_schema"]),
    ("other name", GOOD.replace("Lighting", "Light"), "stop", ["wrong_dimensions"]),
    ("score of 14", GOOD.replace('"score":7', '"score":14', 1), "stop", ["out_of_range"]),
    ("overall of 0", GOOD.replace('"overall_score":7.0', '"overall_score":0'), "stop", ["out_of_range"]),
    ("score in words", GOOD.replace('"score":7', '"score":"seven"', 1), "stop", ["wrong_schema"]),
    ("Spanish", compact_json(analysis() | {"image_description": SPANISH * 3}), "stop", ["wrong_language"]),
    ("Chinese prose", "这是一张美丽的照片。" * 9, "stop", ["wrong_language", "prose"]),
    ("Chinese", compact_json(analysis() | {"image_description": "湖" * 400}), "stop", ["wrong_language"]),
]


@pytest.mark.parametrize(("text", "finish", "failures"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_judge_classifies(text, finish, failures):
    verdict = judge.judge(text, finish, list(DIMENSIONS7))
    assert verdict["failures"] == failures
    assert verdict["strict"] == (not failures)
    assert bool(verdict["problems"]) == bool(failures)


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace('"score":7', '"score":1' + "0" * 400, 1),
        GOOD.replace('"score":7', '"score":1' + "0" * 5000, 1),
        GOOD.replace('"score":7', '"score":1e999', 1),
        GOOD.replace('"score":7', '"score":NaN', 1),
        GOOD.replace("A lake", "\\ud800 lake"),
        GOOD.replace('"technical_notes"', '"\\ud800"'),
        "[" * 100_000,
        '{"a":' * 5000,
        '{"dimensions":[null,1,{"name":{"a":1},"score":[1]}]}',
        '{"dimensions":null}',
    ],
    ids=[
        "400 digits",
        "5000 digits",
        "infinite",
        "NaN",
        "surrogate",
        "surrogate key",
        "brackets",
        "braces",
        "kinds",
        "null",
    ],
)
def test_hostile_output_can_be_judged_and_written(text):
    prompt = {"dimensions": list(DIMENSIONS7), "terms": ["light"], "example_scores": [7] * 7}
    verdict = judge.judge(text, "stop", list(DIMENSIONS7))
    found = [verdict, judge.measure(text, verdict, analysis(), prompt)]
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8")


def test_judge_names_every_fault_worst_first():
    text = "```\n" + GOOD.replace("Lighting", "Light").replace('"score":7', '"score":0', 1) + "\n```"
    assert judge.judge(text, "stop", list(DIMENSIONS7))["failures"] == ["code_fence"]
    body = text.strip("`\n")
    assert judge.judge(body, "stop", list(DIMENSIONS7))["failures"] == ["wrong_dimensions", "out_of_range"]


def test_order_of_dimensions_counts():
    swapped = analysis()
    swapped["dimensions"] = swapped["dimensions"][::-1]
    assert judge.judge(compact_json(swapped), "stop", list(DIMENSIONS7))["failures"] == ["wrong_dimensions"]


def test_loop_detection_spares_repetitive_json():
    assert repeated_tail(GOOD.split() * 3) is None
    assert repeated_tail(list(GOOD)) is None
    assert repeated_tail([1] * 96) == 1
    assert repeated_tail([1] * 95) is None
    assert repeated_tail([5, 6, 7] + [1, 2, 3, 4, 5] * 20) == 5
    assert repeated_tail(list(range(150)) * 4) == 150
    assert repeated_tail(list(range(150)) * 3) is None


def test_measure_gives_the_planted_distances():
    ours, reference = analysis(7), analysis(5)
    ours["overall_score"] = 6.5
    prompt = {"dimensions": list(DIMENSIONS7), "terms": ["light", "zone", "grain", "tonal"], "example_scores": [7] * 7}
    text = compact_json(ours)
    found = judge.measure(text, {"analysis": ours}, reference, prompt)
    assert found["errors"] == dict.fromkeys(DIMENSIONS7, 2)
    assert found["overall_error"] == 1.5
    assert found["consistency"] == 0.5
    assert found["comments"] == pytest.approx(100)
    assert found["description"] == pytest.approx(100)
    assert found["vocabulary"] == 0.5
    assert found["example_scores"] is True


def test_unreadable_output_overlaps_nothing():
    prompt = {"dimensions": list(DIMENSIONS7), "terms": [], "example_scores": []}
    found = judge.measure("no", {"analysis": None}, analysis(), prompt)
    assert (found["comments"], found["description"], found["overall_error"], found["vocabulary"]) == (0, 0, None, None)


def test_advisor_terms_are_the_advisors_alone():
    prompt = (
        'You are a critic of photographs.\n\n{\n "score": 8\n}\nBe specific about composition.\n\n'
        "You are Ansel Adams. Judge composition by the Zone System, tonal range and texture.\n\n"
        "Analyze the provided image."
    )
    assert judge.advisor_terms(prompt) == ["adams", "ansel", "judge", "range", "system", "texture", "tonal", "zone"]


# -- gates ------------------------------------------------------------------------------------------------------------


def summary(**figures) -> dict:
    arms = {"base": {}, "candidate": {}}
    differences = {"candidate-base": {}}
    for name, (value, n) in figures.items():
        arm, figure = name.split("__")
        figure = figure.replace("_", ".", 1)
        place = differences["candidate-base"] if arm == "difference" else arms[arm]
        place[figure] = {"value": value, "low": None, "high": None, "n": n}
    return {"arms": arms, "differences": differences}


GOOD_FIGURES = {
    "base__format_strict": (0.9, 12),
    "candidate__format_strict": (0.95, 12),
    "candidate__speed_seconds": (2.99, 8),
    "candidate__speed_overhead": (0.0999, 8),
    "difference__loss_nats": (0.0, 12),
}


def verdicts(figures: dict) -> dict:
    return {row["name"]: row["verdict"] for row in decide(list(DEFAULT_GATES), summary(**figures))}


def test_default_gates_pass_at_their_documented_bounds():
    found = verdicts(GOOD_FIGURES)
    assert found.pop("deployed_format") == found.pop("deployed_loss") == "not applicable"
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("figure", "value", "gate"),
    [
        ("base__format_strict", 0.899, "base_format"),
        ("candidate__format_strict", 0.949, "tuned_format"),
        ("candidate__speed_seconds", 3.0, "inference_time"),
        ("candidate__speed_overhead", 0.1, "overhead"),
        ("difference__loss_nats", 0.0001, "base_loss"),
    ],
)
def test_default_gates_fail_just_past_their_bounds(figure, value, gate):
    found = verdicts(GOOD_FIGURES | {figure: (value, 12)})
    assert [name for name, verdict in found.items() if verdict == "fail"] == [gate]


def test_too_few_photographs_are_not_measured_and_fail():
    rows = decide(list(DEFAULT_GATES), summary(**GOOD_FIGURES | {"candidate__format_strict": (1.0, 9)}))
    assert [(row["name"], row["verdict"]) for row in failed(rows)] == [("tuned_format", "not measured")]


def test_a_figure_that_is_not_defined_fails():
    rows = decide(list(DEFAULT_GATES), summary(**GOOD_FIGURES | {"difference__loss_nats": (None, 12)}))
    assert [(row["name"], row["verdict"]) for row in failed(rows)] == [("base_loss", "not measured")]


def test_gates_file_changes_switches_off_and_adds(tmp_path):
    path = tmp_path / "gates.toml"
    path.write_text(
        "[tuned_format]\nat_least = 0.5\n[base_format]\nenabled = false\n"
        '[comments]\nfigure = "text.comments"\nversus = "base"\nabove = 1.0\n'
    )
    gates = {gate.name: gate for gate in load_gates(path)}
    assert gates["tuned_format"].bound == ("at_least", 0.5)
    assert not gates["base_format"].enabled
    assert gates["comments"].bound == ("above", 1.0)
    as_json = tmp_path / "gates.json"
    as_json.write_text(json.dumps({"tuned_format": {"at_least": 0.5}}))
    assert load_gates(as_json)[1].at_least == 0.5


def test_gates_file_names_all_that_is_wrong(tmp_path):
    path = tmp_path / "gates.toml"
    path.write_text(
        '[a]\nfigure = "format.strikt"\nat_least = 1\n[b]\nfigure = "format.strict"\n'
        '[c]\nfigure = "format.strict"\nat_least = 1\narm = "candiate"\n[tuned_format]\nat_leest = 1\n'
    )
    with pytest.raises(Exception) as error:
        load_gates(path)
    message = error.value.message
    assert message.count(str(path)) == 4
    for part in ("unknown figure format.strikt", "exactly one bound", "candiate", "unknown setting at_leest"):
        assert part in message


def test_values_are_shown_with_their_units():
    assert format_value("format.strict", 0.957) == "95.7%"
    assert format_value("format.strict", -0.05, difference=True) == "-5.0 points"
    assert format_value("speed.seconds", 2.34) == "2.34 s"
    assert format_value("speed.tokens_per_second", 41.26) == "41.3/s"
    assert format_value("loss.nats", None) == "not measured"

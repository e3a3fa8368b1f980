"""Intervals, judgement and figures on inputs whose right answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from common.evaluation import intervals
from common.evaluation import scoring as judge
from common.evaluation.gates import DEFAULT_GATES, Gate, decide, failed, format_value, load_gates
from common.evaluation.intervals import Figure
from common.evaluation.metrics import Summary
from integration.lora_patch.analysis import compact_json
from integration.lora_patch.prompts import read_specification
from integration.lora_patch.repetition import repeated_tail
from integration.lora_patch.specification import DIMENSIONS7, PromptSpecification
from tests.simulations.intervals import coverage, what_can_be_shown

NAN = float("nan")
SPECIFICATION = PromptSpecification()


def analysis(score: int = 7) -> dict:
    return {
        "image_description": "A lake under clouds.",
        "dimensions": [
            {"name": name, "score": score, "comment": f"The {name} holds.", "recommendation": f"More {name} at dusk."}
            for name in DIMENSIONS7
        ],
        "overall_score": float(score),
        "key_strengths": ["Light"],
        "priority_improvements": ["Depth"],
        "technical_notes": "Fine grain.",
    }


# -- intervals --------------------------------------------------------------------------------------------------------


def test_mean_leaves_out_what_was_not_measured():
    figure = intervals.mean(np.array([1.0, NAN, 3.0]))
    assert (figure.value, figure.n) == (2.0, 2)


def test_one_photograph_unlike_the_others_does_not_stretch_the_limits_without_bound():
    figure = intervals.mean(np.array([0.02] * 16 + [0.03] * 3 + [2.0]))
    assert figure.high < 1


def test_equal_scores_of_few_photographs_do_not_show_that_all_are_equal():
    """Ten errors of 0 gave an interval from 0 to 0: it missed a true mean of 0.25 whenever they were all 0."""
    figure = intervals.mean(np.zeros(10), step=1.0)
    assert (figure.low, figure.value) == (pytest.approx(-0.3085, abs=1e-4), 0)
    assert (figure.upper, figure.high) == (pytest.approx(0.2589, abs=1e-4), pytest.approx(0.3085, abs=1e-4))
    losses = intervals.mean(np.full(10, 0.4))  # equal values of a continuous figure are no chance
    assert (losses.low, losses.high) == (0.4, 0.4)


def test_skewed_values_are_covered():
    """A lognormal mean was held in 91.3% at n = 20; the interval of normal values must stay nearly as wide."""
    rng, n, held, widths = np.random.default_rng(1), 20, 0, []
    for _ in range(800):
        held += (figure := intervals.mean(rng.lognormal(0, 1, n))).low <= np.exp(0.5) <= figure.high
        values = rng.normal(size=n)
        figure = intervals.mean(values)
        widths.append((figure.high - figure.low) / (2 * stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)))
    assert held / 800 > 0.93 and np.median(widths) < 1.08


def test_limits_lie_around_the_value_in_order():
    figure = intervals.mean(np.random.default_rng(1).exponential(size=12))
    assert figure.low < figure.lower < figure.value < figure.upper < figure.high


def test_interval_of_many_values_is_students():
    values = np.random.default_rng(1).normal(5, 2, 400)
    figure, half = intervals.mean(values), 1.966 * values.std(ddof=1) / 20
    assert figure.low == pytest.approx(values.mean() - half, abs=0.03)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.03)


@pytest.mark.parametrize(
    ("name", "n", "lowest", "highest"),
    [
        ("mean, normal", 10, 0.93, 0.97),
        ("mean, absolute normal", 20, 0.93, 0.97),
        ("mean, errors of whole points", 50, 0.93, 0.97),
        ("difference of losses a token", 10, 0.93, 0.97),
        ("median, lognormal (sigma 0.5)", 20, 0.93, 0.97),
        ("Spearman, rho 0.6", 10, 0.93, 0.97),
        ("difference of Pearson, rho 0.6", 20, 0.93, 0.97),
        ("pairwise accuracy, rho 0.6", 20, 0.93, 0.97),
        ("share 0.7 (exact)", 20, 0.95, 1.0),
        ("difference of shares, 0.3", 20, 0.93, 1.0),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(name, n, lowest, highest):
    runs = 600
    held, lower, upper = coverage(name, n, runs)
    chance = 2.6 * (0.05 * 0.95 / runs) ** 0.5  # of so many runs; the full table is in docs/evaluation.md
    assert lowest - chance <= held <= min(1.0, highest + chance)
    assert min(lower, upper) >= 0.93 - chance


def test_docs_say_what_so_many_photographs_can_show():
    docs = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    assert "\n".join(what_can_be_shown()) in docs


def test_share_of_twelve_of_twelve_keeps_its_doubt():
    figure = intervals.share(np.ones(12))
    assert figure.value == figure.high == 1.0
    # Clopper and Pearson's closed form for all successes
    assert (figure.low, figure.lower) == pytest.approx((0.025 ** (1 / 12), 0.05 ** (1 / 12)))


def test_share_is_scipys_exact_interval():
    figure = intervals.share(np.array([1.0] * 7 + [0.0] * 4))
    exact = stats.binomtest(7, 11).proportion_ci(0.95, method="exact")
    assert (figure.low, figure.high) == pytest.approx((exact.low, exact.high))


def test_paired_shares_without_a_change_keep_their_doubt():
    figure = intervals.share_difference(np.ones(16), np.ones(16))
    assert figure.value == 0
    half = 1.959964 * (2 / 18 / 18) ** 0.5  # Bonett and Price (2012) with no discordant pair
    assert (figure.low, figure.high) == pytest.approx((-half, half), abs=1e-6)
    assert intervals.changed(figure) == (0, 0)
    figure = intervals.share_difference(np.array([1, 1, 1, 0, 1, 0.0]), np.array([1, 0, 0, 1, 1, 0.0]))
    assert intervals.changed(figure) == (2, 1)


@pytest.mark.parametrize("ranks", [True, False])
def test_correlation_is_scipys(ranks):
    rng = np.random.default_rng(3)
    x, y = rng.integers(1, 11, 50).astype(float), rng.integers(1, 11, 50).astype(float)
    found = (stats.spearmanr if ranks else stats.pearsonr)(x, y).statistic
    assert intervals.correlation(x, y, ranks).value == pytest.approx(found, abs=1e-12)


def test_correlation_of_a_constant_is_not_defined():
    assert intervals.correlation(np.full(9, 7.0), np.arange(9.0), ranks=True).value is None


def test_equal_arms_differ_by_exactly_nothing():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=12), rng.normal(size=12)
    figure = intervals.correlation_difference(x, x, y, ranks=True)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert intervals.ratio_difference((x, x + 9), (x, x + 9)).high == 0


def test_ratio_weights_by_tokens():
    figure = intervals.ratio(np.array([10.0, 300.0]), np.array([10.0, 100.0]))
    assert figure.value == pytest.approx(310 / 110)


def test_pairs_leave_out_a_photograph_with_itself():
    likeness = np.array([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0]])
    figure = intervals.pairs(likeness)
    assert (figure.value, figure.high) == pytest.approx((0.2, 0.2))


def test_median_has_an_interval_from_five_values_on():
    assert intervals.median(np.arange(4.0)).low is None
    figure = intervals.median(np.arange(5.0))
    assert (figure.low, figure.value, figure.high) == (0, 2, 4)


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
    verdict = judge.judge(text, finish, SPECIFICATION)
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
    verdict = judge.judge(text, "stop", SPECIFICATION)
    found = [verdict, judge.measure(text, verdict, analysis(), prompt)]
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8")


def test_judge_names_every_fault_worst_first():
    text = "```\n" + GOOD.replace("Lighting", "Light").replace('"score":7', '"score":0', 1) + "\n```"
    assert judge.judge(text, "stop", SPECIFICATION)["failures"] == ["code_fence"]
    body = text.strip("`\n")
    assert judge.judge(body, "stop", SPECIFICATION)["failures"] == ["wrong_dimensions", "out_of_range"]


def test_order_of_dimensions_counts():
    swapped = analysis()
    swapped["dimensions"] = swapped["dimensions"][::-1]
    assert judge.judge(compact_json(swapped), "stop", SPECIFICATION)["failures"] == ["wrong_dimensions"]


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
    text = compact_json(ours) + " light"
    found = judge.measure(text, {"analysis": ours}, reference, prompt)
    assert found["scores"] == dict.fromkeys(DIMENSIONS7, 7) | {"overall_score": 6.5}
    assert found["consistency"] == 0.5
    assert found["comments"] == pytest.approx(100)
    assert found["description"] == pytest.approx(100)
    assert found["vocabulary"] == 0.5
    assert found["example_scores"] is True
    assert found["same_advice"] is False


def test_unreadable_output_overlaps_nothing():
    prompt = {"dimensions": list(DIMENSIONS7), "terms": [], "example_scores": []}
    found = judge.measure("no", {"analysis": None}, analysis(), prompt)
    assert (found["comments"], found["description"], found["scores"], found["vocabulary"]) == (0, 0, {}, None)


def test_similarities_are_those_of_each_pair():
    texts = ["the light falls on the lake", "the light falls on a hill", "", "two words", "the light falls on the lake"]
    grams = [judge.trigrams(judge.words(text)) for text in texts]
    wanted = [[judge.similarity(one, other) for other in grams] for one in grams]
    assert judge.similarities(grams) == pytest.approx(np.array(wanted))
    assert judge.similarities([]).shape == (0, 0)


def test_same_advice_is_a_fault_of_content_not_of_format():
    repeated = analysis()
    repeated["dimensions"][4]["recommendation"] = repeated["dimensions"][1]["recommendation"]
    verdict = judge.judge(compact_json(repeated), "stop", SPECIFICATION)
    assert (verdict["strict"], verdict["failures"], verdict["problems"]) == (True, ["same_advice"], [])
    prompt = {"dimensions": list(DIMENSIONS7)}
    measured = [judge.measure("", {"analysis": one}, None, prompt) for one in (analysis(), repeated)]
    assert [one["same_advice"] for one in measured] == [False, True]
    assert measured[0]["within"] < measured[1]["within"]


@pytest.mark.parametrize("spaces", [{}, {"indent": 2}])
def test_score_spans_are_the_digits_of_each_score(spaces):
    written = analysis()
    written["dimensions"] = [
        d | {"score": n + 1, "comment": 'of "score": 9'} for n, d in enumerate(written["dimensions"])
    ]
    text = f"Here it is: {json.dumps(written | {'overall_score': 6.5}, **spaces)}"
    spans = judge.score_spans(text)
    assert {name: text[start:end] for name, (start, end) in spans.items()} == {
        **{name: str(n) for n, name in enumerate(DIMENSIONS7, 1)},
        "overall_score": "6.5",
    }


def test_masked_scores_are_no_reference():
    text = compact_json(analysis(8))
    start, end = judge.score_spans(text)["Lighting"]
    kept = judge.reference_scores(text, analysis(8), [[start, end]])
    assert "Lighting" not in kept and len(kept) == len(DIMENSIONS7)
    assert judge.reference_scores(text, analysis(8), []) == judge.scores_of(analysis(8))


def test_advisor_terms_are_the_advisors_alone():
    prompt = (
        'You are a critic of photographs.\n\n{\n "score": 8\n}\nBe specific about composition.\n\n'
        "You are Ansel Adams. Judge composition by the Zone System, tonal range and texture.\n\n"
        "Analyze the provided image."
    )
    assert judge.advisor_terms(prompt) == ["adams", "ansel", "judge", "range", "system", "texture", "tonal", "zone"]


# -- gates ------------------------------------------------------------------------------------------------------------


def summary(**figures) -> Summary:
    """A summary of figures (value, lower, upper, n) by arm__group_name, or difference__group_name."""
    arms, differences = {"base": {}, "candidate": {}}, {"candidate-base": {}}
    for name, (value, lower, upper, n) in figures.items():
        arm, figure = name.split("__")
        place = differences["candidate-base"] if arm == "difference" else arms[arm]
        place[figure.replace("_", ".", 1)] = Figure(value, n, lower, lower, upper, upper)
    return Summary(20, arms, differences, {})


GOOD_FIGURES = {
    "base__format_strict": (0.95, 0.9, 1.0, 12),
    "candidate__format_strict": (1.0, 0.95, 1.0, 12),
    "candidate__speed_seconds": (2.0, 1.9, 2.9, 8),
    "candidate__speed_overhead": (0.05, 0.01, 0.09, 8),
    "difference__loss_nats": (-0.1, -0.2, 0.02, 12),
}


def verdicts(figures: dict) -> dict:
    return {row["name"]: row["verdict"] for row in decide(list(DEFAULT_GATES), summary(**figures))}


def test_default_gates_pass_at_their_documented_bounds():
    found = verdicts(GOOD_FIGURES)
    assert found.pop("same_advice") == "off"
    assert {found.pop(name) for name in list(found) if name.startswith("deployed") or name.endswith("kept")} == {
        "not applicable"
    }
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("value", "lower", "upper", "verdict"),
    [
        (1.0, 0.95, 1.0, "pass"),
        (0.95, 0.8, 0.99, "likely"),
        (0.949, 0.8, 0.99, "unlikely"),
        (0.9, 0.8, 0.949, "fail"),
        (1.0, None, None, "likely"),
        (0.9, None, None, "unlikely"),
    ],
)
def test_verdict_comes_from_value_and_limits(value, lower, upper, verdict):
    assert verdicts(GOOD_FIGURES | {"candidate__format_strict": (value, lower, upper, 12)})["tuned_format"] == verdict
    mirrored = [None if side is None else 1 - side for side in (value, upper, lower)]
    gate = Gate("faults", "Faults", "distinct.same_advice", at_most=0.05)
    row = decide([gate], summary(candidate__distinct_same_advice=(*mirrored, 12)))[0]
    assert row["verdict"] == verdict


def test_what_the_base_alone_misses_is_reported_and_the_adapter_held_against_the_base():
    slow = {"base__speed_seconds": (9.0, 8.0, 9.5, 8), "candidate__speed_seconds": (9.2, 8.8, 9.9, 8)}
    fenced = {"base__format_strict": (0.0, 0.0, 0.2, 12), "difference__format_strict": (1.0, 0.7, 1.0, 12)}
    rows = decide(list(DEFAULT_GATES), summary(**GOOD_FIGURES | slow | fenced))
    found = {row["name"]: row["verdict"] for row in rows}
    assert found["inference_time"] == found["base_format"] == "reported"
    assert found["base_time_kept"] == found["base_format_kept"] == "pass"
    assert failed(rows) == []
    worse = {"difference__format_strict": (-0.2, -0.3, -0.1, 12), "candidate__speed_overhead": (0.3, 0.2, 0.4, 8)}
    rows = decide(list(DEFAULT_GATES), summary(**GOOD_FIGURES | slow | fenced | worse))
    assert {row["name"] for row in failed(rows)} == {"base_format_kept", "base_time_kept", "overhead"}


def test_a_slow_adapter_over_a_fast_base_fails():
    slow = {"base__speed_seconds": (2.0, 1.9, 2.1, 8), "candidate__speed_seconds": (9.2, 8.8, 9.9, 8)}
    assert verdicts(GOOD_FIGURES | slow)["inference_time"] == "fail"


def test_too_few_photographs_are_not_measured_and_fail():
    rows = decide(list(DEFAULT_GATES), summary(**GOOD_FIGURES | {"candidate__format_strict": (1.0, 0.9, 1.0, 4)}))
    assert [(row["name"], row["verdict"]) for row in failed(rows)] == [("tuned_format", "not measured")]
    assert failed(rows)[0]["decides"] == "5 held-out photographs; you have 4"


def test_a_figure_that_is_not_defined_fails():
    rows = decide(list(DEFAULT_GATES), summary(**GOOD_FIGURES | {"difference__loss_nats": (None, None, None, 12)}))
    assert [(row["name"], row["verdict"]) for row in failed(rows)] == [("base_loss", "not measured")]


def decides(found: Figure, **gate) -> str:
    table = {"format.strict": found, "loss.nats": found, "speed.overhead": found}
    made = Summary(20, {"base": {}, "candidate": table}, {"candidate-base": table}, {})
    return decide([Gate("g", "G", **{"figure": "format.strict"} | gate)], made)[0]["decides"]


def test_undecided_gates_say_what_would_decide_them():
    faultless = intervals.share(np.ones(16))
    assert decides(faultless, at_least=0.95) == "59 held-out photographs without a fault; you have 16"
    assert intervals.share(np.ones(59)).lower >= 0.95 > intervals.share(np.ones(58)).lower
    one = intervals.share(np.array([0.0] + [1.0] * 15))
    settles, _, mends = decides(one, at_least=0.95).partition("; or ")  # 15 of 16 miss the bound
    assert settles == "93 held-out photographs with no more than 1 fault; you have 16"
    assert mends.startswith("more examples or epochs")
    kept = intervals.share_difference(np.ones(16), np.ones(16))
    text = decides(kept, at_least=-0.05, versus="base")
    assert text == "45 held-out photographs that the candidate does not fail alone; you have 16"
    assert intervals.share_difference(np.ones(45), np.ones(45)).lower >= -0.05
    loss = Figure(-0.02, 16, -0.1, -0.08, 0.04, 0.06)
    wanted = "about 36 held-out photographs, if figure and spread stay as they are; you have 16"
    assert decides(loss, figure="loss.nats", versus="base", at_most=0.02) == wanted
    at_bound = Figure(0.02, 16, -0.1, -0.08, 0.08, 0.1)
    assert "at its bound" in decides(at_bound, figure="loss.nats", versus="base", at_most=0.02)
    assert "timed photographs" in decides(Figure(0.2, 8, -0.1, -0.05, 0.3, 0.4), figure="speed.overhead", below=0.1)


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
    assert {gate.name: gate for gate in load_gates(as_json)}["tuned_format"].at_least == 0.5


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


def test_what_would_settle_a_gate_counts_no_halves_of_photographs():
    """With two samples a photograph, one of them bad, "1 that only the candidate fails" was said of no photograph."""
    ours = np.array([1, 0.5, 1, 1, 0.5, 1, 1, 1, 0.5, 1])
    figure = intervals.share_difference(ours, np.array([1, 1, 0.5, 1, 1, 1, 1, 0.5, 1, 1]))
    gate = Gate("kept", "Kept", "format.strict", versus="base", at_least=-0.1)
    summary = Summary(10, {"base": {}, "candidate": {}}, {"candidate-base": {"format.strict": figure}}, {})
    assert "if figure and spread stay as they are; you have 10" in decide([gate], summary)[0]["decides"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[tuned_format]\nat_least = 95\n", "a share from 0 to 1"),
        ("[tuned_format]\nat_least = inf\n", "a number was expected"),
        ('[x]\nfigure = "speed.seconds"\nversus = "base"\nbelow = 1\n', "leave versus out"),
        ('[x]\nfigure = "scores.mae"\narm = "base"\nversus = "candidate"\nbelow = 1\n', "base is not compared with"),
        ('[x]\nfigure = "scores.mae"\nbelow = 1\nonly_if = "tuned_fromat"\n', "tuned_fromat is none"),
        ('{"x":' * 100_000, "cannot be read as gates"),
    ],
)
def test_a_gate_that_could_never_decide_is_refused(tmp_path, text, told):
    path = tmp_path / ("gates.json" if text.startswith("{") else "gates.toml")
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        load_gates(path)


def test_values_are_shown_with_their_units():
    assert format_value("format.strict", 0.957) == "95.7%"
    assert format_value("format.strict", -0.05, difference=True) == "-5.0 points"
    assert format_value("speed.seconds", 2.34) == "2.34 s"
    assert format_value("speed.tokens_per_second", 41.26) == "41.3/s"
    assert format_value("loss.nats", None) == "not measured"


@pytest.mark.parametrize(("highest", "says"), [(100, "Scores: 0-100."), (5, "Scores: 1-5.")])
def test_figures_are_in_points_of_ten_whatever_the_range_of_scores(highest, says):
    specification = read_specification(f"{says} {', '.join(DIMENSIONS7)}.")
    answer, reference = analysis(highest), analysis(highest // 2)
    text = specification.render(answer)
    verdict = judge.judge(text, "stop", specification)
    assert (verdict["strict"], verdict["failures"]) == (True, [])
    over = judge.judge(specification.render(analysis(2 * highest)), "stop", specification)
    assert "out_of_range" in over["failures"]
    prompt = {"specification": specification.to_dict(), "dimensions": list(DIMENSIONS7)}
    prompt["example_scores"] = [highest] * 7
    measured = judge.measure(text, verdict, reference, prompt)
    assert set(measured["scores"].values()) == {10} and measured["example_scores"]
    response = specification.render(reference)
    start, end = judge.score_spans(response, highest)["Lighting"]
    scores = judge.reference_scores(response, reference, [[start, end]], highest)
    assert "Lighting" not in scores and scores["Composition"] == 10 * (highest // 2) / highest

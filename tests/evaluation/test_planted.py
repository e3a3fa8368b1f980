"""Planted outputs through the recorded source: the figures, gates and page must be exactly what was planted."""

import copy
import html.parser
import json
import re
from base64 import b64encode
from hashlib import sha256

import pytest

from common.evaluation.comparison import recomputed
from common.evaluation.gates import from_dicts
from common.evaluation.metrics import KINDS
from common.evaluation.scoring import score_spans
from common.files import read_json, write_jsonl
from integration.lora_patch.analysis import compact_json
from tests.evaluation_case import evaluate, make_adapter, make_data, read_jsonl

PHOTOS = 20
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


@pytest.fixture(scope="module")
def case(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    data = make_data(folder, PHOTOS)
    return folder, make_adapter(folder / "models" / "qwen3-vl-4b-lora-ansel", tiny_base, data), read_jsonl(data[1])


def planted(rows: list[dict]) -> list[dict]:
    """Base: 6 of 20 broken, one way each, scores 2 off. Candidate: 1 broken, scores 1 off; loss 0.25 nats lower."""
    found = [{"kind": "arm", "arm": "candidate", "load_seconds": 0.5}]
    for arm, off, loss in (("base", 2, 1.25), ("candidate", 1, 1.0)):
        for at, row in enumerate(rows):
            analysis = json.loads(row["response"])
            for dimension in analysis["dimensions"]:
                dimension["score"] += off if dimension["score"] + off <= 10 else -off
            analysis["overall_score"] = round(
                analysis["overall_score"] + (off if analysis["overall_score"] < 7 else -off), 1
            )
            text, finish = compact_json(analysis), "stop"
            if arm == "base":
                text, finish = {
                    0: (f"```json\n{text}\n```", "stop"),
                    1: (f"Gladly! {text}", "stop"),
                    2: (text[:300], "length"),
                    3: (text[:100] + "again " * 200, "loop"),
                    4: (text.replace("Lighting", "Light"), "stop"),
                    5: (text[:-1], "stop"),
                }.get(at, (text, finish))
            elif at == 7:
                text = compact_json(
                    analysis | {"mood": HOSTILE, "image_description": f"{analysis['image_description']} {HOSTILE}"}
                )
            found.append(
                {"kind": "output", "arm": arm, "example": at, "text": text, "finish": finish, "tokens": 400 + at}
            )
            found.append({"kind": "loss", "arm": arm, "example": row["job_id"], "sum": loss * 400, "tokens": 400})
            if at < 8:
                seconds = {"base": 2.0, "candidate": 2.16}[arm]
                times = {
                    "seconds": seconds,
                    "first_token_seconds": seconds / 4,
                    "tokens": 401,
                    "peak_bytes": 5_000_000_000,
                }
                found.append({"kind": "timing", "arm": arm, "example": at, **times})
    return found


@pytest.fixture(scope="module")
def report(case):
    folder, adapter, rows = case
    write_jsonl(folder / "outputs.jsonl", planted(rows))
    result = evaluate(
        "--lora_path", adapter, "--from_outputs", folder / "outputs.jsonl", "--output_report", folder / "out" / "report"
    )
    return result, read_json(folder / "out" / "report.json"), (folder / "out" / "report.html").read_text("utf-8")


def test_format_figures_are_exactly_the_planted_ones(report):
    base, candidate = (report[1]["summary"]["arms"][arm] for arm in ("base", "candidate"))
    assert base["format.strict"]["value"] == 14 / 20
    assert candidate["format.strict"]["value"] == 19 / 20
    # rescued: fence, prose and the renamed dimension, but not what is cut or loops
    assert base["format.lenient"]["value"] == 17 / 20
    failures = {name.partition(":")[2]: figure["value"] for name, figure in base.items() if name.startswith("failure:")}
    planted_once = {"code_fence", "prose", "truncated", "repetition_loop", "wrong_dimensions", "broken_json"}
    assert {name for name, value in failures.items() if value} == planted_once
    assert all(failures[name] == 1 / 20 for name in planted_once)
    assert candidate["failure:wrong_schema"]["value"] == 1 / 20


def test_score_and_loss_figures_are_exactly_the_planted_ones(report):
    base, candidate = (report[1]["summary"]["arms"][arm] for arm in ("base", "candidate"))
    assert candidate["scores.mae"]["value"] == candidate["mae:Composition"]["value"] == 1
    assert candidate["overall.mae"]["value"] == pytest.approx(1)
    assert base["scores.mae"]["value"] == 2
    assert base["scores.mae"]["n"] == 17
    assert (base["loss.nats"]["value"], candidate["loss.nats"]["value"]) == (1.25, 1.0)
    assert candidate["loss.perplexity"]["value"] == pytest.approx(2.718281828)
    difference = report[1]["summary"]["differences"]["candidate-base"]["loss.nats"]
    assert (difference["value"], difference["low"], difference["high"]) == (-0.25, -0.25, -0.25)
    assert candidate["length.tokens"]["value"] == pytest.approx(409.5)


def test_speed_figures_are_exactly_the_planted_ones(report):
    arms = report[1]["summary"]["arms"]
    assert (arms["base"]["speed.seconds"]["value"], arms["candidate"]["speed.seconds"]["value"]) == (2.0, 2.16)
    assert arms["candidate"]["speed.overhead"]["value"] == pytest.approx(0.08)
    assert arms["candidate"]["speed.tokens_per_second"]["value"] == pytest.approx(400 / 1.62)
    assert arms["candidate"]["speed.load_seconds"]["value"] == 0.5
    assert report[1]["summary"]["ratios"]["candidate/base"]["speed.seconds"]["value"] == pytest.approx(1.08)


def test_gates_and_exit_code(report):
    result, content, _ = report
    assert result.exit_code == 0, result.output
    verdicts = {row["name"]: row["verdict"] for row in content["gates"]}
    assert verdicts == {
        "base_format": "reported",  # the base's own failing is not held against the adapter
        "base_format_kept": "pass",
        "tuned_format": "likely",
        "inference_time": "pass",
        "base_time_kept": "not applicable",
        "overhead": "pass",
        "base_loss": "pass",
        "deployed_format": "not applicable",
        "deployed_loss": "not applicable",
        "same_advice": "off",
    }
    verdict = content["verdict"]
    assert (verdict["promotable"], verdict["word"], verdict["exit_code"]) == (True, "likely", 0)
    assert verdict["comparisons"][0]["finding"] == "better"
    assert verdict["headline"] == (
        "Answers are in the prompt's format 95% instead of 70%, and scores are 1.0 points off instead of 2.0; "
        "no gate stands against it."
    )
    assert verdict["decides"] == [
        "Tuned format compliance: 93 held-out photographs with no more than 1 fault; you have 20"
    ]
    assert result.stdout.count("Tuned format compliance:") == 2  # the gate, and what would settle it


def evaluated(case, name: str, rows: list[dict], *arguments: object):
    folder, adapter, _ = case
    write_jsonl(folder / f"{name}_outputs.jsonl", rows)
    out = folder / name / "report.json"
    given = ("--from_outputs", folder / f"{name}_outputs.jsonl", "--output_report", out)
    return evaluate("--lora_path", adapter, *given, *arguments), read_json(out)


@pytest.mark.parametrize(
    ("gate", "arguments", "code", "word"),
    [
        ("[tuned_format]\nat_least = 0.5\n", (), 0, "pass"),
        ("", ("--strict",), 3, "likely"),
        ("[tuned_format]\nat_least = 0.97\n", (), 3, "unlikely"),
        ("[tuned_format]\nmin_photographs = 21\n", (), 3, "not measured"),
        ("[overhead]\nbelow = 0.05\n", (), 4, "fail"),
        ("[base_format]\nstrict = true\n", (), 4, "fail"),
    ],
)
def test_exit_code_follows_the_worst_gate(case, gate, arguments, code, word):
    path = case[0] / "gates.toml"
    path.write_text(gate)
    result, content = evaluated(case, "coded", planted(case[2]), "--gates", path, *arguments)
    verdict = content["verdict"]
    assert (result.exit_code, verdict["word"], verdict["promotable"]) == (code, word, code == 0), result.output
    assert ("Good enough; promotion needs a run of the model" in result.stdout) == (code == 0)
    assert ("blocked by" in verdict["headline"]) == (code != 0)
    if word == "unlikely":  # what would settle it, and what may mend it
        told = "no more than 1 fault; you have 20; or more examples or epochs; the report shows"
        assert any(told in sentence for sentence in verdict["decides"])


def good(rows: list[dict], count: int) -> list[dict]:
    """An adapter that answers as the reference does, over a base whose loss is higher; all in the format."""
    found = []
    for arm, loss in (("base", 1.2), ("candidate", 0.9)):
        for at, row in enumerate(rows[:count]):
            noise = 0.01 * (at % 5)
            common = {"arm": arm, "example": at}
            found.append({"kind": "output", "text": row["response"], "finish": "stop", "tokens": 400} | common)
            found.append({"kind": "loss", "sum": (loss + noise) * 400, "tokens": 400} | common)
            times = {"seconds": 2.0 + noise, "first_token_seconds": 0.5, "tokens": 401}
            found.append({"kind": "timing", **times} | common)
    return found


def test_a_good_adapter_with_12_photographs_is_likely_promotable_and_says_how_many_more(case):
    result, content = evaluated(case, "twelve", good(case[2], 12), "--max_examples", 12)
    verdict = content["verdict"]
    assert (result.exit_code, verdict["word"], verdict["promotable"]) == (0, "likely", True)
    found = {row["name"]: row["verdict"] for row in content["gates"]}
    assert found["base_loss"] == found["overhead"] == found["inference_time"] == "pass"
    assert "Tuned format compliance: 59 held-out photographs without a fault; you have 12" in verdict["decides"]
    assert "What would settle it:\n" in result.stdout
    assert "  Tuned format compliance: 59 held-out photographs without a fault; you have 12\n" in result.stdout


def gate_words(content: dict) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in content["gates"]}


def test_a_loss_that_is_no_number_counts_against_the_adapter(case):
    """Left out, the photographs that an adapter breaks would not count: one that broke half of them was promoted."""
    for name, broken, code, word in (("half", range(0, PHOTOS, 2), 4, "fail"), ("one", range(1), 3, "unlikely")):
        rows = good(case[2], PHOTOS)
        for row in rows:
            if row["kind"] == "loss" and row["arm"] == "candidate" and row["example"] in broken:
                row["sum"] = None
        result, content = evaluated(case, name, rows)
        assert (result.exit_code, gate_words(content)["base_loss"]) == (code, word)


def test_an_adapter_with_a_lower_loss_and_a_worse_format_is_neither_better_nor_the_same(case):
    rows = good(case[2], PHOTOS)
    for row in rows:
        if row["kind"] == "output" and row["arm"] == "candidate":
            row["text"] = row["text"][:-1]
    result, content = evaluated(case, "mixed", rows)
    comparison = content["verdict"]["comparisons"][0]
    assert (comparison["finding"], result.exit_code) == ("mixed", 4)
    assert comparison["sentence"].startswith(
        "The candidate is better than the base in one and worse in the other: loss -0.3"
    )


def test_a_base_that_answers_nothing_is_mended_and_its_speed_is_not_held_against_the_adapter(case):
    rows = good(case[2], PHOTOS)
    for row in rows:
        if row["arm"] == "base" and row["kind"] in ("output", "timing"):
            row |= {"tokens": 1} | ({"text": ""} if row["kind"] == "output" else {})
    result, content = evaluated(case, "silent", rows)
    words = gate_words(content)
    assert (words["overhead"], words["base_format"], result.exit_code) == ("reported", "reported", 0)


def test_outputs_that_are_missing_are_told(case):
    rows = [row for row in good(case[2], PHOTOS) if (row["kind"], row["arm"]) != ("output", "candidate")]
    rows += [row for row in good(case[2], 6) if (row["kind"], row["arm"]) == ("output", "candidate")]
    content = evaluated(case, "gaps", rows)[1]
    assert any(f"no output of candidate for {PHOTOS - 6} of {PHOTOS} examples" in text for text in content["warnings"])


def test_four_photographs_are_not_measured(case):
    result, content = evaluated(case, "four", good(case[2], 4), "--max_examples", 4)
    assert (result.exit_code, content["verdict"]["word"]) == (3, "not measured")


def test_an_adapter_no_better_than_one_constant_is_said_so(case):
    content = evaluated(case, "constant", planted(case[2]))[1]
    arms, sentences = content["summary"]["arms"], " ".join(content["verdict"]["scores"])
    train = [json.loads(row["response"]) for row in read_jsonl(case[0] / "training_data" / "train.jsonl")]
    mean = sum(row["overall_score"] for row in train) / len(train)
    references = [json.loads(row["response"])["overall_score"] for row in case[2]]
    wanted = sum(abs(score - mean) for score in references) / PHOTOS
    assert content["training_scores"]["means"]["overall_score"] == pytest.approx(mean)
    assert arms["constant"]["overall.mae"]["value"] == pytest.approx(wanted)
    assert arms["constant"]["overall.pairs"]["value"] == 0.5 and arms["constant"]["overall.rank"]["value"] is None
    assert "is not shown to beat one constant, the mean of the training scores, in the overall scores" in sentences


def test_expected_scores_stand_beside_the_greedy_ones(case):
    rows = planted(case[2])
    for row in rows:
        if row["kind"] == "output" and row["arm"] == "candidate":
            reference = json.loads(case[2][row["example"]]["response"])
            scores = {dimension["name"]: dimension["score"] + 0.25 for dimension in reference["dimensions"]}
            row["expected_scores"] = scores | {"overall_score": reference["overall_score"] + 0.25}
    content = evaluated(case, "expected", rows)[1]
    arms = content["summary"]["arms"]
    assert arms["candidate"]["scores.mae"]["value"] == 1
    assert arms["candidate+expected"]["scores.mae"]["value"] == pytest.approx(0.25)
    assert arms["candidate+expected"]["overall.rank"]["value"] == pytest.approx(1)
    assert content["summary"]["differences"]["candidate+expected-candidate"]["scores.mae"]["value"] == -0.75


def test_masked_scores_are_counted_and_no_reference(case):
    folder, adapter, rows = case
    masked = []
    for row in rows:
        start, end = score_spans(row["response"])["Lighting"]
        masked.append(row | {"masked_spans": [[start, end]]})
    write_jsonl(folder / "masked.jsonl", masked)
    result, content = evaluated(case, "masked", planted(rows), "--val_data", folder / "masked.jsonl")
    arms = content["summary"]["arms"]["candidate"]
    assert (arms["mae:Lighting"]["n"], arms["mae:Composition"]["n"]) == (0, PHOTOS)
    assert f"{PHOTOS} reference scores were masked in training as copied" in result.stdout.replace("\n", " ")


def test_two_analyses_of_one_photograph_give_the_references_agreement(case):
    folder, _, rows = case
    second = json.loads(rows[0]["response"])
    for dimension in second["dimensions"]:
        dimension["score"] += 1 if dimension["score"] < 10 else -1
    doubled = [*rows, rows[0] | {"response": compact_json(second), "job_id": "again"}]
    write_jsonl(folder / "doubled.jsonl", doubled)
    content = evaluated(case, "doubled", planted(rows), "--val_data", folder / "doubled.jsonl")[1]
    figure = content["summary"]["arms"]["reference"]["scores.mae"]
    assert (figure["value"], figure["n"]) == (1, 1)
    assert any("Two analyses of one photograph" in sentence for sentence in content["verdict"]["scores"])


def test_same_advice_has_a_gate_that_a_file_switches_on(case):
    rows = good(case[2], PHOTOS)
    for row in rows:
        if row["kind"] == "output" and row["arm"] == "candidate":
            answer = json.loads(row["text"])
            for dimension in answer["dimensions"]:
                dimension["recommendation"] = "Wait for the light to soften before you press the shutter."
            row["text"] = compact_json(answer)
    gates = case[0] / "advice.toml"
    gates.write_text("[same_advice]\nenabled = true\nat_most = 0.1\n")
    result, content = evaluated(case, "advice", rows, "--gates", gates)
    assert result.exit_code == 4
    assert {row["name"]: row["verdict"] for row in content["gates"]}["same_advice"] == "fail"
    candidate = content["summary"]["arms"]["candidate"]
    assert candidate["failure:same_advice"]["value"] == candidate["format.strict"]["value"] == 1


def test_every_figure_can_be_computed_again_from_the_file(report):
    content = copy.deepcopy(report[1])
    wanted = {name: content.pop(name) for name in ("summary", "gates", "verdict")}
    for example in content["examples"]:
        for key in ("reference", "reference_measures", "reference_scores"):
            del example[key]
        for outputs in example["outputs"].values():
            for output in outputs:
                del output["verdict"], output["measures"]
    again = recomputed(content, from_dicts(wanted["gates"]))
    assert {name: json.loads(json.dumps(again[name])) for name in wanted} == wanted


def test_same_text_for_every_photograph_is_visible(case):
    folder, adapter, rows = case
    texts = {"base": [row["response"] for row in rows], "candidate": [rows[0]["response"]] * len(rows)}
    stuck = [
        {"kind": "output", "arm": arm, "example": at, "text": text, "finish": "stop"}
        for arm, found in texts.items()
        for at, text in enumerate(found)
    ]
    write_jsonl(folder / "stuck.jsonl", stuck)
    evaluate("--lora_path", adapter, "--from_outputs", folder / "stuck.jsonl", "--output_report", folder / "stuck")
    arms = read_json(folder / "stuck.json")["summary"]["arms"]
    assert arms["candidate"]["distinct.texts"]["value"] == 1 / PHOTOS
    assert arms["candidate"]["distinct.similarity"]["value"] == 1
    assert arms["candidate"]["overall.rank"]["value"] is None
    assert arms["base"]["distinct.texts"]["value"] == 1
    assert arms["base"]["overall.rank"]["value"] == pytest.approx(1)
    # what was not given is not measured, and fails
    verdicts = {row["name"]: row["verdict"] for row in read_json(folder / "stuck.json")["gates"]}
    assert verdicts["inference_time"] == verdicts["overhead"] == verdicts["base_loss"] == "not measured"


class Page(html.parser.HTMLParser):
    """Collects what a browser would load or run."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.scripts, self.inside = [], [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag == "script"
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self.inside = False


def test_page_is_self_contained_and_escapes_model_output(report):
    text = report[2]
    page = Page()
    page.feed(text)
    assert page.tags.count("script") == 1
    assert page.handlers == []
    outside = [address for address in page.addresses if not address.startswith("data:image/jpeg;base64,")]
    assert all(re.fullmatch(r"#photo-\d+", address) for address in outside)
    assert page.tags.count("img") == PHOTOS + len(outside)
    digest = b64encode(sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "url(" not in text and "@import" not in text


def test_page_says_the_verdict_first_then_what_changed_most(report):
    text = re.sub(r"<style>.*?</style>", "", report[2], flags=re.S)
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", text)
    assert headings == [
        "Ready to promote",
        "Gained most",
        "Lost most",
        "Gates",
        "Figures",
        "Photographs",
        "How this was made",
    ]
    assert text.index(report[1]["verdict"]["headline"].replace("'", "&#39;")) < text.index("Gained most")
    for row in report[1]["gates"]:
        assert (row["title"].replace("'", "&#39;") in text) == (row["verdict"] != "off")
    assert text.count('<details class="card') == PHOTOS
    # the six whose base answers were broken gain most; the candidate's own broken answer comes first in the list
    gained = re.findall(r'href="#photo-(\d+)"', text)
    assert set(map(int, gained[:3])) <= set(range(1, 7)) and gained[3:] == ["8"]
    worst = re.search(r'<details class="card[^>]* data-index="(\d+)"', text)
    assert worst[1] == "7"


def test_page_can_be_read_by_all(report):
    text = report[2]
    assert re.search(r"<th(?![^>]*scope=)[\s>]", text) is None
    assert "loading=" not in text
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', text)
    assert len(alts) >= PHOTOS and all(re.match(r"Photograph \d+: \w", alt) for alt in alts)


def test_recorded_outputs_with_mistakes_are_named_by_line(case):
    folder, adapter, _ = case
    lines = [
        {"kind": "output", "arm": "base", "example": 0, "text": 5, "finish": "stop"},
        {"kind": "output", "arm": "base", "example": 0, "text": "x", "finish": "end"},
        {"kind": "loss", "arm": "base", "example": 0, "sum": "low", "tokens": 4},
        {"kind": ["odd"]},
        {"kind": "timing", "arm": "base"},
        {"kind": "output", "arm": "base", "example": 0, "text": "x", "finish": "stop", "expected_scores": {"a": "b"}},
        {"kind": "loss", "arm": "base", "example": 0, "sum": 1.0, "tokens": 0},
        {"kind": "timing", "arm": "base", "example": 0, "seconds": 0, "first_token_seconds": 0, "tokens": 4},
        {"kind": "output", "arm": "base", "example": 0, "text": "x", "finish": "stop"},
        {"kind": "output", "arm": "base", "example": 0, "text": "y", "finish": "stop"},
    ]
    write_jsonl(folder / "wrong.jsonl", lines)
    result = evaluate(
        "--lora_path", adapter, "--from_outputs", folder / "wrong.jsonl", "--output_report", folder / "no"
    )
    assert result.exit_code == 1
    assert [f"wrong.jsonl:{line}:" in result.stderr for line in range(1, 11)] == [True] * 8 + [False, True]
    assert "wrong.jsonl:10: the same output as in line 9" in result.stderr
    assert not (folder / "no.json").exists()


def test_every_figure_has_a_meaning(report):
    from common.evaluation.metrics import kind

    for figures in report[1]["summary"]["arms"].values():
        assert all(kind(name).label for name in figures)
    shown = set(report[1]["summary"]["arms"]["candidate"])
    assert KINDS.keys() - shown == set()

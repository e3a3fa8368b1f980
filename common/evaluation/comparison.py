"""A comparison report's content: put together from raw outputs, judged, decided; and decided again from the file.

`judged` and `decided` take nothing but what comparison_report.json itself holds, so that every figure, gate and
sentence in it can be recomputed (`recomputed`), by a reviewer or by promotion.
"""

import copy

from common.errors import UserError
from common.evaluation import metrics
from common.evaluation import scoring as judge
from common.evaluation.gates import Gate, decide, failed, format_value
from common.evaluation.generations import Item
from common.evaluation.scoring import advisor_terms
from common.files import read_json
from integration.lora_patch.prompts import prompt_example_scores

SCHEMA_VERSION = 1
KIND = "mondrian-lora-comparison"
NAMES = {
    "base": "base",
    "candidate": "candidate",
    "deployed": "deployed adapter",
    "base+grammar": "base under the grammar",
    "candidate+grammar": "candidate under the grammar",
    "reference": "reference",
}


def prompt_facts(item: Item) -> dict:
    """Return what a prompt asks for, as the report keeps it."""
    prompt = item.example.prompt
    return {
        "text": prompt,
        "dimensions": item.dimensions,
        "terms": advisor_terms(prompt),
        "example_scores": prompt_example_scores(prompt)[0],
    }


def judged(report: dict) -> dict:
    """Return a copy of a report with each raw output judged anew: "verdict" and "measures" beside "text"."""
    report = copy.deepcopy(report)
    for example in report["examples"]:
        prompt = report["prompts"][example["prompt"]]
        reference, _ = judge.parse_lenient(example["response"])
        example["reference"] = reference
        reading = {"analysis": reference}
        example["reference_measures"] = judge.measure(example["response"], reading, reference, prompt)
        for outputs in example["outputs"].values():
            for output in outputs:
                output["verdict"] = judge.judge(output["text"], output["finish"], prompt["dimensions"])
                output["measures"] = judge.measure(output["text"], output["verdict"], reference, prompt)
    return report


def decided(report: dict, gates: list[Gate]) -> dict:
    """Return a judged report with "summary", "gates" and "verdict" filled in."""
    arms = list(report["arms"])
    summary = metrics.summarise(
        report["examples"],
        report["timings"],
        arms,
        {
            arm: report["arms"][arm]["load_seconds"]
            for arm in arms
            if report["arms"][arm].get("load_seconds") is not None
        },
    )
    rows = decide(gates, summary)
    verdict = {
        "passed": not failed(rows),
        "failed": [f"{row['title']}: {row['verdict']} ({row['reason']})" for row in failed(rows)],
        "comparisons": [compared(report["examples"], summary, *pair) for pair in metrics.pairs(arms)],
        "cannot_conclude": cannot_conclude(summary),
        "one_by_one": one_by_one(report["examples"], report["timings"])
        if not report["settings"]["temperature"]
        else None,
    }
    return report | {"summary": summary, "gates": rows, "verdict": verdict}


def recomputed(report: dict, gates: list[Gate]) -> dict:
    """Return a report computed again from its raw outputs, losses and timings."""
    return decided(judged(report), gates)


def read_report(path) -> dict:
    """Read a comparison_report.json; UserError when it is none or of another schema."""
    report = read_json(path)
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise UserError(f"{path}: not a comparison report; run evaluate_lora.py")
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema {report.get('schema_version')}, this program reads {SCHEMA_VERSION}; evaluate again"
        )
    return report


def compared(examples: list[dict], summary: dict, ours: str, theirs: str) -> dict:
    """Return {"arm", "versus", "finding", "sentence"}: whether one arm is better than another, and why.

    The finding rests on the loss (teacher-forced: no luck of sampling in it) and on the format; "better" or "worse"
    needs an interval that leaves out zero, and no contradiction between the two.
    """
    same, both = metrics.identical_outputs(examples, ours, theirs)
    differences = summary["differences"][f"{ours}-{theirs}"]
    signs = {}
    for name in ("format.strict", "loss.nats"):
        figure = differences.get(name, {})
        signs[name] = _sign(figure) * (1 if metrics.kind(name).better == "higher" else -1) if figure else 0
    loss = differences.get("loss.nats", {}).get("value")
    if both and same == both and not loss:
        finding = "no difference"
        sentence = f"No difference: {NAMES[ours]} and {NAMES[theirs]} gave the same outputs on all {both} photographs"
        sentence += " and have the same loss." if loss == 0 else "."
    else:
        finding = {1: "better", -1: "worse", 0: "not shown"}[max(-1, min(1, sum(signs.values())))]
        opening = {
            "better": f"The {NAMES[ours]} is better than the {NAMES[theirs]}",
            "worse": f"The {NAMES[ours]} is worse than the {NAMES[theirs]}",
            "not shown": f"No difference between the {NAMES[ours]} and the {NAMES[theirs]} is shown",
        }[finding]
        parts = [
            f"{label} {format_value(name, differences[name]['value'], difference=True)} "
            f"{_interval(name, differences[name])}"
            for name, label in (("loss.nats", "loss"), ("format.strict", "format compliance"))
            if differences.get(name, {}).get("value") is not None
        ]
        sentence = opening + (": " + ", ".join(parts) if parts else "") + "."
    return {"arm": ours, "versus": theirs, "finding": finding, "sentence": sentence, "same_outputs": [same, both]}


def one_by_one(examples: list[dict], timings: list[dict]) -> list[int] | None:
    """Return [same, all] of the timed runs: for how many mlx-vlm, one at a time, gave the batch's very text.

    In float32 all agree; in 16 bits two tokens whose logits lie within rounding may swap, and the rest of the text
    then differs. None when there was nothing to compare.
    """
    outputs = {example["index"]: example["outputs"] for example in examples}
    same = []
    for row in timings:
        batched = outputs[row["example"]].get(row["arm"])
        if batched and "text" in row and "free" not in row:
            # a run that the batch stopped in a loop went on here to the token limit
            length = len(batched[0]["text"]) if batched[0]["finish"] == "loop" else None
            same.append(row["text"][:length] == batched[0]["text"])
    return [sum(same), len(same)] if same else None


def cannot_conclude(summary: dict) -> list[str]:
    """Return what this many photographs leave open, a sentence each."""
    count, found = summary["photographs"], []
    for arm, figures in summary["arms"].items():
        figure = figures.get("format.strict", {})
        if figure.get("low") is not None and figure["high"] - figure["low"] > 0.1:
            value = format_value("format.strict", figure["value"])
            found.append(
                f"Format compliance of the {NAMES[arm]}: {value} on {figure['n']} photographs is what a true share "
                f"anywhere from {100 * figure['low']:.0f}% to {100 * figure['high']:.0f}% may give."
            )
    for pair, differences in summary["differences"].items():
        ours, theirs = pair.split("-")
        open_figures = []
        for name in ("loss.nats", "overall.mae", "scores.mae", "overall.rank", "text.comments", "vocabulary.share"):
            figure = differences.get(name, {})
            if figure.get("low") is None or _sign(figure) or figure["low"] == figure["high"]:
                continue
            needed = _needed(figure)
            more = f", which about {needed:,} photographs could tell" if needed else ""
            value = format_value(name, figure["value"], difference=True)
            open_figures.append(f"{metrics.kind(name).label} ({value}{more})")
        if open_figures:
            found.append(
                f"The {NAMES[ours]} and the {NAMES[theirs]} cannot be told apart by: {'; '.join(open_figures)}."
            )
        rank = differences.get("overall.rank", {})
        if rank and rank["value"] is None:
            found.append(
                f"Rank correlation of the overall score, {NAMES[ours]} against {NAMES[theirs]}: not defined, since one "
                f"side gives every photograph the same score or too few can be read ({rank['n']} of {count})."
            )
    return found


def _sign(figure: dict) -> int:
    """Return 1 or -1 for a difference whose interval leaves out zero, else 0."""
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _interval(name: str, figure: dict) -> str:
    if figure.get("low") is None:
        return "(no interval)"
    low, high = (format_value(name, figure[side], difference=True, unit=False) for side in ("low", "high"))
    return f"(95%: {low} to {high})"


def _needed(figure: dict) -> int | None:
    """Return how many photographs would shrink the interval to the difference itself: it falls as 1 / sqrt(n)."""
    half = (figure["high"] - figure["low"]) / 2
    if abs(figure["value"]) < half / 30:
        return None
    needed = round(figure["n"] * (half / abs(figure["value"])) ** 2)
    return needed if needed > figure["n"] else None

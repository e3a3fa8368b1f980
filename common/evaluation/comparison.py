"""A comparison report's content: put together from raw outputs, judged, decided; and decided again from the file.

`judged` and `decided` take nothing but what comparison_report.json itself holds, so that every figure, gate and
sentence in it can be recomputed (`recomputed`), by a reviewer or by promotion.
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UserError
from common.evaluation import metrics, scoring
from common.evaluation.gates import BLOCKING, Gate, decide, failed, format_value
from common.evaluation.intervals import Figure
from common.evaluation.metrics import CONSTANT, EXPECTED, Summary
from common.evaluation.report_check import report_fault
from common.files import read_json
from integration.lora_patch.analysis import parse_lenient
from integration.lora_patch.specification import PromptSpecification

SCHEMA_VERSION = 2
KIND = "mondrian-lora-comparison"
NAMES = {
    "base": "base",
    "candidate": "candidate",
    "deployed": "deployed adapter",
    "base+grammar": "base under the grammar",
    "candidate+grammar": "candidate under the grammar",
    "base+expected": "base, expected",
    "candidate+expected": "candidate, expected",
    "deployed+expected": "deployed, expected",
    "reference": "reference",
    "constant": "one constant",
}
EXIT_CODES = {"pass": 0, "likely": 0, "unlikely": 3, "not measured": 3, "fail": 4}


@dataclass(frozen=True)
class Verdict:
    """What a report says in the end."""

    promotable: bool
    strict: bool  # whether "pass" alone was promotable
    word: str  # the worst of the gates: "pass", "likely", "unlikely", "not measured" or "fail"
    exit_code: int  # of evaluate_lora.py
    headline: str  # one sentence: what the adapter changes, and what blocks it
    failed: list[str]  # the gates that keep it from promotion, a line each
    decides: list[str]  # what would settle the gates that are not settled, or may mend those that fail
    comparisons: list[dict]  # {"arm", "versus", "finding", "sentence", "same_outputs"}
    scores: list[str]  # sentences on the scores against their marks
    cannot_conclude: list[str]  # what this many photographs leave open
    one_by_one: list[int] | None  # [same, all]: timed runs with the batch's very text


def judged(report: dict) -> dict:
    """Return a copy of a report with each raw output judged again: "verdict" and "measures" beside "text"."""
    report = copy.deepcopy(report)
    specifications = {
        name: PromptSpecification.from_dict(prompt["specification"]) for name, prompt in report["prompts"].items()
    }
    for example in report["examples"]:
        prompt, specification = report["prompts"][example["prompt"]], specifications[example["prompt"]]
        highest = specification.score_range[1]
        reference, _ = parse_lenient(example["response"], highest=highest)
        scores = scoring.reference_scores(example["response"], reference, example["masked_spans"], highest)
        example["reference"], example["reference_scores"] = reference, scores
        example["reference_measures"] = scoring.measure(example["response"], {"analysis": reference}, reference, prompt)
        for outputs in example["outputs"].values():
            for output in outputs:
                output["verdict"] = scoring.judge(output["text"], output["finish"], specification)
                output["measures"] = scoring.measure(output["text"], output["verdict"], reference, prompt)
    return report


def decided(report: dict, gates: list[Gate], strict: bool = False) -> dict:
    """Return a judged report with "summary", "gates" and "verdict" filled in."""
    summary = metrics.summarise(report)
    rows = decide(gates, summary)
    blocking = failed(rows, strict)
    worst = [word for word in (*BLOCKING, "likely") if any(row["verdict"] == word for row in rows)]
    word = worst[0] if worst else "pass"
    sampled = report["settings"]["temperature"]
    verdict = Verdict(
        not blocking,
        strict,
        word,
        3 if blocking and word == "likely" else EXIT_CODES[word],
        headline(summary, blocking),
        [f"{row['title']}: {row['verdict']} ({row['reason']})" for row in blocking],
        [f"{row['title']}: {row['decides']}" for row in rows if row["decides"]],
        [compared(report["examples"], summary, *pair) for pair in metrics.pairs(list(report["arms"]))],
        about_scores(report, summary),
        cannot_conclude(summary),
        None if sampled else one_by_one(report["examples"], report["timings"]),
    )
    return report | {"summary": summary.to_dict(), "gates": rows, "verdict": asdict(verdict)}


def recomputed(report: dict, gates: list[Gate], strict: bool = False) -> dict:
    """Return a report computed again from its raw outputs, losses and timings."""
    return decided(judged(report), gates, strict)


def read_report(path: Path) -> dict:
    """Read a comparison_report.json; UserError for another kind of file, a damaged one, or another schema."""
    report = read_json(path)
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise UserError(f"{path}: not a comparison report; run evaluate_lora.py")
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema {report.get('schema_version')}, this program reads {SCHEMA_VERSION}; evaluate again"
        )
    if problem := report_fault(report):
        raise UserError(f"{path}: {problem}; evaluate again")
    return report


# -- sentences --------------------------------------------------------------------------------------------------------


def headline(summary: Summary, blocking: list[dict]) -> str:
    """Return one sentence that joins what the adapter changes with what keeps it from promotion."""
    base, candidate = (summary.arms[arm] for arm in ("base", "candidate"))
    parts = []
    for name, words, digits in (
        ("format.strict", "answers are in the prompt's format {}", "{:.0%}"),
        ("scores.mae", "scores are {} points off", "{:.1f}"),
        ("loss.nats", "the loss is {}", "{:.2f}"),
    ):
        values = [figures.get(name, Figure(None, 0)).value for figures in (candidate, base)]
        if None not in values:
            ours, theirs = (digits.format(value) for value in values)
            parts.append(words.format(ours) + (", as the base" if ours == theirs else f" instead of {theirs}"))
        if len(parts) == 2:
            break
    changes = ", and ".join(parts) if parts else "nothing could be measured"
    changes = changes[0].upper() + changes[1:]
    if not blocking:
        return f"{changes}; no gate stands against it."
    return f"{changes}; blocked by {', '.join(row['title'].lower() + ' (' + row['verdict'] + ')' for row in blocking)}."


def compared(examples: list[dict], summary: Summary, ours: str, theirs: str) -> dict:
    """Return {"arm", "versus", "finding", "sentence", "same_outputs"}: whether one arm is better than another, and why.

    The finding rests on the loss (teacher-forced: no luck of sampling in it) and on the format; "better" or "worse"
    needs an interval that leaves out zero; where the two contradict each other, the finding is "mixed".
    """
    same, both = metrics.identical_outputs(examples, ours, theirs)
    found = {name: summary.difference(ours, theirs, name) for name in ("loss.nats", "format.strict")}
    signs = [_sign(figure) * (1 if metrics.kind(name).better == "higher" else -1) for name, figure in found.items()]
    loss = found["loss.nats"].value
    if both and same == both and not loss:
        finding = "no difference"
        sentence = f"No difference: {NAMES[ours]} and {NAMES[theirs]} gave the same outputs on all {both} photographs"
        sentence += " and have the same loss." if loss == 0 else "."
    else:
        finding = {(): "not shown", (1,): "better", (-1,): "worse"}.get(tuple({*signs} - {0}), "mixed")
        opening = {
            "better": f"The {NAMES[ours]} is better than the {NAMES[theirs]}",
            "worse": f"The {NAMES[ours]} is worse than the {NAMES[theirs]}",
            "mixed": f"The {NAMES[ours]} is better than the {NAMES[theirs]} in one and worse in the other",
            "not shown": f"No difference between the {NAMES[ours]} and the {NAMES[theirs]} is shown",
        }[finding]
        labels = {"loss.nats": "loss", "format.strict": "format compliance"}
        parts = [
            f"{labels[name]} {format_value(name, figure.value, difference=True)} {_interval(name, figure)}"
            for name, figure in found.items()
            if figure.value is not None
        ]
        sentence = opening + (": " + ", ".join(parts) if parts else "") + "."
    return {"arm": ours, "versus": theirs, "finding": finding, "sentence": sentence, "same_outputs": [same, both]}


def about_scores(report: dict, summary: Summary) -> list[str]:
    """Return sentences on the scores: against one constant, the reference's own agreement, what was not counted."""
    found, candidate = [], summary.arms["candidate"]
    for name, label in (("scores.mae", "dimension scores"), ("overall.mae", "overall scores")):
        ours, constant = (summary.arms.get(arm, {}).get(name) for arm in ("candidate", CONSTANT))
        difference = summary.difference("candidate", CONSTANT, name)
        if ours and constant and ours.value is not None and constant.value is not None:
            beats = difference.high is not None and difference.high < 0
            closer = ours.value < constant.value
            verb = "beats" if beats else "is not shown to beat" if closer else "does not beat"
            found.append(
                f"The candidate {verb} one constant, the mean of the training scores, in the {label}: "
                f"{ours.value:.2f} points off, the constant {constant.value:.2f}"
                + ("." if beats else f" (difference {_interval(name, difference)[1:-1]}).")
            )
    own = summary.arms[metrics.REFERENCE].get("scores.mae")
    if own and own.value is not None:
        found.append(
            f"Two analyses of one photograph by the reference lie {own.value:.2f} points apart ({own.n} photographs)."
        )
    unread = candidate.get("scores.unread")
    if unread and unread.value:
        found.append(
            f"{100 * unread.value:.0f}% of the candidate's answers have no readable score and are in no score figure."
        )
    masked = sum(len(scoring.scores_of(e["reference"])) - len(e["reference_scores"]) for e in report["examples"])
    if masked:
        found.append(f"{masked} reference scores were masked in training as copied; they are in no score figure.")
    return found


def one_by_one(examples: list[dict], timings: list[dict]) -> list[int] | None:
    """Return [same, all] of the timed runs: for how many a request alone gave the batch's very text.

    In float32 all agree; in 16 bits two tokens whose logits lie within rounding may swap, and the rest of the text
    then differs. None when there was nothing to compare.
    """
    outputs = {example["index"]: example["outputs"] for example in examples}
    same = []
    for row in timings:
        batched = outputs[row["example"]].get(row["arm"])
        if batched and "text" in row and "free" not in row:
            # a run that the batch stopped in a loop continued here to the token limit
            length = len(batched[0]["text"]) if batched[0]["finish"] == "loop" else None
            same.append(row["text"][:length] == batched[0]["text"])
    return [sum(same), len(same)] if same else None


def cannot_conclude(summary: Summary) -> list[str]:
    """Return what this many photographs leave open, a sentence each."""
    found = []
    for arm, figures in summary.arms.items():
        figure = figures.get("format.strict")
        if figure and figure.low is not None and figure.high - figure.low > 0.1:
            found.append(
                f"Format compliance of the {NAMES[arm]}: {format_value('format.strict', figure.value)} on {figure.n} "
                f"photographs is what a true share anywhere from {100 * figure.low:.0f}% to {100 * figure.high:.0f}% "
                "may give."
            )
    for pair in summary.differences:
        ours, theirs = pair.split("-")
        if ours.endswith(EXPECTED) or theirs == CONSTANT:
            continue
        left_open = []
        for name in ("loss.nats", "overall.mae", "scores.mae", "overall.rank", "text.comments", "vocabulary.share"):
            figure = summary.difference(ours, theirs, name)
            if figure.low is None or _sign(figure) or figure.low == figure.high:
                continue
            needed = _needed(figure)
            more = f", which about {needed:,} photographs could tell" if needed else ""
            left_open.append(f"{metrics.kind(name).label} ({format_value(name, figure.value, difference=True)}{more})")
        if left_open:
            found.append(f"The {NAMES[ours]} and the {NAMES[theirs]} cannot be told apart by: {'; '.join(left_open)}.")
    rank = summary.arms["candidate"].get("overall.rank")
    if rank and rank.value is None:
        found.append(
            "Rank correlation of the candidate's overall score: not defined, since it gives every photograph the same "
            f"score or too few can be read ({rank.n} of {summary.photographs})."
        )
    return found


def _sign(figure: Figure) -> int:
    """Return 1 or -1 for a difference whose interval leaves out zero, else 0."""
    if figure.low is None:
        return 0
    return 1 if figure.low > 0 else -1 if figure.high < 0 else 0


def _interval(name: str, figure: Figure) -> str:
    if figure.low is None:
        return "(no interval)"
    low, high = (format_value(name, side, difference=True, unit=False) for side in (figure.low, figure.high))
    return f"(95%: {low} to {high})"


def _needed(figure: Figure) -> int | None:
    """Return how many photographs would shrink the interval to the difference itself: it falls as 1 / sqrt(n)."""
    half = (figure.high - figure.low) / 2
    if abs(figure.value) < half / 30:
        return None
    needed = round(figure.n * (half / abs(figure.value)) ** 2)
    return needed if needed > figure.n else None

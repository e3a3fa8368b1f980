"""The figures of a comparison, each computed from what comparison_report.json holds.

A figure is over photographs: several samples or examples of one are averaged first. Beside the arms that answer stand
`REFERENCE` (the reference against itself, where a photograph has several analyses), `CONSTANT` (one answer for all,
the mean of the training scores) and ARM+expected (expected scores in place of the greedy ones).
"""

import collections
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.evaluation import intervals, scoring
from common.evaluation.intervals import Figure
from common.evaluation.scoring import OVERALL
from integration.lora_patch.json_text import is_number

REFERENCE, CONSTANT, EXPECTED, GRAMMAR = "reference", "constant", "+expected", "+grammar"


class Kind(NamedTuple):
    """What a figure means and how it is shown."""

    label: str
    better: str | None  # "higher", "lower" or None: neither is better in itself
    unit: str = ""  # "share" is shown in percent
    digits: int = 2


SCORE_KINDS = {  # of each dimension's scores, and of the overall score
    "mae": Kind("mean absolute error", "lower", "points"),
    "rank": Kind("Spearman's rank correlation", "higher"),
    "pearson": Kind("Pearson's correlation", "higher"),
    "pairs": Kind("pairs of photographs in the reference's order", "higher", "share"),
}
KINDS = {
    "format.strict": Kind("Strictly as the prompt demands", "higher", "share"),
    "format.lenient": Kind("Readable by a lenient parser", "higher", "share"),
    "loss.nats": Kind("Loss on held-out responses", "lower", "nats per token", 4),
    "loss.perplexity": Kind("Perplexity", "lower", "", 3),
    **{f"overall.{name}": kind._replace(label=f"Overall score: {kind.label}") for name, kind in SCORE_KINDS.items()},
    "overall.consistency": Kind("Overall score: distance from the mean of its own dimensions", "lower", "points"),
    "overall.mean": Kind("Overall score: mean", None, "points"),
    "overall.spread": Kind("Overall score: standard deviation over photographs", None, "points"),
    "scores.mae": Kind("Dimension scores: mean absolute error", "lower", "points"),
    "scores.unread": Kind("Answers without a readable overall score", "lower", "share"),
    "text.comments": Kind("Comments: overlap with the reference (chrF)", "higher", "of 100", 1),
    "text.description": Kind("Description: overlap with the reference (chrF)", "higher", "of 100", 1),
    "vocabulary.share": Kind("Advisor's vocabulary used", "higher", "share"),
    "distinct.texts": Kind("Photographs with a text of their own", "higher", "share"),
    "distinct.scores": Kind("Photographs with scores of their own", "higher", "share"),
    "distinct.similarity": Kind("Similarity of two photographs' texts", "lower", "share"),
    "distinct.within": Kind("Similarity of two dimensions' advice in one answer", "lower", "share"),
    "distinct.same_advice": Kind("Answers that give two dimensions the same advice", "lower", "share"),
    "distinct.example_scores": Kind("Scores copied from the prompt's example", "lower", "share"),
    "length.tokens": Kind("Length of an output", None, "tokens", 0),
    "speed.seconds": Kind("Seconds per photograph, one at a time (median)", "lower", "s"),
    "speed.p95": Kind("Seconds per photograph, one at a time (95th percentile)", "lower", "s"),
    "speed.first_token": Kind("Time to first token (median)", "lower", "s", 3),
    "speed.tokens_per_second": Kind("Tokens per second (median)", "higher", "/s", 1),
    "speed.peak_gb": Kind("Peak memory", "lower", "GB"),
    "speed.load_seconds": Kind("Adapter load time", "lower", "s", 3),
    "speed.overhead": Kind("Overhead over the base, equal lengths", "lower", "share"),
}
MEASURES = {  # figure -> field of an output's measures
    "overall.consistency": "consistency",
    "text.comments": "comments",
    "text.description": "description",
    "vocabulary.share": "vocabulary",
    "distinct.within": "within",
    "distinct.same_advice": "same_advice",
    "distinct.example_scores": "example_scores",
}
BROKEN_LOSS = 1000.0  # nats per token, the most that a photograph counts with; also where its loss is no number
UNPAIRED = (
    "loss.perplexity",
    "overall.spread",
    "distinct.texts",
    "distinct.scores",
)  # of one arm alone; speed has ratios
TIMES = {"speed.seconds": "seconds", "speed.first_token": "first_token_seconds"}


def kind(name: str) -> Kind:
    """Return what a figure means; figures of one dimension or failure class are named after it. KeyError if none is."""
    if name in KINDS:
        return KINDS[name]
    group, _, rest = name.partition(":")
    if group == "failure":
        return Kind(scoring.FAILURES[rest], "lower", "share")
    found = SCORE_KINDS[group]
    return found._replace(label=f"{rest}: {found.label}")


def is_paired(name: str) -> bool:
    """Tell whether a figure's difference between two arms is computed."""
    return name not in UNPAIRED and not name.startswith("speed.")


def score_figure(group: str, name: str) -> str:
    """Return the name of a score's figure: "mae:Lighting", or "overall.mae" for the overall score."""
    return f"overall.{group}" if name == OVERALL else f"{group}:{name}"


@dataclass(frozen=True)
class Summary:
    """All figures of a report: of each arm, of its differences from others and, for speed, its ratios to others."""

    photographs: int
    arms: dict[str, dict[str, Figure]]
    differences: dict[str, dict[str, Figure]]  # "candidate-base": candidate minus base, in the figure's unit
    ratios: dict[str, dict[str, Figure]]  # "candidate/base"

    def to_dict(self) -> dict:
        tables = {
            name: {of: {figure: value.to_dict() for figure, value in row.items()} for of, row in table.items()}
            for name, table in (("arms", self.arms), ("differences", self.differences), ("ratios", self.ratios))
        }
        return {"photographs": self.photographs, **tables}

    def difference(self, ours: str, theirs: str, name: str) -> Figure:
        return self.differences.get(f"{ours}-{theirs}", {}).get(name, Figure(None, 0))


def summarise(report: dict) -> Summary:
    """Return all figures of a judged report (`comparison.judged`)."""
    arms, constant = list(report["arms"]), report.get("training_scores")
    photographs = _photographs(report["examples"])
    expected = [
        arm + EXPECTED
        for arm in arms
        if any("expected_scores" in output for e in report["examples"] for output in e["outputs"][arm])
    ]
    every = [*arms, *expected, *([CONSTANT] if constant else []), REFERENCE]
    columns = {arm: _columns(photographs, arm, constant) for arm in every}
    figures = {arm: _figures(columns[arm]) for arm in every}
    speed = summarise_speed(report["timings"], arms)
    for arm in arms:
        figures[arm] |= speed.arms[arm]
        seconds = report["arms"][arm].get("load_seconds")
        if seconds is not None:
            figures[arm]["speed.load_seconds"] = Figure(seconds, 1)
    both = [(*pair, _differences(*(columns[arm] for arm in pair))) for pair in pairs(every)]
    return Summary(len(photographs), figures, {f"{ours}-{theirs}": found for ours, theirs, found in both}, speed.ratios)


def summarise_speed(timings: list[dict], arms: list[str]) -> Summary:
    """Return the figures of speed alone."""
    speeds = {arm: _speeds(timings, arm) for arm in arms}
    return Summary(
        max(map(len, speeds.values())),
        {arm: _speed_figures(speeds[arm], _overheads(speeds, arm)) for arm in arms},
        {},
        {f"{ours}/{theirs}": _ratios(speeds[ours], speeds[theirs]) for ours, theirs in pairs(arms)},
    )


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """Return which arms are compared: every adapter with the base, the candidate with the deployed one and with the
    constant, a run under the grammar with the same adapter's free run, expected scores with greedy ones."""
    adapters = [arm for arm in ("candidate", "deployed") if arm in arms]
    found = [(arm, "base") for arm in adapters]
    found += [("candidate", other) for other in ("deployed", CONSTANT) if other in arms]
    return found + [(arm, arm.partition("+")[0]) for arm in arms if "+" in arm]


def identical_outputs(examples: list[dict], ours: str, theirs: str) -> tuple[int, int]:
    """Return (photographs for which two arms gave the same outputs, photographs that both have)."""
    both = [
        [output["text"] for output in example["outputs"][ours]]
        == [output["text"] for output in example["outputs"][theirs]]
        for example in examples
        if example["outputs"].get(ours) and example["outputs"].get(theirs)
    ]
    return sum(both), len(both)


# -- columns: a value a photograph ------------------------------------------------------------------------------------


def _photographs(examples: list[dict]) -> list[list[dict]]:
    """Group the examples by photograph (content hash): the unit that is resampled."""
    groups = collections.defaultdict(list)
    for example in examples:
        groups[tuple(photo["sha256"] for photo in example["photographs"])].append(example)
    return list(groups.values())


def _columns(photographs: list[list[dict]], arm: str, constant: dict | None) -> dict:
    """Return an arm's columns, float [photographs] each (NaN: not measured), and what pairs of photographs need."""
    names = list(dict.fromkeys(name for group in photographs for example in group for name in example["dimensions"]))
    found = {"names": [*names, OVERALL]}
    for name in found["names"]:
        held = [
            [(ours[name], wanted[name]) for ours, wanted in group if name in ours and name in wanted]
            for group in (_scored(group, arm, constant) for group in photographs)
        ]
        found[f"mae {name}"] = _column([[abs(ours - wanted) for ours, wanted in group] for group in held])
        found[f"score {name}"] = _column([[ours for ours, _ in group] for group in held])
        found[f"wanted {name}"] = _column([[wanted for _, wanted in group] for group in held])
    errors = np.stack([found[f"mae {name}"] for name in names]) if names else np.empty((0, len(photographs)))
    found["scores.mae"] = np.array([_average(list(column)) for column in errors.T], dtype=float)
    if arm == CONSTANT or arm.endswith(EXPECTED):
        return found
    outputs = [[output for example in group for output in _outputs(example, arm)] for group in photographs]
    for figure, field in MEASURES.items():
        found[figure] = _column([[output["measures"][field] for output in group] for group in outputs])
    overall = [[output["measures"]["scores"].get(OVERALL) for output in group] for group in outputs]
    found["overall.mean"] = _column(overall)
    found["first outputs"] = firsts = [group[0] for group in outputs if group]
    grams = [scoring.trigrams(scoring.plain_words(o["verdict"]["analysis"], o["text"])) for o in firsts]
    found["similarity"] = scoring.similarities(grams)
    if arm == REFERENCE:
        return found
    found["scores.unread"] = _column([[value is None for value in group] for group in overall])
    for name in ("strict", "lenient"):
        found[f"format.{name}"] = _column([[o["verdict"][name] for o in group] for group in outputs])
    for failure in scoring.FAILURES:
        first = [[failure in o["verdict"]["failures"][:1] for o in group] for group in outputs]
        found[f"failure:{failure}"] = _column(first)
    found["length.tokens"] = _column([[o["tokens"] for o in group] for group in outputs])
    losses = [[example["loss"][arm] for example in group if arm in example["loss"]] for group in photographs]
    found["loss"] = tuple(np.array([_totals(group) for group in losses]).T)
    return found


def _scored(group: list[dict], arm: str, constant: dict | None) -> list[tuple[dict, dict]]:
    """Return a photograph's (scores, scores of the reference) by name; masked scores are no reference."""
    if arm == REFERENCE:
        known = [e["reference_scores"] for e in group]
        return [(one, other) for at, one in enumerate(known) for other in known[at + 1 :]]
    if arm == CONSTANT:
        return [(constant["means"], example["reference_scores"]) for example in group]
    if arm.endswith(EXPECTED):
        outputs = [(e, o) for e in group for o in e["outputs"][arm.removesuffix(EXPECTED)] if o.get("expected_scores")]
        return [(output["expected_scores"], example["reference_scores"]) for example, output in outputs]
    outputs = [(example, output) for example in group for output in example["outputs"].get(arm, [])]
    return [(output["measures"]["scores"], example["reference_scores"]) for example, output in outputs]


def _outputs(example: dict, arm: str) -> list[dict]:
    if arm != REFERENCE:
        return example["outputs"].get(arm, [])
    verdict = {"analysis": example["reference"]}
    reference = {"text": example["response"], "verdict": verdict, "measures": example["reference_measures"]}
    return [reference] if example["reference"] else []


def _column(groups: list[list]) -> np.ndarray:
    return np.array([_average(group) for group in groups], dtype=float)


def _average(values: list) -> float:
    """Return the mean of what was measured, NaN when nothing was."""
    found = [float(value) for value in values if is_number(value) or isinstance(value, bool)]
    return sum(found) / len(found) if found else math.nan


def _totals(losses: list[dict]) -> tuple[float, float]:
    """Add up a photograph's losses: (nats, tokens), NaN when there is none. At most `BROKEN_LOSS` a token.

    A loss that is no number (null) counts as the most: left out, the photographs that an adapter breaks would not
    count against it.
    """
    if not losses:
        return math.nan, math.nan
    most = [BROKEN_LOSS * loss["tokens"] for loss in losses]
    sums = [limit if loss["sum"] is None else min(loss["sum"], limit) for loss, limit in zip(losses, most, strict=True)]
    return float(sum(sums)), float(sum(loss["tokens"] for loss in losses))


# -- figures of the columns -------------------------------------------------------------------------------------------


def _figures(columns: dict) -> dict[str, Figure]:
    found = {}
    for name, column in columns.items():
        if isinstance(column, np.ndarray) and column.ndim == 1 and " " not in name:
            share = kind(name).unit == "share"
            found[name] = intervals.share(column) if share else _mean(name, column).within(0.0, math.inf)
    for name in columns["names"]:
        ours, wanted = columns[f"score {name}"], columns[f"wanted {name}"]
        mae = score_figure("mae", name)
        found[mae] = _mean(mae, columns[f"mae {name}"]).within(0.0, math.inf)
        found[score_figure("rank", name)] = intervals.correlation(ours, wanted, ranks=True)
        found[score_figure("pearson", name)] = intervals.correlation(ours, wanted, ranks=False)
        found[score_figure("pairs", name)] = intervals.pairs(*_ordered(ours, wanted)).within(0.0, 1.0)
    if "first outputs" in columns:
        overall = intervals.known(columns["overall.mean"])
        spread = float(overall.std(ddof=1)) if len(overall) > 1 else None
        found["overall.spread"] = Figure(spread, len(overall))
        firsts = columns["first outputs"]
        scores = [tuple(sorted(o["measures"]["scores"].items())) for o in firsts if o["measures"]["scores"]]
        for name, items in (("texts", [o["text"] for o in firsts]), ("scores", scores)):
            found[f"distinct.{name}"] = Figure(len(set(items)) / len(items) if items else None, len(items))
        found["distinct.similarity"] = intervals.pairs(columns["similarity"]).within(0.0, 1.0)
    if "loss" in columns:
        found["loss.nats"] = loss = intervals.ratio(*columns["loss"])
        # a loss past 700 overflows a float; such a model is broken, and the report must still be written
        found["loss.perplexity"] = loss.map(lambda side: math.exp(min(side, 700.0)))
    return found


def _mean(name: str, column: np.ndarray) -> Figure:
    """Return the mean of a column of a figure's values, or of their differences; scores have steps of a point."""
    return intervals.mean(column, step=1.0 if kind(name).unit == "points" else 0.0)


def _ordered(ours: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, of each pair of photographs [n, n], whether both orders agree (0.5 for equal outputs), and its weight:
    0 where the reference is equal."""
    kept = ~np.isnan(ours + wanted)
    ours, wanted = (side[kept][:, None] - side[kept] for side in (ours, wanted))
    return np.sign(ours) * np.sign(wanted) / 2 + 0.5, np.sign(np.abs(wanted))


def _differences(ours: dict, theirs: dict) -> dict[str, Figure]:
    """Return ours minus theirs for every figure that pairs photograph by photograph."""
    found = {}
    for name in ours.keys() & theirs.keys():
        if isinstance(ours[name], np.ndarray) and ours[name].ndim == 1 and " " not in name:
            share = kind(name).unit == "share"
            found[name] = (
                intervals.share_difference(ours[name], theirs[name])
                if share
                else _mean(name, ours[name] - theirs[name])
            )
    for name in ours["names"]:
        a, b, wanted = ours[f"score {name}"], theirs[f"score {name}"], ours[f"wanted {name}"]
        mae = score_figure("mae", name)
        found[mae] = _mean(mae, ours[f"mae {name}"] - theirs[f"mae {name}"])
        for group, ranks in (("rank", True), ("pearson", False)):
            found[score_figure(group, name)] = intervals.correlation_difference(a, b, wanted, ranks)
        kept = ~np.isnan(a + b)
        (one, weight), (other, _) = (_ordered(side[kept], wanted[kept]) for side in (a, b))
        found[score_figure("pairs", name)] = intervals.pairs(one - other, weight)
    if "loss" in ours and "loss" in theirs:
        found["loss.nats"] = intervals.ratio_difference(ours["loss"], theirs["loss"])
    if "similarity" in ours and "similarity" in theirs and ours["similarity"].shape == theirs["similarity"].shape:
        found["distinct.similarity"] = intervals.pairs(ours["similarity"] - theirs["similarity"])
    return dict(sorted(found.items()))


# -- speed ------------------------------------------------------------------------------------------------------------


def _speeds(timings: list[dict], arm: str) -> dict[int, dict]:
    """Return an arm's timed photographs: of several runs of one, the medians."""
    runs = collections.defaultdict(list)
    for row in timings:
        if row["arm"] == arm:
            runs[row["example"]].append(row)
    fields = ("seconds", "first_token_seconds", "tokens")
    return {
        example: rows[0] | {field: float(np.median([row[field] for row in rows])) for field in fields}
        for example, rows in runs.items()
    }


def _speed_figures(speeds: dict[int, dict], overheads: np.ndarray) -> dict[str, Figure]:
    if not speeds:
        return {}
    rows = list(speeds.values())
    seconds = np.array([row["seconds"] for row in rows])
    figures = {name: intervals.median(np.array([row[field] for row in rows])) for name, field in TIMES.items()}
    figures["speed.p95"] = Figure(float(np.quantile(seconds, 0.95)), len(rows))
    figures["speed.tokens_per_second"] = intervals.median(np.array([_rate(row) for row in rows]))
    peaks = [row["peak_bytes"] for row in rows if row.get("peak_bytes") is not None]
    if peaks:
        figures["speed.peak_gb"] = Figure(max(peaks) / 1e9, len(peaks))
    if len(overheads):
        figures["speed.overhead"] = intervals.median(overheads)
    return figures


def _rate(row: dict) -> float:
    """Return tokens a second after the first token, NaN when there is none after it."""
    after = row["seconds"] - row["first_token_seconds"]
    return (row["tokens"] - 1) / after if row["tokens"] > 1 and after > 0 else math.nan


def _overheads(speeds: dict[str, dict[int, dict]], arm: str) -> np.ndarray:
    """Return, a timed photograph each, how much longer an arm takes than the base for an output of its own length.

    time(n tokens) = time to first token + (n - 1) / tokens a second, for both with the arm's n: an adapter that
    writes longer answers is slower to read, which `speed.seconds` shows, but that is no cost of the adapter itself.
    """
    if arm == "base":
        return np.array([])
    ours, base = speeds[arm], speeds["base"]
    found = []
    for example in sorted(ours.keys() & base.keys()):
        row, other = ours[example], base[example]
        expected = other["first_token_seconds"] + (row["tokens"] - 1) / _rate(other)
        found.append(row["seconds"] / expected - 1 if row["tokens"] > 1 else math.nan)
    return np.array(found)


def _ratios(ours: dict[int, dict], theirs: dict[int, dict]) -> dict[str, Figure]:
    """Return ours / theirs of the timed runs, photograph by photograph (median), measured in turn."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return {}
    # a run under the grammar carries its own free run, made by the same code
    theirs = {at: ours[at].get("free", theirs[at]) for at in both}
    found = {
        name: intervals.median(np.array([ours[at][field] / theirs[at][field] for at in both]))
        for name, field in TIMES.items()
    }
    rates = np.array([_rate(ours[at]) / _rate(theirs[at]) for at in both])
    found["speed.tokens_per_second"] = intervals.median(rates)
    peaks = [(ours[at].get("peak_bytes"), theirs[at].get("peak_bytes")) for at in both]
    if all(a and b for a, b in peaks):
        found["speed.peak_gb"] = Figure(max(a for a, _ in peaks) / max(b for _, b in peaks), len(both))
    return found

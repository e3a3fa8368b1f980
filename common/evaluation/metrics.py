"""The figures of a comparison: every one recomputed here from what comparison_report.json holds.

`summarise` takes the report's own lists (examples with their judged outputs and losses, timed runs) and returns
{"photographs", "arms": {arm: {figure: {value, low, high, n}}}, "differences": {"candidate-base": {...}},
"ratios": {"candidate/base": {...}}}. A figure is over photographs: several samples or examples of one are averaged.
"""

import collections
import math
from typing import NamedTuple

import numpy as np

from common.evaluation import intervals
from common.evaluation import scoring as judge
from common.evaluation.intervals import Figure


class Kind(NamedTuple):
    """What a figure means and how it is shown."""

    label: str
    better: str | None  # "higher", "lower" or None: neither is better in itself
    unit: str = ""  # "share" is shown in percent
    digits: int = 2


KINDS = {
    "format.strict": Kind("Strictly as demanded", "higher", "share"),
    "format.lenient": Kind("Readable by a lenient parser", "higher", "share"),
    "loss.nats": Kind("Loss on held-out responses", "lower", "nats a token", 4),
    "loss.perplexity": Kind("Perplexity", "lower", "", 3),
    "overall.mae": Kind("Overall score: mean error", "lower", "points"),
    "overall.rank": Kind("Overall score: rank correlation", "higher", ""),
    "overall.consistency": Kind("Overall score: distance from its own dimensions' mean", "lower", "points"),
    "overall.mean": Kind("Overall score: mean", None, "points"),
    "overall.spread": Kind("Overall score: spread over photographs", None, "points"),
    "scores.mae": Kind("Dimension scores: mean error", "lower", "points"),
    "text.comments": Kind("Comments: overlap with the reference (chrF)", "higher", "of 100", 1),
    "text.description": Kind("Description: overlap with the reference (chrF)", "higher", "of 100", 1),
    "vocabulary.share": Kind("Advisor's vocabulary used", "higher", "share"),
    "distinct.texts": Kind("Photographs with a text of their own", "higher", "share"),
    "distinct.scores": Kind("Photographs with scores of their own", "higher", "share"),
    "distinct.similarity": Kind("Likeness of two photographs' texts", "lower", "share"),
    "distinct.example_scores": Kind("Scores copied from the prompt's example", "lower", "share"),
    "length.tokens": Kind("Length of an output", None, "tokens", 0),
    "speed.seconds": Kind("Seconds an image, one at a time (median)", "lower", "s"),
    "speed.p95": Kind("Seconds an image, one at a time (95th percentile)", "lower", "s"),
    "speed.first_token": Kind("Time to first token (median)", "lower", "s", 3),
    "speed.tokens_per_second": Kind("Tokens a second (median)", "higher", "/s", 1),
    "speed.peak_gb": Kind("Peak memory", "lower", "GB"),
    "speed.load_seconds": Kind("Adapter load time", "lower", "s", 3),
    "speed.overhead": Kind("Overhead over the base, equal lengths", "lower", "share"),
}
MEANS = {  # figure -> field of an output's measures
    "overall.mae": "overall_error",
    "overall.consistency": "consistency",
    "overall.mean": "overall",
    "text.comments": "comments",
    "text.description": "description",
    "vocabulary.share": "vocabulary",
    "distinct.example_scores": "example_scores",
}
SHARES = ("format.strict", "format.lenient", "distinct.example_scores")
TIMES = {"speed.seconds": "seconds", "speed.first_token": "first_token_seconds"}
REFERENCE = "reference"


def kind(name: str) -> Kind:
    """Return what a figure means; figures of one dimension or failure class are named after it."""
    if name in KINDS:
        return KINDS[name]
    group, _, rest = name.partition(":")
    if group == "failure":
        return Kind(judge.FAILURES[rest], "lower", "share")
    if group in ("mae", "rank"):
        label = "mean absolute error" if group == "mae" else "rank correlation"
        return Kind(f"{rest}: {label}", "lower" if group == "mae" else "higher", "points" if group == "mae" else "")
    raise KeyError(name)


def summarise(examples: list[dict], timings: list[dict], arms: list[str], load_seconds: dict[str, float]) -> dict:
    """Return all figures of a report (module docstring); ``arms`` in the order shown, "base" first."""
    photographs = _photographs(examples)
    columns = {arm: _columns(photographs, arm) for arm in [*arms, REFERENCE]}
    speeds = {arm: _speeds(timings, arm) for arm in arms}
    overheads = {arm: _overheads(timings, arm) for arm in arms}
    summary = {"photographs": len(photographs), "arms": {}, "differences": {}, "ratios": {}}
    for arm in [*arms, REFERENCE]:
        figures = _arm_figures(columns[arm])
        if arm != REFERENCE:
            figures |= _speed_figures(speeds[arm], overheads[arm])
            if arm in load_seconds:
                figures["speed.load_seconds"] = Figure(load_seconds[arm], None, None, 1)
        summary["arms"][arm] = {name: figure.as_dict() for name, figure in figures.items()}
    for ours, theirs in pairs(arms):
        differences = _differences(columns[ours], columns[theirs])
        summary["differences"][f"{ours}-{theirs}"] = {name: figure.as_dict() for name, figure in differences.items()}
        ratios = _ratios(speeds[ours], speeds[theirs])
        summary["ratios"][f"{ours}/{theirs}"] = {name: figure.as_dict() for name, figure in ratios.items()}
    return summary


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """Return which arms are compared: every adapter with the base, the candidate with the deployed one, and a run
    under the grammar with the same adapter's free run."""
    found = [(arm, "base") for arm in arms if arm != "base" and not arm.endswith("+grammar")]
    if "candidate" in arms and "deployed" in arms:
        found.append(("candidate", "deployed"))
    return found + [(arm, arm.removesuffix("+grammar")) for arm in arms if arm.endswith("+grammar")]


def identical_outputs(examples: list[dict], ours: str, theirs: str) -> tuple[int, int]:
    """Return (photographs for which two arms gave the very same outputs, photographs that both have)."""
    both = [
        [output["text"] for output in example["outputs"][ours]]
        == [output["text"] for output in example["outputs"][theirs]]
        for example in examples
        if example["outputs"].get(ours) and example["outputs"].get(theirs)
    ]
    return sum(both), len(both)


def _photographs(examples: list[dict]) -> list[list[dict]]:
    """Group the examples by photograph (content hash): the unit that is resampled."""
    groups = collections.defaultdict(list)
    for example in examples:
        groups[tuple(photo["sha256"] for photo in example["photographs"])].append(example)
    return list(groups.values())


def _columns(photographs: list[list[dict]], arm: str) -> dict:
    """Return one arm's values, a float array over photographs each (NaN: not measured), and what pairs need."""
    outputs = [[output for example in group for output in _outputs(example, arm)] for group in photographs]
    found = {
        name: _column([[output["measures"][field] for output in group] for group in outputs])
        for name, field in MEANS.items()
    }
    names = list(dict.fromkeys(name for group in photographs for example in group for name in example["dimensions"]))
    for name in names:
        found[f"mae:{name}"] = _column([[o["measures"]["errors"].get(name) for o in group] for group in outputs])
        found[f"score:{name}"] = _column([[o["measures"]["scores"].get(name) for o in group] for group in outputs])
        wanted = [[judge.dimension_scores(e["reference"] or {}).get(name) for e in group] for group in photographs]
        found[f"wanted:{name}"] = _column(wanted)
    found["wanted:overall"] = _column(
        [[(example["reference"] or {}).get("overall_score") for example in group] for group in photographs]
    )
    found["scores.mae"] = _column([[_average(o["measures"]["errors"].values()) for o in group] for group in outputs])
    if arm != REFERENCE:
        found["format.strict"] = _column([[o["verdict"]["strict"] for o in group] for group in outputs])
        found["format.lenient"] = _column([[o["verdict"]["lenient"] for o in group] for group in outputs])
        for failure in judge.FAILURES:
            found[f"failure:{failure}"] = _column(
                [[failure in o["verdict"]["failures"][:1] for o in group] for group in outputs]
            )
        found["length.tokens"] = _column([[o["tokens"] for o in group] for group in outputs])
        losses = [[example["loss"][arm] for example in group if arm in example["loss"]] for group in photographs]
        found["loss"] = (
            np.array([_total(group, "sum") for group in losses]),
            np.array([_total(group, "tokens") for group in losses]),
        )
    firsts = [group[0] for group in outputs if group]
    found["texts"] = [output["text"] for output in firsts]
    found["score_sets"] = [
        tuple(sorted(output["measures"]["scores"].items())) for output in firsts if output["measures"]["scores"]
    ]
    grams = [judge.trigrams(judge.plain_words(o["verdict"]["analysis"], o["text"])) for o in firsts]
    found["similarity"] = np.array([[judge.similarity(one, other) for other in grams] for one in grams])
    found["dimensions"] = names
    return found


def _total(losses: list[dict], name: str) -> float:
    """Add up a photograph's losses; NaN when there is none, or one that is no number."""
    known = [loss[name] for loss in losses if loss[name] is not None]
    return float(sum(known)) if known and len(known) == len(losses) else np.nan


def _outputs(example: dict, arm: str) -> list[dict]:
    if arm != REFERENCE:
        return example["outputs"].get(arm, [])
    if not example["reference"]:
        return []
    verdict = {"analysis": example["reference"], "strict": True, "lenient": True, "failures": []}
    return [{"text": example["response"], "verdict": verdict, "measures": example["reference_measures"], "tokens": 0}]


def _column(groups: list[list]) -> np.ndarray:
    """Average each photograph's values, leaving out what was not measured."""
    return np.array([_average(group) if _average(group) is not None else np.nan for group in groups], dtype=float)


def _average(values) -> float | None:
    known = [float(value) for value in values if judge.is_number(value) or isinstance(value, bool)]
    return sum(known) / len(known) if known else None


def _arm_figures(columns: dict) -> dict[str, Figure]:
    figures = {}
    for name in KINDS:
        if isinstance(columns.get(name), np.ndarray):
            figures[name] = (intervals.share if name in SHARES else intervals.mean)(columns[name])
    for name in columns:
        if name.startswith("mae:"):
            figures[name] = intervals.mean(columns[name])
        elif name.startswith("failure:"):
            figures[name] = intervals.share(columns[name])
    for name in columns["dimensions"]:
        figures[f"rank:{name}"] = intervals.rank_correlation(columns[f"score:{name}"], columns[f"wanted:{name}"])
    figures["overall.rank"] = intervals.rank_correlation(columns["overall.mean"], columns["wanted:overall"])
    known = columns["overall.mean"][~np.isnan(columns["overall.mean"])]
    spread = float(known.std(ddof=1)) if len(known) > 1 else None
    figures["overall.spread"] = Figure(spread, None, None, len(known))
    for name, items in (("distinct.texts", columns["texts"]), ("distinct.scores", columns["score_sets"])):
        share = len(set(items)) / len(items) if items else None
        figures[name] = Figure(share, None, None, len(items))
    figures["distinct.similarity"] = intervals.pairs_mean(columns["similarity"])
    if "loss" in columns:
        figures["loss.nats"] = loss = intervals.ratio(*columns["loss"])
        figures["loss.perplexity"] = Figure(*(_exp(value) for value in loss[:3]), loss.n)
    return figures


def _differences(ours: dict, theirs: dict) -> dict[str, Figure]:
    """Return ours minus theirs for every figure that pairs photograph by photograph."""
    found = {}
    for name, column in ours.items():
        if isinstance(column, np.ndarray) and column.ndim == 1 and name.partition(":")[0] not in ("score", "wanted"):
            found[name] = intervals.mean(column - theirs[name])
    for name in ours["dimensions"]:
        found[f"rank:{name}"] = intervals.rank_correlation_difference(
            ours[f"score:{name}"], theirs[f"score:{name}"], ours[f"wanted:{name}"]
        )
    found["overall.rank"] = intervals.rank_correlation_difference(
        ours["overall.mean"], theirs["overall.mean"], ours["wanted:overall"]
    )
    found["loss.nats"] = intervals.ratio_difference(ours["loss"], theirs["loss"])
    if ours["similarity"].shape == theirs["similarity"].shape:
        found["distinct.similarity"] = intervals.pairs_mean_difference(ours["similarity"], theirs["similarity"])
    return found


def _speeds(timings: list[dict], arm: str) -> dict[int, dict]:
    return {timing["example"]: timing for timing in timings if timing["arm"] == arm}


def _speed_figures(speeds: dict[int, dict], overheads: np.ndarray) -> dict[str, Figure]:
    if not speeds:
        return {}
    rows = list(speeds.values())
    seconds = np.array([row["seconds"] for row in rows])
    figures = {name: intervals.median(np.array([row[field] for row in rows])) for name, field in TIMES.items()}
    figures["speed.p95"] = intervals.quantile(seconds, 0.95)
    figures["speed.tokens_per_second"] = intervals.median(np.array([_rate(row) for row in rows]))
    peaks = [row["peak_bytes"] for row in rows if row.get("peak_bytes") is not None]
    if peaks:
        figures["speed.peak_gb"] = Figure(max(peaks) / 1e9, None, None, len(peaks))
    if len(overheads):
        figures["speed.overhead"] = intervals.median(overheads)
    return figures


def _rate(row: dict) -> float:
    """Return tokens a second after the first token, NaN when there is none after it."""
    after = row["seconds"] - row["first_token_seconds"]
    return (row["tokens"] - 1) / after if row["tokens"] > 1 and after > 0 else math.nan


def _overheads(timings: list[dict], arm: str) -> np.ndarray:
    """Return, a timed photograph each, how much longer an arm takes than the base for an output of its own length.

    time(n tokens) = time to first token + (n - 1) / tokens a second, for both with the arm's n: an adapter that
    writes longer answers is slower to read, which `speed.seconds` shows, but that is no cost of the adapter itself.
    """
    if arm == "base":
        return np.array([])
    ours, base = _speeds(timings, arm), _speeds(timings, "base")
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
        found["speed.peak_gb"] = Figure(max(a for a, _ in peaks) / max(b for _, b in peaks), None, None, len(both))
    return found


def _exp(value: float | None) -> float | None:
    # a loss past 700 overflows a float; such a model is broken, and the report must still be written
    return math.exp(min(value, 700.0)) if value is not None else None

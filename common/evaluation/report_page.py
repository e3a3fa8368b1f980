"""The comparison as one self-contained page: verdict first, figures with intervals, charts, then every photograph.

`render` takes the report of `comparison` and the pictures as data URIs; the page's form is report.html.j2
beside this file. Everything that a model wrote is escaped by the template engine, and the page's own policy lets no
other script run and no other address be read.
"""

import base64
import difflib
import hashlib
import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.evaluation import charts, metrics
from common.evaluation import scoring as judge
from common.evaluation.comparison import NAMES
from common.evaluation.gates import bound_text, format_value

HERE = Path(__file__).parent
GROUPS = (
    ("Format", ("format.strict", "format.lenient", "length.tokens")),
    ("Loss, teacher-forced", ("loss.nats", "loss.perplexity")),
    (
        "Scores against the reference",
        ("overall.mae", "overall.rank", "overall.mean", "overall.spread", "overall.consistency", "scores.mae"),
    ),
    ("Texts", ("text.comments", "text.description", "vocabulary.share")),
    (
        "Distinct between photographs",
        ("distinct.texts", "distinct.scores", "distinct.similarity", "distinct.example_scores"),
    ),
    (
        "Speed, one request at a time",
        (
            "speed.seconds",
            "speed.p95",
            "speed.first_token",
            "speed.tokens_per_second",
            "speed.peak_gb",
            "speed.load_seconds",
            "speed.overhead",
        ),
    ),
)
FINDINGS = {"better": "good", "worse": "bad", "not shown": "open", "no difference": "open"}
MARKED_FROM = 0.35  # texts less alike than this are other texts: marking every word of them says nothing


def render(report: dict, pictures: dict[int, list[str]]) -> str:
    """Return the page as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (HERE / "report.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    arms = list(report["arms"])
    return environment.get_template("report.html.j2").render(
        report=report,
        script=Markup(script),
        script_hash=digest,
        arms=arms,
        names=NAMES,
        verdict=report["verdict"],
        findings=[row | {"class": FINDINGS[row["finding"]]} for row in report["verdict"]["comparisons"]],
        gates=[
            row | {"bound": bound_text(row), "shown": _gate_value(row), "range": _gate_range(row)}
            for row in report["gates"]
        ],
        groups=_groups(report, arms),
        dimensions=_dimension_rows(report, arms),
        failures=_failure_rows(report, arms),
        pairs=[(f"{ours}-{theirs}", NAMES[ours], NAMES[theirs]) for ours, theirs in metrics.pairs(arms)],
        ratios=_ratio_rows(report),
        charts=_charts(report, arms),
        cards=_cards(report, pictures),
        facts=_facts(report),
    )


def _gate_value(row: dict) -> str:
    return format_value(row["figure"], row["value"], row["versus"] is not None) if row["value"] is not None else "–"


def _gate_range(row: dict) -> str:
    if row["low"] is None:
        return ""
    return " to ".join(
        format_value(row["figure"], row[side], row["versus"] is not None, False) for side in ("low", "high")
    )


def _groups(report: dict, arms: list[str]) -> list[dict]:
    found = []
    for title, names in GROUPS:
        rows = [_figure_row(report, name, arms) for name in names]
        rows = [row for row in rows if any(cell["value"] != "not measured" for cell in row["cells"])]
        if rows:
            found.append({"title": title, "rows": rows})
    return found


def _dimension_rows(report: dict, arms: list[str]) -> list[dict]:
    names = list(dict.fromkeys(name for example in report["examples"] for name in example["dimensions"]))
    return [
        {"name": name, "rows": [_figure_row(report, f"{group}:{name}", arms) for group in ("mae", "rank")]}
        for name in names
    ]


def _failure_rows(report: dict, arms: list[str]) -> list[dict]:
    rows = [_figure_row(report, f"failure:{name}", arms) for name in judge.FAILURES]
    return [row for row in rows if any(cell["number"] for cell in row["cells"])]


def _figure_row(report: dict, name: str, arms: list[str]) -> dict:
    kind, figures = metrics.kind(name), report["summary"]["arms"]
    cells = []
    for arm in [*arms, metrics.REFERENCE]:
        figure = figures[arm].get(name, {})
        cells.append(
            {
                "arm": arm,
                "value": format_value(name, figure.get("value"), unit=False),
                "number": figure.get("value"),
                "interval": _range(name, figure),
                "n": figure.get("n"),
            }
        )
    differences = []
    for ours, theirs in metrics.pairs(arms):
        figure = report["summary"]["differences"][f"{ours}-{theirs}"].get(name)
        differences.append(_difference(name, figure, kind))
    unit = "" if kind.unit == "share" else kind.unit.replace("/s", "a second")
    return {"label": kind.label, "unit": unit, "better": kind.better, "cells": cells, "differences": differences}


def _range(name: str, figure: dict) -> str:
    if figure.get("low") is None:
        return ""
    return " to ".join(format_value(name, figure[side], unit=False) for side in ("low", "high"))


def _difference(name: str, figure: dict | None, kind: metrics.Kind) -> dict | None:
    if not figure or figure["value"] is None:
        return None
    value, low, high = figure["value"], figure["low"], figure["high"]
    shown = {"value": format_value(name, value, True, unit=False), "interval": "", "spark": "", "class": ""}
    if low is None:
        return shown
    good = None
    if (low > 0 or high < 0) and kind.better:
        good = (value > 0) == (kind.better == "higher")
    shown["interval"] = " to ".join(format_value(name, side, True, unit=False) for side in (low, high))
    shown["spark"] = charts.interval(low, value, high, max(abs(low), abs(high)) * 1.15, good)
    shown["class"] = "" if good is None else "good" if good else "bad"
    return shown


def _ratio_rows(report: dict) -> list[dict]:
    found = []
    for pair, figures in report["summary"]["ratios"].items():
        ours, theirs = pair.split("/")
        for name, figure in figures.items():
            interval = f" ({figure['low']:.2f} to {figure['high']:.2f})" if figure["low"] is not None else ""
            if figure["value"] is not None:
                text = f"{figure['value']:.2f} x{interval}"
                found.append(
                    {"pair": f"{NAMES[ours]} / {NAMES[theirs]}", "label": metrics.kind(name).label, "text": text}
                )
    return found


def _charts(report: dict, arms: list[str]) -> list[dict]:
    figures = report["summary"]["arms"]
    bars = [
        {
            "label": NAMES[arm],
            "parts": [("strict", "Strict", figures[arm]["format.strict"]["value"] or 0)]
            + [
                (name, title.partition(":")[0], figures[arm][f"failure:{name}"]["value"] or 0)
                for name, title in judge.FAILURES.items()
            ],
        }
        for arm in arms
    ]
    found = [{"title": "Format compliance", "svg": charts.compliance(bars), "legend": _legend(bars)}]
    points = [
        {
            "arm": arm,
            "label": NAMES[arm],
            "x": (example["reference"] or {}).get("overall_score"),
            "y": output["measures"]["overall"],
            "title": f"photograph {example['index'] + 1}, {NAMES[arm]}",
        }
        for example in report["examples"]
        for arm in arms
        for output in example["outputs"][arm][:1]
    ]
    points = [point for point in points if judge.is_number(point["x"]) and judge.is_number(point["y"])]
    if points:
        found.append({"title": "Overall score against the reference", "svg": charts.scatter(points), "legend": []})
    losses = [
        {"label": f"photograph {e['index'] + 1}"}
        | {arm: e["loss"][arm]["sum"] / e["loss"][arm]["tokens"] for arm in ("base", "candidate")}
        for e in report["examples"]
        if all(e["loss"].get(arm) and e["loss"][arm]["sum"] is not None for arm in ("base", "candidate"))
    ]
    if losses:
        worst = sorted(losses, key=lambda row: row["base"] - row["candidate"])[:40]
        svg = charts.dumbbells(worst, "nats a token", "Loss of each photograph, base and candidate")
        title = "Loss of each photograph, from base to candidate" + (", the 40 worst" if len(losses) > 40 else "")
        found.append({"title": title, "svg": svg, "legend": [("arm-base", "base"), ("arm-candidate", "candidate")]})
    times = [
        {"arm": arm, "label": NAMES[arm], "values": [row["seconds"] for row in report["timings"] if row["arm"] == arm]}
        for arm in arms
    ]
    if any(row["values"] for row in times):
        gate = next((row["below"] for row in report["gates"] if row["name"] == "inference_time"), None)
        slow = max(value for row in times for value in row["values"])
        # a gate far beyond every value would squeeze them into the corner
        svg = charts.strips(times, "s", "Seconds an image", gate if gate and slow > gate / 8 else None)
        found.append({"title": "Seconds an image, one request at a time", "svg": svg, "legend": []})
    return found


def _legend(bars: list[dict]) -> list[tuple[str, str]]:
    shown = {name: title for row in bars for name, title, share in row["parts"] if share > 0}
    return [(f"part-{name}", title) for name, title in shown.items()]


def _facts(report: dict) -> list[tuple[str, str]]:
    data, software = report["data"], report["software"] or {}
    arms = {arm: facts["adapter"] for arm, facts in report["arms"].items() if facts["adapter"]}
    shown = {
        "Base": report["base"]["name"],
        **{NAMES[arm].capitalize(): path for arm, path in arms.items() if not arm.endswith("+grammar")},
        "Held-out data": f"{data['path']} ({data['examples']} examples, SHA-256 {data['sha256'][:16]})",
        "Device": report["device"] or "not recorded",
        "Software": ", ".join(f"{name} {version}" for name, version in software.items()),
        "Made": f"{report['created_at']} in {report['seconds']:.0f} s",
    }
    settings = report["settings"]
    names = ("num_samples", "temperature", "seed", "max_tokens", "batch_size", "max_image_size", "timing_examples")
    shown["Settings"] = ", ".join(f"{name} {settings.get(name)}" for name in names)
    check = report["verdict"]["one_by_one"]
    if check:
        shown["Batch against one by one"] = (
            f"the same text in {check[0]} of {check[1]} runs that were timed one at a time"
        )
    return list(shown.items())


# -- a card a photograph ----------------------------------------------------------------------------------------------


def _cards(report: dict, pictures: dict[int, list[str]]) -> list[dict]:
    """Return the photographs' cards, worst candidate output first."""
    cards = [_card(report, example, pictures[example["index"]]) for example in report["examples"]]
    return sorted(cards, key=lambda card: (-card["badness"], card["index"]))


def _card(report: dict, example: dict, pictures: list[str]) -> dict:
    reference, arms = example["reference"], [arm for arm in report["arms"] if example["outputs"].get(arm)]
    firsts = {arm: example["outputs"][arm][0] for arm in arms}
    candidate = firsts.get("candidate")
    gain = _loss_gain(example)
    columns = [_column("reference", reference, None, reference)]
    columns += [_column(arm, output["verdict"]["analysis"], output, reference) for arm, output in firsts.items()]
    error = candidate["measures"]["overall_error"] if candidate else None
    return {
        "index": example["index"],
        "name": f"Photograph {example['index'] + 1}",
        "job": example["job_id"],
        "pictures": pictures,
        "paths": [photo["path"] for photo in example["photographs"]],
        "columns": columns,
        "fields": _fields(columns, example["dimensions"]),
        "same": len(firsts) > 1 and candidate is not None and candidate["text"] == firsts["base"]["text"],
        "failed": bool(candidate and not candidate["verdict"]["strict"]),
        "gain": gain,
        "error": error,
        "badness": _badness(candidate, gain, error),
    }


def _badness(candidate: dict | None, gain: float | None, error: float | None) -> float:
    """Order the cards: what cannot be used first, then the largest score errors, then the smallest gain in loss."""
    if candidate is None:
        return 0.0
    unusable = 0 if candidate["verdict"]["strict"] else 50 if candidate["verdict"]["lenient"] else 100
    return unusable + (error if error is not None else 10) - (gain or 0)


def _loss_gain(example: dict) -> float | None:
    """Return how many nats a token the candidate's loss lies below the base's."""
    losses = [example["loss"].get(arm) for arm in ("base", "candidate")]
    if not all(loss and loss["sum"] is not None for loss in losses):
        return None
    base, candidate = (loss["sum"] / loss["tokens"] for loss in losses)
    return base - candidate


def _column(arm: str, analysis: dict | None, output: dict | None, reference: dict | None) -> dict:
    analysis = analysis or {}
    listed = [item for item in analysis.get("dimensions") or [] if isinstance(item, dict)]
    problems = output["verdict"]["problems"] if output else []
    return {
        "arm": arm,
        "label": NAMES[arm],
        "readable": bool(analysis),
        "strict": output["verdict"]["strict"] if output else None,
        "failures": [name.replace("_", " ") for name in output["verdict"]["failures"]] if output else [],
        "problems": problems,
        "raw": output["text"] if output else "",
        "tokens": output["tokens"] if output else None,
        "analysis": analysis,
        "dimensions": {str(item.get("name")): item for item in listed},
        "reference": reference or {},
    }


def _fields(columns: list[dict], dimensions: list[str]) -> list[dict]:
    """Return the rows of a card's table: what is said, column by column, differences from the reference marked."""
    theirs = columns[0]
    extra = [name for column in columns for name in column["dimensions"] if name not in dimensions]
    rows = [
        {
            "title": "Overall score",
            "cells": [
                _score_cell(c, c["analysis"].get("overall_score"), theirs["analysis"].get("overall_score"))
                for c in columns
            ],
        }
    ]
    rows += [_text_row("Description", columns, "image_description")]
    for name in [*dimensions, *dict.fromkeys(extra)]:
        wanted = theirs["dimensions"].get(name, {})
        cells = []
        for column in columns:
            item = column["dimensions"].get(name, {})
            cell = _score_cell(column, item.get("score"), wanted.get("score"))
            texts = [(label, key) for label, key in (("", "comment"), ("Do: ", "recommendation")) if item.get(key)]
            cell["texts"] = [
                Markup(escape(label)) + _marked(column, item[key], wanted.get(key)) for label, key in texts
            ]
            cell["missing"] = column["readable"] and not item
            cells.append(cell)
        rows.append({"title": name, "cells": cells})
    for title, key in (("Strengths", "key_strengths"), ("Improvements", "priority_improvements")):
        rows.append(_text_row(title, columns, key))
    rows.append(_text_row("Technical notes", columns, "technical_notes"))
    return rows


def _score_cell(column: dict, score: object, wanted: object) -> dict:
    cell = {"column": column, "score": None, "off": None, "texts": [], "missing": False}
    if judge.is_number(score):
        cell["score"] = f"{score:g}"
        if column["arm"] != "reference" and judge.is_number(wanted) and score != wanted:
            cell["off"] = f"{score - wanted:+.1f}".removesuffix(".0")
    return cell


def _text_row(title: str, columns: list[dict], key: str) -> dict:
    cells = []
    for column in columns:
        found, wanted = column["analysis"].get(key), columns[0]["analysis"].get(key)
        found, wanted = (value if isinstance(value, list) else [value] if value else [] for value in (found, wanted))
        joined = " ".join(str(value) for value in wanted)
        cells.append(
            {
                "column": column,
                "score": None,
                "off": None,
                "texts": [_marked(column, value, joined) for value in found],
                "missing": column["readable"] and not found and bool(wanted),
            }
        )
    return {"title": title, "cells": cells}


def _marked(column: dict, text: object, reference: object) -> Markup:
    """Return a text, escaped, with the words that the reference lacks marked; unmarked where the two have little in
    common."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if column["arm"] == "reference" or not isinstance(reference, str) or text == reference:
        return escape(text)
    ours, theirs = (re.findall(r"\s+|[^\s]+", side)[:600] for side in (text, reference))
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    if matcher.ratio() < MARKED_FROM:
        return escape(text)
    parts = []
    for operation, i1, i2, _, _ in matcher.get_opcodes():
        piece = "".join(ours[i1:i2])
        words = piece.strip()
        if operation == "equal" or not words:
            parts.append(escape(piece))
        else:  # the spaces around marked words are not words
            before, after = piece.split(words, 1)
            parts.append(Markup("{}<mark>{}</mark>{}").format(before, words, after))
    return Markup("").join(parts) + escape("".join(re.findall(r"\s+|[^\s]+", text)[600:]))

"""Compare the arms from the jobs table: figures per arm, differences with intervals, a plain sentence."""

import contextlib
import html
import json
import math
import re
import sqlite3
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from .answers import parse_analysis
from .answers import score as score_of
from .answers import scores as scores_of
from .arms import ARMS
from .errors import LoraError, one_line
from .jobs import COLUMNS, connect, key_and_columns


def read_jobs(path: Path, days: float) -> list[dict]:
    """Return the finished jobs of the last ``days`` (0: all): arm, score, valid, seconds; both eras of the table."""
    try:
        db = connect(path, "ro")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error:  # a WAL database in a folder that cannot be written
        db = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    with contextlib.closing(db):
        try:
            key, names = key_and_columns(db)
        except sqlite3.Error as error:
            raise LoraError(f"{path}: not a readable database ({one_line(error)})") from error
        except LoraError as error:
            raise LoraError(f"{path}: {error}") from error
        wanted = (key, "status", "mode", "created_at", "started_at", "completed_at", "last_activity", "prompt",
                  "llm_prompt", "analysis_markdown", "llm_outputs", "advisor", *COLUMNS)  # fmt: skip
        columns = ", ".join(
            f"CAST({name} AS BLOB) AS {name}" if name in names else f"NULL AS {name}" for name in wanted
        )
        since = time.time() - days * 86400 if days else 0
        jobs = []
        for row in db.execute(f"SELECT {columns} FROM jobs"):
            raw = dict(
                zip(wanted, (None if v is None else bytes(v).decode("utf-8", "replace") for v in row), strict=True)
            )
            if (raw["status"] or "done") in ("done", "completed") and (not since or (_when(raw) or 0) >= since):
                jobs.append(_job_row(raw))
    return jobs


def _when(raw: dict) -> float | None:
    """Return a row's time as seconds since 1970 (UTC where the text names no zone)."""
    for name in ("completed_at", "created_at", "last_activity"):
        try:
            at = datetime.fromisoformat((raw[name] or "").replace("Z", "+00:00"))
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            continue
    return None


def _job_row(raw: dict) -> dict:
    """Return what the report needs of a job; a row without recorded arm is judged by its mode."""
    recorded = raw["model_used"] in ARMS
    arm = raw["model_used"] if recorded else {"lora": "fine_tuned", "baseline": "base"}.get(raw["mode"] or "baseline")
    fell_back = raw["model_fallback"] == "1"
    valid, score = _judged(raw)
    seconds = float(raw["model_duration"]) if raw["model_duration"] else None
    return {
        "arm": arm or raw["mode"],
        "recorded": recorded,
        "version": raw["adapter_version"],
        # a fallback is a failure of its arm; the score that the user saw is the base's and counts for neither
        "valid": valid and not fell_back,
        "score": None if fell_back else score,
        "fallback": fell_back,
        "seconds": seconds,
    }


def _judged(raw: dict) -> tuple[bool, float | None]:
    """Return (valid, overall score) of a row's answer: JSON, JSON under a heading, or the older HTML."""
    texts = [raw["analysis_markdown"] or ""]
    try:
        outputs = json.loads(raw["llm_outputs"] or "{}")
        if isinstance(outputs, dict):
            own = outputs.get("response") or outputs.get(raw["advisor"] or "")
            texts.insert(0, own if isinstance(own, str) else "")
    except (ValueError, RecursionError):
        pass
    for text in texts:
        analysis = parse_analysis(text)
        if analysis is not None and scores_of(analysis):
            given = analysis.get("overall_score", analysis.get("overall_grade"))
            return True, score_of(given)
        if "dimension-score" in text:
            grade = re.search(r"overall-grade[^>]*>\s*(?:<strong>)?\s*(\d+(?:\.\d+)?)\s*/\s*10", text)
            return True, score_of(grade[1]) if grade else None
    return False, None


def make_report(jobs: list[dict], days: float) -> dict:
    """Return the figures per arm, the difference of the arms of the test with 95% intervals, and a plain sentence."""
    names = [*ARMS, *sorted({job["arm"] for job in jobs} - set(ARMS))]
    arms = {}
    for name in names:
        own = [job for job in jobs if job["arm"] == name]
        if not own:
            continue
        scores = [job["score"] for job in own if job["score"] is not None]
        seconds = sorted(job["seconds"] for job in own if job["seconds"] is not None)
        arms[name] = {
            "count": len(own),
            "versions": sorted({job["version"] for job in own if job["version"]}),
            "scored": len(scores),
            "average_score": statistics.fmean(scores) if scores else None,
            "one_score": scores[0] if len(scores) >= 5 and len(set(scores)) == 1 else None,  # does not judge at all
            "valid": sum(job["valid"] for job in own),
            "valid_rate": sum(job["valid"] for job in own) / len(own),
            "fallbacks": sum(job["fallback"] for job in own),
            "timed": len(seconds),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "p95_seconds": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
        }
    pair = next(
        (p for p in (("ab_test_base", "ab_test_fine_tuned"), ("base", "fine_tuned")) if set(p) <= set(arms)), None
    )
    difference = None
    if pair:
        scores = [[job["score"] for job in jobs if job["arm"] == arm and job["score"] is not None] for arm in pair]
        difference = {
            "of": f"{pair[1]} minus {pair[0]}",
            "randomised": pair[0] == "ab_test_base",
            "average_score": _mean_difference(*scores),
            "valid_rate": _rate_difference(*((arms[arm]["valid"], arms[arm]["count"]) for arm in pair)),
        }
    unrecorded = sum(not job["recorded"] for job in jobs)
    report = {"days": days, "jobs": len(jobs), "unrecorded": unrecorded, "arms": arms, "difference": difference}
    return report | {"sentence": _sentence(report)}


def _mean_difference(base: list[float], tuned: list[float]) -> dict | None:
    """Return tuned - base of the means with Welch's 95% interval; None with fewer than two values a side."""
    if min(len(base), len(tuned)) < 2:
        return None
    difference = statistics.fmean(tuned) - statistics.fmean(base)
    errors = [statistics.variance(side) / len(side) for side in (base, tuned)]
    total = sum(errors)
    if total == 0:
        return {"value": difference, "low": difference, "high": difference}
    freedom = total**2 / sum(e**2 / (len(side) - 1) for e, side in zip(errors, (base, tuned), strict=True))
    margin = _t_quantile(freedom) * math.sqrt(total)
    return {"value": difference, "low": difference - margin, "high": difference + margin}


def _t_quantile(freedom: float) -> float:
    """Return Student's t at 97.5%, from the normal's by the expansion of Abramowitz & Stegun 26.7.5 (exact below 3)."""
    if freedom < 3:  # the expansion fails there; the tabled values of 1 and 2, in between the larger
        return 12.706 if freedom < 2 else 4.303
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def _rate_difference(base: tuple[int, int], tuned: tuple[int, int]) -> dict:
    """Return tuned - base of two rates (hits, tries) with Newcombe's 95% interval (1998, method 10)."""

    def wilson(hits: int, tries: int) -> tuple[float, float, float]:
        z, rate = 1.959964, hits / tries
        middle, margin = rate + z * z / (2 * tries), z * math.sqrt(rate * (1 - rate) / tries + z * z / (4 * tries**2))
        return rate, (middle - margin) / (1 + z * z / tries), (middle + margin) / (1 + z * z / tries)

    (b, b_low, b_high), (t, t_low, t_high) = wilson(*base), wilson(*tuned)
    low = t - b - math.sqrt((t - t_low) ** 2 + (b_high - b) ** 2)
    high = t - b + math.sqrt((t_high - t) ** 2 + (b - b_low) ** 2)
    return {"value": t - b, "low": max(-1.0, low), "high": min(1.0, high)}


def _sentence(report: dict) -> str:
    period = f"In the last {report['days']:g} days" if report["days"] else "Over all jobs"
    if not report["jobs"]:
        return f"{period} no job was finished."
    difference = report["difference"]
    if difference is None:
        arms = ", ".join(f"{arm['count']} by {name}" for name, arm in report["arms"].items())
        return f"{period} {report['jobs']} jobs were finished ({arms}); with one arm alone there is nothing to compare."
    tuned_name, base_name = difference["of"].split(" minus ")
    tuned, base = report["arms"][tuned_name], report["arms"][base_name]
    text = f"{period} the fine-tuned model answered {tuned['count']} jobs and the base {base['count']}"
    score = difference["average_score"]
    if score is None:
        text += "; too few scores to compare"
    elif score["low"] == score["high"]:
        text += f"; neither's scores vary, and they differ by {abs(score['value']):.2f}"
    else:
        sure = "is more than chance" if score["low"] > 0 or score["high"] < 0 else "chance alone can explain"
        higher = "higher" if score["value"] >= 0 else "lower"
        interval = f"(95% interval {score['low']:+.2f} to {score['high']:+.2f})"
        text += f"; its scores are on average {abs(score['value']):.2f} {higher} {interval}, which {sure}"
    rate = difference["valid_rate"]
    text += (f"; {tuned['valid_rate']:.0%} of its answers are valid against {base['valid_rate']:.0%} "
             f"(difference {rate['low']:+.0%} to {rate['high']:+.0%})")  # fmt: skip
    if tuned["median_seconds"] is not None and base["median_seconds"] is not None:
        text += f"; it takes {tuned['median_seconds']:.1f} s at the median against {base['median_seconds']:.1f} s"
    return text + ("." if difference["randomised"] else ". The jobs were not assigned at random, so compare with care.")


def _cells(arm: dict) -> list[str]:
    def shown(value, form):
        return "-" if value is None else format(value, form)

    return [
        str(arm["count"]),
        shown(arm["average_score"], ".2f"),
        shown(arm["valid_rate"], ".1%"),
        str(arm["fallbacks"]),
        shown(arm["median_seconds"], ".1f"),
        shown(arm["p95_seconds"], ".1f"),
        " ".join(arm["versions"]) or "-",
    ]


HEADINGS = ["arm", "jobs", "average score", "valid", "fallbacks", "median s", "p95 s", "versions"]


def _differences(report: dict) -> list[str]:
    difference, lines = report["difference"] or {}, []
    for name, form in (("average_score", "+.2f"), ("valid_rate", "+.1%")):
        if found := difference.get(name):
            values = (format(found[key], form) for key in ("value", "low", "high"))
            lines.append(
                f"{name.replace('_', ' ')}, {difference['of']}: {{}} (95% interval {{}} to {{}})".format(*values)
            )
    for name, arm in report["arms"].items():
        if arm["one_score"] is not None:
            lines.append(
                f"all {arm['scored']} scores of {name} are {arm['one_score']:g}: copied from the prompt's example?"
            )
    if report["unrecorded"]:
        lines.append(f"{report['unrecorded']} jobs carry no recorded arm and are sorted by their mode")
    return lines


def as_table(report: dict) -> str:
    rows = [HEADINGS, *([name, *_cells(arm)] for name, arm in report["arms"].items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_differences(report), report["sentence"]])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Base and fine-tuned model in service</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --bar: #3b7dd8 }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line) }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left }}
.says {{ font-size: 1.15rem; border-left: 4px solid var(--bar); padding-left: 1rem }}
</style>
<h1>Base and fine-tuned model in service</h1>
<p class="says">{sentence}</p>
<table><thead><tr>{headings}</tr></thead><tbody>
{rows}
</tbody></table>
<ul>{notes}</ul>
</html>
"""


def as_html(report: dict) -> str:
    def row(cells, tag):
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    rows = "\n".join(f"<tr>{row([name, *_cells(arm)], 'td')}</tr>" for name, arm in report["arms"].items())
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _differences(report))
    return PAGE.format(sentence=html.escape(report["sentence"]), headings=row(HEADINGS, "th"), rows=rows, notes=notes)


def show_report(database: Path, days: float, form: str) -> str:
    """Return the report on the jobs of the last ``days`` (0: all) as ``form``: table, json or html."""
    report = make_report(read_jobs(database, days), days)
    return {"table": as_table, "html": as_html}.get(form, lambda found: json.dumps(found, indent=2))(report)

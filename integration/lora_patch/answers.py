"""Whether an answer is the analysis that its prompt asks for."""

import json
import re

from .prompts import demands_html, told_range
from .score_range import USUAL


def analysis_problem(text: str | None, prompt: str = "") -> str | None:
    """Say what is wrong with an answer, or None: it must parse as the analysis that the prompt asks for.

    Text around the object and a code fence are allowed, as in the service. For a prompt that asks for no analysis
    (no dimensions, no feedback cards) any text is valid.
    """
    if text is None or not text.strip():
        return "no answer"
    if prompt and demands_html(prompt):
        return None if re.search(r"dimension-score[^>]*>\s*\(?\d", text) else "no scored feedback card"
    if prompt and not asks_for_analysis(prompt):
        return None
    analysis = parse_analysis(text)
    if analysis is None:
        return "no JSON object"
    return None if scores(analysis, highest_of(prompt)) else "no scored dimensions"


def highest_of(prompt: str | None) -> float:
    """Return where the range of scores ends that a prompt asks for, 10 at least: a wider one is let pass."""
    return max(10, (told_range(prompt or "") or USUAL)[1])


def asks_for_analysis(prompt: str) -> bool:
    """Tell whether a prompt is for an analysis, and not for a summary or the like."""
    return demands_html(prompt) or re.search(r"dimensions|dimensional_analysis", prompt) is not None


def parse_analysis(text: str) -> dict | None:
    """Return the JSON object in an answer's first 100,000 characters, or None."""
    text = re.sub(r"<(think|thought|thinking)>.*?</\1>", "", text[:100_000], flags=re.S)
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return None
    decoder = json.JSONDecoder(parse_constant=lambda name: float("nan"))
    try:
        found, _ = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def scores(analysis: dict, highest: float = 10) -> list[float]:
    """Return the dimensions' scores of either shape of analysis; [] unless each has one from 0 to ``highest``."""
    dimensions = analysis.get("dimensions") or analysis.get("dimensional_analysis")
    dimensions = list(dimensions.values()) if isinstance(dimensions, dict) else dimensions
    if not isinstance(dimensions, list) or not dimensions:
        return []
    found = [score(one.get("score"), highest) if isinstance(one, dict) else None for one in dimensions]
    return found if None not in found else []


def score(value, highest: float = 10) -> float | None:
    """Return 8.1 for 8.1, "8.1" and "8.1/10"; None for what is no score from 0 to ``highest``."""
    form = r"\s*(\d{1,6}(?:\.\d+)?)\s*(?:/\s*\d{1,4})?\s*$"
    match = re.match(form, str(value)[:40]) if not isinstance(value, bool) else None
    return float(match[1]) if match and float(match[1]) <= highest else None


def text_of(result) -> str | None:
    """Return the answer's text in what a generating function returns: text, mlx-vlm's result, a tuple or a dict."""
    if isinstance(result, str):
        return result
    if isinstance(getattr(result, "text", None), str):
        return result.text
    if isinstance(result, list):  # the pieces of a stream
        pieces = [text_of(piece) for piece in result]
        return None if None in pieces else "".join(pieces)
    if isinstance(result, tuple) and result:
        return text_of(result[0])
    if isinstance(result, dict):
        keys = ("response", "text", "output", "analysis", "content", "result")
        return next((result[key] for key in keys if isinstance(result.get(key), str)), None)
    return None

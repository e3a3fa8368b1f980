"""The text the service sends with a photograph: built in one place for preparation, evaluation and serving."""

import html
import re
import sqlite3
from typing import NamedTuple

DEFAULT_SYSTEM_PROMPT = """\
You are a photography critic. Study the photograph and answer with one JSON object and nothing else: no Markdown, \
no code fence, no text before the opening { or after the closing }.

The object has exactly these keys, in this order:

{
  "image_description": "<two or three sentences on what the photograph shows>",
  "dimensions": [
    {"name": "Composition", "score": <1-10>, "comment": "<what works and what does not>", \
"recommendation": "<what to do better>"},
    {"name": "Lighting", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Focus & Sharpness", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Color Harmony", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Depth & Perspective", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Visual Balance", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"},
    {"name": "Emotional Impact", "score": <1-10>, "comment": "<...>", "recommendation": "<...>"}
  ],
  "overall_score": <the mean of the seven scores, one decimal>,
  "key_strengths": ["<two or three>"],
  "priority_improvements": ["<two or three>"],
  "technical_notes": "<exposure, lens, processing, as far as they can be seen>"
}

Write in English. Give whole-number scores from 1 to 10 by what this photograph deserves. Refer to what is visible \
in it; keep each recommendation under 50 words. Judge as the advisor below would.
"""


class Prompts(NamedTuple):
    """What a Mondrian database says to the model; a text that it lacks is None."""

    system_prompt: str | None
    advisor_prompt: str | None


def build_prompt(system_prompt: str, advisor: str, advisor_prompt: str) -> str:
    """Return the service's prompt, byte for byte: its jobs show the advisor's id in place of ``<AdvisorName>``."""
    system_prompt = system_prompt.replace("<AdvisorName>", advisor)
    return f"{system_prompt}\n\n{advisor_prompt}\n\nAnalyze the provided image."


def demands_html(system_prompt: str) -> bool:
    """Tell whether a system prompt is of the older era, which asked for HTML instead of JSON."""
    return "feedback-card" in system_prompt or bool(re.search(r"valid HTML|raw HTML|output HTML", system_prompt, re.I))


def prompt_dimensions(prompt: str) -> list[str]:
    """Return the dimension names a prompt asks for, in its order: from its JSON example, else its HTML example."""
    names = re.findall(r'"name"\s*:\s*"([^"<>]+)"', prompt)
    if not names:
        names = [html.unescape(name.strip()) for name in re.findall(r"<h3>\s*([^<]+?)\s*<span", prompt)]
    return list(dict.fromkeys(names))


def prompt_example_scores(prompt: str) -> tuple[list[int], float | None]:
    """Return the dimension scores and the overall score of the example that stands in a prompt ([], None: no example).

    A model that parrots its prompt answers with exactly these.
    """
    scores = re.findall(r'"score"\s*:\s*(\d+)', prompt) or re.findall(r'dimension-score">\((\d+)/10\)', prompt)
    overall = re.search(r'"overall_score"\s*:\s*([\d.]+)|overall-grade"><strong>([\d.]+)/10', prompt)
    return [int(score) for score in scores], float(overall[1] or overall[2]) if overall else None


def read_prompts(connection: sqlite3.Connection, advisor: str) -> Prompts:
    """Read the system prompt (``config``, text or BLOB) and the advisor's (``advisors``) from a Mondrian database."""
    return Prompts(
        _text(connection, "SELECT CAST(value AS BLOB) FROM config WHERE key = ?", "system_prompt"),
        _text(connection, "SELECT CAST(prompt AS BLOB) FROM advisors WHERE id = ?", advisor),
    )


def _text(connection: sqlite3.Connection, query: str, key: str) -> str | None:
    try:
        row = connection.execute(query, (key,)).fetchone()
    except sqlite3.OperationalError:  # an older database without the table or the column
        return None
    # read as bytes: some versions stored a BLOB, and one damaged character must not end the run
    return row[0].decode("utf-8", "replace") if row and row[0] else None

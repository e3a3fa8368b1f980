"""The range of scores that a prompt asks for: 1 to 10, 0-100, out of 5 stars, 0.0 to 1.0.

    read_score_range("Rate each dimension on a scale of 0 to 100.")     # (0, 100)

A prompt names many numbers: "2-3 sentences", "most 6-8", "reserve 9-10", "f/8", "reduce scores by 2-3 points". A
range counts where it is said of scores and holds those of the prompt's example; of several the one that ends highest.
"""

import functools
import re
from collections.abc import Iterator

from .errors import LoraError

USUAL = (1, 10)  # where a prompt does not tell

_N = r"\d{1,4}(?:\.\d{1,2})?"
_SAID = r"\b(?:scor(?:e|es|ed|ing)|rat(?:e|es|ed|ing|ings)|grad(?:e|es|ed|ing)|scales?|marks?)\b"
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {**{word: number for number, word in enumerate(_COUNTED)}, "hundred": 100}
_WORD = re.compile(rf"\b(?:(?:a|one)[ -])?({'|'.join(_WORDS)})\b", re.I)
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*+"?')  # the sentences of an example say nothing of its scores
_BETWEEN = rf"(?<![\d./])({_N})\s{{0,3}}(?:-|\u2013|\u2014|\.\.|(?:up )?to|through|and)\s{{0,3}}({_N})(?![\d/]|\.\d)"
_BRACKETED = re.compile(rf"\[({_N}),\s?({_N})\]")  # [0, 100]
# not a range of scores: "by 2-3 points", "2-3 sentences", "3-5 feet"
_RANGE = re.compile(
    _BETWEEN
    + r"(?!\s*-?\s*(?:sentence|word|paragraph|feet|foot|ft\b|inch|cm\b|mm\b|met(?:er|re)|stop|second|sec\b|s\b|minute|"
    r"hour|day|key\b|specific|strength|improvement|item|dimension|example|image|photo|tip|action|character|token|people|"
    r"line|time|year|bullet|priorit))",
    re.I,
)
_LESSENING = re.compile(
    r"(?:\bby|\b(?:penali[sz]e|reduce|deduct|subtract|lower|raise|add|minus)\b[^.]{0,40})\s*$", re.I
)
_AFTER = re.compile(r"\s*-?\s*(?:point\s+)?(?:scale|range|points?|stars?)\b", re.I)
_BAND = re.compile(rf"^[\s>*\u2022+|-]{{0,12}}\**({_N})\s?(?:-|\u2013|to)\s?({_N})\**\s{{0,3}}[:=|\u2013\u2014-]", re.M)
_KEYED = re.compile(rf'"(?:score|grade|rating|overall_score|overall_grade)"\s{{0,9}}:[\s"\'<\[(]{{0,9}}{_BETWEEN}')
_OUT_OF = (  # what stands behind the slash, or its like
    re.compile(
        rf'(?:dimension-score"?>|"(?:score|grade|rating|overall_\w+)"\s{{0,9}}:)[\s"(<]{{0,9}}[\w.]{{1,9}}\s?/\s?({_N})'
    ),
    re.compile(rf"{_SAID}[^.\n]{{0,60}}?(?<![\w/])(?:{_N}|[xXnN_?#]{{1,3}}|\])\s?/\s?(5|10|20|50|100)\b(?!\s?s)", re.I),
    re.compile(rf"{_SAID}[^.\n]{{0,60}}?\bout of (?:a possible )?({_N})\b", re.I),
    re.compile(rf"\bmax(?:imum)? (?:score|rating|grade)[^.\n\d]{{0,15}}({_N})\b", re.I),
    re.compile(rf"\b({_N})[ -]point(?:[ -]\w+)? scale\b", re.I),
    re.compile(rf"\b({_N})[ -]stars?\b", re.I),
)
_MEANING = re.compile(  # "1 = poor, 5 = excellent"
    rf"(?<![\d./-])([01])\s?(?:=|is|being|means|\()[^.\n\d]{{1,50}}?({_N})\s?(?:=|is|being|means|\()", re.I
)
_ROUND = (10, 20, 100)  # ends of scales that are known without their beginning ("reserve 9-10")
_HIGHEST = 1000


def read_score_range(prompt: str, example_scores: tuple[float, ...] = ()) -> tuple[float, float] | None:
    """Return (lowest, highest) score that a prompt asks for; None where neither its text nor its example tells.

    ``example_scores`` are those of the answer that it shows.
    """
    ranges, ends = _stated(prompt)
    shown = max(example_scores, default=0)
    fitting = [end for end in ends if end >= shown]
    if fitting:
        highest = max(fitting)
        # "use the full 3-10 range" is advice to the model: an advisor's 2 is no fault
        lowest = next((low for low, high in ranges if high == highest and low <= 1), None)
        if lowest is None or lowest > min(example_scores, default=lowest):
            lowest = 1 if highest in (3, 4, 5, 6, 7, 10) else 0
        return _plain(lowest), _plain(highest)
    if shown > 10:
        return (0, 100) if shown <= 100 else (0, _HIGHEST)
    return (0, 1) if 0 < shown <= 1 and any(score != int(score) for score in example_scores) else None


@functools.lru_cache(512)
def _stated(prompt: str) -> tuple[list[tuple[float, float]], set[float]]:
    """Return the ranges that a prompt states, and the ends of scales."""
    keyed = [(float(low), float(high)) for low, high in _KEYED.findall(prompt)]
    ends = {float(end) for end in _OUT_OF[0].findall(prompt)}
    prose = _QUOTED.sub(lambda quoted: quoted[0] if " " not in quoted[0] else '""', prompt)
    prose = _BRACKETED.sub(r"\1-\2", prose)
    prose = _WORD.sub(lambda word: str(_WORDS[word[1].lower()]), prose)
    ranges = [*keyed, *_in_prose(prose)]
    bands = [(float(low), float(high)) for low, high in _BAND.findall(prose)]
    if len(bands) > 1:
        ranges.append((min(low for low, _ in bands), max(high for _, high in bands)))
    ranges += [(float(low), float(high)) for low, high in _MEANING.findall(prose)]
    ranges = [(low, high) for low, high in ranges if low < high <= _HIGHEST]
    ends |= {high for low, high in ranges if (low <= 1 and high not in (2,)) or high in _ROUND}
    for pattern in _OUT_OF[1:]:
        ends |= {float(end) for end in pattern.findall(prose)}
    return ranges, {end for end in ends if 1 <= end <= _HIGHEST and end != 2}


def _in_prose(prose: str) -> Iterator[tuple[float, float]]:
    """Yield the ranges that are said of scores."""
    for found in _RANGE.finditer(prose):
        line = prose.rfind("\n", 0, found.start()) + 1
        before = prose[max(line, found.start() - 80) : found.start()]
        said = re.search(_SAID + r"|^\W*range\W", before, re.I) or _AFTER.match(prose, found.end())
        if said and not _LESSENING.search(before):
            yield float(found[1]), float(found[2])


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def parse_score_range(text: str) -> tuple[float, float]:
    """Return (lowest, highest) of ``--score_range``; LoraError for what is no range."""
    match = re.fullmatch(rf"\s*({_N})\s*(?:-|to|,)\s*({_N})\s*", text)
    low, high = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not 0 <= low < high <= _HIGHEST:
        raise LoraError(f"--score_range {text[:40]}: write the lowest and the highest score, such as 1-10 or 0-100")
    return _plain(low), _plain(high)

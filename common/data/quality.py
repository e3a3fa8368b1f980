"""The quality gates: what makes an analysis worth training on, each with a name, a default and a switch.

    verdicts = judge(row, analysis, target)      # {gate: what it found} for one analysis
    levels = read_levels(("copied_scores=reject",))

A gate rejects, warns or is off. Those that compare analyses with each other (`duplicates`, `boilerplate`) are judged
by `Crowd` when all have been seen.
"""

import re
from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from common.analysis import compact_json, mean_score, texts_of
from common.errors import UserError
from common.language import foreign_text
from integration.lora_patch.repetition import repeated_phrase

LEVELS = ("reject", "warn", "off")
OVERALL_TOLERANCE = 0.5  # points between the overall score and the mean of the dimensions
SCORES = (1, 10)  # what the JSON system prompt allows


@dataclass(frozen=True)
class Gate:
    """A gate: its default level, and what it finds fault with."""

    default: str
    meaning: str


GATES = {
    "schema": Gate("reject", "lacks the description, a comment, a recommendation, the overall score or a dimension"),
    "score_range": Gate("reject", "a score is not from 1 to 10"),
    "whole_scores": Gate("warn", "a dimension's score is not a whole number, as the prompt demands"),
    "language": Gate("reject", "not written in English, as the service demands"),
    "repetition": Gate("reject", "degenerate repetition: the same words again and again"),
    "word_salad": Gate("warn", "strings of words without grammar, as a model writes that has been pushed too far"),
    "comments": Gate("reject", "comments or recommendations are near-empty, or the prompt's own placeholders"),
    "duplicates": Gate("reject", "word for word the analysis of another photograph: a stuck model"),
    "overall": Gate("reject", f"the overall score is over {OVERALL_TOLERANCE} from the mean of the dimensions"),
    "copied_scores": Gate("warn", "exactly the scores of the example that stands in its own prompt"),
    "boilerplate": Gate("warn", "comments that it shares with other dimensions or with several other photographs"),
    "flat_scores": Gate("warn", "every dimension has the same score"),
    "sections": Gate("warn", "lacks key strengths, priority improvements or technical notes"),
    "length": Gate("warn", "a comment or recommendation of over 120 words, where the prompt allows 50"),
    "mends": Gate("off", "was readable only after mending (--no_mend: reject)"),
}

_MIN_LETTERS, _MAX_WORDS = 8, 120
# English's small words; of 98 real analyses 96 have no more than 1.4% of their words in runs of seven and more without
# one and never put one of `_NOT_AFTER_ARTICLE` after an article, the two runaway ones have 55% and 66% in such runs
_SMALL = frozenset(
    re.findall(
        r"\w+",
        "the a an and of to in is are it its that this with for by on as at from or but not be has have was were which "
        "more could would can very while into than their there some your you over through well also however",
    )
)
_NOT_AFTER_ARTICLE = frozenset(
    re.findall(r"\w+", "the a an and of to in is are it its this that with for as from or be has have was were which")
)
_LONG_RUN, _MAX_IN_RUNS = 7, 0.15
_MIN_ARTICLES, _MAX_BAD_ARTICLES = 8, 0.1  # shuffled words have 25% and more
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


@dataclass(frozen=True)
class Target:
    """What examples are prepared for: the prompt's dimensions, and its texts, which are no comments."""

    dimensions: tuple[str, ...]
    placeholders: frozenset[str]
    scores: tuple[int, ...] = ()  # of the example in the prompt, where a job's own prompt is not known
    overall: float | None = None


def placeholders_of(prompt: str) -> frozenset[str]:
    """Return the texts of the example that stands in a prompt."""
    quoted = re.findall(r'"((?:[^"\\]|\\.){4,400})"', prompt)
    bracketed = re.findall(r"\[[^\[\]\n]{4,300}\]", prompt)
    return frozenset(_plain(text) for text in (*quoted, *bracketed) if " " in text)


def read_levels(switches: tuple[str, ...], no_mend: bool = False) -> dict[str, str]:
    """Return {gate: level} from the defaults and switches such as ``copied_scores=reject``; UserError for others."""
    levels = {name: gate.default for name, gate in GATES.items()}
    for switch in switches:
        name, _, level = switch.partition("=")
        if name not in GATES or level not in LEVELS:
            raise UserError(f"--gate {switch}: write NAME=LEVEL, LEVEL {', '.join(LEVELS)}, NAME {', '.join(GATES)}")
        levels[name] = level
    if no_mend:
        levels["mends"] = "reject"
    return levels


def judge(row: dict, source: dict, analysis: dict, target: Target) -> dict[str, str]:
    """Return {gate: finding} of one analysis. ``source`` is it as linked, ``analysis`` as it would be trained on."""
    found: dict[str, str] = {}
    dimensions = analysis["dimensions"]
    texts = texts_of(analysis)
    if lacking := _lacking(analysis, target):
        found["schema"] = "lacks " + lacking
    wrong = [d for d in dimensions if not SCORES[0] <= d["score"] <= SCORES[1]]
    if wrong:
        found["score_range"] = f"{wrong[0]['name']} has {wrong[0]['score']}"
    elif not SCORES[0] <= analysis.get("overall_score", SCORES[0]) <= SCORES[1]:
        found["score_range"] = f"the overall score is {analysis['overall_score']}"
    fractions = [d for d in dimensions if not isinstance(d["score"], int)]
    if fractions:
        found["whole_scores"] = f"{fractions[0]['name']} has {fractions[0]['score']}"
    if strange := foreign_text(analysis):
        found["language"] = strange
    if repeated := next((quote for text in texts if (quote := repeated_phrase(text))), None):
        found["repetition"] = repeated
    if "language" not in found and (salad := word_salad(texts)):
        found["word_salad"] = salad
    if poor := _poor_comment(dimensions, target.placeholders):
        found["comments"] = poor
    gap = abs(analysis.get("overall_score", mean_score(dimensions)) - mean_score(dimensions))
    if gap > OVERALL_TOLERANCE + 1e-9:
        found["overall"] = f"{analysis['overall_score']} where the dimensions give {mean_score(dimensions)}"
    if copied := copied_scores(row, source, target):
        found["copied_scores"] = copied
    if len(dimensions) >= 5 and len({d["score"] for d in dimensions}) == 1:
        found["flat_scores"] = f"{dimensions[0]['score']} throughout"
    absent = [key for key in ("key_strengths", "priority_improvements", "technical_notes") if key not in analysis]
    if absent:
        found["sections"] = "without " + ", ".join(absent)
    long = max(d.get(key, "").count(" ") + 1 for d in dimensions for key in ("comment", "recommendation"))
    if long > _MAX_WORDS:
        found["length"] = f"{long:,} words"
    if row.get("mends"):
        found["mends"] = ", ".join(row["mends"])
    return found


def copied_scores(row: dict, source: dict, target: Target) -> str | None:
    """Say how an analysis carries the scores of the example in its own prompt; None when it does not."""
    example = row.get("prompt_scores") or list(target.scores)
    if not example or [d["score"] for d in source["dimensions"]] != list(example):
        return None
    overall = row.get("prompt_overall") if row.get("prompt_scores") else target.overall
    with_overall = f" with {overall}" if overall is not None and source.get("overall_score") == overall else ""
    return ", ".join(map(str, example)) + with_overall


def _lacking(analysis: dict, target: Target) -> str:
    """Say what the response lacks that every answer has; "" for a whole one."""
    names = [d["name"] for d in analysis["dimensions"]]
    lacking = [f"the dimension {name}" for name in target.dimensions if name not in names]
    lacking += [key for key in ("image_description", "overall_score") if key not in analysis]
    for d in analysis["dimensions"]:
        lacking += [f"{d['name']}'s {key}" for key in ("comment", "recommendation") if key not in d]
    return ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")


def word_salad(texts: list[str]) -> str | None:
    """Say how texts are strings of words without grammar; None for ordinary prose. Linear in their length.

    Two signs: long runs of words without any of English's small words between them, and articles before words that
    no article stands before, as in shuffled prose.
    """
    total = in_runs = articles = bad = 0
    for piece in re.split(r"[^\w\s'’-]+|\n", " \n ".join(texts).lower()):
        words = re.findall(r"[^\W\d_][\w'’-]*", piece)
        total += len(words)
        runs = [0]
        for word, after in zip(words, [*words[1:], ""], strict=False):
            if word in ("the", "a", "an") and after:
                articles += 1
                bad += after in _NOT_AFTER_ARTICLE
            if word in _SMALL:
                runs.append(0)
            else:
                runs[-1] += 1
        in_runs += sum(run for run in runs if run >= _LONG_RUN)
    if total and in_runs > _MAX_IN_RUNS * total:
        return f"{in_runs / total:.0%} of the words stand in runs of {_LONG_RUN} or more without a small word"
    if articles >= _MIN_ARTICLES and bad > _MAX_BAD_ARTICLES * articles:
        return f"{bad / articles:.0%} of the articles stand before a word that follows no article"
    return None


def _poor_comment(dimensions: list[dict], placeholders: frozenset[str]) -> str | None:
    for d in dimensions:
        for key in ("comment", "recommendation"):
            text = d.get(key, "")
            if text and len(text) < 40 and len(_LATIN.findall(text)) < _MIN_LETTERS:
                return f"{d['name']}'s {key} is {text[:40]!r}"
            if _plain(text) in placeholders:
                return f"{d['name']}'s {key} is the prompt's: {text[:40]!r}"
    return None


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .").lower()


# ------------------------------------------------------------------------------------------------ among each other


class Crowd:
    """What can only be seen among all analyses: the same one for several photographs, the same comment everywhere."""

    BOILERPLATE_PHOTOS = 3  # a comment that stands under as many different photographs is boilerplate

    def __init__(self):
        self._analyses = array("Q")
        self._comments = array("Q")
        self._owners = array("I")
        self._within: dict[int, str] = {}

    def add(self, analysis: dict) -> None:
        """Take in the next analysis; they are counted from 0."""
        at = len(self._analyses)
        self._analyses.append(_digest(compact_json(analysis)))
        texts = [_plain(d.get(key, "")) for d in analysis["dimensions"] for key in ("comment", "recommendation")]
        texts = [text for text in texts if text]
        self._comments.extend(map(_digest, texts))
        self._owners.extend([at] * len(texts))
        text, count = Counter(texts).most_common(1)[0] if texts else ("", 0)
        if count >= 3:
            self._within[at] = f"{count} times {text[:50]!r}"

    def verdicts(self, groups: list[int]) -> list[dict[str, str]]:
        """Return {gate: finding} of each analysis, ``groups`` the photograph group of each."""
        group = np.asarray(groups, dtype=np.int64)
        found: list[dict[str, str]] = [{} for _ in groups]
        shared = _photos_of(np.frombuffer(self._analyses, np.uint64), group)
        for at in np.flatnonzero(shared > 1).tolist():
            found[at]["duplicates"] = f"the same for {shared[at]} photographs"
        owners = np.frombuffer(self._owners, np.uint32)
        photos = _photos_of(np.frombuffer(self._comments, np.uint64), group[owners])
        common = np.bincount(owners[photos >= self.BOILERPLATE_PHOTOS], minlength=len(groups))
        for at in np.flatnonzero(common).tolist():
            found[at]["boilerplate"] = f"{common[at]} texts that {self.BOILERPLATE_PHOTOS} or more photographs share"
        for at, text in self._within.items():
            found[at].setdefault("boilerplate", text)
        return found


def _photos_of(digests: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return for each text how many different photograph groups have it."""
    if not len(digests):
        return np.zeros(0, dtype=np.int64)
    _, text = np.unique(digests, return_inverse=True)
    pairs = np.unique(np.stack([text, groups], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=text.max() + 1)[text]


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")

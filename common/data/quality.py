"""The quality gates: what makes an analysis worth training on, each with a name, a default and a switch.

    analysis, _ = target.as_trained(row["analysis"])
    verdicts = judge(row, analysis, target)      # {gate: what it found} for one analysis
    levels = read_levels(("copied_scores=reject",))

A gate rejects, masks scores, warns or is off. Those that compare analyses with each other (`duplicates`,
`boilerplate`) are judged by `Crowd` when all have been seen.
"""

import contextlib
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from common.errors import UserError
from common.language import foreign_text
from integration.lora_patch.analysis import compact_json, texts_of
from integration.lora_patch.repetition import repeated_phrase
from integration.lora_patch.specification import PromptSpecification, mean_score

LEVELS = ("reject", "mask", "warn", "off")
MASKING = ("copied_scores", "sections")  # gates that have the level mask
OVERALL_TOLERANCE = 0.5  # points of ten between the overall score and the mean of the dimensions


@dataclass(frozen=True)
class DataGate:
    """A gate: its default level, and what it finds fault with."""

    default: str
    meaning: str


GATES = {
    "schema": DataGate(
        "reject",
        "lacks the description, a comment, a recommendation, a dimension or a key that only its prompt asks for",
    ),
    "score_range": DataGate("reject", "a score is outside the range that the prompt asks for, or of another scale"),
    "whole_scores": DataGate("warn", "a dimension's score is not a whole number, as the prompt demands"),
    "language": DataGate("reject", "not written in English, as the service demands"),
    "repetition": DataGate("reject", "degenerate repetition: the same words again and again"),
    "word_salad": DataGate("reject", "strings of words without grammar, as an overtrained model writes them"),
    "comments": DataGate("reject", "comments or recommendations are near-empty, or the prompt's own placeholders"),
    "duplicates": DataGate("reject", "word for word the analysis of another photograph: a stuck model"),
    "overall": DataGate(
        "warn",
        f"the overall score is missing or over {OVERALL_TOLERANCE} of 10 from the dimensions' mean, which replaces it",
    ),
    "copied_scores": DataGate(
        "mask", "the scores of the example in its own prompt, or all but one; mask: only its texts are trained on"
    ),
    "boilerplate": DataGate("warn", "comments that it shares with other dimensions or with several other photographs"),
    "flat_scores": DataGate("warn", "every dimension has the same score"),
    "sections": DataGate(
        "mask", "lacks strengths, improvements or notes that the prompt asks for; mask: leaving them out is not trained"
    ),
    "length": DataGate("warn", "a comment or recommendation of over 120 words, where the prompt allows 50"),
    "mends": DataGate("off", "was readable only after mending (--no_mend: reject)"),
}

SECTIONS = ("key_strengths", "priority_improvements", "technical_notes")
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
    """What examples are prepared for: what the prompt demands, and its example's texts, which are no comments."""

    specification: PromptSpecification
    placeholders: frozenset[str]

    def as_trained(self, analysis: dict) -> tuple[dict, bool]:
        """Return (an analysis with the prompt's dimensions alone, whether some were dropped).

        An overall score that is missing or far from the mean of the dimensions gives way to that mean.
        """
        dropped = False
        with contextlib.suppress(KeyError):  # a dimension is missing: the gate schema reports it
            analysis, dropped = self.specification.project(analysis)
        highest = self.specification.score_range[1]
        mean = (
            {"overall_score": mean_score(analysis["dimensions"], highest)} if overall_fault(analysis, highest) else {}
        )
        return analysis | mean, dropped


def overall_fault(analysis: dict, highest: float) -> str | None:
    """Say what is wrong with an overall score, which the prompt defines as the mean of the dimensions."""
    mean = mean_score(analysis["dimensions"], highest)
    if "overall_score" not in analysis:
        return f"missing; the dimensions give {mean}"
    if abs(analysis["overall_score"] - mean) > OVERALL_TOLERANCE * highest / 10 + 1e-9:
        return f"{analysis['overall_score']} where the dimensions give {mean}"
    return None


def placeholders_of(prompt: str) -> frozenset[str]:
    """Return the texts of the example in a prompt."""
    quoted = re.findall(r'"((?:[^"\\]|\\.){4,400})"', prompt)
    bracketed = re.findall(r"\[[^\[\]\n]{4,300}\]", prompt)
    return frozenset(_plain(text) for text in (*quoted, *bracketed) if " " in text)


def read_levels(switches: tuple[str, ...], no_mend: bool = False) -> dict[str, str]:
    """Return {gate: level} from the defaults and switches such as ``copied_scores=reject``; UserError for others."""
    levels = {name: gate.default for name, gate in GATES.items()}
    for switch in switches:
        name, _, level = switch.partition("=")
        if name not in GATES or level not in LEVELS or (level == "mask" and name not in MASKING):
            raise UserError(
                f"--gate {switch}: write NAME=LEVEL, LEVEL reject, warn or off ({', '.join(MASKING)}: mask too), "
                f"NAME {', '.join(GATES)}"
            )
        levels[name] = level
    if no_mend:
        levels["mends"] = "reject"
    return levels


def judge(row: dict, analysis: dict, target: Target) -> dict[str, str]:
    """Return {gate: finding} of a manifest row; ``analysis`` is its analysis as it would be trained on."""
    found: dict[str, str] = {}
    dimensions, texts = analysis["dimensions"], texts_of(analysis)
    absent = target.specification.lacking(analysis)
    lacking = [what for what in absent if what not in SECTIONS]
    if lacking:
        found["schema"] = f"lacks {', '.join(lacking[:4])}" + (f" and {len(lacking) - 4} more" if lacking[4:] else "")
    found |= _score_faults(analysis, target.specification, row.get("prompt_range"))
    if strange := foreign_text(analysis):
        found["language"] = strange
    if repeated := next((quote for text in texts if (quote := repeated_phrase(text))), None):
        found["repetition"] = repeated
    if "language" not in found and (salad := word_salad(texts)):
        found["word_salad"] = salad
    if poor := _poor_comment(dimensions, target.placeholders):
        found["comments"] = poor
    if len(row["analysis"]["dimensions"]) == len(dimensions) and (
        fault := overall_fault(row["analysis"], target.specification.score_range[1])
    ):
        found["overall"] = fault
    if copied := copied_scores(row, target.specification):
        found["copied_scores"] = copied
    if sections := [what for what in absent if what in SECTIONS]:
        found["sections"] = "without " + ", ".join(sections)
    long = max(d.get(key, "").count(" ") + 1 for d in dimensions for key in ("comment", "recommendation"))
    if long > _MAX_WORDS:
        found["length"] = f"{long:,} words"
    if row.get("mends"):
        found["mends"] = ", ".join(row["mends"])
    return found


def _score_faults(analysis: dict, specification: PromptSpecification, given_in: list | None) -> dict[str, str]:
    """Return what the gates of scores find; ``given_in`` is the range of the job's own prompt, where it is known."""
    found = {}
    low, high = specification.score_range
    if given_in and given_in[1] != high:
        found["score_range"] = (
            f"scored from {given_in[0]:g} to {given_in[1]:g}, the prompt asks for {low:g} to {high:g}"
        )
    scores = {d["name"]: d["score"] for d in analysis["dimensions"]}
    for name, score in {**scores, "the overall score": analysis["overall_score"]}.items():
        if not low <= score <= high:
            found.setdefault("score_range", f"{name} is {score}, not from {low:g} to {high:g}")
    whole = any(field.kind == "whole" for field in specification.dimension_fields)
    fraction = next((name for name, score in scores.items() if score != int(score)), None) if whole else None
    if fraction:
        found["whole_scores"] = f"{fraction} is {scores[fraction]}"
    if len(scores) >= 5 and len(set(scores.values())) == 1:
        found["flat_scores"] = f"{next(iter(scores.values()))} throughout"
    return found


def copied_scores(row: dict, specification: PromptSpecification) -> str | None:
    """Say how a row's analysis, as linked, carries the scores of the example in its own prompt; None if it does not.

    All scores, or all but one of at least four; ``row["prompt_scores"]`` are those of the job's own prompt, where it is
    known, else today's prompt is asked.
    """
    source, own = row["analysis"], bool(row.get("prompt_scores"))
    example = list(row["prompt_scores"] if own else specification.example_scores)
    overall = row.get("prompt_overall") if own else specification.example_overall
    scores = {d["name"]: d["score"] for d in source["dimensions"]}
    if not example or len(example) != len(scores):
        return None
    other = [name for (name, score), theirs in zip(scores.items(), example, strict=True) if score != theirs]
    if len(other) > 1 or (other and len(scores) < 4):
        return None
    told = ", ".join(f"{score:g}" for score in example)
    if other:
        return f"{told} but for {other[0]}"
    return told + (f" with {overall:g}" if overall is not None and source.get("overall_score") == overall else "")


def word_salad(texts: list[str]) -> str | None:
    """Say how texts are strings of words without grammar; None for ordinary prose. Linear in their length.

    Two signs: long runs of words without any of English's small words between them, and articles before words that
    no article precedes, as in shuffled prose.
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
        return f"{in_runs / total:.0%} of the words are in runs of {_LONG_RUN} or more without a small word"
    if articles >= _MIN_ARTICLES and bad > _MAX_BAD_ARTICLES * articles:
        return f"{bad / articles:.0%} of the articles are before a word that follows no article"
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

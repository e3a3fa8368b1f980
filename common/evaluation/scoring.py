"""What one answer is worth: whether it is what the prompt demands, why not, and how near it is to the reference."""

import collections
import itertools
import json
import re

import numpy as np

from common.language import foreign_text, is_latin
from integration.lora_patch.analysis import parse_lenient
from integration.lora_patch.json_text import is_number
from integration.lora_patch.repetition import repeated_tail
from integration.lora_patch.score_range import USUAL
from integration.lora_patch.specification import PromptSpecification

# Every way to fail, worst first; an output is counted under the first that holds and lists them all. The last one is
# no fault of form: such an answer is strictly what the prompt demands.
FAILURES = {
    "repetition_loop": "Repetition loop: the same words again and again",
    "truncated": "Truncated: no end of turn within the token limit",
    "wrong_language": "Wrong language: not English",
    "code_fence": "Code fence around the JSON",
    "prose": "Prose before, after or instead of the JSON object",
    "broken_json": "Broken JSON",
    "wrong_schema": "Wrong schema: a field is missing, added or of the wrong kind",
    "wrong_dimensions": "Wrong dimensions: other names or another order",
    "out_of_range": "Scores out of range",
    "same_advice": "Same advice: two dimensions have the same comment or recommendation",
}
OVERALL = "overall_score"  # the key of the overall score, beside the names of the dimensions
SAME_ADVICE = 0.8  # similarity of two dimensions' texts from which they count as the same

_SCORE = re.compile(r'"(?:score|grade|rating|overall_score|overall_grade)"\s*:\s*"?(\d+(?:\.\d+)?)')
_MARK = 100_000  # no score; six digits are read as a number


def judge(text: str, finish: str, specification: PromptSpecification) -> dict:
    """Judge one output against the prompt's demand.

    ``text`` is what was generated before the end of turn; ``finish`` is "stop" (end of turn reached), "length" (token
    limit) or "loop" (stopped in a repetition loop).
    Returns {"strict": bool, "failures": [class, ...] worst first, "problems": [sentence, ...], "lenient": bool,
    "mends": [what a lenient reader had to overlook], "analysis": object or None}.
    """
    highest = specification.score_range[1]
    analysis, mends = parse_lenient(text, specification.extra_keys, highest)
    analysis = _encodable(analysis)
    foreign = foreign_text(analysis) is not None if analysis else not is_latin(text)
    problems = list(specification.check(text)) if finish == "stop" else []
    out_of_range = any(
        not specification.points(specification.score_range[0]) <= score <= 10
        for score in scores_of(analysis, highest).values()
    )
    found = set(_faults_of_form(text, finish, out_of_range, problems))
    if foreign:
        found.add("wrong_language")
        problems.append("not in English")
    if problems and not found:
        found.add("wrong_schema")
    if finish != "stop":
        problems.insert(0, "no end of turn: " + ("it repeats itself" if "repetition_loop" in found else "token limit"))
    strict = not found and not problems
    if _advice(analysis)[1]:
        found.add("same_advice")
    return {
        "strict": strict,
        "failures": [name for name in FAILURES if name in found],
        "problems": _encodable([str(problem) for problem in problems]),
        "lenient": analysis is not None,
        "mends": _encodable([str(mend) for mend in mends]),
        "analysis": analysis,
    }


def _encodable(value: object):
    r"""Replace what JSON's escapes can spell but no file can hold: half a surrogate pair ("\ud800")."""
    if isinstance(value, dict):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _faults_of_form(text: str, finish: str, out_of_range: bool, problems: list[str]):
    if finish == "loop" or (finish == "length" and repeated_tail(text.split())):
        yield "repetition_loop"
    elif finish == "length":
        yield "truncated"
    body = text.strip()
    if "```" in body:
        yield "code_fence"
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        # what stopped early cannot be whole: that it does not parse says nothing more
        if finish == "stop" and "```" not in body:
            yield "broken_json" if body.startswith("{") and not _text_after_object(body) else "prose"
        return
    if not isinstance(value, dict):
        yield "prose"
        return
    if any(problem.startswith("dimensions are not the") for problem in problems):
        yield "wrong_dimensions"
    if out_of_range:
        yield "out_of_range"


def _text_after_object(body: str) -> bool:
    """Tell whether ``body`` is a whole JSON object with something after it."""
    try:
        _, end = json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError):
        return False
    return bool(body[end:].strip())


# -- scores -----------------------------------------------------------------------------------------------------------


def scores_of(analysis: dict | None, highest: float = 10) -> dict[str, float]:
    """Return {dimension, or `OVERALL`: score} of what has a number in an analysis, in points of ten.

    ``highest`` is where the range of its scores ends.
    """
    listed = (analysis or {}).get("dimensions")
    scores = {
        str(item.get("name")): item["score"]
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict) and is_number(item.get("score"))
    }
    overall = (analysis or {}).get(OVERALL)
    scores |= {OVERALL: overall} if is_number(overall) else {}
    return scores if highest == 10 else {name: score * 10 / highest for name, score in scores.items()}


def score_spans(text: str, highest: float = 10) -> dict[str, tuple[int, int]]:
    """Return {dimension, or `OVERALL`: (start, end)} of the digits of each score in an answer's text.

    Each number is replaced by a mark, and the analysis read again: the reader says which mark is whose score.
    """
    spans, marked, at = [match.span(1) for match in _SCORE.finditer(text)], [], 0
    for number, (start, end) in enumerate(spans):
        marked += [text[at:start], str(_MARK + number)]
        at = end
    analysis, _ = parse_lenient("".join([*marked, text[at:]]), highest=highest)
    found = {name: int(score) - _MARK for name, score in scores_of(analysis).items()}
    return {name: spans[number] for name, number in found.items() if 0 <= number < len(spans)}


def highest_of(prompt: dict) -> float:
    """Return where the range of scores ends, by a report's record of a prompt."""
    return prompt.get("specification", {}).get("score_range", USUAL)[1]


def reference_scores(
    response: str, reference: dict | None, masked_spans: list, highest: float = 10
) -> dict[str, float]:
    """Return the scores of a reference that measure anything, in points of ten: those not masked in training as copied.

    ``highest`` is where the range of its scores ends.
    """
    scores = scores_of(reference, highest)
    if not masked_spans:
        return scores
    spans = score_spans(response, highest)
    masked = {
        name
        for name, (start, end) in spans.items()
        if any(start < stop and first < end for first, stop in masked_spans)
    }
    return {name: score for name, score in scores.items() if name not in masked}


# -- texts ------------------------------------------------------------------------------------------------------------


def measure(text: str, verdict: dict, reference: dict | None, prompt: dict) -> dict:
    """Measure one judged output against its reference analysis; what cannot be measured is None.

    ``prompt`` is {"specification", "dimensions", "terms", "example_scores"}; scores are in points of ten.
    Returns {"scores": {name: score}, "consistency": |overall - mean of its own dimensions|, "comments" and
    "description": chrF of 0..100 (0 when the output cannot be read), "vocabulary": share of the advisor's terms used,
    "within": similarity of the dimensions' advice, "same_advice": whether two dimensions have the same,
    "example_scores": whether the scores are those of the prompt's own example}.
    """
    ours, theirs = verdict["analysis"] or {}, reference or {}
    highest = highest_of(prompt)
    scores = scores_of(ours, highest)
    overall = scores.get(OVERALL)
    own = [scores[name] for name in prompt["dimensions"] if name in scores]
    example = [score if highest == 10 else score * 10 / highest for score in prompt.get("example_scores") or []]
    within, same = _advice(ours)
    return {
        "scores": scores,
        "consistency": None if overall is None or not own else abs(overall - sum(own) / len(own)),
        "comments": _comments_overlap(ours, theirs) if reference else None,
        "description": overlap(ours.get("image_description"), theirs["image_description"])
        if theirs.get("image_description")
        else None,
        "vocabulary": vocabulary_share(text, prompt.get("terms") or []),
        "within": within,
        "same_advice": same,
        "example_scores": bool(example) and own == example,
    }


def _advice(analysis: dict | None) -> tuple[float | None, bool | None]:
    """Return (mean similarity of two dimensions' texts, whether two have the same comment or recommendation)."""
    listed = [item for item in (analysis or {}).get("dimensions") or [] if isinstance(item, dict)]
    texts = [[words(str(item.get(key) or "")) for key in ("comment", "recommendation")] for item in listed]
    grams = [trigrams(comment + recommendation) for comment, recommendation in texts if comment or recommendation]
    if len(grams) < 2:
        return None, None
    found = [similarity(one, other) for one, other in itertools.combinations(grams, 2)]
    said = [tuple(text) for text in itertools.chain.from_iterable(texts) if text]
    return float(np.mean(found)), len(set(said)) < len(said) or max(found) >= SAME_ADVICE


def _comments_overlap(ours: dict, theirs: dict) -> float | None:
    """Return the mean chrF of comment + recommendation over the reference's dimensions, matched by name."""
    texts, wanted = _dimension_texts(ours), _dimension_texts(theirs)
    return float(np.mean([overlap(texts.get(name), text) for name, text in wanted.items()])) if wanted else None


def _dimension_texts(analysis: dict) -> dict[str, str]:
    listed = analysis.get("dimensions")
    texts = {
        str(item.get("name")): " ".join(str(item[key]) for key in ("comment", "recommendation") if item.get(key))
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict)
    }
    return {name: text for name, text in texts.items() if text}


def overlap(text: object, reference: str) -> float:
    """Return the chrF score (Popović 2015, sacrebleu's defaults: character 6-grams, beta 2), 0..100."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(text, [reference]).score if isinstance(text, str) and text.strip() else 0.0


def plain_words(analysis: dict | None, text: str) -> list[str]:
    """Return the words a reader reads: the analysis's texts when there is one, else the raw output."""
    if analysis is None:
        return words(text)
    found: list[str] = []

    def collect(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                collect(item, name)
        elif isinstance(value, list):
            for item in value:
                collect(item, key)
        elif isinstance(value, str) and key != "name":
            found.extend(words(value))

    collect(analysis)
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def trigrams(tokens: list[str]) -> frozenset:
    return frozenset(zip(tokens, tokens[1:], tokens[2:], strict=False))


def similarity(one: frozenset, other: frozenset) -> float:
    """Return the Jaccard similarity of two sets of word trigrams, 1.0 for two empty ones."""
    return len(one & other) / len(one | other) if one or other else 1.0


def similarities(texts: list[frozenset]) -> np.ndarray:
    """Return the `similarity` of every two of n sets of trigrams, float [n, n]."""
    from scipy.sparse import csr_array

    number = {gram: at for at, gram in enumerate(frozenset().union(*texts))}
    columns = [number[gram] for grams in texts for gram in grams]
    sizes = np.array([len(grams) for grams in texts], dtype=float)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    held = csr_array((np.ones(len(columns)), columns, starts), shape=(len(texts), max(1, len(number))))
    shared = (held @ held.T).toarray()
    either = sizes[:, None] + sizes - shared
    return np.divide(shared, either, out=np.ones_like(shared), where=either > 0)


def advisor_terms(prompt: str) -> list[str]:
    """Return the advisor's vocabulary: the content words that only the advisor's part of a prompt has.

    The advisor's part is what follows the last paragraph-opening "You are" (the system prompt has its own) or, when
    there is none, the last JSON example. Words of under four letters, and words that the system prompt uses too,
    say nothing of the advisor.
    """
    opening = [match.start() for match in re.finditer(r"(?m)^(?:You are|Your name is|Act as|I am)\b", prompt)]
    start = opening[-1] if opening and opening[-1] > 0 else prompt.rfind("\n}") + 1
    if start <= 0:
        return []
    system, advisor = prompt[:start], prompt[start:].removesuffix("Analyze the provided image.")
    common = set(words(system)) | _FUNCTION_WORDS
    counts = collections.Counter(word for word in words(advisor) if len(word) >= 4 and not word.isdigit())
    return sorted(word for word in counts if word not in common)


def vocabulary_share(text: str, terms: list[str]) -> float | None:
    """Return the share of the advisor's terms that a text uses at least once."""
    return len(set(words(text)) & set(terms)) / len(terms) if terms else None


_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """about above after again against also although always among another around because been before being below
        between both cannot could does doing down during each either else every from further have having here hers
        herself himself into itself just like made make many more most much must myself neither nevertheless only other
        ours over perhaps rather same shall should some such than that their theirs them themselves then there these
        they this those through together under until upon very want well were what when where whether which while whom
        whose will with within without would your yours yourself""",
    )
)

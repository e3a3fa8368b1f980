"""Where a job's analysis is found, or why none is found.

    found = find_analysis(job, advisor, files, asked)      # Found, or AnalysisError with one of REASONS

Places are tried in the order of `SOURCES`; the first that holds a usable analysis counts. When none does, the job's
reason is that of the place that came closest.
"""

import functools
import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.data.html_analysis import html_to_analysis, is_html_analysis
from common.data.wrappings import answers_in, of_advisor, unwrapped
from integration.lora_patch.analysis import AnalysisError, canonical, looks_like_analysis
from integration.lora_patch.json_text import balanced_end, find_objects, parse_json, strings_in
from integration.lora_patch.prompts import UnreadablePrompt, read_specification, told_range
from integration.lora_patch.score_range import USUAL, parse_score_range
from integration.lora_patch.specification import DIMENSIONS7

SOURCES = ("analysis_file", "stored_path", "analysis_markdown", "llm_outputs")
MAX_TEXT = 256_000  # characters; the longest real answer, a model that ran away, has 12,000

# Reasons why an ended job has no usable analysis, nearest to a usable one first: the order decides which of several
# places names the reason.
REASONS = {
    "unread": "the reader failed on it, which is a fault of this program; please report the job",
    "score_out_of_range": "a score is not in the range that its prompt asks for (see --score_range)",
    "wrong_dimensions": "dimensions that its prompt asks for are missing, or have other names",
    "unknown_dimensions": "none of its prompts says which dimensions it asks for; name them with --dimensions",
    "missing_score": "a dimension has no score",
    "truncated_json": "JSON cut off before its end",
    "misspelt_json": "JSON with misspelt or missing keys",
    "invalid_json": "JSON that does not parse",
    "error_page": "an error message of the service",
    "no_scores": "an object of another kind, without scored dimensions",
    "prompt_echo": "the prompt or its example instead of an answer",
    "wrong_advisor": "the analysis of another advisor",
    "not_text": "not readable as UTF-8 text",
    "too_large": f"a text of more than {MAX_TEXT:,} characters",
    "reasoning_only": "reasoning without an answer after it",
    "stub": "a few words without an analysis",
    "no_object": "a text without an analysis in JSON or HTML",
    "missing_analysis_file": "the stored path of the analysis leads to no file here",
    "no_analysis": "nothing was stored",
}
_RANK = {reason: rank for rank, reason in enumerate(REASONS)}

_ERROR = re.compile(
    r"\b(?:error\s*:|an error occurred|internal server error|bad gateway|service unavailable|gateway time-?out|"
    r"cannot connect|could not connect|connection (?:refused|reset|error|timed out)|traceback \(most recent|"
    r"(?:request|model|analysis|generation) (?:failed|timed out)|"
    r"failed to (?:analy[sz]e|generate|process|parse|connect|load)|"
    r"out of memory|exception\s*:|404 not found|50[0234]\b)",
    re.I,
)
_THOUGHT = re.compile(r"<(thought|think|thinking|reasoning|scratchpad)\b[^<>]*>", re.I)
_THOUGHT_ENDS = {
    name: re.compile(rf"</{name}\s*+>", re.I) for name in ("thought", "think", "thinking", "reasoning", "scratchpad")
}
_HEADING = re.compile(r"^#{1,6}[ \t]+\S.*$", re.M)
_TURN = re.compile(r"(?:^|\n)(?:<\|im_start\|>)?assistant[ \t]*+:?[ \t]*+\n", re.I)
_PATH = re.compile(r"[^<>{}\0]{1,1000}\.(?:md|markdown|json|html?|txt)", re.I)
_MAX_WRAPPINGS = 3
_MEANT = re.compile(r'\{[^"{}]{0,200}"(?:image_description|dim\w*|overall_\w+)"')  # a comment may stand before it
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_STUB = 400  # a text without an object and shorter than this is a stub


@dataclass(frozen=True)
class Found:
    """A usable analysis and where it was found."""

    analysis: dict
    mends: list[str]
    source: str  # one of SOURCES
    form: str  # "json" or "html"
    path: str | None  # the file it was read from
    score_range: tuple[float, float]  # lowest and highest score that its prompt asks for


@dataclass(frozen=True)
class Asked:
    """What an analysis is held against: the dimensions that its prompts ask for, and the prompts' own examples."""

    dimensions: tuple[tuple[str, ...], ...] = (DIMENSIONS7,)  # standard names; all of any one set are needed
    extra_keys: frozenset[str] = frozenset()  # asked for beyond the canonical keys
    examples: frozenset[tuple] = frozenset()  # `example_of` the prompts
    unreadable: str = ""  # why no prompt tells its dimensions
    score_range: tuple[float, float] = USUAL  # lowest and highest score


@functools.lru_cache(512)
def asked_by(prompts: tuple[str, ...], dimensions: str | None, score_range: str | None = None) -> Asked:
    """Return what an answer to any of these prompts may look like; "" is a prompt that is not known.

    The usual seven dimensions are accepted under every prompt, unless ``dimensions`` (of --dimensions) are given. The
    range of scores is that of the last prompt that tells one, unless ``score_range`` (of --score_range) is given.
    """
    sets, extra, examples, unreadable = [], frozenset(), set(), ""
    ends = None
    for text in prompts or ("",):
        try:
            specification = read_specification(text, dimensions)
            sets.append(specification.names)
            extra |= specification.extra_keys
        except UnreadablePrompt as error:
            unreadable = str(error) if text else "no prompt is stored; name its dimensions: --dimensions NAME,NAME,..."
        ends = told_range(text) or ends
        if example := example_of(text, (ends or USUAL)[1]):
            examples.add(example)
    known = "" if sets else unreadable
    sets += [] if dimensions else [DIMENSIONS7]
    ends = parse_score_range(score_range) if score_range else ends or USUAL
    return Asked(tuple(dict.fromkeys(sets)), extra, frozenset(examples), known, ends)


def find_analysis(job: dict, advisor: str, files: "AnalysisFiles", asked: Asked) -> Found:
    """Return the analysis of ``advisor`` from the first place that holds a usable one.

    ``job`` holds id, analysis_markdown, analysis_file, llm_outputs and prompt (each a text, None, or an
    AnalysisError that says why it could not be read). Raises AnalysisError when no place does.
    """
    worst = AnalysisError("no_analysis", "analysis_markdown and llm_outputs are empty, and no file has its name")
    for _, result in readings(job, advisor, files, asked):
        if isinstance(result, Found):
            return result
        if _RANK[result.reason] < _RANK[worst.reason]:
            worst = result
    raise worst


def readings(
    job: dict, advisor: str, files: "AnalysisFiles", asked: Asked
) -> Iterator[tuple[str, "Found | AnalysisError"]]:
    """Yield (raw text, what was read from it or why nothing) of each place that holds something, as `SOURCES`."""
    prompt = job.get("prompt")
    for source, text, path in _places(job, advisor, files):
        try:
            if isinstance(text, AnalysisError):
                raise text
            if not text or not text.strip():
                continue
            analysis, mends, form = read_answer(text, advisor, prompt if isinstance(prompt, str) else "", asked)
            check(analysis, asked)
            yield text, Found(analysis, mends, source, form, path, asked.score_range)
        except AnalysisError as error:
            yield text if isinstance(text, str) else "", AnalysisError(error.reason, f"{source}: {error.detail}")
        except Exception as error:  # whatever one row does to a reader, it is that row's reason
            what = f"{source}: {type(error).__name__}: {str(error)[:80]}"
            yield text if isinstance(text, str) else "", AnalysisError("unread", what)


def check(analysis: dict, asked: Asked) -> None:
    """Hold an analysis against what any of the prompts asks for; AnalysisError when it answers none of them."""
    names = [dimension["name"] for dimension in analysis["dimensions"]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AnalysisError("wrong_dimensions", f"{twice[:40]} stands there twice")
    if not any(set(dimensions) <= set(names) for dimensions in asked.dimensions):
        if asked.unreadable:
            raise AnalysisError("unknown_dimensions", f"answers {', '.join(names)[:400]}: {asked.unreadable}")
        lacking = min(([name for name in wanted if name not in names] for wanted in asked.dimensions), key=len)
        known = set().union(*asked.dimensions)
        others = ", ".join(name for name in names if name not in known)
        there = f"{len(names)} dimensions{f' ({others[:80]})' if others else ''}"
        raise AnalysisError("wrong_dimensions", f"{there}, without {', '.join(lacking)}"[:240])
    scores = {dimension["name"][:40]: dimension["score"] for dimension in analysis["dimensions"]}
    for name, score in {**scores, "the overall score": analysis.get("overall_score", 0)}.items():
        if not 0 <= score <= asked.score_range[1]:  # a zero is for preparation to judge
            low, high = asked.score_range
            raise AnalysisError("score_out_of_range", f"{name} is {score:g}"[:80] + f", not from {low:g} to {high:g}")
    if any(not text.isprintable() and _SURROGATE.search(text) for text in strings_in(analysis)):
        raise AnalysisError("not_text", "holds characters that are no Unicode text")


# ------------------------------------------------------------------------------------------------ places


Place = tuple[str, str | AnalysisError | None, str | None]  # source, text or what is wrong with it, path


def _places(job: dict, advisor: str, files: "AnalysisFiles") -> Iterator[Place]:
    """Yield every place that may hold the analysis, in the order of `SOURCES`."""
    named = files.named(advisor, str(job["id"]))
    if named:
        yield "analysis_file", *files.read(named)
    markdown = job.get("analysis_markdown")
    for value in (markdown, job.get("analysis_file")):
        stored = files.stored(value.strip()) if is_path(value) else None
        if stored and stored != named:
            yield "stored_path", *files.read(stored)
        elif is_path(value) and value is markdown:
            yield "stored_path", AnalysisError("missing_analysis_file", value.strip()[-80:]), None
    if not is_path(markdown):
        yield "analysis_markdown", markdown, None
    outputs = job.get("llm_outputs")
    if isinstance(outputs, str):
        for text in _outputs(outputs, advisor):
            yield "llm_outputs", text, None
    else:
        yield "llm_outputs", outputs, None


def is_path(value: object) -> bool:
    """Tell whether a column holds the path of a file instead of an analysis."""
    value = value.strip() if isinstance(value, str) and len(value) <= 1000 else ""
    return "\n" not in value and ("/" in value or " " not in value) and bool(_PATH.fullmatch(value))


def _outputs(text: str, advisor: str) -> Iterator[str | AnalysisError]:
    """Yield the answers in `llm_outputs`: an object keyed by advisor, one with prompt and response, or a bare text."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        yield text
        return
    try:
        yield from answers_in(value, advisor)
    except AnalysisError as error:
        yield error


class AnalysisFiles:
    """The files of an analysis folder, found by name and never outside it."""

    def __init__(self, locator):
        self._locator = locator  # common.data.photos.Locator, or None without a folder

    def named(self, advisor: str, job_id: str) -> str | None:
        """Return the path of ``analysis-ADVISOR-JOBID.md``."""
        return self._locator.by_name(f"analysis-{advisor}-{job_id}.md") if self._locator else None

    def stored(self, path: str) -> str | None:
        """Return the path of a file that a job names, absolute on another machine perhaps."""
        found = self._locator.find(path).candidates if self._locator else []
        return found[0] if len(found) == 1 else None

    def read(self, path: str) -> tuple[str | AnalysisError, str]:
        try:
            data = Path(path).read_bytes() if Path(path).stat().st_size <= 4 * MAX_TEXT else b" " * (4 * MAX_TEXT + 1)
            return as_text(data), path
        except AnalysisError as error:
            return error, path
        except OSError as error:
            return AnalysisError("not_text", f"{path} cannot be read ({error.strerror})"), path


def as_text(data: bytes) -> str:
    """Decode UTF-8; AnalysisError for a text that is too large or no text."""
    if len(data) > 4 * MAX_TEXT:
        raise AnalysisError("too_large", f"{len(data):,} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise AnalysisError("not_text", f"not UTF-8 at byte {error.start}") from None
    if len(text) > MAX_TEXT:
        raise AnalysisError("too_large", f"{len(text):,} characters")
    return text.removeprefix("\ufeff")


# ------------------------------------------------------------------------------------------------ one text


def read_answer(text: str, advisor: str, prompt: str, asked: Asked, depth: int = 0) -> tuple[dict, list[str], str]:
    """Return (analysis, mends, "json" or "html") of one stored answer; AnalysisError says what it is instead.

    ``depth``: how many wrappings the text came out of.
    """
    if "\0" in text:
        text, nul = text.replace("\0", ""), ["nul_characters"]
    else:
        nul = []
    body, echoed = _without_prompt(text, prompt)
    # A model that thinks aloud answers after it; what stands inside the thoughts is no answer.
    visible, thought = _without_thoughts(body)
    around = ["text_around"] if echoed or (thought and visible.strip()) else []
    objects = list(find_objects(visible))
    if depth < _MAX_WRAPPINGS and not any(looks_like_analysis(value) for value, *_ in objects):
        inner, mend = unwrapped(visible, [value for value, *_ in objects], advisor)
        if inner:
            analysis, mends, form = read_answer(inner, advisor, prompt, asked, depth + 1)
            return analysis, list(dict.fromkeys([*nul, *around, mend, *mends])), form
    if is_html_analysis(visible) and not any(looks_like_analysis(value) for value, *_ in objects):
        try:
            analysis, mends = html_to_analysis(visible, advisor, asked.score_range[1])
        except AnalysisError as error:
            raise _diagnosis(visible, objects, False, thought) if error.reason == "no_cards" else error from None
        return analysis, [*nul, *around, *mends], "html"
    analysis, mends = _read_json(visible, objects, advisor, asked)
    if analysis is None:
        raise _diagnosis(visible, objects, echoed or _is_echo(text, prompt), thought)
    return analysis, list(dict.fromkeys([*nul, *around, *mends])), "json"


def _read_json(text: str, objects: list[tuple], advisor: str, asked: Asked) -> tuple[dict | None, list[str]]:
    """Return (analysis, mends) from the last analysis among a text's objects: bare, fenced, or after a heading; None
    without one. AnalysisError when those that are meant as one hold none."""
    failure: AnalysisError | None = None
    meant = [found for found in objects if looks_like_analysis(found[0])]
    own = of_advisor([value for value, *_ in meant], advisor)
    for value, mends, start, end in reversed(meant):
        if not any(value is one for one in own):
            continue
        try:
            analysis, more = canonical(value, asked.extra_keys, asked.score_range[1])
        except AnalysisError as error:
            failure = failure or error
            continue
        if _signature(analysis) in asked.examples:
            failure = failure or AnalysisError("prompt_echo", "the example in the prompt")
            continue
        around = [] if _is_frame(text[:start], text[end:]) else ["text_around"]
        return analysis, [*around, *mends, *more]
    if failure:
        raise failure
    return None, []


def _signature(analysis: dict) -> tuple:
    """Return what tells the example of a prompt from an answer, whichever scores it carries: its texts."""
    return analysis.get("image_description"), analysis["dimensions"][0].get("comment")


def example_of(prompt: str, highest: float) -> tuple | None:
    """Return the signature of the example in a prompt, to know it again when it comes back as an answer."""
    for value, *_ in find_objects(prompt):
        if looks_like_analysis(value):
            try:
                return _signature(canonical(value, highest=highest)[0])
            except AnalysisError:
                continue
    return None


def _is_frame(before: str, after: str) -> bool:
    """Tell whether what surrounds an object is the frame it is stored in (a heading, a fence), not chatter."""
    before, after = before.rstrip(), after.strip()
    fence = re.search(r"```[a-zA-Z]*$", before)
    if fence:
        before = before[: fence.start()].rstrip()
        after = after.removeprefix("```").strip()
    return not after and (not before or bool(_HEADING.fullmatch(before.rsplit("\n", 1)[-1])))


def _without_prompt(text: str, prompt: str) -> tuple[str, bool]:
    """Return (text after the prompt's echo, whether there was one)."""
    prompt = prompt.strip()
    if 40 <= len(prompt) <= len(text) and prompt[:40] in text:
        after = text.split(prompt)  # not rfind, which is quadratic where both are long
        if len(after) > 1:
            return after[-1], True
    turns = list(_TURN.finditer(text)) if "ssistant" in text else []
    return (text[turns[-1].end() :], True) if turns else (text, False)


def _is_echo(text: str, prompt: str) -> bool:
    """Tell whether a text is a piece of its prompt."""
    piece, prompt = " ".join(text.split()), " ".join(prompt.split())
    return len(piece) >= 40 and (piece in prompt or (len(prompt) >= 200 and prompt[:200] in piece))


def _without_thoughts(text: str) -> tuple[str, bool]:
    """Return (text without reasoning, whether there was any). An unclosed thought reaches to the end of the text,
    unless a whole analysis is in it."""
    parts, at = [], 0
    while opening := _THOUGHT.search(text, at):
        parts.append(text[at : opening.start()])
        at = opening.end()
        closing = _THOUGHT_ENDS[opening[1].lower()].search(text, at)
        if closing is None:
            rest = text[at:]
            if not is_html_analysis(rest) and not any(looks_like_analysis(value) for value, *_ in find_objects(rest)):
                at = len(text)
            return "".join([*parts, text[at:]]), True
        at = closing.end()
    return ("".join([*parts, text[at:]]), True) if at else (text, False)


def _diagnosis(text: str, found: list[tuple], echoed: bool, thought: bool) -> AnalysisError:
    """Say what a text is that holds no analysis object."""
    plain = " ".join(html.unescape(re.sub(r"<[^<>]{0,500}>", " ", text)).split())
    quote = plain[:80]
    objects = [value for value, *_ in found if value]  # a style sheet's {} is none
    meant = re.search(r'\{\s*"', text) is not None
    if meant and not objects or _MEANT.search(text):
        start = (_MEANT.search(text) or re.search(r'\{\s*"', text)).start()
        if balanced_end(text, start) is None:
            return AnalysisError("truncated_json", f"cut off after {len(text) - start:,} characters")
        try:
            parse_json(text[start : balanced_end(text, start)])
        except ValueError as problem:
            what = getattr(problem, "msg", str(problem))
            misspelt = not re.search(r'"dimensions"\s*:|"dimensional_analysis"\s*:', text[start:])
            return AnalysisError("misspelt_json" if misspelt else "invalid_json", f"{what}, in {quote[:60]!r}")
    if objects:
        keys = list(max(objects, key=len))
        if any(str(key).lower() in ("error", "detail", "exception") for key in keys) and len(keys) <= 4:
            return AnalysisError("error_page", quote)
        if any(re.match(r"image_desc|dim\w*s$|overall_|key_str", str(key)) for key in keys):
            return AnalysisError("misspelt_json", f"no dimensions among the keys {', '.join(map(str, keys))[:80]}")
        return AnalysisError("no_scores", f"an object with {', '.join(str(key)[:30] for key in keys[:6])}")
    if _ERROR.search(plain):
        return AnalysisError("error_page", _ERROR.split(plain)[0][-20:] + plain[_ERROR.search(plain).start() :][:70])
    if echoed:
        return AnalysisError("prompt_echo", quote or "the prompt and nothing after it")
    if thought:
        return AnalysisError("reasoning_only", quote or "nothing after the reasoning")
    if meant:
        return AnalysisError("invalid_json", quote)
    if re.search(r"<t[rdh]\b|^[ \t]*\|[^|\n]+\|", text, re.I | re.M) and not re.search(r"\d\s?/\s?10\b|\|\s*\d", text):
        return AnalysisError("no_scores", f"a table without scores: {quote}")
    return AnalysisError("stub" if len(plain) < _STUB else "no_object", quote or "markup without text")

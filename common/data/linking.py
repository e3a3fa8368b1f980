"""One job's way into the manifest, or the reasons why it stays out.

linker = Linker(advisor, statuses, modes, ...)
for outcome in linker.outcomes(databases): ...
"""

import base64
import functools
import itertools
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common.analysis import DIMENSIONS7, AnalysisError
from common.data.database import Database, open_database, shown
from common.data.photos import Locator, Photo, Place, worker_pool
from common.data.sources import REASONS as ANALYSIS_REASONS
from common.data.sources import AnalysisFiles, Asked, Found, example_of, find_analysis
from integration.lora_patch.prompts import prompt_dimensions, prompt_example_scores, read_prompts

NOT_ASKED_FOR = {
    "other_advisor": "of another advisor",
    "status": "did not end well (see --status)",
    "mode": "made in a mode that was not asked for, or by an earlier adapter (see --mode)",
    "duplicate_job": "the same job, read from a newer database already",
}
IMAGE_REASONS = {
    "image_missing": "its photograph is not in the source folder",
    "image_outside": "its path leads out of the source folder; refused",
    "image_ambiguous": "several different files have its name",
    "image_unreadable": "its file is no photograph, or a damaged one",
    "image_bomb": "too large to decode safely",
    "no_filename": "names no photograph",
    "bad_filename": "its file name is not one",
}
REASONS = {**NOT_ASKED_FOR, **ANALYSIS_REASONS, **IMAGE_REASONS}

_COLUMNS = ("id", "filename", "advisor", "status", "mode", "adapter", "model", "created_at", "completed_at")
_TEXTS = ("analysis_markdown", "analysis_file", "llm_outputs", "prompt", "llm_prompt")
_CHUNK = 100  # jobs that a worker is given at a time
_MANY = 3000  # jobs from which on analyses are read on all cores
_ADAPTER = re.compile(r"lora|adapter|fine.?tune", re.I)


@dataclass
class Outcome:
    """What became of one job: a manifest row, or (reason, detail) pairs, the first of which counts."""

    job_id: str
    advisor: str
    database: str
    row: dict | None = None
    reasons: list[tuple[str, str]] = field(default_factory=list)


class Linker:
    """Links the jobs of one advisor (or of "all") to their analyses and photographs."""

    def __init__(
        self,
        advisor: str,
        statuses: tuple[str, ...],
        modes: tuple[str, ...],
        photos: Locator,
        analyses: Locator | None,
    ):
        self.advisor = advisor.strip().lower()
        self.statuses = {status.strip().lower() for status in statuses}
        self.modes = {mode.strip().lower() for mode in modes}
        self.locator, self.files = photos, AnalysisFiles(analyses)
        self.photos: dict[str, Photo] = {}
        self.seen: Counter = Counter()

    # -- what was asked for

    def not_asked_for(self, job: dict) -> tuple[str, str] | None:
        """Return why a job is no candidate at all."""
        if self._advisor_of(job) is None:
            return "other_advisor", shown(job["advisor"])[:40]
        status = plain(job["status"]).lower()
        if status not in self.statuses:
            return "status", shown(job["status"])[:40]
        mode, adapter = plain(job["mode"]).lower(), made_by_adapter(job)
        if "all" in self.modes:
            return None
        wants_adapters = any(_ADAPTER.search(name) for name in self.modes)
        named = self.modes - {"base"}
        if adapter and not wants_adapters:
            return "mode", f"{adapter[:40]} (an adapter's own output)"
        if named and "base" not in self.modes and job["has_mode"] and (mode or "baseline") not in named:
            return "mode", mode or "(none)"
        return None

    def is_wanted(self, advisor: str) -> bool:
        """Tell whether jobs of this advisor (a value of the column) are asked for."""
        return self._advisor_of({"advisor": advisor}) is not None

    def _advisor_of(self, job: dict) -> str | None:
        return _read_for(self.advisor, plain(job["advisor"]))

    # -- the two passes

    def survey(self, databases: list[Path]) -> tuple[int, set[str], set[str]]:
        """Return (number of jobs, photographs to look at, analysis files that jobs claim)."""
        jobs, paths, claimed = 0, set(), set()
        for path in databases:
            with open_database(path) as database:
                for job in tqdm(
                    database.jobs(_COLUMNS), total=database.count(), desc="jobs", leave=False, disable=None
                ):
                    jobs += 1
                    job["has_mode"] = "mode" in database.columns
                    named = self.files.named(plain(job["advisor"]), plain(job["id"]))
                    if named:
                        claimed.add(named)
                    if self.not_asked_for(job) is None:
                        paths.update(self.locator.find(plain(job["filename"])).candidates)
        return jobs, paths, claimed

    def outcomes(self, databases: list[Path], workers: int | None = None) -> Iterator[Outcome]:
        """Yield what became of every job, newest database first, jobs in the order they were made."""
        self.seen.clear()
        for path in databases:
            with open_database(path) as database:
                system_prompt = _system_prompt(database)
                bar = tqdm(
                    database.jobs((*_COLUMNS, *_TEXTS)),
                    total=database.count(),
                    desc=path.name,
                    leave=False,
                    disable=None,
                )
                many = database.count() > _MANY
                candidates = self._candidates(bar, "mode" in database.columns)
                for job, found in _found(candidates, self.files, system_prompt, many, workers):
                    yield self._outcome(job, found, database, system_prompt)

    def _candidates(self, jobs: Iterable[dict], has_mode: bool) -> Iterator[tuple]:
        """Yield (job, why it is no candidate or None, the advisor it is read for)."""
        for job in jobs:
            job["has_mode"] = has_mode
            job["job_id"] = plain(job["id"]) or f"rowid:{plain(job['rowid'])}"
            refusal = self.not_asked_for(job)
            if refusal is None:
                self.seen[job["job_id"]] += 1
                if self.seen[job["job_id"]] > 1:
                    refusal = "duplicate_job", "a job of this id was read before"
            yield job, refusal, self._advisor_of(job)

    def _outcome(self, job: dict, found, database: Database, system_prompt: str) -> Outcome:
        outcome = Outcome(shown(job["job_id"]), shown(job["advisor"]), str(database.path))
        if isinstance(found, tuple):
            outcome.reasons.append(found)
            return outcome
        if isinstance(found, AnalysisError):
            outcome.reasons.append((found.reason, found.detail))
        path, photo = self._photo(self._place(job["filename"]), outcome)
        if not outcome.reasons:
            outcome.advisor = self._advisor_of(job)
            outcome.row = self._row(job, found, path, photo, database, system_prompt)
        return outcome

    def _place(self, filename: object) -> Place:
        if isinstance(filename, AnalysisError):
            return Place(problem="bad_filename", detail=filename.detail)
        return self.locator.find(plain(filename))

    def _photo(self, place: Place, outcome: Outcome) -> tuple[str, Photo] | tuple[None, None]:
        if place.problem:
            outcome.reasons.append((place.problem, place.detail))
            return None, None
        photos = [(path, self.photos[path]) for path in place.candidates]
        good = [(path, photo) for path, photo in photos if photo.problem is None]
        if not good:
            outcome.reasons.append((photos[0][1].problem, f"{photos[0][0]}: {photos[0][1].detail}"))
            return None, None
        if len({photo.sha256 for _, photo in good}) > 1:
            outcome.reasons.append(("image_ambiguous", ", ".join(path for path, _ in good)[:160]))
            return None, None
        return good[0]

    def _row(self, job: dict, found: Found, path: str, photo: Photo, database: Database, system_prompt: str) -> dict:
        scores, overall = _example_scores(prompt_of(job) or system_prompt)
        return {
            "job_id": job["job_id"],
            "advisor": self._advisor_of(job),
            "image_path": path,
            "image_exists": True,
            "image_size": photo.size,
            "image_sha256": photo.sha256,
            "image_width": photo.width,
            "image_height": photo.height,
            "image_orientation": photo.orientation,
            **_fingerprint(photo),
            "analysis_path": found.path,
            "analysis_source": found.source,
            "analysis_format": found.form,
            "analysis": found.analysis,
            "overall_score": found.analysis.get("overall_score"),
            "mends": found.mends,
            "prompt_scores": list(scores),
            "prompt_overall": overall,
            "status": plain(job["status"]),
            "mode": plain(job["mode"]) or None,
            "created_at": plain(job["created_at"]) or None,
            "completed_at": plain(job["completed_at"]) or None,
            "filename": plain(job["filename"]),
            "database": str(database.path),
        }


# ------------------------------------------------------------------------------------------------ reading jobs


def plain(value: object) -> str:
    """Return a column as a stripped text; "" for NULL and for what is no text."""
    return "" if value is None or isinstance(value, AnalysisError) else str(value).strip()


@functools.lru_cache(4096)
def _read_for(asked: str, own: str) -> str | None:
    """Return the advisor for whom a job of ``own`` is read; a job of several advisors is read for the one asked for."""
    if asked == "all":
        return own or None
    names = [name for name in re.split(r'[\s,;|"\[\]]+', own.lower()) if name]
    if own.lower() == asked:
        return own
    return asked if asked in names or names == ["all"] else None


def prompt_of(job: dict) -> str:
    """Return the prompt that a job was made with; "" when its database does not tell."""
    prompt = plain(job["prompt"]) or plain(job["llm_prompt"])
    if not prompt and isinstance(job["llm_outputs"], str):
        match = re.match(r'\s*\{\s*"prompt"\s*:\s*"((?:[^"\\]|\\.){0,40000})"', job["llm_outputs"])
        prompt = match[1].replace('\\"', '"').replace("\\n", "\n") if match else ""
    return prompt


def made_by_adapter(job: dict) -> str:
    """Return what says that an adapter made a job's output ("" when nothing does)."""
    adapter = plain(job["adapter"])
    if adapter and adapter.lower() not in ("none", "null", "base", "baseline", "0", "false"):
        return f"adapter {adapter}"
    return next((f"{c} {plain(job[c])}" for c in ("mode", "model") if _ADAPTER.search(plain(job[c]))), "")


def _system_prompt(database: Database) -> str:
    return read_prompts(database.connection, "").system_prompt or ""


@functools.lru_cache(20_000)
def _fingerprint(photo: Photo) -> dict:
    return {"image_phash": photo.phash, "image_thumb": base64.b64encode(photo.thumb).decode()}


@functools.lru_cache(512)
def _example_scores(prompt: str) -> tuple[tuple[int, ...], float | None]:
    scores, overall = prompt_example_scores(prompt)
    return tuple(scores), overall


@functools.lru_cache(512)
def _asked(prompt: str, system_prompt: str) -> Asked:
    """Return what an answer to these prompts may look like: all dimensions of any one of them, or the seven."""
    sets, examples = [DIMENSIONS7], set()
    for text in (system_prompt, prompt):
        names = tuple(prompt_dimensions(text))
        if len(names) >= 3:
            sets.append(names)
        if example := example_of(text):
            examples.add(example)
    return Asked(tuple(dict.fromkeys(sets)), frozenset(examples))


def _found(candidates, files: AnalysisFiles, system_prompt: str, many: bool, workers: int | None) -> Iterator[tuple]:
    """Yield (job, Found, AnalysisError or refusal) in order; on all cores when there are many jobs."""
    chunks = iter(lambda: list(itertools.islice(candidates, _CHUNK)), [])
    workers = workers or os.cpu_count() or 1
    if not many or workers < 2:
        for chunk in chunks:
            yield from zip((c[0] for c in chunk), _read_chunk(_tasks(chunk), files, system_prompt), strict=True)
        return
    with worker_pool(workers, _start_worker, files, system_prompt) as pool:
        waiting: deque = deque()  # never more than a few chunks in memory
        for chunk in chunks:
            waiting.append(([c[0] for c in chunk], pool.submit(_work, _tasks(chunk))))
            for job, _, _ in chunk:  # the texts are with the worker now, but for what the row needs
                job["prompt"] = prompt_of(job)
                job["analysis_markdown"] = job["llm_outputs"] = job["llm_prompt"] = None
            if len(waiting) > 2 * workers:
                jobs, future = waiting.popleft()
                yield from zip(jobs, future.result(), strict=True)
        for jobs, future in waiting:
            yield from zip(jobs, future.result(), strict=True)


def _tasks(chunk: list) -> list[tuple]:
    tasks = []
    for job, refusal, advisor in chunk:
        texts = {c: str(job[c]) if isinstance(job[c], int | float) else job[c] for c in _TEXTS[:3]}
        texts |= {"id": job["job_id"], "prompt": prompt_of(job)}
        tasks.append((refusal, advisor, texts if refusal is None else None))
    return tasks


def _read_chunk(tasks: list[tuple], files: AnalysisFiles, system_prompt: str) -> list:
    results: list = []
    for refusal, advisor, texts in tasks:
        if refusal is not None:
            results.append(refusal)
            continue
        try:
            results.append(find_analysis(texts, advisor, files, _asked(texts["prompt"], system_prompt)))
        except AnalysisError as error:
            results.append(error)
    return results


_worker: dict = {}


def _start_worker(files: AnalysisFiles, system_prompt: str) -> None:
    _worker.update(files=files, system_prompt=system_prompt)


def _work(tasks: list[tuple]) -> list:
    return _read_chunk(tasks, _worker["files"], _worker["system_prompt"])

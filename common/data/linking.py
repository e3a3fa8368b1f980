"""One job's way into the manifest, or the reasons why it stays out.

linker = Linker(Wanted("ansel", ("done",), ("base",)), photos, analyses)
survey = linker.survey(databases)
for outcome in linker.outcomes(databases): ...
"""

import base64
import functools
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common.data.database import Database, open_database, shown
from common.data.photos import MIN_SIDE, Locator, Photo, Place, describe, worker_pool
from common.data.sources import REASONS as ANALYSIS_REASONS
from common.data.sources import AnalysisFiles, Asked, Found, asked_by, find_analysis
from integration.lora_patch.analysis import AnalysisError
from integration.lora_patch.prompts import UnreadablePrompt, read_specification

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
    "image_tiny": f"less than {MIN_SIDE} pixels wide or high: a placeholder",
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


@dataclass(frozen=True)
class Wanted:
    """Which jobs are linked: of an advisor ("all" for any), of these statuses and modes; what --dimensions and
    --score_range say."""

    advisor: str
    statuses: tuple[str, ...]
    modes: tuple[str, ...]
    dimensions: str | None = None
    score_range: str | None = None

    def advisor_of(self, job: dict) -> str | None:
        """Return the advisor for whom a job is read, None when it is not asked for."""
        return _read_for(self.advisor.strip().lower(), plain(job["advisor"]))

    def refusal(self, job: dict) -> tuple[str, str] | None:
        """Return (reason, detail) why a job is no candidate at all, None for a candidate."""
        if self.advisor_of(job) is None:
            return "other_advisor", shown(job["advisor"])[:40]
        if plain(job["status"]).lower() not in _lowered(self.statuses):
            return "status", shown(job["status"])[:40]
        modes = _lowered(self.modes)
        if "all" in modes:
            return None
        mode, adapter = plain(job["mode"]).lower(), made_by_adapter(job)
        if adapter and not any(_ADAPTER.search(name) for name in modes):
            return "mode", f"{adapter[:40]} (an adapter's own output)"
        if "base" not in modes and job["has_mode"] and (mode or "baseline") not in modes:
            return "mode", mode or "(none)"
        return None


def _lowered(names: tuple[str, ...]) -> set[str]:
    return {name.strip().lower() for name in names}


@dataclass(frozen=True)
class Survey:
    """What a first pass over the databases found: jobs, photographs to look at, analysis files that jobs claim."""

    jobs: int
    photos: set[str]
    claimed: set[str]


@dataclass(frozen=True)
class Reader:
    """What worker processes need to read analyses."""

    files: AnalysisFiles
    system_prompt: str
    wanted: Wanted

    def asked(self, prompt: str) -> Asked:
        prompts = tuple(text for text in (self.system_prompt, prompt) if text)
        return asked_by(prompts, self.wanted.dimensions, self.wanted.score_range)

    def read(self, tasks: list["ReaderTask"]) -> list["Found | AnalysisError | tuple[str, str]"]:
        """Return for each task what was found, or why nothing was."""
        return [task.refusal or self._found(task) for task in tasks]

    def _found(self, task: "ReaderTask") -> Found | AnalysisError:
        try:
            return find_analysis(task.texts, task.advisor, self.files, self.asked(task.texts["prompt"]))
        except AnalysisError as error:
            return error
        except Exception as error:  # one row never ends a run, whatever it does to the reader
            return AnalysisError("unread", f"{type(error).__name__}: {str(error)[:80]}")


@dataclass(frozen=True)
class ReaderTask:
    """A job for a `Reader`: why it is no candidate, or for whom it is read and the texts that may hold the analysis."""

    refusal: tuple[str, str] | None
    advisor: str | None
    texts: dict


class Linker:
    """Links the jobs that are wanted to their analyses and photographs."""

    def __init__(self, wanted: Wanted, photos: Locator, analyses: Locator | None):
        self.wanted, self.locator, self.files = wanted, photos, AnalysisFiles(analyses)
        self.photos: dict[str, Photo] = {}  # by path; what is not in it is looked at when it is needed
        read_specification(
            "", wanted.dimensions or "7", wanted.score_range
        )  # refuse what is no list of names, no range

    # -- the two passes

    def survey(self, databases: list[Path]) -> Survey:
        """Count the jobs of all databases, and look which photographs and files they name."""
        jobs, paths, claimed = 0, set(), set()
        for path in databases:
            with open_database(path) as database:
                for job in _progress(database, _COLUMNS, "jobs"):
                    jobs += 1
                    claimed.add(self.files.named(plain(job["advisor"]), plain(job["id"])))
                    if self.wanted.refusal(job) is None:
                        paths.update(self.locator.find(plain(job["filename"])).candidates)
        return Survey(jobs, paths, claimed - {None})

    def outcomes(self, databases: list[Path], workers: int | None = None) -> Iterator[Outcome]:
        """Yield what became of every job, newest database first, jobs in the order they were made."""
        seen: set[str] = set()
        for path in databases:
            with open_database(path) as database:
                reader = self.reader(database)
                jobs = _progress(database, (*_COLUMNS, *_TEXTS), path.name)
                workers = workers or os.cpu_count() or 1
                pooled = workers if database.count() > _MANY else 1
                for job, found in _read_all(self._tasks(jobs, seen), reader, pooled):
                    yield self.outcome(job, found, database, reader.system_prompt)

    def reader(self, database: Database) -> Reader:
        """Return the reader of a database's jobs, which knows its system prompt."""
        return Reader(self.files, database.prompts("").system_prompt or "", self.wanted)

    def _tasks(self, jobs: Iterable[dict], seen: set[str]) -> Iterator[tuple[dict, ReaderTask]]:
        for job in jobs:
            task = self.task(job)
            if task.refusal is None and job["job_id"] in seen:
                task = ReaderTask(("duplicate_job", "a job of this id was read before"), None, {})
            elif task.refusal is None:
                seen.add(job["job_id"])
            yield job, task

    def task(self, job: dict) -> ReaderTask:
        """Return what a `Reader` needs of a job."""
        texts = {c: str(job[c]) if isinstance(job[c], int | float) else job[c] for c in _TEXTS[:3]}
        texts |= {"id": job["job_id"], "prompt": prompt_of(job)}
        return ReaderTask(self.wanted.refusal(job), self.wanted.advisor_of(job), texts)

    def outcome(self, job: dict, found, database: Database, system_prompt: str) -> Outcome:
        """Return what becomes of a job, given what a `Reader` found."""
        outcome = Outcome(shown(job["job_id"]), shown(job["advisor"]), str(database.path))
        if isinstance(found, tuple):
            outcome.reasons.append(found)
            return outcome
        if isinstance(found, AnalysisError):
            outcome.reasons.append((found.reason, found.detail))
        path, photo = self._photo(self._place(job["filename"]), outcome)
        if not outcome.reasons:
            outcome.advisor = self.wanted.advisor_of(job)
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
        photos = [(path, self.photos.get(path) or describe(path)) for path in place.candidates]
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
            "advisor": self.wanted.advisor_of(job),
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
            "prompt_range": list(found.score_range),
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
        match = re.match(r'\s*\{\s*"prompt"\s*:\s*("(?:[^"\\]|\\.){0,40000}+")', job["llm_outputs"])
        try:
            prompt = str(json.loads(match[1], strict=False)) if match else ""
        except ValueError:
            prompt = ""
    return prompt


def made_by_adapter(job: dict) -> str:
    """Return what says that an adapter made a job's output ("" when nothing does)."""
    adapter = plain(job["adapter"])
    if adapter and adapter.lower() not in ("none", "null", "base", "baseline", "0", "false"):
        return f"adapter {adapter}"
    return next((f"{c} {plain(job[c])}" for c in ("mode", "model") if _ADAPTER.search(plain(job[c]))), "")


@functools.lru_cache(20_000)
def _fingerprint(photo: Photo) -> dict:
    return {"image_phash": photo.phash, "image_thumb": base64.b64encode(photo.thumb).decode()}


@functools.lru_cache(512)
def _example_scores(prompt: str) -> tuple[tuple[float, ...], float | None]:
    try:
        specification = read_specification(prompt)
    except UnreadablePrompt:
        specification = read_specification(prompt, "8")  # the scores of its example can be read all the same
    return specification.example_scores, specification.example_overall


def jobs_of(database: Database) -> Iterator[dict]:
    """Yield every job with all that linking reads of it."""
    return _progress(database, (*_COLUMNS, *_TEXTS), "jobs")


def _progress(database: Database, columns: tuple[str, ...], label: str) -> Iterator[dict]:
    """Yield the jobs of a database with "has_mode" and "job_id", under a progress bar."""
    has_mode, total = "mode" in database.columns, database.count()
    for job in tqdm(database.jobs(columns), total=total, desc=label, leave=False, disable=None):
        job["has_mode"] = has_mode
        job["job_id"] = plain(job["id"]) or f"rowid:{plain(job['rowid'])}"
        yield job


def _read_all(jobs: Iterator[tuple[dict, ReaderTask]], reader: Reader, workers: int) -> Iterator[tuple]:
    """Yield (job, Found, AnalysisError or refusal) in order, read by ``workers`` processes."""
    chunks = iter(lambda: list(itertools.islice(jobs, _CHUNK)), [])
    if workers < 2:
        for chunk in chunks:
            yield from zip((job for job, _ in chunk), reader.read([task for _, task in chunk]), strict=True)
        return
    with worker_pool(workers, _start_worker, reader) as pool:
        waiting: deque = deque()  # never more than a few chunks in memory
        for chunk in chunks:
            waiting.append(([job for job, _ in chunk], pool.submit(_work, [task for _, task in chunk])))
            for job, task in chunk:  # the worker has the texts now: keep only what the row needs
                job["prompt"] = task.texts.get("prompt")
                job["analysis_markdown"] = job["llm_outputs"] = job["llm_prompt"] = None
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)


_reader: Reader | None = None  # of a worker process


def _start_worker(reader: Reader) -> None:
    global _reader
    _reader = reader


def _work(tasks: list[ReaderTask]) -> list:
    return _reader.read(tasks)

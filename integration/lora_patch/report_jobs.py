"""What the jobs table says of each answered job: its arm, photograph, score, validity and time."""

import contextlib
import functools
import hashlib
import json
import re
import sqlite3
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .answers import parse_analysis
from .answers import score as score_of
from .answers import scores as scores_of
from .arms import ARMS
from .errors import LoraError, one_line
from .jobs import COLUMNS, connect, key_and_columns
from .prompts import read_prompts, told_range
from .score_range import USUAL

DONE, FAILED = ("done", "completed"), ("error", "failed", "failure", "timeout")
PATIENCE = 3600  # seconds; a job with an arm that is unfinished for longer has failed
UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
READ = ("status", "mode", "created_at", "started_at", "completed_at", "last_activity", "filename", "analysis_markdown",
        "llm_outputs", "advisor")  # fmt: skip


@dataclass(frozen=True)
class AnsweredJob:
    """A job that an arm answered or failed on."""

    arm: str  # one of ARMS, or the mode of an older table
    recorded: bool  # whether the table names the arm; else the mode decides
    advisor: str
    version: str | None  # of the adapter
    photograph: str  # equal for jobs of one photograph
    at: float | None  # seconds since 1970
    split: float | None  # share of the adapter's arm when this job's was drawn
    valid: bool
    score: float | None
    fallback: bool
    failed: bool  # an error, or never finished
    seconds: float | None  # of generation


def read_jobs(path: Path, in_test: bool = False) -> list[AnsweredJob]:
    """Return the jobs that were answered or failed, oldest first; both eras of the table. LoraError for no database.

    A failed job counts where the table names its arm: it is an answer that the arm did not give. ``in_test``: only
    jobs of an A/B test.
    """
    try:
        db = connect(path, "ro")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error:  # a WAL database in a folder that cannot be written
        db = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    jobs, photographs = [], _Photographs(Path(path).resolve().parent)
    with contextlib.closing(db):
        try:
            key, names = key_and_columns(db)
            highest = (told_range(read_prompts(db, "").system_prompt or "") or USUAL)[1]
            wanted = dict.fromkeys([key, *READ, *COLUMNS])
            columns = ", ".join(
                f"CAST({name} AS BLOB) AS {name}" if name in names else f"NULL AS {name}" for name in wanted
            )
            # a table from before the column has no job of a test
            where = " WHERE model_used LIKE 'ab_test_%'" if in_test and "model_used" in names else " LIMIT 0" * in_test
            for row in db.execute(f"SELECT {columns} FROM jobs{where}"):
                texts = (None if value is None else bytes(value).decode("utf-8", "replace") for value in row)
                raw = dict(zip(wanted, texts, strict=True))
                if (job := _answered(raw, raw[key], photographs, highest)) is not None:
                    jobs.append(job)
        except sqlite3.Error as error:
            raise LoraError(f"{path}: not a readable database ({one_line(error)})") from error
        except LoraError as error:
            raise LoraError(f"{path}: {error}") from error
    return sorted(jobs, key=lambda job: job.at or 0)


def _answered(raw: dict, key: str, photographs: "_Photographs", highest: float) -> AnsweredJob | None:
    """Return what the report needs of a row; None for a job that is still under way or never had an arm."""
    recorded, status, at = raw["model_used"] in ARMS, raw["status"] or "done", _when(raw)
    failed = recorded and (status in FAILED or (status not in DONE and time.time() - (at or 0) > PATIENCE))
    if status not in DONE and not failed:
        return None
    arm = raw["model_used"] if recorded else {"lora": "fine_tuned", "baseline": "base"}.get(raw["mode"] or "baseline")
    fell_back = raw["model_fallback"] == "1"
    valid, score = (False, None) if failed else _judged(raw, highest)
    return AnsweredJob(
        arm=arm or raw["mode"],
        recorded=recorded,
        advisor=(raw["advisor"] or "").lower(),
        version=raw["adapter_version"],
        photograph=photographs.name(raw["filename"]) or f"job {key}",
        at=at,
        split=_number(raw["ab_test_split"]),
        # a fallback is a failure of its arm; the score that the user saw is the base's and counts for neither
        valid=valid and not fell_back,
        score=None if fell_back else score,
        fallback=fell_back,
        failed=failed,
        seconds=_number(raw["model_duration"]),
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _when(raw: dict) -> float | None:
    """Return a row's time as seconds since 1970 (UTC where the text names no zone)."""
    for name in ("completed_at", "created_at", "last_activity"):
        try:
            at = datetime.fromisoformat((raw[name] or "").replace("Z", "+00:00"))
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            continue
    return None


def _judged(raw: dict, highest: float) -> tuple[bool, float | None]:
    """Return (valid, overall score in points of ten) of a row's answer: JSON, under a heading too, or the older HTML.

    ``highest`` is where the range of scores ends that the system prompt asks for.
    """
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
        if analysis is not None and scores_of(analysis, max(10, highest)):
            given = score_of(analysis.get("overall_score", analysis.get("overall_grade")), max(10, highest))
            return True, None if given is None or given > highest else given * 10 / highest
        if "dimension-score" in text:
            grade = re.search(r"overall-grade[^>]*>\s*(?:<strong>)?\s*(\d+(?:\.\d+)?)\s*/\s*10", text)
            return True, score_of(grade[1]) if grade else None
    return False, None


@functools.lru_cache(maxsize=100_000)  # a canary looks again and again
def _content(path: Path) -> str | None:
    """Return what is equal for files of the same bytes, from size and beginning; None for one that is not there."""
    try:
        with open(path, "rb") as file:
            return f"{path.stat().st_size}-{hashlib.sha256(file.read(65536)).hexdigest()}"
    except (OSError, ValueError):
        return None


class _Photographs:
    """Tells which jobs are of one photograph: by the file's bytes where it is still there, else by its name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, str] = {}

    def name(self, filename: str | None) -> str | None:
        """Return what is equal for jobs of one photograph; None where the job names no file."""
        if not filename or "\0" in filename:
            return None
        if filename not in self.known:
            self.known[filename] = self._content(filename) or self._plain(Path(filename).name)
        return self.known[filename]

    def _content(self, filename: str) -> str | None:
        places = self.folder / filename, self.folder / "source" / Path(filename).name
        return next((found for place in places if (found := _content(place)) is not None), None)

    def _plain(self, name: str) -> str:
        """Return a name without what an upload adds: UUID_ before it, -1a2b3c4d before the ending.

        A name that then identifies nothing ("photo.jpg") is kept whole.
        """
        bare = re.sub(rf"^{UUID}_", "", name)
        bare = re.sub(r"-[0-9a-f]{8}(?=\.\w+$)", "", bare)
        return bare if re.search(rf"{UUID}|\d{{3,}}", bare) else name

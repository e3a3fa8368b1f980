"""`--why JOB` of link and prepare: what a job's row holds, what was read from it, and every verdict on it."""

from collections.abc import Iterator
from pathlib import Path

import click

from common.data.candidates import response_of
from common.data.database import open_database, shown
from common.data.linking import REASONS, Linker, jobs_of, plain
from common.data.preparation import REASONS as PREPARED
from common.data.preparation import Choice, Task
from common.data.sources import Found, readings
from common.errors import UserError
from common.files import RowFile, is_file
from common.tables import paragraph
from integration.lora_patch.analysis import AnalysisError
from integration.lora_patch.specification import PromptSpecification

_RAW = 20_000  # characters of a raw text that are printed


def explain(linker: Linker, databases: list[Path], job_id: str, manifest: Path) -> None:
    """Print all that linking, and preparation where it has run, make of the jobs whose ids begin with ``job_id``."""
    found = 0
    for path in databases:
        with open_database(path) as database:
            reader = linker.reader(database)
            for job in jobs_of(database):
                if plain(job["job_id"]).lower().startswith(job_id.strip().lower()):
                    found += 1
                    click.echo("\n".join(_lines(linker, reader, job, database)))
    if not found:
        raise UserError(f"no job whose id begins with {job_id!r} in {', '.join(map(str, databases))}")
    for line in _prepared(manifest, job_id):
        click.echo(line)


def explain_prepared(task: Task, choice: Choice, job_id: str) -> None:
    """Print the raw text of the linked jobs whose ids begin with ``job_id``, what is trained on and each verdict."""
    wanted = [c for c in choice.candidates if c.job_id.lower().startswith(job_id.strip().lower())]
    if not wanted:
        raise UserError(
            f"{task.manifest.path}: no linked job whose id begins with {job_id!r}; link_training_data.py --why "
            f"{job_id} lists all jobs"
        )
    for candidate, row in zip(wanted, task.manifest.read([c.place for c in wanted]), strict=True):
        click.echo(f"\nJob {shown(candidate.job_id)} with the photograph {candidate.image_path}")
        raw = _raw_text(row)
        click.echo(f"\n-- raw text\n{_printable(raw[:_RAW])}{' ...' if len(raw) > _RAW else ''}")
        response, spans = response_of(row, task.target, candidate)
        click.echo(
            f"\n-- read from {row.get('analysis_source')} and written as the prompt demands\n{_printable(response)}"
        )
        if spans:
            click.echo(f"out of the loss: {', '.join(response[start:end] for start, end in spans)}")
        click.echo()
        for gate, level in choice.levels.items():
            click.echo(
                paragraph(f"{gate} ({level}): {_printable(candidate.verdicts.get(gate, 'nothing found'))}", "  ", "  ")
            )
        reason = candidate.reason and f"left out: {candidate.reason}, {PREPARED[candidate.reason]}"
        click.echo(f"{reason or 'an example'} {_printable(candidate.detail)}".rstrip())


def _raw_text(row: dict) -> str:
    """Return the text that a row's analysis was read from; a word on it where it is gone."""
    try:
        if row.get("analysis_path"):
            return Path(row["analysis_path"]).read_text(encoding="utf-8", errors="replace")
        with open_database(row["database"]) as database:
            job = next(job for job in jobs_of(database) if plain(job["job_id"]) == row["job_id"])
            column = "llm_outputs" if str(row.get("analysis_source")) == "llm_outputs" else "analysis_markdown"
            return plain(job[column])
    except (OSError, KeyError, StopIteration, UserError) as error:
        return f"(not there any more: {error or 'no such job'})"


def _lines(linker: Linker, reader, job: dict, database) -> Iterator[str]:
    yield f"\nJob {shown(job['job_id'])} in {database.path}"
    for name, value in job.items():
        if value is not None and name not in ("rowid", "id", "job_id", "has_mode"):
            text = f"({value.reason}: {value.detail})" if isinstance(value, AnalysisError) else shown(value)
            yield f"  {name}: {text[:100]}{f' ... ({len(text):,} characters)' if len(text) > 100 else ''}"
    task = linker.task(job)
    if task.refusal:
        yield f"  not asked for: {task.refusal[0]} ({task.refusal[1]})"
    asked = reader.asked(task.texts["prompt"])
    low, high = asked.score_range
    yield f"  held against: {' | '.join(', '.join(names) for names in asked.dimensions)}; scores {low:g} to {high:g}"
    if asked.unreadable:
        yield f"  {asked.unreadable}"
    for text, result in readings(task.texts, task.advisor or plain(job["advisor"]), linker.files, asked):
        yield "\n-- raw text\n" + _printable(text[:_RAW]) + (" ..." if len(text) > _RAW else "")
        if isinstance(result, Found):
            yield f"-- read from {result.source} as {result.form}, mends: {', '.join(result.mends) or 'none'}"
            yield PromptSpecification(tuple(d["name"] for d in result.analysis["dimensions"])).render(result.analysis)
            break
        yield f"-- not usable: {result.reason}, {REASONS[result.reason]} ({_printable(result.detail)})"
    outcome = linker.outcome(job, task.refusal or reader.read([task])[0], database, reader.system_prompt)
    if outcome.row:
        yield f"\nLinked, with the photograph {outcome.row['image_path']}"
    for reason, detail in outcome.reasons:
        yield f"\nLeft out: {reason}, {REASONS[reason]} ({_printable(detail)})"


def _prepared(manifest: Path, job_id: str) -> Iterator[str]:
    """Yield what preparation decided about the job, from the verdicts beside the manifest."""
    for path in sorted(manifest.parent.glob("training_data_*_verdicts.jsonl")):
        for _, _, row in RowFile(path).rows() if is_file(path) else ():
            if str(row.get("job_id", "")).lower().startswith(job_id.strip().lower()):
                said = row.get("reason") or f"an example of {row.get('side')}"
                yield f"\nPrepared ({path.name}): {said} {row.get('detail') or ''}".rstrip()
                verdicts = row.get("verdicts") if isinstance(row.get("verdicts"), dict) else {}
                for gate, text in verdicts.items():
                    yield paragraph(f"{gate}: {_printable(str(text))}", "  ", "  ")


def _printable(text: str) -> str:
    """Return a text that a terminal can show: lines kept, control characters spelled out."""
    return "\n".join(shown(line) for line in text.encode("utf-8", "backslashreplace").decode().split("\n"))

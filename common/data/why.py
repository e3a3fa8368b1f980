"""`link_training_data.py --why JOB`: what a job's row holds, what was read from it, and every verdict on it."""

from collections.abc import Iterator
from pathlib import Path

import click

from common.data.database import open_database, shown
from common.data.linking import REASONS, Linker, jobs_of, plain
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
    yield f"  held against: {' | '.join(', '.join(names) for names in asked.dimensions)}"
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
    """Yield what preparation said of the job, from the verdicts that lie beside the manifest."""
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

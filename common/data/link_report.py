"""What linking writes and prints: the manifest, each job left out with its reason, and the counts of both."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from common.data.database import shown
from common.data.linking import NOT_ASKED_FOR, REASONS, Outcome
from common.errors import UserError
from common.files import jsonl_writer, sha256_file, write_atomic, write_json
from common.tables import counted, paragraph, table

_SHOWN_IDS = 6


@dataclass
class Counts:
    """What became of all jobs."""

    linked: int = 0
    first: Counter = field(default_factory=Counter)  # jobs by the reason that counts
    any: Counter = field(default_factory=Counter)  # jobs by every reason that they have
    ids: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # some, by reason
    tallies: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # of linked jobs
    photos: set[str] = field(default_factory=set)  # SHA-256
    files: set[str] = field(default_factory=set)  # of analyses
    answered: Counter = field(default_factory=Counter)  # dimensions of answers whose prompt does not tell
    details: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # of jobs not asked for

    @property
    def left_out(self) -> int:
        return self.first.total()

    def add(self, outcome: Outcome) -> None:
        if outcome.row is None:
            first, detail = outcome.reasons[0]
            self.first[first] += 1
            self.any.update({reason for reason, _ in outcome.reasons})
            self.ids[first] += [outcome.job_id] if len(self.ids[first]) < _SHOWN_IDS else []
            if first in NOT_ASKED_FOR:
                self.details[first][detail] += 1
            if first == "unknown_dimensions" and (names := re.search(r"answers (.+?): ", detail)):
                self.answered[names[1]] += 1
            return
        row = outcome.row
        self.linked += 1
        self.photos.add(row["image_sha256"])
        self.files.update([row["analysis_path"]] if row["analysis_path"] else [])
        self.tallies["source"][f"{row['analysis_source']} ({row['analysis_format']})"] += 1
        self.tallies["mode"][row["mode"] or "(not recorded)"] += 1
        self.tallies["mends"].update(row["mends"])


def rejected_path(manifest: Path) -> Path:
    """Return the path of the file that names each job left out."""
    return manifest.with_name(f"{manifest.stem}_rejected.jsonl")


def write_manifest(manifest: Path, outcomes: Iterator[Outcome]) -> Counts:
    """Write the manifest and the rejects; UserError, and neither is written, when no job can be used."""
    counts = Counts()
    with write_atomic(manifest) as file, write_atomic(rejected_path(manifest)) as rejected_file:
        linked, left_out = jsonl_writer(file), jsonl_writer(rejected_file)
        for outcome in outcomes:
            counts.add(outcome)
            if outcome.row is not None:
                linked.write(outcome.row)
            else:
                left_out.write(_reject(outcome))
        if not counts.linked:
            show_reasons(counts)
            raise UserError(f"none of {counts.left_out:,} jobs can be used (the table above says why); nothing written")
    return counts


def _reject(outcome: Outcome) -> dict:
    reason, detail = outcome.reasons[0]
    return {
        "job_id": outcome.job_id,
        "advisor": outcome.advisor,
        "reason": reason,
        "detail": shown(detail.encode("utf-8", "backslashreplace")),
        "also": [name for name, _ in outcome.reasons[1:]],
        "database": outcome.database,
    }


def write_report(manifest: Path, counts: Counts, settings: dict[str, object], orphans: list[str]) -> None:
    """Write the counts beside the manifest, with the SHA-256 of both files."""
    report = {
        "settings": {name: str(value) for name, value in settings.items()},
        "jobs": counts.linked + counts.left_out,
        "linked": counts.linked,
        "photographs": len(counts.photos),
        "reasons": {
            name: {"jobs": counts.first[name], "in_all": counts.any[name], "meaning": REASONS[name]}
            for name in REASONS
            if counts.any[name]
        },
        **{name: dict(sorted(tally.items())) for name, tally in sorted(counts.tallies.items())},
        "analysis_files_without_job": orphans,
        "sha256": {path.name: sha256_file(path) for path in (manifest, rejected_path(manifest))},
    }
    write_json(manifest.with_name(f"{manifest.stem}_report.json"), report)


def show(counts: Counts, manifest: Path, advisor: str, orphans: list[str], min_examples: int) -> None:
    """Print where every job went."""
    show_reasons(counts)
    jobs, photos = counted(counts.linked, "job"), counted(len(counts.photos), "different photograph")
    click.echo(f"\nLinked {jobs} of {advisor} with {photos} -> {manifest}")
    for title, name in (("analyses from", "source"), ("made in mode", "mode"), ("mends", "mends")):
        if counts.tallies[name]:
            tally = ", ".join(f"{key} {count:,}" for key, count in sorted(counts.tallies[name].items()))
            click.echo(paragraph(f"{title}: {tally}", "  ", "  "))
    click.echo(f"Left out: {counted(counts.left_out, 'job')}, each with its reason -> {rejected_path(manifest)}")
    if orphans:
        click.echo(f"{counted(len(orphans), 'analysis file')} without a job, e.g. {Path(orphans[0]).name}")
    if counts.linked < min_examples:
        few = f"{counts.linked:,} linked jobs are fewer than the recommended {min_examples:,} (--min_examples)"
        click.echo(paragraph(f"Warning: {few}"), err=True)


def show_reasons(counts: Counts) -> None:
    """Print the tables of reasons, and which dimensions to name where prompts do not tell theirs."""
    others = [name for name in NOT_ASKED_FOR if counts.first[name]]
    asked = [name for name in REASONS if counts.any[name] and name not in NOT_ASKED_FOR]
    if others:
        click.echo("\nNot asked for\n" + _table(counts, others))
    if asked:
        click.echo("\nCannot be used (jobs: by the first reason; in all: every job with this fault)")
        click.echo(_table(counts, asked))
    total = counts.linked + counts.left_out
    click.echo(f"\n{counted(total, 'job')} = {counts.linked:,} linked + {counts.left_out:,} left out")
    if counts.answered:
        names, count = counts.answered.most_common(1)[0]
        option = f'--dimensions "{names.replace(", ", ",")}"'
        click.echo(f"Warning: {counted(count, 'job')} answered {names}.", err=True)
        click.echo(f"  If that is what their prompt asks for, link with {option}", err=True)


def _table(counts: Counts, names: list[str]) -> str:
    rows = [
        [name, counts.first[name], counts.any[name], f"{REASONS[name]}: {_some_ids(counts, name)}".rstrip(": ")]
        for name in names
    ]
    return table(["reason", "jobs", "in all", "meaning and job ids"], rows)


def _some_ids(counts: Counts, name: str) -> str:
    if name in ("status", "mode", "other_advisor"):
        return ", ".join(
            f"{detail or '(none)'} {count:,}" for detail, count in counts.details[name].most_common(_SHOWN_IDS)
        )
    ids = ", ".join(job_id[:8] for job_id in counts.ids[name])
    return ids + (", ..." if counts.first[name] > len(counts.ids[name]) else "")

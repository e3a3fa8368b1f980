"""Find every usable analysis in a Mondrian database and the photograph it belongs to.

    python link_training_data.py --advisor ansel

Reads the database(s) (read-only, also while the service writes), the photographs and the analysis files.
Writes training_data/training_data_manifest.jsonl, a line for each linked job; beside it ..._rejected.jsonl, a line
for each other job with the reason, and ..._report.json with the counts. The rows are made by `common/data/linking.py`.
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import jsonlines

from common.cli import PhaseCommand, option_group, print_settings
from common.data.database import find_databases, open_database, shown
from common.data.linking import NOT_ASKED_FOR, REASONS, Linker, Outcome
from common.data.photos import Locator, describe_all
from common.errors import UserError
from common.files import sha256_file, write_atomic, write_json
from common.tables import counted, paragraph, table

PHOTO_CACHE = ".photo_cache.db"


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Data")
@click.option("--db_path", multiple=True, type=click.Path(path_type=Path), default=(".",), show_default=True,
              help="database, or a folder with databases of one installation; may be repeated")  # fmt: skip
@click.option("--source_dir", type=click.Path(path_type=Path), help="folder of the photographs  [default: source beside the database]")  # fmt: skip  # noqa: E501
@click.option("--analysis_dir", type=click.Path(path_type=Path), help="folder of analysis-ADVISOR-JOBID.md files  [default: analysis_md beside the database]")  # fmt: skip  # noqa: E501
@option_group("Jobs")
@click.option("--advisor", required=True, help='advisor whose jobs are linked, or "all"')
@click.option("--status", multiple=True, default=("done", "completed"), show_default=True, help="statuses of jobs that ended well; may be repeated")  # fmt: skip  # noqa: E501
@click.option("--mode", multiple=True, default=("base",), show_default=True, help='modes to take, may be repeated; "base": every mode but an adapter\'s, "all": those too')  # fmt: skip  # noqa: E501
@option_group("Output")
@click.option("--output_dir", type=click.Path(path_type=Path), default="training_data", show_default=True, help="folder for all that is written")  # fmt: skip  # noqa: E501
@click.option("--output_file", default="training_data_manifest.jsonl", show_default=True, help="name of the manifest in output_dir")  # fmt: skip  # noqa: E501
@click.option("--min_examples", default=60, show_default=True, type=click.IntRange(min=0), help="warn when fewer jobs are linked")  # fmt: skip  # noqa: E501
@click.option("--workers", type=click.IntRange(min=1), help="processes that read photographs and analyses  [default: all cores]")  # fmt: skip  # noqa: E501
def main(db_path, source_dir, analysis_dir, advisor, status, mode, output_dir, output_file, min_examples, workers):
    databases = find_databases(db_path)
    source_dir, analysis_dir = folders(databases[0].parent, source_dir, analysis_dir)
    settings = {
        "db_path": ", ".join(map(str, databases)),
        "source_dir": source_dir,
        "analysis_dir": analysis_dir or "(none)",
        "advisor": advisor,
        "status": ", ".join(status),
        "mode": ", ".join(mode),
        "output_file": output_dir / output_file,
    }
    print_settings("Link", settings)
    photos, analyses = Locator(source_dir), Locator(analysis_dir) if analysis_dir else None
    linker = Linker(advisor, status, mode, photos, analyses)
    require_advisor(databases, linker)
    jobs, paths, claimed = linker.survey(databases)
    linker.photos = describe_all(sorted(paths), output_dir / PHOTO_CACHE, workers)
    summary = Summary(output_dir / output_file, jobs)
    summary.write(linker.outcomes(databases, workers))
    orphans = sorted(set(analyses.names()) - claimed - summary.files) if analyses else []
    summary.report(settings, orphans)
    summary.show(advisor, orphans, min_examples)


def folders(beside: Path, source_dir: Path | None, analysis_dir: Path | None) -> tuple[Path, Path | None]:
    """Return (source folder, analysis folder or None); UserError for a folder that is named but not there."""
    source_dir = source_dir or beside / "source"
    if not source_dir.is_dir():
        raise UserError(f"{source_dir}: no such folder of photographs; name it with --source_dir")
    if analysis_dir and not analysis_dir.is_dir():
        if analysis_dir != beside / "analysis_md":
            raise UserError(f"{analysis_dir}: no such folder of analyses; name it with --analysis_dir")
        return source_dir, None
    default = beside / "analysis_md"
    return source_dir, analysis_dir or (default if default.is_dir() else None)


def require_advisor(databases: list[Path], linker: Linker) -> None:
    """UserError, with the advisors that there are, when the one asked for has no jobs."""
    counts: Counter = Counter()
    for path in databases:
        with open_database(path) as database:
            counts.update(database.advisors())
    if not counts:
        raise UserError(f"{', '.join(map(str, databases))}: no jobs in it; name another database with --db_path")
    if not any(linker.is_wanted(name) for name in counts):
        there = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(20))
        raise UserError(f"advisor {linker.advisor!r} has no jobs; those with jobs: {there}")


class Summary:
    """Writes manifest and rejects as the outcomes come, and counts them."""

    def __init__(self, manifest: Path, jobs: int):
        self.manifest, self.jobs = manifest, jobs
        self.rejected = manifest.with_name(f"{manifest.stem}_rejected.jsonl")
        self.linked = 0
        self.first: Counter = Counter()  # by the reason that counts
        self.any: Counter = Counter()  # by every reason a job has
        self.ids: defaultdict = defaultdict(list)
        self.tallies: defaultdict = defaultdict(Counter)
        self.photos: set[str] = set()
        self.files: set[str] = set()  # of analyses

    def write(self, outcomes: Iterator[Outcome]) -> None:
        """Write both files, or neither when no job can be used."""
        with write_atomic(self.manifest) as manifest, write_atomic(self.rejected) as rejected:
            rows, rejects = (jsonlines.Writer(file, compact=True, dumps=_dumps) for file in (manifest, rejected))
            for outcome in outcomes:
                if outcome.row is not None:
                    self._count(outcome.row)
                    rows.write(outcome.row)
                else:
                    self._count_reasons(outcome)
                    rejects.write(_reject(outcome))
            if not self.linked:
                self.show_reasons()
                raise UserError(f"none of {self.jobs:,} jobs can be used (the table above says why); nothing written")

    def _count(self, row: dict) -> None:
        self.linked += 1
        self.photos.add(row["image_sha256"])
        self.files.update([row["analysis_path"]] if row["analysis_path"] else [])
        self.tallies["source"][f"{row['analysis_source']} ({row['analysis_format']})"] += 1
        self.tallies["mode"][row["mode"] or "(not recorded)"] += 1
        self.tallies["mends"].update(row["mends"])

    def _count_reasons(self, outcome: Outcome) -> None:
        first = outcome.reasons[0][0]
        self.first[first] += 1
        self.any.update({reason for reason, _ in outcome.reasons})
        if len(self.ids[first]) < 6:
            self.ids[first].append(outcome.job_id)

    def report(self, settings: dict, orphans: list[str]) -> None:
        """Write the counts beside the manifest."""
        reasons = {
            name: {"jobs": self.first[name], "in_all": self.any[name], "meaning": REASONS[name]}
            for name in REASONS
            if self.any[name]
        }
        write_json(
            self.manifest.with_name(f"{self.manifest.stem}_report.json"),
            {
                "settings": {name: str(value) for name, value in settings.items()},
                "jobs": self.jobs,
                "linked": self.linked,
                "photographs": len(self.photos),
                "reasons": reasons,
                **{name: dict(sorted(tally.items())) for name, tally in sorted(self.tallies.items())},
                "analysis_files_without_job": orphans,
                "sha256": {path.name: sha256_file(path) for path in (self.manifest, self.rejected)},
            },
        )

    def show(self, advisor: str, orphans: list[str], min_examples: int) -> None:
        """Print where every job went."""
        self.show_reasons()
        jobs, photos = counted(self.linked, "job"), counted(len(self.photos), "different photograph")
        click.echo(f"\nLinked {jobs} of {advisor} with {photos} -> {self.manifest}")
        for title, name in (("analyses from", "source"), ("made in mode", "mode"), ("mends", "mends")):
            if self.tallies[name]:
                counts = ", ".join(f"{key} {count:,}" for key, count in sorted(self.tallies[name].items()))
                click.echo(paragraph(f"{title}: {counts}", "  ", "  "))
        click.echo(f"Left out: {counted(sum(self.first.values()), 'job')}, each with its reason -> {self.rejected}")
        if orphans:
            files = counted(len(orphans), "analysis file")
            click.echo(f"{files} without a job, e.g. {Path(orphans[0]).name}")
        if self.linked < min_examples:
            few = f"{self.linked:,} linked jobs are fewer than the recommended {min_examples:,} (--min_examples)"
            click.echo(paragraph(f"Warning: {few}"), err=True)

    def show_reasons(self) -> None:
        asked = [name for name in REASONS if self.any[name] and name not in NOT_ASKED_FOR]
        others = [name for name in NOT_ASKED_FOR if self.first[name]]
        if others:
            click.echo("\nNot asked for\n" + self._table(others))
        if asked:
            click.echo("\nCannot be used (jobs: by the first reason; in all: every job with this fault)")
            click.echo(self._table(asked))
        total = self.linked + sum(self.first.values())
        click.echo(f"\n{counted(total, 'job')} = {self.linked:,} linked + {sum(self.first.values()):,} left out")

    def _table(self, names: list[str]) -> str:
        rows = [
            [name, self.first[name], self.any[name], f"{REASONS[name]}: {self._some_ids(name)}".rstrip(": ")]
            for name in names
        ]
        return table(["reason", "jobs", "in all", "meaning and job ids"], rows)

    def _some_ids(self, name: str) -> str:
        if name == "other_advisor":
            return ""
        ids = ", ".join(job_id[:8] for job_id in self.ids[name])
        return ids + (", ..." if self.first[name] > len(self.ids[name]) else "")


def _reject(outcome: Outcome) -> dict:
    reason, detail = outcome.reasons[0]
    return {
        "job_id": outcome.job_id,
        "advisor": outcome.advisor,
        "reason": reason,
        "detail": shown(_printable(detail)),
        "also": [name for name, _ in outcome.reasons[1:]],
        "database": outcome.database,
    }


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _dumps(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())

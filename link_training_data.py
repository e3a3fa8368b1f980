"""Find every usable analysis in a Mondrian database and the photograph it belongs to.

    python link_training_data.py --advisor ansel
    python link_training_data.py --advisor ansel --why 0361b22a

Reads the database(s) (read-only, also while the service writes), the photographs and the analysis files.
Writes training_data/training_data_manifest.jsonl, a line for each linked job; beside it ..._rejected.jsonl, a line
for each other job with the reason, and ..._report.json with the counts. The rows are made by `common/data/linking.py`.
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import os
import sys
from collections import Counter
from pathlib import Path

import click

from common.cli import PATH, PhaseCommand, command_line, next_step, option, option_group, print_settings, write_config
from common.data.database import find_databases, open_database
from common.data.link_report import show, write_manifest, write_report
from common.data.linking import Linker, Wanted
from common.data.photos import Locator, describe_all
from common.data.why import explain
from common.errors import UserError

PHOTO_CACHE = ".photo_cache.db"


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Data")
@option("--db_path", multiple=True, type=PATH, default=(".",),
              help="database, or a folder with databases of one installation; may be repeated")  # fmt: skip
@option("--source_dir", type=PATH, help="folder of the photographs  [default: source beside the database]")
@option("--analysis_dir", type=PATH, help="folder of analysis-ADVISOR-JOBID.md files  [default: analysis_md beside the database]")  # fmt: skip  # noqa: E501
@option_group("Jobs")
@option("--advisor", required=True, help='advisor whose jobs are linked, or "all"')
@option("--status", multiple=True, default=("done", "completed"), help="statuses of jobs that ended well; may be repeated")  # fmt: skip  # noqa: E501
@option("--mode", multiple=True, default=("base",), help='modes to take, may be repeated; "base": every mode but an adapter\'s, "all": those too')  # fmt: skip  # noqa: E501
@option("--dimensions", help='what prompts ask for that do not tell: "7", "8", or names separated by commas  [default: read from each job\'s prompt]')  # fmt: skip  # noqa: E501
@option("--score_range", metavar="LOW-HIGH", help='scores that prompts ask for that do not tell, such as "0-100"  [default: read from each job\'s prompt, else 1-10]')  # fmt: skip  # noqa: E501
@option("--why", metavar="JOB", help="print the jobs whose ids begin with JOB: what they hold, what was read from it, every verdict; write nothing")  # fmt: skip  # noqa: E501
@option_group("Output")
@option("--output_dir", type=PATH, default="training_data", help="folder for all that is written")
@option("--output_file", default="training_data_manifest.jsonl", help="name of the manifest in output_dir")
@option("--min_examples", default=60, type=click.IntRange(min=0), help="warn when fewer jobs are linked")
@option("--workers", type=click.IntRange(min=1), help="processes that read photographs and analyses  [default: all cores]")  # fmt: skip  # noqa: E501
def main(db_path, output_dir, output_file, min_examples, workers, why, **options):
    databases = find_databases(db_path)
    source_dir, analysis_dir = folders(databases[0].parent, options.pop("source_dir"), options.pop("analysis_dir"))
    read = (options["dimensions"], options["score_range"])
    wanted = Wanted(options["advisor"], options["status"], options["mode"], *read)
    photos, analyses = Locator(source_dir), Locator(analysis_dir) if analysis_dir else None
    manifest = output_dir / output_file
    linker = Linker(wanted, photos, analyses)
    if why:
        explain(linker, databases, why, manifest)
        return
    settings = {
        "db_path": ", ".join(map(str, databases)),
        "source_dir": source_dir,
        "analysis_dir": analysis_dir or "(none)",
    }
    settings |= options | {"output_file": manifest}
    print_settings("Link", settings)

    require_advisor(databases, wanted)
    survey = linker.survey(databases)
    linker.photos = describe_all(sorted(survey.photos), output_dir / PHOTO_CACHE, workers)
    counts = write_manifest(manifest, linker.outcomes(databases, workers))
    orphans = sorted(set(analyses.names()) - survey.claimed - counts.files) if analyses else []
    write_report(manifest, counts, settings, orphans)
    write_config(manifest.with_name(f"{manifest.stem}_config.yaml"), leave_out=("why", "workers"))
    show(counts, manifest, wanted.advisor, orphans, min_examples)
    next_step("", command_line("python", "prepare_training_data.py", "--manifest", manifest), target="prepare")


def folders(beside: Path, source_dir: Path | None, analysis_dir: Path | None) -> tuple[Path, Path | None]:
    """Return (source folder, analysis folder or None); UserError for a folder that is named but not there."""
    source_dir = source_dir or beside / "source"
    if not source_dir.is_dir():
        raise UserError(f"{source_dir}: no such folder of photographs; name it with --source_dir")
    if analysis_dir and not analysis_dir.is_dir():
        if analysis_dir != beside / "analysis_md":
            raise UserError(f"{analysis_dir}: no such folder of analyses; name it with --analysis_dir")
        analysis_dir = None
    default = beside / "analysis_md"
    analysis_dir = analysis_dir or (default if default.is_dir() else None)
    for folder in filter(None, (source_dir, analysis_dir)):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"{folder}: the folder cannot be read (permission denied); allow it")
    return source_dir, analysis_dir


def require_advisor(databases: list[Path], wanted: Wanted) -> None:
    """UserError, with the advisors that there are, when the one asked for has no jobs."""
    counts: Counter = Counter()
    for path in databases:
        with open_database(path) as database:
            counts.update(database.advisors())
    if not counts:
        raise UserError(f"{', '.join(map(str, databases))}: no jobs in it; name another database with --db_path")
    if not any(wanted.advisor_of({"advisor": name}) for name in counts):
        there = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(20))
        raise UserError(f"advisor {wanted.advisor!r} has no jobs; those with jobs: {there}")


if __name__ == "__main__":
    sys.exit(main())

"""What is known of each version of an advisor's adapter: data, figures, verdict, and whether it is in use and why."""

import datetime
from pathlib import Path

import click

from common.errors import UserError
from common.evaluation.comparison import read_report
from common.evaluation.gates import format_value
from common.release.promotion import HISTORY, read_history
from common.tables import paragraph, table
from integration.lora_patch.versions import ARGS, adapter_hashes, find_versions, read_record, record_path, training_args

COLUMNS = {
    "format.strict": "format",
    "loss.nats": "loss",
    "overall.mae": "score error",
    "text.comments": "chrF",
    "speed.seconds": "s/photo",
}


def describe_versions(models: Path, advisor: str, evaluation: Path) -> list[dict]:
    """Return a dictionary for each finished version, oldest first; what is not known is None.

    Keys: version, folder, trained_at (ISO 8601), trained_on and held_out (examples), figures ({figure: value, low,
    high, n} of the candidate), verdict, report, in_use, record (path of the record that says so), promotions (lines of
    the history that concern it).
    """
    place = record_path(models, advisor)
    record, history = read_record(place), read_history(models, advisor)
    rows = []
    for number, folder in find_versions(models, advisor).items():
        found = newest_report(models, advisor, number, folder, evaluation)
        path, report = found or (None, None)
        args, name = training_args(folder), f"v{number}"
        arm = report["summary"]["arms"]["candidate"] if report else {}
        in_use = bool(record and record["version"] == name)
        rows.append(
            {
                "version": name,
                "folder": str(folder),
                "trained_at": args.get("finished_at") or _changed(folder / ARGS),
                "trained_on": (args.get("train_data") or {}).get("examples"),
                "held_out": (args.get("val_data") or {}).get("examples"),
                "figures": {key: arm[key] for key in COLUMNS if key in arm},
                "verdict": report["verdict"]["word"] if report else None,
                "report": str(path) if path else None,
                "in_use": in_use,
                "record": str(place) if in_use else None,
                "promotions": [line for line in history if name in (line.get("version"), line.get("before"))],
            }
        )
    return rows


def newest_report(models: Path, advisor: str, number: int, folder: Path, evaluation: Path) -> tuple[Path, dict] | None:
    """Return (path, report) of the newest report of a version's files as they are now; None where there is none."""
    kept = list((record_path(models, advisor).parent / "reports").glob(f"v{number}-*.json"))
    hashes, found = adapter_hashes(folder), []
    for path in [*kept, *evaluation.glob("comparison_report.json"), *evaluation.glob("*/comparison_report.json")]:
        try:
            report = read_report(path)
        except UserError:
            continue
        if report["arms"].get("candidate", {}).get("sha256") == hashes:
            found.append((report["created_at"], path, report))
    newest = max(found, key=lambda row: row[0], default=None)
    return newest and newest[1:]


def show_versions(models: Path, advisor: str, rows: list[dict]) -> None:
    """Print the table, and below it what is in use, by which record and rule."""
    cells = []
    for row in rows:
        figures = [_figure(row["figures"], name) for name in COLUMNS]
        data = "?" if row["trained_on"] is None else f"{row['trained_on']}+{row['held_out'] or 0}"
        name = row["version"] + (" *" if row["in_use"] else "")
        cells.append([name, row["trained_at"][:10], data, *figures, row["verdict"] or "not evaluated"])
    click.echo(table(["version", "trained", "data", *COLUMNS.values(), "verdict"], cells, indent=""))
    click.echo("* in use; data: examples trained on + held out\n")
    click.echo(paragraph(in_use_sentence(models, advisor)))


def in_use_sentence(models: Path, advisor: str) -> str:
    """Return which version is in use, since when, by whom and by which rule it was promoted."""
    place = record_path(models, advisor)
    record = read_record(place)
    if record is None:
        return f"No version of {advisor} was ever promoted: the service answers with the base alone."
    at = (
        f"{record['promoted_at'][:16].replace('T', ' ')} UTC"
        if record["promoted_at"]
        else "a time that it does not tell"
    )
    since = f"since {at}"
    if record["adapter"] is None:
        return f"No version of {advisor} is in use {since}: {place} has the service answer with the base alone."
    text = f"{record['version']} is in use {since} by {place}"
    text += f", put there by {record['promoted_by']}" if record.get("promoted_by") else ""
    if back := record.get("rolled_back"):
        text += f" (a rollback from {back['version']})"
    if record.get("rule"):
        text += f"; promoted as {record['verdict']} by the rule: {record['rule']}"
    if record.get("report"):
        text += f"; report {place.parent / record['report']}, SHA-256 {(record.get('report_sha256') or '?')[:12]}"
    earlier = [version["version"] for version in record["history"] if version.get("version")]
    return text + f". Before it: {', '.join(earlier) or 'nothing'}. All of it: {place.with_name(HISTORY)}."


def _figure(figures: dict, name: str) -> str:
    return format_value(name, figures[name]["value"], unit=False) if name in figures else "-"


def _changed(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")

"""Versions of an advisor's adapter, and which of them is in use: train the next, promote it, go back.

    python -m common.release.versions iterate --advisor ansel --mondrian TREE --base_model Qwen/Qwen3-VL-4B-Instruct
    python -m common.release.versions promote --advisor ansel [--version v2]
    python -m common.release.versions rollback --advisor ansel
    python -m common.release.versions list --advisor ansel

Version 1 is models/qwen3-vl-4b-lora-ansel, version 2 ...-ansel-v2 and so on; none is ever overwritten. The one in use
is what models/ansel/deployed.json says, a small file that is replaced as a whole and that the service reads; the
report by which each version was decided is kept in models/ansel/reports/.
"""

import datetime
import fcntl
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from common.cli import ScriptCommand
from common.errors import UserError, refuse
from common.evaluation.comparison import read_report, recomputed
from common.evaluation.gates import DEFAULT_GATES, Gate, bound_text, failed, format_value, from_dicts, load_gates
from common.files import read_json, sha256_file, write_json, write_text
from common.records import ARGS
from common.release.adapter import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS, read_adapter

PREFIX = "qwen3-vl-4b-lora-"
RECORD = "deployed.json"
SCHEMA_VERSION = 1
HASHED = (CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS)


# -- names and places -------------------------------------------------------------------------------------------------


def version_folder(models: Path, advisor: str, number: int) -> Path:
    """Return where version ``number`` of an advisor's adapter lies."""
    return models / (PREFIX + advisor + (f"-v{number}" if number > 1 else ""))


def parse_folder(folder: Path) -> tuple[str | None, int]:
    """Return (advisor, version number) of an adapter folder by its name, (None, 1) for a name of another form."""
    match = re.fullmatch(r".*lora-(.+?)(?:-v(\d+))?", folder.resolve().name)
    return (match[1], int(match[2] or 1)) if match else (None, 1)


def record_path(models: Path, advisor: str) -> Path:
    return models / advisor / RECORD


def find_versions(models: Path, advisor: str) -> dict[int, Path]:
    """Return {number: folder} of the finished versions, oldest first."""
    found = {}
    for folder in models.glob(f"{PREFIX}{advisor}*"):
        name, number = parse_folder(folder)
        # the name must be the version's own: "ansel-v2.replaced-1" and an advisor "ansel-two" are others
        if name == advisor and folder == version_folder(models, advisor, number) and (folder / ARGS).is_file():
            found[number] = folder
    return dict(sorted(found.items()))


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Return {file: SHA-256} of the files that make an adapter what it is."""
    return {name: sha256_file(folder / name) for name in HASHED if (folder / name).is_file()}


# -- the version in use -----------------------------------------------------------------------------------------------


def read_record(path: Path) -> dict | None:
    """Read deployed.json; None when no version was ever put in use. UserError for a damaged one."""
    if not path.is_file():
        return None
    record = read_json(path)
    problem = "a JSON object was expected" if not isinstance(record, dict) else None
    if not problem and record.get("schema_version") != SCHEMA_VERSION:
        problem = f"schema {record.get('schema_version')}, this program reads {SCHEMA_VERSION}"
    if not problem and record.get("adapter") is not None:
        fields = {"version": str, "adapter": str, "sha256": dict, "history": list}
        wrong = [name for name, kind in fields.items() if not isinstance(record.get(name), kind)]
        problem = f"{', '.join(wrong)} missing or of the wrong kind" if wrong else None
    if problem:
        raise UserError(f"{path}: {problem}; restore the file, or delete it and promote a version again")
    return record


def deployed_folder(path: Path) -> Path | None:
    """Return the folder of the adapter in use by a record, None when there is none; UserError when it has changed."""
    record = read_record(path)
    if record is None or record["adapter"] is None:
        return None
    folder = path.parent / record["adapter"]
    _check_unchanged(folder, record["sha256"], f"{path} says that {record['version']} is in use, but")
    return folder


def new_record(models: Path, advisor: str, number: int, report: Path | None, history: list[dict]) -> dict:
    """Return the record that puts a version in use."""
    folder, place = version_folder(models, advisor, number), record_path(models, advisor).parent
    return {
        "schema_version": SCHEMA_VERSION,
        "advisor": advisor,
        "version": f"v{number}",
        "adapter": f"../{folder.name}",
        "sha256": adapter_hashes(folder),
        "base_fingerprint": read_json(folder / ARGS).get("base_fingerprint"),
        "report": report.relative_to(place).as_posix() if report else None,
        "promoted_at": _now(),
        "history": history,
    }


def nothing_in_use(advisor: str) -> dict:
    """Return the record that has the service answer with the base alone."""
    none = {"version": None, "adapter": None, "sha256": {}, "base_fingerprint": None, "report": None}
    return {"schema_version": SCHEMA_VERSION, "advisor": advisor, **none, "promoted_at": _now(), "history": []}


def settle_record(models: Path, advisor: str) -> None:
    """Write down what is in use where no record says it: the newest version, or nothing.

    Without a record the service takes the newest version, which must not be the one that a round is still judging.
    """
    place = record_path(models, advisor)
    if read_record(place) is None:
        newest = max(find_versions(models, advisor), default=None)
        write_json(place, new_record(models, advisor, newest, None, []) if newest else nothing_in_use(advisor))


@contextmanager
def locked(models: Path, advisor: str) -> Iterator[None]:
    """Keep a second promotion, rollback or round for the same advisor out."""
    place = record_path(models, advisor).parent
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{place}: another round, promotion or rollback is running; wait for it") from error
        yield


def promote(models: Path, advisor: str, number: int, report_path: Path, gates: Path | None) -> dict:
    """Put a version in use if its report, computed again from its raw outputs, passes every gate; return the record.

    UserError, all reasons in one, for a gate that fails, a report of another adapter or made from recorded outputs,
    one that compared with another version than the one in use now, or files that changed since.
    """
    folder, place = version_folder(models, advisor, number), record_path(models, advisor)
    if not (folder / ARGS).is_file():
        have = ", ".join(f"v{n}" for n in find_versions(models, advisor)) or "none"
        raise UserError(f"{folder}: there is no finished version v{number} of {advisor} (there are: {have})")
    read_adapter(folder)
    current, report = read_record(place), read_report(report_path)
    if current and current["adapter"] and current["sha256"] == adapter_hashes(folder):
        return current
    wanted = load_gates(gates) if gates else from_dicts(report["gates"])
    again = recomputed(report, wanted)
    problems = [f"gate failed: {row['title']}: {row['verdict']} ({row['reason']})" for row in failed(again["gates"])]
    if report.get("recorded_outputs"):
        problems.append("the report was made from recorded outputs, not by running the model")
    if report["arms"].get("candidate", {}).get("sha256") != adapter_hashes(folder):
        problems.append(f"the report is of another adapter than {folder}, or the adapter's files have changed since")
    compared = report["arms"].get("deployed", {}).get("sha256")
    if current and current["adapter"] and compared != current["sha256"]:
        problems.append(f"the report does not compare with {current['version']}, which is in use; evaluate again")
    if problems:
        keeps = f"{current['version']} stays in use" if current and current["adapter"] else "nothing is in use"
        refuse([f"{report_path}: v{number} of {advisor} is not promoted, {keeps}", *problems])
    for gate in wanted:
        _tell_changed(gate)
    kept = keep_report(models, advisor, number, report_path)
    history = [current, *current.get("history", [])] if current else []
    history = [{k: v for k, v in row.items() if k != "history"} for row in history]
    if compared and not current:
        # a round's first comparison is with a version that no record named; it is what a rollback goes back to
        earlier = next(
            (n for n, path in find_versions(models, advisor).items() if adapter_hashes(path) == compared), None
        )
        if earlier:
            first = new_record(models, advisor, earlier, None, [])
            history = [{k: v for k, v in first.items() if k != "history"} | {"promoted_at": None}]
    record = new_record(models, advisor, number, kept, history)
    write_json(place, record)
    return record


def rollback(models: Path, advisor: str) -> tuple[dict, dict]:
    """Put the version before the present one in use again (the base alone, if there is none); return (old, new)."""
    place = record_path(models, advisor)
    current = read_record(place)
    if current is None or current["adapter"] is None:
        raise UserError(f"{place}: no version of {advisor} is in use, so there is nothing to go back from")
    earlier, *rest = current["history"] or [None]
    if earlier is None or earlier["adapter"] is None:
        record = nothing_in_use(advisor)
    else:
        _check_unchanged(place.parent / earlier["adapter"], earlier["sha256"], f"{earlier['version']} cannot be used:")
        record = earlier | {"promoted_at": _now()}
    record |= {"rolled_back": {"version": current["version"], "at": _now()}, "history": rest}
    write_json(place, record)
    return current, record


def keep_report(models: Path, advisor: str, number: int, report_path: Path) -> Path:
    """Copy a version's report beside the record, under a name that says what is in it; return the copy's path."""
    text = report_path.read_text(encoding="utf-8")
    name = f"v{number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    kept = record_path(models, advisor).parent / "reports" / name
    page = report_path.with_suffix(".html")
    if not kept.is_file():
        if page.is_file():
            write_text(kept.with_suffix(".html"), page.read_text(encoding="utf-8"))
        write_text(kept, text)
    return kept


def _check_unchanged(folder: Path, hashes: dict, opening: str) -> None:
    found = adapter_hashes(folder) if folder.is_dir() else {}
    changed = [name for name, sha in hashes.items() if found.get(name) != sha]
    if changed or not hashes:
        raise UserError(f"{opening} {folder} has changed or is gone ({', '.join(changed)}); restore it from a copy")


def _tell_changed(gate: Gate) -> None:
    default = {gate.name: gate for gate in DEFAULT_GATES}.get(gate.name)
    if not gate.enabled:
        click.echo(f"note: gate {gate.name} was switched off")
    elif default and gate.bound != default.bound:
        texts = (bound_text(vars(which)) for which in (gate, default))
        click.echo("note: gate {} was {}, where the default is {}".format(gate.name, *texts))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# -- the table --------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("format.strict", "format"),
    ("loss.nats", "loss"),
    ("overall.mae", "overall MAE"),
    ("text.comments", "chrF"),
    ("speed.seconds", "s/image"),
)


def table(models: Path, advisor: str, evaluation: Path) -> list[str]:
    """Return the versions of an advisor with their figures, a line each."""
    record = read_record(record_path(models, advisor))
    in_use = record["version"] if record else None
    lines = [["", "version", "trained on", *(title for _, title in COLUMNS), "gates", "report"]]
    for number, folder in find_versions(models, advisor).items():
        found = _newest_report(models, advisor, number, folder, evaluation)
        train = read_json(folder / ARGS).get("train_data") or {}
        figures = found[1]["summary"]["arms"]["candidate"] if found else {}
        values = [format_value(name, figures.get(name, {}).get("value")) if found else "-" for name, _ in COLUMNS]
        bad = failed(found[1]["gates"]) if found else []
        gates = "-" if not found else f"{len(bad)} failed" if bad else "pass"
        mark, report = "*" if in_use == f"v{number}" else "", str(found[0]) if found else "not evaluated"
        lines.append([mark, f"v{number}", f"{train.get('examples', '?')} examples", *values, gates, report])
    widths = [max(len(row[at]) for row in lines) for at in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in lines]


def _newest_report(models: Path, advisor: str, number: int, folder: Path, evaluation: Path) -> tuple[Path, dict] | None:
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


# -- commands ---------------------------------------------------------------------------------------------------------


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


def _advisor(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value) or value.startswith("."):
        raise click.BadParameter("letters, digits, '.', '_' and '-' only")
    return value


def shared(command):
    """Add the options that every command has."""
    work = click.option(
        "--work",
        type=click.Path(path_type=Path),
        default=".",
        show_default=True,
        help="folder of models/, training_data/ and evaluation/",
    )
    return click.option("--advisor", required=True, callback=_advisor, help="whose adapter")(work(command))


@main.command("list", cls=ScriptCommand)
@shared
def list_command(advisor: str, work: Path) -> None:
    """Show all versions with their figures; * marks the one in use."""
    models = work / "models"
    lines = table(models, advisor, work / "evaluation")
    if len(lines) == 1:
        raise UserError(f"{models}: no finished adapter of {advisor}; train one (make train ADVISOR={advisor})")
    click.echo("\n".join(lines))
    record = read_record(record_path(models, advisor))
    if record is None or record["adapter"] is None:
        click.echo("No version is in use: the service answers with the base alone.")


@main.command("promote", cls=ScriptCommand)
@shared
@click.option("--version", help="v1, v2, ...  [default: the newest]")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="its comparison_report.json  [default: the newest of this version]",
)
@click.option("--gates", type=click.Path(path_type=Path), help="gates file  [default: the gates in the report]")
def promote_command(advisor: str, work: Path, version: str | None, report: Path | None, gates: Path | None) -> None:
    """Put a version in use, if its report passes every gate."""
    models = work / "models"
    have = find_versions(models, advisor)
    if version and not re.fullmatch(r"v?\d+", version):
        raise UserError(f"--version {version}: v1, v2, ... was expected")
    number = int(version.lstrip("v")) if version else max(have, default=1)
    if report is None and number in have:
        found = _newest_report(models, advisor, number, have[number], work / "evaluation")
        if found is None:
            raise UserError(f"{have[number]}: no report of v{number} as it is now; evaluate it first (make eval)")
        report = found[0]
    with locked(models, advisor):
        before = read_record(record_path(models, advisor))
        record = promote(models, advisor, number, report, gates)
    if before and before["version"] == record["version"] and before["promoted_at"] == record["promoted_at"]:
        click.echo(f"{advisor}: {record['version']} is in use already")
    else:
        click.echo(f"{advisor}: {record['version']} is in use now ({record_path(models, advisor)})")


@main.command("rollback", cls=ScriptCommand)
@shared
def rollback_command(advisor: str, work: Path) -> None:
    """Put the version before the present one in use again."""
    with locked(work / "models", advisor):
        old, new = rollback(work / "models", advisor)
    click.echo(f"{advisor}: back from {old['version']} to {new['version'] or 'the base alone'}")


@main.command("iterate", cls=ScriptCommand)
@shared
@click.option(
    "--mondrian",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="folder of mondrian.db, source/ and analysis_md/",
)
@click.option("--db_path", type=click.Path(path_type=Path), help="database, or a folder of them  [default: MONDRIAN]")
@click.option("--base_model", default="Qwen/Qwen3-VL-4B-Instruct", show_default=True, help="hub id or folder")
@click.option("--link_args", default="", help="more options for link_training_data.py")
@click.option("--prepare_args", default="", help="more options for prepare_training_data.py")
@click.option("--train_args", default="", help="more options for train_mlx_lora.py")
@click.option("--eval_args", default="", help="more options for evaluate_lora.py")
@click.option("--hosts", type=click.Path(path_type=Path), help="hostfile of mlx.launch: train on several machines")
def iterate_command(advisor: str, work: Path, **options) -> None:
    """Train the next version on today's data, compare it with the one in use, promote it if every gate passes."""
    from common.release.rounds import run_round  # imports this module

    with locked(work / "models", advisor):
        run_round(advisor, work, **options)


if __name__ == "__main__":
    main()

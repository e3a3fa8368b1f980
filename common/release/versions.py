"""Versions of an advisor's adapter, and which of them is in use: train the next, promote it, go back.

    python -m common.release.versions iterate --advisor ansel --mondrian TREE --base_model Qwen/Qwen3-VL-4B-Instruct
    python -m common.release.versions promote --advisor ansel [--version v2] [--strict]
    python -m common.release.versions rollback --advisor ansel
    python -m common.release.versions list --advisor ansel [--json]

Version 1 is models/qwen3-vl-4b-lora-ansel, version 2 ...-ansel-v2 and so on; none is ever overwritten. The one in use
is what models/ansel/deployed.json says, a small file that is replaced as a whole and that the service reads; beside it
history.jsonl keeps every promotion and rollback, and reports/ the report by which each version was decided.
"""

import json
import re
from pathlib import Path

import click

from common.cli import PATH, ScriptCommand, option
from common.errors import UserError
from common.release.listing import describe_versions, newest_report, show_versions
from common.release.promotion import Rule, locked, promote, rollback
from common.release.rounds import RoundOptions, run_round
from common.tables import paragraph
from integration.lora_patch.hub import DEFAULT_BASE
from integration.lora_patch.names import is_advisor
from integration.lora_patch.versions import find_versions, record_path


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


def _advisor(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not is_advisor(value):
        raise click.BadParameter("letters, digits, '.', '_', '-' and spaces only, and no ending like -v2")
    return value


def shared(command):
    """Add the options that every command has."""
    work = option("--work", type=PATH, default=".", help="folder of models/, training_data/ and evaluation/")
    return option("--advisor", required=True, callback=_advisor, help="whose adapter")(work(command))


def rule_options(command):
    """Add the options that say which verdicts are enough."""
    strict = option("--strict", is_flag=True, help='promote on "pass" alone, not on "likely"')
    gates = option("--gates", type=PATH, help="gates file  [default: the gates in the report]")
    return strict(gates(command))


@main.command("list", cls=ScriptCommand)
@shared
@option("--json", "as_json", is_flag=True, help="everything known of each version, as JSON")
def list_command(advisor: str, work: Path, as_json: bool) -> None:
    """Show all versions with their data, figures and verdict; * marks the one in use."""
    models = work / "models"
    rows = describe_versions(models, advisor, work / "evaluation")
    if not rows:
        raise UserError(f"{models}: no finished adapter of {advisor}; train one (make train ADVISOR={advisor})")
    if as_json:
        click.echo(json.dumps({"advisor": advisor, "versions": rows}, ensure_ascii=False, indent=2))
    else:
        show_versions(models, advisor, rows)


@main.command("promote", cls=ScriptCommand)
@shared
@option("--version", help="v1, v2, ...  [default: the newest]")
@option("--report", type=PATH, help="its comparison_report.json  [default: the newest of this version]")
@rule_options
def promote_command(advisor: str, work: Path, version: str | None, report: Path | None, **rule) -> None:
    """Put a version in use, if its report says that every gate passes or is likely to."""
    models = work / "models"
    have = find_versions(models, advisor)
    if version and not re.fullmatch(r"v?[1-9]\d{0,8}", version):
        raise UserError(f"--version {version}: v1, v2, ... was expected")
    number = int(version.lstrip("v")) if version else max(have, default=1)
    if report is None and number in have:
        found = newest_report(models, advisor, number, have[number], work / "evaluation")
        if found is None:
            raise UserError(f"{have[number]}: no report of v{number} as it is now; evaluate it first (make eval)")
        report = found[0]
    with locked(models, advisor):
        record, changed = promote(models, advisor, number, report, Rule(**rule))
    if not changed:
        click.echo(f"{advisor}: {record['version']} is in use already")
        return
    click.echo(f"{advisor}: {record['version']} is in use now ({record['verdict']}; {record['rule']})")
    click.echo(f"The service reads it with --lora_path {record_path(models, advisor).resolve()}")


@main.command("rollback", cls=ScriptCommand)
@shared
def rollback_command(advisor: str, work: Path) -> None:
    """Put the version before the present one in use again."""
    with locked(work / "models", advisor):
        old, new = rollback(work / "models", advisor)
    click.echo(f"{advisor}: back from {old['version']} to {new['version'] or 'the base alone'}")


@main.command("iterate", cls=ScriptCommand)
@shared
@option("--mondrian", type=PATH, default=".", help="folder of mondrian.db, source/ and analysis_md/")
@option("--db_path", type=PATH, help="database, or a folder of them  [default: MONDRIAN]")
@option("--base_model", default=DEFAULT_BASE, help="hub id or folder")
@option("--link_args", default="", show_default=False, help="more options for link_training_data.py")
@option("--prepare_args", default="", show_default=False, help="more options for prepare_training_data.py")
@option("--train_args", default="", show_default=False, help="more options for train_mlx_lora.py")
@option("--eval_args", default="", show_default=False, help="more options for evaluate_lora.py")
@option("--hosts", type=PATH, help="hostfile of mlx.launch: train on several machines")
@option("--strict", is_flag=True, help='promote on "pass" alone, not on "likely"')
def iterate_command(advisor: str, work: Path, strict: bool, **options) -> None:
    """Train the next version on today's data, compare it with the one in use, promote it if every gate allows it.

    Exit code 0: promoted; 3: not promoted, since a gate is unlikely to hold or not measured; 4: since one fails.
    """
    text, code = run_round(RoundOptions(advisor=advisor, work=work, rule=Rule(strict=strict), **options))
    click.echo("\n" + paragraph(text))
    click.get_current_context().exit(code)


if __name__ == "__main__":
    main()

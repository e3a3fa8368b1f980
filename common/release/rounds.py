"""One round of training: link, prepare, train the next version, evaluate it against the one in use, promote it."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from common.cli import IN_ROUND
from common.errors import UserError, refuse
from common.evaluation.comparison import read_report
from common.evaluation.gates import failed
from common.files import read_json, read_rows, sha256_file, write_json
from common.release.promotion import Rule, ensure_record, keep_report, locked, promote
from common.tables import counted
from common.training.run_folder import TRAINED
from integration.lora_patch.versions import (
    deployed_folder,
    find_versions,
    parse_folder,
    read_record,
    record_path,
    training_args,
    version_folder,
)

ROOT = Path(__file__).resolve().parents[2]
UNDER_WAY = "round.json"  # beside the record, while a round lasts: the version that it makes
NOT_PROMOTABLE = (3, 4)  # exit codes of evaluate_lora.py: it is finished, and the version is not promoted


@dataclass(frozen=True)
class RoundOptions:
    """What a round is given. ``*_args``: more options of each script, as typed; ``hosts``: mlx.launch's hostfile."""

    advisor: str
    work: Path
    base_model: str
    mondrian: Path = Path()
    db_path: Path | None = None  # the databases  [default: those in mondrian]
    link_args: str = ""
    prepare_args: str = ""
    train_args: str = ""
    eval_args: str = ""
    hosts: Path | None = None
    rule: Rule = Rule()

    @property
    def models(self) -> Path:
        return self.work / "models"

    def data(self, name: str) -> Path:
        """Return a file of the advisor's own: manifest, train or val; two advisors may share ``work``."""
        return self.work / "training_data" / f"training_data_{self.advisor}_{name}.jsonl"


def run_round(options: RoundOptions) -> tuple[str, int]:
    """Run the phases; return a paragraph about the result, and the exit code (0: promoted).

    Nothing existing is changed. An interrupted round continues with its version, whether that is half trained or not
    yet judged. UserError when a phase fails.
    """
    with locked(options.models, options.advisor):
        ensure_record(options.models, options.advisor)
        have = find_versions(options.models, options.advisor)
        incumbent = deployed_folder(record_path(options.models, options.advisor))
        under_way = record_path(options.models, options.advisor).with_name(UNDER_WAY)
        number = _interrupted(under_way, incumbent) or max(have, default=0) + 1
        write_json(under_way, {"version": number})
        have = {known: folder for known, folder in have.items() if known != number}
        against = f"v{parse_folder(incumbent)[1]}, which is in use" if incumbent else "the base alone"
        click.echo(f"Round for {options.advisor}: v{number}, to be compared with {against}")
        _make_data(options)
        refuse_held_out(options.data("train"), have)
        _tell_unchanged(options.data("train"), have)
        folder = version_folder(options.models, options.advisor, number)
        _train(options, folder)
        outcome = _decide(options, number, _evaluate(options, folder, incumbent))
        under_way.unlink()
        return outcome


def _interrupted(under_way: Path, incumbent: Path | None) -> int | None:
    """Return the version of a round that was interrupted before it was decided; None where there is none."""
    found = read_json(under_way) if under_way.is_file() else None
    number = found.get("version") if isinstance(found, dict) else None
    decided = incumbent is not None and parse_folder(incumbent)[1] == number
    return number if type(number) is int and number > 0 and not decided else None


def _make_data(options: RoundOptions) -> None:
    data = options.data("manifest").parent
    tree = ["--source_dir", str(options.mondrian / "source"), "--analysis_dir", str(options.mondrian / "analysis_md")]
    into = ["--advisor", options.advisor, "--output_dir", str(data)]
    named = ["--db_path", str(options.db_path or options.mondrian), "--output_file", options.data("manifest").name]
    _run("1/4 link", "link_training_data.py", [*named, *tree, *into], options.link_args)
    given = ["--manifest", str(options.data("manifest")), *into, "--base_model", options.base_model]
    _run("2/4 prepare", "prepare_training_data.py", given, options.prepare_args)


def _train(options: RoundOptions, folder: Path) -> None:
    files = ["--train_data", str(options.data("train")), "--val_data", str(options.data("val"))]
    given = ["--base_model", options.base_model, *files, "--output_dir", str(folder), "--resume"]
    _run("3/4 train", "train_mlx_lora.py", given, options.train_args, hosts=options.hosts)
    # mlx.launch exits 0 after a process of its was killed, so the exit code alone proves nothing
    if not (folder / TRAINED).is_file():
        raise UserError(f"{folder}: training did not finish; see above, then run the round again")


def _evaluate(options: RoundOptions, folder: Path, incumbent: Path | None) -> Path:
    report = options.work / "evaluation" / f"{options.advisor}-v{parse_folder(folder)[1]}" / "comparison_report.json"
    given = ["--base_model", options.base_model, "--lora_path", str(folder), "--val_data", str(options.data("val"))]
    given += ["--deployed", str(incumbent or "none"), "--output_report", str(report)]
    given += ["--strict"] if options.rule.strict else []
    for stale in (report, report.with_suffix(".html")):
        stale.unlink(missing_ok=True)  # of an interrupted round: it must not be taken for this one's
    _run("4/4 evaluate", "evaluate_lora.py", given, options.eval_args, accept=NOT_PROMOTABLE)
    if not report.is_file():
        raise UserError(f"{report}: evaluation wrote no report; see above, then run the round again")
    return report


def _decide(options: RoundOptions, number: int, report: Path) -> tuple[str, int]:
    """Promote the version if the rule allows it; return the paragraph and the exit code."""
    models, advisor, name = options.models, options.advisor, f"v{number}"
    found = options.rule.judge(read_report(report))
    verdict, place = found["verdict"], record_path(models, advisor)
    trained = (training_args(version_folder(models, advisor, number)).get("train_data") or {}).get("examples", 0)
    photographs = counted(found["summary"]["photographs"], "held-out photograph")
    opening = f"{name} of {advisor} was trained on {counted(trained, 'example')} and judged on {photographs}"
    if not verdict["promotable"]:
        kept, _ = keep_report(models, advisor, number, report)
        blocking = failed(found["gates"], options.rule.strict)
        settles = "; ".join(dict.fromkeys(row["decides"] for row in blocking if row["decides"]))
        record = read_record(place)
        stays = record["version"] if record and record["adapter"] else "the base alone"
        text = f"{opening}; it is not promoted, {stays} stays in use. {'. '.join(verdict['failed'])}."
        text += f" What would settle or mend it: {settles}." if settles else ""
        return f"{text} Report: {kept.with_suffix('.html')}", verdict["exit_code"]
    record, _ = promote(models, advisor, number, report, options.rule)
    doubt = "".join(f" {sentence}." for sentence in verdict["decides"])
    before = record["history"][0]["version"] if record["history"] else None
    text = (
        f"{opening}; it is in use now in place of {before or 'the base alone'} ({verdict['word']}). "
        f"{verdict['headline']}{doubt} A running service takes it over with: curl -X POST "
        f"localhost:5100/lora/reload. One that does not read the record yet is started with --lora_path "
        f"{place.resolve()}. Back again: make rollback ADVISOR={advisor}. "
        f"Report: {(place.parent / record['report']).with_suffix('.html')}"
    )
    return text, 0


def refuse_held_out(train: Path, have: dict[int, Path]) -> None:
    """UserError when a photograph that an earlier version was evaluated on has come into the training data."""
    held_out: dict[str, int] = {}
    for number, folder in have.items():
        for photo in (training_args(folder).get("val_data") or {}).get("photos") or ():
            held_out.setdefault(photo, number)
    problems = []
    for line, row in read_rows(train):
        hashes = row.get("image_sha256") or []
        for sha in [hashes] if isinstance(hashes, str) else hashes:
            if sha in held_out:
                problems.append(
                    f"{train}:{line}: held out from v{held_out[sha]}; train on it and versions cannot be compared"
                )
    refuse(problems)


def _tell_unchanged(train: Path, have: dict[int, Path]) -> None:
    """Say when the newest version was trained on the very same data: the round can then change little."""
    newest = max(have, default=None)
    trained = training_args(have[newest]).get("train_data") if newest else None
    if trained and trained.get("sha256") == sha256_file(train):
        click.echo(f"note: the training data are those of v{newest}; only other settings can make a difference")


def _run(
    title: str, script: str, arguments: list[str], more: str, accept: tuple = (), hosts: Path | None = None
) -> None:
    """Run a script as a process of its own; UserError for an exit code but 0 and those in ``accept``."""
    click.echo(f"\n== {title}")
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "--hostfile", str(hosts), "--"] if hosts else []
    command = [*launcher, sys.executable, str(ROOT / script), *arguments, *shlex.split(more)]
    code = subprocess.run(command, check=False, env=os.environ | {IN_ROUND: "1"}).returncode
    if code and code not in accept:
        raise UserError(f"{script} failed (exit code {code}); see above, then run the round again")

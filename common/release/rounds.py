"""One round of training: link, prepare, train the next version, evaluate it against the one in use, promote it."""

import shlex
import subprocess
import sys
from pathlib import Path

import click

from common.errors import UserError, refuse
from common.evaluation.gates import failed
from common.files import read_json, read_rows, sha256_file
from common.records import ARGS
from common.release import versions

ROOT = Path(__file__).resolve().parents[2]


def run_round(
    advisor: str,
    work: Path,
    mondrian: Path,
    db_path: Path | None,
    base_model: str,
    link_args: str,
    prepare_args: str,
    train_args: str,
    eval_args: str,
    hosts: Path | None = None,
) -> None:
    """Run the phases; exit 1 (with the reasons) when the new version is not promoted. Nothing existing is changed.

    A round that was broken off goes on: a version that is not finished is trained on, not skipped.
    """
    models, data = work / "models", work / "training_data"
    have = versions.find_versions(models, advisor)
    number = max(have, default=0) + 1
    folder, report = versions.version_folder(models, advisor, number), work / "evaluation" / f"{advisor}-v{number}"
    versions.settle_record(models, advisor)
    incumbent = versions.deployed_folder(versions.record_path(models, advisor))
    click.echo(
        f"Round for {advisor}: v{number}, to be compared with {incumbent.name if incumbent else 'the base alone'}"
    )

    tree = ["--source_dir", str(mondrian / "source"), "--analysis_dir", str(mondrian / "analysis_md")]
    database = ["--db_path", str(db_path or mondrian)]
    into = ["--advisor", advisor, "--output_dir", str(data)]
    _run("1/4 link", "link_training_data.py", [*database, *tree, *into], link_args)
    manifest = ["--manifest", str(data / "training_data_manifest.jsonl")]
    _run("2/4 prepare", "prepare_training_data.py", [*manifest, *into, "--base_model", base_model], prepare_args)
    train, val = (data / f"training_data_{advisor}_{side}.jsonl" for side in ("train", "val"))
    refuse_held_out(train, have)
    _tell_unchanged(train, have)
    files = ["--train_data", str(train), "--val_data", str(val), "--output_dir", str(folder)]
    _run("3/4 train", "train_mlx_lora.py", ["--base_model", base_model, *files, "--resume"], train_args, hosts=hosts)
    compared = ["--base_model", base_model, "--lora_path", str(folder), "--val_data", str(val)]
    compared += ["--deployed", str(incumbent or "none"), "--output_report", str(report / "comparison_report.json")]
    for stale in (report / "comparison_report.json", report / "comparison_report.html"):
        stale.unlink(missing_ok=True)  # of a round that was broken off: must not stand for this one
    _run("4/4 evaluate", "evaluate_lora.py", compared, eval_args, may_fail=True)
    _decide(models, advisor, number, report / "comparison_report.json", incumbent)


def refuse_held_out(train: Path, have: dict[int, Path]) -> None:
    """UserError when a photograph that an earlier version was evaluated on has come into the training data."""
    held_out: dict[str, int] = {}
    for number, folder in have.items():
        for photo in (read_json(folder / ARGS).get("val_data") or {}).get("photos") or ():
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
    trained = read_json(have[newest] / ARGS).get("train_data") if newest else None
    if trained and trained.get("sha256") == sha256_file(train):
        click.echo(f"note: the training data are those of v{newest}; only other settings can make a difference")


def _run(
    title: str, script: str, arguments: list[str], more: str, may_fail: bool = False, hosts: Path | None = None
) -> None:
    click.echo(f"\n== {title}")
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "--hostfile", str(hosts), "--"] if hosts else []
    command = [*launcher, sys.executable, str(ROOT / script), *arguments, *shlex.split(more)]
    code = subprocess.run(command, check=False).returncode
    if code and not may_fail:
        raise UserError(f"{script} failed (exit code {code}); see above, then run the round again")


def _decide(models: Path, advisor: str, number: int, report: Path, incumbent: Path | None) -> None:
    if not report.is_file():
        raise UserError(f"{report}: evaluation wrote no report; see above, then run the round again")
    reasons = failed(read_json(report)["gates"])
    if reasons:
        kept = versions.keep_report(models, advisor, number, report)
        stays = f"v{versions.parse_folder(incumbent)[1]} stays" if incumbent else "the base alone stays"
        lines = [f"v{number} of {advisor} is not promoted, {stays} in use (report: {kept.with_suffix('.html')})"]
        refuse(lines + [f"{row['title']}: {row['verdict']} ({row['reason']})" for row in reasons])
    record = versions.promote(models, advisor, number, report, None)
    click.echo(f"{advisor}: {record['version']} is in use now ({versions.record_path(models, advisor)})")

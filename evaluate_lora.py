"""Compare an adapter with its base, and with the adapter in use, on held-out photographs; say whether it may ship.

    python evaluate_lora.py --lora_path ./models/qwen3-vl-4b-lora-ansel
    python evaluate_lora.py --lora_path ... --max_examples 4                     # a quick look
    python evaluate_lora.py --photo me.jpg                                       # base and adapter side by side

Reads the adapter folder, and the base model and validation data that its training_args.json names. Writes
evaluation/comparison_report.json (everything, recomputable) and .html (to read), logs raw outputs under
evaluation/generations/ so that a broken run goes on, and fills the model card's evaluation section. Exits 0 only
when every gate passes; prints a line for each that does not.
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
from tqdm import tqdm

from common.cli import PhaseCommand, option_group, print_settings
from common.errors import UserError
from common.evaluation import report
from common.evaluation import setup as held_out
from common.evaluation.comparison import decided, judged
from common.evaluation.gates import failed, load_gates
from common.evaluation.generations import OutputLog, RecordedSource, Source
from common.evaluation.tryout import make_task, try_photos

AUTO = "auto"


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Model")
@click.option(
    "--lora_path",
    type=click.Path(path_type=Path),
    help="adapter folder, the candidate; with --photo also the folder of all adapters  [default: models]",
)
@click.option("--base_model", help="hub id or folder  [default: the one the adapter was trained on]")
@click.option(
    "--deployed",
    default=AUTO,
    show_default=True,
    help="adapter in use: its folder, its deployed.json, none, or auto (models/ADVISOR/deployed.json)",
)
@option_group("Data")
@click.option(
    "--photo",
    multiple=True,
    type=click.Path(path_type=Path),
    help="only show what base and adapter say of this photograph; may be repeated",
)
@click.option("--advisor", help="with --photo: whose adapter, where models holds several")
@click.option("--versions", help="with --photo: v1,v2 in place of base and the adapter in use, else the newest")
@click.option("--val_data", help="held-out examples  [default: the validation data of the training]")
@click.option("--max_examples", type=click.IntRange(1), help="only the first so many")
@click.option(
    "--max_image_size", type=click.IntRange(32), help="long side of a photograph in pixels  [default: as in training]"
)
@option_group("Generation")
@click.option(
    "--num_samples", default=1, show_default=True, type=click.IntRange(1), help="outputs a photograph and adapter"
)
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: greedy")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="of sampled outputs")
@click.option(
    "--max_tokens",
    default=AUTO,
    show_default=True,
    help="token limit of an output, or auto: twice the longest reference, at most 2048",
)
@click.option("--batch_size", default=8, show_default=True, type=click.IntRange(1), help="outputs generated together")
@click.option(
    "--constrained",
    is_flag=True,
    help="also decode under the JSON grammar, and report compliance and cost beside the free run",
)
@click.option(
    "--timing_examples",
    default=8,
    show_default=True,
    type=click.IntRange(0),
    help="photographs timed one at a time, as the service serves them",
)
@click.option("--fresh", is_flag=True, help="generate anew what an earlier run with the same settings has logged")
@click.option(
    "--from_outputs",
    type=click.Path(path_type=Path),
    help="judge the raw outputs in this JSONL instead of running the model",
)
@option_group("Output")
@click.option(
    "--gates",
    type=click.Path(path_type=Path),
    help="TOML or JSON file that changes the gates (see common/evaluation/gates.py)",
)
@click.option(
    "--output_report",
    default="evaluation/comparison_report.json",
    show_default=True,
    help="the report; .html is written beside it",
)
@click.option("--sample_outputs", is_flag=True, help="also keep every raw output in a JSONL beside the report")
@click.pass_context
def main(ctx: click.Context, **options) -> None:
    tried = [options.pop(name) for name in ("photo", "advisor", "versions")]
    if tried[0]:
        return try_out(*tried, options)
    if options["lora_path"] is None:
        raise click.UsageError("Missing option '--lora_path'.")
    started = time.time()
    settings = SimpleNamespace(**options)
    gates = load_gates(settings.gates)
    held_out.resolve(settings)
    for name in settings.found:  # from training_args.json, so no default
        ctx.set_parameter_source(name, click.core.ParameterSource.DEFAULT_MAP)
    print_settings(f"Evaluating {settings.lora_path}", held_out.shown(settings), ctx)
    items = held_out.load_items(settings)
    source = (
        RecordedSource(settings.from_outputs, items) if settings.from_outputs else held_out.load_models(settings, items)
    )
    try:
        rows = collect(source, items, settings)
    except KeyboardInterrupt:
        raise UserError("interrupted; what was generated is kept, the same command goes on from there") from None
    comparison = decided(judged(report.assemble(settings, source, items, rows, time.time() - started)), gates)
    report.write(comparison, settings, rows)
    sys.exit(tell(comparison, settings))


def try_out(photos: tuple[Path, ...], advisor: str | None, versions: str | None, options: dict) -> None:
    """Show what base and adapter say of a person's own photographs; nothing is judged."""
    task = make_task(
        options["lora_path"], advisor, versions, options["base_model"], options["val_data"], options["max_tokens"]
    )
    try_photos(list(photos), task, Path(options["output_report"]).with_name("try.html"))


def collect(source: Source, items: list, settings: SimpleNamespace) -> list[dict]:
    """Return all rows of `common.evaluation.generations`: from the log what it has, from the source the rest."""
    logs = {}
    if not settings.from_outputs:
        folder = settings.report.parent / "generations"
        logs = {arm: OutputLog(folder, arm, source.settings(arm), settings.fresh) for arm in source.arms}
    rows = [{"kind": "arm", "arm": arm, "load_seconds": seconds} for arm, seconds in source.load_seconds.items()]
    group = 4 * settings.batch_size  # the features of so many photographs are in memory at once
    total = len(items) * len(source.arms) * settings.num_samples
    with tqdm(total=total, unit="output", desc="generating") as bar:
        for first in range(0, len(items), group):
            for arm in source.arms:
                rows += _collect_arm(
                    source, arm, items[first : first + group], settings.num_samples, logs.get(arm), bar
                )
            getattr(source, "release", lambda: None)()
    timed = items[: settings.timing_examples]
    with tqdm(source.timings(timed), total=len(timed) * len(source.arms), unit="run", desc="timing") as bar:
        return rows + list(bar)


def _collect_arm(source: Source, arm: str, items: list, samples: int, log: OutputLog | None, bar: tqdm) -> list[dict]:
    by_index = {item.index: item for item in items}
    bar.set_postfix_str(arm)
    if log is None:
        found = [*source.losses(arm, items), *source.outputs(arm, items, samples)]
        bar.update(sum(row["kind"] == "output" for row in found))
        return found
    lacking = [item for item in items if not log.has("loss", item)]
    for row in source.losses(arm, lacking):
        log.add(row, by_index[row["example"]])
    lacking = [item for item in items if not all(log.has("output", item, sample) for sample in range(samples))]
    bar.update((len(items) - len(lacking)) * samples)
    for row in source.outputs(arm, lacking, samples):
        log.add(row, by_index[row["example"]])
        bar.update()
    found = [log.get("loss", item) for item in items]
    found += [log.get("output", item, sample) for item in items for sample in range(samples)]
    return [row for row in found if row]


def tell(comparison: dict, settings: SimpleNamespace) -> int:
    """Print the verdict; return the exit code."""
    for sentence in [row["sentence"] for row in comparison["verdict"]["comparisons"]] + comparison["warnings"]:
        click.echo(sentence)
    for row in comparison["gates"]:
        click.echo(f"  {row['verdict']:<14} {row['title']} ({row['reason']})")
    click.echo(f"Report: {settings.report} and {settings.report.with_suffix('.html')}")
    reasons = failed(comparison["gates"])
    for row in reasons:
        click.echo(f"Gate failed: {row['title']}: {row['verdict']}; {row['reason']}", err=True)
    click.echo("All gates pass." if not reasons else f"{len(reasons)} of {len(comparison['gates'])} gates failed.")
    return 1 if reasons else 0


if __name__ == "__main__":
    main()

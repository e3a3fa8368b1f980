"""Compare an adapter with its base, and with the adapter in use, on held-out photographs; say whether to promote it.

    python evaluate_lora.py --lora_path ./models/qwen3-vl-4b-lora-ansel
    python evaluate_lora.py --lora_path ... --max_examples 4                     # a quick look
    python evaluate_lora.py --photo me.jpg                                       # base and adapter side by side

Reads the adapter folder, and the base model and validation data that its training_args.json names. Writes
evaluation/comparison_report.json (everything, recomputable) and .html (to read), logs raw outputs under
evaluation/generations/ so that an interrupted run resumes, and fills the model card's evaluation section.
Exit code: 0 promotable, 3 not shown to be good enough (unlikely, or not measured), 4 shown not to be (fail).
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import itertools
import sys
import time
from pathlib import Path

import click
from tqdm import tqdm

from common.cli import PATH, PhaseCommand, command_line, next_step, option, option_group, print_settings, write_config
from common.evaluation import report
from common.evaluation.comparison import recomputed
from common.evaluation.gates import Gate, load_gates, undecided_speed
from common.evaluation.generations import Item, OutputLog, OutputSource, RecordedSource
from common.evaluation.setup import Evaluation, EvaluationOptions, load_items, load_models, resolve
from common.evaluation.tryout import make_task, try_photos
from common.tables import paragraph
from common.training.model_card import complete_card
from integration.lora_patch.versions import parse_folder

AUTO = "auto"


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Model")
@option(
    "--lora_path",
    type=PATH,
    help="adapter folder, the candidate; with --photo also the folder of all adapters  [default: models]",
)
@option("--base_model", help="hub id or folder  [default: the one the adapter was trained on]")
@option(
    "--deployed",
    default=AUTO,
    help="adapter in use: its folder, its deployed.json, none, or auto (models/ADVISOR/deployed.json)",
)
@option_group("Data")
@option(
    "--photo", multiple=True, type=PATH, help="only show what base and adapter say of this photograph; may be repeated"
)
@option("--advisor", help="with --photo: whose adapter, where models holds several")
@option("--versions", help="with --photo: v1,v2 in place of base and the adapter in use, else the newest")
@option("--val_data", help="held-out examples  [default: the validation data of the training]")
@option("--max_examples", type=click.IntRange(1), help="only the first so many")
@option(
    "--max_image_size", type=click.IntRange(32), help="long side of a photograph in pixels  [default: as in training]"
)
@option_group("Generation")
@option("--num_samples", default=1, type=click.IntRange(1), help="outputs a photograph and adapter")
@option("--temperature", default=0.0, type=click.FloatRange(0), help="0: greedy")
@option("--seed", default=0, type=click.IntRange(0), help="of sampled outputs")
@option(
    "--max_tokens", default=AUTO, help="token limit of an output, or auto: twice the longest reference, at most 2048"
)
@option("--batch_size", default=8, type=click.IntRange(1), help="outputs generated together")
@option(
    "--constrained",
    is_flag=True,
    help="also decode under the JSON grammar, and report compliance and cost beside the free run",
)
@option(
    "--timing_examples",
    default=8,
    type=click.IntRange(0),
    help="photographs timed one at a time, as the service serves them",
)
@option(
    "--timing_seconds",
    default=120.0,
    type=click.FloatRange(0),
    help="time for more timed runs, while they may decide a gate",
)
@option("--fresh", is_flag=True, help="generate again what an earlier run with the same settings has logged")
@option("--from_outputs", type=PATH, help="judge the raw outputs in this JSONL instead of running the model")
@option_group("Output")
@option("--gates", type=PATH, help="TOML or JSON file that changes the gates (see common/evaluation/gates.py)")
@option("--strict", is_flag=True, help="promotable only if every gate passes; likely is not enough")
@option("--output_report", default="evaluation/comparison_report.json", help="the report; .html is written beside it")
@option("--sample_outputs", is_flag=True, help="also keep every raw output in a JSONL beside the report")
@click.pass_context
def main(ctx: click.Context, **options) -> None:
    tried = [options.pop(name) for name in ("photo", "advisor", "versions")]
    if tried[0]:
        return try_out(*tried, options)
    if options["lora_path"] is None:
        raise click.UsageError("Missing option '--lora_path'.")
    started = time.time()
    gates, evaluation = load_gates(options["gates"]), resolve(EvaluationOptions(**options))
    print_settings(f"Evaluating {evaluation.options.lora_path}", evaluation.settings(), ctx)
    items = load_items(evaluation)
    recorded = evaluation.options.from_outputs
    source = RecordedSource(recorded, items) if recorded else load_models(evaluation, items)
    evaluation.warnings.extend(source.lacking(items) if recorded else ())
    rows = collect(source, items, evaluation) + time_arms(source, items, evaluation, gates)
    assembled = report.assemble(evaluation, source, items, rows, time.time() - started)
    comparison = recomputed(assembled, gates, evaluation.options.strict)
    report.write(comparison, evaluation, rows)
    write_config(evaluation.report.with_name(f"{evaluation.report.stem}_config.yaml"), leave_out=("fresh",))
    if not recorded:
        complete_card(evaluation.options.lora_path, report.card_section(comparison))
    tell(comparison, evaluation)
    sys.exit(comparison["verdict"]["exit_code"])


def try_out(photos: tuple[Path, ...], advisor: str | None, versions: str | None, options: dict) -> None:
    """Show what base and adapter say of a person's own photographs; nothing is judged."""
    task = make_task(
        options["lora_path"], advisor, versions, options["base_model"], options["val_data"], options["max_tokens"]
    )
    try_photos(list(photos), task, Path(options["output_report"]).with_name("try.html"))


def collect(source: OutputSource, items: list[Item], evaluation: Evaluation) -> list[dict]:
    """Return all rows of `common.evaluation.generations` but the timed ones: from the log what it has, from the source
    the rest."""
    options, logs = evaluation.options, {}
    if not options.from_outputs:
        folder = evaluation.report.parent / "generations"
        logs = {arm: OutputLog(folder, arm, source.settings(arm), options.fresh) for arm in source.arms}
    rows = [{"kind": "arm", "arm": arm, "load_seconds": seconds} for arm, seconds in source.load_seconds.items()]
    group = 4 * options.batch_size  # the features of so many photographs are in memory at once
    total = len(items) * len(source.arms) * options.num_samples
    with tqdm(total=total, unit="output", desc="generating") as bar:
        for first in range(0, len(items), group):
            for arm in source.arms:
                bar.set_postfix_str(arm)
                some = items[first : first + group]
                if logs:
                    rows += collect_arm(source, some, options.num_samples, logs[arm], bar)
                else:
                    rows += [*source.losses(arm, some), *source.outputs(arm, some, options.num_samples)]
                    bar.update(len(some))
            source.release()
    return rows


def collect_arm(source: OutputSource, items: list[Item], samples: int, log: OutputLog, bar: tqdm) -> list[dict]:
    """Return the rows of one arm; what is not in its log is generated and logged."""
    by_index = {item.index: item for item in items}
    missing = [item for item in items if not log.has("loss", item)]
    for row in source.losses(log.arm, missing):
        log.add(row, by_index[row["example"]])
    missing = [item for item in items if not all(log.has("output", item, sample) for sample in range(samples))]
    bar.update((len(items) - len(missing)) * samples)
    for row in source.outputs(log.arm, missing, samples):
        log.add(row, by_index[row["example"]])
        bar.update()
    found = [log.get("loss", item) for item in items]
    found += [log.get("output", item, sample) for item in items for sample in range(samples)]
    return [row for row in found if row]


def time_arms(source: OutputSource, items: list[Item], evaluation: Evaluation, gates: list[Gate]) -> list[dict]:
    """Return the timed rows: of --timing_examples photographs, then of more (and of the first ones again) until every
    gate on speed is decided or --timing_seconds are spent."""
    options = evaluation.options
    if options.from_outputs:
        return list(source.timings(items))
    timed = items[: options.timing_examples]
    with tqdm(source.timings(timed), total=len(timed) * len(source.arms), unit="run", desc="timing") as bar:
        rows = list(bar)
    until = time.monotonic() + options.timing_seconds
    for item in itertools.cycle([*items[len(timed) :], *timed]):
        if not timed or time.monotonic() > until or not undecided_speed(gates, rows, source.arms):
            return rows
        rows += source.timings([item])


def tell(comparison: dict, evaluation: Evaluation) -> None:
    """Print the gates, what they come to, and what to do next."""
    verdict, page = comparison["verdict"], evaluation.report.with_suffix(".html")
    for row in comparison["gates"]:
        if row["verdict"] not in ("off", "not applicable"):
            click.echo(paragraph(f"{row['verdict']:<14}{row['title']}: {row['reason']}", "  ", " " * 14))
    sentences = [row["sentence"] for row in verdict["comparisons"]]
    for sentence in [*sentences, *verdict["scores"], *comparison["warnings"]]:
        click.echo(paragraph(sentence))
    click.echo()
    click.echo(paragraph(verdict["headline"]))
    if verdict["decides"]:
        click.echo("What would settle it:" if verdict["promotable"] else "What would help:")
    for sentence in verdict["decides"]:
        click.echo(paragraph(sentence, "  ", "  "))
    folder, report_path = evaluation.options.lora_path, str(evaluation.report)
    advisor, number = parse_folder(folder)
    if verdict["promotable"] and advisor and not evaluation.options.from_outputs:
        words = ["-m", "common.release.versions", "promote", "--advisor", advisor, "--work", folder.parent.parent]
        command = command_line("python", *words, "--version", f"v{number}", "--report", report_path)
        next_step(f"Ready to promote. Report: {page}", command, target="promote")
    elif verdict["promotable"]:
        needed = "a run of the model" if advisor else "a folder named qwen3-vl-4b-lora-ADVISOR"
        click.echo(f"Good enough; promotion needs {needed}. Report: {page}")
    else:
        click.echo(f"Do not promote. Report, with the photographs that lost most: {page}")


if __name__ == "__main__":
    main()

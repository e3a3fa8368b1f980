"""Turn linked jobs into training and validation data that is worth training on, without a leak between the two.

    python prepare_training_data.py --manifest training_data_manifest.json
    python prepare_training_data.py --manifest training_data_manifest.json --why 0361b22a

Reads the manifest of `link_training_data.py` and the prompts in the database that it names (read-only).
Writes to training_data/: training_data_ADVISOR_train.jsonl and ..._val.jsonl (image_path, prompt, response),
..._meta.json (counts, verdicts, SHA-256 of each file), ..._card.html (the data card, for a person), ..._verdicts.jsonl
(what became of each linked job) and ..._split.json (each photograph's side, which it keeps in later rounds).
"""

import common  # noqa: F401 - first: it says "run make setup" where packages are missing

# isort: split
import sys
import textwrap
from pathlib import Path

import click

from common.cli import PATH, PhaseCommand, command_line, next_step, option, option_group, print_settings, write_config
from common.data.candidates import choose_advisor, judge_all, open_manifest
from common.data.card import write_card
from common.data.near_duplicates import DISTANCE
from common.data.preparation import DataOptions, Task, check_scores, choose, earlier_sides, measure, split, warnings_of
from common.data.prepared import meta_of, output_paths, write_set
from common.data.prompt_specification import make_target, service_prompt
from common.data.quality import GATES, MASKING, read_levels
from common.data.summary import print_quality, print_result
from common.data.why import explain_prepared
from common.errors import UserError
from common.files import find_input
from integration.lora_patch.hub import DEFAULT_BASE
from integration.lora_patch.photo import MAX_IMAGE_SIZE


@click.command(cls=PhaseCommand, help=__doc__)
@option_group("Data")
@option("--manifest", default="training_data_manifest.jsonl", help="manifest of link_training_data.py")
@option("--advisor", help="advisor whose examples are prepared  [default: the manifest's only one]")
@option("--output_dir", type=PATH, default="training_data", help="folder for all that is written")
@option("--format", "row_format", type=click.Choice(["triplet", "messages"]), default="triplet", help="triplet: image_path, prompt, response; messages: chat rows for other trainers")  # fmt: skip  # noqa: E501
@option("--dry_run", is_flag=True, help="print what would be written, and write nothing")
@option("--why", metavar="JOB", help="print the job whose id begins with JOB: its raw text, what is read from it, each verdict; write nothing")  # fmt: skip  # noqa: E501
@option_group("Prompt")
@option("--system_prompt", type=PATH, help="file with a system prompt to use instead of the database's")
@option("--prompts_db", type=PATH, help="database to take the prompts from  [default: the newest in the manifest]")
@option("--dimensions", help='"7", "8", or names separated by commas  [default: those the prompt asks for]')
@option("--score_range", metavar="LOW-HIGH", help='lowest and highest score, such as "0-100"  [default: those the prompt asks for, else 1-10]')  # fmt: skip  # noqa: E501
@option_group("Quality")
@option("--gate", multiple=True, metavar="NAME=LEVEL", help=f"switch a gate to reject, warn or off ({', '.join(MASKING)}: mask too); may be repeated; gates: {', '.join(GATES)}")  # fmt: skip  # noqa: E501
@option("--no_mend", is_flag=True, help="reject analyses that could be read only after mending")
@option("--keep", type=click.Choice(["newest", "all"]), default="newest", help="of several analyses of one photograph: the newest that passes all gates, or all")  # fmt: skip  # noqa: E501
@option("--accept_copied_scores", is_flag=True, help="prepare comments alone where every score is copied from the prompt's example")  # fmt: skip  # noqa: E501
@option_group("Split")
@option("--train_split", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="share of the photographs to train on  [default: 0.8]")  # fmt: skip  # noqa: E501
@option("--val_split", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="share to validate on  [default: 0.2]")  # fmt: skip  # noqa: E501
@option("--seed", default=42, help="another seed, another split")
@option("--duplicate_distance", default=DISTANCE, type=click.IntRange(0, 16), help="how far near-duplicates may differ: their detail must agree by 1 - distance/50; 0: identical pictures only")  # fmt: skip  # noqa: E501
@option("--split_record", type=PATH, help="file that remembers each photograph's side  [default: training_data_ADVISOR_split.json in output_dir]")  # fmt: skip  # noqa: E501
@option("--resplit", is_flag=True, help="forget which side photographs had in earlier rounds")
@option_group("Lengths")
@option("--base_model", default=DEFAULT_BASE, help="folder or hub id whose tokenizer measures lengths, when it is on this machine")  # fmt: skip  # noqa: E501
@option("--max_seq_length", default=2048, type=click.IntRange(min=1), help="length that training allows")
@option(
    "--max_image_size",
    default=MAX_IMAGE_SIZE,
    type=click.IntRange(32),
    help="long side of photographs in training, pixels",
)
def main(manifest, advisor, output_dir, dry_run, **given):
    options = read_options(given)
    manifest = open_manifest(find_input(manifest))
    advisor, databases = choose_advisor(manifest, advisor)
    prompt = service_prompt(advisor, databases, given["system_prompt"], given["prompts_db"])
    task = Task(manifest, advisor, prompt, make_target(prompt.text, given["dimensions"], given["score_range"]))
    paths = output_paths(output_dir, advisor, given["split_record"])
    print_settings("Prepare", shown_settings(task, output_dir, options))

    record, warnings = earlier_sides(paths, options)
    judged = judge_all(manifest, advisor, task.target)
    choice = choose(judged, record, options)
    if given["why"]:
        explain_prepared(task, choice, given["why"])
        return
    print_quality(choice, task.target.specification.names)
    arrangement = split(choice, judged.thumbs, record, task.target.specification)
    lengths = measure(arrangement.examples(), task, options)
    warnings = [*prompt.warnings, *warnings, *warnings_of(arrangement, lengths)]
    print_result(arrangement, lengths, options.base_model, warnings)
    check_scores(arrangement.examples("train"), given["accept_copied_scores"])
    if dry_run:
        click.echo(f"\nDry run: nothing written; would write {', '.join(path.name for path in paths.values())}")
        return
    write_config(output_dir / f"training_data_{advisor}_config.yaml", leave_out=("dry_run", "resplit"))
    meta = meta_of(task, arrangement, options, lengths, warnings)
    write_card(paths["card"], task, arrangement, lengths, meta)
    write_set(paths, task, arrangement, options, meta)
    train = command_line("python", "train_mlx_lora.py", "--train_data", paths["train"])
    next_step(f"\n{meta['headline']['text']} -> {paths['train']}\nOpen {paths['card']}", train, "train")


def read_options(given: dict) -> DataOptions:
    """Return the options of preparation proper; UserError for a wrong gate or shares that do not add up to 1."""
    train, val = given["train_split"], given["val_split"]
    if train is not None and val is not None and abs(train + val - 1) > 1e-6:
        raise UserError(f"--train_split {train} and --val_split {val} add up to {train + val:g}; they must make 1")
    if val is None:
        val = 0.2 if train is None else round(1 - train, 9)
    rest = {name: given[name] for name in DataOptions.__dataclass_fields__ if name in given}
    return DataOptions(**rest | {"levels": read_levels(given["gate"], given["no_mend"]), "val_split": val})


def shown_settings(task: Task, output_dir: Path, options: DataOptions) -> dict[str, object]:
    names = f"{len(task.target.specification.names)}: {', '.join(task.target.specification.names)}"
    return {
        "manifest": task.manifest.path,
        "advisor": task.advisor,
        "output_dir": output_dir,
        "prompts": task.prompt.source,
        "dimensions": textwrap.shorten(names, 70, placeholder=" ..."),
        "score_range": "-".join(f"{end:g}" for end in task.target.specification.score_range),
        **{name: value for name, value in vars(options).items() if name not in ("levels", "resplit")},
    }


if __name__ == "__main__":
    sys.exit(main())

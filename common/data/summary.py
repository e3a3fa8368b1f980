"""What preparation prints: the quality of the analyses, what became of the jobs, the lengths, the warnings."""

import click

from common.data.database import shown
from common.data.findings import findings_of
from common.data.preparation import REASONS, Arrangement, Choice, Lengths
from common.data.quality import GATES
from common.tables import counted, paragraph, table


def print_quality(choice: Choice, dimensions: tuple[str, ...]) -> None:
    """Print what is left to learn from, signs of bad data, and what each gate found."""
    click.echo("\n" + paragraph(choice.left_to_learn["text"]))
    for finding in findings_of(choice.candidates, dimensions):
        click.echo(paragraph(f"- {finding}", "  ", "  "))
    rows = [
        [name, gate["level"], gate["found"], gate["rejected"], GATES[name].meaning]
        for name, gate in choice.gates.items()
        if gate["found"] or gate["level"] != GATES[name].default
    ]
    click.echo("\nGates\n" + table(["gate", "level", "found", "rejected", "what it finds"], rows))
    quiet = [name for name, gate in choice.gates.items() if not gate["found"]]
    if quiet:
        click.echo(paragraph("nothing found: " + ", ".join(quiet), "  ", "  "))


def print_result(arrangement: Arrangement, lengths: Lengths, base_model: str, warnings: list[str]) -> None:
    """Print which linked jobs are no examples, how many examples there are, their lengths, and the warnings."""
    rows = [[name, len(ids), f"{REASONS[name]}: {some(ids, 8)}"] for name, ids in arrangement.left_out().items()]
    if rows:
        click.echo("\nLinked, but no examples\n" + table(["reason", "jobs", "meaning and job ids"], rows))
    train, val = (len(arrangement.examples(side)) for side in ("train", "val"))
    photos = arrangement.photographs()
    click.echo()
    click.echo(
        paragraph(
            f"{counted(len(arrangement.candidates), 'linked job')} = {counted(train, 'training example')} "
            f"({counted(photos['train'], 'photograph')}) + {counted(val, 'validation example')} "
            f"({counted(photos['val'], 'photograph')}) + {len(arrangement.candidates) - train - val:,} left out"
        )
    )
    click.echo(paragraph(lengths_sentence(lengths, train + val, base_model)))
    for warning in warnings:
        click.echo(paragraph(f"Warning: {warning}", hang="  "), err=True)


def some(ids: list[str], count: int) -> str:
    """Return the first ``count`` job ids, shortened."""
    return ", ".join(shown(job[:8]) for job in ids[:count]) + (", ..." if len(ids) > count else "")


def lengths_sentence(lengths: Lengths, examples: int, base_model: str) -> str:
    """Say how long the examples are."""
    how = f"tokenizer of {base_model}" if lengths.exact else "estimated, the tokenizer is not at hand"
    return (
        f"Length in tokens ({how}): median {lengths.median:,}, longest {lengths.longest:,}; "
        f"{lengths.over:,} of {examples:,} over max_seq_length {lengths.max_seq_length:,}"
    )

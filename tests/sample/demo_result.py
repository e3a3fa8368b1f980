"""Print how the demo ended: the figures of base and tuned model, each gate, and where the report is.

    python tests/sample/demo_result.py demo/evaluation/comparison_report.json

Reads the report that evaluate_lora.py wrote. Exit code 0 if every gate passed but those that a model of a million
parameters is known to fail, which are explained; 1 otherwise.
"""

import json
from pathlib import Path

import click

EXPECTED_TO_FAIL = {
    "base_format": "expected: the tiny base has learnt to put its answers into a code fence; tuning ends that",
    "overhead": "expected: in so small a model the adapter's products take as long as the model's own",
}
FIGURES = (
    ("loss.nats", "validation loss, nats a token", "{:.2f}"),
    ("format.strict", "answers in the strict format", "{:.0%}"),
    ("scores.mae", "mean error of the scores, points", "{:.2f}"),
    ("overall.mae", "mean error of the overall score", "{:.2f}"),
    ("speed.seconds", "median seconds a photograph", "{:.2f}"),
)


@click.command()
@click.argument("report_path", type=click.Path(path_type=Path))
def main(report_path: Path) -> None:
    """Print how the demo ended."""
    if not report_path.is_file():
        raise click.ClickException(f"{report_path} was not written: the evaluation ended early, see above")
    report = json.loads(report_path.read_text(encoding="utf-8"))
    base, tuned = (report["summary"]["arms"][arm] for arm in ("base", "candidate"))
    click.echo(f"\nThe demo ran through.\n\n{'On held-out photographs':34}{'base':>9}{'tuned':>9}")
    for name, title, form in FIGURES:
        values = [arm.get(name, {}).get("value") for arm in (base, tuned)]
        shown = ["-" if value is None else form.format(value) for value in values]
        click.echo(f"{title:34}{shown[0]:>9}{shown[1]:>9}")
    failed = [gate for gate in report["gates"] if gate["verdict"] in ("fail", "not measured")]
    click.echo("\nGates")
    for gate in report["gates"]:
        click.echo(f"  {gate['verdict']:<15}{gate['title']}: {gate['reason']}")
        if gate in failed and gate["name"] in EXPECTED_TO_FAIL:
            click.echo(f"{'':17}{EXPECTED_TO_FAIL[gate['name']]}")
    if failed:
        click.echo("  A gate that fails keeps an adapter from service, so the report's verdict is: must not ship.")
    click.echo(f"\nReport:  {report_path.with_suffix('.html')}\nAdapter: {report['arms']['candidate']['adapter']}")
    surprises = [gate["title"] for gate in failed if gate["name"] not in EXPECTED_TO_FAIL]
    if surprises:
        raise click.ClickException("gates that should pass here failed: " + ", ".join(surprises))


if __name__ == "__main__":
    main()

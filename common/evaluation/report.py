"""Writing a comparison: comparison_report.json, the same as a page to read, the raw outputs."""

import datetime
from pathlib import Path

from common.evaluation.comparison import KIND, NAMES, SCHEMA_VERSION
from common.evaluation.gates import bound_text, format_value
from common.evaluation.generations import Item, OutputSource
from common.evaluation.metrics import GRAMMAR, kind
from common.evaluation.report_page import write_report_page
from common.evaluation.scoring import advisor_terms
from common.evaluation.setup import Evaluation, training_scores
from common.files import sha256_file, write_json, write_jsonl
from common.records import software_versions


def assemble(evaluation: Evaluation, source: OutputSource, items: list[Item], rows: list[dict], seconds: float) -> dict:
    """Return the report's content, except what is computed from it (see `common.evaluation.comparison.decided`)."""
    prompts: dict[str, dict] = {}
    names = {prompt: f"prompt-{n}" for n, prompt in enumerate(dict.fromkeys(i.example.prompt for i in items), 1)}
    for item in items:
        prompts.setdefault(names[item.example.prompt], _prompt(item))
    options = evaluation.options
    settings = evaluation.settings() | {"max_tokens": source.facts.get("max_tokens", options.max_tokens)}
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "advisor": evaluation.advisor,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "recorded_outputs": str(options.from_outputs) if options.from_outputs else None,
        "software": source.facts.get("software") or software_versions(),
        "device": source.facts.get("device"),
        "base": {"name": evaluation.base_model, "fingerprint": source.facts.get("base")},
        "arms": {arm: _arm(arm, evaluation, source) for arm in source.arms},
        "data": {"path": str(evaluation.val_data), "sha256": sha256_file(evaluation.val_data), "examples": len(items)},
        "training_scores": training_scores(evaluation),
        "warnings": evaluation.warnings,
        "prompts": prompts,
        "examples": [_example(item, names[item.example.prompt], source.arms, rows) for item in items],
        "timings": [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == "timing"],
    }


def write(report: dict, evaluation: Evaluation, rows: list[dict]) -> None:
    """Write the JSON and the page, and the raw outputs if asked for."""
    write_json(evaluation.report, report)
    write_report_page(evaluation.report.with_suffix(".html"), report)
    if evaluation.options.sample_outputs:
        write_jsonl(evaluation.report.with_name(f"{evaluation.report.stem}_outputs.jsonl"), rows)


def card_section(report: dict) -> str:
    """Return the model card's evaluation section, Markdown."""
    arms = [arm for arm in report["arms"] if not arm.endswith(GRAMMAR)]
    figures = ("format.strict", "loss.nats", "overall.mae", "scores.mae", "text.comments", "speed.seconds")
    verdict, summary = report["verdict"], report["summary"]
    word = "Ready to promote" if verdict["promotable"] else "Do not promote"
    lines = [
        f"Evaluated {report['created_at'][:10]} on {summary['photographs']} held-out photographs "
        f"(`{report['data']['sha256'][:16]}`): **{word}.** {verdict['headline']}",
        "",
        *[f"- {row['sentence']}" for row in verdict["comparisons"]],
        "",
        "| | " + " | ".join(NAMES[arm] for arm in arms) + " |",
        "| --- |" + " --- |" * len(arms),
    ]
    for name in figures:
        values = [format_value(name, summary["arms"][arm].get(name, {}).get("value")) for arm in arms]
        lines.append(f"| {kind(name).label} | " + " | ".join(values) + " |")
    lines += ["", "| gate | bound | verdict |", "| --- | --- | --- |"]
    lines += [f"| {row['title']} | {bound_text(row)} | {row['verdict']} ({row['reason']}) |" for row in report["gates"]]
    return "\n".join(lines)


def _prompt(item: Item) -> dict:
    """Return what a prompt asks for, as the report keeps it."""
    specification, prompt = item.specification, item.example.prompt
    return {
        "text": prompt,
        "specification": specification.to_dict(),
        "dimensions": list(specification.names),
        "terms": advisor_terms(prompt),
        "example_scores": list(specification.example_scores),
    }


def _example(item: Item, prompt: str, arms: list[str], rows: list[dict]) -> dict:
    own = [row for row in rows if row.get("example") == item.index]
    photographs = zip(item.example.image_paths, item.sha256, strict=True)
    return {
        "index": item.index,
        "job_id": item.example.job_id,
        "source": item.example.source,
        "photographs": [{"path": str(path), "sha256": sha} for path, sha in photographs],
        "prompt": prompt,
        "dimensions": list(item.specification.names),
        "response": item.example.response,
        "masked_spans": [list(span) for span in item.example.masked_spans],
        "outputs": {arm: _outputs(own, arm) for arm in arms},
        "loss": {r["arm"]: {"sum": r["sum"], "tokens": r["tokens"]} for r in own if r["kind"] == "loss"},
    }


def _outputs(rows: list[dict], arm: str) -> list[dict]:
    fields = ("sample", "text", "finish", "tokens", "expected_scores")
    found = [row for row in rows if row["kind"] == "output" and row["arm"] == arm]
    ordered = sorted(found, key=lambda row: row["sample"])
    return [{name: row[name] for name in fields if name in row} for row in ordered]


def _arm(arm: str, evaluation: Evaluation, source: OutputSource) -> dict:
    adapter = arm.removesuffix(GRAMMAR)
    folder = evaluation.adapters.get(adapter)
    return {
        "adapter": str(folder) if folder else None,
        "sha256": source.facts.get("adapters", {}).get(adapter),
        "load_seconds": source.load_seconds.get(arm),
    }

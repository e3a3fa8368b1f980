"""Writing a comparison: comparison_report.json, the same as a page to read, the raw outputs, the model card."""

import base64
import datetime
import io
from pathlib import Path
from types import SimpleNamespace

from common.evaluation import setup as held_out
from common.evaluation.comparison import KIND, NAMES, SCHEMA_VERSION, prompt_facts
from common.evaluation.gates import bound_text, format_value
from common.evaluation.generations import Item, Source
from common.evaluation.metrics import kind
from common.evaluation.report_page import render
from common.files import sha256_file, write_json, write_jsonl, write_text
from common.records import software_versions
from common.training.model_card import complete_card
from integration.lora_patch.photo import load_photo

THUMBNAIL = 640  # pixels of the long side of a picture in the page


def assemble(settings: SimpleNamespace, source: Source, items: list[Item], rows: list[dict], seconds: float) -> dict:
    """Return the report's content but for what is computed from it (see `common.evaluation.comparison.decided`)."""
    prompts, examples = {}, []
    for item in items:
        name = next((name for name, facts in prompts.items() if facts["text"] == item.example.prompt), None)
        if name is None:
            name = f"prompt-{len(prompts) + 1}"
            prompts[name] = prompt_facts(item)
        examples.append(
            {
                "index": item.index,
                "job_id": item.example.job_id,
                "source": item.example.source,
                "photographs": [
                    {"path": str(path), "sha256": sha}
                    for path, sha in zip(item.example.image_paths, item.sha256, strict=True)
                ],
                "prompt": name,
                "dimensions": item.dimensions,
                "response": item.example.response,
                "outputs": {arm: _outputs(rows, arm, item.index) for arm in source.arms},
                "loss": {
                    row["arm"]: {"sum": row["sum"], "tokens": row["tokens"]}
                    for row in rows
                    if row["kind"] == "loss" and row["example"] == item.index
                },
            }
        )
    timings = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == "timing"]
    facts = getattr(source, "facts", {})
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "advisor": settings.advisor,
        "settings": {name: _plain(value) for name, value in held_out.shown(settings).items()},
        "recorded_outputs": str(settings.from_outputs) if settings.from_outputs else None,
        "software": facts.get("software") or software_versions(),
        "device": facts.get("device"),
        "base": {"name": str(settings.base_model), "fingerprint": facts.get("base")},
        "arms": {arm: _arm(arm, settings, source) for arm in source.arms},
        "data": {"path": str(settings.val_data), "sha256": sha256_file(settings.val_data), "examples": len(items)},
        "warnings": settings.warnings,
        "prompts": prompts,
        "examples": examples,
        "timings": timings,
    }


def write(report: dict, settings: SimpleNamespace, rows: list[dict]) -> None:
    """Write the JSON and the page; the raw outputs if asked for; the result into the adapter's model card."""
    write_json(settings.report, report)
    pictures = {
        example["index"]: [picture(photo["path"]) for photo in example["photographs"]] for example in report["examples"]
    }
    write_text(settings.report.with_suffix(".html"), render(report, pictures))
    if settings.sample_outputs:
        write_jsonl(settings.report.with_name(f"{settings.report.stem}_outputs.jsonl"), rows)
    if not report["recorded_outputs"]:
        complete_card(settings.lora_path, card_section(report))


def picture(path: str) -> str:
    """Return a photograph as a data URI, small enough to carry a hundred of them in one page."""
    file = io.BytesIO()
    load_photo(path, THUMBNAIL).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def card_section(report: dict) -> str:
    """Return the model card's evaluation section, Markdown."""
    arms = [arm for arm in report["arms"] if not arm.endswith("+grammar")]
    figures = ("format.strict", "loss.nats", "overall.mae", "scores.mae", "text.comments", "speed.seconds")
    lines = [
        f"Evaluated {report['created_at'][:10]} on {report['summary']['photographs']} held-out photographs "
        f"(`{report['data']['sha256'][:16]}`): "
        + ("**all gates pass.**" if report["verdict"]["passed"] else "**not all gates pass.**"),
        "",
        *[f"- {row['sentence']}" for row in report["verdict"]["comparisons"]],
        "",
        "| | " + " | ".join(NAMES[arm] for arm in arms) + " |",
        "| --- |" + " --- |" * len(arms),
    ]
    for name in figures:
        values = [format_value(name, report["summary"]["arms"][arm].get(name, {}).get("value")) for arm in arms]
        lines.append(f"| {kind(name).label} | " + " | ".join(values) + " |")
    lines += ["", "| gate | bound | verdict |", "| --- | --- | --- |"]
    lines += [f"| {row['title']} | {bound_text(row)} | {row['verdict']} ({row['reason']}) |" for row in report["gates"]]
    return "\n".join(lines)


def _outputs(rows: list[dict], arm: str, index: int) -> list[dict]:
    found = [row for row in rows if row["kind"] == "output" and row["arm"] == arm and row["example"] == index]
    return [
        {name: row[name] for name in ("sample", "text", "finish", "tokens")}
        for row in sorted(found, key=lambda row: row["sample"])
    ]


def _arm(arm: str, settings: SimpleNamespace, source: Source) -> dict:
    folder = settings.adapters.get(arm.removesuffix("+grammar"))
    hashes = getattr(source, "facts", {}).get("adapters", {})
    return {
        "adapter": str(folder) if folder else None,
        "sha256": hashes.get(arm.removesuffix("+grammar")),
        "load_seconds": source.load_seconds.get(arm),
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value

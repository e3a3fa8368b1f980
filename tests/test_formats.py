"""docs/formats.md is rendered from the schemas and from the tables here, and real runs write exactly what it names.

python -m tests.test_formats        # write docs/formats.md again
"""

import json
from pathlib import Path

from common import schemas
from common.schemas import KINDS, Column, fault

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ROOT / "docs/formats.md"

# title, path in a working folder, table
DATA = "training_data/training_data"
ROWS = (
    (
        "The manifest: training_data_manifest.jsonl",
        "A line for each linked job (make: training_data_ADVISOR_manifest.jsonl).",
        f"{DATA}_manifest.jsonl",
        schemas.MANIFEST,
    ),
    (
        "Jobs left out: ..._rejected.jsonl",
        "A line for each other job.",
        f"{DATA}_manifest_rejected.jsonl",
        schemas.REJECTED,
    ),
    (
        "Training and validation rows: training_data_ADVISOR_train.jsonl, ..._val.jsonl",
        "A line for each example, in the default form (`--format triplet`).",
        f"{DATA}_ansel_train.jsonl",
        schemas.TRIPLET,
    ),
    ("Chat rows", "The same with `--format messages`; `common.dataset` reads both.", None, schemas.MESSAGES),
    (
        "Verdicts: training_data_ADVISOR_verdicts.jsonl",
        "What became of each linked job.",
        f"{DATA}_ansel_verdicts.jsonl",
        schemas.VERDICT,
    ),
    (
        "Raw outputs: evaluation/generations/*.jsonl, `--sample_outputs`, `--from_outputs`",
        'Rows of the kinds "output", "loss", "timing" and "arm"; here "output".',
        None,
        schemas.OUTPUTS["output"],
    ),
    ("Raw outputs, kind loss", "The loss of a reference response.", None, schemas.OUTPUTS["loss"]),
    ("Raw outputs, kind timing", "One request, photograph file to last token.", None, schemas.OUTPUTS["timing"]),
)

# title, what it is, path in a working folder, {field: meaning}
RECORDS = (
    (
        "The data's record: training_data_ADVISOR_meta.json",
        "Written by prepare. Readers compare the hashes, so that a mixed set of files is refused.",
        "training_data/training_data_ansel_meta.json",
        {
            "schema_version": "1",
            "advisor": "id of the advisor",
            "manifest": "path and SHA-256 of the manifest",
            "options": "the options of the run",
            "seed": "of the split",
            "prompt": "where the service's prompt comes from, and its SHA-256",
            "dimensions": "names, in the prompt's order",
            "specification": "what the prompt demands of an answer: dimensions, fields, form of the scores",
            "counts": "linked jobs, examples and photographs of each side, reasons of the jobs left out",
            "headline": 'the card\'s first line: "Ready: 80 + 20 photographs, no warnings"',
            "left_to_learn": "photographs whose comments, and whose scores, are trained on",
            "findings": "what a person should look at",
            "warnings": "what is wrong",
            "gates": "level and findings of each gate",
            "lengths": "tokens of the examples: median, longest, how many are over the limit",
            "sha256": "of each file of the set, by name",
        },
    ),
    (
        "The adapter's record: training_args.json",
        "Written by training when the adapter is whole. Evaluation and service read it.",
        "models/qwen3-vl-4b-lora-ansel/training_args.json",
        {
            "schema_version": "1",
            "advisor": "id of the advisor",
            "base_model": "as the user named it",
            "base_fingerprint": "what tells one base from another: shape, SHA-256 of weights, tokenizer, chat template "
            "and image settings, quantization",
            "target_modules": "the adapted projections",
            "settings": "every option of the run, and the advisor",
            "layout": "micro-batch, checkpointing, padding and longest example that the memory plan chose",
            "train_data": "path, SHA-256, number of examples, SHA-256 of each photograph",
            "val_data": "the same of the validation data; null without",
            "specification": "what the prompt demands of an answer; null where the data do not say",
            "versions": "Python, platform and packages",
            "result": "losses, best step, steps, examples, tokens, seconds, peak memory",
            "verdict": "what training says of the run, a sentence each",
            "phrasebook": "SHA-256 of phrasebook.safetensors, the tokens of the training responses; null without",
        },
    ),
    (
        "The comparison: comparison_report.json",
        "Written by evaluation. [evaluation.md](evaluation.md) defines its figures.",
        "evaluation/comparison_report.json",
        {
            "kind": '"mondrian-lora-comparison"',
            "schema_version": "2",
            "created_at": "UTC",
            "seconds": "that the evaluation took",
            "advisor": "id of the advisor",
            "settings": "every option of the run, resolved",
            "recorded_outputs": "the file of `--from_outputs`, else null",
            "software": "Python, platform and packages",
            "device": "name of the device",
            "base": "name and fingerprint",
            "arms": "base, candidate, deployed: adapter, SHA-256 of its files, load time",
            "data": "path, SHA-256 and number of held-out examples",
            "training_scores": "mean of the training scores by dimension: the constant to beat",
            "warnings": "a sentence each",
            "prompts": "text, specification, the advisor's terms, by name",
            "examples": "photographs, reference, and by arm the outputs and the loss",
            "timings": "one row a timed request",
            "summary": "arms: figure to {value, n, low, high, lower, upper}; differences; ratios",
            "gates": "definition, value, limits, verdict, reason and what would settle it",
            "verdict": "promotable, word, exit_code, headline, failed, decides, comparisons, scores",
        },
    ),
    (
        "The version in use: models/ADVISOR/deployed.json",
        "Written by `make promote` and `make rollback`, replaced as a whole. The service reads it.",
        "models/ansel/deployed.json",
        {
            "schema_version": "1",
            "advisor": "id of the advisor",
            "version": '"v2"; null when the base alone is in use',
            "adapter": "folder of the adapter, relative to this file",
            "sha256": "of the adapter's files, by name",
            "base_fingerprint": "of the base that it was trained on",
            "report": "copy of the report that decided, relative to this file",
            "report_sha256": "of that report",
            "rule": "by which rule it was promoted",
            "verdict": "the report's word and headline",
            "promoted_at": "UTC",
            "promoted_by": "the user's name on the machine",
            "history": "the records before it, newest first",
        },
    ),
)


def rendered() -> str:
    """Return docs/formats.md."""
    lines = [
        "# Files and their fields",
        "",
        "The JSONL files are the contract between the phases. `common/schemas.py` defines their fields, and every",
        "reader checks each row against it: a fault names file, line and field. Other fields are left alone.",
        "Text is UTF-8. Paths are relative to the working folder or absolute. Hashes are SHA-256 in hex.",
    ]
    for title, about, _, table in ROWS:
        lines += ["", f"## {title}", "", about, "", "| field | is | meaning | |", "| --- | --- | --- | --- |"]
        lines += [_row(name, column) for name, column in table.items()]
    lines += ["", "## The split: training_data_ADVISOR_split.json", "", "Each photograph's side, which it keeps."]
    lines += ["", "| field | is | meaning | |", "| --- | --- | --- | --- |"]
    lines += [_row(name, column) for name, column in schemas.SPLIT_RECORD.items()]
    lines += [_row(f"photographs.SHA256.{name}", column) for name, column in schemas.SPLIT_PHOTOGRAPH.items()]
    for title, about, _, fields in RECORDS:
        lines += ["", f"## {title}", "", about, "", "| field | meaning |", "| --- | --- |"]
        lines += [f"| `{name}` | {meaning} |" for name, meaning in fields.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, column: Column) -> str:
    notes = [note for note, true in (("optional", not column.needed), ("or null", column.null)) if true]
    return f"| `{name}` | {KINDS[column.kind][1]} | {column.meaning} | {', '.join(notes)} |"


def test_the_document_is_up_to_date():
    assert FORMATS.read_text(encoding="utf-8") == rendered(), "run: python -m tests.test_formats"


def test_real_rows_have_the_fields_that_are_named(worked):
    folder, _ = worked
    for title, _, path, table in ROWS:
        if path:
            rows = [json.loads(line) for line in (folder / path).read_text(encoding="utf-8").splitlines()]
            assert rows and [fault(row, table) for row in rows if fault(row, table)] == [], title
            assert set().union(*rows) == set(table), title


def test_real_records_have_the_fields_that_are_named(worked):
    folder, _ = worked
    for title, _, path, fields in RECORDS:
        assert set(json.loads((folder / path).read_text(encoding="utf-8"))) == set(fields), title


if __name__ == "__main__":
    FORMATS.write_text(rendered(), encoding="utf-8")

"""The model card (README.md) beside an adapter, in Hugging Face's form; evaluation fills in its last section."""

import json
import math
from pathlib import Path

from common.files import write_text

CARD = "README.md"
START, END = "<!-- evaluation:start -->", "<!-- evaluation:end -->"


def write_card(folder: Path, record: dict, verdict: list[str]) -> None:
    """Write README.md from the ``record`` that also becomes training_args.json, and the run's verdict."""
    settings, result, train, val = (record[key] for key in ("settings", "result", "train_data", "val_data"))
    base, fingerprint = record["base_model"], record["base_fingerprint"]
    advisor = record["advisor"]
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "mlx", "qwen3_vl", "photography"],
    }
    head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    modules = ", ".join(record["target_modules"])
    files = "; ".join(f"{name} {version}" for name, version in record["versions"].items())
    losses = [
        ("training, first steps", result["train_loss_first"]),
        ("training, last steps", result["train_loss_last"]),
        ("validation, base model", result["val_loss_first"]),
        ("validation, this adapter", result["val_loss_best"]),
        ("validation, last step", result["val_loss_last"]),
    ]
    write_text(
        folder / CARD,
        f"""---
{head}
---

# {advisor} on {Path(base).name}

A LoRA adapter that makes {Path(base).name} analyse photographs in the voice of the advisor "{advisor}" and answer with
the Mondrian service's JSON object.

## Intended use

Serving the advisor "{advisor}" in Mondrian: one photograph and the service's prompt in, one JSON analysis out. It was
trained on that prompt alone; other prompts, languages and subjects are outside what it learned. Its scores are
opinions learned from a model's earlier analyses, not measurements.

## Use

    from mlx_vlm import load
    model, processor = load("{base}", adapter_path="{folder.name}")

    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration
    model = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained("{base}"), "{folder.name}")

## Training data

| | examples | photographs | SHA-256 of the file |
| --- | --- | --- | --- |
{_data_row("training", train)}
{_data_row("validation", val)}

## Training

| setting | value |
| --- | --- |
| base | {base} ({fingerprint["shape"]}) |
| base fingerprint | architecture `{fingerprint["architecture"][:16]}`, norms `{fingerprint["norms"][:16]}` |
| LoRA | rank {settings["lora_r"]}, alpha {settings["lora_alpha"]}, dropout {settings["lora_dropout"]} on {modules} |
| trainable parameters | {result["trainable_parameters"]:,} |
| optimizer | AdamW, learning rate {settings["learning_rate"]:g}, {result["warmup_steps"]} warm-up steps, cosine decay |
| steps | {result["steps"]} of {result["examples_per_step"]} examples, {result["epochs"]:g} epochs |
| delivered | step {result["best_step"]} |
| time, peak memory | {result["seconds"]:.0f} s, {result["peak_memory_gb"]:.2f} GB |
| software | {files} |

| loss (mean per response token) | |
| --- | --- |
{chr(10).join(f"| {name} | {_number(value)} |" for name, value in losses)}

{chr(10).join(f"- {line}" for line in verdict)}

![loss curve](loss_curve.png)

## Evaluation

{START}
Not evaluated yet.
{END}
""",
    )


def complete_card(folder: Path, markdown: str) -> None:
    """Put an evaluation's result into the card in place of the one before; without a card nothing happens."""
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if START in text and END in text:
        before, after = text.split(START, 1)[0], text.split(END, 1)[1]
        write_text(path, f"{before}{START}\n{markdown.strip()}\n{END}{after}")


def _data_row(label: str, data: dict | None) -> str:
    if data is None:
        return f"| {label} | none | | |"
    return f"| {label} | {data['examples']} | {len(set(data['photos']))} | `{data['sha256']}` |"


def _number(value: float | None) -> str:
    return "not measured" if value is None or not math.isfinite(value) else f"{value:.4f}"

"""The model card (README.md) beside an adapter, in Hugging Face's form; evaluation fills in its last section."""

import json
from pathlib import Path

from common.files import write_text

CARD = "README.md"
START, END = "<!-- evaluation:start -->", "<!-- evaluation:end -->"
LOSSES = (
    ("training, first steps", "train_loss_first"),
    ("training, last steps", "train_loss_last"),
    ("validation, base model", "val_loss_first"),
    ("validation, this adapter", "val_loss_best"),
    ("validation, last step", "val_loss_last"),
)


def write_card(folder: Path, record: dict) -> None:
    """Write README.md from the ``record`` that also becomes training_args.json."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    front = {
        "base_model": record["base_model"],
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "mlx", "qwen3_vl", "photography"],
    }
    names = {"folder": folder.name, "base_name": Path(record["base_model"]).name, "start": START, "end": END}
    template = environment.get_template("model_card.md.jinja")
    write_text(folder / CARD, template.render(**record, **names, front=front, losses=LOSSES))


def complete_card(folder: Path, markdown: str) -> None:
    """Put an evaluation's result into the card in place of the one before; without a card nothing happens."""
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if START in text and END in text:
        before, after = text.split(START, 1)[0], text.split(END, 1)[1]
        write_text(path, f"{before}{START}\n{markdown.strip()}\n{END}{after}")

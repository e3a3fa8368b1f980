"""The model card (README.md) beside an adapter, in Hugging Face's form; evaluation fills in its last section."""

from pathlib import Path

from common.files import write_text
from common.pages import write_page

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
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
    front = {
        "base_model": record["base_model"],
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "mlx", "qwen3_vl", "photography"],
    }
    names = {"folder": folder.name, "base_name": Path(record["base_model"]).name, "start": START, "end": END}
    write_page(folder / CARD, TEMPLATE, **record, **names, front=front, losses=LOSSES)


def complete_card(folder: Path, markdown: str) -> None:
    """Put an evaluation's result into the card in place of the one before; without a card nothing happens."""
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if START in text and END in text:
        before, after = text.split(START, 1)[0], text.split(END, 1)[1]
        write_text(path, f"{before}{START}\n{markdown.strip()}\n{END}{after}")

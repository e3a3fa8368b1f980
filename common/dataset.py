"""The training rows that `prepare_training_data.py` writes and that training and evaluation read."""

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import refuse
from common.files import is_file, read_rows
from common.schemas import EXAMPLE, TRIPLET, fault


@dataclass(frozen=True)
class Example:
    """One photograph, what was asked of it and what was answered."""

    prompt: str
    response: str
    image_paths: tuple[Path, ...]
    sha256: tuple[str, ...]  # of each photograph's bytes; empty where the row does not tell
    job_id: str
    source: str  # "file:line", for messages


def triplet_row(image_path: str, prompt: str, response: str, job_id: str, image_sha256: str) -> dict:
    """Return a dataset row in the documented form."""
    return {
        "image_path": image_path,
        "prompt": prompt,
        "response": response,
        "job_id": job_id,
        "image_sha256": image_sha256,
    }


def messages_row(image_path: str, prompt: str, response: str, job_id: str, image_sha256: str) -> dict:
    """Return the same row as chat messages: what mlx-vlm's own trainer, TRL and LLaMA-Factory read.

    The content is typed parts (TRL's vision form), the image first, as the service sends it.
    """
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": response}]},
        ],
        "images": [image_path],
        "job_id": job_id,
        "image_sha256": image_sha256,
    }


def load_examples(path: str | os.PathLike) -> list[Example]:
    """Read a dataset file in either form; every damaged row is named in one UserError."""
    path = Path(path)
    examples, problems = [], []
    for line, row in read_rows(path):
        try:
            examples.append(_example(path, line, row))
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}; prepare the data again or mend the row")
    if not examples and not problems:
        problems.append(f"{path}: no examples in it; prepare the data again")
    refuse(problems)
    return examples


def _example(path: Path, line: int, row: dict) -> Example:
    if problem := fault(row, EXAMPLE if "messages" in row else TRIPLET):
        raise ValueError(problem)
    prompt, response, images = _from_messages(row) if "messages" in row else _from_triplet(row)
    paths = tuple(_find_photo(path, image) for image in images)
    hashes = row.get("image_sha256") or []
    return Example(
        prompt=prompt,
        response=response,
        image_paths=paths,
        sha256=tuple([hashes] if isinstance(hashes, str) else hashes),
        job_id=str(row.get("job_id") or f"line-{line}"),
        source=f"{path}:{line}",
    )


def _from_triplet(row: dict) -> tuple[str, str, list[str]]:
    image = row["image_path"]
    return row["prompt"], row["response"], image if isinstance(image, list) else [image]


def _from_messages(row: dict) -> tuple[str, str, list[str]]:
    messages, images = row["messages"], row.get("images") or row.get("image")
    if not isinstance(messages, list) or [_field(m, "role") for m in messages] != ["user", "assistant"]:
        raise ValueError("'messages' must be one user and one assistant message")
    if not images:
        raise ValueError("'images' is missing or empty")
    prompt, response = (_text(_field(message, "content")) for message in messages)
    if not prompt or not response:
        raise ValueError("a message has no text")
    return prompt, response, images if isinstance(images, list) else [images]


def _field(message: object, name: str) -> object:
    return message.get(name) if isinstance(message, dict) else None


def _text(content: object) -> str:
    """Return a message's text: a string (LLaMA-Factory marks the photograph by <image>) or typed parts."""
    if isinstance(content, list):
        content = "".join(str(_field(part, "text") or "") for part in content if _field(part, "type") == "text")
    return content.removeprefix("<image>").removeprefix("\n") if isinstance(content, str) else ""


def _find_photo(dataset: Path, image: object) -> Path:
    """Resolve a photograph's path: from the working directory, then from the dataset's folder and its parent."""
    if not isinstance(image, str) or "\0" in image:
        raise ValueError("'image_path' is not a path")
    candidates = [folder / image for folder in (Path(), dataset.parent, dataset.resolve().parent.parent)]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    raise ValueError(f"photograph {image[:200]} is not there")

"""The training rows that `prepare_training_data.py` writes and that training and evaluation read."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, refuse
from common.files import is_file, read_json, read_rows, sha256_file
from common.schemas import EXAMPLE, TRIPLET, fault

Spans = Sequence[tuple[int, int]]  # [start, end) in characters of a response

IMAGE = "<image>"  # LLaMA-Factory's mark of a photograph in a text


@dataclass(frozen=True)
class Example:
    """One photograph, what was asked of it and what was answered."""

    prompt: str
    response: str
    image_paths: tuple[Path, ...]
    sha256: tuple[str, ...]  # of each photograph's bytes; empty where the row does not tell
    job_id: str
    source: str  # "file:line", for messages
    masked_spans: tuple[tuple[int, int], ...] = ()  # of the response: in the input, out of the loss


def triplet_row(
    image_path: str, prompt: str, response: str, job_id: str, image_sha256: str, masked_spans: Spans = ()
) -> dict:
    """Return a dataset row in the documented form."""
    return {
        "image_path": image_path,
        "prompt": prompt,
        "response": response,
        "job_id": job_id,
        "image_sha256": image_sha256,
        "masked_spans": [list(span) for span in masked_spans],
    }


def messages_row(
    image_path: str, prompt: str, response: str, job_id: str, image_sha256: str, masked_spans: Spans = ()
) -> dict:
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
        "masked_spans": [list(span) for span in masked_spans],
    }


def read_meta(*paths: str | os.PathLike) -> dict | None:
    """Return ..._meta.json of the set that the files ``..._train.jsonl`` and ``..._val.jsonl`` belong to.

    Where they belong to several sets, the first one's; None where no meta.json is beside them, as with data made by
    hand. UserError where a file is not the one that was written with it: a set is taken whole or not at all.
    """
    return [_meta_of(Path(path)) for path in paths][0]


def _meta_of(path: Path) -> dict | None:
    place = path.with_name(re.sub(r"(_train|_val)?\.\w+$", "_meta.json", path.name))
    if not place.is_file():
        return None
    meta = read_json(place)
    hashes = meta.get("sha256", {}) if isinstance(meta, dict) else None
    if not isinstance(hashes, dict):
        raise UserError(f"{place}: not what prepare_training_data.py writes; prepare the data again, or delete it")
    if hashes.get(path.name, sha256_file(path)) != sha256_file(path):
        raise UserError(f"{path}: not the file that {place.name} was written with; prepare the data again")
    return meta


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
    masked_spans = tuple((start, end) for start, end in row.get("masked_spans") or [])
    if any(end > len(response) for _, end in masked_spans):
        raise ValueError("'masked_spans' reach past the end of the response")
    return Example(
        prompt=prompt,
        response=response,
        image_paths=paths,
        sha256=tuple([hashes] if isinstance(hashes, str) else hashes),
        job_id=str(row.get("job_id") or f"line-{line}"),
        source=f"{path}:{line}",
        masked_spans=masked_spans,
    )


def _from_triplet(row: dict) -> tuple[str, str, list[str]]:
    image = row["image_path"]
    return row["prompt"], row["response"], image if isinstance(image, list) else [image]


def _from_messages(row: dict) -> tuple[str, str, list]:
    messages = row["messages"]
    if not isinstance(messages, list) or [_field(m, "role") for m in messages] != ["user", "assistant"]:
        raise ValueError("'messages' must be one user and one assistant message")
    images = row.get("images") or row.get("image") or row.get("image_path")
    if not images:
        raise ValueError("'images' is missing or empty")
    images = images if isinstance(images, list) else [images]
    (marks, prompt), (none, response) = (_marks_and_text(_field(message, "content")) for message in messages)
    if not prompt.strip() or not response.strip():
        raise ValueError("a message has no text")
    if none or marks not in (0, len(images)):
        raise ValueError(f"{marks + none} image marks for {len(images)} photographs, which all belong to the question")
    return prompt, response, images


def _field(message: object, name: str) -> object:
    return message.get(name) if isinstance(message, dict) else None


def _marks_and_text(content: object) -> tuple[int, str]:
    """Return (image marks, text) of a message: a string (LLaMA-Factory marks photographs by <image>) or typed parts.

    The service sends the photographs first and the text after them. ValueError for a mark after text.
    """
    if isinstance(content, str):
        content = [
            {"type": "image"} if piece == IMAGE else {"type": "text", "text": piece}
            for piece in re.split(f"({IMAGE})\n?", content)
            if piece
        ]
    marks, text = 0, ""
    for part in content if isinstance(content, list) else ():
        kind = _field(part, "type")
        if kind in ("image", "image_url"):
            if text:
                raise ValueError("a photograph after text: the service sends photographs first, so put them first")
            marks += 1
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise ValueError(f"a part of a message that is neither text nor image: {str(part)[:60]}")
    return marks, text


def _find_photo(dataset: Path, image: object) -> Path:
    """Resolve a photograph's path: from the working directory, then from the dataset's folder and its parent."""
    if not isinstance(image, str) or "\0" in image:
        raise ValueError("'image_path' is not a path")
    candidates = [folder / image for folder in (Path(), dataset.parent, dataset.resolve().parent.parent)]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    raise ValueError(f"photograph {image[:200]} is not there")

"""The data card: one self-contained page that shows a person what the adapter will be trained on.

page = data_card(card)      # card: see `Work._card` in `prepare_training_data.py`; returns HTML
"""

import base64
import io
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from common.data.candidates import Candidate
from integration.lora_patch.photo import PhotoError, load_photo

SHEET_PHOTOS = 60  # photographs of each side on the contact sheets; a page of more would be slow to open
SHEET_COPIES = 4  # files of one picture that are shown beside it
_THUMB, _COPY = 300, 60  # pixels of the long side
_NO_PHOTO = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="


def data_card(card: dict) -> str:
    """Return the page as HTML; everything in it comes from ``card`` and is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("card.html.j2").read_text(encoding="utf-8"))
    return template.render(card=card)


def thumbnail(path: str, side: int = _THUMB) -> str:
    """Return a photograph as a small JPEG in a data: URL; a blank one when it cannot be read any more."""
    try:
        picture = load_photo(path, side)
    except PhotoError:
        return _NO_PHOTO
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet(side: str, pictures: list[list[Candidate]]) -> dict:
    """Return a contact sheet; ``pictures`` are the analyses of each picture, those of its copies included."""
    groups = [_group(candidates) for candidates in pictures]
    groups.sort(key=lambda group: (-(group["overall"] or 0), group["paths"]))
    copied = _spread([group for group in groups if len(group["paths"]) > 1], SHEET_PHOTOS // 2)
    single = _spread([group for group in groups if group not in copied], SHEET_PHOTOS - len(copied))
    shown = [group for group in groups if group in copied or group in single]
    title = {"train": "Training photographs", "val": "Validation photographs"}[side]
    text = f"{len(groups):,} pictures" if len(groups) != 1 else "1 picture"
    if len(shown) < len(groups):
        text += f", of which {len(shown)} are shown, those with copies among them, from the best overall score down"
    return {"side": side, "title": title, "text": text, "photos": [_on_sheet(group) for group in shown]}


def _group(candidates: list[Candidate]) -> dict:
    kept = [candidate for candidate in candidates if candidate.side]
    files = {candidate.sha256: candidate.image_path for candidate in [*reversed(candidates), *reversed(kept)]}
    return {
        "paths": list(dict.fromkeys([kept[-1].image_path, *sorted(files.values())])),
        "overall": kept[-1].overall,
        "scores": kept[-1].scores,
        "jobs": len(candidates),
        "kept": len(kept),
    }


def _on_sheet(group: dict) -> dict:
    first, *others = group["paths"]
    images = [thumbnail(first), *(thumbnail(path, _COPY) for path in others[:SHEET_COPIES])]
    parts = []
    if others:
        parts.append(f"{len(group['paths'])} files of one picture")
    if group["jobs"] > 1:
        parts.append(f"{group['jobs']} analyses, {group['kept']} kept")
    return {
        "images": images,
        "name": Path(first).name,
        "overall": "" if group["overall"] is None else f"{group['overall']:g}",
        "scores": " ".join(f"{score:g}" for score in group["scores"]),
        "group": "; ".join(parts),
    }


def _spread(items: list, count: int) -> list:
    """Return at most ``count`` of the items, evenly from first to last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def charts(train: list[Candidate], val: list[Candidate], dimensions: tuple[str, ...], max_seq_length: int) -> dict:
    """Return the histograms of overall scores, of lengths in tokens and of each dimension's scores."""
    sides = train, val
    longest = max(max_seq_length, *(candidate.length for side in sides for candidate in side))
    step = next(n * 10**k for k in range(1, 9) for n in (1, 2, 5) if n * 10**k * 20 > longest)
    halves, wholes = [n / 2 for n in range(21)], [n - 0.5 for n in range(12)]
    return {
        "overall_chart": histogram(*([c.overall for c in side if c.overall is not None] for side in sides), halves),
        "length_chart": histogram(
            *([c.length for c in side] for side in sides), [n * step for n in range(21)], max_seq_length
        ),
        "dimension_charts": [
            (
                name,
                histogram(*([c.scores[i] for c in side if i < len(c.scores)] for side in sides), wholes, None, 90, 250),
            )
            for i, name in enumerate(dimensions)
        ],
    }


def histogram(
    train: list[float],
    val: list[float],
    edges: list[float],
    limit: float | None = None,
    height: int = 150,
    width: int = 420,
) -> Markup:
    """Draw how many values fall between consecutive ``edges``, training and validation side by side, as SVG."""
    counts = [_counts(values, edges) for values in (train, val)]
    top = max(1, *counts[0], *counts[1])
    left, foot = 30, 18
    slot = (width - left - 6) / (len(edges) - 1)
    y_at = lambda count: 20 + (height - foot - 20) * (1 - count / top)  # noqa: E731
    parts = [
        f'<line class="axis" x1="{left}" y1="{y_at(0):.1f}" x2="{width}" y2="{y_at(0):.1f}"/>',
        f'<text x="{left - 5}" y="{y_at(top) + 8:.1f}" text-anchor="end">{top:,}</text>',
        f'<text x="{left - 5}" y="{y_at(0):.1f}" text-anchor="end">0</text>',
    ]
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        for j, (side, numbers) in enumerate(zip(("train", "val"), counts, strict=True)):
            if numbers[i]:
                x = left + slot * (i + 0.08 + 0.42 * j)
                parts.append(
                    f'<rect class="{side}" x="{x:.1f}" y="{y_at(numbers[i]):.1f}" width="{slot * 0.42:.1f}" '
                    f'height="{y_at(0) - y_at(numbers[i]):.1f}" rx="1.5"><title>{low:g} to {high:g}: {numbers[i]:,} '
                    f"{'training' if side == 'train' else 'validation'}</title></rect>"
                )
        if len(edges) <= 12 or i % 4 == 0:
            middle = left + slot * (i + 0.5)
            parts.append(f'<text x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{_label(low, high)}</text>')
    if limit is not None and edges[0] <= limit <= edges[-1]:
        x = left + slot * (len(edges) - 1) * (limit - edges[0]) / (edges[-1] - edges[0])
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{y_at(0):.1f}"/>')
        anchor = "start" if x < width * 0.7 else "end"
        x += 4 if anchor == "start" else -4
        parts.append(f'<text x="{x:.1f}" y="12" text-anchor="{anchor}">max_seq_length {limit:,.0f}</text>')
    title = f"{len(train):,} training and {len(val):,} validation examples"
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>'
    return Markup(head + "".join(parts) + "</svg>")


def _counts(values: list[float], edges: list[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    for value in values:
        at = next((i for i in range(len(counts)) if value < edges[i + 1]), len(counts) - 1)
        counts[at] += 1
    return counts


def _label(low: float, high: float) -> str:
    return f"{(low + high) / 2:g}" if high - low == 1 else f"{low:g}"

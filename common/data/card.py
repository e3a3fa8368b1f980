"""The data card: one self-contained page that shows a person what the adapter will be trained on.

write_card(path, task, arrangement, lengths, meta)
"""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from common.data.candidates import Candidate
from common.data.preparation import REASONS, Arrangement, Lengths, Task
from common.data.prepared import link_report
from common.data.quality import GATES
from common.data.summary import lengths_sentence, some
from common.pages import embedded, write_page
from integration.lora_patch.photo import PhotoError

SHEET_PHOTOS = 60  # photographs of each side on the contact sheets; a page of more would be slow to open
SHEET_GROUPS, GROUP_FILES = 30, 8  # groups of near-duplicates that are shown, and files of each
_THUMB, _COPY = 300, 140  # pixels of the long side
_NO_PHOTO = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="


def write_card(path: Path, task: Task, arrangement: Arrangement, lengths: Lengths, meta: dict) -> None:
    """Write the page; ``meta``: see `meta_of`."""
    train, val = arrangement.examples("train"), arrangement.examples("val")
    report = link_report(task.manifest.path)
    highest = task.target.specification.score_range[1]
    step = 1 if 1 < highest <= 20 else highest / 10
    edges = [n * step for n in range(math.ceil(highest / step) + 2)]
    write_page(
        path,
        Path(__file__).with_name("card.html.j2"),
        meta=meta,
        steps=_steps(arrangement, report.get("jobs", 0)),
        overall=_chart(
            "Overall score", [c.overall for c in train], [c.overall for c in val], [n * highest / 20 for n in range(21)]
        ),
        lengths=_lengths_chart(train, val, lengths.max_seq_length),
        lengths_text=lengths_sentence(lengths, len(train) + len(val), meta["options"]["base_model"]),
        dimensions=[
            _chart(name, *([c.scores[i] for c in side if i < len(c.scores)] for side in (train, val)), edges)
            for i, name in enumerate(task.target.specification.names)
        ],
        gates=[
            {"name": name, "meaning": GATES[name].meaning, "ids": some(gate["job_ids"], 6), **gate}
            for name, gate in arrangement.gates.items()
        ],
        not_examples=[
            {"name": name, "jobs": len(ids), "meaning": REASONS[name], "ids": some(ids, 8)}
            for name, ids in arrangement.left_out().items()
        ],
        not_linked=[{"name": name, **reason} for name, reason in report.get("reasons", {}).items()],
        groups=_groups(arrangement),
        sheets=[_sheet(task, side, arrangement.pictures(side)) for side in ("train", "val")],
        prompt=task.prompt,
    )


def _steps(arrangement: Arrangement, jobs: int) -> list[dict]:
    passed = sum(candidate.reason not in GATES for candidate in arrangement.candidates)
    steps = [(jobs, "jobs in the databases")] if jobs else []
    steps += [
        (len(arrangement.candidates), "linked to analysis and photograph"),
        (passed, "passed the gates"),
        (len(arrangement.examples()), "examples"),
        (len(arrangement.examples("train")), "training"),
        (len(arrangement.examples("val")), "validation"),
    ]
    return [{"count": n, "label": label, "percent": round(100 * n / max(steps[0][0], 1), 1)} for n, label in steps]


# -- photographs ------------------------------------------------------------------------------------------------------


def _thumbnail(path: str, side: int) -> str:
    """Return a photograph as a small JPEG in a data: URL; a blank one when it cannot be read any more."""
    try:
        return embedded(path, side)
    except PhotoError:
        return _NO_PHOTO


def _sheet(task: Task, side: str, pictures: list[list[Candidate]]) -> dict:
    """Return a contact sheet; ``pictures`` are the analyses of each picture, those of its copies included."""
    examples = [candidate for group in pictures for candidate in group if candidate.side]
    examples.sort(key=lambda candidate: (-(candidate.overall or 0), candidate.image_path))
    shown = _spread(examples, SHEET_PHOTOS)
    rows = task.manifest.read([candidate.place for candidate in shown])
    return {
        "side": side,
        "count": len(examples),
        "photos": [_on_sheet(candidate, row, task) for candidate, row in zip(shown, rows, strict=True)],
    }


def _on_sheet(candidate: Candidate, row: dict, task: Task) -> dict:
    return {
        "image": _thumbnail(candidate.image_path, _THUMB),
        "name": Path(candidate.image_path).name,
        "job_id": candidate.job_id,
        "overall": "" if candidate.overall is None else f"{candidate.overall:g}",
        "scores": list(
            zip(task.target.specification.names, (f"{score:g}" for score in candidate.scores), strict=False)
        ),
        "verdicts": candidate.verdicts,
        "masked": candidate.masked,
        "analysis": task.target.as_trained(row["analysis"])[0],
    }


def _groups(arrangement: Arrangement) -> dict:
    """Return the groups of several files, the largest first, with their pictures."""
    found = []
    for side in ("train", "val"):
        for candidates in arrangement.pictures(side):
            files = {c.image_path: c for c in [*candidates, *(c for c in candidates if c.side)]}
            if len(files) > 1:
                found.append((side, sorted(files.values(), key=lambda c: (not c.side, c.image_path))))
    found.sort(key=lambda item: (-len(item[1]), item[1][0].image_path))
    return {
        "count": len(found),
        "shown": [
            {
                "side": side,
                "files": len(files),
                "photos": [
                    {"image": _thumbnail(c.image_path, _COPY), "name": Path(c.image_path).name, "kept": bool(c.side)}
                    for c in files[:GROUP_FILES]
                ],
            }
            for side, files in found[:SHEET_GROUPS]
        ],
    }


def _spread(items: list, count: int) -> list:
    """Return at most ``count`` of the items, evenly from first to last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# -- charts -----------------------------------------------------------------------------------------------------------


def _lengths_chart(train: list[Candidate], val: list[Candidate], limit: int) -> dict:
    longest = max(limit, *(candidate.length for candidate in [*train, *val]))
    step = next(n * 10**k for k in range(1, 9) for n in (1, 2, 5) if n * 10**k * 20 > longest)
    return _chart("Length in tokens", [c.length for c in train], [c.length for c in val], [n * step for n in range(21)])


def _chart(title: str, train: Iterable, val: Iterable, edges: Iterable) -> dict:
    """Count how many values fall from each of ``edges`` up to the next; heights in percent of the highest bar."""
    edges = list(edges)
    bars = []
    for low, high in itertools.pairwise(edges):
        last = high == edges[-1]
        counts = [sum(low <= v < high or (last and v == high) for v in side if v is not None) for side in (train, val)]
        bars.append({"label": f"{low:g}", "train": counts[0], "val": counts[1]})
    top = max(1, *(bar[side] for bar in bars for side in ("train", "val")))
    sparse = len(bars) > 12
    for at, bar in enumerate(bars):
        bar |= {"heights": [round(100 * bar[side] / top, 1) for side in ("train", "val")]}
        bar["tick"] = bar["label"] if not sparse or at % 4 == 0 else ""
    told = "; ".join(f"{bar['label']}: {bar['train']} and {bar['val']}" for bar in bars if bar["train"] or bar["val"])
    return {"title": title, "bars": bars, "top": top, "told": told or "none"}

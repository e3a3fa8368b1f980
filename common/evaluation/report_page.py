"""The comparison as one self-contained page: the verdict, the photographs that changed most, gates, figures, answers.

`write_report_page` reads nothing but the report and its photographs; the page's form is report.html.j2. Everything that
a model wrote is escaped by the template engine, and the page's own policy lets no other script run and no other address
be read.
"""

import base64
import difflib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.evaluation import metrics, scoring
from common.evaluation.comparison import NAMES
from common.evaluation.gates import VERDICTS, bound_text, format_value
from common.evaluation.metrics import CONSTANT, EXPECTED, REFERENCE
from common.pages import embedded, write_page
from integration.lora_patch.json_text import is_number

HERE = Path(__file__).parent
GROUPS = {  # of the figures table, by the first part of a figure's name
    "format": "Format",
    "loss": "Loss, teacher-forced",
    "text": "Texts",
    "vocabulary": "Texts",
    "distinct": "Distinct",
    "length": "Speed, one request at a time",
    "speed": "Speed, one request at a time",
}
MOST = 3  # photographs that gained and that lost most
PICTURE = 560  # pixels of the long side of a picture in the page
MARKED_FROM = 0.35  # texts less alike than this are other texts: marking every word of them says nothing


@dataclass(frozen=True)
class Cell:
    """What one answer says in one row of a table of answers side by side (parts.html.j2)."""

    score: str = ""
    off: str = ""  # distance from the reference, with its sign
    texts: list = field(default_factory=list)  # text, or Markup with words that the reference does not have marked
    missing: str = ""  # why the answer says nothing here


@dataclass(frozen=True)
class Card:
    """One photograph with its answers side by side."""

    index: int
    name: str
    alt: str
    pictures: list[str]  # data: URLs
    paths: list[str]
    job: str
    answers: dict[str, dict]  # the first output of each arm, as in the report
    columns: list[tuple[str, str, str]]  # colour, name and note of the reference and of each arm
    rows: list[tuple[str, list[Cell]]]  # title, a cell a column
    errors: dict[str, float | None]  # mean score error by arm, points
    gain: float  # how much better the candidate's answer is than the base's; see `_gain`
    loss_gain: float | None  # nats per token

    @property
    def broken(self) -> bool:
        candidate = self.answers.get("candidate")
        return bool(candidate) and not candidate["verdict"]["strict"]


def write_report_page(path: Path, report: dict) -> None:
    """Write the page of a decided report (`comparison.decided`)."""
    from markupsafe import Markup

    arms, script = list(report["arms"]), (HERE / "report.js").read_text(encoding="utf-8").strip()
    cards = [_card(report, example) for example in report["examples"]]
    ordered = sorted(cards, key=lambda card: card.gain)
    write_page(
        path,
        HERE / "report.html.j2",
        report=report,
        summary=report["summary"],
        verdict=report["verdict"],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        arms=arms,
        names=NAMES,
        meanings=VERDICTS,
        kind=metrics.kind,
        shown=format_value,
        bound=bound_text,
        groups=_groups(report["summary"]["arms"]),
        score_arms=[arm for arm in report["summary"]["arms"] if arm in arms or arm.endswith(EXPECTED)]
        + [arm for arm in (CONSTANT, REFERENCE) if arm in report["summary"]["arms"]],
        score_names=["", *dict.fromkeys(name for e in report["examples"] for name in e["dimensions"])],
        score_kinds=metrics.SCORE_KINDS,
        failures=scoring.FAILURES,
        pairs=metrics.pairs(list(report["summary"]["arms"])),
        cards=ordered,
        most=_most(ordered),
        points=_points(report, arms),
        losses=_losses(report),
        facts=_facts(report),
    )


def _most(ordered: list[Card]) -> dict[str, list[Card]]:
    """Return the photographs to show first, by their heading: those that gained most, and at the other end of the
    order those that lost most, or gained least where none lost."""
    gained = [card for card in ordered[::-1] if card.gain > 0][:MOST]
    lost = [card for card in ordered if card.gain < 0][:MOST]
    least = [card for card in ordered[:MOST] if card not in gained]
    return {"Gained most": gained, "Lost most" if lost else "Gained least": lost or least}


def _groups(figures: dict[str, dict]) -> dict[str, list[str]]:
    """Return the figures that any arm has, by group; those of the scores have tables of their own."""
    found: dict[str, list[str]] = {}
    for name in metrics.KINDS:
        group = GROUPS.get(name.partition(".")[0])
        if group and any(row.get(name, {}).get("value") is not None for row in figures.values()):
            found.setdefault(group, []).append(name)
    return found


def _points(report: dict, arms: list[str]) -> list[tuple[str, float, float, str]]:
    """Return (arm, reference's overall score, output's, photograph) of each first output that has one."""
    found = []
    for example in report["examples"]:
        wanted = example["reference_scores"].get(scoring.OVERALL)
        for arm in arms:
            for output in example["outputs"][arm][:1]:
                score = output["measures"]["scores"].get(scoring.OVERALL)
                if wanted is not None and score is not None:
                    found.append((arm, wanted, min(max(score, 0), 10), f"Photograph {example['index'] + 1}"))
    return found


def _losses(report: dict) -> list[dict]:
    """Return each photograph's losses by arm in percent of the largest, smallest gain first."""
    rows = []
    for example in report["examples"]:
        losses = {arm: _loss(example, arm) for arm in ("base", "candidate")}
        if None not in losses.values():
            rows.append({"name": f"Photograph {example['index'] + 1}", **losses})
    highest = max((max(row["base"], row["candidate"]) for row in rows), default=1) or 1
    for row in rows:
        row["at"] = {arm: 100 * row[arm] / highest for arm in ("base", "candidate")}
    return sorted(rows, key=lambda row: row["base"] - row["candidate"])


def _loss(example: dict, arm: str) -> float | None:
    loss = example["loss"].get(arm)
    return loss["sum"] / loss["tokens"] if loss and loss["sum"] is not None else None


def _facts(report: dict) -> dict[str, str]:
    data, settings = report["data"], report["settings"]
    names = ("num_samples", "temperature", "seed", "max_tokens", "batch_size", "max_image_size", "timing_examples")
    shown = {"Base": report["base"]["name"]}
    shown |= {NAMES[arm].capitalize(): facts["adapter"] for arm, facts in report["arms"].items() if facts["adapter"]}
    shown |= {
        "Held-out data": f"{data['path']} ({data['examples']} examples, SHA-256 {data['sha256'][:16]})",
        "Device": report["device"] or "not recorded",
        "Software": ", ".join(f"{name} {version}" for name, version in (report["software"] or {}).items()),
        "Made": f"{report['created_at']} in {report['seconds']:.0f} s",
        "Settings": ", ".join(f"{name} {settings.get(name)}" for name in names),
    }
    check = report["verdict"]["one_by_one"]
    if check:
        shown["Batch against one by one"] = f"the same text in {check[0]} of {check[1]} timed runs"
    return shown


# -- a photograph -----------------------------------------------------------------------------------------------------


def _card(report: dict, example: dict) -> Card:
    answers = {arm: example["outputs"][arm][0] for arm in report["arms"] if example["outputs"].get(arm)}
    analyses = {REFERENCE: example["reference"] or {}}
    analyses |= {arm: answer["verdict"]["analysis"] or {} for arm, answer in answers.items()}
    unread = {arm for arm, answer in answers.items() if not answer["verdict"]["lenient"]}
    errors = {arm: _error(answer, example["reference_scores"]) for arm, answer in answers.items()}
    losses = [_loss(example, arm) for arm in ("base", "candidate")]
    loss_gain = None if None in losses else losses[0] - losses[1]
    description = str(analyses[REFERENCE].get("image_description") or "no description")
    name = f"Photograph {example['index'] + 1}"
    return Card(
        example["index"],
        name,
        f"{name}: {description[:160]}",
        [embedded(photo["path"], PICTURE) for photo in example["photographs"]],
        [photo["path"] for photo in example["photographs"]],
        example["job_id"],
        answers,
        [(arm, NAMES[arm], f"{answers[arm]['tokens']} tokens" if arm in answers else "") for arm in analyses],
        _rows(analyses, example["dimensions"], unread),
        errors,
        _gain(answers, errors, loss_gain),
        loss_gain,
    )


def _error(answer: dict, wanted: dict[str, float]) -> float | None:
    """Return the mean distance of an answer's scores from the reference's, points."""
    scores = answer["measures"]["scores"]
    errors = [abs(scores[name] - wanted[name]) for name in scores if name in wanted]
    return sum(errors) / len(errors) if errors else None


def _gain(answers: dict[str, dict], errors: dict[str, float | None], loss_gain: float | None) -> float:
    """Return how much better the candidate's answer is: 10 for the prompt's format, points of score error, and, which
    no reader of the answer sees, a tenth of the nats of loss."""
    if not {"base", "candidate"} <= answers.keys():
        return 0.0
    strict = [answers[arm]["verdict"]["strict"] for arm in ("base", "candidate")]
    known = None not in (errors["base"], errors["candidate"])
    closer = errors["base"] - errors["candidate"] if known else 0.0
    return 10 * (strict[1] - strict[0]) + closer + (loss_gain or 0.0) / 10


def _rows(analyses: dict[str, dict], dimensions: list[str], unread: set[str]) -> list[tuple[str, list[Cell]]]:
    """Return the rows of a photograph's table, a cell an answer; what differs from the reference is marked.

    ``unread``: the arms whose answer is no analysis.
    """
    listed = {
        arm: {str(item.get("name")): item for item in analysis.get("dimensions") or [] if isinstance(item, dict)}
        for arm, analysis in analyses.items()
    }
    extra = [name for items in listed.values() for name in items if name not in dimensions]
    rows = [
        (
            "Overall score",
            [
                _scored(arm, a.get(scoring.OVERALL), analyses[REFERENCE].get(scoring.OVERALL))
                for arm, a in analyses.items()
            ],
        )
    ]
    rows.append(_text_row("Description", analyses, "image_description", unread))
    for name in [*dimensions, *dict.fromkeys(extra)]:
        wanted, cells = listed[REFERENCE].get(name, {}), []
        for arm, items in listed.items():
            item = items.get(name, {})
            texts = [_marked(arm, item[key], wanted.get(key)) for key in ("comment", "recommendation") if item.get(key)]
            missing = "missing" if analyses[arm] and not item else ""
            cells.append(_scored(arm, item.get("score"), wanted.get("score"), texts, missing))
        rows.append((name, cells))
    keys = {"Strengths": "key_strengths", "Improvements": "priority_improvements", "Technical notes": "technical_notes"}
    return rows + [_text_row(title, analyses, key) for title, key in keys.items()]


def _scored(arm: str, score: object, wanted: object, texts: list | None = None, missing: str = "") -> Cell:
    off = ""
    if arm != REFERENCE and is_number(score) and is_number(wanted) and score != wanted:
        off = f"{score - wanted:+.1f}".removesuffix(".0")
    return Cell(f"{score:g}" if is_number(score) else "", off, texts or [], missing)


def _text_row(
    title: str, analyses: dict[str, dict], key: str, unread: set[str] = frozenset()
) -> tuple[str, list[Cell]]:
    found = {arm: analysis.get(key) or [] for arm, analysis in analyses.items()}
    found = {arm: value if isinstance(value, list) else [value] for arm, value in found.items()}
    wanted = " ".join(map(str, found[REFERENCE]))
    cells = []
    for arm, texts in found.items():
        missing = "missing" if analyses[arm] and wanted and not texts else ""
        missing = "cannot be read as an analysis" if arm in unread else missing
        cells.append(Cell(texts=[_marked(arm, text, wanted) for text in texts], missing=missing))
    return title, cells


def _marked(arm: str, text: object, reference: object):
    """Return a text, escaped, with the words marked that are not in the reference; plain where the two have little in
    common."""
    from markupsafe import Markup, escape

    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if arm == REFERENCE or not isinstance(reference, str) or text == reference:
        return escape(text)
    ours, theirs = (re.findall(r"\s+|[^\s]+", side)[:600] for side in (text, reference))
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    if matcher.ratio() < MARKED_FROM:
        return escape(text)
    parts = []
    for operation, i1, i2, _, _ in matcher.get_opcodes():
        piece = "".join(ours[i1:i2])
        words = piece.strip()
        if operation == "equal" or not words:
            parts.append(escape(piece))
        else:  # the spaces around marked words are not words
            before, after = piece.split(words, 1)
            parts.append(Markup("{}<mark>{}</mark>{}").format(before, words, after))
    return Markup("").join(parts) + escape("".join(re.findall(r"\s+|[^\s]+", text)[600:]))

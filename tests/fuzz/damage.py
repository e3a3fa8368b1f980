"""The damage of `tests.fuzz.fuzz`: to texts, to databases, and by hand to the rows of each file."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from common.dataset import load_examples
from common.errors import UserError
from common.evaluation.generations import RecordedSource
from common.files import write_jsonl
from integration.lora_patch.errors import LoraError
from tests.mondrian_case import Tree

_PIECES = (
    "{", "}", "[", "]", '"', "\\", ",", ":", "<", ">", "</", "```", "\0", "\ud800", "\u2028", "\x1b", "NaN", "null",
    "1e999", "-", "<think>", "</think>", "<thought>", "assistant\n", "{}", '{"a":1,}', '{"dimensions":', '"score":',
    '<div class="feedback-card">', "<h3>", "<h2>Overall Grade</h2>", '<span class="dimension-score">(8/10)</span>',
    '<p class="overall-grade">', 'data-advisor="weston"', "&amp;", "...", "// more", "6 dimensions", "OPTIONAL", "\n- ",
)  # fmt: skip
_LONGEST = 256_000  # characters; linking leaves out what is longer before it reads it


def mutated(dice: random.Random, texts: list[str]) -> str:
    """Return one of the texts with one to four accidents."""
    text = dice.choice(texts)
    for _ in range(dice.choice((1, 1, 2, 4))):
        start = dice.randrange(len(text) + 1)
        end = min(len(text), start + int(dice.paretovariate(0.6)))
        piece = text[start:end]
        accident = dice.randrange(9)
        if accident == 0:  # cut off
            text = text[:start]
        elif accident == 1:  # lost
            text = text[:start] + text[end:]
        elif accident == 2:  # stuck
            text = text[:start] + piece * dice.choice((2, 3, 50)) + text[end:]
        elif accident == 3:  # something else in its place
            text = text[:start] + dice.choice(_PIECES) + text[end:]
        elif accident == 4:  # another answer begins here
            other = dice.choice(texts)
            text = text[:start] + other[dice.randrange(len(other) + 1) :]
        elif accident == 5:  # elsewhere
            at = dice.randrange(len(text) + 1)
            text = text[:at] + piece + text[at:]
        elif accident == 6:  # one letter
            text = text[:start] + chr(dice.choice((dice.randrange(128), dice.randrange(0xD7FF)))) + text[start + 1 :]
        elif accident == 7:  # a number without end
            number = dice.choice(re.findall(r"\d+", text) or ["8"])
            text = text.replace(number, number * dice.choice((2, 40, 3000)), 1)
        elif dice.random() < 0.02:  # the whole again and again
            text = (dice.choice((*_PIECES, piece or "{")) * dice.choice((1_000, 30_000)) + text)[:_LONGEST]
    return text[:_LONGEST]


def flipped(dice: random.Random, data: bytes) -> bytes:
    """Return a database with flipped bytes, a lost page, or its end cut off; its first 16 bytes stay."""
    damaged = bytearray(data)
    for _ in range(dice.choice((1, 5, 50, 500))):
        # the schema, at the beginning, is hit as often as all the rest
        at = dice.randrange(16, dice.choice((4096, len(damaged))))
        damaged[at] = dice.randrange(256)
    if dice.random() < 0.1:
        at = dice.randrange(1, len(damaged) // 4096) * 4096
        damaged[at : at + 4096] = bytes(4096)
    return bytes(damaged[: dice.randrange(4096, len(damaged))] if dice.random() < 0.1 else damaged)


def _deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


_VALUES = (
    None, True, 5, -1, 0, 7.5, 1e300, 10**30, "", " ", "x", "\0", "a\nb", "8/10", "x" * 5000, "../../etc", [], [5], {},
    [None], [[1, 2]], {"a": {}}, {"name": 5}, "2026", "\u2028", _deep(5), _deep(60),
)  # fmt: skip
_RAW = ("NaN", "Infinity", "9" * 5000, "9" * 4000, '"\\ud800"', "[" * 5000 + "]" * 5000, '"' + "x" * 9_000_000 + '"')


def damaged_json(dice: random.Random, text: str) -> str:
    """Return a JSON text in which a hand has spoilt a value, a key or the text itself."""
    value = json.loads(text)
    if dice.random() < 0.15:
        at = dice.randrange(len(text))
        return dice.choice(
            (text[:at], text[:at] + text[at + 1 :], text[:at] + '"' + text[at:], "[" + text, "null", "5")
        )
    places = list(_places(value))
    holder, key = dice.choice(places)
    accident = dice.randrange(4)
    if accident == 0:
        holder[key] = dice.choice(_VALUES)
    elif accident == 1:
        holder[key] = "@@"
        return json.dumps(value).replace('"@@"', dice.choice(_RAW if dice.random() < 0.3 else _RAW[:6]))
    elif accident == 2:
        del holder[key]
    elif isinstance(holder, dict):
        holder[dice.choice(("", "x", "dimensions", "messages", "\0"))] = holder.pop(key)
    else:
        holder.append(dice.choice(_VALUES))
    return json.dumps(value)


def _places(value: object) -> Iterator[tuple]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def files(folder: Path) -> Iterator[tuple[str, Callable[[random.Random], None], Callable]]:
    """Yield (name, what damages one row of it, what reads it through its script) of each file of a small tree."""
    tree = Tree(folder)
    tree.good(12)
    assert tree.link().exit_code == 0 and tree.prepare().exit_code == 0
    out = folder / "out"

    def damager(path: Path) -> Callable[[random.Random], None]:
        whole = path.read_text(encoding="utf-8")

        def damage(dice: random.Random) -> None:
            if path.suffix == ".jsonl":
                lines = whole.splitlines()
                at = dice.randrange(len(lines))
                lines[at] = damaged_json(dice, lines[at])
                path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
            else:
                path.write_text(damaged_json(dice, whole), encoding="utf-8", errors="surrogatepass")

        return damage

    prepared = ("training_data_manifest.jsonl", "training_data_ansel_split.json", "training_data_manifest_report.json")
    for name in prepared:
        whole = (out / name).read_bytes()
        dry = () if name.endswith("_report.json") else ("--dry_run",)  # the card alone shows that report
        yield name, damager(out / name), lambda dry=dry: tree.prepare(*dry)
        (out / name).write_bytes(whole)
    for form in ("triplet", "messages"):
        assert tree.prepare("--format", form).exit_code == 0
        rows = out / f"{form}_rows.jsonl"  # by itself: beside its meta.json a changed file is refused whole
        rows.write_bytes((out / "training_data_ansel_train.jsonl").read_bytes())
        yield rows.name, damager(rows), lambda rows=rows: _direct(lambda: load_examples(rows))
    write_jsonl(out / "outputs.jsonl", _outputs())
    items = [SimpleNamespace(index=i, example=SimpleNamespace(job_id=f"job-{i}")) for i in range(3)]
    yield (
        "outputs.jsonl",
        damager(out / "outputs.jsonl"),
        lambda: _direct(lambda: RecordedSource(out / "outputs.jsonl", items)),
    )


def _direct(read: Callable[[], object]) -> SimpleNamespace:
    """Return what a script that reads so would end with."""
    try:
        read()
    except (UserError, LoraError) as error:
        return SimpleNamespace(exit_code=1, exception=None, output=str(error))
    except Exception as error:
        return SimpleNamespace(exit_code=1, exception=error, output="")
    return SimpleNamespace(exit_code=0, exception=None, output="")


def _outputs() -> list[dict]:
    rows = []
    for arm in ("base", "candidate"):
        rows.append({"kind": "arm", "arm": arm, "load_seconds": 1.5})
        for at, example in enumerate((0, "job-1", 2)):
            place = {"arm": arm, "example": example}
            rows.append({"kind": "output", **place, "sample": 0, "text": f"{{}} {at}", "finish": "stop", "tokens": 9})
            rows.append({"kind": "loss", **place, "sum": 3.5, "tokens": 9})
            rows.append({"kind": "timing", **place, "seconds": 2.1, "first_token_seconds": 0.3, "tokens": 9})
    return rows

"""docs/data.md tells every reason and every gate in the words that the program prints."""

import re
from pathlib import Path

from common.data.linking import REASONS
from common.data.quality import GATES

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[tuple[str, ...]]:
    section = DOCUMENT.split(f"## {heading}")[1].split("\n## ")[0]
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in re.findall(r"^\|.*\|$", section, re.M)
    ]
    return cells[2:]


def test_every_reason_is_told():
    assert rows("Why a job is not linked") == list(REASONS.items())


def test_every_gate_is_told():
    assert rows("The gates") == [(name, gate.default, gate.meaning) for name, gate in GATES.items()]

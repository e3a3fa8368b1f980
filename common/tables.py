"""Plain tables for the terminal, at most 100 columns wide, the same on a terminal and in a file."""

import shutil
import textwrap


def width() -> int:
    """Return the columns to write in: the terminal's, within 60 and 100."""
    return max(60, min(100, shutil.get_terminal_size((100, 24)).columns))


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 photograph", "1,200 photographs"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def paragraph(text: str, indent: str = "", hang: str = "") -> str:
    """Return a text wrapped to the terminal; ``hang`` more is the indent of all lines but the first."""
    return textwrap.fill(text, width(), initial_indent=indent, subsequent_indent=indent + hang, break_on_hyphens=False)


def table(header: list[str], rows: list[list], indent: str = "  ") -> str:
    """Return a table: numbers to the right, the last column wrapped to what is left of the line."""
    columns = width()
    cells = [header, *([f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows)]
    right = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    last = max(20, columns - len(indent) - sum(widths) - 2 * len(widths))
    lines = []
    for row in cells:
        texts = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=False)]
        start = indent + "  ".join([*texts, ""])
        wrapped = textwrap.wrap(row[-1], last) or [""]
        lines.append((start + wrapped[0]).rstrip())
        lines += [" " * len(start) + line for line in wrapped[1:]]
        if row is header:
            lines.append(indent + "-" * min(columns - len(indent), max(len(lines[0]) - len(indent), 60)))
    return "\n".join(lines)

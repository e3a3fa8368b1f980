"""Plain tables for the terminal, at most 100 columns wide, the same on a terminal and in a file."""

import shutil
import textwrap


def table(header: list[str], rows: list[list], indent: str = "  ") -> str:
    """Return a table: numbers to the right, the last column wrapped to what is left of the line."""
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    cells = [header, *([f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows)]
    right = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    last = max(20, width - len(indent) - sum(widths) - 2 * len(widths))
    lines = []
    for row in cells:
        texts = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=False)]
        start = indent + "  ".join([*texts, ""])
        wrapped = textwrap.wrap(row[-1], last) or [""]
        lines.append((start + wrapped[0]).rstrip())
        lines += [" " * len(start) + line for line in wrapped[1:]]
        if row is header:
            lines.append(indent + "-" * min(width - len(indent), max(len(lines[0]) - len(indent), 60)))
    return "\n".join(lines)

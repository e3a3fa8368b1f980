"""Plain tables for the terminal, at most 100 columns wide, the same on a terminal and in a file."""

import io
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
    return textwrap.fill(
        text,
        width(),
        initial_indent=indent,
        subsequent_indent=indent + hang,
        break_on_hyphens=False,
        break_long_words=False,
    )


def table(header: list[str], rows: list[list], indent: str = "  ") -> str:
    """Return a table as plain text: numbers to the right, the last column wrapped to what is left of the line."""
    from rich import box  # a tenth of a second that --help does without
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    for at, name in enumerate(header):
        numbers = bool(rows) and all(isinstance(row[at], int) for row in rows)
        grid.add_column(name, justify="right" if numbers else "left", no_wrap=at < len(header) - 1)
    for row in rows:
        grid.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    console = Console(width=width(), color_system=None, file=io.StringIO(), legacy_windows=False)
    console.print(Padding(grid, (0, 0, 0, len(indent))))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

"""The charts of the comparison page: inline SVG, coloured by the page's CSS variables, readable without a script.

Every function returns one `<svg>` as Markup; all text in it is escaped. Sizes are in the SVG's own units; the page
scales it to the column.
"""

from markupsafe import Markup, escape

WIDTH = 560


def _svg(height: float, title: str, parts: list[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _text(x: float, y: float, text: object, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def compliance(rows: list[dict]) -> Markup:
    """Draw one stacked bar an arm: ``rows`` are {"label", "arm", "parts": [(class, title, share)]}, shares of 1."""
    left, bar, gap = 130, 26, 16
    parts, y = [], 8.0
    for row in rows:
        parts.append(_text(left - 8, y + bar * 0.68, row["label"], "end"))
        x = float(left)
        for name, title, share in row["parts"]:
            width = share * (WIDTH - left - 8)
            if width <= 0:
                continue
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{bar}" class="part-{escape(name)}">'
                f"<title>{escape(title)}: {100 * share:.1f}%</title></rect>"
            )
            if width > 40:
                parts.append(_text(x + width / 2, y + bar * 0.68, f"{100 * share:.0f}%", "middle", "on"))
            x += width
        y += bar + gap
    return _svg(y, "Share of outputs by what is wrong with them", parts)


def scatter(points: list[dict], low: float = 0, high: float = 10) -> Markup:
    """Draw overall scores: ``points`` are {"arm", "x": reference, "y": output, "title"}."""
    size, left, top = 330, 46, 10
    x_at = lambda value: left + (value - low) / (high - low) * size  # noqa: E731
    y_at = lambda value: top + size - (value - low) / (high - low) * size  # noqa: E731
    parts = []
    for tick in range(int(low), int(high) + 1, 2):
        parts += [
            _line(x_at(tick), top, x_at(tick), top + size),
            _line(left, y_at(tick), left + size, y_at(tick)),
            _text(x_at(tick), top + size + 16, tick, "middle", "small"),
            _text(left - 8, y_at(tick) + 4, tick, "end", "small"),
        ]
    parts.append(_line(x_at(low), y_at(low), x_at(high), y_at(high), "ideal"))
    parts.append(_text(left + size / 2, top + size + 34, "reference's overall score", "middle", "small"))
    parts.append(_text(left + size + 14, top + 14, "on the line: as the reference", "start", "small"))
    for number, arm in enumerate(dict.fromkeys(point["arm"] for point in points)):
        y = top + 38 + 20 * number
        parts.append(f'<circle cx="{left + size + 20}" cy="{y - 4}" r="5" class="dot arm-{escape(arm)}"/>')
        parts.append(_text(left + size + 32, y, next(p["label"] for p in points if p["arm"] == arm)))
    for point in points:
        shift = {"base": -2.5, "candidate": 2.5}.get(point["arm"], 0)  # equal scores stay visible side by side
        parts.append(
            f'<circle cx="{x_at(point["x"]) + shift:.1f}" cy="{y_at(point["y"]):.1f}" r="5" '
            f'class="dot arm-{escape(point["arm"])}"><title>{escape(point["title"])}</title></circle>'
        )
    return _svg(top + size + 44, "Overall score: output against reference", parts)


def strips(rows: list[dict], unit: str, title: str, bound: float | None = None) -> Markup:
    """Draw a value a photograph as dots, the median as a bar: ``rows`` are {"arm", "label", "values"}."""
    left, line, top = 130, 44, 14
    highest = max([value for row in rows for value in row["values"]] + ([bound] if bound else []), default=1) or 1
    scale = (WIDTH - left - 24) / (highest * 1.08)
    parts, bottom = [], top + line * len(rows)
    step = _step(highest)
    tick = 0.0
    while tick <= highest * 1.08:
        parts += [
            _line(left + tick * scale, top, left + tick * scale, bottom),
            _text(left + tick * scale, bottom + 16, f"{tick:g} {unit}", "middle", "small"),
        ]
        tick += step
    if bound:
        parts.append(_line(left + bound * scale, top - 6, left + bound * scale, bottom, "bound"))
        parts.append(_text(left + bound * scale - 4, top - 2, "gate", "end", "small"))
    for number, row in enumerate(rows):
        y = top + line * (number + 0.5)
        parts.append(_text(left - 8, y + 4, row["label"], "end"))
        values = sorted(row["values"])
        for value in values:
            parts.append(
                f'<circle cx="{left + value * scale:.1f}" cy="{y:.1f}" r="4.5" class="dot arm-{escape(row["arm"])}">'
                f"<title>{value:.3g} {escape(unit)}</title></circle>"
            )
        if values:
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            parts.append(
                _line(left + middle * scale, y - 14, left + middle * scale, y + 14, f"median arm-{row['arm']}")
            )
    return _svg(bottom + 24, title, parts)


def dumbbells(rows: list[dict], unit: str, title: str) -> Markup:
    """Draw base and candidate of each photograph joined by a line: ``rows`` are {"label", "base", "candidate"}."""
    left, line, top = 130, 18, 10
    values = [row[arm] for row in rows for arm in ("base", "candidate")]
    low, high = min(values, default=0), max(values, default=1)
    low, high = low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)
    scale = (WIDTH - left - 16) / (high - low)
    parts, bottom = [], top + line * len(rows)
    step, tick = _step(high - low), 0.0
    tick = step * (int(low / step) + (low > 0))
    while tick <= high:
        x = left + (tick - low) * scale
        parts += [_line(x, top - 4, x, bottom), _text(x, bottom + 16, f"{tick:g}", "middle", "small")]
        tick += step
    for number, row in enumerate(rows):
        y = top + line * (number + 0.5)
        ends = [left + (row[arm] - low) * scale for arm in ("base", "candidate")]
        parts.append(_text(left - 8, y + 4, row["label"], "end", "small"))
        parts.append(_line(ends[0], y, ends[1], y, "better" if row["candidate"] <= row["base"] else "worse"))
        for arm, x in zip(("base", "candidate"), ends, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="dot arm-{arm}">'
                f"<title>{arm}: {row[arm]:.4f} {escape(unit)}</title></circle>"
            )
    return _svg(bottom + 24, title, parts)


def interval(low: float, value: float, high: float, reach: float, good: bool | None) -> Markup:
    """Draw a difference and its interval about zero as a sparkline; ``reach`` is what the half width stands for."""
    width, height, middle = 120, 18, 60
    at = lambda x: middle + max(-1.0, min(1.0, x / (reach or 1))) * (middle - 6)  # noqa: E731
    kind = "none" if good is None else "better" if good else "worse"
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f"{_line(middle, 1, middle, height - 1, 'grid')}{_line(at(low), 9, at(high), 9, f'span {kind}')}"
        f'<circle cx="{at(value):.1f}" cy="9" r="3.5" class="point {kind}"/></svg>'
    )


def _step(highest: float) -> float:
    """Return a round distance between ticks that gives some five of them."""
    unit = 10.0 ** len(str(int(highest))) / 10 if highest >= 1 else 10.0 ** -len(str(int(1 / max(highest, 1e-9))))
    return next(unit * part for part in (0.1, 0.2, 0.5, 1, 2, 5, 10) if highest / (unit * part) <= 6)

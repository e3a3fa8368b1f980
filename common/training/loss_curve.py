"""The loss curve as a picture: training and validation loss over steps, and the learning rate below them."""

import math

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SCALE = 960, 600, 2  # drawn twice as large and reduced, which smooths the lines
INK, FAINT, GRID = "#1f2328", "#6b7280", "#e5e7eb"
TRAIN, TRAIN_FAINT, VALIDATION, RATE = "#2563eb", "#bfd3fb", "#dc2626", "#0f766e"


def draw_loss_curve(rows: list[dict]) -> Image.Image:
    """Return the picture (RGB, WIDTH x HEIGHT) of a training log's rows, as `progress.TrainingLog` keeps them.

    Pillow draws it, which is here anyway for the photographs; a plotting library would be the largest dependency.
    """
    train = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    validation = [(row["step"], row["loss"]) for row in rows if row["kind"] == "validation"]
    rates = [(row["step"], row["learning_rate"]) for row in rows if row["kind"] == "train"]
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    losses = [loss for _, loss in train + validation if math.isfinite(loss)]
    last = max([step for step, _ in train + validation], default=1)
    upper = _Panel(picture, (70, 50, WIDTH - 25, 400), (0, max(last, 1)), _range(losses))
    lower = _Panel(
        picture, (70, 455, WIDTH - 25, 555), (0, max(last, 1)), (0.0, max([r for _, r in rates], default=1.0))
    )
    upper.frame("loss", "{:.3g}")
    lower.frame("learning rate", "{:.1e}", label_steps=True)
    upper.line(train, TRAIN_FAINT, 1.5)
    upper.line(_smoothed(train), TRAIN, 2.5)
    upper.line(validation, VALIDATION, 2.5, dots=True)
    lower.line(rates, RATE, 2.0)
    upper.key([("training", TRAIN, train), ("validation", VALIDATION, validation)])
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return a running mean whose memory is a twentieth of the run, so that noise does not hide the course."""
    keep = 1 - 1 / max(1.0, len(points) / 20)
    smooth, weight, result = 0.0, 0.0, []
    for step, value in points:
        smooth, weight = keep * smooth + (1 - keep) * value, keep * weight + (1 - keep)
        result.append((step, smooth / weight))
    return result


class _Panel:
    """A plot area in pixels of the finished picture."""

    def __init__(self, picture: Image.Image, box: tuple, xs: tuple[float, float], ys: tuple[float, float]):
        self.draw, self.box, self.xs, self.ys = ImageDraw.Draw(picture), box, xs, ys
        self.font = ImageFont.load_default(13 * SCALE)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        across = (x - self.xs[0]) / ((self.xs[1] - self.xs[0]) or 1)
        up = (y - self.ys[0]) / ((self.ys[1] - self.ys[0]) or 1)
        return SCALE * (left + across * (right - left)), SCALE * (bottom - up * (bottom - top))

    def frame(self, title: str, form: str, label_steps: bool = False) -> None:
        left, top, right, bottom = (SCALE * side for side in self.box)
        for value in _ticks(*self.ys):
            _, y = self._at(0, value)
            self.draw.line([(left, y), (right, y)], GRID, SCALE)
            self.draw.text((left - 8 * SCALE, y), form.format(value) if value else "0", FAINT, self.font, anchor="rm")
        for value in _ticks(*self.xs, whole=True):
            x, _ = self._at(value, 0)
            self.draw.line([(x, top), (x, bottom)], GRID, SCALE)
            if label_steps:
                self.draw.text((x, bottom + 6 * SCALE), f"{value:.0f}", FAINT, self.font, anchor="ma")
        self.draw.text((left, top - 10 * SCALE), title, INK, self.font, anchor="ls")
        if label_steps:
            self.draw.text((right, top - 10 * SCALE), "step", FAINT, self.font, anchor="rs")

    def line(self, points: list[tuple[int, float]], colour: str, width: float, dots: bool = False) -> None:
        places = [self._at(x, y) for x, y in points if math.isfinite(y)]
        if len(places) > 1:
            self.draw.line(places, colour, round(width * SCALE), joint="curve")
        for x, y in places if dots or len(places) == 1 else ():
            radius = 4 * SCALE
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def key(self, entries: list[tuple[str, str, list]]) -> None:
        """Name the lines, with their latest values, at the upper right."""
        right, y = SCALE * self.box[2], SCALE * (self.box[1] - 22)
        for name, colour, points in reversed([entry for entry in entries if entry[2]]):
            text = f"{name} {points[-1][1]:.3f}"
            right -= self.draw.textlength(text, self.font)
            self.draw.text((right, y), text, INK, self.font, anchor="lm")
            self.draw.line([(right - 30 * SCALE, y), (right - 8 * SCALE, y)], colour, 3 * SCALE)
            right -= 52 * SCALE


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about five round values from ``low`` to ``high``."""
    rough = max((high - low) / 5, 1e-12)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]

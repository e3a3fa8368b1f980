"""The sample's photographs: what each shows, how it is drawn, and what a critic says of it.

Used by make_tree.py (photographs and jobs) and make_tiny_model.py (text for the tokenizer, pictures to look at).
What a critic says follows from what can be seen, so that a model can learn it from the picture alone:
the brighter the picture the higher Lighting, the sharper the higher Focus & Sharpness, and so on.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from integration.lora_patch.specification import DIMENSIONS7 as DIMENSIONS

KINDS = ("mountain", "lake", "dunes", "forest", "canyon", "street", "still life", "boat")

# kind -> sky at the top, sky at the horizon, ground, subject (RGB, before light and colour are applied)
PALETTES = {
    "mountain": ((64, 110, 190), (190, 205, 225), (96, 104, 84), (120, 116, 128)),
    "lake": ((84, 146, 206), (206, 220, 226), (52, 104, 150), (44, 88, 60)),
    "dunes": ((110, 160, 214), (236, 214, 176), (222, 176, 110), (196, 138, 72)),
    "forest": ((140, 170, 150), (196, 208, 172), (70, 92, 46), (34, 84, 40)),
    "canyon": ((150, 120, 170), (236, 196, 186), (150, 66, 46), (196, 88, 52)),
    "street": ((150, 156, 172), (214, 196, 178), (92, 90, 94), (170, 74, 58)),
    "still life": ((112, 92, 82), (150, 124, 104), (118, 70, 40), (208, 60, 44)),
    "boat": ((236, 130, 96), (255, 208, 130), (70, 56, 110), (240, 236, 226)),
}


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn. light, sharp, color and place lie in 0..1; planes is 1, 2 or 3."""

    kind: str
    light: float
    sharp: float
    color: float
    place: float  # where the subject stands, 0 the left edge, 1 the right one
    planes: int  # how many planes lie behind one another
    upright: bool
    seed: int


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn by chance."""
    light = rng.random()
    return Scene(
        kind=rng.choice(KINDS),
        light=light,
        # dim light costs sharpness and colour, as it does outdoors
        sharp=0.5 * light + 0.5 * rng.random(),
        color=0.5 * light + 0.5 * rng.random(),
        place=rng.uniform(0.06, 0.94),
        planes=rng.randint(1, 3),
        upright=rng.random() < 0.25,
        seed=rng.getrandbits(32),
    )


# ---------------------------------------------------------------------------------------------------- drawing


def draw(scene: Scene, long_side: int = 480) -> Image.Image:
    """The photograph of a scene: RGB, long_side by three quarters of it (upright scenes the other way round)."""
    width, height = (long_side * 3 // 4, long_side) if scene.upright else (long_side, long_side * 3 // 4)
    rng = random.Random(scene.seed)
    top, low, ground, subject = (np.array(color, dtype=np.float32) for color in PALETTES[scene.kind])
    horizon = int(height * rng.uniform(0.4, 0.68))
    fall = np.linspace(0, 1, horizon, dtype=np.float32)[:, None, None]
    near = np.linspace(1, 0.6, height - horizon, dtype=np.float32)[:, None, None]
    sky = (top * (1 - fall) + low * fall) * np.ones((1, width, 1), dtype=np.float32)
    land = ground * near * np.ones((1, width, 1), dtype=np.float32)
    picture = Image.fromarray(np.concatenate([sky, land]).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for plane in range(scene.planes):
        # each farther plane stands higher and takes more of the sky's colour
        haze = (scene.planes - plane) / (scene.planes + 1)
        color = tuple(int(v) for v in subject * (1 - haze) * 0.8 + low * haze)
        base = horizon - int(height * 0.05 * (scene.planes - 1 - plane))
        ridge = [(0, height if plane else horizon)]
        for step in range(9):
            ridge.append((width * step // 8, base - int(height * rng.uniform(0.0, 0.09))))
        ridge.append((width, height if plane else horizon))
        if plane < scene.planes - 1:
            pen.polygon([(x, min(y, horizon)) for x, y in ridge], fill=color)
    _draw_chance(pen, rng, width, height, horizon, low, ground)
    _draw_subject(pen, scene, rng, width, height, horizon, tuple(int(v) for v in subject))
    # the grain of a fixed sensor: a smaller print averages it out
    grain = np.random.default_rng(scene.seed).normal(0, long_side / 70, (height, width, 1)).astype(np.float32)
    picture = Image.fromarray(np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8))
    picture = ImageEnhance.Color(picture).enhance(0.25 + 1.65 * scene.color)
    if scene.sharp < 0.97:
        picture = picture.filter(ImageFilter.GaussianBlur((1 - scene.sharp) * long_side / 36))
    return ImageEnhance.Brightness(picture).enhance(0.25 + 1.2 * scene.light)


def _draw_subject(pen, scene: Scene, rng: random.Random, width: int, height: int, horizon: int, color) -> None:
    """The subject of the picture, upon the horizon at scene.place."""
    x, size = int(width * scene.place), int(min(width, height) * rng.uniform(0.26, 0.34))
    dark = tuple(v // 2 for v in color)
    left, right, base = x - size // 2, x + size // 2, horizon + size // 3
    if scene.kind == "mountain":
        pen.polygon([(x - size, base), (x, horizon - size), (x + size, base)], fill=color)
        pen.polygon([(x, horizon - size), (x + size, base), (x + size // 6, base)], fill=dark)
        pen.polygon(
            [(x - size // 5, horizon - size * 4 // 5), (x, horizon - size), (x + size // 5, horizon - size * 4 // 5)],
            fill=(240, 240, 244),
        )
    elif scene.kind == "lake":
        pen.ellipse([0, horizon + 4, width, height + size], fill=(70, 130, 180))
        for tree in range(3):
            foot = left + tree * size // 2
            pen.polygon([(foot - size // 6, base), (foot, horizon - size // 2), (foot + size // 6, base)], fill=color)
    elif scene.kind == "dunes":
        pen.polygon([(x - size * 2, base), (x, horizon - size // 3), (x + size * 2, base)], fill=color)
        pen.polygon([(x, horizon - size // 3), (x + size * 2, base), (x + size // 3, base)], fill=dark)
    elif scene.kind == "forest":
        for tree in range(5):
            foot = x + (tree - 2) * size // 3
            pen.rectangle([foot - size // 20, horizon - size // 2, foot + size // 20, base], fill=(60, 42, 30))
            pen.ellipse([foot - size // 5, horizon - size, foot + size // 5, horizon - size // 4], fill=color)
    elif scene.kind == "canyon":
        edge = 0 if scene.place < 0.5 else width
        pen.polygon([(edge, horizon - size), (x, horizon - size * 3 // 4), (x, base), (edge, base)], fill=color)
        pen.line([(0, base), (width, base)], fill=(232, 150, 110), width=max(2, size // 14))
    elif scene.kind == "street":
        for house in range(3):
            foot = left + house * size // 2 - size // 4
            roof = horizon - size + house * size // 6
            pen.rectangle([foot, roof, foot + size * 2 // 5, base], fill=color if house % 2 else dark)
            pen.rectangle(
                [foot + size // 8, roof + size // 6, foot + size // 4, roof + size // 3], fill=(250, 226, 140)
            )
    elif scene.kind == "still life":
        pen.rectangle([0, horizon + size // 4, width, height], fill=(84, 50, 30))
        for fruit, tint in enumerate((color, (230, 170, 40), (110, 150, 50))):
            foot = x + (fruit - 1) * size // 2
            pen.ellipse([foot - size // 3, horizon - size // 4, foot + size // 3, horizon + size // 3], fill=tint)
    else:
        pen.polygon([(left, horizon), (right, horizon), (right - size // 5, base), (left + size // 5, base)], fill=dark)
        pen.polygon([(x, horizon - size), (x, horizon - 4), (right, horizon - 4)], fill=color)


def _draw_chance(pen, rng: random.Random, width: int, height: int, horizon: int, low, ground) -> None:
    """Clouds and stones where they happen to be: two pictures of one subject differ as two photographs do."""
    cloud = tuple(int(v) for v in np.minimum(low * 1.12, 255))
    for _ in range(rng.randint(0, 5)):
        x, y, size = rng.randrange(width), rng.randrange(max(1, horizon // 2)), rng.uniform(0.05, 0.16) * width
        pen.ellipse([x - size * 1.6, y - size * 0.4, x + size * 1.6, y + size * 0.4], fill=cloud)
    for _ in range(rng.randint(0, 6)):
        x, y = rng.randrange(width), rng.randint(horizon + (height - horizon) // 3, height)
        size, shade = rng.uniform(0.02, 0.1) * width, rng.uniform(0.35, 1.3)
        stone = tuple(int(min(v * shade, 255)) for v in ground)
        pen.ellipse([x - size, y - size * 0.6, x + size, y + size * 0.6], fill=stone)


# ---------------------------------------------------------------------------------------------------- judging


def scores(scene: Scene) -> list[int]:
    """One score of 1 to 10 for each of DIMENSIONS, from what can be seen in the picture."""
    off_third = min(abs(scene.place - 1 / 3), abs(scene.place - 2 / 3))
    composition = 8 - round(16 * off_third)
    lighting = 2 + round(7 * scene.light)
    return [
        composition,
        lighting,
        2 + round(7 * scene.sharp),
        2 + round(7 * scene.color),
        (4, 6, 7)[scene.planes - 1],
        8 - round(8 * abs(scene.place - 0.5)),
        round((composition + lighting) / 2),
    ]


# dimension -> for a low, a middling and a high score: (comment, recommendation); {it} is the subject
ADAMS = {
    "Composition": (
        (
            "Pushed to the edge, the {it} slides out of the frame.",
            "Step aside and bring the subject to a line of thirds.",
        ),
        (
            "Placed with care, the {it} still waits for a line that leads to it.",
            "Let something in the foreground lead the eye.",
        ),
        ("Resting upon the third, the {it} holds the whole frame.", "Stay here and wait for a cleaner edge."),
    ),
    "Lighting": (
        (
            "Under so dim a light the {it} sinks and the shadows block up.",
            "Expose for the shadows and place them on Zone III.",
        ),
        ("Even light describes the {it} without carving it.", "Wait for light from the side."),
        (
            "Brilliant light models the {it} up to the high values.",
            "Hold texture in the whites by placing them on Zone VIII.",
        ),
    ),
    "Focus & Sharpness": (
        (
            "Soft all over, the {it} looks as if the camera had moved.",
            "Set the camera on a tripod and focus with a loupe.",
        ),
        ("Nearly sharp, the {it} loses its far edge.", "Stop down until near and far agree."),
        ("Crisp in every part, the {it} stands clear to the horizon.", "Print it large, the negative will bear it."),
    ),
    "Color Harmony": (
        ("Drained almost to gray, the {it} asks for stronger tones.", "Use a red filter so that the grays separate."),
        ("Quiet hues lie upon the {it} and none speaks first.", "Choose one hue and let the others yield."),
        ("Rich hues ring through the {it} and answer each other.", "Guard these hues when the print is made."),
    ),
    "Depth & Perspective": (
        ("Flat as a wall, the {it} stands before an empty ground.", "Bring a near stone into the frame."),
        ("Behind the {it} a second plane begins to open the space.", "Climb higher so that the planes unfold."),
        ("Plane upon plane recedes behind the {it} into the haze.", "Let the haze set the planes apart."),
    ),
    "Visual Balance": (
        ("All the weight falls to the side of the {it}.", "Answer it with a form on the empty side."),
        ("Leaning to one side, the {it} is steadied by the sky.", "Give the sky a little more room."),
        ("In calm balance, the {it} and the open sky weigh the same.", "Keep this calm between earth and sky."),
    ),
    "Emotional Impact": (
        (
            "Recorded but not yet felt, the {it} leaves the viewer outside.",
            "Ask what the place meant to you before the next exposure.",
        ),
        ("About the {it} gathers a quiet mood.", "Return in weather and deepen the mood."),
        ("Grand and silent, the {it} stays with the viewer.", "Make a second print with darker skies."),
    ),
}


def level(score: int) -> int:
    """0 for a low score, 1 for a middling one, 2 for a high one."""
    return 0 if score <= 4 else 1 if score <= 6 else 2


def side(scene: Scene) -> str:
    """Where the subject stands, in a word."""
    return "left" if scene.place < 0.4 else "right" if scene.place > 0.6 else "middle"


def describe(scene: Scene) -> str:
    """The picture in one sentence: kind, light, colour, place of the subject."""
    light = ("dark", "evenly lit", "bright")[level(scores(scene)[1])]
    color = ("gray", "muted", "colorful")[level(scores(scene)[3])]
    return f"A {light}, {color} photograph of a {scene.kind}, with the subject on the {side(scene)} of the frame."


def critique(scene: Scene) -> dict:
    """What the sample's Ansel Adams says of the picture: the object that the service's system prompt asks for."""
    given = scores(scene)
    dimensions = []
    for name, score in zip(DIMENSIONS, given, strict=True):
        comment, advice = ADAMS[name][level(score)]
        dimensions.append(
            {
                "name": name,
                "score": score,
                "comment": comment.format(it=scene.kind),
                "recommendation": advice,
            }
        )
    best = sorted(range(len(given)), key=lambda i: (-given[i], i))
    named = [name.lower() for name in DIMENSIONS]
    return {
        "image_description": describe(scene),
        "dimensions": dimensions,
        "overall_score": round(sum(given) / len(given), 1),
        # the first of two never reads like the second: a model of two layers cannot count
        "key_strengths": [f"Above all the {named[best[0]]}.", f"And with it the {named[best[1]]}."],
        "priority_improvements": [f"First the {named[best[-1]]}.", f"And then the {named[best[-2]]}."],
        "technical_notes": f"The {scene.kind} lies on Zone {('III', 'V', 'VII')[level(given[1])]}.",
    }

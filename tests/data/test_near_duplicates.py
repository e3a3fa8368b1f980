"""Near-duplicates: copies of a picture found in whatever form, other pictures left alone, few of all pairs compared."""

import io
import random
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from common.data.keypoints import Keypoints
from common.data.near_duplicates import SIDE, are_near, group_photos, is_thumb, perceptual_hash, thumb_of
from common.errors import UserError
from integration.lora_patch.photo import load_photo
from tests.mondrian_case import picture

COUNT = 30


def thumb(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    buffer.seek(0)
    return thumb_of(load_photo(buffer, 256))


@cache
def photo(seed: int) -> Image.Image:
    """A picture with the spectrum of photographs, a bright sky and soft color; another seed, another picture."""
    rng = np.random.default_rng(seed)
    width, height = (360, 270) if seed % 3 else (240, 320)
    across, down = np.fft.fftfreq(width), np.fft.fftfreq(height)[:, None]
    strength = 1 / np.maximum(np.hypot(across, down), 1 / 400) ** 1.3
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) * strength).real
    light, *tints = noise / noise.std(axis=(1, 2), keepdims=True)
    light = 120 + 40 * light + rng.uniform(-40, 40) * np.linspace(-1, 1, height)[:, None]
    channels = [light + 12 * tints[0], light, light - 12 * tints[1]]
    return Image.fromarray(np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8))


def bordered(image: Image.Image, share: float, color=(255, 255, 255)) -> Image.Image:
    width = round(share * max(image.size))
    result = Image.new("RGB", (image.width + 2 * width, image.height + 2 * width), color)
    result.paste(image, (width, width))
    return result


def cropped(image: Image.Image, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round(width * (1 - right)), round(height * (1 - bottom)))
    )


def tilted(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    return image.rotate(3, Image.Resampling.BICUBIC, expand=True, fillcolor=color)


def lying(image: Image.Image) -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"image": image.transpose(Image.Transpose.ROTATE_90), "exif": exif}


COPIES = {
    "low quality": lambda image: thumb(image, quality=15),
    "half": lambda image: thumb(image.resize((image.width // 2, image.height // 2))),
    "larger": lambda image: thumb(image.resize((900, 700), Image.Resampling.NEAREST)),
    "black and white": lambda image: thumb(image.convert("L")),
    "brighter": lambda image: thumb(image.point(lambda value: min(255, int(value * 1.1)))),
    "lying, as EXIF says": lambda image: thumb(**lying(image)),
    "upside down": lambda image: thumb(image.transpose(Image.Transpose.ROTATE_180)),
    "turned": lambda image: thumb(image.transpose(Image.Transpose.ROTATE_90)),
    "mirrored": lambda image: thumb(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "white border": lambda image: thumb(bordered(image, 0.05)),
    "wide border": lambda image: thumb(bordered(image, 0.15)),
    "black border": lambda image: thumb(bordered(image, 0.05, (0, 0, 0))),
}
CHANGED = {
    "5 % cut off": lambda image: thumb(cropped(image, left=0.05)),
    "10 % cut off": lambda image: thumb(cropped(image, bottom=0.1)),
    "10 % cut off at two sides": lambda image: thumb(cropped(image, left=0.1, top=0.1)),
    "10 % cut off around": lambda image: thumb(cropped(image, 0.1, 0.1, 0.1, 0.1)),
    "5 % cut off around": lambda image: thumb(cropped(image, 0.05, 0.05, 0.05, 0.05)),
    "tilted by 2 degrees": lambda image: thumb(image.rotate(2, Image.Resampling.BICUBIC)),
    "tilted by 3 degrees": lambda image: thumb(
        cropped(image.rotate(-3, Image.Resampling.BICUBIC), 0.03, 0.03, 0.03, 0.03)
    ),
    "tilted on white": lambda image: thumb(tilted(image, (255, 255, 255))),
    "tilted on black": lambda image: thumb(tilted(image, (0, 0, 0))),
    "mirrored and cut": lambda image: thumb(cropped(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), right=0.05)),
}


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    return {f"{seed:02d}": thumb(photo(seed)) for seed in range(COUNT)}


def grouped(originals: dict[str, bytes], change) -> int:
    """Return how many of the pictures are grouped with their copy; no group may hold two pictures."""
    copies = {f"{seed:02d}-copy": change(photo(seed)) for seed in range(COUNT)}
    groups = group_photos({**originals, **copies})
    assert all(len({name[:2] for name in group}) == 1 for group in groups)
    return 2 * COUNT - len(groups)


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_found(originals, how):
    assert grouped(originals, COPIES[how]) == COUNT


@pytest.mark.parametrize("how", CHANGED)
def test_nine_of_ten_cut_and_tilted_copies_are_found(originals, how):
    assert grouped(originals, CHANGED[how]) >= 0.9 * COUNT


def page(seed: int) -> Image.Image:
    """A page of text; another seed, another text."""
    rng = random.Random(seed)
    image = Image.new("RGB", (425, 550), (252, 251, 248))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(10)
    for y in range(40, 510, 14):
        words = ("".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(16))
        draw.text((45, y), " ".join(words)[: rng.choice((70, 70, 70, 30))], fill=(20, 20, 20), font=font)
    return image


ALIKE = {
    "soft": picture,
    "dark": lambda seed: photo(seed).point(lambda value: int(value * 0.04 + 0.5)),
    "foggy": lambda seed: photo(seed).resize((60, 60)).resize((400, 300)).point(lambda value: int(190 + value * 0.12)),
    "pages of text": page,
    "bordered": lambda seed: bordered(photo(seed), 0.1),
    "tilted on white": lambda seed: tilted(photo(seed), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_other_pictures_are_not(kind):
    assert len(group_photos({str(seed): thumb(ALIKE[kind](seed)) for seed in range(COUNT)})) == COUNT


def test_copies_of_dark_and_foggy_pictures_are_found():
    for kind in ("dark", "foggy", "pages of text"):
        pictures = [ALIKE[kind](seed) for seed in range(20)]
        copies = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in pictures]
        assert len(group_photos({str(i): thumb(image, quality=95) for i, image in enumerate(pictures + copies)})) <= 22


def test_pictures_without_structure_go_by_color():
    colors = {"red": (200, 0, 0), "red too": (201, 1, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}
    thumbs = {name: thumb(Image.new("RGB", (64, 64), color)) for name, color in colors.items()}
    assert group_photos(thumbs) == [["blue"], ["red", "red too"], ["white"]]


def test_groups_are_transitive_and_do_not_depend_on_order():
    steps = [Image.blend(photo(1), photo(2), share) for share in (0.0, 0.3, 0.5, 0.7, 1.0)]
    thumbs = {str(i): thumb(step, quality=95) for i, step in enumerate(steps)}
    assert not are_near(thumbs["0"], thumbs["4"])
    assert group_photos(thumbs) == group_photos(dict(reversed(thumbs.items()))) == [["0", "1", "2", "3", "4"]]


def test_the_distance_says_how_much_detail_must_agree():
    image = photo(1)
    other = Image.blend(image, photo(2), 0.3)
    thumbs = {"a": thumb(image), "b": thumb(image), "c": thumb(image, quality=60), "d": thumb(other)}
    assert group_photos(thumbs, 0) == [["a", "b"], ["c"], ["d"]]
    assert group_photos(thumbs, 4) == [["a", "b", "c"], ["d"]]
    assert group_photos(thumbs, 16) == [["a", "b", "c", "d"]]


def frames(luma: np.ndarray) -> list[bytes]:
    """Return thumbnails of brightness float [n, 64, 64]."""
    head = np.array([120, 50, 128, 128], "<f4").tobytes()
    return [head + np.clip(frame, 0, 255).astype(np.uint8).tobytes() for frame in luma]


@cache
def noise(count: int) -> np.ndarray:
    """Return brightness float32 [count, 64, 64] of different pictures with the spectrum of photographs."""
    rng = np.random.default_rng(0)
    frequency = np.maximum(np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)), 1 / SIDE)
    found = np.empty((count, SIDE, SIDE), np.float32)
    for at in range(count):
        drawn = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIDE, SIDE))) / frequency**1.3).real
        found[at] = np.clip(128 + 32 * drawn / drawn.std(), 0, 255)
    return found


def test_comparing_grows_with_the_pictures_and_not_with_their_square(monkeypatch):
    compared = [0]
    matching = Keypoints._matching

    def counting(self, one, two):
        compared[-1] += len(one)
        return matching(self, one, two)

    monkeypatch.setattr(Keypoints, "_matching", counting)
    for count in (100, 400):
        assert len(Keypoints(noise(800)[:count].astype(np.uint8)).candidates()) < 0.003 * count**2
        compared.append(0)
    assert 3 * compared[0] < compared[1] < 5 * compared[0]


def test_hundreds_of_copies_of_one_picture():
    base = np.frombuffer(thumb(photo(1)), np.uint8)[-SIDE * SIDE :].reshape(SIDE, SIDE).astype(float)
    copies = frames(base + np.random.default_rng(0).integers(-2, 3, (600, SIDE, SIDE)))
    assert len(group_photos({f"{i:04d}": data for i, data in enumerate(copies)})) == 1
    assert len(group_photos({f"{i:05d}": copies[0] for i in range(20_000)})) == 1


def test_copies_are_found_among_many_others():
    others = {f"other{i}": data for i, data in enumerate(frames(noise(800)))}
    assert all(map(is_thumb, others.values()))
    copies = [(thumb(photo(seed)), CHANGED["tilted on white"](photo(seed))) for seed in range(20)]
    thumbs = {f"{i} {kind}": data for i, pair in enumerate(copies) for kind, data in zip("ab", pair, strict=True)}
    groups = group_photos({**others, **thumbs})
    assert all(len({name.split()[0] for name in group}) == 1 for group in groups)
    assert len(groups) <= 800 + 22


def test_the_hash_is_stable():
    hashes = [perceptual_hash(thumb(image)) for image in (photo(3), photo(3).resize((180, 140)), photo(4))]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 6 < 16 <= (hashes[0] ^ hashes[2]).bit_count()


def test_an_opencv_that_does_not_load_is_one_line(monkeypatch):
    """As on a server without libGL whose packages were not installed by make."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r'OpenCV does not load \(.*cv2.*\); run "make setup" again'):
        group_photos({str(seed): thumb(picture(seed)) for seed in range(2)})

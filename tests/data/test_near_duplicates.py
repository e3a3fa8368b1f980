"""Near-duplicates: copies of a picture found in whatever form, other pictures left alone, in less than n squared."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from common.data.near_duplicates import THUMB_BYTES, group_photos, near_pairs, perceptual_hash, thumb_of
from integration.lora_patch.photo import load_photo
from tests.mondrian_case import picture


def thumb(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    buffer.seek(0)
    return thumb_of(load_photo(buffer, 256))


def lying(image: Image.Image) -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"image": image.transpose(Image.Transpose.ROTATE_90), "exif": exif}


COPIES = {
    "low quality": lambda image: thumb(image, quality=15),
    "half": lambda image: thumb(image.resize((80, 60))),
    "a tenth": lambda image: thumb(image.resize((16, 12))),
    "larger": lambda image: thumb(image.resize((640, 480), Image.Resampling.NEAREST)),
    "black and white": lambda image: thumb(image.convert("L")),
    "brighter": lambda image: thumb(image.point(lambda value: min(255, int(value * 1.1)))),
    "lying, as EXIF says": lambda image: thumb(**lying(image)),
    "turned": lambda image: thumb(image.transpose(Image.Transpose.ROTATE_180)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_found(how):
    originals = {f"{seed:02d}": thumb(picture(seed)) for seed in range(30)}
    copies = {f"{seed:02d}-copy": COPIES[how](picture(seed)) for seed in range(30)}
    assert group_photos({**originals, **copies}) == [[f"{seed:02d}", f"{seed:02d}-copy"] for seed in range(30)]


def test_other_pictures_are_not():
    assert len(group_photos({str(seed): thumb(picture(seed)) for seed in range(300)})) == 300


def test_pictures_without_structure_go_by_color():
    colors = {"red": (200, 0, 0), "red too": (201, 1, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}
    thumbs = {name: thumb(Image.new("RGB", (64, 64), color)) for name, color in colors.items()}
    assert group_photos(thumbs) == [["blue"], ["red", "red too"], ["white"]]


def test_groups_are_transitive_and_do_not_depend_on_order():
    steps = [Image.blend(picture(1), picture(2), share) for share in (0.0, 0.12, 0.24, 0.36)]
    thumbs = {str(i): thumb(step, quality=95) for i, step in enumerate(steps)}
    assert not near_pairs([thumbs["0"], thumbs["3"]])
    assert group_photos(thumbs) == group_photos(dict(reversed(thumbs.items()))) == [["0", "1", "2", "3"]]


def test_distance_zero_joins_identical_pictures_alone():
    image = picture(1)
    thumbs = {"a": thumb(image), "b": thumb(image), "c": thumb(image, quality=30)}
    assert group_photos(thumbs, 0) == [["a", "b"], ["c"]]


def test_time_grows_with_the_number_of_pictures_not_its_square():
    rng = np.random.default_rng(0)
    strangers = rng.integers(0, 256, (10_000, THUMB_BYTES), dtype=np.uint8)
    start = time.process_time()
    assert near_pairs([row.tobytes() for row in strangers]) == []
    assert time.process_time() - start < 20  # all pairs would be 50 million comparisons


def test_thousands_of_copies_of_one_picture():
    rng = np.random.default_rng(0)
    noise = rng.integers(-2, 3, (3000, THUMB_BYTES))
    copies = np.clip(np.frombuffer(thumb(picture(1)), np.uint8) + noise, 0, 255).astype(np.uint8)
    start = time.process_time()
    assert len(group_photos({f"{i:04d}": row.tobytes() for i, row in enumerate(copies)})) == 1
    assert time.process_time() - start < 20
    assert len(near_pairs([copies[0].tobytes()] * 20_000)) == 19_999


def test_the_hash_is_stable():
    assert perceptual_hash(bytes(range(256)) + bytes(32)) == perceptual_hash(bytes(range(256)) + bytes([9] * 32))

"""From a photograph's file to the picture the model sees: the same in training, evaluation and serving."""

import functools
import math
import os
import warnings

from PIL import Image, ImageOps

MAX_IMAGE_SIZE = 1024  # pixels of the long side: 768 image tokens for a 4:3 photograph, where 12 megapixels give 11,900
MAX_RATIO = 200  # of the sides; the model's own picture processor refuses more
MAX_PIXELS = 200_000_000  # above it a file is taken for a decompression bomb; the largest cameras make 150 megapixels


class PhotoError(ValueError):
    """A file that is no photograph; the message is one line and names the file."""


def load_photo(path: str | os.PathLike, max_image_size: int = MAX_IMAGE_SIZE) -> Image.Image:
    """Read a photograph as 8-bit RGB, upright, its long side at most ``max_image_size`` pixels (never enlarged).

    The EXIF orientation is applied, transparency is laid on white, grey of 16 or 32 bits and floats keep their range.
    Raises PhotoError for a file that is missing, no image, damaged, larger than MAX_PIXELS, or more
    than MAX_RATIO times as long as wide.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF; both are dealt with here
            with Image.open(path, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PhotoError(f"{path}: {image.width} x {image.height} pixels, taken for a decompression bomb")
                # a JPEG is decoded at the nearest larger eighth: a 12-megapixel photograph needs 4 MB instead of 36
                image.draft("RGB", (max_image_size, max_image_size))
                photo = prepare_image(image, max_image_size)
                if max(photo.size) > MAX_RATIO * min(photo.size):
                    raise PhotoError(f"{path}: {image.width} x {image.height} pixels, too long and thin; crop it")
                return photo
    except PhotoError:
        raise
    except FileNotFoundError as error:
        raise PhotoError(f"{path}: no such photograph") from error
    except (OSError, ValueError, SyntaxError, MemoryError, OverflowError, Image.DecompressionBombError) as error:
        raise PhotoError(f"{path}: not a readable photograph ({' '.join(str(error).split())[:120]})") from error


def prepare_image(image: Image.Image, max_image_size: int = MAX_IMAGE_SIZE) -> Image.Image:
    """Return a picture in memory as `load_photo` returns one from a file."""
    return _bounded(_rgb(ImageOps.exif_transpose(image)), max_image_size)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips all that is above 255 to white
        grey = image.convert("F")
        white = 65535 if image.mode.startswith("I;16") else _white(grey.getextrema()[1], image.mode == "F")
        return grey.point(lambda value: value * (255.5 / white)).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@functools.lru_cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow reads, less PostScript: for it Pillow starts another program, Ghostscript."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def _white(brightest: float, is_float: bool) -> float:
    """Return the value that stands for white in 32-bit grey, which has no fixed one: the least usual one that fits."""
    if not 0 < brightest < math.inf:  # all black, or not finite
        return 1.0
    return next((top for top in (1.0, 255.0, 65535.0)[not is_float :] if brightest <= top), brightest)


def _bounded(image: Image.Image, max_image_size: int) -> Image.Image:
    longest = max(image.size)
    if longest <= max_image_size:
        return image
    size = [max(1, round(side * max_image_size / longest)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)

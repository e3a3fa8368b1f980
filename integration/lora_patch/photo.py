"""From a photograph's file to the picture the model sees: the same in training, evaluation and serving."""

import os
import warnings

from PIL import Image, ImageOps

MAX_IMAGE_SIZE = 1024  # pixels of the long side: 768 image tokens for a 4:3 photograph, where 12 megapixels give 11,900
MAX_PIXELS = 200_000_000  # above it a file is taken for a decompression bomb; the largest cameras make 150 megapixels


class PhotoError(ValueError):
    """A file that is no photograph; the message is one line and names the file."""


def load_photo(path: str | os.PathLike, max_image_size: int = MAX_IMAGE_SIZE) -> Image.Image:
    """Read a photograph as 8-bit RGB, upright, its long side at most ``max_image_size`` pixels (never enlarged).

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey keeps its range.
    Raises PhotoError for a file that is missing, no image, damaged, or larger than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF; both are dealt with here
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PhotoError(f"{path}: {image.width} x {image.height} pixels, taken for a decompression bomb")
                # a JPEG is decoded at the nearest larger eighth: a 12-megapixel photograph needs 4 MB instead of 36
                image.draft("RGB", (max_image_size, max_image_size))
                return prepare_image(image, max_image_size)
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
    if image.mode.startswith(("I", "F")):  # 16-bit grey; Pillow's own conversion clips it to white
        return image.convert("F").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _bounded(image: Image.Image, max_image_size: int) -> Image.Image:
    longest = max(image.size)
    if longest <= max_image_size:
        return image
    size = [max(1, round(side * max_image_size / longest)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)

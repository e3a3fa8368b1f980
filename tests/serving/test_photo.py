"""One function turns any photograph into the picture the model sees."""

import numpy as np
import pytest
from PIL import Image

from integration.lora_patch.photo import PhotoError, load_photo


def halves(size=(400, 200)):
    """Return a picture whose left half is red and whose right half is blue."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to see it
    halves().save(tmp_path / "portrait.jpg", exif=exif, quality=95)
    photo = load_photo(tmp_path / "portrait.jpg")
    assert photo.size == (200, 400)
    assert photo.getpixel((100, 50))[0] > 200 and photo.getpixel((100, 350))[2] > 200  # red on top of blue


@pytest.mark.parametrize(
    ("size", "bound", "expected"),
    [((4032, 3024), 1024, (1024, 768)), ((3024, 4032), 1024, (768, 1024)), ((640, 480), 1024, (640, 480)),
     ((5000, 30), 1024, (1024, 6))],
)  # fmt: skip
def test_the_long_side_is_bounded_and_never_enlarged(tmp_path, size, bound, expected):
    Image.new("RGB", size, "gray").save(tmp_path / "photo.jpg")
    assert load_photo(tmp_path / "photo.jpg", bound).size == expected


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (10, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_photo(tmp_path / "clear.png").getpixel((5, 5)) == (255, 255, 255)
    palette = Image.new("P", (10, 10), 0)
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert load_photo(tmp_path / "clear.gif").getpixel((5, 5)) == (255, 255, 255)


def test_16_bit_grey_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (8, 1))).save(tmp_path / "scan.png")
    photo = np.asarray(load_photo(tmp_path / "scan.png"))
    assert photo.shape == (8, 256, 3)
    assert np.abs(photo[0, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("top", "kind"),
    [(1.0, np.float32), (255.0, np.float32), (65535.0, np.float32), (3e5, np.float32), (65535, np.int32),
     (255, np.int32), (2**31 - 1, np.int32)],
)  # fmt: skip
def test_32_bit_and_float_pictures_keep_their_range(tmp_path, top, kind):
    ramp = (np.linspace(0, 1, 256) * top).astype(kind)
    Image.fromarray(np.tile(ramp, (8, 1))).save(tmp_path / "scan.tif")
    photo = np.asarray(load_photo(tmp_path / "scan.tif"))
    assert np.abs(photo[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_numbers_that_are_none_do_not_blacken_a_picture(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "none.tif")
    assert load_photo(tmp_path / "none.tif").size == (8, 8)


@pytest.mark.parametrize("size", [(5000, 20), (20, 5000), (4100, 1)])
def test_a_picture_too_thin_for_the_model_is_refused(tmp_path, size):
    Image.new("RGB", size, "gray").save(tmp_path / "thin.png")
    with pytest.raises(PhotoError, match=f"thin.png: {size[0]} x {size[1]} pixels, too long and thin"):
        load_photo(tmp_path / "thin.png")


def test_postscript_behind_a_photographs_name_is_not_run(tmp_path):
    (tmp_path / "print.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(PhotoError, match="not a readable photograph"):
        load_photo(tmp_path / "print.jpg")


def test_cmyk_and_grey_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.jpg")
    assert load_photo(tmp_path / "print.jpg").getpixel((4, 4)) == (255, 255, 255)
    assert load_photo(tmp_path / "grey.jpg").getpixel((4, 4)) == (128, 128, 128)


def test_what_is_no_photograph_is_one_line(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    halves().save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "folder.jpg").mkdir()
    for name in ("page.jpg", "half.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(PhotoError) as error:
            load_photo(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(PhotoError, match="bomb"):
        load_photo(tmp_path / "bomb.png")

"""Which photographs are the same picture: re-encoded, resized, turned, mirrored, framed, cropped or tilted a little.

    groups = group_photos(thumbs)        # thumbs: {sha256: bytes from `thumb_of`}

A picture is known by a thumbnail of 64 x 64 pixels, its brightness freed of exposure and contrast. Two comparisons
follow each other:

- Candidates share keypoints; see `keypoints`. These also tell how one picture lies over the other.
- Decision: from there an affine registration maximizes their correlation (ECC, Evangelidis and Psarakis 2008, in
  OpenCV), and the detail of both is compared: what is left of each where its blurred self is taken away. Copies of real
  photographs agree there by 0.8 and more, different pictures of the same brightness (landscapes, fog, night, pages of
  text) by less than 0.25.

A picture inside a plain border has a second thumbnail, of what the border frames. Groups are transitive: if A is a
near-duplicate of B and B of C, all three are one group, though A and C may differ more.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from common.data.keypoints import Keypoints, opencv

if TYPE_CHECKING:
    from scipy.cluster.hierarchy import DisjointSet

DISTANCE = 10  # default of --duplicate_distance, 0 to 16
THUMB_LOAD = 256  # pixels of the long side at which a photograph is decoded for its thumbnail
SIDE = 64  # pixels of the thumbnail's side
_HEAD = 4  # float32: mean brightness, its standard deviation, mean blue and red difference, all 0..255
_FRAME_BYTES = 4 * _HEAD + SIDE * SIDE
_LEVELS = 32.0  # steps a standard deviation of brightness in the thumbnail's bytes
FLAT = 0.35  # standard deviation of brightness below which a picture has no structure
FLAT_COLOR = 4.0  # levels by which the colors of pictures without structure may differ
_NOISE = 1.0  # strength of detail, in the thumbnail's levels, that may be noise of its making
_MOVED = 0.15  # share of a side by which a corner may be moved: more is no crop of 10% or tilt of 3 degrees
_STEPS = 30  # of registration
_OVERLAP = 0.6  # share of the thumbnail that both pictures must show


# -- thumbnails -------------------------------------------------------------------------------------------------------


def thumb_of(picture: Image.Image) -> bytes:
    """Return the thumbnail of an upright RGB picture; a second one follows where a plain border frames the picture."""
    frames = [picture, *_framed(picture)]
    return b"".join(map(_frame_of, frames))


def is_thumb(data: bytes) -> bool:
    """Tell whether bytes are what `thumb_of` gives."""
    return len(data) in (_FRAME_BYTES, 2 * _FRAME_BYTES)


def perceptual_hash(thumb: bytes) -> int:
    """Return 64 bits: the signs of a thumbnail's lowest 8 x 8 DCT coefficients around their median, as in pHash."""
    from scipy.fft import dctn

    frame = np.frombuffer(thumb, np.uint8, SIDE * SIDE, 4 * _HEAD).reshape(SIDE, SIDE)
    low = dctn(frame.astype(np.float32), norm="ortho")[:8, :8].ravel()[1:]
    return sum(1 << at for at, sign in enumerate(low > np.median(low)) if sign)


def _frame_of(picture: Image.Image) -> bytes:
    luma, *chroma = picture.convert("YCbCr").split()
    small = np.asarray(luma.convert("F").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    tones = [np.asarray(plane, np.float32).mean() for plane in chroma]
    mean, deviation = small.mean(), small.std()
    pixels = (small - mean) * (_LEVELS / max(deviation, 1e-3)) + 128
    head = np.array([mean, deviation, *tones], "<f4")
    return head.tobytes() + np.clip(np.round(pixels), 0, 255).astype(np.uint8).tobytes()


def _framed(picture: Image.Image) -> Iterator[Image.Image]:
    """Yield what a plain border of up to a third of each side frames; nothing where there is no border."""
    luma = np.asarray(picture.convert("L"), np.float32)
    plain = min(6.0, max(0.5, 0.08 * float(luma.std())))
    top, bottom = _border(luma, plain), _border(luma[::-1], plain)
    middle = luma[top : len(luma) - bottom].T
    left, right = _border(middle, plain), _border(middle[::-1], plain)
    if sum(width > 0 for width in (top, bottom, left, right)) >= 3:
        # one pixel more: between border and picture both mix
        yield picture.crop((left + 1, top + 1, picture.width - right - 1, picture.height - bottom - 1))


def _border(lines: np.ndarray, plain: float) -> int:
    """Return how many of the first lines, at most a third, are plain and of one brightness."""
    third = lines[: len(lines) // 3]
    if not third.size:
        return 0
    same = (third.std(axis=1) < plain) & (np.abs(third.mean(axis=1) - third[0].mean()) < 2 * plain)
    return int(np.argmin(same)) if not same.all() else len(same)


# -- decision ---------------------------------------------------------------------------------------------------------


def _agree(one: np.ndarray, other: np.ndarray, start: np.ndarray, agreement: float) -> bool:
    """Tell whether the detail of two thumbnails [64, 64] correlates by ``agreement``, once one is laid over the other.

    ``start`` is the affine map [2, 3] from places in ``one`` to places in ``other`` from which registration starts.
    """
    cv2 = opencv()
    one, other, start = (part.astype(np.float32) for part in (one, other, start))
    if not _is_near(start):
        return False
    if _overlaid(one, other, start) >= agreement:
        return True
    end = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _STEPS, 1e-3)
    with contextlib.suppress(cv2.error):  # which says that it does not converge
        place = cv2.findTransformECC(one, other, start, cv2.MOTION_AFFINE, end, None, 5)[1]
        return _is_near(place) and _overlaid(one, other, place) >= agreement
    return False


def _is_near(place: np.ndarray) -> bool:
    """Tell whether an affine map leaves the corners about where they are."""
    corners = np.array([[0, 1, 0, 1], [0, 0, 1, 1]])
    return bool(np.abs((place[:, :2] - np.eye(2)) @ corners + place[:, 2:] / SIDE).max() <= _MOVED)


def _overlaid(one: np.ndarray, other: np.ndarray, place: np.ndarray) -> float:
    """Return the correlation of detail, -1..1, where both pictures show something."""
    cv2 = opencv()
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(other, place, one.shape[::-1], flags=how, borderMode=cv2.BORDER_REPLICATE)
    shown = cv2.warpAffine(np.ones_like(other), place, one.shape[::-1], flags=how) > 0.99
    shown[[0, 1, -2, -1]] = shown[:, [0, 1, -2, -1]] = False
    if shown.mean() < _OVERLAP:
        return 0.0
    a, b = (_detail(frame, shown.astype(np.float32))[shown] for frame in (one, laid))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum() + 1e-9))


def _detail(frame: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return the detail of a thumbnail where ``shown`` is 1, as strong in its quiet parts as along its edges.

    An outline alone, or lines of text at one distance, would make pictures alike: so each place is divided by the
    strength of the detail around it, and what whole rows and columns share is taken away.
    """
    import cv2

    def around(values: np.ndarray, width: float) -> np.ndarray:
        whole = cv2.GaussianBlur(shown, (0, 0), width)
        return cv2.GaussianBlur(values * shown, (0, 0), width) / np.maximum(whole, 1e-3)

    fine = around(frame, 0.8) - around(frame, 3.3)
    fine = shown * fine / (np.sqrt(around(fine**2, 4.0)) + _NOISE)
    rows, columns = (np.maximum(shown.sum(axis=axis, keepdims=True), 1) for axis in (1, 0))
    return fine - fine.sum(axis=0) / columns - fine.sum(axis=1, keepdims=True) / rows


# -- groups -----------------------------------------------------------------------------------------------------------


def group_photos(thumbs: dict[str, bytes], distance: int = DISTANCE) -> list[list[str]]:
    """Return the groups of near-duplicates among {sha256: thumbnail}, members and groups sorted.

    ``distance`` says how far pictures may differ: their detail must agree by 1 - distance / 50. 0 leaves only
    thumbnails that are the same in every byte.
    """
    from scipy.cluster.hierarchy import DisjointSet

    keys = sorted(thumbs)
    groups = DisjointSet(keys)
    first: dict[bytes, str] = {}
    for key in keys:
        groups.merge(first.setdefault(thumbs[key], key), key)
    if distance > 0 and len(first) > 1:
        data = np.frombuffer(b"".join(first), np.uint8).reshape(-1, _FRAME_BYTES)
        heads = np.ascontiguousarray(data[:, : 4 * _HEAD]).view("<f4")
        counts = [len(thumb) // _FRAME_BYTES for thumb in first]
        owners = np.repeat(list(first.values()), counts)
        is_outer = np.concatenate([[count > 1, False][:count] for count in counts])
        flat = heads[:, 1] < FLAT
        _join_flat(groups, owners[flat].tolist(), heads[flat])
        frames = data[~flat, 4 * _HEAD :].reshape(-1, SIDE, SIDE)
        _join_textured(groups, owners[~flat].tolist(), frames, is_outer[~flat], 1 - distance / 50)
    return sorted(sorted(group) for group in groups.subsets())


def _join_flat(groups: "DisjointSet", owners: list[str], heads: np.ndarray) -> None:
    """Join pictures without structure by brightness and color: neighbours in a grid of cells."""
    cells: dict[tuple, str] = {}
    for owner, cell in zip(owners, np.round(heads[:, [0, 2, 3]] / FLAT_COLOR).astype(int).tolist(), strict=True):
        for step in itertools.product((-1, 0, 1), repeat=3):
            groups.merge(owner, cells.get(tuple(np.add(cell, step)), owner))
        cells.setdefault(tuple(cell), owner)


def _join_textured(
    groups: "DisjointSet", owners: list[str], frames: np.ndarray, is_outer: np.ndarray, agreement: float
) -> None:
    """Join pictures whose detail agrees, but not two with their borders: those may be all that is alike."""
    points = Keypoints(frames)
    for one, two, way in points.candidates():
        if groups.connected(owners[one], owners[two]) or (is_outer[one] and is_outer[two]):
            continue
        place = points.placed(one, two, way)
        if place is not None and _agree(_turn(frames[two], way), frames[one], place, agreement):
            groups.merge(owners[one], owners[two])


def _turn(frame: np.ndarray, way: int) -> np.ndarray:
    """Lay a thumbnail [64, 64] in one of the ways of `Keypoints`."""
    return np.ascontiguousarray(np.rot90(frame[:, ::-1] if way >= 4 else frame, -(way % 4)))


def are_near(one: bytes, other: bytes, distance: int = DISTANCE) -> bool:
    """Tell whether two thumbnails are near-duplicates themselves, not through others."""
    return len(group_photos({"one": one, "other": other}, distance)) == 1

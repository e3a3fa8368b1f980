"""Which photographs are the same picture: re-encoded, resized, turned, mirrored, framed, cropped or tilted a little.

    groups = group_photos(thumbs)        # thumbs: {sha256: bytes from `thumb_of`}

A picture is known by a thumbnail of 64 x 64 pixels, its brightness freed of exposure and contrast. Two comparisons
follow each other:

- Candidates: the lowest DCT coefficients of each thumbnail, in the eight ways to turn and mirror it, and of 15 crops of
  it, as it is and mirrored, are compared with those of every other thumbnail by cosine similarity, as matrix products.
- Decision: a candidate is laid over the other picture by an affine registration that maximizes their correlation
  (ECC, Evangelidis and Psarakis 2008, in OpenCV), and the detail of both is compared: what is left of each where its
  blurred self is taken away. Copies of real photographs agree there by 0.8 and more, different pictures of the same
  brightness (landscapes, fog, night, pages of text) by less than 0.2.

A picture inside a plain border has a second thumbnail, of what the border frames. Groups are transitive: if A is a
near-duplicate of B and B of C, all three are one group, though A and C may differ more.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image

DISTANCE = 10  # default of --duplicate_distance, 0 to 16
THUMB_LOAD = 256  # pixels of the long side at which a photograph is decoded for its thumbnail
SIDE = 64  # pixels of the thumbnail's side
_HEAD = 4  # float32: mean brightness, its standard deviation, mean blue and red difference, all 0..255
_FRAME_BYTES = 4 * _HEAD + SIDE * SIDE
_LEVELS = 32.0  # steps a standard deviation of brightness in the thumbnail's bytes
FLAT = 0.35  # standard deviation of brightness below which a picture has no structure
FLAT_COLOR = 4.0  # levels by which the colors of pictures without structure may differ
_CUT = 0.07  # share of a side that the crops cut off
_COEFFICIENTS = 8
_WHITENING = 0.75  # power of the frequency by which coefficients count: brightness of sky and ground alone says little
_SIMILAR = 0.75  # cosine from which two pictures are candidates: 98.8% of copies have it, 0.01% to 0.3% of other pairs
_BLOCK = 64  # pictures compared with all others at a time
_TRIES = 2  # ways to turn and mirror a candidate that are tried
_NOISE = 1.0  # strength of detail, in the thumbnail's levels, that may be noise of its making
_MOVED = 0.11  # share of a side that registration may move a corner: more is no crop of 10% or tilt of 3 degrees
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
    frame = np.frombuffer(thumb, np.uint8, SIDE * SIDE, 4 * _HEAD).reshape(SIDE, SIDE)
    low = (_BASIS[0] @ (frame.astype(np.float32) - 128) @ _BASIS[0].T).ravel()[1:]
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


# -- candidates -------------------------------------------------------------------------------------------------------


def _basis() -> np.ndarray:
    """Return [4, 8, 64]: the lowest DCT coefficients of a line cut at neither end, its end, its start, both."""
    k = np.arange(_COEFFICIENTS)[:, None]
    rows = []
    for start, end in ((0, 0), (0, _CUT), (_CUT, 0), (_CUT, _CUT)):
        place = ((np.arange(SIDE) + 0.5) / SIDE - start) / (1 - start - end)  # 0..1 within what is left
        rows.append(np.cos(np.pi * k * place) * ((place > 0) & (place < 1)) * np.where(k == 0, np.sqrt(0.5), 1.0))
    return np.stack(rows).astype(np.float32)


_BASIS = _basis()
_K = np.arange(_COEFFICIENTS, dtype=np.float32)
_SIGNS = (-1.0) ** _K
# of the square of coefficients the triangle of the lowest, without brightness itself
_WEIGHTS = np.hypot(_K[:, None], _K) ** _WHITENING * (_K[:, None] + _K < _COEFFICIENTS)


def _descriptors(frames: np.ndarray) -> np.ndarray:
    """Return unit vectors float32 [n, 16, 64] of the thumbnails [n, 64, 64] and their crops, the whole first."""
    lines = _BASIS.reshape(-1, SIDE)
    found = (lines @ frames @ lines.T).reshape(-1, 4, _COEFFICIENTS, 4, _COEFFICIENTS).transpose(0, 1, 3, 2, 4)
    found = (found * _WEIGHTS).reshape(len(frames), 16, -1)
    return found / np.maximum(np.linalg.norm(found, axis=2, keepdims=True), 1e-6)


def _turned(vectors: np.ndarray, way: int) -> np.ndarray:
    """Return descriptors [n, 64] of the pictures turned or mirrored in one of eight ways; see `_turn`."""
    squares = vectors.reshape(-1, _COEFFICIENTS, _COEFFICIENTS)
    if way & 4:
        squares = squares.transpose(0, 2, 1)
    if way & 2:
        squares = squares * _SIGNS[:, None]
    if way & 1:
        squares = squares * _SIGNS
    return squares.reshape(vectors.shape)


def _turn(frame: np.ndarray, way: int) -> np.ndarray:
    """Turn or mirror a thumbnail [64, 64]: 4 swaps the axes, then 2 turns it upside down, 1 mirrors it."""
    frame = frame.T if way & 4 else frame
    frame = frame[::-1] if way & 2 else frame
    return np.ascontiguousarray(frame[:, ::-1] if way & 1 else frame)


def _candidates(crops: np.ndarray, is_outer: np.ndarray, groups: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (frame, other frame, way to turn the other) of pairs whose descriptors are similar, most similar first.

    ``crops`` is [n, 16, 64]. Pairs of one group are skipped, and pairs of pictures with their borders: those may be
    alike for their borders alone. ``groups`` [n] changes as pairs are joined.
    """
    count, kept = len(crops), np.flatnonzero(_WEIGHTS)
    table = np.concatenate([_turned(crops[:, 0], way)[:, kept] for way in range(8)]).T.copy()
    for start in range(0, count, _BLOCK):
        block = crops[start : start + _BLOCK][:, :, kept]
        best = block[:, 0] @ table
        for crop in range(1, 16):
            np.maximum(best[:, : 2 * count], block[:, crop] @ table[:, : 2 * count], out=best[:, : 2 * count])
        at, column = np.nonzero(best > _SIMILAR)
        way, other = np.divmod(column, count)
        one = at + start
        apart = (groups[one] != groups[other]) & ~(is_outer[one] & is_outer[other])
        order = np.argsort(-best[at, column][apart], kind="stable")
        tried: dict[tuple[int, int], int] = defaultdict(int)
        for pair in zip(*(values[apart][order].tolist() for values in (one, other, way)), strict=True):
            if groups[pair[0]] != groups[pair[1]] and tried[pair[:2]] < _TRIES:
                tried[pair[:2]] += 1
                yield pair


# -- decision ---------------------------------------------------------------------------------------------------------


def _agree(one: np.ndarray, other: np.ndarray, start: np.ndarray, agreement: float) -> bool:
    """Tell whether the detail of two thumbnails [64, 64] correlates by ``agreement``, once one is laid over the other.

    ``start`` is the affine map [2, 3] from places in ``one`` to places in ``other`` from which registration starts.
    """
    import cv2  # a fifth of a second that --help does without

    # coarsely first, which tells most different pictures
    halves = [cv2.resize(frame, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA) for frame in (one, other)]
    place, coarse = _registered(*halves, _rescaled(start, 0.5), 25)
    if coarse < agreement / 2:
        return False
    return max(_registered(one, other, start, 0)[1], _registered(one, other, _rescaled(place, 2.0), 15)[1]) >= agreement


def _rescaled(place: np.ndarray, factor: float) -> np.ndarray:
    """Return an affine map [2, 3] for pictures ``factor`` times as large; the first pixel's centre is at 0."""
    center = place[:, :2].sum(axis=1) / 2 - 0.5
    return np.column_stack([place[:, :2], factor * (place[:, 2] + center) - center]).astype(np.float32)


def _registered(one: np.ndarray, other: np.ndarray, start: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
    """Return (the map that registration ends with, or its start if that is better; the correlation of detail there)."""
    import cv2

    found = start, _overlaid(one, other, start)
    if steps:
        end = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-3)
        with contextlib.suppress(cv2.error):  # which says that it does not converge
            place = cv2.findTransformECC(one, other, start.copy(), cv2.MOTION_AFFINE, end, None, 5)[1]
            corners = np.array([[0, 1, 0, 1], [0, 0, 1, 1]]) * len(one)
            moved = (place - start)[:, :2] @ corners + (place - start)[:, 2:]
            if np.abs(moved).max() > _MOVED * len(one):
                return found
            found = max(found, (place, _overlaid(one, other, place)), key=lambda item: item[1])
    return found


def _overlaid(one: np.ndarray, other: np.ndarray, place: np.ndarray) -> float:
    """Return the correlation of detail, -1..1, where both pictures show something."""
    import cv2

    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(other, place, one.shape[::-1], flags=how, borderMode=cv2.BORDER_REPLICATE)
    shown = cv2.warpAffine(np.ones_like(other), place, one.shape[::-1], flags=how) > 0.99
    shown[[0, 1, -2, -1]] = shown[:, [0, 1, -2, -1]] = False
    if shown.mean() < _OVERLAP:
        return 0.0
    a, b = (_detail(frame)[shown] for frame in (one, laid))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum() + 1e-9))


def _detail(frame: np.ndarray) -> np.ndarray:
    """Return the detail of a thumbnail, as strong in its quiet parts as along its edges.

    An outline alone, or lines of text at one distance, would make pictures alike: so each place is divided by the
    strength of the detail around it, and what whole rows and columns share is taken away.
    """
    import cv2

    fine = cv2.GaussianBlur(frame, (0, 0), 0.8)
    fine -= cv2.GaussianBlur(frame, (0, 0), 3.3)
    fine /= np.sqrt(cv2.GaussianBlur(fine**2, (0, 0), 4.0)) + _NOISE
    return fine - fine.mean(axis=0) - fine.mean(axis=1, keepdims=True)


def _start(crop: int) -> np.ndarray:
    """Return the map from places in a thumbnail's crop, spread over the whole square, to places in the thumbnail."""
    cuts = ((0, 0), (0, _CUT), (_CUT, 0), (_CUT, _CUT))
    (top, bottom), (left, right) = cuts[crop // 4], cuts[crop % 4]
    across, down = 1 - left - right, 1 - top - bottom
    return np.float32([[across, 0, left * SIDE + (across - 1) / 2], [0, down, top * SIDE + (down - 1) / 2]])


# -- groups -----------------------------------------------------------------------------------------------------------


def near_pairs(thumbs: list[bytes], distance: int = DISTANCE) -> list[tuple[int, int]]:
    """Return index pairs of near-duplicates: enough of them to connect every group, not all within a group.

    ``distance`` says how far pictures may differ: their detail must agree by 1 - distance / 50. 0 leaves only
    thumbnails that are the same in every byte.
    """
    first: dict[bytes, int] = {}
    pairs = [(first[thumb], i) for i, thumb in enumerate(thumbs) if first.setdefault(thumb, i) != i]
    if distance <= 0:
        return pairs
    owners = np.array([i for thumb, i in first.items() for _ in range(len(thumb) // _FRAME_BYTES)], dtype=int)
    is_outer = np.array(
        [at == 0 and len(thumb) > _FRAME_BYTES for thumb in first for at in range(len(thumb) // _FRAME_BYTES)]
    )
    data = np.frombuffer(b"".join(first), np.uint8).reshape(-1, _FRAME_BYTES)
    heads = np.ascontiguousarray(data[:, : 4 * _HEAD]).view("<f4")
    frames = data[:, 4 * _HEAD :].reshape(-1, SIDE, SIDE)
    flat, textured = np.flatnonzero(heads[:, 1] < FLAT), np.flatnonzero(heads[:, 1] >= FLAT)
    pairs += [(int(owners[flat[one]]), int(owners[flat[two]])) for one, two in _flat_pairs(heads[flat])]
    found = _textured_pairs(frames[textured], is_outer[textured], owners[textured], 1 - distance / 50)
    return pairs + [(int(owners[textured[one]]), int(owners[textured[two]])) for one, two in found]


def _flat_pairs(heads: np.ndarray) -> list[tuple[int, int]]:
    """Pair pictures without structure by brightness and color: neighbours in a grid of cells."""
    cells: dict[tuple, int] = {}
    pairs = []
    for i, cell in enumerate(map(tuple, np.round(heads[:, [0, 2, 3]] / FLAT_COLOR).astype(int).tolist())):
        for step in itertools.product((-1, 0, 1), repeat=3):
            other = cells.get((cell[0] + step[0], cell[1] + step[1], cell[2] + step[2]))
            if other is not None:
                pairs.append((other, i))
        cells.setdefault(cell, i)
    return pairs


def _textured_pairs(
    frames: np.ndarray, is_outer: np.ndarray, owners: np.ndarray, agreement: float
) -> list[tuple[int, int]]:
    if len(frames) < 2:
        return []
    crops = _descriptors(frames.astype(np.float32) - 128)
    groups = owners.copy()
    pairs = []
    for one, two, way in _candidates(crops, is_outer, groups):
        # from the crop of the first picture that is most like the second one to the exact place
        crop = int(np.argmax(crops[one] @ _turned(crops[two, :1], way)[0]))
        turned, plain = (frame.astype(np.float32) for frame in (_turn(frames[two], way), frames[one]))
        if _agree(turned, plain, _start(crop), agreement):
            groups[groups == groups[two]] = groups[one]
            pairs.append((one, two))
    return pairs


def are_near(one: bytes, other: bytes, distance: int = DISTANCE) -> bool:
    """Tell whether two thumbnails are near-duplicates themselves, not through others."""
    return bool(near_pairs([one, other], distance))


def group_photos(thumbs: dict[str, bytes], distance: int = DISTANCE) -> list[list[str]]:
    """Return the groups of near-duplicates among {sha256: thumbnail}, members and groups sorted."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    keys = sorted(thumbs)
    pairs = np.array(near_pairs([thumbs[key] for key in keys], distance), dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(keys), len(keys)))
    groups: dict[int, list[str]] = defaultdict(list)
    for key, label in zip(keys, connected_components(graph, directed=False)[1], strict=True):
        groups[label].append(key)
    return sorted(groups.values())

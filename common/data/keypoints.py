"""Which thumbnails may show the same picture: those that share keypoints, found without comparing each with each.

    points = Keypoints(frames)                  # uint8 [n, 64, 64]
    for one, two, way in points.candidates():
        place = points.placed(one, two, way)    # how the second, turned or mirrored, lies over the first

A thumbnail has up to 32 SIFT keypoints (Lowe 2004, in OpenCV). Each becomes a code of 256 bits, the signs of random
projections of its descriptor, and another one as in a mirror. All codes are sorted 16 times, each time by other bits
first, and each is compared with the few that come next to it (Charikar 2002). So time and memory grow with
the number of thumbnails and not with its square. Two keypoints match where their codes differ in few bits and where
they are in about the same place, as large and as turned, once one picture is mirrored or turned by quarters.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import numpy as np

from common.errors import UserError
from integration.lora_patch.errors import one_line

POINTS = 32  # keypoints of a thumbnail, its strongest
_CONTRAST = 0.005  # of keypoints, as SIFT counts it: 0.2 levels
_BITS = 256
_DIFFERENT = 44  # bits in which matching codes may differ; one of 1,000 pairs of unlike ones differs in 50 or less
_ORDERS = 16  # times that the codes are sorted
_NEXT = 8  # codes next to each that it is compared with
_BLOCK = 1 << 16  # codes compared at a time
_FRAMES = 256  # thumbnails whose keypoints are detected at a time
_APART = 0.15  # share of the side by which matching keypoints may lie apart
_SIZE = 0.4  # octaves by which their sizes may differ
_ANGLE = 15.0  # degrees by which their angles may differ
_MATCHES = 2  # keypoints that two pictures must share


def opencv() -> ModuleType:
    """Return OpenCV, imported here: a fifth of a second that --help does without."""
    try:
        import cv2
    except ImportError as error:  # a server without a screen may have no libGL
        raise UserError(f'OpenCV does not load ({one_line(error)}); run "make setup" again') from error
    return cv2


class Keypoints:
    """The keypoints of thumbnails uint8 [n, side, side], and after them the same ones in mirrored thumbnails.

    A way to lay one thumbnail over another is 0 to 3, the quarters by which it is turned from x towards y, and 4 more
    where it is mirrored left to right before.
    """

    def __init__(self, frames: np.ndarray) -> None:
        with ThreadPoolExecutor() as pool:
            blocks = pool.map(_detected, (frames[at : at + _FRAMES] for at in range(0, max(len(frames), 1), _FRAMES)))
            counts, places, plain, mirrored = map(np.concatenate, zip(*blocks, strict=True))
        self.side = frames.shape[1]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._half = len(places)
        self._frame = np.tile(np.repeat(np.arange(len(frames)), counts), 2)
        # x and y in pixels from the thumbnail's center, the size in octaves, the angle in degrees from x towards y
        places = places - np.float32([(self.side - 1) / 2, (self.side - 1) / 2, 0, 0])
        self._places = np.concatenate([places, places * np.float32([-1, 1, 1, -1]) + np.float32([0, 0, 0, 180])])
        self._codes = np.concatenate([plain, mirrored])

    def candidates(self) -> list[tuple[int, int, int]]:
        """Return (thumbnail, other thumbnail, way to lay the other over it) of pairs that match, likely ones first."""
        if not self._half:
            return []
        parts, count = self._codes.view(np.uint16), len(self._starts) - 1
        found = []
        for order in range(_ORDERS):
            keys = np.roll(parts, order, axis=1)[:, :4].copy().view(np.uint64)[:, 0]
            row = np.argsort(keys, kind="stable")
            for start in range(0, len(row), _BLOCK):
                at = np.arange(start, min(start + _BLOCK, len(row)))[:, None]
                next_to = at + np.arange(1, _NEXT + 1)
                inside = next_to < len(row)
                one, two = np.broadcast_to(row[at], next_to.shape)[inside], row[next_to[inside]]
                one, two = np.minimum(one, two), np.maximum(one, two)  # mirrored ones come second
                apart = (self._frame[one] != self._frame[two]) & (one < self._half)
                one, two = one[apart], two[apart]
                matching, quarters = self._matching(one, two)
                one, two, quarters = one[matching], two[matching], quarters[matching]
                way = quarters + 4 * (two >= self._half)
                found.append((self._frame[one] * count + self._frame[two]) * 8 + way)
        pairs, hits = np.unique(np.concatenate(found), return_counts=True)
        pairs = pairs[np.argsort(-hits, kind="stable")]
        return list(zip(*(part.tolist() for part in (pairs // 8 // count, pairs // 8 % count, pairs % 8)), strict=True))

    def placed(self, one: int, two: int, way: int) -> np.ndarray | None:
        """Return the affine map [2, 3] from pixels of ``two``, laid in its way, to pixels of ``one``.

        None where too few keypoints match.
        """
        cv2 = opencv()
        first, second = np.arange(*self._starts[one : one + 2]), np.arange(*self._starts[two : two + 2])
        second = second + self._half * (way >= 4)
        first, second = (part.ravel() for part in np.meshgrid(first, second, indexing="ij"))
        matching, quarters = self._matching(first, second)
        matching &= quarters == way % 4
        first, second = first[matching], second[matching]
        if min(len(np.unique(first)), len(np.unique(second))) < _MATCHES:
            return None
        center = (self.side - 1) / 2
        sources = _turned(self._places[second], quarters[matching])[:, :2] + center
        place, _ = cv2.estimateAffinePartial2D(sources, self._places[first, :2] + center, ransacReprojThreshold=2)
        return place

    def _matching(self, one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (bool [n]: which keypoints match, by how many quarters the second must be turned)."""
        angles = self._places[one, 3] - self._places[two, 3]
        quarters = np.round(angles / 90).astype(int)
        near = np.flatnonzero(np.abs(angles - 90 * quarters) < _ANGLE)
        away = np.abs(self._places[one[near], :3] - _turned(self._places[two[near]], quarters[near])[:, :3])
        near = near[(away < [_APART * self.side, _APART * self.side, _SIZE]).all(axis=1)]
        different = np.bitwise_count(self._codes[one[near]] ^ self._codes[two[near]]).sum(axis=1, dtype=int)
        matching = np.zeros(len(one), bool)
        matching[near[different <= _DIFFERENT]] = True
        return matching, quarters % 4


def _turned(places: np.ndarray, quarters: np.ndarray) -> np.ndarray:
    """Return places [n, 4] turned around the center from x towards y."""
    cos, sin = np.float32([1, 0, -1, 0])[quarters % 4], np.float32([0, 1, 0, -1])[quarters % 4]
    x, y, size, angle = places.T
    return np.stack([cos * x - sin * y, sin * x + cos * y, size, angle + 90 * quarters], axis=1)


def _detected(frames: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return (how many keypoints each thumbnail has; of all: x, y, size in octaves and angle in degrees, float32
    [m, 4]; codes uint64 [m, 4]; codes in the mirror)."""
    found = _described(frames)
    places = np.float32([(*p.pt, p.size, p.angle) for points, _ in found for p in points]).reshape(-1, 4)
    places[:, 2] = np.log2(places[:, 2])
    descriptors = np.concatenate([np.zeros((0, 128), np.float32), *(values for _, values in found)])
    # in the mirror rows change their order, and gradients their sense of turning
    mirrored = descriptors.reshape(-1, 4, 4, 8)[:, ::-1][..., -np.arange(8) % 8].reshape(-1, 128)
    counts = np.array([len(points) for points, _ in found], int)
    return counts, places, _codes(descriptors), _codes(mirrored)


def _described(frames: np.ndarray) -> list[tuple[list, np.ndarray]]:
    """Return (keypoints of OpenCV, descriptors float32 [k, 128], rooted) of each thumbnail."""
    cv2 = opencv()
    sift = cv2.SIFT_create(POINTS, contrastThreshold=_CONTRAST, edgeThreshold=15, enable_precise_upscale=True)
    found = []
    for frame in frames:
        points, values = sift.detectAndCompute(frame, None)
        if points:
            values = values[:POINTS]
            # the root makes angles tell more (RootSIFT, Arandjelovic and Zisserman 2012)
            found.append((points[:POINTS], np.sqrt(values / np.maximum(values.sum(axis=1, keepdims=True), 1))))
        else:
            found.append(([], np.zeros((0, 128), np.float32)))
    return found


def _codes(descriptors: np.ndarray) -> np.ndarray:
    """Return uint64 [m, 4]: on which side of random planes through the usual one descriptors [m, 128] lie."""
    usual, planes = _planes()
    return np.packbits((descriptors - usual) @ planes > 0, axis=1).reshape(-1, _BITS // 8).view(np.uint64)


@cache
def _planes() -> tuple[np.ndarray, np.ndarray]:
    """Return (the mean descriptor [128] of pictures of noise, the planes' normals [128, bits])."""
    rng = np.random.default_rng(0)
    frequency = np.maximum(np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)), 1 / 64)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((32, 64, 64))) / frequency**1.3).real
    noise = np.clip(128 + 32 * noise / noise.std(axis=(1, 2), keepdims=True), 0, 255).astype(np.uint8)
    usual = np.concatenate([values for _, values in _described(noise)]).mean(axis=0)
    return usual, rng.standard_normal((128, _BITS)).astype(np.float32)

"""Which photographs are the same picture: re-encoded, resized, turned, or stored under another name.

    groups = group_photos(thumbs)        # thumbs: {sha256: bytes from `thumb_of`}

A picture is known by 64 bits of perceptual hash (the signs of its lowest DCT frequencies around their median, as in
pHash) and confirmed by its thumbnail. Two pictures are near-duplicates when the hashes differ in at most `RADIUS`
bits and the thumbnails agree. Candidates come from multi-index hashing: of the hash's four 16-bit bands at least one
differs in at most `RADIUS // 4` bits, so each picture looks up its bands and their neighbours in four sorted tables
instead of comparing itself with all others: n log n lookups instead of n * n comparisons.

Groups are transitive: if A is a near-duplicate of B and B of C, all three are one group, though A and C may lie
further apart.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

RADIUS = 10  # bits of 64
SIDE = 16  # pixels of the thumbnail's side
CHROMA = 4  # pixels of the side at which its colors are kept
THUMB_LOAD = 256  # pixels of the long side at which a photograph is decoded for its thumbnail
THUMB_BYTES = SIDE * SIDE + 2 * CHROMA * CHROMA
# How far thumbnails of one picture differ in brightness, 0..255, root mean square after removing the mean difference:
# re-encodings and resizes reach 4, a brighter print 10; a share of the picture's own contrast, within bounds.
LUMA_SHARE, MIN_LUMA_ERROR, MAX_LUMA_ERROR = 0.35, 5.0, 16.0
MAX_CHROMA_ERROR = 14.0
GREY = 4.0  # mean distance from grey below which a picture counts as black and white
_LOOK_BACK = 500  # pictures of the same hash that one is compared with when it is not like the first of a group
FLAT = 2.5  # standard deviation of brightness below which a picture has no structure to hash

_k = np.arange(SIDE)
_DCT = np.cos(np.pi * (2 * _k[None, :] + 1) * _k[:, None] / (2 * SIDE))[:8]
_BITS = (1 << np.arange(63, -1, -1, dtype=np.uint64)).astype(np.uint64)


def thumb_of(picture: Image.Image) -> bytes:
    """Return 16 x 16 bytes of brightness and 4 x 4 each of blue and red difference, of an upright RGB picture."""
    small = picture.resize((SIDE * 4, SIDE * 4), Image.Resampling.BOX, reducing_gap=None).convert("YCbCr")
    luma, blue, red = small.split()
    parts = [luma.resize((SIDE, SIDE), Image.Resampling.BOX)]
    parts += [plane.resize((CHROMA, CHROMA), Image.Resampling.BOX) for plane in (blue, red)]
    return b"".join(part.tobytes() for part in parts)


def is_thumb(data: bytes) -> bool:
    """Tell whether bytes are what `thumb_of` gives."""
    return len(data) == THUMB_BYTES


def perceptual_hash(thumb: bytes) -> int:
    """Return the 64-bit perceptual hash of a thumbnail's brightness."""
    return int(_hashes(np.frombuffer(thumb, np.uint8)[None, : SIDE * SIDE].reshape(1, SIDE, SIDE))[0])


def _hashes(luma: np.ndarray) -> np.ndarray:
    """Return uint64 [n] hashes of uint8 [n, 16, 16] thumbnails."""
    low = (_DCT @ luma.astype(np.float64) @ _DCT.T).reshape(len(luma), 64)
    low[:, 0] = low[:, 1:].max(axis=1)  # brightness itself says nothing of the picture
    median = np.median(low[:, 1:], axis=1, keepdims=True)
    return ((low > median).astype(np.uint64) * _BITS).sum(axis=1, dtype=np.uint64)


class _Union:
    def __init__(self, count: int):
        self.parent = list(range(count))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self.find(one), self.find(other)))
        self.parent[other] = one  # the smallest index leads, so groups do not depend on the order of joining


def near_pairs(thumbs: list[bytes], radius: int = RADIUS) -> list[tuple[int, int]]:
    """Return index pairs of near-duplicates: enough of them to connect every group, not all within a group.

    ``radius`` 0 leaves only thumbnails that are the same in every byte.
    """
    pairs: list[tuple[int, int]] = []
    leaders = _same_thumbs(thumbs, pairs)
    if radius <= 0 or not leaders:
        return pairs
    data = np.frombuffer(b"".join(thumbs[i] for i in leaders), np.uint8).reshape(len(leaders), THUMB_BYTES)
    luma = data[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
    flat = luma.reshape(len(luma), -1).std(axis=1) < FLAT
    found = [(np.flatnonzero(flat)[a], np.flatnonzero(flat)[b]) for a, b in _flat_pairs(data[flat])]
    textured = np.flatnonzero(~flat)
    found += [(textured[a], textured[b]) for a, b in _textured_pairs(data[textured], radius)]
    return pairs + [(leaders[a], leaders[b]) for a, b in found]


def _same_thumbs(thumbs: list[bytes], pairs: list[tuple[int, int]]) -> list[int]:
    first: dict[bytes, int] = {}
    for i, thumb in enumerate(thumbs):
        if first.setdefault(thumb, i) != i:
            pairs.append((first[thumb], i))
    return list(first.values())


def _flat_pairs(data: np.ndarray) -> list[tuple[int, int]]:
    """Pair pictures without structure by brightness and color: neighbours in a grid of cells."""
    values = data.astype(np.float64)
    split = SIDE * SIDE
    keys = np.stack([values[:, :split].mean(1), values[:, split : split + 16].mean(1), values[:, split + 16 :].mean(1)])
    cells: dict[tuple, int] = {}
    pairs = []
    for i, cell in enumerate(map(tuple, np.round(keys.T / 4).astype(int).tolist())):
        for step in itertools.product((-1, 0, 1), repeat=3):
            other = cells.get((cell[0] + step[0], cell[1] + step[1], cell[2] + step[2]))
            if other is not None:
                pairs.append((other, i))
        cells.setdefault(cell, i)
    return pairs


def _textured_pairs(data: np.ndarray, radius: int) -> list[tuple[int, int]]:
    """Pair pictures by hash, in each of the four ways to turn them, and confirm by thumbnail."""
    if len(data) < 2:
        return []
    pictures = _Pictures(data)
    hashes = _hashes(pictures.luma)
    union = _Union(len(data))
    pairs: list[tuple[int, int]] = []

    def join(one: int, two: int) -> None:
        union.join(one, two)
        pairs.append((min(one, two), max(one, two)))

    # a thousand copies of one picture share a few hashes: they are joined here, and one stands for them below
    leaders = [leader for same in _same_hashes(hashes) for leader in _leaders(pictures, same, join)]
    leaders = np.asarray(sorted(leaders))
    refused: set[tuple[int, int, int]] = set()
    for turn in range(4):
        turned = pictures.turned(turn)
        own = hashes if turn == 0 else _hashes(turned.luma)
        for asking, found in _candidates(hashes[leaders], own[leaders], radius):
            for one, two in zip(leaders[found].tolist(), leaders[asking].tolist(), strict=True):
                if one == two or (turn == 0 and one > two) or (one, two, turn) in refused:
                    continue
                if union.find(one) == union.find(two):
                    continue
                if _agree(pictures, one, turned, np.array([two]))[0]:
                    join(one, two)
                else:
                    refused.add((one, two, turn))
    return pairs


class _Pictures:
    """Thumbnails as arrays: luma [n, 16, 16] and chroma [n, 2, 4, 4]."""

    def __init__(self, data: np.ndarray):
        self.luma = data[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
        self.chroma = data[:, SIDE * SIDE :].reshape(-1, 2, CHROMA, CHROMA)

    def turned(self, turn: int) -> "_Pictures":
        other = object.__new__(_Pictures)
        other.luma = np.rot90(self.luma, turn, axes=(1, 2))
        other.chroma = np.rot90(self.chroma, turn, axes=(2, 3))
        return other


def _same_hashes(hashes: np.ndarray) -> Iterator[list[int]]:
    order = np.argsort(hashes, kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1):
        yield same.tolist()


def _leaders(pictures: _Pictures, same: list[int], join: Callable[[int, int], None]) -> list[int]:
    """Join the pictures of one hash that agree; return one of each that were not joined to an earlier one."""
    leaders = same[:1]
    for position, picture in enumerate(same[1:], start=1):
        agreeing = np.flatnonzero(_agree(pictures, picture, pictures, np.array(leaders, dtype=int)))
        if len(agreeing):
            join(leaders[agreeing[0]], picture)
            continue
        # not like the first of a group, perhaps like another of it
        earlier = np.array(same[max(0, position - _LOOK_BACK) : position], dtype=int)
        agreeing = np.flatnonzero(_agree(pictures, picture, pictures, earlier))
        if len(agreeing):
            join(int(earlier[agreeing[0]]), picture)
        leaders.append(picture)
    return leaders


def _candidates(table: np.ndarray, queries: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (query indices, table indices) of hashes within ``radius`` bits; a pair may come more than once."""
    slack = radius // 4
    masks = [sum(1 << bit for bit in bits) for n in range(slack + 1) for bits in itertools.combinations(range(16), n)]
    for band in range(4):
        shift = np.uint64(16 * band)
        keys = ((table >> shift) & np.uint64(0xFFFF)).astype(np.uint32)
        wanted = ((queries >> shift) & np.uint64(0xFFFF)).astype(np.uint32)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange(65537))
        for mask in masks:
            probe = wanted ^ np.uint32(mask)
            low, counts = starts[probe], starts[probe + 1] - starts[probe]
            asking = np.repeat(np.arange(len(queries)), counts)
            if not len(asking):
                continue
            offsets = np.arange(len(asking)) - np.repeat(np.cumsum(counts) - counts, counts)
            found = order[low[asking] + offsets]
            close = np.bitwise_count(table[found] ^ queries[asking]) <= radius
            yield asking[close], found[close]


def _agree(pictures: _Pictures, one: int, others: _Pictures, which: np.ndarray) -> np.ndarray:
    """Tell with which of ``others`` picture ``one`` agrees; a black-and-white copy counts as the same picture."""
    luma, other = pictures.luma[one].astype(np.float32), others.luma[which].astype(np.float32)
    contrast = np.minimum(luma.std(), other.std(axis=(1, 2)))
    allowed = np.clip(LUMA_SHARE * contrast, MIN_LUMA_ERROR, MAX_LUMA_ERROR)
    agree = (other - luma).std(axis=(1, 2)) <= allowed
    chroma, tint = pictures.chroma[one].astype(np.float32) - 128, others.chroma[which].astype(np.float32) - 128
    grey = np.minimum(np.abs(chroma).mean(), np.abs(tint).mean(axis=(1, 2, 3))) < GREY
    return agree & (grey | (np.sqrt(((tint - chroma) ** 2).mean(axis=(1, 2, 3))) <= MAX_CHROMA_ERROR))


def are_near(one: bytes, other: bytes, radius: int = RADIUS) -> bool:
    """Tell whether two thumbnails are near-duplicates themselves, not through others."""
    return bool(near_pairs([one, other], radius))


def group_photos(thumbs: dict[str, bytes], radius: int = RADIUS) -> list[list[str]]:
    """Return the groups of near-duplicates among {sha256: thumbnail}, members and groups sorted."""
    keys = sorted(thumbs)
    union = _Union(len(keys))
    for one, other in near_pairs([thumbs[key] for key in keys], radius):
        union.join(one, other)
    groups: dict[int, list[str]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[union.find(i)].append(key)
    return [groups[root] for root in sorted(groups)]

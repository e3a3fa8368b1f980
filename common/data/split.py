"""Train or validation: by photograph group, without leaks; a photograph keeps its side.

    sides, left_out = split(groups, links, record, fraction, seed)

How a photograph keeps its side: `training_data_ADVISOR_split.json` remembers it with its thumbnail, and later runs
read it back. The first time, groups are sorted into strata of half a point of overall score; from each, validation gets
its share: the groups with the smallest hashes of (seed, smallest SHA-256). Later, only new groups are drawn so, as many
as bring validation back to its share; a new photograph that is a near-duplicate of a known one takes its side. When
new photographs tie a group of train to one of validation, the new ones are left out and nobody moves. Where a known
photograph of train itself is a near-duplicate of one of validation (after a change of the radius), it is left out of
train: validation stays what it was. Where the record is lost, the hashes still keep nearly all photographs in place.
"""

import base64
import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.data.near_duplicates import THUMB_LOAD, is_thumb, thumb_of
from common.errors import UserError
from common.files import read_json, read_rows
from common.schemas import MESSAGES, SPLIT_PHOTOGRAPH, SPLIT_RECORD, TRIPLET, fault
from common.tables import counted
from integration.lora_patch.photo import PhotoError, load_photo

SCHEMA_VERSION = 1
STRATUM = 0.5  # points of overall score


@dataclass
class SplitRecord:
    """The sides of all photographs ever split, by SHA-256."""

    seed: int
    val_split: float
    sides: dict[str, str] = field(default_factory=dict)  # "train" or "val"
    thumbs: dict[str, bytes] = field(default_factory=dict)  # of those that could be read

    @classmethod
    def read(cls, path: Path) -> "SplitRecord | None":
        """Read a split record; None when there is none, UserError for a damaged one."""
        if not path.exists():
            return None
        try:
            value = read_json(path)
        except UserError as error:
            problem = str(error).removesuffix("; make the file again")
            raise UserError(f"{problem}; restore the split record, or split anew with --resplit") from error
        problem = fault(value, SPLIT_RECORD)
        photos = {} if problem else value["photographs"]
        for sha, photo in photos.items():
            what = fault(photo, SPLIT_PHOTOGRAPH)
            problem = problem or (what and f"{sha[:16]}: {what}")
        if problem:
            raise UserError(f"{path}: not a split record ({problem}); restore it, or split again with --resplit")
        sides = {sha: photo["side"] for sha, photo in photos.items()}
        thumbs = {sha: base64.b64decode(photo.get("thumb", "")) for sha, photo in photos.items()}
        thumbs = {sha: thumb for sha, thumb in thumbs.items() if is_thumb(thumb)}  # not those of an earlier version
        return cls(value["seed"], value["val_split"], sides, thumbs)

    def to_dict(self) -> dict:
        """Return the record as it is written, photographs sorted."""
        photos = {
            sha: {"side": self.sides[sha]}
            | ({"thumb": base64.b64encode(self.thumbs[sha]).decode()} if sha in self.thumbs else {})
            for sha in sorted(self.sides)
        }
        return {"schema_version": SCHEMA_VERSION, "seed": self.seed, "val_split": self.val_split, "photographs": photos}


def recovered(files: dict[str, Path], seed: int, val_split: float) -> SplitRecord | None:
    """Return the sides in existing ``{"train": path, "val": path}`` files, where their record is gone.

    None where there are no such files. The photographs that can still be read get their thumbnails. UserError for
    files that do not name their photographs.
    """
    there = {side: path for side, path in files.items() if path.exists()}
    if not there:
        return None
    record = SplitRecord(seed, val_split)
    for side, path in there.items():
        for number, row in read_rows(path):
            problem = fault(row, MESSAGES if "messages" in row else TRIPLET)
            hashes, images = row.get("image_sha256"), row.get("image_path") or row.get("images")
            hashes, images = ([value] if isinstance(value, str) else value for value in (hashes, images))
            if problem or not hashes or len(hashes) != len(images):
                raise UserError(
                    f"{path}:{number}: does not name its photograph, and the split record is gone; restore the record, "
                    "or split again with --resplit"
                )
            for sha, image in zip(hashes, images, strict=True):
                record.sides[sha] = side
                with contextlib.suppress(PhotoError):
                    record.thumbs[sha] = thumb_of(load_photo(image, THUMB_LOAD))
    return record


def settle(
    groups: list[list[str]], known: dict[str, str], are_near: Callable[[str, str], bool]
) -> tuple[list[list[str]], dict[str, str]]:
    """Return (groups none of which has known photographs of both sides, {photograph left out: why}).

    ``known`` are the sides of earlier runs; ``are_near`` tells whether two photographs are near-duplicates themselves.
    """
    left_out: dict[str, str] = {}
    settled = []
    for group in groups:
        train, val = ([sha for sha in group if known.get(sha) == side] for side in ("train", "val"))
        if not (train and val):
            settled.append(group)
            continue
        left_out.update({sha: "ties_sides" for sha in group if sha not in known})
        left_out.update({sha: "near_validation" for sha in train if any(are_near(sha, other) for other in val)})
        settled += [[sha for sha in train if sha not in left_out], val]
    return [group for group in settled if group], left_out


def assign(
    groups: list[list[str]], scores: list[float], known: dict[str, str], fraction: float, seed: int
) -> list[str]:
    """Return the side of each group. ``scores`` are their overall scores; ``fraction`` the share of validation.

    UserError with fewer than two groups: there would be nothing to validate on, or nothing to train on.
    """
    if len(groups) < 2:
        raise UserError(
            f"{counted(len(groups), 'photograph')} left, and a split needs at least 2 different ones; link more jobs, "
            "or look at the table above for what was rejected"
        )
    sides = [next((known[sha] for sha in group if sha in known), None) for group in groups]
    wanted = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
    fresh = sum(side is None for side in sides)
    missing = min(max(wanted - sides.count("val"), 0), fresh)
    if missing == fresh and "train" not in sides and missing:
        missing -= 1
    draws = [_draw(seed, group) for group in groups]
    chosen = _drawn(sides, [int(score / STRATUM) for score in scores], draws, fraction, missing)
    result = [side or ("val" if i in chosen else "train") for i, side in enumerate(sides)]
    if len(set(result)) < 2:
        empty = "validation" if "val" not in result else "training"
        raise UserError(
            f"all {len(groups)} photographs are on one side by the split record, which leaves none for {empty}; link "
            "more jobs, or split again with --resplit"
        )
    return result


def _drawn(sides: list, strata: list[int], draws: list[str], fraction: float, missing: int) -> set[int]:
    """Return ``missing`` groups without a side: from each stratum those with the smallest hashes, as many as bring
    its validation nearest to ``fraction``.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(sides)), key=lambda i: draws[i]):
        members[strata[i]].append(i)
    fresh = {stratum: [i for i in own if sides[i] is None] for stratum, own in sorted(members.items())}
    wants = {
        stratum: max(fraction * len(members[stratum]) - sum(sides[i] == "val" for i in members[stratum]), 0.0)
        for stratum in fresh
    }
    scale = missing / (sum(wants.values()) or 1)
    counts = {stratum: min(int(wants[stratum] * scale), len(fresh[stratum])) for stratum in fresh}
    # what rounding down left over goes to the largest remainders, then to any that have one
    order = sorted((s for s in fresh if fresh[s]), key=lambda s: (counts[s] - wants[s] * scale, draws[fresh[s][0]]))
    while sum(counts.values()) < missing:
        for stratum in order:
            if sum(counts.values()) < missing and counts[stratum] < len(fresh[stratum]):
                counts[stratum] += 1
    return {i for stratum, count in counts.items() for i in fresh[stratum][:count]}


def _draw(seed: int, group: list[str]) -> str:
    return hashlib.sha256(f"{seed}:{min(group)}".encode()).hexdigest()

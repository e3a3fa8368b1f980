"""Train or validation: by photograph group, without leak, the same side for ever.

    sides, left_out = split(groups, links, record, fraction, seed)

How a photograph keeps its side: `training_data_ADVISOR_split.json` remembers it with its thumbnail, and later runs
read it back. The first time, groups are sorted by overall score and cut into as many equal slices as validation is to
have groups; from each slice the group with the smallest hash of (seed, smallest SHA-256) goes to validation. Later,
only new groups are drawn so, as many as bring validation back to its share; a new photograph that is a near-duplicate
of a known one takes its side. When new photographs tie a group of train to one of validation, the new ones are left
out and nobody moves. Where a known photograph of train itself is a near-duplicate of one of validation (after a change
of the radius), it is left out of train: validation stays what it was.
"""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.files import read_json, write_json

SCHEMA_VERSION = 1


@dataclass
class Record:
    """The sides of all photographs ever split, by SHA-256."""

    seed: int
    val_split: float
    sides: dict[str, str] = field(default_factory=dict)  # "train" or "val"
    thumbs: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """Read a split record; None when there is none, UserError for a damaged one."""
        if not path.exists():
            return None
        value = read_json(path)
        try:
            photos = value["photographs"]
            return cls(
                int(value["seed"]),
                float(value["val_split"]),
                {sha: _side(photo["side"]) for sha, photo in photos.items()},
                {sha: base64.b64decode(photo["thumb"]) for sha, photo in photos.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: not a split record ({error}); restore it, or split anew with --resplit"
            ) from error

    def write(self, path: Path) -> None:
        """Write the record, photographs sorted."""
        photos = {
            sha: {"side": self.sides[sha], "thumb": base64.b64encode(self.thumbs[sha]).decode()}
            for sha in sorted(self.sides)
        }
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "seed": self.seed,
                "val_split": self.val_split,
                "photographs": photos,
            },
        )


def _side(value: str) -> str:
    if value not in ("train", "val"):
        raise ValueError(f"{value!r} is no side")
    return value


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
            f"{len(groups)} photograph is left, and a split needs at least 2 different ones; link more jobs, or look "
            "at the table above for what was rejected"
        )
    sides = [next((known[sha] for sha in group if sha in known), None) for group in groups]
    wanted = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
    fresh = [i for i, side in enumerate(sides) if side is None]
    fresh.sort(key=lambda i: (scores[i], _draw(seed, groups[i])))
    missing = min(max(wanted - sides.count("val"), 0), len(fresh))
    if missing == len(fresh) and "train" not in sides and missing:
        missing -= 1
    chosen = set()
    for k in range(missing):
        stratum = fresh[len(fresh) * k // missing : len(fresh) * (k + 1) // missing]
        chosen.add(min(stratum, key=lambda i: _draw(seed, groups[i])))
    result = [side or ("val" if i in chosen else "train") for i, side in enumerate(sides)]
    if len(set(result)) < 2:
        empty = "validation" if "val" not in result else "training"
        raise UserError(
            f"all {len(groups)} photographs are on one side by the split record, which leaves none for {empty}; link "
            "more jobs, or split anew with --resplit"
        )
    return result


def _draw(seed: int, group: list[str]) -> str:
    return hashlib.sha256(f"{seed}:{min(group)}".encode()).hexdigest()

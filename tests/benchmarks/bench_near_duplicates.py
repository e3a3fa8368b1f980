"""How many altered copies of photographs are grouped with them, whether others stay apart, and how long comparing takes.

    python tests/benchmarks/bench_near_duplicates.py --photos FOLDER --count 1000 --count 10000

FOLDER holds different photographs. Recall is counted one kind of change at a time, among all the photographs; a join of
two different ones is an error. Times are of made thumbnails with the spectrum of photographs, each tenth a copy that is
cut, in CPU seconds.
"""

import resource
import sys
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from common.data.near_duplicates import DISTANCE, group_photos, thumb_of  # noqa: E402
from tests.data.pictures import ALIKE, CHANGES, cropped, noise, thumb  # noqa: E402


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path), help="different photographs")
@click.option("--made", default=0, show_default=True, help="made pictures besides the photographs")
@click.option("--count", "counts", multiple=True, type=int, help="thumbnails to compare, for the times")
@click.option("--duplicate_distance", default=DISTANCE, show_default=True)
def main(photos: Path | None, made: int, counts: tuple[int, ...], duplicate_distance: int) -> None:
    pictures = [_opened(path) for path in sorted(photos.iterdir())] if photos else []
    pictures += [noise(seed) for seed in range(made)]
    if pictures:
        recall(pictures, duplicate_distance)
    for count in counts:
        timed(count, duplicate_distance)


def _opened(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((1024, 1024))
    return picture


def recall(pictures: list[Image.Image], distance: int) -> None:
    """Print how many of the pictures each change leaves grouped with their copies, and which pictures are joined."""
    originals = {f"{i:04d}": thumb(picture) for i, picture in enumerate(pictures)}
    for name, change in CHANGES.items():
        start = time.process_time()
        copies = {f"{i:04d} copy": thumb(change(picture)) for i, picture in enumerate(pictures)}
        _print(name, {**originals, **copies}, distance, start)
    for name, change in ALIKE.items():
        start = time.process_time()
        _print(name, {f"{i:04d}": thumb(change(picture)) for i, picture in enumerate(pictures)}, distance, start)


def _print(name: str, thumbs: dict[str, bytes], distance: int, start: float) -> None:
    groups = [sorted(group) for group in group_photos(thumbs, distance) if len(group) > 1]
    found = {key[:4] for group in groups for key in group if f"{key} copy" in group}
    missed = sorted({key[:4] for key in thumbs if key.endswith("copy")} - found)
    joined = [sorted({key[:4] for key in group}) for group in groups if len({key[:4] for key in group}) > 1]
    click.echo(
        f"{name:<42} {len(found):>4} of {len({key[:4] for key in thumbs})}  {time.process_time() - start:6.1f} s"
        + (f"  missed {' '.join(missed)}" if missed and found else "")
        + (f"  JOINED {joined}" if joined else "")
    )


def timed(count: int, distance: int) -> None:
    """Print how long ``count`` thumbnails take: nine of ten different, each tenth a copy cut by 5 %."""
    rng = np.random.default_rng(0)
    pictures = []
    thumbs = {}
    del pictures
    small = _made(rng, count)
    for i, picture in enumerate(small):
        thumbs[f"{i:06d}"] = thumb_of(cropped(small[i - 1], left=0.05) if i % 10 == 9 else picture)
    start = time.process_time()
    groups = group_photos(thumbs, distance)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    click.echo(f"{count:>8,} thumbnails {len(groups):>8,} groups {seconds:>8.1f} CPU s {peak:>8,.0f} MB")


if __name__ == "__main__":
    main()

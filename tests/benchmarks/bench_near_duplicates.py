"""How many altered copies of photographs are grouped with them, whether others stay apart, and how long that takes.

    python tests/benchmarks/bench_near_duplicates.py --photos FOLDER --count 1000 --count 10000

FOLDER holds photographs that all differ; without it the pictures are made. Times are CPU seconds of comparing made
thumbnails, of which each tenth is one before it cut at the left: they grow with the machine's load, though less than
those of the clock.
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

from common.data.near_duplicates import SIDE, group_photos  # noqa: E402
from tests.data.test_near_duplicates import CHANGED, COPIES, frames, noise, photo, thumb  # noqa: E402

SAME = {
    "as they are": lambda image: thumb(image),
    "darkened to 4 %": lambda image: thumb(image.point(lambda value: int(value * 0.04 + 0.5))),
    "in fog": lambda image: thumb(image.point(lambda value: int(190 + value * 0.12))),
}


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path), help="different photographs")
@click.option("--count", "counts", multiple=True, type=int, help="thumbnails to compare, for the times")
def main(photos: Path | None, counts: tuple[int, ...]) -> None:
    pictures = [_opened(path) for path in sorted(photos.iterdir())] if photos else [photo(seed) for seed in range(60)]
    originals = [thumb(picture) for picture in pictures]
    for name, change in {**COPIES, **CHANGED}.items():
        _report(name, originals, [change(picture) for picture in pictures])
    for name, change in SAME.items():
        _report(f"different pictures {name}", [change(picture) for picture in pictures], [])
    for count in counts:
        _timed(count)


def _opened(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((1024, 1024))
    return picture


def _report(name: str, originals: list[bytes], copies: list[bytes]) -> None:
    """Print how many copies are grouped with their originals, and which different pictures are in one group."""
    thumbs = {f"{i:03d}": data for i, data in enumerate(originals)}
    thumbs |= {f"{i:03d} copy": data for i, data in enumerate(copies)}
    groups = group_photos(thumbs)
    found = sum(f"{key} copy" in group for group in groups for key in group)
    joined = [group for group in groups if len({key[:3] for key in group}) > 1]
    grouped = f"{found:>4} of {len(copies)}" if copies else ""
    click.echo(f"{name:<40} {grouped:<12} {len(joined)} groups of different pictures {joined or ''}")


def _timed(count: int) -> None:
    pictures = noise(count)
    for i in range(9, count, 10):
        cut = Image.fromarray(pictures[i - 1].astype(np.uint8)[:, 3:])
        pictures[i] = np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    thumbs = {str(i): data for i, data in enumerate(frames(pictures))}
    start = time.process_time()
    groups = group_photos(thumbs)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 1e6 if sys.platform == "darwin" else 1e3
    click.echo(f"{count:>8,} thumbnails  {len(groups):>7,} groups  {seconds:>7.1f} CPU s  {peak:>6,.0f} MB at most")


if __name__ == "__main__":
    main()

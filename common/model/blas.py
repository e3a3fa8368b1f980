"""Give MLX's CPU build a fast BLAS: OpenCV's wheel, which mlx-vlm requires, carries an OpenBLAS.

    .venv/bin/python -m common.model.blas

Writes openblas.pth into the virtual environment's site-packages (`make setup` runs it; macOS and CUDA do not need it).
MLX's CPU wheel for Linux is linked to the reference BLAS, some 20 times slower in float32. A library that is loaded
globally before MLX takes its place; a .pth line runs when Python starts, so this holds for every script and test,
in any working directory, where LD_PRELOAD would need a path without spaces.
"""

import sys
import sysconfig
from pathlib import Path

import click

PATTERN = "opencv_python*.libs/libopenblas*.so*"


def main() -> None:
    """Write openblas.pth where OpenCV's OpenBLAS is found; elsewhere say that products stay slow."""
    packages = Path(sysconfig.get_path("purelib"))
    found = sorted(path.relative_to(packages).as_posix() for path in packages.glob(PATTERN))
    if not found:
        if sys.platform == "linux":
            click.echo("no OpenBLAS in OpenCV's wheel: Debian's libopenblas0-pthread makes the CPU fast")
        return
    # __file__ is not known in a .pth line; sitedir is the folder that site.addsitedir() is reading
    line = (
        "import ctypes, os; "
        f"ctypes.CDLL(os.path.join(sitedir, {found[0]!r}), mode=ctypes.RTLD_GLOBAL) "
        f"if 'openblas' not in os.environ.get('LD_PRELOAD', '') else None\n"
    )
    (packages / "openblas.pth").write_text(line)
    click.echo(f"MLX's matrix products on the CPU: {found[0]}")


if __name__ == "__main__":
    main()

"""What records of several phases share: the name of a training's record, and the software that made a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

ARGS = "training_args.json"  # in an adapter folder: what the adapter was trained on, and how
PACKAGES = ("mlx", "mlx-vlm", "transformers", "numpy", "pillow")


def software_versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages on which a result depends, by name."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found

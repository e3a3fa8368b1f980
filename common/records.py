"""The software that made a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

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

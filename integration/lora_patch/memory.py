"""What memory the device has for this process: asked here by training, evaluation and service alike. Sizes are bytes.

Others' use counts: other programs on the GPU or in RAM, and the limits of the containers (control groups) around us.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

SHARE = {"metal": 0.95, "cuda": 0.92, "cpu": 0.8}  # of what the device offers; the rest is for what is not counted
ROOM = 0.7  # of what the device offers: what only makes answers faster is held while all of ours stays below it
GROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


@dataclass(frozen=True)
class Device:
    """A device: its backend ("metal", "cuda", "cpu"), what people call it, and the bytes it offers to this process,
    those included that MLX holds already."""

    backend: str
    name: str
    offers: int

    @property
    def budget(self) -> int:
        return int(SHARE[self.backend] * self.offers)


def find_device() -> Device:
    """Return the default device and what it offers to this process: a Mac's recommended working set, else what is
    free plus what MLX holds already."""
    info = mx.device_info()
    name = str(info.get("device_name", info.get("architecture", "unknown device")))
    held = mx.get_active_memory() + mx.get_cache_memory()
    if mx.default_device() == mx.Device(mx.cpu):
        return Device("cpu", name, available_ram() + held)
    if mx.metal.is_available():
        return Device("metal", name, int(info["max_recommended_working_set_size"]))
    total = info.get("total_memory") or info.get("memory_size")
    free = info.get("free_memory")
    return Device("cuda", name, int(total or available_ram() + held) if free is None else int(free) + held)


def room() -> int:
    """Return the bytes that may be taken for what only makes answers faster, such as merged copies of matrices."""
    return int(ROOM * find_device().offers) - mx.get_active_memory()


def available_ram() -> int:
    """Return the bytes of RAM that a process may still take, the limits of its control groups included."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """Return what each control group that limits this process's memory has left; the files that the kernel caches are
    counted as free (docs.kernel.org: cgroup-v2 "Memory Interface Files", cgroup-v1/memory)."""
    try:
        lines = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in lines:
        if controllers == "":
            root, names = GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = root / path.lstrip("/")
        # within a container the path may be the host's, and the container's own group stands at the root
        for folder in [here, *here.parents]:
            if folder.is_relative_to(root):
                try:
                    limit, used = (int((folder / name).read_text()) for name in names)
                    found.append(max(0, limit - used + _cached(folder)))
                except (OSError, ValueError):  # no such group here, or one without a limit ("max")
                    continue
    return found


def _cached(folder: Path) -> int:
    """Return the bytes of files that a control group holds in the kernel's cache."""
    values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    prefix = "total_" if "total_inactive_file" in values else ""
    return sum(int(values.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))

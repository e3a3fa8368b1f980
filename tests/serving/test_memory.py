"""The memory of a device: what a container and other programs leave of it."""

import mlx.core as mx
import pytest

from integration.lora_patch import memory

GB = 1_000_000_000


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of files: 60 GB of its RAM are available, and no control group limits it yet."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {60 * GB // 1024} kB\n")

    def limit(groups: str, files: dict[str, str]) -> int:
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)
        return memory.available_ram()

    return limit


def test_a_container_leaves_what_its_limit_leaves(machine):
    free = 60 * GB // 1024 * 1024
    assert memory.available_ram() == free
    files = {"memory.max": f"{16 * GB}\n", "memory.current": f"{12 * GB}\n"}
    # 7 of the 12 GB are files in the kernel's cache, the base's weights as they were read: free at need
    stat = {"memory.stat": f"anon {5 * GB}\ninactive_file {6 * GB}\nactive_file {GB}\n"}
    assert machine("0::/\n", files | stat) == 11 * GB
    assert machine("0::/\n", {"memory.max": "max\n"}) == free


def test_the_narrowest_of_nested_groups_counts(machine):
    stat = "inactive_file 0\nactive_file 0\n"
    of = lambda folder, limit: {  # noqa: E731
        f"{folder}memory.max": limit, f"{folder}memory.current": str(GB), f"{folder}memory.stat": stat,
    }  # fmt: skip
    files = of("system.slice/", str(9 * GB)) | of("system.slice/mondrian.service/", "max")
    assert machine("0::/system.slice/mondrian.service\n", files) == 8 * GB


def test_groups_of_the_first_version_are_read_too(machine):
    files = {
        "memory/memory.limit_in_bytes": str(4 * GB), "memory/memory.usage_in_bytes": str(3 * GB),
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB}\ntotal_active_file 0\n",
    }  # fmt: skip
    # within a container the path may be the host's
    assert machine("5:devices:/\n4:memory:/docker/4f00\n0::/\n", files) == 2 * GB


def test_room_is_left_to_other_users_of_a_gpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 9 * GB)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    found = {"device_name": "GPU", "total_memory": 24 * GB, "free_memory": 15 * GB}
    monkeypatch.setattr(mx, "device_info", lambda: found)
    assert memory.room() == pytest.approx(7.8 * GB)  # enough for merged copies of a 16-bit base, 7.3 GB
    found["free_memory"] = 5 * GB  # 10 GB are another's
    assert memory.room() == pytest.approx(0.8 * GB)

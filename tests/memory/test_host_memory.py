"""Budgets are of the memory that this process can have, not of what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexbatch.memory.host_memory import host_memory_bytes

GIB = 2**30
STAT = f"anon 9\nfile {9 * GIB}\nshmem {4 * GIB}\nactive_file {2 * GIB}\ninactive_file {GIB}\nslab_reclaimable 4096"
STAT_1 = f"cache {9 * GIB}\ntotal_active_file {2 * GIB}\ntotal_inactive_file {GIB}\nactive_file 1\ninactive_file 1"
NO_LIMIT_1 = 0x7FFFFFFFFFFFF000


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def two(folder: str, limit: object, used: int = 10 * GIB, stat: str = STAT) -> dict[str, object]:
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def one(folder: str, limit: int, used: int = 10 * GIB, stat: str = STAT_1) -> dict[str, object]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"memory/{folder}{name}": value for name, value in zip(names, (limit, used, stat), strict=True)}


@pytest.mark.parametrize(
    "groups, files, left",
    [
        ("0::/", {}, 100 * GIB),
        ("0::/", two("", "max"), 100 * GIB),
        ("0::/", two("", 16 * GIB), 9 * GIB + 4096),
        ("0::/a/b", two("a/b/", 16 * GIB) | two("a/", "max"), 9 * GIB + 4096),
        ("0::/a/b", two("a/b/", "max") | two("a/", 12 * GIB), 5 * GIB + 4096),
        ("0::/a/b", two("a/b/", 64 * GIB) | two("a/", 12 * GIB) | two("", 99 * GIB), 5 * GIB + 4096),
        ("0::/of/the/host", two("", 16 * GIB), 9 * GIB + 4096),
        ("0::/", two("", 400 * GIB), 100 * GIB),
        ("0::/", two("", 8 * GIB, used=2 * GIB), 8 * GIB),
        ("0::/", two("", 4 * GIB), 0),
        ("0::/a:b", two("a:b/", 16 * GIB), 9 * GIB + 4096),
        ("4:memory:/docker/0f\n3:cpu:/", one("docker/0f/", 16 * GIB), 9 * GIB),
        ("4:memory:/docker/0f\n3:cpu:/", one("", 16 * GIB), 9 * GIB),
        ("4:cpu,memory:/x\n0::/", one("x/", NO_LIMIT_1), 100 * GIB),
        (
            "4:memory:/slurm/job_7/step_0",
            one("slurm/job_7/step_0/", NO_LIMIT_1) | one("slurm/job_7/", 20 * GIB),
            13 * GIB,
        ),
        ("3:cpu:/x", {"memory.max": 1}, 100 * GIB),
    ],
)
def test_memory_of_a_container_is_what_its_limit_leaves(groups: str, files: dict, left: int, tmp_path: Path) -> None:
    write(
        tmp_path / "proc", {"meminfo": f"MemTotal: 9 kB\nMemAvailable: {100 * GIB // 1024} kB", "self/cgroup": groups}
    )
    write(tmp_path / "cgroup", files)
    assert host_memory_bytes(tmp_path / "proc", tmp_path / "cgroup") == left


def test_without_proc_it_is_half_of_all_memory(tmp_path: Path) -> None:
    assert 0 < host_memory_bytes(tmp_path, tmp_path) < host_memory_bytes() * 1000

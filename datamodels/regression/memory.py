"""How much memory a fit may take on this machine, asked before anything large is allocated."""

from __future__ import annotations

import os
from pathlib import Path

from datamodels.errors import RegressionError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # version 1 writes a number of this size where there is no limit


def available() -> int | None:
    """Bytes that can be had now: the least of what the machine and each control group has left; None if unknown."""
    left = [value for value in (_machine(), *_groups()) if value is not None]
    return min(left) if left else None


def require(needed: int, what: str, advice: str) -> None:
    """RegressionError if fewer than `needed` bytes can be had for `what`; says how much there is, and the advice."""
    there = available()
    if there is not None and needed > there:
        raise RegressionError(
            f"{what} needs about {gigabytes(needed)} of memory, and {gigabytes(there)} are available; {advice}"
        )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e9:.2g} GB"


def _machine() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _groups() -> list[int | None]:
    """What is left in this process's control groups and those above them, of version 1 and 2."""
    try:
        lines = CGROUP.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (
                CGROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = Path(os.path.normpath(root / name.lstrip("/")))
        if not group.is_relative_to(root):  # of another namespace: what can be seen is the root
            group = root
        while True:
            left.append(_group(group, limit, usage, cache))
            if group == root:
                break
            group = group.parent
    return left


def _group(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        bound = int((folder / limit).read_text())  # "max" is no number: no limit
        used = int((folder / usage).read_text())
    except (OSError, ValueError):
        return None
    if bound >= NO_LIMIT:
        return None
    try:  # pages of files are given back when memory is short
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= int(stat[cache])
    except (OSError, ValueError, KeyError):
        pass
    return max(0, bound - used)

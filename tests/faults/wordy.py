"""A main that fills its row's own folder before it returns."""

from __future__ import annotations

from pathlib import Path

from tests.faults.rows import values


def main(index: int, logdir: str) -> dict[str, object]:
    (Path(logdir) / "log").write_bytes(bytes(400_000))
    return values(index, 1)

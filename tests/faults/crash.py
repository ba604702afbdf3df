"""Promises 1 and 2 in memory: the power goes out after, and during, every single write, or a sync fails.

Every state that this may leave is checked: each row holds one version that was committed, whole, or is not complete;
what was reported done is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datamodels.errors import StoreError
from datamodels.spec import Field
from datamodels.store import commit as commits
from datamodels.store.commit import Layout, RowInfo
from tests.faults.bench import Experiment, Lost, check
from tests.faults.memory import Crash, MemoryDisk

ROWS, HEAD = 6, 128
# 150 float64 span sectors; a uint8 scalar shares its sector with every other row; only odd versions have a note.
FIELDS = {
    "margins": Field("margins", (150,), "float64"),
    "tag": Field("tag", (), "uint8"),
    "note": Field("note", (3,), "uint8", required=False),
}
SIZES = {commits.COMPLETED_FILE: 1, commits.ROWS_FILE: 64}  # of a row in each file
for key, field in FIELDS.items():
    SIZES |= {commits.key_file(key): field.nbytes, commits.record_file(key): 16}
ENOUGH = 40  # operations, which a protocol of three phases cannot do without in the scenario


def layout_on(disk: MemoryDisk) -> Layout:
    return Layout(disk, FIELDS, ROWS, dict.fromkeys(SIZES, HEAD))


def empty_files() -> dict[str, bytes]:
    return {name: bytes(HEAD + ROWS * size) for name, size in SIZES.items()}


def values(row: int, version: int) -> dict[str, bytes]:
    """What version `version` of a row holds: no two rows, and no two versions of one, share a byte pattern."""
    held = {
        "margins": (np.arange(150) + 1000.0 * row + 1e6 * version).tobytes(),
        "tag": bytes([16 * version + row]),
    }
    return held | ({"note": bytes([version, row, 255])} if version % 2 else {})


def commit(layout: Layout, rows: list[int], version: int) -> None:
    blobs = {key: [values(row, version)[key] for row in rows] for key in values(0, version)}
    commits.commit(layout, rows, blobs, [RowInfo(1, 0.0, row) for row in rows], f"run-{version}")


def replace(layout: Layout, row: int, version: int) -> None:
    commits.write_journal(layout, row, values(row, version), RowInfo(2, 0.0, row), f"run-{version}")
    commits.apply_journal(layout, row)


STEPS = [([4], 1), ([0, 1, 3], 1), ([1], 2), ([1], 3)]  # fresh rows alone and in a batch, then one replaced twice


def do(layout: Layout, rows: list[int], version: int) -> None:
    if version == 1:
        commit(layout, rows, version)
    else:
        replace(layout, rows[0], version)


def found(files: dict[str, bytes], row: int) -> int | None:
    """The version that a row holds by plain bytes, None where it is not complete; `Lost` where it is neither."""
    layout = layout_on(MemoryDisk(files))
    if not layout.completed([row])[0]:
        return None
    held = {}
    for key, field in FIELDS.items():
        record, blob = layout.records(key, [row])[0], layout.read(commits.key_file(key), row, 1, field.nbytes)
        if not field.required and record.tobytes() == bytes(16):
            continue
        problem = commits.problem(record, key, row, blob)
        check(problem is None, f"row {row}, {key}: {problem}")
        held[key] = blob
    check(commits.row_record_intact(layout.row_records([row])[0], row), f"row {row}: its record is damaged")
    for version in (1, 2, 3, 4):
        if held == values(row, version):
            return version
    raise Lost(f"row {row} is complete with bytes that nobody committed")


def recovered(files: dict[str, bytes]) -> dict[str, bytes]:
    disk = MemoryDisk(files)
    for name in disk.list(commits.JOURNAL):
        commits.apply_journal(layout_on(disk), int(name))
    check(not disk.pending, "recovery reports done with unsynced writes")
    return {name: bytes(data) for name, data in disk.durable.items()}


def check_survivors(
    disk: MemoryDisk, acknowledged: dict[int, int], when: str, draws: int, rows: Sequence[int] = range(ROWS)
) -> int:
    """Hold every state that the disk may be found in against what was reported done; how many states."""
    states = 0
    for name, files in disk.survivors(draws=draws, seed=disk.operations):
        states += 1
        try:
            before, after = _both(files, rows)
            for row in rows:
                done = acknowledged.get(row)
                # A row that is being replaced holds the old values or newer ones, never none.
                check(done is None or (after[row] or 0) >= done, f"row {row} was {done}, is {after[row]}")
                check(row in (0, 1, 3, 4) or before[row] is None, f"row {row} is complete, and nobody ran it")
        except Lost as error:
            raise Lost(f"{when}, {name}: {error}") from None
    return states


_known: dict[int, tuple[dict, dict]] = {}  # many cuts leave the same files


def _both(files: dict[str, bytes], rows: Sequence[int]) -> tuple[dict[int, int | None], dict[int, int | None]]:
    """The version of each row as the files are found, and after recovery."""
    key = hash(frozenset(files.items()))
    if key not in _known:
        before = {row: found(files, row) for row in rows}
        after = recovered(files)
        _known[key] = before, {row: found(after, row) for row in rows}
    return _known[key]


def power_cuts(folder: Path, draws: int) -> int:
    """The scenario up to every operation, then a cut."""
    _known.clear()
    states = 0
    for stop in range(1, 10_000):
        disk = MemoryDisk(empty_files(), stop_at=stop)
        acknowledged: dict[int, int] = {}
        try:
            for rows, version in STEPS:
                do(layout_on(disk), rows, version)
                acknowledged.update(dict.fromkeys(rows, version))
        except Crash:
            states += check_survivors(disk, acknowledged, f"operation {stop}", draws)
        else:
            check(stop > ENOUGH, f"the scenario has {stop} operations, fewer than three phases need")
            return states
    raise Lost("the scenario did not end")


# What is interrupted, after row 0 was committed as often as the number says.
FIRST: dict[str, tuple[int, Callable[[Layout], None]]] = {
    "a commit": (0, lambda layout: commit(layout, [0], 1)),
    "a replacement": (1, lambda layout: replace(layout, 0, 2)),
    "a reset": (1, lambda layout: commits.clear(layout, [0])),
}


def two_in_a_row(folder: Path, draws: int) -> int:
    """What was cut off, or whose process was killed, is done again and cut off as well; without draws only killed."""
    _known.clear()
    states = 0
    for what, (before, action) in FIRST.items():
        for first in range(1, 200):
            disk = MemoryDisk(empty_files())
            if before:
                commit(layout_on(disk), [0], 1)
            disk.operations, disk.stop_at = 0, first
            try:
                action(layout_on(disk))
            except Crash:
                pass
            else:
                break
            starts: dict[str, Callable[..., MemoryDisk]] = {"killed": disk.goes_on}
            distinct = {frozenset(files.items()): name for name, files in disk.survivors(draws=draws, seed=first)}
            for files, name in distinct.items() if draws else ():
                starts[name] = lambda *, stop_at, files=files: MemoryDisk(dict(files), stop_at=stop_at)
            # A reset may have come any way; what was replaced is there still.
            kept = {0: 1} if what == "a replacement" else {}
            for name, start in starts.items():
                for stop in range(1, 200):
                    again, acknowledged = start(stop_at=stop), dict(kept)
                    try:
                        _do_again(again, version=4)
                        acknowledged[0] = 4
                    except Crash:
                        pass
                    when = f"{what} ended at operation {first}, {name}; the next at operation {stop}"
                    states += check_survivors(again, acknowledged, when, draws, rows=[0])
                    if acknowledged.get(0) == 4:
                        break
    return states


def _do_again(disk: MemoryDisk, version: int) -> None:
    """As the next process does: finish a replacement, then run the row."""
    layout = layout_on(disk)
    for name in disk.list(commits.JOURNAL):
        commits.apply_journal(layout, int(name))
    if layout.completed([0])[0]:
        replace(layout, 0, version)
    else:
        commit(layout, [0], version)


ARRIVES: dict[str, Callable[[str, int], bool]] = {
    "nothing arrived": lambda file, sector: False,
    "all arrived": lambda file, sector: True,
    "even sectors arrived": lambda file, sector: sector % 2 == 0,
}


def failing_syncs(folder: Path, draws: int) -> int:
    """Every sync in turn reports an error and forgets what it should have written; it is tried again; a cut."""
    _known.clear()
    states, syncs = 0, _operations_of_syncs()
    check(len(syncs) > ENOUGH / 2, f"the scenario has {len(syncs)} syncs, fewer than three phases need")
    for how, arrives in list(ARRIVES.items())[: 1 if draws == 0 else None]:
        for fail, operation in enumerate(syncs, start=1):
            for stop in range(operation + 1, 10_000):
                disk = MemoryDisk(empty_files(), stop_at=stop)
                disk.fail_at, disk.arrives = fail, arrives
                acknowledged: dict[int, int] = {}
                try:
                    for rows, version in STEPS:
                        _try_twice(disk, rows, version)
                        acknowledged.update(dict.fromkeys(rows, version))
                        if disk.syncs >= fail:
                            break
                except Crash:
                    over = False
                else:
                    over = True
                states += check_survivors(disk, acknowledged, f"sync {fail} failed, {how}; cut at {stop}", draws)
                if over:
                    break
    return states


def _operations_of_syncs() -> list[int]:
    """At which operations the scenario syncs."""
    operations: list[int] = []

    class Noting(MemoryDisk):
        def sync(self, names):
            for name in names:
                super().sync([name])
                operations.append(self.operations)

    disk = Noting(empty_files())
    for rows, version in STEPS:
        do(layout_on(disk), rows, version)
    return operations


def _try_twice(disk: MemoryDisk, rows: list[int], version: int) -> None:
    """A step as a worker takes it: after an error row by row, and what is seen complete is done."""
    layout = layout_on(disk)
    try:
        do(layout, rows, version)
    except StoreError:
        for row in rows:
            if disk.list(commits.JOURNAL):
                commits.apply_journal(layout, row)
            elif version > 1:
                # The journal is removed last, so the row may be what it should be.
                if found({name: bytes(data) for name, data in disk.cached.items()}, row) != version:
                    replace(layout, row, version)
            elif not layout.completed([row])[0]:
                do(layout, [row], version)


POWER_CUTS = Experiment(
    "power cut at every write, in memory", power_cuts, fast=4, slow=32, full=500, inside=True, quick=True
)
TWO_IN_A_ROW = Experiment(
    "power cut or kill at every write, twice, in memory", two_in_a_row, fast=0, full=8, slow=1, inside=True, quick=True
)
FAILING_SYNCS = Experiment(
    "every sync fails once, then a cut, in memory", failing_syncs, fast=0, slow=1, full=8, inside=True, quick=True
)

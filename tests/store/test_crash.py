"""Promises 1 and 2: the power goes out after, and during, every single write; every state it may leave is checked.

The mutants at the end show that the simulator sees each mistake that the commit protocol exists to prevent.
"""

import numpy as np
import pytest

from datamodels.spec import Field
from datamodels.store import commit as commits
from datamodels.store.commit import Layout, RowInfo
from tests.store.crash import Crash, MemoryDisk

ROWS = 6
# 150 float64 span sectors; a uint8 scalar shares its sector with every other row.
FIELDS = {"margins": Field("margins", (150,), "float64"), "tag": Field("tag", (), "uint8")}
HEAD = 128


def layout_on(disk):
    heads = {commits.COMPLETED_FILE: HEAD, commits.ROWS_FILE: HEAD}
    for key in FIELDS:
        heads |= {commits.key_file(key): HEAD, commits.record_file(key): HEAD}
    return Layout(disk, FIELDS, ROWS, heads)


def empty_files():
    sizes = {commits.COMPLETED_FILE: 1, commits.ROWS_FILE: 64}
    for key, field in FIELDS.items():
        sizes |= {commits.key_file(key): field.nbytes, commits.record_file(key): 16}
    return {name: bytes(HEAD + ROWS * size) for name, size in sizes.items()}


def values(row, version):
    """What version `version` of a row holds: no two rows, and no two versions of one, share a byte pattern."""
    return {
        "margins": (np.arange(150) + 1000.0 * row + 1e6 * version).tobytes(),
        "tag": bytes([16 * version + row]),
    }


def commit(layout, rows, version):
    blobs = {key: [values(row, version)[key] for row in rows] for key in FIELDS}
    commits.commit(layout, rows, blobs, [RowInfo(1, 0.0, row) for row in rows], f"run-{version}")


def replace(layout, row, version):
    commits.write_journal(layout, row, values(row, version), RowInfo(2, 0.0, row), f"run-{version}")
    commits.apply_journal(layout, row)


def scenario(layout, acknowledged):
    """Fresh rows alone and in a batch, a replaced row, and a row that is run again after a crash left it half done."""
    commit(layout, [4], 1)
    acknowledged[4] = 1
    commit(layout, [0, 1, 3], 1)
    acknowledged.update({0: 1, 1: 1, 3: 1})
    replace(layout, 1, 2)
    acknowledged[1] = 2
    replace(layout, 1, 3)
    acknowledged[1] = 3


def found(files, row):
    """The version that a row holds by plain bytes, None where it is not complete; fails where it is neither."""
    layout = layout_on(MemoryDisk(files))
    if not layout.completed([row])[0]:
        return None
    held = {key: layout.read(commits.key_file(key), row, 1, field.nbytes) for key, field in FIELDS.items()}
    for key in FIELDS:
        problem = commits.problem(layout.records(key, [row])[0], key, row, held[key])
        assert problem is None, f"row {row}, {key}: {problem}"
    assert commits.row_record_intact(layout.row_records([row])[0], row)
    for version in (1, 2, 3):
        if held == values(row, version):
            return version
    raise AssertionError(f"row {row} is complete with bytes that nobody committed")


def recovered(files):
    disk = MemoryDisk(files)
    layout = layout_on(disk)
    for name in disk.list(commits.JOURNAL):
        commits.apply_journal(layout, int(name))
    assert not disk.pending, "recovery reports done with unsynced writes"
    return {name: bytes(data) for name, data in disk.durable.items()}


def crash_everywhere(make_disk=MemoryDisk, draws=4):
    """Run the scenario to every operation; the number of states checked."""
    states = 0
    for stop in range(1, 10_000):
        disk, acknowledged = make_disk(empty_files(), stop_at=stop), {}
        try:
            scenario(layout_on(disk), acknowledged)
        except Crash:
            pass
        else:
            assert stop > 40, "the scenario has fewer operations than a protocol with three phases needs"
            return states
        for name, files in disk.survivors(draws=draws, seed=stop):
            states += 1
            try:
                before = {row: found(files, row) for row in range(ROWS)}
                after = {row: found(recovered(files), row) for row in range(ROWS)}
            except AssertionError as error:
                raise AssertionError(f"operation {stop}, {name}: {error}") from None
            for row, version in acknowledged.items():
                # Row 1 is being replaced in the later part: the old values or newer ones, never none.
                allowed = {version} if row != 1 else {v for v in (1, 2, 3) if v >= version}
                assert after[row] in allowed, f"operation {stop}, {name}: row {row} was {version}, is {after[row]}"
            assert before[2] is None and before[5] is None, f"operation {stop}, {name}: a row that nobody ran"
    raise AssertionError("the scenario did not end")


def test_every_crash_leaves_every_row_incomplete_or_exact():
    assert crash_everywhere() > 700


def test_a_row_left_half_done_is_run_again_and_exact():
    disk = MemoryDisk(empty_files(), stop_at=6)  # key bytes and some records are there, `_completed` is not
    with pytest.raises(Crash):
        commit(layout_on(disk), [2], 1)
    for name, files in disk.survivors(draws=8, seed=0):
        for stop in range(1, 100):
            again = MemoryDisk(files, stop_at=stop)
            try:
                commit(layout_on(again), [2], 2)
            except Crash:
                for how, torn in again.survivors(draws=4, seed=stop):
                    assert found(torn, 2) in (None, 2), f"{name}, then operation {stop}, {how}"
            else:
                break
        else:
            raise AssertionError("the second run did not end")


def test_adjacent_rows_are_one_write_and_each_file_is_synced_once_per_phase():
    disk = MemoryDisk(empty_files())
    commit(layout_on(disk), [0, 1, 2, 5], 1)
    # Two runs of rows in 2 keys, 2 records, 1 row file and 1 flag file; 2 + 3 + 1 syncs.
    assert disk.operations == 2 * 6 + 6


# ------------------------------------------------------------------------------------ mutants


class NothingSynced(MemoryDisk):
    def sync(self, names):
        pass


class KeysNotSynced(MemoryDisk):
    def sync(self, names):
        super().sync([name for name in names if name not in ("margins.npy", "tag.npy")])


class RecordsNotSynced(MemoryDisk):
    def sync(self, names):
        super().sync([name for name in names if not name.startswith("_keys/")])


class CompletedFirst(MemoryDisk):
    """Writes and syncs `_completed` with the first key byte of a row."""

    def write(self, name, offset, data):
        if name == "margins.npy":
            size = FIELDS["margins"].nbytes
            for row in range((offset - HEAD) // size, (offset + len(data) - HEAD) // size):
                super().write(commits.COMPLETED_FILE, HEAD + row, b"\1")
            super().sync([commits.COMPLETED_FILE])
        super().write(name, offset, data)


@pytest.mark.parametrize("mutant", [NothingSynced, KeysNotSynced, RecordsNotSynced, CompletedFirst])
def test_the_simulator_catches(mutant):
    with pytest.raises(AssertionError, match="operation"):
        crash_everywhere(mutant)


def test_the_simulator_catches_a_replacement_that_does_not_take_the_flag_back(monkeypatch):
    monkeypatch.setattr(commits, "_invalidate", lambda *which: None)
    with pytest.raises(AssertionError, match="operation"):
        crash_everywhere()


def test_the_simulator_catches_a_replacement_without_a_journal(monkeypatch):
    def bare(layout, row, blobs, info, run):
        commits.commit(layout, [row], {key: [blob] for key, blob in blobs.items()}, [info], run)

    monkeypatch.setattr(commits, "write_journal", bare)
    monkeypatch.setattr(commits, "apply_journal", lambda layout, row: None)
    with pytest.raises(AssertionError, match="operation"):
        crash_everywhere()

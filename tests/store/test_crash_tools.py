"""What the tools do to rows in place, under power cuts: in every operation of theirs, and after a crash of a worker.

A state is what a crash leaves; after it comes a repair, during which the power goes out again, and one more repair.
"""

import numpy as np
import pytest

from datamodels.spec import Field
from datamodels.store import commit as commits
from datamodels.store import repair as repairs
from datamodels.store.check import look
from datamodels.store.commit import Layout, RowInfo
from datamodels.store.repair import mend
from tests.faults.memory import Crash
from tests.faults.memory import MemoryDisk as Disk

ROWS, HEAD = 5, 128
# 150 float64 span sectors; the others share theirs with every other row.
FIELDS = {
    "margins": Field("margins", (150,), "float64"),
    "tag": Field("tag", (), "uint8"),
    "extra": Field("extra", (2,), "uint16", required=False),
}


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
    """What version `version` of a row holds, without `extra`."""
    margins = (np.arange(150) + 1000.0 * row + 1e6 * version).tobytes()
    return {"margins": margins, "tag": bytes([16 * version + row])}


def extra(row, version):
    return np.array([row, 100 + version], "uint16").tobytes()


def commit(layout, rows, version):
    blobs = {key: [values(row, version)[key] for row in rows] for key in ("margins", "tag")}
    commits.commit(layout, rows, blobs, [RowInfo(1, 0.0, row) for row in rows], f"run-{version}")


def fill(layout, rows, version):
    commits.fill(layout, rows, {"extra": [extra(row, version) for row in rows]}, {"extra": [1] * len(rows)})


def replace(layout, row, version):
    commits.write_journal(layout, row, values(row, version), RowInfo(2, 0.0, row), f"run-{version}")
    commits.apply_journal(layout, row)


def replace_extra(layout, row, version):
    commits.write_journal(layout, row, {"extra": extra(row, version)}, None, f"run-{version}")
    commits.apply_journal(layout, row)


# A row is (version, version of `extra` or None), or None where it is not complete. Each step: the rows, what they may
# hold while it lasts, what they hold after it, and the call.
SCENARIO = [
    ([0, 1, 3], {None, (1, None)}, (1, None), lambda layout: commit(layout, [0, 1, 3], 1)),
    ([0, 1], {(1, None), (1, 1)}, (1, 1), lambda layout: fill(layout, [0, 1], 1)),
    ([0], {(1, 1), None}, None, lambda layout: commits.clear(layout, [0])),
    ([0], {None, (2, None)}, (2, None), lambda layout: commit(layout, [0], 2)),
    ([0], {(2, None), (2, 2)}, (2, 2), lambda layout: fill(layout, [0], 2)),
    ([0], {(2, 2), (2, None), (2, 3)}, (2, 3), lambda layout: fill(layout, [0], 3)),
    ([0], {(2, 3), (2, None)}, (2, None), lambda layout: commits.clear_keys(layout, [0], ["extra"])),
    ([1], {(1, 1), (2, None)}, (2, None), lambda layout: replace(layout, 1, 2)),
    ([1, 3], {(2, None), (1, None), None}, None, lambda layout: commits.clear(layout, [1, 3])),
]
REPLACED = [
    ([0], {None, (1, None)}, (1, None), lambda layout: commit(layout, [0], 1)),
    ([0], {(1, None), (1, 1)}, (1, 1), lambda layout: fill(layout, [0], 1)),
    ([0], {(1, 1), (1, 2)}, (1, 2), lambda layout: replace_extra(layout, 0, 2)),
]


def run(layout, allowed, scenario):
    """`allowed`: what each row may hold at this moment."""
    for rows, during, after, call in scenario:
        allowed.update(dict.fromkeys(rows, during))
        call(layout)
        allowed.update({row: {after} for row in rows})


def held(files, row, where):
    """What a row holds by plain bytes; fails where it is complete and not exact."""
    layout = layout_on(Disk(files))
    seen = look(layout, row)
    if seen.flag == 0:
        return None
    assert seen.flag == 1 and seen.done and not seen.problems, f"{where}: row {row}: {seen}"
    bytes_of = {key: layout.read(commits.key_file(key), row, 1, field.nbytes) for key, field in FIELDS.items()}
    version = next((v for v in (1, 2) if {**bytes_of, **values(row, v)} == bytes_of), "nobody's")
    there = layout.records("extra", [row])["status"][0] == commits.VALID
    return version, next((v for v in (1, 2, 3) if bytes_of["extra"] == extra(row, v)), "nobody's") if there else None


def repaired(disk):
    """Finish what was interrupted and repair every row, as the command does; what was done."""
    layout = layout_on(disk)
    for name in disk.list(commits.JOURNAL):
        commits.apply_journal(layout, int(name))
    return [what for row in range(ROWS) for what in mend(layout, row, seed=row)]


def check(files, allowed, where, *, settled):
    for row in range(ROWS):
        version = held(files, row, where)
        assert version in allowed.get(row, {None}), f"{where}: row {row} holds {version}, not {allowed.get(row)}"
        seen = look(layout_on(Disk(files)), row)
        left = settled and seen.flag != 1 and seen.done and not seen.problems
        assert not left, f"{where}: row {row} is left without its flag"


def everywhere(scenario=SCENARIO, draws=0):
    """Crash in every operation, repair, crash in every operation of that, repair; (states, what repairs did)."""
    did, known = set(), set()

    def new(files, allowed):
        """Whether this state has not been looked at: many crashes leave the same one."""
        state = hash((tuple(sorted(files.items())), repr(sorted(allowed.items()))))
        return state not in known and not known.add(state)

    for stop in range(1, 10_000):
        disk, allowed = Disk(empty_files(), stop_at=stop), {}
        try:
            run(layout_on(disk), allowed, scenario)
        except Crash:
            pass
        else:
            assert stop > 8 * len(scenario)
            return len(known), did
        starts = [("killed, not cut, nothing synced", disk.goes_on)]
        for name, files in disk.survivors(draws=draws, seed=stop):
            starts.append((name, lambda stop_at, files=files: Disk(files, stop_at=stop_at)))
        for name, files in disk.survivors(draws=draws, seed=stop):
            for row in range(ROWS):
                where = f"operation {stop}, {name}, before the repair"
                version = held(files, row, where)
                # A replacement that was cut short has taken its row, or its key, and not yet put it back.
                taken = f"{commits.JOURNAL}/{row}" in files and version == (1, None)
                fits = version is None or taken or version in allowed.get(row, {None})
                assert fits, f"{where}: row {row} holds {version}"
        for name, start in starts:
            for cut in range(1, 1000):
                again = start(stop_at=cut)
                where = f"operation {stop}, {name}, operation {cut} of the repair"
                try:
                    did.update(repaired(again))
                except Crash:
                    for how, files in again.survivors(draws=draws, seed=cut):
                        if new(files, allowed):
                            second = Disk(files)
                            repaired(second)
                            after = {n: bytes(d) for n, d in second.durable.items()}
                            check(after, allowed, f"{where}, {how}", settled=True)
                else:
                    for how, files in again.survivors(draws=draws, seed=cut):
                        if new(files, allowed):
                            check(files, allowed, f"{where}, {how}", settled=False)
                    break
    raise AssertionError("the scenario did not end")


def test_rows_are_incomplete_or_exact_and_what_was_acknowledged_stays():
    states, did = everywhere()
    assert states > 500 and {what[:33] for what in did} == {"its completed flag was not set: s"}


def test_a_key_that_is_replaced_keeps_its_old_value_or_gets_the_new_one():
    assert everywhere(REPLACED, draws=4)[0] > 50


# ------------------------------------------------------------------------------------ mutants


def caught(match="", scenario=SCENARIO):
    with pytest.raises(AssertionError, match=f"operation.*{match}"):
        everywhere(scenario)


def test_a_repair_that_sets_a_flag_before_what_it_vouches_for_is_on_the_disk(monkeypatch):
    def mark(layout, row, guard):
        repairs._write(layout, commits.COMPLETED_FILE, row, b"\1", guard)

    monkeypatch.setattr(repairs, "_mark", mark)
    caught()


def test_a_reset_that_leaves_the_records(monkeypatch):
    def clear(layout, rows, guard=lambda: None):
        layout.write(commits.COMPLETED_FILE, rows, [b"\0"] * len(rows), guard)
        layout.disk.sync([commits.COMPLETED_FILE])

    monkeypatch.setattr(commits, "clear", clear)
    caught("row 0 holds ")


def test_a_reset_that_takes_the_records_before_the_flag(monkeypatch):
    def clear(layout, rows, guard=lambda: None):
        commits.clear_keys(layout, rows, list(FIELDS), guard)
        layout.write(commits.ROWS_FILE, rows, [bytes(64)] * len(rows), guard)
        layout.write(commits.COMPLETED_FILE, rows, [b"\0"] * len(rows), guard)
        layout.disk.sync([commits.ROWS_FILE, commits.COMPLETED_FILE])

    monkeypatch.setattr(commits, "clear", clear)
    caught("before the repair: row 0: .*never written")


def test_a_reset_that_takes_the_keys_before_the_rows_record(monkeypatch):
    def clear(layout, rows, guard=lambda: None):
        commits._invalidate(layout, rows, guard, np.ones(len(rows), bool))
        layout.write(commits.ROWS_FILE, rows, [bytes(64)] * len(rows), guard)
        layout.disk.sync([commits.ROWS_FILE])

    monkeypatch.setattr(commits, "clear", clear)
    caught(r"row 0 holds \(1, None\)")


def test_a_key_that_is_filled_in_again_without_taking_its_record_back(monkeypatch):
    monkeypatch.setattr(commits, "clear_keys", lambda *which: None)
    caught("row 0: .*'extra': 'its bytes are not what was committed")


def test_a_key_whose_record_comes_before_its_bytes(monkeypatch):
    class RecordsFirst(Disk):
        def sync(self, names):
            super().sync([name for name in names if name != "extra.npy"])

    monkeypatch.setitem(globals(), "Disk", RecordsFirst)
    caught("'extra': 'its bytes are not what was committed")


def test_a_key_that_is_replaced_in_place(monkeypatch):
    real = globals()["fill"]
    monkeypatch.setitem(globals(), "replace_extra", lambda layout, row, version: real(layout, [row], version))
    caught(r"row 0 holds \(1, None\)", REPLACED)


def test_a_journal_of_a_key_that_is_removed_before_the_key_is_there(monkeypatch):
    def apply_journal(layout, row, guard=lambda: None):
        run, info, blobs = commits.read_journal(layout, row)
        layout.disk.remove(f"{commits.JOURNAL}/{row}")
        blobs = {key: [blob] for key, blob in blobs.items()}
        if info is None:
            commits.fill(layout, [row], blobs, {key: [1] for key in blobs})
        else:
            commits.commit(layout, [row], blobs, [info], run)

    monkeypatch.setattr(commits, "apply_journal", apply_journal)
    caught(r"row 0 holds \(1, None\)", REPLACED)

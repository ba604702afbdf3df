"""The bench is held against mistakes put into the store: each has to be caught, and for the reason that it is one."""

import os

import pytest

from tests.faults import crash, flips, full_disk, kills, mutants, power, stopped, syscalls
from tests.faults.bench import FULL, Experiment, Lost

# mutant -> who catches it, with how much, and what it says
CAUGHT: dict[str, list[tuple[Experiment, int, str]]] = {
    # the order of a commit, and what is synced
    "completed_first": [(crash.POWER_CUTS, 0, "it was never written"), (kills.KILLS, 60, "never written|not what")],
    "no_invalidation": [
        (crash.POWER_CUTS, 0, "bytes that nobody committed"),
        (kills.KILLS, 60, "a note of another version|not what was committed"),
    ],
    "flag_not_taken_back": [(crash.POWER_CUTS, 0, "it was never written")],
    "flag_believed_taken_back": [(crash.TWO_IN_A_ROW, 0, "it was never written")],
    "records_not_taken_back": [
        (crash.TWO_IN_A_ROW, 0, "bytes that nobody committed"),
        (kills.KILLS, 60, "a note of another version"),
    ],
    "records_of_absent_keys_not_synced": [(crash.TWO_IN_A_ROW, 0, "bytes that nobody committed")],
    "invalidation_not_synced": [(crash.POWER_CUTS, 0, "it was never written")],
    "keys_not_synced": [
        (crash.POWER_CUTS, 0, "not what was committed"),
        (power.EXT4, 8, "not what was committed"),
        (power.XFS, 8, "not what was committed"),
    ],
    "records_not_synced": [
        (crash.POWER_CUTS, 0, "it was never written"),
        (power.EXT4, 8, "never written|not marked complete|holds version 0"),
    ],
    "completed_not_synced": [
        (crash.POWER_CUTS, 0, "was 1, is None"),
        (power.EXT4, 8, "not marked complete|holds version 0"),
    ],
    "nothing_synced": [
        (crash.POWER_CUTS, 0, "not what was committed"),
        (power.EXT4, 8, "holds version 0|never written|not what was committed"),
        (power.XFS, 8, "holds version 0|never written|not what was committed"),
    ],
    "failed_sync_tried_again": [
        (crash.FAILING_SYNCS, 0, "not what was committed"),
        (power.REFUSED, 1, "goes on though the disk refuses"),
    ],
    "failed_sync_not_forgotten": [
        (crash.FAILING_SYNCS, 0, "bytes that nobody committed"),
        (power.REFUSED, 10, "not what was committed"),
    ],
    "flag_left_after_a_failed_sync": [(crash.FAILING_SYNCS, 0, "row 4 was 1, is None")],
    # a row that is replaced
    "replaced_in_place": [
        (crash.POWER_CUTS, 0, "row 1 was 1, is None"),
        (kills.KILLS, 60, "holds version 0"),
    ],
    "journal_removed_first": [
        (crash.POWER_CUTS, 0, "row 1 was 1, is None"),
        (kills.KILLS, 60, "holds version 0"),
    ],
    "journal_not_synced": [(power.EXT4, 20, "the file was cut short"), (power.XFS, 20, "the file was cut short")],
    # how bytes are written
    "write_error_passed_over": [
        (full_disk.RUNNING, 100, "not what was committed"),
        (syscalls.FAILING, 1000, "not what was committed"),
    ],
    "short_write_taken_for_whole": [(syscalls.SHORT, 1, "its record is damaged|not what was committed")],
    # What these two lose is lost on NFS (make test-nfs): a neighbour's row.
    "no_o_dsync": [
        (syscalls.NETWORK, 1, "opened for plain writes"),
        (power.AS_NETWORK, 8, "holds version 0|never written|not what was committed"),
    ],
    "memory_map": [
        (syscalls.NETWORK, 1, "mapped to be written"),
        (full_disk.RUNNING, 100, "the worker died by signal 7"),
        (power.AS_NETWORK, 8, "holds version 0|never written|not what was committed"),
    ],
    # who may write which row
    "claim_without_generation": [(stopped.TAKING, 1, "both have the row")],
    "claim_not_read_again": [(stopped.TAKING, 1, "both have the row")],
    "living_are_judged_by_their_heartbeat": [(stopped.NEAR, 5, "of a process that lives was taken")],
    "takeover_without_lock": [(stopped.CONTAINED, 3, "taken over: True, said done: True")],
    "commit_without_lock": [(stopped.CONTAINED, 3, "taken over: True, said done: True")],
    "claims_not_checked_in_a_commit": [
        (stopped.CONTAINED, 3, "taken over: True, said done: True"),
        (stopped.FAR, 9, "overtaken, it wrote"),
    ],
    "lease_checked_once": [(stopped.FAR, 9, "overtaken, it wrote")],
    "lease_not_checked": [(stopped.SILENT, 1, "the lease is half over")],
    # what is checked
    "bytes_not_checked": [(flips.ROWS_AND_RECORDS, 300, "nobody finds it")],
    "key_records_not_checked": [(flips.ROWS_AND_RECORDS, 300, "_keys/.*nobody finds it")],
    "row_records_not_checked": [(flips.ROWS_AND_RECORDS, 300, "(_completed|_rows).*nobody finds it")],
    "journal_without_checksum": [(flips.JOURNALS, 100, "it was applied")],
    # how a store is made
    "space_not_reserved": [(full_disk.MAKING, 97, "no room for an array that was reserved")],
    "spec_before_arrays": [(power.EXT4_CALLS, 1, "making a store, .*not JSON"), (power.XFS_CALLS, 1, "not JSON")],
    "new_files_not_synced": [(power.EXT4_CALLS, 1, "making a store, .*not JSON"), (power.XFS_CALLS, 1, "not JSON")],
}


# A cut at a random moment may miss what others always find; then it is asked only in the full bench, and more often.
RANDOM = (kills.KILLS, power.EXT4, power.XFS, power.AS_NETWORK, power.REFUSED)


def pairs():
    for mutant, catchers in CAUGHT.items():
        certain = any(experiment not in RANDOM for experiment, _, _ in catchers)
        for experiment, amount, says in catchers:
            if experiment in RANDOM and certain:
                if not os.environ.get(FULL):
                    continue
                amount *= 10
            marks = [] if experiment.quick else [pytest.mark.slow]
            yield pytest.param(mutant, experiment, amount, says, id=f"{mutant}, {experiment.fault}", marks=marks)


@pytest.mark.parametrize(("mutant", "experiment", "amount", "says"), [*pairs()])
def test_the_bench_catches(mutant, experiment, amount, says, tmp_path, record_property, monkeypatch):
    experiment.needs()
    monkeypatch.setenv(mutants.VARIABLE, mutant)
    mutated = mutants.apply(mutant if experiment.inside else None)
    caught = False
    try:
        # A row may be cut off anywhere, so what is random may also stumble over the row's flag first.
        with mutated, pytest.raises(Lost, match=says if experiment.inside else f"{says}|not marked complete"):
            experiment.run(tmp_path, amount)
        caught = True
    finally:
        record_property("mutant", {"mutant": mutant, "by": experiment.fault, "caught": caught})


def test_no_mutant_goes_untried():
    assert set(CAUGHT) == set(mutants.MUTANTS)

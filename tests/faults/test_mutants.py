"""The bench is held against mistakes put into the store: each has to be caught, and for the reason that it is one."""

import pytest

from tests.faults import crash, mutants
from tests.faults.bench import Experiment, Lost

# mutant -> who catches it, with how much, and what it says
CAUGHT: dict[str, list[tuple[Experiment, int, str]]] = {
    "completed_first": [(crash.POWER_CUTS, 0, "it was never written")],
    "no_invalidation": [(crash.POWER_CUTS, 0, "bytes that nobody committed")],
    "flag_not_taken_back": [(crash.POWER_CUTS, 0, "it was never written")],
    "records_not_taken_back": [(crash.TWO_IN_A_ROW, 0, "bytes that nobody committed")],
    "records_of_absent_keys_not_synced": [(crash.TWO_IN_A_ROW, 0, "bytes that nobody committed")],
    "flag_believed_taken_back": [(crash.TWO_IN_A_ROW, 0, "it was never written")],
    "invalidation_not_synced": [(crash.POWER_CUTS, 0, "it was never written")],
    "keys_not_synced": [(crash.POWER_CUTS, 0, "not what was committed")],
    "records_not_synced": [(crash.POWER_CUTS, 0, "it was never written")],
    "completed_not_synced": [(crash.POWER_CUTS, 0, "was 1, is None")],
    "nothing_synced": [(crash.POWER_CUTS, 0, "not what was committed")],
    "failed_sync_tried_again": [(crash.FAILING_SYNCS, 0, "not what was committed")],
    "failed_sync_not_forgotten": [(crash.FAILING_SYNCS, 0, "bytes that nobody committed")],
    "flag_left_after_a_failed_sync": [(crash.FAILING_SYNCS, 0, "row 4 was 1, is None")],
    "replaced_in_place": [(crash.POWER_CUTS, 0, "row 1 was 1, is None")],
    "journal_removed_first": [(crash.POWER_CUTS, 0, "row 1 was 1, is None")],
}


def pairs():
    for mutant, catchers in CAUGHT.items():
        for experiment, amount, says in catchers:
            marks = [] if experiment.quick else [pytest.mark.slow]
            yield pytest.param(mutant, experiment, amount, says, id=f"{mutant}, {experiment.fault}", marks=marks)


@pytest.mark.parametrize(("mutant", "experiment", "amount", "says"), [*pairs()])
def test_the_bench_catches(mutant, experiment, amount, says, tmp_path, record_property, monkeypatch):
    if experiment.inside:
        mutated = mutants.apply(mutant)
    else:
        mutated = mutants.apply(None)
        monkeypatch.setenv(mutants.VARIABLE, mutant)
    caught = False
    try:
        with mutated, pytest.raises(Lost, match=says):
            experiment.run(tmp_path, amount)
        caught = True
    finally:
        record_property("mutant", {"mutant": mutant, "by": experiment.fault, "caught": caught})


def _no_mutant_goes_untried():
    assert set(CAUGHT) == set(mutants.MUTANTS)

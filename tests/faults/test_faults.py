"""Each promise of the store under each fault; an experiment fails where something is lost."""

import time

import pytest

from tests.faults import crash, flips, full_disk, kills, power, stopped, syscalls
from tests.faults.bench import Experiment, Lost

EXPERIMENTS = [
    found
    for module in (crash, flips, full_disk, kills, power, stopped, syscalls)
    for found in vars(module).values()
    if isinstance(found, Experiment)
]


def cases():
    for experiment in EXPERIMENTS:
        if experiment.fast is not None:
            yield pytest.param(experiment, False, id=experiment.fault)
        if experiment.slow is not None:
            yield pytest.param(experiment, True, id=f"{experiment.fault}, longer", marks=pytest.mark.slow)


@pytest.mark.parametrize(("experiment", "longer"), [*cases()])
def test_nothing_is_lost(experiment, longer, tmp_path, record_property):
    experiment.needs()
    started, tried, lost = time.monotonic(), 0, 0
    try:
        tried = experiment.run(tmp_path, experiment.amount(longer=longer))
        assert tried > 0
    except Lost:
        lost = 1
        raise
    finally:
        seconds = time.monotonic() - started
        record_property("fault", {"fault": experiment.fault, "tried": tried, "lost": lost, "seconds": seconds})

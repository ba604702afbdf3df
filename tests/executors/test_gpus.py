"""Which GPUs there are and who gets which; the GPUs are a list in the environment, or what a program says."""

import os

import pytest

from datamodels.errors import ConfigError
from datamodels.executors.gpus import capacity, devices, shares
from tests.executors.conformance import fake_gpus
from tests.jobs import Job, finish, plain


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this a machine with so many GPUs."""

    def machine(count):
        fake_gpus(tmp_path, count)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine


@pytest.mark.parametrize(
    ("wanted", "visible", "expected"),
    [
        ("auto", "0,1,2", ["0", "1", "2"]),
        ("auto", "3, 7", ["3", "7"]),
        ("auto", "GPU-4a,MIG-b", ["GPU-4a", "MIG-b"]),
        ("auto", "2,-1,0", ["2"]),  # as CUDA reads it
        ("0,1", None, ["0", "1"]),
        ("5", "4,5", ["5"]),
    ],
)
def test_what_the_environment_says_is_respected(wanted, visible, expected):
    assert devices(wanted, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_auto_counts(machine):
    machine(3)
    assert devices("auto", {}) == ["0", "1", "2"]


def test_parts_of_a_divided_gpu_have_a_worker_each(machine, tmp_path):
    machine(0)
    (tmp_path / "nvidia-smi").write_text("""#!/bin/sh
cat <<END
GPU 0: NVIDIA H100 (UUID: GPU-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-a)
  MIG 3g.40gb     Device  1: (UUID: MIG-b)
GPU 1: NVIDIA H100 (UUID: GPU-2)
END
""")
    assert devices("auto", {}) == ["MIG-a", "MIG-b", "1"]


@pytest.mark.parametrize(
    ("wanted", "visible", "message"),
    [
        ("auto", "", "CUDA_VISIBLE_DEVICES hides all"),
        ("auto", "-1", "CUDA_VISIBLE_DEVICES hides all"),
        ("auto", None, "nvidia-smi and /proc know of none"),
        ("0,3", "0,1", "CUDA_VISIBLE_DEVICES=0,1 hides 3"),
        ("0,0", None, "expected auto, or each GPU once as in 0,1; got '0,0'"),
        (",", None, "expected auto, or each GPU once"),
    ],
)
def test_gpus_that_are_not_there(machine, wanted, visible, message):
    machine(0)
    with pytest.raises(ConfigError, match=message):
        devices(wanted, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize(
    ("gpus", "each", "places"), [(4, 1, 4), (4, 2, 2), (3, 2, 1), (1, 2, 0), (2, 0.5, 4), (2, 0.1, 20), (2, 0.7, 2)]
)
def test_how_many_workers_have_a_place(gpus, each, places):
    assert capacity(gpus, each) == places
    names = [str(number) for number in range(gpus)]
    given = shares(names, places, each)
    assert len(given) == places
    load = [sum(name in share.split(",") for share in given) for name in names]
    assert max(load, default=0) <= max(1, int(1 / each + 1e-9))
    with pytest.raises(ConfigError, match="do not fit"):
        shares(names, places + 1, each)


def test_gpus_are_shared_only_when_all_are_taken():
    assert shares(["a", "b", "c"], 3, 0.5) == ["a", "b", "c"]
    assert shares(["a", "b"], 4, 0.5) == ["a", "b", "a", "b"]
    assert shares(["a", "b", "c", "d"], 2, 2) == ["a,b", "c,d"]
    with pytest.raises(ConfigError, match="4 workers with 1 GPU each do not fit the 2 there are .a, b.: 2 do; "
                                          "--pool.gpus_per_worker=0.5 lets them share"):  # fmt: skip
        shares(["a", "b"], 4, 1)
    with pytest.raises(ConfigError, match="expected a whole number of GPUs, or a part of one, got 1.5"):
        shares(["a", "b"], 1, 1.5)


SEES = """
import os, sys, time
def main(index):
    open(f'here-{os.getpid()}', 'w')
    while sum(name.startswith('here') for name in os.listdir('.')) < %d: time.sleep(.01)
    seen = os.environ['CUDA_VISIBLE_DEVICES']
    assert os.environ.get('CUDA_DEVICE_ORDER') == %r
    return {'x': int(seen.replace(',', '0') or -1)}
"""


@pytest.mark.parametrize(
    ("argv", "visible", "expected"),
    [
        ([], None, [0, 1, 2]),
        ([], "4,6", [4, 6]),
        (["--pool.gpus_per_worker=0.5"], "4,6", [4, 4, 6, 6]),
        (["--pool.gpus_per_worker=2"], "4,6", [406]),
        (["--pool.workers=1"], None, [0]),
    ],
)
def test_every_worker_of_a_pool_sees_its_own(tmp_path, machine, argv, visible, expected):
    machine(3)
    job = Job(tmp_path, plain(len(expected)), SEES % (len(expected), "PCI_BUS_ID" if visible is None else None))
    environment = {"PATH": os.environ["PATH"], **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    command = [*job.argv(), "--pool.gpus=auto", *argv]
    code, _, err = finish(job.start(module="datamodels.pool", argv=command, env=environment))
    assert code == 0, err
    assert sorted(job.array("x").tolist()) == expected


def test_without_a_gpu_auto_is_refused(tmp_path, machine):
    machine(0)
    job = Job(tmp_path, plain(2), SEES % (1, None))
    code, out, err = finish(
        job.start(module="datamodels.pool", argv=[*job.argv(), "--pool.gpus=auto"], env={"PATH": os.environ["PATH"]})
    )
    assert (code, out) == (2, "") and "--pool.gpus=auto: there is no GPU here" in err and err.count("\n") == 1

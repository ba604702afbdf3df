import pytest

from datamodels.errors import RegressionError
from datamodels.regression import memory

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes what the kernel shows, under tmp_path; files left out are not there."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    write(meminfo="MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   8000000 kB\n")
    return write


MACHINE = 8_192_000_000


def test_the_machine_alone(machine):
    assert memory.available() == MACHINE


def test_a_limit_of_version_2_less_what_is_used(machine, tmp_path):
    machine(cgroup="0::/job/step\n")
    group = tmp_path / "fs/job/step"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("3000000000\n")
    (group / "memory.current").write_text("1200000000\n")
    assert memory.available() == 1_800_000_000
    (group / "memory.stat").write_text("anon 5\ninactive_file 200000000\n")
    assert memory.available() == 2 * GB
    (group / "memory.max").write_text("max\n")
    assert memory.available() == MACHINE
    (group.parent / "memory.max").write_text("5000000000\n")  # a limit above binds as well
    (group.parent / "memory.current").write_text("6000000000\n")
    assert memory.available() == 0


@pytest.mark.parametrize("name", ["/elsewhere", "/../..", "/"])
def test_a_limit_of_version_1_where_the_group_itself_cannot_be_seen(machine, tmp_path, name):
    machine(cgroup=f"5:cpu:/x\n4:blkio,memory:{name}\n0::/\n")
    root = tmp_path / "fs/memory"
    root.mkdir(parents=True)
    (root / "memory.limit_in_bytes").write_text("2000000000\n")
    (root / "memory.usage_in_bytes").write_text("500000000\n")
    (root / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 100000000\n")
    assert memory.available() == 1_600_000_000
    (root / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory.available() == MACHINE


def test_a_system_that_does_not_say(machine, tmp_path):
    (tmp_path / "meminfo").unlink()
    assert memory.available() is None
    memory.require(10**18, "the fit", "nothing")


def test_refusal_says_how_much_and_what_to_do(machine):
    memory.require(MACHINE, "the fit", "ask for less")
    with pytest.raises(RegressionError, match=r"^the fit needs about 8.3 GB of memory, and 8.2 GB .*; ask for less$"):
        memory.require(MACHINE + 10**8, "the fit", "ask for less")


def test_the_real_machine():
    assert memory.available() > 10**7

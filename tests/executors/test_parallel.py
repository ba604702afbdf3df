"""worker_scripts/parallel.sh under the real GNU parallel, in both of its forms."""

import os
import subprocess
import sys

import pytest

from tests import needs
from tests.executors.conformance import Conformance, fake_gpus
from tests.jobs import CALLED, ROOT, Job, plain

SCRIPT = str(ROOT / "worker_scripts/parallel.sh")


@pytest.mark.slow
class TestWorkers(Conformance):
    @pytest.fixture
    def environment(self):
        needs.parallel()
        return {"PYTHON": sys.executable}

    def command(self, job, workers):
        return [SCRIPT, "workers", str(workers)]

    def rows(self, text):
        return f"--worker.rows={text}"

    def tells(self, said, done, rows):
        assert f"{done} of {rows} rows complete" in said

    def tells_of_deaths(self, said):
        assert "10 processes died, the last with code 9, and none had finished; stopped" in said


def run(job, *argv, **environment):
    needs.parallel()
    environment = {**os.environ, "PYTHONPATH": f"{job.folder}:{ROOT}", "PYTHON": sys.executable, **environment}
    command = [SCRIPT, *argv, *job.argv("--worker.retries=0")]
    return subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, timeout=60)


def test_one_process_for_each_row_as_released_scripts_do(tmp_path):
    source = """
import os
def main(index):
    if index == 2: raise ValueError('no luck')
    if index == 3 and not os.path.exists('died'):
        open('died', 'w')
        os._exit(9)
    return {'x': os.getpid()}
"""
    job = Job(tmp_path, plain(6), source)
    done = run(job, "rows", "2", "1-5")
    assert done.returncode == 1
    assert job.completed == [False, True, False, True, True, True]
    assert len(set(job.array("x").tolist())) == 5  # 0 stands for the two that are not complete
    assert "row 2: attempt 1 failed: ValueError: no luck" in done.stderr
    assert "row 3 ended with code 9; starting it again" in done.stderr
    assert "4 of 6 rows complete" in done.stderr


def test_rows_that_all_take_their_process_down_end_with_a_count(tmp_path):
    job = Job(tmp_path, plain(100), CALLED + "import os\ndef main(index):\n    called(index)\n    os._exit(9)")
    done = run(job, "rows", "2", "0-99")
    assert done.returncode == 1 and "10 processes died, the last with code 9, and none had finished" in done.stderr
    assert 10 <= len(job.calls()) <= 11


@pytest.mark.parametrize(
    ("environment", "expected"), [({"CUDA_VISIBLE_DEVICES": "3,5"}, {3, 5}), ({"smi": "2"}, {0, 1}), ({}, {-1})]
)
def test_jobs_take_gpus_in_turn(tmp_path, monkeypatch, environment, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    source = """
import os, time
def main(index):
    open(f'here-{os.getpid()}', 'w')
    while sum(name.startswith('here') for name in os.listdir('.')) < 3: time.sleep(.01)
    return {'x': int(os.environ.get('CUDA_VISIBLE_DEVICES', -1))}
"""
    job = Job(tmp_path, plain(3), source)
    if environment.pop("smi", None):
        fake_gpus(tmp_path, 2)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run(job, "workers", "3", **environment)
    assert done.returncode == 0, done.stderr
    assert set(job.array("x").astype(int).tolist()) == expected


@pytest.mark.parametrize("argv", [[], ["workers"], ["workers", "0"], ["rows", "2", "--worker.logdir=x"], ["row", "2"]])
def test_a_call_that_makes_no_sense_shows_how_it_is_meant(argv):
    done = subprocess.run([SCRIPT, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Workers under GNU parallel.") and "parallel.sh rows 8 0-99 --worker" in done.stderr
    assert "#" not in done.stderr and "usage()" not in done.stderr

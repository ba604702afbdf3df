"""What every engine promises. A test module inherits `Conformance` and says how a person starts workers with it.

All engines run for real, and on this host, so a worker is found as a process through the store's own `runs/`.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from datamodels.store import Store
from tests.jobs import CALLED, ROOT, Job, alive, finish, plain, until

WORKS = (
    CALLED
    + """
import time
def main(index):
    called(index)
    time.sleep(%s)
    return {'x': index}
"""
)
WAITS = (
    CALLED
    + """
import time
def main(index):
    called(index)
    end = time.monotonic() + 60
    while index >= 6 and not os.path.exists('go') and time.monotonic() < end: time.sleep(.02)
    return {'x': index}
"""
)
MEETS = (
    CALLED
    + """
import time
def main(index):
    called(index)
    open(f'here-{os.getpid()}', 'w').close()
    end = time.monotonic() + 60
    while sum(name.startswith('here') for name in os.listdir('.')) < 2 and time.monotonic() < end: time.sleep(.02)
    return {'x': index}
"""
)
FAILS = """
def main(index):
    if index % 10 == 3: raise ValueError(f'no luck with {index}')
    return {'x': index}
"""


def workers_of(job):
    """Process ids of the living workers of a store."""
    found = []
    for path in job.path.glob("runs/*.json"):
        record = json.loads(path.read_text())
        if "datamodels.worker" in record["argv"] and not record["finished"] and alive(record["pid"]):
            found.append(record["pid"])
    return found


def fake_gpus(folder, count):
    """An nvidia-smi in `folder` that lists so many GPUs."""
    program = folder / "nvidia-smi"
    lines = [f"GPU {number}: NVIDIA H200 (UUID: GPU-0000{number})" for number in range(count)]
    program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)


class Conformance:
    """`options` are those of the pool that choose the engine; `environment` is what it needs besides."""

    options: tuple[str, ...] = ()
    stopped_with = 130
    patience = 60  # seconds in which 40 short rows are done, the engine's own start included

    @pytest.fixture
    def environment(self):
        return {}

    @pytest.fixture
    def start(self, environment):
        """Start a job with two workers, or so many; the process that a person would see."""
        started = []

        def start(job, *more, workers=2):
            process = subprocess.Popen(
                [*self.command(job, workers), *job.argv(*more)],
                cwd=job.folder,
                env={**os.environ, "PYTHONPATH": f"{job.folder}:{ROOT}", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            started.append((job, process))
            return process

        yield start
        for job, process in started:
            process.kill()
            process.communicate()
            for pid in workers_of(job):
                os.kill(pid, signal.SIGKILL)

    def command(self, job, workers):
        """What a person types in front of the worker's own options."""
        return [sys.executable, "-m", "datamodels.pool", *self.options, f"--pool.workers={workers}"]

    def rows(self, text):
        """The option that asks for some rows only."""
        return f"--pool.rows={text}"

    def tells(self, said, done, rows):
        """That a person is told in the end how many rows are complete."""
        assert (f"all {rows} rows are complete" if done == rows else f"{done} of {rows} rows are complete") in said

    def tells_of_deaths(self, said):
        assert "5 workers in a row died before any row was finished; the last one ended with code 9" in said

    # ------------------------------------------------------------------ promises

    def test_all_rows_are_done_once_and_by_all_workers(self, tmp_path, start):
        job = Job(tmp_path, plain(40), MEETS)
        code, out, err = finish(start(job), self.patience)
        assert code == 0, err
        self.tells(out + err, 40, 40)
        assert job.array("x").tolist() == list(range(40)) and all(job.completed)
        assert sorted(map(int, job.calls())) == list(range(40)) and job.attempts == [1] * 40
        assert len(set(job.array("_rows")["run"].tolist())) == 2
        assert not list((job.path / "claims").iterdir())

    def test_a_killed_worker_is_replaced_and_its_row_is_done(self, tmp_path, start):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        until(lambda: len([row for row in job.calls() if int(row) >= 6]) == 2)
        victim, other = workers_of(job)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(workers_of(job)) - {victim, other}) == 1)  # one that was not there before
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert (code, job.completed) == (0, [True] * 12), err
        assert job.array("x").tolist() == list(range(12))
        assert sum(job.attempts) == len(job.calls()) == 13

    def test_rows_that_fail_are_told_and_the_others_are_done(self, tmp_path, start):
        job = Job(tmp_path, plain(40), FAILS)
        code, out, err = finish(start(job, "--worker.retries=0"), self.patience)
        assert code == 1
        assert job.completed == [row % 10 != 3 for row in range(40)]
        self.tells(out + err, 36, 40)
        for row in (3, 13, 23, 33):
            assert f"row {row}: 1 attempt, ValueError: no luck with {row}" in out + err

    def test_workers_that_cannot_be_configured_end_it_with_2_and_the_message(self, tmp_path, start):
        job = Job(tmp_path, plain(4), FAILS)
        code, _, err = finish(start(job, "--worker.batch=8"), self.patience)
        assert code == 2
        assert err.count("error: --worker.batch: job has no main_many() that could run several rows at once") == 1
        assert not any(job.attempts)

    def test_a_main_that_always_takes_its_process_down_ends_with_a_count(self, tmp_path, start):
        job = Job(tmp_path, plain(400), CALLED + "import os\ndef main(index):\n    called(index)\n    os._exit(9)")
        code, out, err = finish(start(job), self.patience)
        assert code == 1
        self.tells_of_deaths(err)
        self.tells(out + err, 0, 400)
        assert 5 <= len(job.calls()) <= 10

    def test_a_stop_gives_rows_back_uncounted_and_the_next_call_goes_on(self, tmp_path, start):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        until(lambda: len([row for row in job.calls() if int(row) >= 6]) == 2)
        pids = workers_of(job)
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process, self.patience)
        assert code == self.stopped_with
        until(lambda: not any(map(alive, pids)), 10)
        done = job.completed
        assert "Traceback" not in err
        self.tells(out + err, sum(done), 12)
        assert job.attempts == [int(flag) for flag in done]
        assert not [path for path in (job.path / "claims").iterdir() if path.is_symlink()]
        (tmp_path / "go").touch()
        code, _, err = finish(start(job), self.patience)
        assert code == 0, err
        assert job.attempts == [1] * 12

    def test_progress_is_what_the_store_holds_whoever_did_it(self, tmp_path, start):
        job = Job(tmp_path, plain(12), WAITS)
        with Store.open(job.path, sync=False) as store:
            store.commit_many(range(8, 12), {"x": [8.0, 9.0, 10.0, 11.0]})
        (tmp_path / "go").touch()
        code, out, err = finish(start(job), self.patience)
        assert code == 0, err
        self.tells(out + err, 12, 12)
        assert sorted(map(int, job.calls())) == list(range(8))

    def test_only_the_rows_asked_for_are_run(self, tmp_path, start):
        spec = {
            "schema": {"x": {"shape": [], "dtype": "float64"}},
            "design": [{"repeats": 5, "choices": {"lr": [0.1, 0.2], "depth": [1, 2]}}],
        }
        job = Job(tmp_path, spec, CALLED + "def main(index):\n    called(index)\n    return {'x': index}")
        code, _, err = finish(start(job, self.rows("lr=0.2,depth<2")), self.patience)
        assert code == 0, err
        assert (
            sorted(map(int, job.calls())) == list(range(10, 15)) == [i for i, flag in enumerate(job.completed) if flag]
        )
        code, _, err = finish(start(job, self.rows("lr=0.3")), self.patience)
        assert code == 2 and "lr has no level '0.3'; it has 0.1, 0.2" in err

"""Workers as processes of this machine."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from datamodels.executors.local import THREAD_VARIABLES, LocalExecutor, capped_threads, cores
from tests import needs
from tests.executors.conformance import Conformance
from tests.jobs import Job, alive, finish, plain, until


class TestLocal(Conformance):
    pass


@pytest.fixture
def local(tmp_path):
    made = []

    def make(source, **environment):
        logs = tmp_path / "logs"
        executor = LocalExecutor([sys.executable, "-c", source], workers=2, logs=logs, environment=environment)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.stop(0)


def ends(executor):
    found = []
    until(lambda: found.extend(executor.ended()) or not executor.running())
    return sorted(found, key=lambda end: end.number)


def test_codes_and_last_words_of_those_that_end(local):
    executor = local(
        "import os, sys, signal\nprint('hello', os.environ['X'], flush=True)\n"
        "print('and goodbye', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if os.environ['X'] == 'kill' else sys.exit(5)",
        X="exit",
    )
    executor.start([0])
    executor.environment["X"] = "kill"
    executor.start([1])
    assert executor.running() == 2
    first, second = ends(executor)
    assert (first.number, first.code, first.words) == (0, 5, "hello exit\nand goodbye")
    assert (second.number, second.code, second.words) == (1, -signal.SIGKILL, "hello kill\nand goodbye")
    assert Path(first.log).read_text() == first.words + "\n"
    assert executor.ended() == [] and executor.running() == 0


def test_only_the_end_of_a_long_log_is_kept_and_a_restart_appends(local):
    executor = local("import os\nprint('x' * int(os.environ['X']), 'end')", X="100000")
    executor.start([0])
    (end,) = ends(executor)
    assert len(end.words) < 5000 and end.words.endswith("x end")
    executor.environment["X"] = "1"
    executor.start([0])
    (end,) = ends(executor)
    assert end.words == "x end"  # and nothing of the copy before it
    assert os.path.getsize(end.log) == 100_005 + 6


SPAWNS = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
%s
time.sleep(60)
"""


def child_of(executor):
    return int(until(lambda: executor.log(0).read_text().strip()))


def test_stop_asks_and_then_makes_the_whole_group_end(local):
    executor = local(SPAWNS % "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    executor.start([0])
    child = child_of(executor)
    started = time.monotonic()
    assert executor.stop(0.4) == 1
    assert 0.4 < time.monotonic() - started < 5
    assert executor.running() == 0
    until(lambda: not alive(child), 5)


def test_stop_does_not_wait_for_those_that_listen(local):
    executor = local("import time\nprint(1, flush=True)\ntime.sleep(60)")
    executor.start([0])
    child_of(executor)
    started = time.monotonic()
    assert executor.stop(20) == 0
    assert time.monotonic() - started < 5


def test_what_a_killed_worker_started_ends_with_it(local):
    executor = local(SPAWNS % "os.kill(os.getpid(), signal.SIGKILL)")
    executor.start([0])
    child = child_of(executor)
    ends(executor)
    until(lambda: not alive(child), 5)


def test_workers_share_the_cores_unless_the_user_says_otherwise():
    assert set(capped_threads(1, {}).values()) == {str(cores())}
    assert set(capped_threads(10**6, {}).values()) == {"1"}
    mixed = capped_threads(10**6, {"OMP_NUM_THREADS": "7"})
    assert mixed == dict.fromkeys(THREAD_VARIABLES, "7")
    assert capped_threads(1, {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "3"})["MKL_NUM_THREADS"] == "3"


# ------------------------------------------------------------------ mains that need too much, for real

HUNGRY = """
import numpy as np
def main(index):
    if %s: return {'x': np.ones(1 << 27).sum()}  # 1 GiB
    return {'x': index}
"""


def run_limited(job, *more, **options):
    argv = [*job.argv("--worker.retries=1", *more), "--pool.workers=2"]
    return finish(job.start(module="datamodels.pool", argv=argv, **options))


def test_a_row_that_is_killed_for_its_memory_is_counted_and_the_others_are_done(tmp_path):
    job = Job(tmp_path, plain(12), HUNGRY % "index == 5")
    with needs.memory_limit(400) as processes:
        code, _, err = run_limited(job, preexec_fn=lambda: processes.write_text(str(os.getpid())))
    assert code == 1
    assert job.completed == [row != 5 for row in range(12)]
    assert job.attempts == [2 if row == 5 else 1 for row in range(12)]
    assert err.count("was killed by SIGKILL (out of memory, or past --worker.job_timeout)") == 2
    assert (
        "row 5: 2 attempts, The process that ran this row died without leaving a word, 2 times (killed, out of" in err
    )


def test_rows_that_all_need_too_much_end_with_a_count(tmp_path):
    job = Job(tmp_path, plain(400), HUNGRY % "True")
    with needs.memory_limit(400) as processes:
        code, _, err = run_limited(job, preexec_fn=lambda: processes.write_text(str(os.getpid())))
    assert (
        code == 1 and "5 workers in a row died before any row was finished; the last one was killed by SIGKILL" in err
    )
    assert 5 <= sum(job.attempts) <= 7


def test_a_row_that_is_refused_its_memory_fails_with_that_error(tmp_path):
    job = Job(tmp_path, plain(12), HUNGRY % "index == 5")
    limit = (3 << 28, 3 << 28)
    code, _, err = run_limited(job, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))
    assert code == 1 and job.completed == [row != 5 for row in range(12)]
    assert "row 5: 2 attempts, numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1.00 GiB" in err

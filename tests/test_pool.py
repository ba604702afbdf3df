"""The pool, as a user starts it: processes, signals, terminals."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from datamodels.executors.share import Judge, Share
from datamodels.executors.watch import Watch
from datamodels.store import Store
from datamodels.store.keys import opened
from tests.jobs import CALLED, Job, alive, finish, plain, until

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


class Pool(Job):
    def argv(self, *more, main=None):
        workers = [] if any(str(item).startswith("--pool.workers") for item in more) else ["--pool.workers=2"]
        return [*super().argv(*more, main=main), *workers]

    def start(self, *more, module="datamodels.pool", **options):
        return super().start(*more, module=module, **options)

    def workers(self, pool):
        """Process ids of the workers of a pool."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return [int(pid) for pid in Path(f"/proc/{pool}/task/{pool}/children").read_text().split()]
        return []


# ------------------------------------------------------------------ filling a store


def test_three_workers_fill_a_store(tmp_path):
    job = Pool(tmp_path, plain(60), WORKS % 0.02)
    code, out, err = job.run("--pool.workers=3")
    assert code == 0 and "all 60 rows are complete" in out
    assert job.array("x").tolist() == list(range(60))
    assert sorted(map(int, job.calls())) == list(range(60))
    assert len(set(job.array("_rows")["run"].tolist())) == 3  # all of them worked
    assert "60/60 rows" in err and "\r" not in err  # a line, no bar: this is not a terminal
    assert not list((job.path / "claims").iterdir())
    with Store.open(job.path) as store:
        assert store.rows("x").tolist() == list(range(60))


def test_a_full_store_returns_at_once(tmp_path):
    job = Pool(tmp_path, plain(3), WORKS % 0)
    assert job.run("--pool.workers=1")[0] == 0
    before = job.files()
    (tmp_path / "job.py").unlink()
    code, out, err = job.run()
    assert (code, out, err) == (0, "all 3 rows are complete\n", "")
    assert job.files() == before


THREADS = """
import os
def main(index): return {'x': float(os.environ['OMP_NUM_THREADS'] + '.' + os.environ['OPENBLAS_NUM_THREADS'])}
"""


@pytest.mark.parametrize(("mine", "expected"), [("", 1.1), ("7", 7.7)])
def test_blas_threads_are_capped_unless_the_user_says_otherwise(tmp_path, monkeypatch, mine, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = Pool(tmp_path, plain(1), THREADS)
    workers = len(os.sched_getaffinity(0))
    assert job.run(f"--pool.workers={workers}", env={"OMP_NUM_THREADS": mine} if mine else {})[0] == 0
    assert job.array("x").tolist() == [expected]


OPTIONS = """
from fastargs import Param, Section
from fastargs.decorators import param
Section('trainer').params(lr=Param(float, '', required=True), scale=Param(float, '', default=1.0))
@param('trainer.lr')
@param('trainer.scale')
def main(*_, index, logdir, lr, scale): return {'x': lr * scale}
"""


def test_one_file_for_pool_worker_and_main(tmp_path):
    job = Pool(tmp_path, plain(2), OPTIONS)
    (tmp_path / "job.yml").write_text(
        f"pool: {{workers: 1}}\ntrainer: {{lr: 5e-1, scale: 3}}\n"
        f"worker: {{logdir: {job.path}, main_import: job, retries: 0, sync: false}}\n"
    )
    code, _, err = finish(job.start(argv=["-C", "job.yml", "--trainer.scale", "4"]))
    assert code == 0, err
    assert job.array("x").tolist() == [2.0, 2.0]
    assert len(set(job.array("_rows")["run"].tolist())) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer.lr=1", "--trainer.scal=2"], "did you mean --trainer.scale?"),
        (["--trainer.lr=x"], "expected a float, got 'x'"),
        (["--trainer.lr=1", "--worker.retrys=2"], "did you mean --worker.retries?"),
        (["--trainer.lr=1", "--pool.worker=2"], "--pool.worker (command line): unknown key; did you mean --pool.w"),
        (["--trainer.lr=1", "--worker.index=1"], "worker.index (command line): a pool runs all rows"),
        (["--trainer.lr=1", "--worker.smoke"], "worker.smoke (command line): a pool runs all rows"),
        (["--trainer.lr=1", "--pool.workers=-1"], "expected an int >= 0"),
        (["--trainer.lr=1", "--worker.batch=8"], "job has no main_many()"),
        ([], "--trainer.lr is required"),
    ],
)
def test_a_mistake_is_refused_at_the_start(tmp_path, argv, message):
    job = Pool(tmp_path, plain(2), OPTIONS)
    code, out, err = job.run(*argv)
    assert code == 2
    assert message in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not any(job.attempts)


@pytest.mark.parametrize("more", [(), ("--pool.rows=1,3",), ("--pool.rows=3,1-1",)])
def test_the_rows_of_the_worker_are_those_of_the_pool(tmp_path, more):
    job = Pool(tmp_path, plain(5), WORKS % 0)
    code, out, err = job.run("--worker.rows=1,3", *more)
    assert code == 0 and "all 2 rows asked for are complete" in out, err
    assert job.completed == [False, True, False, True, False]


def test_rows_of_pool_and_worker_that_contradict_each_other(tmp_path):
    job = Pool(tmp_path, plain(5), WORKS % 0)
    code, _, err = job.run("--worker.rows=1,3", "--pool.rows=1")
    assert code == 2 and "--pool.rows=1 and --worker.rows=1,3 are not the same rows" in err and not job.calls()


def test_a_module_that_does_not_import_is_shown_once(tmp_path):
    job = Pool(tmp_path, plain(2), "import nothing_of_this_name")
    code, out, err = job.run()
    assert code == 2
    assert out == "" and err.startswith("Traceback")
    assert err.count("No module named 'nothing_of_this_name'") == 2  # the traceback and the line
    assert "its traceback is above" in err.splitlines()[-1]


# ------------------------------------------------------------------ workers that die


def test_a_worker_that_is_killed_is_started_again(tmp_path):
    job = Pool(tmp_path, plain(40), WORKS % 0.05)
    process = job.start()
    until(lambda: len(job.calls()) > 4)
    victim = job.workers(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    code, _, err = finish(process)
    assert (code, job.completed) == (0, [True] * 40), err
    words = r"worker \d was killed by SIGKILL \(out of memory, or past --worker.job_timeout\) after \d+ s; starting it"
    assert re.search(words, err)
    assert job.array("x").tolist() == list(range(40))
    assert len(job.calls()) <= 41 and sum(job.attempts) <= 41  # the row in hand was run twice, if there was one


def test_a_worker_that_is_asked_to_end_is_started_again(tmp_path):
    job = Pool(tmp_path, plain(16), WORKS % 0.1)
    process = job.start("--pool.workers=1")
    until(lambda: len(job.calls()) > 2)
    os.kill(job.workers(process.pid)[0], signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, job.completed, job.attempts) == (0, [True] * 16, [1] * 16)
    assert "ended with code 143" in err


def test_a_worker_whose_time_is_up_is_started_again_while_others_are_at_work(tmp_path):
    source = """
def main(index):
    called(index)
    while not os.path.exists('go') and not os.path.exists(f'go-{index}'): time.sleep(.02)
    return {'x': index}
"""
    job = Pool(tmp_path, plain(8), f"import time{CALLED}{source}")
    process = job.start()
    until(lambda: len(job.calls()) == 2)
    os.kill(job.workers(process.pid)[0], signal.SIGUSR1)
    for row in job.calls():
        (tmp_path / f"go-{row}").touch()
    until(lambda: len(job.calls()) == 4)  # the other one's next row, and the first of a third
    (tmp_path / "go").touch()
    code, _, err = finish(process)
    assert (code, job.completed, job.attempts) == (0, [True] * 8, [1] * 8)
    assert re.search(r"worker \d ended with code 0 after \d+ s; starting it again", err)
    assert len(set(job.array("_rows")["run"].tolist())) == 3


@pytest.mark.parametrize("line", ["os._exit(0)", "os._exit(1)", "__import__('ctypes').string_at(0)"])
def test_a_main_that_always_takes_its_process_down(tmp_path, line):
    job = Pool(tmp_path, plain(400), CALLED + f"import os\ndef main(index):\n    called(index)\n    {line}")
    code, _, err = job.run()
    assert code == 1
    assert "5 workers in a row died before any row was finished; the last one" in err
    assert "0 of 400 rows are complete" in err
    assert 5 <= len(job.calls()) <= 7


def test_rows_that_take_their_process_down_do_not_stop_the_others(tmp_path):
    """Three such rows and three tries each: nine deaths, at least six of them in a row, at the end."""
    line = "if index in (1, 4, 7): os._exit(9)\n    return {'x': index}"
    job = Pool(tmp_path, plain(10), CALLED + f"import os\ndef main(index):\n    called(index)\n    {line}")
    code, _, err = job.run("--worker.retries=2")
    assert code == 1
    assert job.completed == [row not in (1, 4, 7) for row in range(10)]
    assert job.attempts == [3 if row in (1, 4, 7) else 1 for row in range(10)]
    assert "7 of 10 rows are complete; 3 failed, 0 held by other workers, 0 not done" in err
    for row in (1, 4, 7):
        assert f"row {row}: 3 attempts, The process that ran this row died without leaving a word, 3 times" in err
    assert err.count("ended with code 9") == 9


def test_rows_that_fail_are_listed_and_the_first_is_told_at_once(tmp_path):
    source = """
import time
def main(index):
    time.sleep(.05 if index else 0)
    print('row', index, 'says hello')
    if index % 10 == 0: raise ValueError(f'no luck with {index}')
    return {'x': index}
"""
    job = Pool(tmp_path, plain(100), source)
    code, out, err = job.run("--worker.retries=0")
    assert code == 1
    assert "90 of 100 rows are complete; 10 failed" in err and "ValueError: no luck with 90" in err
    assert f"tracebacks: {job.path}/workers/<row>/attempt-*.json" in err
    assert re.search(r"row \d+: 1 attempt, ValueError: no luck with \d+; see ", err)
    assert out == "" and "90/100 rows" in err and "10 failed" in err
    logs = "".join(path.read_text() for path in job.path.glob("runs/pool-*/worker-*.log"))
    assert logs.count("says hello") == 100


def test_a_module_that_is_broken_while_the_pool_runs_stops_no_worker_that_has_it(tmp_path):
    job = Pool(tmp_path, plain(40), WORKS % 0.05)
    process = job.start()
    until(lambda: len(job.calls()) > 4)
    (tmp_path / "job.py").write_text("def main(index) return")
    os.kill(job.workers(process.pid)[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert (code, job.completed) == (0, [True] * 40), err
    assert err.count("cannot start any more") == 1 and err.count("SyntaxError: ") == 2  # the traceback and the line
    assert err.count("starting it again") == 1


def test_a_module_that_is_broken_when_no_worker_is_left(tmp_path):
    job = Pool(tmp_path, plain(40), WORKS % 0.05)
    process = job.start("--pool.workers=1")
    until(lambda: len(job.calls()) > 4)
    (tmp_path / "job.py").write_text("def main(index) return")
    os.kill(job.workers(process.pid)[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1 and 0 < sum(job.completed) < 40
    assert err.count("cannot start any more") == 1 and "of 40 rows are complete" in err


MISTAKEN = (
    CALLED
    + """
import time
from datamodels.errors import ConfigError
def main(index):
    called(index)
    if index %s: raise ConfigError("--trainer.width: say which")
    time.sleep(%s)
    return {'x': index}
"""
)


@pytest.mark.parametrize(("which", "seconds"), [(">= 0", 0), ("== 20", 0.05)])
def test_a_mistake_that_main_finds_ends_the_pool(tmp_path, which, seconds):
    job = Pool(tmp_path, plain(40), MISTAKEN % (which, seconds))
    code, out, err = job.run()
    assert (code, out) == (2, "") and err.count("error: --trainer.width: say which") == 1
    assert "starting it again" not in err and "left out" not in err
    assert job.attempts == [int(done) for done in job.completed] and not job.completed[20]


# ------------------------------------------------------------------ Ctrl-C


class Terminal:
    """A pseudo-terminal with a pool as its foreground process."""

    def __init__(self, job, *more, columns=80):
        self.fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        self.process = job.start(
            *more, stdin=slave, stdout=slave, stderr=slave, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        )
        os.close(slave)
        os.set_blocking(self.fd, False)
        self.text = ""

    def read(self):
        with contextlib.suppress(BlockingIOError, OSError):  # it is silent, or gone
            while chunk := os.read(self.fd, 1 << 16):
                self.text += chunk.decode(errors="replace")
        return self.text

    def type(self, keys):
        os.write(self.fd, keys)

    def wait(self, seconds=30):
        """The exit code."""
        until(lambda: self.read() is None or self.process.poll() is not None, seconds)
        self.read()
        os.close(self.fd)
        return self.process.returncode


STUCK_AFTER = (
    CALLED
    + """
import os, time
def main(index):
    called(index)
    if index > 5 and not os.path.exists('go'): %s
    return {'x': index}
"""
)


@pytest.mark.parametrize("how", ["ctrl-c", "ctrl-c twice", "sigint", "sigterm"])
def test_stopping_loses_nothing_and_goes_on_later(tmp_path, how):
    job = Pool(tmp_path, plain(20), STUCK_AFTER % "time.sleep(60)")
    terminal = Terminal(job)
    until(lambda: terminal.read() and len([row for row in job.calls() if int(row) > 5]) == 2)
    workers, started = job.workers(terminal.process.pid), time.monotonic()
    if how.startswith("ctrl-c"):  # the terminal sends SIGINT to its foreground group
        terminal.type(b"\x03")
        if how.endswith("twice"):
            time.sleep(0.05)
            terminal.type(b"\x03")
    else:
        os.kill(terminal.process.pid, signal.SIGINT if how == "sigint" else signal.SIGTERM)
    assert terminal.wait() == (143 if how == "sigterm" else 130)
    assert time.monotonic() - started < 6
    assert len(workers) == 2 and not any(map(alive, workers))
    done = job.completed
    assert f"stopped: {sum(done)} of 20 rows are complete and safe; run the same command again" in terminal.text
    assert "Traceback" not in terminal.text
    assert job.attempts == [int(flag) for flag in done]
    assert not list((job.path / "claims").iterdir())
    if how != "ctrl-c":
        return
    (tmp_path / "go").touch()
    code, out, _ = job.run()
    assert code == 0 and "all 20 rows are complete" in out
    assert job.attempts == [1] * 20 and job.array("x").tolist() == list(range(20))


def test_a_worker_that_does_not_listen_is_killed_and_its_row_not_counted(tmp_path):
    job = Pool(tmp_path, plain(20), STUCK_AFTER % "sum(iter(int, 1))")  # C, with the interpreter's lock held
    process = job.start("--pool.workers=1")
    until(lambda: job.calls() and int(job.calls()[-1]) > 5)
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and 3 < time.monotonic() - started < 10
    assert "rows are complete and safe" in err
    assert job.attempts == [int(flag) for flag in job.completed]


def test_no_worker_goes_on_when_the_pool_is_killed(tmp_path):
    job = Pool(tmp_path, plain(20), STUCK_AFTER % "time.sleep(60)")
    process = job.start()
    until(lambda: len([row for row in job.calls() if int(row) > 5]) == 2)
    workers = job.workers(process.pid)
    process.kill()
    finish(process)
    assert len(workers) == 2
    until(lambda: not any(map(alive, workers)), 5)
    assert job.attempts == [int(flag) for flag in job.completed]


# ------------------------------------------------------------------ what is seen


@pytest.mark.parametrize("columns", [0, 100])  # 0: a terminal that does not know
def test_a_terminal_shows_a_bar(tmp_path, columns):
    job = Pool(tmp_path, plain(30), WORKS % 0.04)
    terminal = Terminal(job, columns=columns)
    assert terminal.wait() == 0
    frames = terminal.text.split("\r")
    bars = [re.search(r"(\d+)%\|.*\| *(\d+)/30 \[\d\d:\d\d<", frame) for frame in frames]
    counts = [int(bar[2]) for bar in bars if bar]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 30
    assert len(set(counts)) > 3  # it moved
    assert re.search(r"row/s", terminal.text)
    assert terminal.text.endswith("all 30 rows are complete\r\n")


def test_the_bar_counts_what_was_done_while_workers_died(tmp_path):
    line = "if index == 3: os._exit(9)\n    return {'x': index}"
    job = Pool(tmp_path, plain(12), f"import os, time\ndef main(index):\n    time.sleep(.05)\n    {line}")
    terminal = Terminal(job, "--worker.retries=1")
    assert terminal.wait() == 1
    assert np.sum(job.completed) == 11
    assert re.findall(r"(\d+)/12 \[", terminal.text)[-1] == "11"
    assert "worker" in terminal.text and "ended with code 9" in terminal.text


def test_a_main_that_fails_for_every_row_is_stopped_early(tmp_path):
    source = "import time\ndef main(index):\n    time.sleep(0.05)\n    raise ValueError('always')"
    job = Pool(tmp_path, plain(3000), source)
    code, out, err = job.run("--pool.workers=2")
    assert code == 1 and "every worker fails, 20 rows or more" in out + err and "--worker.smoke" in out + err
    # Twenty rows, and at most three looks a second apart; as many as could fail until then.
    assert 20 <= sum(attempts > 0 for attempts in job.attempts) <= 20 + 2 * 3 / 0.05


def test_a_row_that_the_pool_itself_has_to_kill_is_not_counted(tmp_path):
    source = """
import os
def main(index):
    try:
        os.close(os.open('first', os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        os._exit(9)
    open('row', 'w').write(str(index))
    sum(iter(int, 1))  # C, with the interpreter's lock held
"""
    job = Pool(tmp_path, plain(40), source)
    code, _, err = job.run()
    assert code == 1 and "5 workers in a row died" in err
    assert job.attempts[int((tmp_path / "row").read_text())] == 0
    assert sum(job.attempts) == 5  # those that died by themselves


# The first to be asked a second time trains, the other one fails whatever it is given.
ONE_TRAINS = """
import os, time
asked = 0
def main(index):
    global asked
    asked += 1
    if asked > 1 and not os.path.exists('trained'):
        try:
            os.close(os.open('first', os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(0.05)
            raise ValueError('bad') from None
        time.sleep(4)
        open('trained', 'w')
    elif asked == 1:
        raise ValueError('bad')
    return {'x': 1.0}
"""


def test_rows_that_fail_in_one_place_do_not_stop_those_that_train(tmp_path):
    """Rows of one kind stand together, so one worker can fail many while the other is at work on a good one."""
    job = Pool(tmp_path, plain(300), ONE_TRAINS)
    assert job.run("--pool.workers=2", "--worker.retries=0")[0] == 1
    assert 20 < 300 - sum(job.completed) < 150
    assert job.attempts == [1] * 300


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def optional(rows, *keys):
    scalar = {"shape": [], "dtype": "float64", "required": False}
    return {"num_models": rows, "schema": {**plain(rows)["schema"], **dict.fromkeys(keys, scalar)}}


@pytest.mark.parametrize("keys", [None, ["a"]])
def test_the_judge_asks_twice_and_looks_at_the_rows_in_hand(tmp_path, monkeypatch, keys):
    clock = Clock()
    monkeypatch.setattr("datamodels.executors.share.time", clock)
    with Store.create(tmp_path / "store", optional(40, "a"), sync=False) as store:
        if keys:
            store.commit_many(range(40), {"x": np.zeros(40)})
    with opened(tmp_path / "store", keys) as one, opened(tmp_path / "store", keys) as two:
        judge = Judge(Share(one))

        def looks(workers, seconds=1.0):
            clock.now += seconds
            return bool(judge.hopeless(workers))

        def begin(store, row):
            assert store.run.take(row)
            store.begin([row])

        def fail(store, row):
            store.fail(row, 1, "bad")
            store.run.release(row, done=False)

        assert not judge.begun()
        begin(two, 0)
        assert judge.begun() and not looks(2)
        fail(two, 0)
        for row in range(1, 21):
            begin(one, row)
            fail(one, row)
        assert not looks(3) and not looks(3)  # a third worker has not been heard of
        begin(two, 30)
        assert not looks(2)  # the first time
        assert not looks(2, 0.9)  # too soon
        assert not looks(2, 2)  # it lasts longer than any took to fail
        fail(two, 30)
        begin(two, 31)
        assert not looks(2) and looks(2, 2)  # no longer than one took: twice
        two.commit_many([31], {"a": [1.0]} if keys else {"x": [1.0]})
        two.run.release(31, done=True)
        assert not looks(2) and not looks(2) and not looks(2)


def test_the_judge_of_keys_that_all_rows_lose(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("datamodels.executors.share.time", clock)
    with Store.create(tmp_path / "store", optional(90, "a", "b", "c", "old"), sync=False) as store:
        lost = {"a": ValueError("no"), "old": ValueError("known")}

        def commit(rows, **values):
            for row in rows:
                store.commit_many([row], {key: [value] for key, value in {"x": 0.0, **values}.items()})

        def verdict():
            clock.now += 1
            judge.hopeless(1)
            clock.now += 1
            return judge.hopeless(1)

        commit([0], old=ValueError("known"))
        judge = Judge(Share(store))
        commit(range(1, 20), **lost, b=1.0)
        assert not verdict()  # nineteen
        commit([20], **lost, c=ValueError("once"))
        assert verdict().startswith("a failed in every row, 20 or more, as in row 1: ValueError: no; the rows are ")
        commit([21], **lost, b=1.0)
        assert verdict()
        commit([22], a=1.0)
        assert not verdict()
        commit(range(23, 60), a=ValueError("no"))
        assert not verdict()  # not in every row
        judge = Judge(Share(store))
        commit(range(60, 90), a=ValueError("no"))
        assert not verdict()  # known


LOSES = """
import os, time
def main(index, keys):
    time.sleep(0.05)
    if os.path.exists("raises"):
        raise ValueError("no labels")
    return {key: ValueError("no labels") if key == "a" else 1.0 for key in keys}
"""


def test_a_key_that_every_row_loses_stops_the_pool_once(tmp_path):
    job = Pool(tmp_path, optional(160, "a", "b"), LOSES)
    code, out, err = job.run("--pool.workers=2")
    done = sum(job.completed)
    assert code == 1 and 20 <= done < 160
    assert re.search(r"row \d+: a failed, ValueError: no labels; see .*/workers/\d+\n", err)
    assert re.search(r"stopped: a failed in every row, 20 or more, as in row \d+: ValueError: no labels; the rows", err)
    assert f"\n{done} keys failed in {done} rows: a in {done}; see python -m datamodels.store status" in err
    code, out, err = job.run("--pool.workers=2")
    assert (code, sum(job.completed)) == (0, 160)
    assert re.search(r"160/160 rows, .*, 160 keys failed in 160 rows\n", err)
    expected = "all 160 rows are complete; 160 keys failed in 160 rows: a in 160; see python -m datamodels.store "
    assert out.startswith(f"{expected}status {job.path}; when the cause is gone, --worker.keys=a fills them in\n")
    assert job.run("--pool.workers=2")[:2] == (0, out)

    (tmp_path / "raises").touch()
    before = np.load(job.path / "_keys/a.npy")["attempt"].sum()
    code, out, err = job.run("--pool.workers=2", "--worker.keys=a")
    again = np.load(job.path / "_keys/a.npy")["attempt"].sum() - before
    assert code == 1 and "stopped: every worker fails, 20 rows or more" in err and 20 <= again < 160
    assert "--worker.index=<row> --worker.keys=a runs a row again" in err


def test_a_store_that_takes_long_to_read_is_looked_at_less_often(tmp_path, monkeypatch):
    with Store.create(tmp_path / "store", plain(4), sync=False) as store:
        clock, looks = Clock(), []
        monkeypatch.setattr("datamodels.executors.watch.time", clock)
        watch = Watch(share := Share(store), progress=False)

        def completed():
            looks.append(clock.now)
            clock.now += 0.1
            return np.array([True] * len(looks) + [False] * 3)[:4]

        monkeypatch.setattr(share, "completed", completed)
        monkeypatch.setattr(share, "failed_keys", dict)
        assert [watch.look(), watch.look()] == [1, 1]
        clock.now += 1.9
        assert watch.look() == 1
        clock.now += 0.2
        assert [watch.look(), watch.look(), watch.look(now=True)] == [2, 2, 3] and len(looks) == 3
        watch.close()

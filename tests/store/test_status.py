"""What `status` says of a store that is being filled, and how it says so while it goes on."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from datamodels.store import Store, screens
from datamodels.store import __main__ as command
from datamodels.store import commit as commits
from datamodels.store import status as statuses
from datamodels.store.arrays import NEXT_FILE
from datamodels.store.keys import KeyStore
from datamodels.store.status import progress
from tests.jobs import finish, until

SPEC = {
    "num_models": 10,
    "schema": {
        "x": {"shape": [], "dtype": "float64"},
        "note": {"shape": [], "dtype": "U4", "required": False},
    },
}


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "store", SPEC, sync=False) as made:
        yield made


def commit(store, rows):
    store.commit_many(rows, {"x": [float(row) for row in rows]})


def finished(store, rows, times, lasting=1.0):
    """Complete rows whose records say when they were finished."""
    commit(store, rows)
    for row, at in zip(rows, times, strict=True):
        record = commits.row_record(
            row, state=commits.DONE, attempts=1, started=at - lasting, finished=at, seed=0, run="r"
        )
        store.layout.write("_rows.npy", [row], [record], lambda: None)


def dead(store, row):
    """A claim of a process that was killed."""
    script = f"import os; from datamodels.store import Store; s = Store.open({str(store.path)!r}); s.run.take({row}); "
    done = subprocess.run(
        [sys.executable, "-c", script + "print(s.run.id, flush=True); os._exit(9)"], stdout=-1, text=True
    )
    return done.stdout.strip()


def test_each_row_is_counted_once(store):
    commit(store, [0, 1])
    for row in (2, 3):
        store.run.take(row)
    store.begin([2])
    store.fail(3, 2, "Traceback\nValueError: no")  # and has not been given back yet
    gone = dead(store, 4)
    state = progress(store)
    assert (state.num_models, state.completed, state.running, state.failed, state.pending) == (10, 2, 1, 1, 6)
    assert (state.stale, state.workers) == (1, 1)
    (stale,) = state.stale_rows
    assert (stale.row, stale.state) == (4, "died") and stale.run.startswith(f"run {gone} on ")
    assert [(f.row, f.attempts, f.error) for f in state.failures] == [(3, 2, "ValueError: no")]
    assert progress(store, failures=0).failures == () == progress(store, failures=0).stale_rows
    plain = store.status()
    assert (plain.completed, plain.running, plain.failed, plain.pending) == (2, 1, 1, 6)


def test_a_holder_of_another_host_is_stale_when_its_time_to_live_is_over(store):
    run = dead(store, 4)
    path = store.path / "runs" / f"{run}.json"
    record = {**json.loads(path.read_text()), "host": "elsewhere", "boot": "another", "time_to_live": 50}
    path.write_text(json.dumps(record))
    assert (progress(store).running, progress(store).stale) == (1, 0)
    os.utime(path, (time.time() - 60, time.time() - 60))
    state = progress(store)
    assert (state.running, state.stale, state.pending, state.stale_rows[0].state) == (0, 1, 10, "silent")
    assert any("row 4: run" in line and "which has been silent" in line for line in screens.lines("s", state))


@pytest.mark.parametrize(
    ("ages", "lasting", "rate", "span"),
    [
        ([], 1, None, None),
        ([2 * 86400.0], 1, None, None),
        (np.arange(60) * 2, 10, 0.5, 60),  # one in two seconds; the last minute has enough of them
        (np.arange(30) * 100, 1, 30 / 2901, 2901),  # an hour of it, of which it has run 2,901 seconds
        (np.arange(5) * 3600.0 + 1, 3600, 5 / (5 * 3600 + 1), 5 * 3600 + 1),
        ([0.0] * 30, 0.0, 30, 1),  # all at once
        ([*np.arange(25) * 1.0, *(5000 + np.arange(25))], 1, 25 / 25, 25),  # after a pause
    ],
)
def test_the_rate_is_that_of_the_recent_past(ages, lasting, rate, span):
    now = 1e9
    done = now - np.array(ages, float)
    got = statuses._rate(done - lasting, done, now)
    assert got == (rate, span) if rate is None else np.allclose(got, (rate, span))


def test_time_left(store):
    now = time.time()
    finished(store, [0, 1, 2, 3], [now - 1, now - 11, now - 21, now - 31], lasting=9)
    state = progress(store)
    assert state.rate == pytest.approx(0.1, rel=0.05) and state.seconds_left == pytest.approx(60, rel=0.05)
    assert re.search(r"  (6|5.\d+) rows/min in the last 4\d s, 6\d s left", screens.lines("s", state)[1])
    finished(store, [4], [now - 700])
    for row in range(4):
        record = store.layout.row_records([row]).copy()
        record["finished"] = now - 700
        store.layout.write("_rows.npy", [row], [record.tobytes()], lambda: None)
    state = progress(store)
    assert state.rate and state.seconds_left is None and "nobody at work" in screens.lines("s", state)[1]


def test_keys_that_are_filled_in_and_changes_that_were_cut_short(store):
    commit(store, [0, 1, 2])
    with KeyStore.of(store.path, ["note"]) as filler:
        filler.commit_many([1], {"note": ["a"]})
        filler.begin([2])
    state = progress(store)
    assert state.keys == {"note": 1} and not state.unfinished
    (store.path / NEXT_FILE).touch()
    state = progress(store)
    text = "\n".join(screens.lines("s", state))
    assert "\n  note: 1 of the complete rows have it\n" in text and "\n  grow or add-key is at work" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (5400, "1 h 30 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, text):
    assert screens.duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0001, "0.36 rows/h"), (0.01, "36 rows/h"), (0.1, "6 rows/min"), (23.44, "23.4 rows/s"), (2038, "2,038 rows/s")],
)
def test_rates(rate, text):
    assert screens._number(rate) == text


def test_json(store, capsys):
    commit(store, [0])
    assert command.main(["status", str(store.path), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["completed"], state["pending"], state["keys"], state["stale_rows"]) == (1, 9, {"note": 0}, [])


# ------------------------------------------------------------------------------------ going on


def test_off_a_terminal_it_is_a_line_each_time_and_ends_by_itself(store):
    argv = [sys.executable, "-m", "datamodels.store", "status", str(store.path), "--watch", "--interval=0.1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  0/10 rows \(0.0 %\), nobody at work\n", first), first
    commit(store, range(10))
    code, out, err = finish(process)
    assert (code, err) == (0, "") and out.splitlines()[-1].endswith("  10/10 rows (100.0 %)")


def test_as_json_it_is_an_object_a_line_and_follows_a_store_that_grows(store):
    argv = [sys.executable, "-m", "datamodels.store", "status", str(store.path), "--watch", "--json", "--interval=0.1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline())["num_models"] == 10
    command.grow(store.path, 11)
    commit(store, range(10))
    until(lambda: json.loads(process.stdout.readline())["num_models"] == 11)
    with Store.open(store.path) as grown:
        commit(grown, [10])
    code, out, err = finish(process)
    assert (code, err) == (0, "") and json.loads(out.splitlines()[-1])["completed"] == 11


class Terminal:
    """So much of a terminal as is needed to see what a person sees, and whether it flickers."""

    def __init__(self, rows=14, columns=70):
        self.master, self.slave = os.openpty()
        self.resize(rows, columns)
        self.screen, self.at, self.blanked, self.raw = [""], 0, 0, b""

    def resize(self, rows, columns):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def start(self, *argv):
        script = "import os, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        script += "import sys; from datamodels import cli; from datamodels.store import __main__; "
        script += "cli.run(lambda: __main__.main(sys.argv[1:]))"
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "vt100"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *argv],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            env=env,
        )
        return self

    def read(self):
        """Take in what has been written; the lines now on the screen."""
        os.set_blocking(self.master, False)
        while True:
            try:
                data = os.read(self.master, 1 << 16)
            except (BlockingIOError, OSError):
                break
            self.raw += data
            for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r?\n|[^\x1b\r\n]+|\r", data.decode()):
                self._take(token)
        return [line for line in self.screen if line]

    def _take(self, token):
        if token.startswith("\x1b["):
            number, kind = int(token[2:-1] or 0), token[-1]
            if kind == "F":
                self.at, self.column = self.at - number, 0
            elif kind == "J":
                self.blanked += number == 2
                del self.screen[self.at if number != 2 else 0 :]
                self.screen.append("")
                self.at = len(self.screen) - 1
            elif kind == "K":
                self.screen[self.at] = self.screen[self.at][: self.column]
            elif kind == "H":
                self.at = self.column = 0
        elif "\n" in token:
            self.at, self.column = self.at + 1, 0
            while len(self.screen) <= self.at:
                self.screen.append("")
        elif token != "\r":
            column = getattr(self, "column", 0)
            line = self.screen[self.at].ljust(column)
            self.screen[self.at] = line[:column] + token + line[column + len(token) :]
            self.column = column + len(token)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master), os.close(self.slave)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


def test_on_a_terminal_it_is_drawn_in_place_until_all_rows_are_complete(store, terminal):
    terminal.start("status", str(store.path), "--watch", "--interval=0.1", "--failures=3")
    head = str(store.path)[:30]
    until(lambda: len(terminal.read()) >= 3)
    for row in range(8):
        store.run.take(row)
        store.begin([row])
        store.fail(row, 1, f"Traceback\nValueError: {row} " + "long " * 30)
        store.run.release(row, done=False)
    until(lambda: any("row 2: 1 attempt, ValueError: 2 long" in line for line in terminal.read()))
    screen = terminal.read()
    assert screen[0].startswith(head) and all(len(line) < 70 for line in screen)
    assert [line[:7] for line in screen[-4:]] == ["  row 0", "  row 1", "  row 2", "  … and"]
    assert sum(line.startswith(head) for line in screen) == 1, "a frame was drawn below the one before"
    commit(store, range(10))
    until(lambda: terminal.read() is not None and terminal.process.poll() is not None)
    screen = terminal.read()
    assert terminal.process.returncode == 0
    assert len(screen) == 3 and screen[2] == "  note: 0 of the complete rows have it"
    assert re.fullmatch(r"\[#+\] \d\d:\d\d:\d\d", screen[1]) and len(screen[1]) == 69
    assert terminal.blanked == 0, "it flickers"


def test_a_small_window_and_one_that_changes(store, terminal):
    terminal.resize(6, 40)
    for row in range(9):
        store.run.take(row)
        store.begin([row])
        store.fail(row, 1, f"ValueError: {row}")
        store.run.release(row, done=False)
    terminal.start("status", str(store.path), "--watch", "--interval=0.1")
    until(lambda: any("lines more" in line for line in terminal.read()))
    time.sleep(0.3)
    screen = terminal.read()
    assert len(screen) == 5 and all(len(line) < 40 for line in screen) and terminal.blanked == 0
    terminal.resize(30, 60)
    until(lambda: any("row 8" in line for line in terminal.read()))
    assert terminal.blanked == 1


def test_ctrl_c_ends_it(store, terminal):
    terminal.start("status", str(store.path), "--watch", "--interval=0.1")
    until(lambda: len(terminal.read()) >= 3)
    os.write(terminal.master, b"\x03")
    until(lambda: terminal.read() is not None and terminal.process.poll() is not None)
    assert terminal.process.returncode == 130 and b"Traceback" not in terminal.raw
    assert terminal.read()[-1].endswith("interrupted")


def test_a_million_rows_take_no_work_per_row(tmp_path):
    """Generous: the benchmark has the number."""
    with Store.create(tmp_path / "s", {**SPEC, "num_models": 10**6}, sync=False) as store:
        progress(store)
        started = time.perf_counter()
        progress(store)
        assert time.perf_counter() - started < 1

"""Promise 7: two workers on one row, one runs. Real processes, killed, stopped, forked and from other hosts."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import ClaimLost, DatamodelsError, RowError, StoreError
from datamodels.store import Store, claims

OPEN = """
import os, signal, sys, time
from datamodels.store import Store
store = Store.open(sys.argv[1], sync=False)
"""
SPEC = {"num_models": 2000, "schema": {"x": {"shape": [], "dtype": "int64"}}}


@pytest.fixture
def path(tmp_path):
    Store.create(tmp_path / "store", SPEC, sync=False).close()
    return tmp_path / "store"


@pytest.fixture
def store(path):
    with Store.open(path, sync=False) as opened:
        yield opened


@contextmanager
def another(path, body, *args):
    """A process that runs `body` with `store` open, from its first line of output on."""
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN + textwrap.dedent(body), str(path), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


HOLDER = """
    for row in map(int, sys.argv[2].split(",")):
        assert store.run.take(row)
    print("ready", flush=True)
    sys.stdin.read()
"""


def links(path):
    return sorted(name for name in os.listdir(path / "claims") if not name.endswith(".lock"))


# ------------------------------------------------------------------------------------ races

RACER = """
    rows = range(int(sys.argv[2]), int(sys.argv[3]))
    store.run
    print("ready", flush=True)
    go = float(sys.stdin.readline())
    while time.time() < go:
        pass
    won = []
    for row in rows:
        if store.run.take(row):
            won.append(row)
        time.sleep(1e-5)  # let the others in, also where there are more processes than cores
    print(",".join(map(str, won)), flush=True)
    sys.stdin.read()
"""


def race(path, first, stop, racers=4):
    """Rows that each of some processes claimed, all of them asking for all rows in the same order at the same time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN + textwrap.dedent(RACER), str(path), str(first), str(stop)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(racers)
    ]
    won = []
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        go = time.time() + 0.05
        for process in processes:
            process.stdin.write(f"{go}\n")
            process.stdin.flush()
        for process in processes:
            won.append([int(row) for row in process.stdout.readline().split(",") if row.strip()])
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return won


def test_every_row_has_one_winner(path):
    for first in range(0, 2000, 400):
        won = race(path, first, first + 400)
        assert sorted(row for rows in won for row in rows) == list(range(first, first + 400))
        if first and sum(bool(rows) for rows in won) > 1:
            return
    pytest.fail("there was no race: one process came first everywhere")


def test_every_row_of_a_dead_holder_has_one_winner(path):
    with another(path, HOLDER, ",".join(map(str, range(500)))) as holder:
        holder.kill()
        holder.wait()
    assert len(links(path)) == 500
    won = race(path, 0, 500)
    assert sorted(row for rows in won for row in rows) == list(range(500))
    # and once more: the winners are dead by now too
    won = race(path, 0, 500)
    assert sorted(row for rows in won for row in rows) == list(range(500))


@pytest.mark.slow
def test_many_races(path):
    for _ in range(20):
        won = race(path, 0, 2000, racers=6)
        assert sorted(row for rows in won for row in rows) == list(range(2000))


def test_processes_that_claim_and_give_back_never_hold_a_row_together(path):
    """Who holds a row makes a file exclusively, and removes it before giving the row back; also after takeovers."""
    body = """
        import random
        os.makedirs(sys.argv[2], exist_ok=True)
        random.seed(sys.argv[3])
        print("ready", flush=True)
        held = 0
        end = time.monotonic() + float(sys.argv[4])
        while time.monotonic() < end:
            row = random.randrange(3)
            if store.run.take(row):
                mark = f"{sys.argv[2]}/{row}"
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                held += 1
                os.unlink(mark)
                store.run.release(row, done=random.random() < 0.5)
        print(held, flush=True)
        sys.stdin.read()
    """
    with another(path, HOLDER, "0,1,2") as dead:
        dead.kill()
        dead.wait()
    marks = path.parent / "marks"
    with (
        another(path, body, marks, 1, 1.5) as a,
        another(path, body, marks, 2, 1.5) as b,
        another(path, body, marks, 3, 1.5) as c,
    ):
        counts = [int(process.stdout.readline() or -1) for process in (a, b, c)]
    assert min(counts) > 20, counts


# ------------------------------------------------------------------------------------ dead, alive, stopped


def test_a_dead_holder_is_taken_over_at_once_and_cleared_away(path, store):
    with another(path, HOLDER, "1,2") as holder:
        assert not store.run.take(1) and store.status().running == 2
        holder.kill()
        holder.wait()
    assert store.status().running == 0
    assert store.run.take(1) and store.run.take(2)
    assert store.status().running == 2
    store.run.release(1, done=False)
    store.commit_many([2], {"x": [7]})
    store.run.release(2, done=True)
    assert links(path) == []
    assert list(os.listdir(path / "claims")) == [f"{store.run.id}.lock"]


def test_a_zombie_is_dead(path, store):
    with another(path, HOLDER, "1") as holder:
        os.kill(holder.pid, signal.SIGKILL)
        wait_for(lambda: claims.start_time(holder.pid) is None)  # and nobody has waited for it
        assert store.run.take(1)


def test_another_process_under_the_same_number_is_not_the_holder(path, store):
    with another(path, HOLDER, "1") as holder:
        file = path / "runs" / f"{os.readlink(path / 'claims' / '1.0')}.json"
        record = json.loads(file.read_text())
        assert record["pid"] == holder.pid
        file.write_text(json.dumps({**record, "ticks": str(int(record["ticks"]) - 1)}))
        assert store.run.take(1)


def test_a_living_holder_is_never_taken_over(path):
    with another(path, HOLDER, "1"), Store.open(path, time_to_live=0.05) as store:
        for _ in range(10):
            assert not store.run.take(1)
            time.sleep(0.03)
        assert links(path) == ["1.0"]


def test_a_holder_that_ended_in_order_leaves_nothing(path, store):
    with another(path, HOLDER, "1") as holder:
        run = os.readlink(path / "claims" / "1.0")
        holder.stdin.close()
        holder.wait()
        holder.stdin = None
    record = json.loads((path / "runs" / f"{run}.json").read_text())
    assert record["finished"] > record["started"] and os.listdir(path / "claims") == []


def test_a_stopped_holder_is_waited_for(path):
    with another(path, HOLDER, "1") as holder, Store.open(path, time_to_live=0.05) as store:
        os.kill(holder.pid, signal.SIGSTOP)
        for _ in range(10):
            assert not store.run.take(1)
            time.sleep(0.03)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert store.run.take(1)


IN_A_COMMIT = """
    import datamodels.store.commit as commits
    assert store.run.take(1)
    real = commits.Layout.write
    def write(self, name, *rest):
        if name == "_completed.npy":
            print("ready", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        real(self, name, *rest)
    commits.Layout.write = write
    store.commit_many([1], {"x": [41]})
    print("committed", flush=True)
    sys.stdin.read()
"""


def seem_elsewhere(path, run):
    """Have a run's record say that it is of another host, as one in a container of its own does."""
    file = path / "runs" / f"{run}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another boot/1", "host": "elsewhere"}))


def test_a_holder_stopped_in_a_commit_is_not_even_overtaken_when_its_heartbeat_stands_still(path):
    with another(path, IN_A_COMMIT) as holder, Store.open(path, time_to_live=0.1) as store:
        wait_for(lambda: ") T " in Path(f"/proc/{holder.pid}/stat").read_text())
        seem_elsewhere(path, os.readlink(path / "claims" / "1.0"))
        for _ in range(10):
            assert not store.run.take(1)
            time.sleep(0.05)
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.stdout.readline() == "committed\n"
        assert store.rows("x", [1]).tolist() == [41]


# ------------------------------------------------------------------------------------ other hosts


def test_a_lock_that_a_lost_machine_left_on_a_network_file_system_is_waited_for_four_leases(path):
    near = claims.Run(path, network=True, time_to_live=0.25)
    with Store.open(path, sync=False, time_to_live=60) as far, far.run.committing([]):  # its lock is held
        assert far.run.take(1)
        seem_elsewhere(path, far.run.id)
        start = time.monotonic()
        assert not near.take(1)
        wait_for(lambda: near.take(1))
        assert time.monotonic() - start > 1
    near.close()


def test_a_commit_looks_afresh_at_the_claims_on_a_network_file_system(path, monkeypatch):
    run = claims.Run(path, network=True)
    assert run.take(1)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *args: opened.append(str(name)) or real(name, *args))
    with run.committing([1]):
        assert str(path / "claims") in opened  # on NFS that is what makes it ask the server
    run.close()


def test_a_holder_elsewhere_is_gone_when_its_heartbeat_stands_still(path):
    with Store.open(path, time_to_live=1000) as far, Store.open(path, time_to_live=0.4) as near:
        assert far.run.take(1) and far.run.take(2)
        seem_elsewhere(path, far.run.id)
        start = time.monotonic()
        assert not near.run.take(1) and near.run.undecided(1)
        while not near.run.take(1):
            time.sleep(0.01)
        assert time.monotonic() - start >= 0.4
        assert sorted(links(path)) == ["1.0", "1.1", "2.0"]
        # The old holder wakes, and is told; nothing of it is written.
        with pytest.raises(ClaimLost, match="row 1: another worker holds it now; its values are not written"):
            far.commit_many([1, 2], {"x": [5, 6]})
        assert not near.completed().any()
        near.commit_many([1], {"x": [7]})
        far.commit_many([2], {"x": [6]})
        assert near.rows("x").tolist() == [7, 6]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_holder_of_many_rows_is_asked_once_in_a_while(path, monkeypatch, elsewhere):
    """The last worker but one holds a batch, and the last one asks for every row of it."""
    with Store.open(path) as far, Store.open(path) as near:
        assert all(far.run.take(row) for row in range(500))
        if elsewhere:
            seem_elsewhere(path, far.run.id)
        assert not near.run.take(0)  # which looks at the locks, too, the first time
        time.sleep(1.01)
        read, real = [], claims.run_record
        monkeypatch.setattr(claims, "run_record", lambda *which: read.append(which) or real(*which))
        start = time.monotonic()
        assert not any(near.run.take(row) for row in range(500))
        assert 1 <= len(read) <= 1 + time.monotonic() - start


def test_a_holder_elsewhere_that_moves_is_never_taken_over(path):
    with Store.open(path, time_to_live=1000) as far, Store.open(path, time_to_live=0.3) as near:
        assert far.run.take(1)
        for beat in range(12):
            seem_elsewhere(path, far.run.id)
            file = path / "runs" / f"{far.run.id}.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "beat": 100 + beat}))
            assert not near.run.take(1)
            time.sleep(0.1)
        assert not near.run.undecided(1)


def test_heartbeats_move_by_themselves(path):
    with Store.open(path, time_to_live=0.6) as store:
        first = store.run.record(store.run.id)["beat"]
        wait_for(lambda: store.run.record(store.run.id)["beat"] >= first + 3)


def test_a_run_without_a_record_is_waited_for_and_then_gone(path):
    os.symlink("20200101T000000-00000000", path / "claims" / "1.0")
    with Store.open(path, time_to_live=0.2) as store:
        assert not store.run.take(1)
        wait_for(lambda: store.run.take(1))


def test_an_expired_lease_refuses_to_commit(path, monkeypatch):
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs")
    with Store.open(path, time_to_live=100) as store:
        store.commit_many([0], {"x": [1]})
        store.run._last_beat -= 76
        with pytest.raises(ClaimLost, match="row 1: this process has not renewed its lease for 76 s"):
            store.commit_many([1], {"x": [1]})
        assert store.completed().nonzero()[0].tolist() == [0]
        store.run._beat()
        store.commit_many([1], {"x": [1]})


def test_a_lease_that_nobody_can_have_taken_is_renewed_and_the_row_committed(path, monkeypatch):
    """A main that holds the interpreter's lock keeps its heart from beating."""
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs")
    with Store.open(path, time_to_live=100) as store:
        assert store.run.take(1)
        beat = store.run.record(store.run.id)["beat"]
        store.run._last_beat -= 74
        store.commit_many([1], {"x": [1]})
        assert store.rows("x", [1]).tolist() == [1]
        assert store.run.record(store.run.id)["beat"] == beat + 1  # whoever waits for the row sees it move
        store.run._last_beat -= 74
        monkeypatch.setattr(store.run, "_beat", lambda: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(ClaimLost):
            store.commit_many([2], {"x": [1]})


def test_the_lease_is_checked_before_every_write(path, monkeypatch):
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs")
    with Store.open(path, time_to_live=100) as store:
        written, real = [], store.disk.write

        def write(name, offset, data):
            written.append(name)
            real(name, offset, data)
            if len(written) == stop:
                store.run._last_beat -= 60

        monkeypatch.setattr(store.disk, "write", write)
        for stop in (1, 2, 3):
            written.clear()
            with pytest.raises(ClaimLost):
                store.commit_many([stop], {"x": [1]})
            assert len(written) == stop and not store.completed()[stop]
            store.run._beat()


# ------------------------------------------------------------------------------------ generations


def test_an_overtaken_holder_that_gives_back_does_not_open_the_row(path):
    """With its lower claim gone, the higher one would not be found by who counts from 0."""
    with (
        Store.open(path, time_to_live=1000) as far,
        Store.open(path, time_to_live=0.05) as near,
        Store.open(path) as third,
    ):
        assert far.run.take(1)
        seem_elsewhere(path, far.run.id)
        wait_for(lambda: near.run.take(1))
        far.run.release(1, done=False)
        assert not third.run.take(1) and not far.run.take(1)
        assert links(path) == ["1.0", "1.1"]
        near.commit_many([1], {"x": [3]})
        near.run.release(1, done=True)
        assert links(path) == []


@pytest.mark.parametrize("older", [1, 2])
def test_a_row_that_is_given_back_and_taken_while_another_overtakes_the_dead_has_one_holder(path, older):
    """One has seen that the holder is dead; before it makes its claim, the row goes through two other hands."""
    dead = [f"20200101T000000-0000000{number}" for number in range(older)]
    for generation, run in enumerate(dead):
        os.symlink(run, path / "claims" / f"1.{generation}")
        (path / "runs" / f"{run}.json").write_text(json.dumps({"finished": 1.0}))
    with Store.open(path) as first, Store.open(path) as second, Store.open(path) as late:
        real = late.run._overtaking

        @contextmanager
        def overtaking(holder):
            with real(holder) as allowed:
                if holder == dead[-1]:
                    assert first.run.take(1)
                    first.run.release(1, done=False)
                    assert second.run.take(1)
                yield allowed

        late.run._overtaking = overtaking
        assert not late.run.take(1)
        assert second.run.claims == {1: 0} and links(path) == ["1.0"]
        second.commit_many([1], {"x": [5]})


def test_a_claim_that_is_withdrawn_at_once_costs_its_holder_nothing(path):
    with Store.open(path) as store:
        assert store.run.take(1)
        os.symlink("somebody", path / "claims" / "1.1")
        threading.Timer(0.005, os.unlink, [path / "claims" / "1.1"]).start()
        store.commit_many([1], {"x": [5]})
        assert store.rows("x", [1]).tolist() == [5]


def test_a_hole_below_a_claim_does_not_open_the_row(path):
    with Store.open(path) as near, Store.open(path) as third:
        os.symlink(near.run.id, path / "claims" / "1.1")
        assert not third.run.take(1)
        assert links(path) == ["1.1"]


def test_a_silent_holder_elsewhere_keeps_its_generation(path):
    """It may wake; what it held must not be made anew under its number while the row is not done."""
    with Store.open(path, time_to_live=1000) as far, Store.open(path, time_to_live=0.05) as near:
        assert far.run.take(1)
        seem_elsewhere(path, far.run.id)
        wait_for(lambda: near.run.take(1))
        near.run.release(1, done=False)
        assert links(path) == ["1.0"]
        far.commit_many([1], {"x": [3]})  # nobody holds it, and nobody has done it
        assert near.rows("x", [1]).tolist() == [3]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_a_claim_is_an_error_and_not_a_hang(path, store, kind):
    (path / "claims" / "1.0").mkdir() if kind == "folder" else (path / "claims" / "1.0").write_text("x")
    (path / "claims" / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match=r"claims/1.0: not a claim of this package .*move it away"):
        store.run.take(1)
    assert store.run.take(2) and store.status().running == 1


def test_a_claim_that_leads_out_of_the_folder_is_only_a_name(path, tmp_path):
    (tmp_path / "victim.lock").write_text("precious")
    os.symlink("../../victim", path / "claims" / "1.0")
    with Store.open(path, time_to_live=0.1) as store:
        store.run.take(1)
        wait_for(lambda: store.run.take(1))
        store.run.release(1, done=True)
    assert (tmp_path / "victim.lock").read_text() == "precious"


# ------------------------------------------------------------------------------------ forks and threads


def in_a_fork(path, body):
    """Runs `body` in a process that may fork, `store` open with row 1 claimed; what it prints."""
    script = OPEN + "assert store.run.take(1)\n" + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("end", ["store.close()", "sys.exit()", "store.run.close(); sys.exit()", "os._exit(0)"])
def test_a_forked_child_does_not_give_back_what_its_parent_holds(path, end):
    out = in_a_fork(
        path,
        f"""
        if os.fork() == 0:
            {end}
            os._exit(0)
        os.wait()
        print(sorted(name for name in os.listdir(sys.argv[1] + "/claims") if name[0] == "1"))
        print(store.run.record(store.run.id)["finished"], os.path.exists(store.run._lock_path))
        store.commit_many([1], {{"x": [5]}})
        """,
    )
    assert out == "['1.0']\nNone True\n"


def test_a_forked_child_is_a_run_of_its_own(path):
    out = in_a_fork(
        path,
        """
        from datamodels.errors import ClaimLost
        mine = store.run.id
        if os.fork() == 0:
            try:
                store.commit_many([1], {"x": [6]})
            except ClaimLost as error:
                print(error)
            store.commit_many([2], {"x": [7]})
            print(store.run.id != mine, flush=True)
            sys.exit()
        os.wait()
        store.commit_many([1], {"x": [5]})
        print(store.rows("x").tolist())
        """,
    )
    assert out == "row 1: another worker is running it; wait for it, or stop it\nTrue\n[5, 7]\n"


def test_a_child_that_outlives_its_parent_does_not_keep_its_commit_lock(path, store):
    body = """
        assert store.run.take(1)
        with store.run.committing([1]):
            child = os.fork()
            if child == 0:
                print(f"ready\\n{os.getpid()}", flush=True)
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    """
    assert store.run.id  # a run that begins later would clear the lock of the dead away
    with another(path, "import warnings; warnings.simplefilter('ignore')\n" + textwrap.dedent(body)) as parent:
        child = int(parent.stdout.readline())
        try:
            parent.wait()
            assert store.run.take(1)
        finally:
            os.kill(child, signal.SIGKILL)


def test_threads_that_commit_one_row_have_one_winner(path, store):
    for row in range(30):
        outcomes, start = [], threading.Barrier(4)

        def commit(value, row=row, outcomes=outcomes, start=start):
            start.wait()
            try:
                store.commit_many([row], {"x": [value]})
                outcomes.append(value)
            except (RowError, ClaimLost):
                outcomes.append(None)

        threads = [threading.Thread(target=commit, args=(value,)) for value in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        winners = [value for value in outcomes if value is not None]
        assert len(outcomes) == 4 and len(winners) == 1 and store.rows("x", [row]).tolist() == winners
    assert links(path) == []


def test_threads_that_commit_different_rows_all_do(path, store):
    errors = []

    def commit(first):
        try:
            for row in range(first, first + 100, 4):
                store.commit_many([row], {"x": [row * 3]})
        except DatamodelsError as error:
            errors.append(error)

    threads = [threading.Thread(target=commit, args=(first,)) for first in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert errors == [] and store.rows("x").tolist() == [row * 3 for row in range(100)]


def test_a_thread_keeps_the_commit_lock_while_another_ends_its_commit(path, store):
    """One process has one lock; the first thread to end must not open it for who wants to take over."""
    store.run.take(1), store.run.take(2)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with store.run.committing([1]):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    second = threading.Thread(target=lambda: store.commit_many([2], {"x": [1]}))
    second.start()
    time.sleep(0.1)
    try:
        with Store.open(path, time_to_live=0.05) as other:
            seem_elsewhere(path, store.run.id)
            other.run.take(1)
            time.sleep(0.1)
            assert not other.run.take(1)
    finally:
        leave.set()
        thread.join(), second.join()


def test_heartbeats_end_with_the_store(path):
    before = threading.active_count()
    for _ in range(5):
        with Store.open(path) as store:
            assert store.run.take(1)
    assert threading.active_count() == before


def test_a_row_is_claimed_in_well_under_a_millisecond(store):
    taken = []
    for row in range(300):
        start = time.perf_counter()
        store.run.take(row)
        taken.append(time.perf_counter() - start)
    assert np.median(taken) < 1e-3

"""Rows that several ranks run together, under the real torchrun with gloo."""

import json
import os
import signal
import time

import numpy as np
import pytest

from datamodels.store import Store
from tests.jobs import DESIGN, Job, alive, finish, plain, until

pytest.importorskip("torch")
pytestmark = pytest.mark.slow  # each process imports torch

HEAD = """
import json, os, time
import torch
import torch.distributed as dist
rank = int(os.environ['RANK'])
def note(**facts):
    fd = os.open('calls', os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (json.dumps({'rank': rank, 'pid': os.getpid(), **facts}) + '\\n').encode())
    os.close(fd)
def total(value):
    if not dist.is_initialized(): dist.init_process_group('gloo')
    tensor = torch.tensor([float(value)])
    dist.all_reduce(tensor)
    return tensor.item()
"""


class Ranks(Job):
    """A job that torchrun starts."""

    def torchrun(self, *more, options=(), **settings):
        options = ["--nproc_per_node=2", *options]
        worker = ["-m", "datamodels.worker", *self.argv(*more)]
        return self.start(module="torch.distributed.run", argv=[*options, *worker], **settings)

    def notes(self):
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def claims(self):
        """Names of what is claimed; a killed process leaves its lock, which the next ones remove."""
        return [path.name for path in (self.path / "claims").iterdir() if path.suffix != ".lock"]

    def attempt(self, row):
        """The traceback that rank 0 recorded."""
        return self.traceback(row, self.array("_rows")["attempts"][row])


TOGETHER = (
    HEAD
    + """
def main(index, seed, mask, width, logdir, optimiser='none'):
    note(index=index, seed=seed, mask=mask.tolist(), width=width, logdir=logdir, draw=torch.rand(()).item())
    if rank: time.sleep(.1)
    else: open(os.path.join(logdir, 'late'), 'w').close()
    value = total(10 * index + rank)
    if rank: open(os.path.join(logdir, 'one'), 'w').close()
    return {'x': [value] * 3} if rank == 0 else None
"""
)


def test_ranks_run_each_row_together_and_the_first_commits(tmp_path):
    job = Ranks(tmp_path, DESIGN, TOGETHER)
    code, out, err = finish(job.torchrun())
    assert code == 0, err
    assert "6 rows committed, 0 attempts failed" in out and out.count("committed") == 1
    np.testing.assert_array_equal(job.array("x")[:, 0], [20 * row + 1 for row in range(6)])
    notes = job.notes()
    with Store.open(job.path) as store:
        for row in range(6):
            asked = store.design.assignment(row)
            both = [note for note in notes if note["index"] == row]
            assert sorted(note.pop("rank") for note in both) == [0, 1]
            assert len({note.pop("pid") for note in both}) == 2
            assert both[0] == both[1]
            assert (both[0]["seed"], both[0]["mask"]) == (asked.seed, asked.mask.tolist())
            assert both[0]["logdir"] == str(job.path / f"workers/{row}")
            assert {path.name for path in (job.path / f"workers/{row}").iterdir()} == {"late", "one"}
        records = [json.loads(path.read_text()) for path in (job.path / "runs").glob("*.json")]
        assert sorted((record.get("rank"), record["exit"]) for record in records if "rank" in record) == [(1, 0)]
        assert {store.run_of(row)["run"] for row in range(6)} == {r["run"] for r in records if "rank" not in r}
    assert not job.claims() and len(records) == 2


def test_batches(tmp_path):
    source = (
        HEAD
        + """
def main_many(indices, seeds):
    note(indices=indices.tolist(), seeds=seeds.tolist())
    value = total(1)
    return {'x': indices * value} if rank == 0 else None
"""
    )
    job = Ranks(tmp_path, plain(5), source)
    code, _, err = finish(job.torchrun("--worker.batch=4"))
    assert code == 0, err
    assert job.array("x").tolist() == [0, 2, 4, 6, 8]
    calls = [[note["indices"] for note in job.notes() if note["rank"] == rank] for rank in (0, 1)]
    assert calls[0] == calls[1] and sorted(map(len, calls[0])) == [1, 4]


FAILS = (
    HEAD
    + """
if rank == 1: time.sleep(.5)  # time for rank 0 to find in torchrun's store what was left by the rank that failed
def main(index):
    note(index=index)
    total(1)
    first = not os.path.exists('again')
    if index == 2 and rank == %d and first:
        open('again', 'w').close()
        raise ValueError('no luck')
    both = total(1)
    if index == 2 and rank == 1:
        time.sleep(.3)
        raise ValueError('nor at the end')
    return {'x': both} if rank == 0 else None
"""
)


def test_a_row_that_fails_on_another_rank_fails_and_is_tried_again(tmp_path):
    """Rank 0 is in a collective operation the first time, where it would wait for half an hour, and then past it."""
    job = Ranks(tmp_path, plain(4), FAILS % 1)
    started = time.monotonic()
    code, out, err = finish(job.torchrun("--worker.retries=1", options=["--max_restarts=2"]), 120)
    assert code == 1 and "1 rows of the store failed too often" in out, err
    assert time.monotonic() - started < 110
    assert job.completed == [True, True, False, True] and job.attempts == [1, 1, 2, 1]
    for attempt in (1, 2):
        assert "rank 1 failed:" in job.traceback(2, attempt)
    assert "ValueError: no luck" in job.traceback(2, 1) and "ValueError: nor at the end" in job.traceback(2, 2)
    assert not job.claims()


def test_a_row_that_fails_on_the_first_rank_ends_all(tmp_path):
    job = Ranks(tmp_path, plain(4), FAILS % 0)
    code, _, err = finish(job.torchrun("--worker.index=2", "--worker.retries=1"))
    assert code == 1 and "row 2: attempt 1 failed: ValueError: no luck" in err
    assert len(job.notes()) == 2 and job.attempts == [0, 0, 1, 0]


MISTAKEN = """
from datamodels.errors import ConfigError
def main(index):
    raise ConfigError('--trainer.width: say which')
"""


def test_a_mistake_that_every_rank_finds_says_nothing_against_a_row(tmp_path):
    job = Ranks(tmp_path, plain(4), HEAD + MISTAKEN)
    _, _, err = finish(job.torchrun())
    assert "error: --trainer.width: say which\n" in err and "attempt" not in err
    assert job.attempts == [0] * 4 and not job.claims()


RETURNS = (
    HEAD
    + """
def main(index, keys):
    note(index=index, keys=keys)
    total(1)
    return {'x': 1.0, 'a': ValueError('no a') if index == 1 and 'a' in keys else 2.0, 'b': 3.0}
"""
)


def test_a_key_that_failed_on_the_first_rank_ends_none(tmp_path):
    spec = plain(3)
    spec["schema"] |= {key: {"shape": [], "dtype": "float64", "required": False} for key in "ab"}
    job = Ranks(tmp_path, spec, RETURNS)
    with Store.open(job.path, sync=False) as store:
        store.commit_many(range(3), {"x": np.zeros(3)})
    code, out, err = finish(job.torchrun("--worker.keys=a,b", "--worker.retries=1"))
    assert "2 rows committed, 2 attempts failed; 1 rows of the store failed too often" in out, err
    assert "row 1: attempt 1 failed: a: ValueError: no a; traceback in" in err and "it will be tried again" in err
    assert code == 1 and "exitcode  : 3" in err  # torchrun's own, and the worker's: not 1, as when a rank is of no use
    asked = {rank: [n["keys"] for n in job.notes() if n["index"] == 1 and n["rank"] == rank] for rank in (0, 1)}
    assert asked == {rank: [["a", "b"], ["a"]] for rank in (0, 1)}


STAYS = (
    HEAD
    + """
def main(index):
    total(1)
    note(index=index)
    if index == 1: %s
    return {'x': 1.0}
"""
)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_counts_against_the_row(tmp_path, victim):
    job = Ranks(tmp_path, plain(2), STAYS % "total(1) if rank == 0 else time.sleep(300)")
    process = job.torchrun("--worker.index=1", "--worker.retries=0")
    notes = until(lambda: [n for n in job.notes() if n["index"] == 1] if len(job.notes()) >= 2 else None)
    pids = {note["rank"]: note["pid"] for note in notes}
    time.sleep(0.5)
    started = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1 and time.monotonic() - started < 20
    assert not any(map(alive, pids.values()))
    assert job.attempts[1] == 1
    if victim == 1:
        assert "rank 1 died without leaving a word" in job.attempt(1), err


def test_a_rank_that_hangs_in_c_leaves_the_other_its_word(tmp_path):
    """Rank 0 cannot hear of it, and torchrun has to kill it."""
    line = "sum(iter(int, 1)) if rank == 0 else [][index]"
    job = Ranks(tmp_path, plain(2), STAYS % line)
    process = job.torchrun("--worker.index=1", "--worker.retries=0")
    word = job.path / "workers/1/attempt-1-rank1.json"
    until(word.exists)
    assert "IndexError" in json.loads(word.read_text())["traceback"]
    os.kill(next(note["pid"] for note in job.notes() if note["rank"] == 0), signal.SIGKILL)
    assert finish(process)[0] == 1


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGTERM, "time.sleep(300) if rank == 0 else total(1)"),
        (signal.SIGKILL, "time.sleep(300) if rank else total(1)"),
        (signal.SIGKILL, "time.sleep(300) if rank == 0 else sum(iter(int, 1))"),
    ],
)
def test_torchrun_is_stopped(tmp_path, number, line):
    """That says nothing against the row, whichever rank waits in C."""
    job = Ranks(tmp_path, plain(2), STAYS % line)
    process = job.torchrun("--worker.index=1")
    pids = until(lambda: [note["pid"] for note in job.notes()] if len(job.notes()) == 2 else None)
    time.sleep(0.5)
    process.send_signal(number)
    assert finish(process)[0] != 0
    until(lambda: not any(map(alive, pids)), 10)
    assert job.attempts == [0, 0] and not job.claims()


def test_what_the_first_decides_alone_ends_the_others(tmp_path):
    job = Ranks(tmp_path, plain(2), HEAD + "def main(smoke):\n    note(smoke=smoke)\n    return {'x': total(1)}")
    before = job.files()
    code, out, err = finish(job.torchrun("--worker.smoke"))
    assert code == 0 and "nothing was written" in out, err
    assert [note["smoke"] for note in job.notes()] == [True, True]
    assert {name for name in job.files() if not name.startswith("runs")} == {n for n in before if n[:4] != "runs"}
    with Store.open(job.path) as store:
        store.commit_many([1], {"x": [1.0]})
    code, out, _ = finish(job.torchrun("--worker.index=1"))
    assert code == 0 and out.count("already complete") == 1 and len(job.notes()) == 2


def test_two_nodes(tmp_path):
    """Two torchruns of one rank each, which know of each other only by an address."""
    job = Ranks(tmp_path, plain(3), HEAD + "def main(index):\n    note(index=index)\n    return {'x': total(index)}")
    where = "127.0.0.1:29617"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={where}", "--rdzv_id=a"]
    nodes = [job.torchrun(options=options) for _ in range(2)]
    for code, _, err in [finish(node) for node in nodes]:
        assert code == 0, err
    assert job.array("x").tolist() == [0.0, 2.0, 4.0]
    assert sorted(note["rank"] for note in job.notes()) == [0, 0, 0, 1, 1, 1]


def test_one_rank_is_an_ordinary_worker(tmp_path):
    job = Ranks(tmp_path, plain(2), "import sys\ndef main(): return {'x': 'torch' in sys.modules}")
    assert finish(job.torchrun(options=["--nproc_per_node=1"]))[0] == 0
    assert job.array("x").tolist() == [0.0, 0.0]
    code, _, err = job.run(env={"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"})
    assert code == 2 and "ranks cannot talk to each other" in err

"""The worker: how main is called, what is accepted of what it returns, and what happens when it goes wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from datamodels import worker
from datamodels.store import Store, commit
from tests.jobs import CALLED, DESIGN, ROOT, Job, finish, plain, until

# ------------------------------------------------------------------ the calling convention

RETURN = "return {'x': [1, 2, 3]}"
SIGNATURES = {
    "released": ("*_, index, logdir", {"index", "logdir"}),
    "positional": ("index, logdir", {"index", "logdir"}),
    "by name": ("mask, *, seed, width", {"mask", "seed", "width"}),
    "defaults": ("index, epochs=3, smoke=True, optimiser=None", {"index", "smoke", "optimiser"}),
    "everything": (
        "**all",
        {"index", "keys", "logdir", "mask", "measurements", "seed", "smoke", "width", "optimiser"},
    ),
    "nothing": ("", set()),
}


@pytest.mark.parametrize("style", SIGNATURES)
def test_main_is_given_what_it_names(tmp_path, monkeypatch, style):
    signature, names = SIGNATURES[style]
    name = f"job_{style.replace(' ', '_')}"
    job = Job(tmp_path, DESIGN, f"got = {{}}\ndef main({signature}):\n    got.update(locals())\n    {RETURN}", name)
    assert job.here("--worker.index=1", monkeypatch=monkeypatch) == 0
    got = dict(sys.modules[name].got)
    got.update(got.pop("all", {}))
    got = {key: value for key, value in got.items() if key not in ("_", "epochs")}
    with Store.open(job.path) as store:
        asked = store.design.assignment(1)
    expected = {"index": 1, "seed": asked.seed, "smoke": False, "logdir": str(job.path / "workers/1")}
    expected |= {"mask": asked.mask, "width": 4, "optimiser": "sgd", "keys": ("x", "note"), "measurements": {}}
    assert set(got) == names
    for key, value in got.items():
        np.testing.assert_array_equal(value, expected[key])


def test_main_many_is_given_a_leading_axis(tmp_path, monkeypatch):
    source = """
calls = []
def main_many(*, indices, masks, seeds, logdirs, smoke, width, optimiser):
    calls.append(dict(locals()))
    return {'x': [[i, i, i] for i in indices]}
"""
    job = Job(tmp_path, DESIGN, source, "job_many")
    assert job.here("--worker.batch=4", monkeypatch=monkeypatch) == 0
    calls = sys.modules["job_many"].calls
    assert sorted(len(call["indices"]) for call in calls) == [2, 4]
    with Store.open(job.path) as store:
        for call in calls:
            rows = call["indices"].tolist()
            asked = [store.design.assignment(row) for row in rows]
            assert call["masks"].dtype == bool and call["masks"].shape == (len(rows), 6)
            np.testing.assert_array_equal(call["masks"], [a.mask for a in asked])
            assert call["seeds"].tolist() == [a.seed for a in asked]
            assert call["logdirs"] == [str(job.path / f"workers/{row}") for row in rows]
            assert call["width"] == [a.choices["width"] for a in asked]
            assert call["optimiser"] == [a.choices.get("optimiser") for a in asked]
            assert call["smoke"] is False
        np.testing.assert_array_equal(store.rows("x"), np.arange(6)[:, None] * np.ones(3))
        np.testing.assert_array_equal(store.rows("masks"), [store.design.assignment(i).mask for i in range(6)])
        np.testing.assert_array_equal(store.rows("width"), [4, 4, 8, 8, 4, 4])


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("def main(index, momentum): pass", 2, "asks for momentum, which a row does not have; it has index, seed"),
        ("def main(a, /): pass", 2, "asks for a, which"),
        ("x = 1", 2, "has neither main() nor main_many()"),
        ("main = 3", 2, "expected a function, got int"),
        ("import nothing_of_this_name", 2, "No module named 'nothing_of_this_name'; its traceback is above"),
        ("1 / 0", 2, "ZeroDivisionError: division by zero; its traceback is above"),
        ("def main(:", 2, "SyntaxError"),
        ("import sys; sys.exit(0)", 2, "SystemExit: 0"),
    ],
)
def test_a_module_that_cannot_be_used(tmp_path, monkeypatch, capsys, request, source, code, message):
    job = Job(tmp_path, DESIGN, source, f"job_bad_{abs(hash(request.node.name))}")
    assert job.here(monkeypatch=monkeypatch) == code
    err = capsys.readouterr().err
    assert message in err
    assert ("Traceback" in err) == ("traceback is above" in err)
    assert not any(job.attempts)


def test_the_line_of_an_error_in_the_import_is_shown(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, plain(1), "def depth():\n    return {}['gone']\n\ndepth()\n", "job_bad_import")
    assert job.here(monkeypatch=monkeypatch) == 2
    assert "return {}['gone']" in capsys.readouterr().err


@pytest.mark.parametrize("main", ["nowhere", "nowhere.at.all", "path/to/job.py", "job.py", "./job.py", ".job", ""])
def test_a_module_that_is_not_there(tmp_path, monkeypatch, capsys, main):
    job = Job(tmp_path, plain(1), "def main(): pass")
    assert job.here(main=main or "", monkeypatch=monkeypatch) == 2 or not main
    if main.startswith("nowhere"):
        assert f"there is no module {main!r}; tried {tmp_path / main.replace('.', '/')}.py" in capsys.readouterr().err
    elif main:
        assert "leave out .py and write . for /" in capsys.readouterr().err


def test_batch_without_main_many(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, plain(1), "def main(): pass", "job_no_many")
    assert job.here("--worker.batch=2", monkeypatch=monkeypatch) == 2
    assert "job_no_many has no main_many()" in capsys.readouterr().err


def test_a_factor_of_another_block(tmp_path):
    """Rows of a block without the factor use main's default."""
    job = Job(tmp_path, DESIGN, "def main(width, optimiser='none'): return {'x': [1, 2, 3], 'note': optimiser}")
    assert job.run()[0] == 0
    assert job.array("note").tolist() == ["sgd"] * 4 + ["none"] * 2


def test_fastargs_and_the_design_side_by_side(tmp_path):
    source = """
from fastargs import Param, Section
from fastargs.decorators import param
Section('trainer').params(lr=Param(float, '', required=True), scale=Param(float, '', default=2.0))
@param('trainer.lr')
@param('trainer.scale', alias='by')
def main(*, width, lr, by): return {'x': [lr, by, width]}
"""
    job = Job(tmp_path, DESIGN, source)
    assert job.run("--worker.index=2", "--trainer.lr", "5e-1")[0] == 0
    assert job.array("x")[2].tolist() == [0.5, 2.0, 8.0]


# ------------------------------------------------------------------ what main returns

GOOD = "{'x': [1, 2, 3]}"
BAD = {
    "None": "must return a dict from key to value, got NoneType",
    "[1, 2]": "must return a dict from key to value, got list",
    "{}": "required key 'x' missing; got 'width', 'masks'",
    "{'note': 'a'}": "required key 'x' missing; got 'width', 'masks', 'note'",
    "{**good, 'xs': 1}": "unknown key 'xs'; did you mean 'x'? If not, add it to the schema",
    "{**good, '_completed': True}": "'_completed' is the store's own record",
    "{'x': [1, 2]}": "'x': expected shape [3], got [2]",
    "{'x': 1.0}": "'x': expected shape [3], got []",
    "{'x': [1, 2, float('nan')]}": "is not finite",
    "{'x': [1, 2, 1e39]}": "does not fit float32",
    "{'x': ['a', 'b', 'c']}": "'x': expected numbers",
    "{**good, 'width': 5}": "'width': main returned something else than the design gives this row",
    "{**good, 'width': 4.5}": "4.5 is not exactly a int32",
    "{**good, 'masks': [True] * 6}": "'masks': main returned something else than the design gives this row",
    "{**good, 'masks': [True] * 5}": "'masks': expected shape [6], got [5]",
    "{**good, 'note': 'far too long'}": "expected text of at most 8 characters, got 12",
}


@pytest.mark.parametrize("value", BAD)
def test_what_may_not_be_stored_is_refused_whole(tmp_path, monkeypatch, capsys, value):
    name = f"job_bad_value_{list(BAD).index(value)}"
    job = Job(tmp_path, DESIGN, f"good = {GOOD}\ndef main(): return {value}", name)
    before = {key: job.array(key).tobytes() for key in ("masks", "width", "x", "note", "_completed")}
    assert job.here("--worker.index=1", "--worker.retries=0", monkeypatch=monkeypatch) == 1
    assert {key: job.array(key).tobytes() for key in before} == before
    assert "row 1" in job.traceback(1) and BAD[value] in job.traceback(1)
    assert BAD[value] in capsys.readouterr().err


def test_the_design_fills_in_and_optional_keys_stay_absent(tmp_path, monkeypatch):
    source = """
def main(index, mask):
    given = {'x': mask[:3], 'masks': mask, 'width': 4, 'note': 'hello'}
    return given if index == 1 else {'x': [index] * 3}
"""
    job = Job(tmp_path, DESIGN, source, "job_fills_in")
    assert job.here(monkeypatch=monkeypatch) == 0
    with Store.open(job.path) as store:
        masks = [store.design.assignment(row).mask for row in range(6)]
        np.testing.assert_array_equal(store.rows("masks"), masks)
        assert store.rows("note").tolist() == ["hello"]
    np.testing.assert_array_equal(np.unpackbits(job.array("masks"), axis=1, count=6, bitorder="little"), masks)
    assert job.array("_keys/note")["status"].tolist() == [0, 1, 0, 0, 0, 0]


# ------------------------------------------------------------------ seeds

SEEDED = """
import random
import numpy as np
{torch_early}
def main(index):
    {torch_late}
    return {{'python': random.random(), 'numpy': np.random.rand(), 'torch': {torch}}}
"""
THREE = {"num_models": 4, "schema": {key: {"shape": [], "dtype": "float64"} for key in ("python", "numpy", "torch")}}


def test_global_generators_are_seeded_from_the_row(tmp_path, monkeypatch):
    """The same values alone, in another order, and on a second try; others for another row."""
    fails_once = "if index == 3 and not tries: tries.append(1); 1 / 0"
    source = SEEDED.format(torch_early="", torch_late=fails_once, torch="0.0")
    job = Job(tmp_path, THREE, "tries = []\n" + source, "job_seeded")
    for row in (2, 0, 3, 1):
        assert job.here(f"--worker.index={row}", monkeypatch=monkeypatch) == 0
    assert job.attempts == [1, 1, 1, 2]
    with Store.open(job.path) as store:
        seeds = [store.design.assignment(row).seed for row in range(4)]
    import random

    assert job.array("python").tolist() == [random.Random(seed).random() for seed in seeds]
    assert job.array("numpy").tolist() == [np.random.RandomState(seed).rand() for seed in seeds]


def test_torch_is_seeded_whether_it_is_imported_early_or_late(tmp_path):
    torch = pytest.importorskip("torch")
    jobs = []
    for kind in ("early", "late"):
        (tmp_path / kind).mkdir()
        lines = {"torch_early": "", "torch_late": "", f"torch_{kind}": "import torch", "torch": "float(torch.rand(()))"}
        jobs.append(Job(tmp_path / kind, THREE, SEEDED.format(**lines)))
    processes = [job.start() for job in jobs]
    assert [finish(process)[0] for process in processes] == [0, 0]
    with Store.open(jobs[0].path) as store:
        seeds = [store.design.assignment(row).seed for row in range(4)]
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds]
    for job in jobs:
        assert job.array("torch").tolist() == expected


def test_a_main_without_torch_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is blocked')")
    source = "import sys\ndef main(index):\n    assert 'torch' not in sys.modules\n    return {'x': index}"
    job = Job(tmp_path, plain(3), source)
    code, _, err = job.run()
    assert (code, err, job.completed) == (0, "", [True] * 3)


# ------------------------------------------------------------------ one row


def test_a_complete_row_is_skipped_without_importing_main(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, plain(2), "def main(index): return {'x': index}", "job_skip")
    assert job.here("--worker.index=1", monkeypatch=monkeypatch) == 0
    before = job.files()
    assert job.here("--worker.index=1", main="gone", monkeypatch=monkeypatch) == 0
    assert "row 1: already complete" in capsys.readouterr().out
    assert job.files() == before


@pytest.mark.parametrize("index", ["-1", "2", "2.7", "one", "9999999999999999999999", "True"])
def test_an_index_that_is_no_row_is_refused_before_main_is_imported(tmp_path, monkeypatch, capsys, index):
    job = Job(tmp_path, plain(2), "def main(index): return {'x': index}", "job_index")
    before = job.files()
    assert job.here(f"--worker.index={index}", main="not_even_there", monkeypatch=monkeypatch) == 2
    err = capsys.readouterr().err
    assert "worker.index" in err and index in err and err.count("\n") == 1
    assert job.files() == before


def test_replacing_a_complete_row(tmp_path, monkeypatch, capsys):
    source = "value = 1.0\ndef main(index):\n    return {'x': value}"
    job = Job(tmp_path, plain(2), source, "job_replace")
    again = ("--worker.index=0", "--worker.do_if_complete", "--worker.retries=1")
    assert job.here("--worker.index=0", monkeypatch=monkeypatch) == 0
    module = sys.modules["job_replace"]

    module.value = float("nan")
    assert job.here(*again, monkeypatch=monkeypatch) == 1
    assert job.array("x").tolist() == [1.0, 0.0] and job.completed == [True, False]
    assert "not finite" in job.traceback(0, 2) and "not finite" in job.traceback(0, 3)
    err = capsys.readouterr().err
    assert err.count("it will be tried again") == 1 and err.count("failed: ") == 2

    module.value = 2.0
    assert job.here(*again, monkeypatch=monkeypatch) == 0
    assert job.array("x").tolist() == [2.0, 0.0] and job.completed == [True, False]
    with Store.open(job.path) as store:
        assert store.rows("x").tolist() == [2.0]
    assert job.here("--worker.do_if_complete", monkeypatch=monkeypatch) == 2  # which row?


def test_a_row_that_failed_for_good_runs_again_when_it_is_named(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, plain(2), "ok = False\ndef main(index): return {'x': 1.0 if ok else None}", "job_named")
    assert job.here("--worker.retries=0", monkeypatch=monkeypatch) == 3
    assert "0 rows committed, 2 attempts failed; 2 rows of the store failed too often" in capsys.readouterr().out
    sys.modules["job_named"].ok = True
    assert job.here("--worker.retries=0", monkeypatch=monkeypatch) == 3  # another worker leaves them alone
    assert job.completed == [False, False]
    assert job.here("--worker.retries=0", "--worker.index=1", monkeypatch=monkeypatch) == 0
    assert job.here("--worker.retries=1", monkeypatch=monkeypatch) == 0
    assert job.completed == [True, True]


@contextmanager
def reads_of(store):
    """Names of the files that are read meanwhile."""
    names, real = [], store.disk.read

    def read(name, offset, size):
        names.append(name)
        return real(name, offset, size)

    store.disk.read = read
    try:
        yield names
    finally:
        del store.disk.read


def worker_of(store, main):
    module = SimpleNamespace(__name__="job", main=main)
    return worker.Worker(store, worker.Routine.find(module, "main", ["index"]), None)


def test_what_was_read_of_a_row_is_not_read_again(tmp_path):
    Store.create(tmp_path / "store", plain(40), sync=False).close()
    with Store.open(tmp_path / "store", sync=False) as store, worker_of(store, lambda index: {"x": index}) as one:
        with reads_of(store) as names:
            one.run_all()
        assert store.completed().all()
        # Before and after the claim, and under the lock of the commit; then the looks at all rows.
        assert names.count("_completed.npy") <= 40 * 3 + 4 and names.count("_rows.npy") <= 40 * 2 + 4


def test_rows_that_another_worker_has_finished_are_passed_over_quickly(tmp_path):
    Store.create(tmp_path / "store", plain(5000), sync=False).close()
    with Store.open(tmp_path / "store", sync=False) as store, Store.open(tmp_path / "store", sync=False) as other:
        left = {7, 300, 301, 4999}

        def main(index):
            if not calls:
                rows = [row for row in range(5000) if row != index and row not in left]
                other.commit_many(rows, {"x": np.array(rows)})
            calls.append(index)
            return {"x": index}

        calls = []
        with worker_of(store, main) as one, reads_of(store) as names:
            one.run_all()
        assert store.rows("x").tolist() == list(range(5000))
        assert set(calls) == left | {calls[0]}
        assert names.count("_completed.npy") < 60


SILENT = """
import time
from datamodels.store import claims
def main(index):
    for run in claims._RUNS:
        run._last_beat -= %d  # as if no other thread had had its turn for so long
    return {'x': index}
"""


def test_a_row_whose_lease_can_be_renewed_is_committed(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs")
    job = Job(tmp_path, plain(2), SILENT % 85, "job_silent")
    assert job.here(monkeypatch=monkeypatch) == 0
    assert job.completed == [True, True] and job.attempts == [1, 1]


def test_a_row_whose_lease_ran_out_has_failed_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs")
    job = Job(tmp_path, plain(2), SILENT % 200, "job_too_silent")
    assert job.here("--worker.index=1", "--worker.retries=1", monkeypatch=monkeypatch) == 1
    assert job.attempts == [0, 2] and job.array("_rows")["state"].tolist() == [commit.PENDING, commit.FAILED]
    assert "has not renewed its lease for 2" in job.traceback(1, 1) and "time_to_live" in job.traceback(1, 2)
    assert not list((job.path / "claims").iterdir())
    assert "died" not in capsys.readouterr().err


def test_workers_at_once_never_run_a_row_twice(tmp_path):
    source = CALLED + "import time\ndef main(index):\n    called(index); time.sleep(.004)\n    return {'x': index}"
    job = Job(tmp_path, plain(150), source)
    processes = [job.start() for _ in range(3)]
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert sorted(map(int, job.calls())) == list(range(150))
    assert job.array("x").tolist() == list(range(150))
    done = [int(out.split()[0]) for _, out, _ in ends]
    assert sum(done) == 150 and max(done) < 150  # they did share the work


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("sys.exit(0)", "main called sys.exit(0); a row ends by returning its values"),
        ("raise KeyboardInterrupt", "main raised KeyboardInterrupt()"),
        ("raise BaseException('odd')", "main raised BaseException('odd')"),
    ],
)
def test_a_main_that_raises(tmp_path, monkeypatch, capsys, line, message):
    name = f"job_raises_{abs(hash(line))}"
    source = f"import sys\ndef main(index):\n    called(index)\n    if index == 1: {line}\n    return {{'x': 2}}"
    job = Job(tmp_path, plain(3), CALLED + source, name)
    assert job.here("--worker.retries=1", monkeypatch=monkeypatch) == 3
    assert job.completed == [True, False, True] and sorted(job.calls()) == ["0", "1", "1", "2"]
    for attempt in (1, 2):
        assert message in job.traceback(1, attempt) and f"if index == 1: {line}" in job.traceback(1, attempt)
    assert message in capsys.readouterr().err
    status = subprocess.run(
        [sys.executable, "-m", "datamodels.store", "status", str(job.path)], capture_output=True, text=True, cwd=ROOT
    )
    assert "2 of 3 rows complete" in status.stdout and "1 failed" in status.stdout
    assert "row 1: 2 attempts" in status.stdout and message in status.stdout


MISTAKEN = """
from datamodels.errors import ConfigError
ready = False
def main(index):
    called(index)
    if not ready: raise ConfigError("--trainer.width: say which")
    return {'x': index, 'note': 'n'}
def main_many(indices):
    return {key: [main(i)[key] for i in indices] for key in ('x', 'note')}
"""
NOTED = {"num_models": 4, "schema": {**plain(4)["schema"], "note": {"shape": [], "dtype": "U8", "required": False}}}


@pytest.mark.parametrize("argv", [(), ("--worker.batch=3",), ("--worker.index=1",), ("--worker.keys=note",)])
def test_a_main_that_finds_a_mistake_in_its_configuration_ends_the_worker(tmp_path, monkeypatch, capsys, argv):
    name = f"job_mistaken_{abs(hash(argv))}"
    job = Job(tmp_path, NOTED, CALLED + MISTAKEN, name)
    if "keys" in str(argv):
        with Store.open(job.path, sync=False) as store:
            store.commit_many(range(4), {"x": np.zeros(4)})
    before = [job.array(file).tobytes() for file in ("_rows", "_keys/note")]
    assert job.here(*argv, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "error: --trainer.width: say which\n"
    assert len(job.calls()) == 1 and not list((job.path / "claims").iterdir())
    with Store.open(job.path) as store:
        assert store.status().failed == 0
    if "keys" in str(argv):
        assert [job.array(file).tobytes() for file in ("_rows", "_keys/note")] == before
    else:
        assert job.attempts == [0] * 4 and not any(job.completed)
    sys.modules[name].ready = True
    assert job.here(*argv, monkeypatch=monkeypatch) == 0
    assert job.array("note").tolist().count("n") == (1 if "index" in str(argv) else 4)


@pytest.mark.parametrize("keys", [(), ("--worker.keys=note",)])
def test_rows_that_were_given_up_are_run_again_by_the_command_that_is_named(tmp_path, keys):
    failing = "import os\ndef main(index):\n    if not os.path.exists('go'): 1 / 0\n    return {'x': 1, 'note': 'n'}"
    job = Job(tmp_path, NOTED, failing)
    if keys:
        with Store.open(job.path, sync=False) as store:
            store.commit_many(range(4), {"x": np.zeros(4)})
    code, out, _ = job.run(*keys)
    assert code == 3 and out.startswith("0 rows committed, 12 attempts failed; 4 rows of the store failed too often")
    command = re.search(r"when the cause is gone, python (-m datamodels.store reset .*) has them run again$", out)[1]
    (tmp_path / "go").touch()
    assert job.run(*keys)[0] == 3
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert job.run(*keys)[:2] == (0, "4 rows committed, 0 attempts failed\n")


DIES = """
import os, signal
def main(index):
    called(index)
    if index == 1: %s
    return {'x': 2}
"""


@pytest.mark.parametrize(("line", "code"), [("os._exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_a_main_that_takes_its_process_down(tmp_path, line, code):
    """The row is tried again by the next worker, so often and no more; the other rows go on."""
    job = Job(tmp_path, plain(3), CALLED + DIES % line)
    assert [job.run("--worker.retries=1")[0] for _ in range(3)] == [code, code, 3]
    assert job.completed == [True, False, True] and sorted(job.calls()) == ["0", "1", "1", "2"]
    assert "died without leaving a word, 2 times" in job.traceback(1, 2)
    with Store.open(job.path) as store:
        status = store.status()
    assert (status.completed, status.failed, status.running, status.pending) == (2, 1, 0, 0)
    assert "died without leaving a word" in status.failures[0].error


MANY = (
    CALLED
    + """
import os
def main_many(indices):
    for index in indices:
        called(index)
    if 5 in indices: %s
    return {'x': [%s for index in indices]}
"""
)


@pytest.mark.parametrize(
    ("line", "value"),
    [("pass", "None if index == 5 else 1.0"), ("pass", "float('nan') if index == 5 else 1.0"), ("1 / 0", "1.0")],
)
def test_one_bad_row_of_a_batch_fails_alone(tmp_path, monkeypatch, line, value):
    job = Job(tmp_path, plain(12), MANY % (line, value), f"job_batch_{abs(hash(line + value))}")
    assert job.here("--worker.batch=12", "--worker.retries=1", monkeypatch=monkeypatch) == 3
    assert job.completed == [row != 5 for row in range(12)]
    assert job.attempts == [2 if row == 5 else 1 for row in range(12)]


def test_one_row_of_a_batch_that_takes_the_process_down_does_not_take_the_others_for_good(tmp_path):
    job = Job(tmp_path, plain(6), MANY % ("os._exit(9)", "1.0"))
    codes = []
    while not codes or codes[-1] == 9:
        codes.append(job.run("--worker.batch=6", "--worker.retries=1")[0])
    assert codes == [9, 9, 3]
    assert job.completed == [row != 5 for row in range(6)]
    assert "died without leaving a word" in job.traceback(5, 2)


def test_a_batch_with_the_wrong_leading_axis(tmp_path, monkeypatch):
    source = "def main_many(indices): return {'x': [1.0] * 2}"
    job = Job(tmp_path, plain(4), source, "job_axis")
    assert job.here("--worker.batch=4", "--worker.retries=0", monkeypatch=monkeypatch) == 3
    assert "must return a leading axis of 1, one entry per row of `indices`, got list" in job.traceback(3)


# ------------------------------------------------------------------ --worker.job_timeout

HANGS = {
    "sleeps": "time.sleep(60)",
    "catches Exception": "\n        while True:\n            try: time.sleep(.01)\n            except Exception: pass",
    "catches BaseException": "\n        while True:\n            try: time.sleep(.01)\n            except: pass",
    "sleeps in C with the lock": "ctypes.PyDLL(None).sleep(60)",
    "loops in C with the lock": "sum(itertools.repeat(0))",
    "many": "time.sleep(60)",
    "many, in C": "sum(itertools.repeat(0))",
}
HANGING = (
    CALLED
    + """
import ctypes, itertools, time
def hang_here():
        %s
def main%s
"""
)
SINGLE = """(index):
    called(index)
    if index == 2: hang_here()
    time.sleep(.05)
    return {'x': 1.0}
"""
SEVERAL = """_many(indices):
    for index in indices: called(index)
    if 2 in indices: hang_here()
    return {'x': [1.0] * len(indices)}
"""


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """Ends of one worker for each way to hang, run at the same time: (job, exit code, stderr, seconds)."""
    started = []
    for way, line in HANGS.items():
        many = way.startswith("many")
        job = Job(tmp_path_factory.mktemp("hung"), plain(4), HANGING % (line, SEVERAL if many else SINGLE))
        argv = ["--worker.job_timeout=1", "--worker.retries=0", *(["--worker.batch=4"] if many else [])]
        started.append((way, job, job.start(*argv), time.monotonic()))
    ends = {}
    for way, job, process, start in started:
        code, _, err = finish(process)
        ends[way] = (job, code, err, time.monotonic() - start)
    return ends


@pytest.mark.parametrize("way", HANGS)
def test_a_row_that_hangs_is_ended(hung, way):
    job, code, err, seconds = hung[way]
    killed = way in ("catches BaseException", "loops in C with the lock", "many, in C")
    assert code == (-9 if killed else 3), err
    assert seconds < 25
    assert not job.completed[2]
    if way != "many, in C":
        assert job.attempts[2] == 1
    report = job.traceback(2)
    assert "JobTimeout" in report and "job_timeout" in report
    assert "hang_here" in report  # where it hung
    with Store.open(job.path) as store:
        assert 2 in [failure.row for failure in store.status().failures]
        assert "JobTimeout" in store.last_error(2)
    # The other rows are done by the next worker, where this one is gone; those of one batch alone.
    argv = ("--worker.job_timeout=1", "--worker.batch=4", "--worker.retries=1") if way == "many, in C" else ()
    while killed and job.run(*(argv or ("--worker.retries=0",)))[0] == -9:
        assert argv and job.attempts[2] == 2
    assert job.completed == [True, True, False, True]


def test_a_main_that_is_in_time_is_not_disturbed(tmp_path):
    source = "import time\ndef main(index):\n    time.sleep(.6)\n    return {'x': 1.0}"
    job = Job(tmp_path, plain(3), source)
    code, _, err = job.run("--worker.job_timeout=1")
    assert (code, err, job.completed, job.attempts) == (0, "", [True] * 3, [1] * 3)
    assert not list((job.path / "runs").glob("*.stacks"))


# ------------------------------------------------------------------ being stopped

SLOW = (
    CALLED
    + """
import os, time
def main(index):
    called(index)
    if index >= 2 and not os.path.exists("go"): %s
    return {'x': 1.0}
"""
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_worker_gives_its_rows_back(tmp_path, number, code):
    job = Job(tmp_path, plain(4), SLOW % "time.sleep(60)")
    process = job.start()
    until(lambda: job.calls() and int(job.calls()[-1]) >= 2)
    started = time.monotonic()
    process.send_signal(number)
    end, _, err = finish(process, 20)
    assert end == code and time.monotonic() - started < 5
    assert f"stopped by {number.name}" in err and "Traceback" not in err
    assert job.attempts == [int(flag) for flag in job.completed]  # the row in hand is not counted
    assert not list((job.path / "claims").iterdir())
    (tmp_path / "go").touch()
    assert job.run()[0] == 0
    assert job.completed == [True] * 4 and job.attempts == [1] * 4


def test_a_main_that_swallows_the_stop_is_the_last(tmp_path):
    line = "\n        try: time.sleep(60)\n        except: pass"
    job = Job(tmp_path, plain(8), SLOW.replace("index >= 2", "True") % line)
    process = job.start()
    until(job.calls)
    process.terminate()
    assert finish(process, 20)[0] == 143
    assert len(job.calls()) == 1 and job.attempts == [0] * 8


def test_a_signal_in_the_middle_of_a_commit_waits_for_it(tmp_path):
    """The signal comes with the values written and the row not yet marked complete."""
    source = (
        CALLED
        + """
import os, signal
from datamodels.store.disk import PosixDisk
sync = PosixDisk.sync
def sync_and_stop(self, names):
    names = list(names)
    if 'x.npy' in names: os.kill(os.getpid(), signal.SIGTERM)
    sync(self, names)
PosixDisk.sync = sync_and_stop
def main(index):
    called(index)
    return {'x': 1.0}
"""
    )
    job = Job(tmp_path, plain(4), source)
    code, _, err = job.run()
    assert code == 143 and "1 rows committed" in err
    assert sum(job.completed) == 1 and sum(job.attempts) == 1 and len(job.calls()) == 1


def test_what_main_forked_does_not_end_the_worker(tmp_path):
    """A process that main forked and ends with SIGTERM dies as it would without us."""
    source = """
import os, signal, time
def main(index):
    child = os.fork()
    if child == 0:
        time.sleep(9)
        os._exit(1)
    time.sleep(.2)  # Python forgets signals that come during the fork
    os.kill(child, signal.SIGTERM)
    return {'x': os.waitpid(child, 0)[1]}
"""
    job = Job(tmp_path, plain(1), source)
    code, _, err = job.run("--worker.job_timeout=30")
    assert (code, err) == (0, "")
    assert job.array("x").tolist() == [15.0]


# ------------------------------------------------------------------ dry_run, smoke

LOOKS = """
import pathlib
def main(index, logdir, smoke, seed, width):
    pathlib.Path(logdir, 'log').write_text('x')
    return {'x': [1, smoke, width]}
def main_many(indices, logdirs, smoke):
    return {'x': [[i, 1, smoke] for i in indices]}
"""


def test_dry_run_shows_and_writes_nothing(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, DESIGN, LOOKS, "job_dry")
    before = job.files()
    assert job.here("--worker.dry_run", "--worker.index=2", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    with Store.open(job.path) as store:
        asked = store.design.assignment(2)
    for piece in (
        "row        2 of 6 (train)",
        f"seed       {asked.seed}",
        f"{int(asked.mask.sum())} of 6 examples (block 0, mask 0, repeat 0)",
        "width=8, optimiser='sgd'",
        "job_dry.main(index, logdir, smoke, seed, width)",
        str(tmp_path / "job_dry.py"),
        "masks: bits [6], width: int32 [], x: float32 [3], note: U8 []",
    ):
        assert piece in out
    assert job.here("--worker.dry_run", "--worker.batch=2", monkeypatch=monkeypatch) == 0
    assert "job_dry.main_many(indices, logdirs, smoke)" in capsys.readouterr().out
    assert job.files() == before


def test_dry_run_asks_the_module_what_it_says_of_a_row(tmp_path, monkeypatch, capsys):
    says = "def describe_row(width, mask, keys): return f'{width} wide, {mask.sum()} of {mask.size}, for {keys[-1]}'"
    job = Job(tmp_path, DESIGN, LOOKS + says, "job_dry_says")
    assert job.here("--worker.dry_run", "--worker.index=2", monkeypatch=monkeypatch) == 0
    with Store.open(job.path) as store:
        chosen = int(store.design.assignment(2).mask.sum())
    assert f"\n8 wide, {chosen} of 6, for note\n" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    job = Job(tmp_path / "other", DESIGN, LOOKS + "def describe_row(logdir): return ''", "job_dry_asks")
    assert job.here("--worker.dry_run", monkeypatch=monkeypatch) == 2
    assert "describe_row: asks for logdir" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "x"), [((), "x: [3] min 1, mean 2, max 4"), (("--worker.batch=3",), "x: [3] min 0")])
def test_smoke_checks_and_commits_nothing(tmp_path, monkeypatch, capsys, argv, x):
    job = Job(tmp_path, DESIGN, LOOKS, f"job_smoke_{len(argv)}")
    before = job.files()
    assert job.here("--worker.smoke", *argv, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert x in out and "nothing was written" in out
    assert ("3 rows" if argv else "1 row ") in out
    assert job.files() == before


@pytest.mark.parametrize("line", ["return {'x': [1, 2]}", "raise SystemExit(0)", "1 / 0", "return None"])
def test_smoke_fails_where_the_row_would(tmp_path, line):
    job = Job(tmp_path, DESIGN, f"def main(smoke): {line}")
    before = job.files()
    assert job.run("--worker.smoke")[0] == 1
    assert job.files() == before


# ------------------------------------------------------------------ folders and records


def test_the_rows_folder_is_made_when_asked_for_and_gone_when_empty(tmp_path, monkeypatch):
    source = """
import pathlib
def main(index, logdir):
    assert pathlib.Path(logdir).is_dir()
    if index == 1: pathlib.Path(logdir, 'log.txt').write_text('hello')
    return {'x': index}
"""
    job = Job(tmp_path, plain(3), source, "job_folder")
    assert job.here(monkeypatch=monkeypatch) == 0
    assert [p.relative_to(job.path).as_posix() for p in (job.path / "workers").rglob("*")] == [
        "workers/1",
        "workers/1/log.txt",
    ]


def test_no_folder_for_a_main_that_does_not_ask(tmp_path, monkeypatch):
    job = Job(tmp_path, plain(2), "def main(index): return {'x': index}", "job_no_folder")
    assert job.here(monkeypatch=monkeypatch) == 0
    assert not list((job.path / "workers").iterdir()) and not list((job.path / "claims").iterdir())
    (command,) = (job.path / "cmds.txt").read_text().splitlines()
    assert command == " ".join(["worker.py", *job.argv()])


def test_the_worker_leaves_signals_as_they_were(tmp_path, monkeypatch):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    job = Job(tmp_path, plain(1), "def main(index): return {'x': index}", "job_signals")
    assert job.here("--worker.job_timeout=9", monkeypatch=monkeypatch) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before


def test_a_logdir_that_is_not_a_store(tmp_path, monkeypatch, capsys):
    job = Job(tmp_path, plain(1), "def main(index): return {'x': index}", "job_no_store")
    (tmp_path / "empty").mkdir()
    assert job.here(f"--worker.logdir={tmp_path / 'empty'}", monkeypatch=monkeypatch) == 1
    assert "not a store: it has no spec.json; make one with" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())
    assert os.path.exists(job.path)


@pytest.mark.parametrize(("signature", "noted"), [("index, logdir", True), ("mask", False), ("**all", False)])
def test_a_main_that_does_not_ask_for_the_mask_is_told_so(tmp_path, signature, noted):
    job = Job(tmp_path, DESIGN, f"def main({signature}): {RETURN}")
    _, _, err = job.run("--worker.index=1")
    assert ("does not ask for `mask`" in err) == noted


def test_dry_run_and_smoke_show_the_function_that_the_run_calls(tmp_path):
    both = f"def main(index): {RETURN}\ndef main_many(indices): raise RuntimeError('not for one row')"
    job = Job(tmp_path, DESIGN, both)
    for show in ("dry_run", "smoke"):
        code, out, err = job.run("--worker.index=1", "--worker.batch=3", f"--worker.{show}")
        assert code == 0 and ("main(index)" in out or show == "smoke"), err
    assert job.run("--worker.index=1", "--worker.batch=3")[0] == 0


def test_a_block_without_a_factor_that_main_needs_is_refused_before_any_row(tmp_path):
    job = Job(tmp_path, DESIGN, f"def main(mask, optimiser): {RETURN}")
    code, _, err = job.run()
    assert code == 2 and "asks for optimiser" in err and "design[1] (eval)" in err
    assert sum(job.attempts) == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_factor_that_reaches_nobody(tmp_path, monkeypatch, capsys, exact):
    """`width` is a key of the schema; main takes neither it nor `optimiser`, but something nearly of that name."""
    source = "def main(index, optimizer='adam'):\n    return {'x': [1, 2, 3]}"
    job = Job(tmp_path, DESIGN, ("ALL_FACTORS_ARE_TAKEN = True\n" if exact else "") + source, f"job_reaches_{exact}")
    line = f"the factor 'optimiser' reaches nobody: {job.name}.main does not take it and no key of the schema holds it"
    for argv in (["--worker.dry_run"], ["--worker.index=0"]):
        assert job.here(*argv, monkeypatch=monkeypatch) == (2 if exact else 0)
        err = capsys.readouterr().err.splitlines()
        said = [each for each in err if "factor" in each]
        assert said[0].startswith(f"{'error' if exact else 'note'}: {line}; did you mean 'optimizer'?")
        assert len(said) == 1 and "width" not in said[0]
    assert job.completed[0] is not exact


@pytest.mark.parametrize("source", ["def main(**all)", "def main(optimiser='sgd')"])
def test_factors_that_are_taken_are_not_spoken_of(tmp_path, monkeypatch, capsys, source):
    job = Job(tmp_path, DESIGN, f"{source}: return {{'x': [1, 2, 3]}}", f"job_taken_{abs(hash(source))}")
    assert job.here(monkeypatch=monkeypatch) == 0
    assert "factor" not in capsys.readouterr().err


def test_dry_run_names_only_what_a_row_is_given(tmp_path):
    job = Job(tmp_path, DESIGN, f"def main(mask, width, optimiser='adam'): {RETURN}")
    train, evaluation = (job.run(f"--worker.index={row}", "--worker.dry_run")[1] for row in (0, 4))
    assert "main(mask, width, optimiser)" in train and "main(mask, width)" in evaluation


# ------------------------------------------------------------------ asked to end by a scheduler, and rows of one kind

LASTS = (
    CALLED
    + """
import os, time
def main(index):
    called(index)
    while not os.path.exists('go'): time.sleep(.02)
    return {'x': index}
"""
)


def test_a_worker_that_is_told_that_its_time_is_nearly_up_finishes_its_row(tmp_path):
    job = Job(tmp_path, plain(10), LASTS)
    process = job.start()
    until(job.calls)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    (tmp_path / "go").touch()
    code, out, err = finish(process)
    assert code == 0 and "1 rows committed" in out
    assert err == "asked to end: the rows in hand are finished, no other is begun\n"
    assert sum(job.completed) == sum(job.attempts) == len(job.calls()) == 1


@pytest.mark.parametrize(("slurm", "expected"), [({"SLURM_JOB_ID": "7"}, 0), ({}, 143)])
def test_a_row_is_given_back_when_slurm_asks_a_worker_to_end(tmp_path, monkeypatch, slurm, expected):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    job = Job(tmp_path, plain(10), LASTS)
    process = job.start(env=slurm)
    until(job.calls)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == expected and "stopped by SIGTERM; 0 rows committed, rows in hand are given back" in err
    assert not any(job.attempts)


def test_what_main_forked_ends_by_that_signal_as_if_nobody_listened(tmp_path):
    source = """
import os, signal
def main(index):
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(5)
    return {'x': os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
"""
    job = Job(tmp_path, plain(2), source)
    assert job.run()[0] == 0
    assert job.array("x").tolist() == [-signal.SIGUSR1] * 2


def test_a_worker_runs_the_rows_asked_for(tmp_path):
    job = Job(tmp_path, plain(10), WORKS_AT_ONCE)
    code, out, err = job.run("--worker.rows=2-4,7")
    assert code == 0 and "4 rows committed" in out, err
    assert job.completed == [row in (2, 3, 4, 7) for row in range(10)]
    code, _, err = job.run("--worker.rows=2", "--worker.index=2")
    assert code == 2 and "chooses among many rows, and --worker.index names one" in err
    code, _, err = job.run("--worker.rows=2-11")
    assert code == 2 and "'2-11': expected rows as in 0-99, ascending and in [0, 10)" in err
    assert "row        5 of 10" in job.run("--worker.rows=4-5", "--worker.dry_run")[1]


WORKS_AT_ONCE = "def main(index): return {'x': index}"

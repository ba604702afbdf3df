"""What Weights & Biases is told of rows, by the real package, offline."""

import json
import struct

import pytest

from datamodels.store import Store
from tests import needs
from tests.jobs import DESIGN, Job, plain

SPEC = {
    **DESIGN,
    "schema": {
        **DESIGN["schema"],
        "loss": {"shape": [], "dtype": "float64"},
        "steps": {"shape": [], "dtype": "int16", "required": False},
    },
}
MAIN = """
def main(index, mask):
    if index == 3: raise ValueError('bad')
    return {'x': [1, 2, 3], 'loss': index / 4, **({'steps': steps(index)} if index else {})}
def steps(index):
    return index if index < 5 else ValueError('not counted')
"""


def records(data):
    """The records of wandb's file: LevelDB's log format, behind a head of 7 bytes in the first block of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""
        place += 7 + length
        if 32768 - place % 32768 < 7:
            place += -place % 32768


def offline(folder):
    """(the run, its config, the history as a list of dicts) of each offline run in a folder."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        one, config, history = None, {}, []
        for raw in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "run":
                one = record.run
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                step = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                history.append({key: value for key, value in step.items() if not key.startswith("_")})
        found.append((one, config, history))
    return found


def test_one_run_per_worker_and_a_step_per_row(tmp_path):
    needs.wandb()
    job = Job(tmp_path, SPEC, MAIN)
    options = ["--wandb.entity=us", "--wandb.project=rows", "--wandb.job_type=fill", "--wandb.name=first"]
    code, out, err = job.run(*options, "--worker.retries=0", env={"WANDB_MODE": "offline"})
    assert code == 3 and "5 rows committed" in out
    assert "row 3: attempt 1 failed" in err and "wandb" not in err.lower(), err
    ((one, config, history),) = offline(job.path)
    with Store.open(job.path) as store:
        record = store.run_of(0)
    assert (one.entity, one.project, one.job_type, one.run_group) == ("us", "rows", "fill", "store")
    assert one.display_name == f"first-{record['run'][-8:]}" and record["wandb"]
    assert {"store": str(job.path), "run": record["run"], "rows": 6}.items() <= config.items()
    by_row = {step["row"]: step for step in history}
    assert len(history) == 5 and sorted(by_row) == [0, 1, 2, 4, 5]
    assert by_row[2] == {
        "row": 2,
        "loss": 0.5,
        "steps": 2,
        "width": 8,
        "choices/width": 8,
        "choices/optimiser": "sgd",
    }
    assert "steps" not in by_row[0] and "steps" not in by_row[5], "no value, and one that failed"
    assert "choices/optimiser" not in by_row[4]


def test_it_is_not_imported_unless_it_is_asked_for(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('wandb is blocked')")
    job = Job(tmp_path, plain(1), "def main(): return {'x': 1}")
    assert job.run()[0] == 0
    code, _, err = job.run("--wandb.project=rows", "--worker.index=0", "--worker.do_if_complete")
    assert code == 2 and "--wandb.project: wandb cannot be imported (wandb is blocked); pip install" in err
    assert job.attempts == [1]


BREAKS = {
    "init": "def init(**all): raise OSError('no network')",
    "log": "def init(**all): return Run()",
    "finish": "def init(**all): Run.log = lambda self, values: None; return Run()",
}
FAKE = """
Settings = dict
class Run:
    id = url = 'here'
    def define_metric(self, *all, **more): pass
    def log(self, values): raise OSError('no network')
    def finish(self, **all): raise OSError('no network')
"""


@pytest.mark.parametrize("where", BREAKS)
def test_what_fails_there_fails_no_row_and_is_said_once(tmp_path, where):
    (tmp_path / "wandb.py").write_text(FAKE + BREAKS[where])
    job = Job(tmp_path, plain(5), "def main(): return {'x': 1}")
    code, _, err = job.run("--wandb.project=rows")
    assert code == 0 and job.completed == [True] * 5
    assert err == "wandb: OSError: no network; going on without it\n"


HANGS = """
import time
def init(**all):
    Run.log = lambda *all: None
    Run.finish = lambda *all, **more: time.sleep(99)
    return Run()
"""


def test_a_network_that_never_answers_does_not_hold_the_worker(tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE + HANGS)
    source = "from datamodels.running import tracking\ntracking._FINISH = .1\ndef main(): return {'x': 1}"
    job = Job(tmp_path, plain(1), source)
    code, _, err = job.run("--wandb.project=rows", timeout=30)
    assert code == 0 and "not sent yet; `wandb sync` does it" in err


def test_the_pool_passes_it_on(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('wandb is blocked')")
    job = Job(tmp_path, plain(1), "def main(): return {'x': 1}")
    code, _, err = job.run(argv=job.argv("--wandb.project=rows", "--pool.workers=1"), module="datamodels.pool")
    assert code == 2 and "wandb is blocked" in err

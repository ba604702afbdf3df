"""Workers as tasks of Ray: a real cluster of three nodes on this host, one of which dies."""

import os
import signal

import pytest

from tests import needs
from tests.executors.conformance import WAITS, WORKS, Conformance, workers_of
from tests.executors.ray_cluster import Cluster, parent
from tests.jobs import Job, finish, plain, until


@pytest.fixture(scope="module")
def cluster():
    needs.ray()
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.mark.slow
class TestRay(Conformance):
    options = ("--pool.executor=ray",)

    @pytest.fixture
    def environment(self, cluster):
        return {"RAY_ADDRESS": cluster.address, "PYTHONWARNINGS": "ignore"}

    def test_workers_share_gpus_when_they_ask_for_a_part(self, tmp_path, start):
        source = """
import os, time
def main(index):
    open(f'here-{os.getpid()}', 'w')
    while sum(name.startswith('here') for name in os.listdir('.')) < 4: time.sleep(.01)
    return {'x': int(os.environ['CUDA_VISIBLE_DEVICES'])}
"""
        job = Job(tmp_path, plain(4), source)
        code, _, err = finish(start(job, "--pool.gpus=auto", "--pool.gpus_per_worker=0.5", workers=4), self.patience)
        assert code == 0, err
        assert len(set(job.array("_rows")["run"].tolist())) == 4
        code, _, err = finish(start(Job(folder(tmp_path), plain(1), source), "--pool.gpus=auto",
                                    "--pool.gpus_per_worker=3"))  # fmt: skip
        assert code == 2 and "the cluster has no place for a worker with one core and 3 GPUs" in err

    def test_what_a_killed_task_had_started_gives_its_row_back(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        until(lambda: len([row for row in job.calls() if int(row) >= 6]) == 2)
        before = workers_of(job)
        os.kill(parent(before[0]), signal.SIGKILL)
        until(lambda: len(set(workers_of(job)) - set(before)) == 1 and before[0] not in workers_of(job))
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert (code, job.completed, job.attempts) == (0, [True] * 12, [1] * 12), err
        assert len(job.calls()) == 13 and "starting it again" not in err

    def test_a_raylet_that_is_killed_loses_no_row_while_what_it_had_started_lives_on(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        until(lambda: len([row for row in job.calls() if int(row) >= 6]) == 2)
        cluster.kill(workers_of(job)[0])
        until(lambda: cluster.ask("alive") == 2)
        cluster.heal()
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert (code, job.completed, job.attempts) == (0, [True] * 12, [1] * 12), err
        assert len(job.calls()) - 12 in (0, 1, 2) and len(set(job.calls())) == 12  # given back, or finished

    def test_a_node_that_dies_with_all_it_had_started_has_its_workers_begun_elsewhere(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        until(lambda: len([row for row in job.calls() if int(row) >= 6]) == 2)
        before = set(workers_of(job))
        killed = cluster.kill(min(before), whole=True)
        lost = len(before & set(killed))
        until(lambda: len(set(workers_of(job)) - before) == lost)
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert (code, job.completed) == (0, [True] * 12), err
        assert "starting it again" not in err  # it was Ray who did
        assert lost >= 1 and sum(job.attempts) == len(job.calls()) == 12 + lost
        until(lambda: cluster.ask("alive") == 2)
        cluster.heal()


def folder(path):
    (path / "second").mkdir()
    return path / "second"


def test_without_ray_it_is_told_how_to_get_it(tmp_path):
    job = Job(tmp_path, plain(2), WORKS % 0)
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    code, out, err = finish(job.start(module="datamodels.pool", argv=[*job.argv(), "--pool.executor=ray"]))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "Ray is not installed here; pip install 'datamodels-store[ray]' does that" in err
    job = Job(folder(tmp_path), plain(2), WORKS % 0)
    (job.folder / "ray.py").write_text("raise RuntimeError('nobody asked for it')")
    code, _, err = finish(job.start(module="datamodels.pool", argv=[*job.argv(), "--pool.workers=1"]))
    assert code == 0, err


def test_an_address_where_nobody_answers(tmp_path):
    needs.ray()
    job = Job(tmp_path, plain(2), WORKS % 0)
    argv = [*job.argv(), "--pool.executor=ray"]
    code, _, err = finish(job.start(module="datamodels.pool", argv=argv, env={"RAY_ADDRESS": "127.0.0.1:1"}))
    assert code == 2 and "RAY_ADDRESS: nobody answers at 127.0.0.1:1" in err.splitlines()[-1]

"""Workers as tasks of SLURM: a real cluster of two nodes, its faults, and the batch script."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodels.errors import ConfigError
from datamodels.executors.slurm import Resources, script
from tests import needs
from tests.executors.conformance import WAITS, WORKS, Conformance, workers_of
from tests.executors.slurm_cluster import Cluster
from tests.jobs import ROOT, Job, finish, plain, until


@pytest.fixture(scope="module")
def cluster():
    needs.slurm()
    with Cluster() as cluster:
        yield cluster


@pytest.mark.slow
class TestSlurm(Conformance):
    options = ("--pool.executor=slurm", "--pool.slurm.time=10")

    @pytest.fixture
    def environment(self, cluster):
        yield cluster.environment
        with contextlib.suppress(AssertionError):
            cluster.run("scancel", "--user=root")
        until(lambda: not cluster.jobs(), 40)

    # ------------------------------------------------------------------ what only SLURM can do

    def in_hand(self, job, count=2):
        """Wait until so many of the rows that last have been begun."""
        until(lambda: sum(int(row) >= 6 for row in job.calls()) == count)

    def test_a_task_that_is_requeued_gives_its_row_back_and_comes_again(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        self.in_hand(job)
        before = workers_of(job)
        cluster.run("scontrol", "requeue", next(iter(cluster.jobs())))
        until(lambda: len(set(workers_of(job)) - set(before)) == 1 and len(workers_of(job)) == 2)
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert code == 0, err
        assert "starting it again" not in err  # it was SLURM who did
        assert job.attempts == [1] * 12 and len(job.calls()) == 13
        log = next(job.path.glob("runs/pool-*/worker-0.log")).read_text()
        assert "stopped by SIGTERM" in log and "rows committed, 0 attempts failed" in log

    def test_before_the_time_limit_a_worker_finishes_its_row_and_the_next_goes_on(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job, workers=1)
        self.in_hand(job, 1)
        (name,) = cluster.jobs()
        cluster.run("scontrol", "update", f"jobid={name}", "timelimit=1")  # the warning comes two minutes before
        log = next(job.path.glob("runs/pool-*/worker-0.log"))
        until(lambda: "asked to end: the rows in hand are finished" in log.read_text(), 60)
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert code == 0, err
        assert "worker 0 ended with code 0" in err and "starting it again" in err
        assert all(job.completed) and job.attempts == [1] * 12 and len(job.calls()) == 12
        assert len(set(job.array("_rows")["run"].tolist())) == 2

    def test_a_node_whose_daemon_dies_while_its_workers_live_on(self, tmp_path, start, cluster):
        """SLURM starts them a second time elsewhere, and the claims keep them apart."""
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        self.in_hand(job)
        before = workers_of(job)
        nodes = {node for _, node in cluster.jobs().values()}
        for node in nodes:
            cluster.kill_node(node)
        assert nodes == {"n0"}
        until(lambda: len(workers_of(job)) == 4, 60)
        assert set(before) < set(workers_of(job)) and cluster.nodes()["n0"].startswith("down")
        self.in_hand(job, 4)
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert code == 0, err
        assert sorted(map(int, job.calls())) == list(range(12)) and job.attempts == [1] * 12
        cluster.start_node("n0")
        until(lambda: cluster.nodes() == {"n0": "idle", "n1": "idle"}, 30)
        (tmp_path / "later").mkdir()
        later = Job(tmp_path / "later", plain(4), WORKS % 0)
        code, _, err = finish(start(later, "--pool.slurm.extra='--nodelist=n0'", workers=1), self.patience)
        assert (code, later.completed) == (0, [True] * 4), err

    def test_tasks_that_have_no_place_yet_are_withdrawn_when_all_rows_are_done(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(4), WORKS % 0)
        process = start(job, "--pool.slurm.extra=--hold")
        until(lambda: len(cluster.jobs()) == 2)
        cluster.run("scontrol", "release", next(iter(cluster.jobs())))
        code, _, err = finish(process, self.patience)
        assert (code, job.completed) == (0, [True] * 4), err
        assert "starting it again" not in err
        until(lambda: not cluster.jobs())

    def test_whoever_cancels_a_task_does_not_see_it_again(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        self.in_hand(job)
        cluster.run("scancel", next(iter(cluster.jobs())))
        until(lambda: len(workers_of(job)) == 1)
        time.sleep(2)
        assert len(workers_of(job)) == 1
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert (code, job.attempts) == (0, [1] * 12), err

    def test_the_pool_waits_while_slurm_does_not_answer_or_takes_no_job(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        self.in_hand(job)
        before = workers_of(job)
        cluster.stop_controller()
        time.sleep(9)  # squeue asks for six, and has no answer
        cluster.start_controller()
        until(lambda: len(cluster.nodes()) == 2)
        cluster.run("scontrol", "update", "partitionname=work", "state=inactive")
        os.kill(before[0], signal.SIGKILL)
        until(lambda: cluster.jobs(states="FAILED"))
        time.sleep(3)  # in which it asks for another
        assert process.poll() is None and len(workers_of(job)) == 1
        cluster.run("scontrol", "update", "partitionname=work", "state=up")
        until(lambda: len(set(workers_of(job)) - set(before)) == 1)
        (tmp_path / "go").touch()
        code, _, err = finish(process, self.patience)
        assert (code, job.completed) == (0, [True] * 12), err
        assert sum(job.attempts) == 13 and err.count("starting it again") == 1

    def test_a_pool_whose_terminal_is_closed_leaves_the_workers_at_work(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(12), WAITS)
        process = start(job)
        self.in_hand(job)
        process.send_signal(signal.SIGHUP)
        finish(process)
        (tmp_path / "go").touch()
        until(lambda: all(job.completed) and not cluster.jobs())
        assert job.attempts == [1] * 12

    def test_the_script_is_written_and_runs_by_hand_as_does_ours(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(8), WORKS % 0.3)
        code, out, err = finish(start(job, "--pool.submit=false", "--pool.rows=0-3"))
        assert code == 0 and "written, not submitted; 2 workers start with: sbatch" in err
        environment = {
            **os.environ,
            **cluster.environment,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "PYTHON": sys.executable,
        }
        ours = ["--array=0-1", ROOT / "worker_scripts/slurm_array.sh", *job.argv("--worker.rows=4-7")]
        for argv, cwd in ([out.strip()], "/"), (ours, tmp_path):
            subprocess.run(["sbatch", *argv], cwd=cwd, env=environment, check=True, capture_output=True)
        until(lambda: all(job.completed) and not cluster.jobs())
        assert sorted(map(int, job.calls())) == list(range(8))  # in one folder, wherever it was submitted from
        logs = sorted(tmp_path.glob("slurm-*.log"))
        said = [re.search(r"(\d) rows committed, 0 attempts failed", log.read_text()) for log in logs]
        assert len(logs) == 2 and sum(int(match[1]) for match in said) == 4

    def test_a_template_of_ones_own_and_the_options_that_count_more(self, tmp_path, start, cluster):
        job = Job(tmp_path, plain(4), "import os\ndef main(index): return {'x': float(os.environ['MINE'])}")
        (tmp_path / "mine.sh").write_text(
            "#!/bin/bash\n#SBATCH --time=5 --job-name=mine\n#SBATCH --comment=hello --mem=700M\n\n"
            f'export MINE=7\nexec {sys.executable} -m datamodels.worker "$@"\n'
        )
        options = ["--pool.template=mine.sh", "--pool.slurm.memory=600M", "--pool.slurm.partition=work"]
        options += ["--pool.slurm.cpus=2", "--pool.slurm.nodes=1", "--pool.slurm.account=us"]
        process = start(job, *options, "--pool.slurm.extra=--comment='good day' --nice=3", workers=1)
        (name,) = until(cluster.jobs)
        shown = cluster.run("scontrol", "show", "job", name)
        code, _, err = finish(process, self.patience)
        assert code == 0, err
        assert job.array("x").tolist() == [7.0] * 4
        for text in ("TimeLimit=00:10:00", "JobName=mine", "Comment=good day", "MinMemoryNode=600M", "Requeue=1"):
            assert text in shown, shown
        for text in ("CPUs/Task=2", "Account=us", "Partition=work", "Nice=3", f"WorkDir={tmp_path}"):
            assert text in shown, shown

    def test_what_slurm_refuses_is_told_in_its_words(self, tmp_path, start):
        job = Job(tmp_path, plain(4), WORKS % 0)
        code, out, err = finish(start(job, "--pool.slurm.partition=nowhere"))
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "error: sbatch " in err and "invalid partition specified: nowhere" in err
        assert not any(job.attempts)


# ------------------------------------------------------------------ the script, and what is refused without a cluster


def text(*arguments, workers=3, logs, template=None, **resources):
    return script(arguments, workers, logs, Resources(**resources), template)


def test_arguments_and_paths_with_spaces_reach_the_worker(tmp_path):
    logs = tmp_path / "a b%"
    arguments = ["--x=a b", "--y='$HOME'", "z\n"]
    written = text(*arguments, logs=logs, template='#!/bin/sh\n\nprintf "%s|" "$@"\n')
    done = subprocess.run(["sh", "-c", written], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{argument}|" for argument in arguments)
    assert f"#SBATCH '--output={tmp_path}/a b%%/worker-%a.log'" in written


def test_a_warning_before_the_worker_listens_does_not_end_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, plain(4), WORKS % 0)
    (tmp_path / "script").write_text(text(*job.argv(), logs=tmp_path))
    process = subprocess.Popen(["bash", "script"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: "datamodels.worker" in Path(f"/proc/{process.pid}/cmdline").read_text())
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert (code, job.completed) == (0, [True] * 4), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": 'exec "$@"'}, "expected a batch script, its first line as in #!/bin/bash"),
        ({"template": "#!/bin/bash\nexec train"}, 'it has no "$@"'),
        ({"extra": "qos=high"}, "expected options as in --qos=high, with =, got 'qos=high'"),
        ({"extra": "--qos='high"}, "No closing quotation"),
        ({"job_name": "a\nb"}, "an option of sbatch is one line"),
    ],
)
def test_a_script_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError) as error:
        text(logs=tmp_path, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pool.executor=slurm"], "--pool.workers: SLURM must be told how many"),
        (["--pool.executor=slurm", "--pool.workers=2"], "there is no sbatch here"),
        (["--pool.executor=slurm", "--pool.workers=2", "--pool.gpus=auto"], "SLURM gives its own: --pool.slurm.gpus=1"),
        (["--pool.executor=slurm", "--pool.workers=2", "--pool.template=none.sh"], "cannot be read: "),
        (["--pool.slurm.time=1:00:00"], "is for SLURM; say --pool.executor=slurm (or local)"),
        (["--pool.executor=slurm", "--pool.slurm.tim=1"], "unknown key; did you mean --pool.slurm.time?"),
        (["--pool.executor=slrm"], "expected one of local, slurm, ray"),
    ],
)
def test_a_mistake_is_refused_at_the_start(tmp_path, argv, message):
    job = Job(tmp_path, plain(4), WORKS % 0)
    process = job.start(module="datamodels.pool", argv=[*job.argv(), *argv], env={"PATH": str(tmp_path)})
    code, out, err = finish(process)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1

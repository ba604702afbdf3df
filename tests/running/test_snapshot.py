"""A copy of the user's code: what is in it, and that workers run it and nothing else."""

import os
import signal
import subprocess

import pytest

from datamodels.errors import ConfigError
from datamodels.running import snapshot
from datamodels.store import Store
from tests.jobs import CALLED, ROOT, Job, finish, plain, until
from tests.store.test_runs import git
from tests.test_pool import Pool

USES = (
    CALLED
    + """
import os, subprocess, sys, time
def main(index):
    called(index)
    time.sleep(.05)
    import late.inner
    child = subprocess.run([sys.executable, '-c', 'import late.inner; print(late.inner.VALUE)'],
                           capture_output=True, text=True, check=True)
    return {'x': VALUE + late.inner.VALUE + int(child.stdout) + int(open('data/one.txt').read())}
VALUE = 1
"""
)


def repository(folder):
    """USES as a module, a package that it imports late, and data that git ignores."""
    (folder / "late").mkdir()
    (folder / "late/inner.py").write_text("VALUE = 10\n")
    (folder / "data").mkdir()
    (folder / "data/one.txt").write_text("1000")
    (folder / ".gitignore").write_text("data/\n__pycache__/\n")
    git(folder, "init")
    git(folder, "add", ".gitignore", "job.py")
    git(folder, "commit", "-m", "one")


def copies(job):
    return sorted(path.name for path in (job.path / "snapshots").glob("*") if path.suffix != ".json")


def test_code_is_edited_while_workers_run(tmp_path):
    job = Pool(tmp_path, plain(30), USES)
    repository(tmp_path)
    process = job.start("--pool.snapshot", "--pool.workers=1")
    until(lambda: len(job.calls()) > 2)
    (tmp_path / "job.py").write_text("def main(")
    (tmp_path / "late/inner.py").write_text("VALUE = 7")
    os.kill(job.workers(process.pid)[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert (code, job.array("x").tolist()) == (0, [1021.0] * 30), err
    (copy,) = copies(job)
    with Store.open(job.path) as store:
        record = store.run_of(3)
        assert record["snapshot"] == copy and record["file"] == str(job.path / "snapshots" / copy / "job.py")
        assert record["git_commit"] == git(tmp_path, "rev-parse", "HEAD") and record["git_dirty"] is False
        assert record["cwd"] == str(tmp_path)
    assert not (job.path / "snapshots" / copy / "data").exists()
    assert not list((job.path / "snapshots").glob(".*"))


@pytest.mark.slow
def test_a_row_is_run_again_on_the_code_that_made_it(tmp_path):
    job = Pool(tmp_path, plain(2), USES)
    repository(tmp_path)
    assert job.run("--pool.snapshot")[0] == 0
    (tmp_path / "job.py").write_text(USES.replace("VALUE = 1\n", "VALUE = 2\n"))
    again = ["--worker.index=1", "--worker.do_if_complete"]
    assert job.run(*again, argv=Job.argv(job, *again), module="datamodels.worker")[0] == 0
    assert job.array("x").tolist() == [1021.0, 1022.0]
    (copy,) = copies(job)
    again = [*again, f"--worker.snapshot={copy}"]
    assert job.run(*again, argv=Job.argv(job, *again), module="datamodels.worker")[0] == 0
    assert job.array("x").tolist() == [1021.0, 1021.0]
    show = job.run(argv=Job.argv(job, "--worker.dry_run", f"--worker.snapshot={copy}"), module="datamodels.worker")[1]
    assert f"main(index) in {job.path}/snapshots/{copy}/job.py" in show


@pytest.mark.parametrize("where", ["src", "elsewhere"])
def test_a_module_below_the_root(tmp_path, where):
    """The current folder is in the repository, or the Python path leads there."""
    source = "import deep.other\ndef main(): return {'x': deep.other.VALUE}"
    (tmp_path / "repository/src/deep").mkdir(parents=True)
    job = Pool(tmp_path / "repository/src", plain(2), source, "job")
    (job.folder / "deep/other.py").write_text("VALUE = 5")
    (job.folder / "job.py").rename(job.folder / "deep/job.py")
    git(tmp_path / "repository", "init")
    cwd = job.folder if where == "src" else tmp_path
    with subprocess.Popen(
        [os.sys.executable, "-m", "datamodels.pool", *job.argv("--pool.snapshot", main="deep.job")],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}" if where == "src" else f"{job.folder}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        code, _, err = finish(process)
    assert code == 0, err
    (copy,) = copies(job)
    with Store.open(job.path) as store:
        assert store.run_of(0)["file"] == str(job.path / f"snapshots/{copy}/src/deep/job.py")


def test_what_is_copied(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    code, store = tmp_path / "code", tmp_path / "code/runs/store"
    store.mkdir(parents=True)
    (store / "margins.npy").write_bytes(bytes(1000))
    for name in ("copied_job.py", "gone.py", "new ünd\nodd.txt", "sub/inner.py", "secret.env", "tool.sh"):
        (code / name).parent.mkdir(exist_ok=True)
        (code / name).write_text(name)
    (code / "tool.sh").chmod(0o755)
    (code / ".gitignore").write_text("*.env\n")
    (code / "inside").symlink_to("sub/inner.py")
    (tmp_path / "data").write_text("far")
    (code / "outside").symlink_to("../data")
    git(code, "init")
    git(code / "sub", "init")
    git(code, "add", "copied_job.py", "gone.py")
    (code / "gone.py").unlink()
    copy = snapshot.take(store, "copied_job")
    place = store / "snapshots" / copy
    found = sorted(str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir())
    assert found == [".gitignore", "copied_job.py", "inside", "new ünd\nodd.txt", "outside", "sub/inner.py", "tool.sh"]
    assert (place / "inside").readlink() == (code / "inside").readlink()
    assert (place / "outside").read_text() == "far" and os.access(place / "tool.sh", os.X_OK)
    assert snapshot.take(store, "copied_job") == copy and len(list((store / "snapshots").iterdir())) == 2
    (code / "secret.env").write_text("other")
    assert snapshot.take(store, "copied_job") == copy
    (code / "tool.sh").chmod(0o644)
    assert snapshot.take(store, "copied_job") != copy


def test_too_much_is_refused_with_its_names(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "big_job.py").write_text("")
    (tmp_path / "features").mkdir()
    with open(tmp_path / "features/train.npy", "wb") as file:
        file.truncate(150_000_000)
    git(tmp_path, "init")
    with pytest.raises(ConfigError, match=r"holds 150 MB .* more than 105: features \(150 MB\).*into .gitignore"):
        snapshot.take(tmp_path / "store", "big_job")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("lonely_job", "must be in a git repository, which says what is code"),
        ("nowhere.job", "there is no module 'nowhere.job' to copy"),
        ("lonely_job.part", "there is no module 'lonely_job.part' to copy"),
        ("time", "there is no module 'time' to copy"),
    ],
)
def test_a_module_that_cannot_be_copied(tmp_path, module, message):
    job = Pool(tmp_path, plain(1), "raise SystemExit('imported')", "lonely_job")
    code, out, err = job.run(argv=job.argv("--pool.snapshot", main=module))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_copy_that_is_not_there_and_one_that_was_edited(tmp_path):
    job = Pool(tmp_path, plain(1), USES)
    repository(tmp_path)
    assert job.run("--pool.snapshot")[0] == 0
    (copy,) = copies(job)
    worker = {"module": "datamodels.worker"}
    code, _, err = job.run(argv=Job.argv(job, "--worker.snapshot=feed"), **worker)
    assert code == 2 and f"snapshots has no 'feed'; it has: {copy}" in err
    (job.path / f"snapshots/{copy}/late/inner.py").write_text("VALUE = 11")
    code, _, err = job.run(argv=Job.argv(job, f"--worker.snapshot={copy}"), **worker)
    assert code == 2 and "was edited since it was made" in err
    (job.path / f"snapshots/{copy}/late/inner.py").unlink()
    assert job.run(argv=Job.argv(job, f"--worker.snapshot={copy}"), **worker)[0] == 2

"""A store and a module with a main(), in a folder of a test, and the ways to run them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from datamodels import cli, worker
from datamodels.store import Store

ROOT = Path(__file__).parent.parent

# Two blocks with masks of six examples and a grid, then an evaluation block without the second factor.
DESIGN = {
    "schema": {
        "masks": {"shape": [6], "dtype": "bits"},
        "width": {"shape": [], "dtype": "int32"},
        "x": {"shape": [3], "dtype": "float32"},
        "note": {"shape": [], "dtype": "U8", "required": False},
    },
    "design": [
        {
            "role": "train",
            "masks": 2,
            "seed": 1,
            "sampler": "bernoulli",
            "choices": {"width": [4, 8], "optimiser": ["sgd"]},
        },
        {"role": "eval", "masks": 1, "repeats": 2, "seed": 2, "choices": {"width": [4]}},
    ],
}


def plain(rows):
    return {"num_models": rows, "schema": {"x": {"shape": [], "dtype": "float64"}}}


class Job:
    def __init__(self, folder, spec, source, name="job"):
        self.folder, self.name = folder, name
        (folder / f"{name}.py").write_text(source)
        self.path = folder / "store"
        Store.create(self.path, spec, sync=False).close()

    def argv(self, *more, main=None):
        return [
            f"--worker.logdir={self.path}",
            f"--worker.main_import={main or self.name}",
            "--worker.sync=false",
            *map(str, more),
        ]

    def here(self, *more, monkeypatch, main=None):
        """Exit code of the worker, run in this process; for a module whose name no other test uses."""
        monkeypatch.syspath_prepend(str(self.folder))
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(sys, "argv", ["worker.py"])
        try:
            cli.run(lambda: worker.main(self.argv(*more, main=main)))
        except SystemExit as end:
            return end.code

    def start(self, *more, module="datamodels.worker", argv=None, **options):
        env = {**os.environ, "PYTHONPATH": f"{self.folder}:{ROOT}", **options.pop("env", {})}
        return subprocess.Popen(
            [sys.executable, "-m", module, *(self.argv(*more) if argv is None else argv)],
            cwd=self.folder,
            env=env,
            text=True,
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def run(self, *more, timeout=60, **options):
        """(exit code, standard output, standard error) of a worker of its own."""
        return finish(self.start(*more, **options), timeout)

    # ------------------------------------------------ what the folder holds, by plain numpy

    def array(self, key):
        return np.load(self.path / f"{key}.npy")

    @property
    def completed(self):
        return self.array("_completed").tolist()

    @property
    def attempts(self):
        return self.array("_rows")["attempts"].tolist()

    def traceback(self, row, attempt=1):
        return json.loads((self.path / f"workers/{row}/attempt-{attempt}.json").read_text())["traceback"]

    def files(self):
        """Every file and folder below the store, with its bytes."""
        return {
            str(path.relative_to(self.path)): path.read_bytes() if path.is_file() else None
            for path in self.path.rglob("*")
        }

    def calls(self):
        """Lines that main appended to the file `calls`."""
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []


CALLED = """
import os
def called(index):
    fd = os.open("calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{index}\\n".encode())
    os.close(fd)
"""


def finish(process, timeout=60):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def until(condition, seconds=30):
    """Wait for a condition; its last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert value, "it did not happen in time"
    return value


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False

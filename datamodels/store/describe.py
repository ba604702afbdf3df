"""What a process says of itself in its run's record: which code, which versions, which device."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import datamodels


def code(file: Path | None = None) -> dict[str, Any]:
    """The file, the git commit of the checkout that it is in, by default the current one, and whether the code differs.

    It differs when a file that git knows has changed, or when git does not know this one. No commit outside a checkout.
    """
    folder = None if file is None else file.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found: dict[str, Any] = {} if file is None else {"file": str(file)}
    if (commit := git("rev-parse", "HEAD")) is not None:
        changed = git("status", "--porcelain", "--untracked-files=no") != ""
        unknown = file is not None and git("ls-files", "--error-unmatch", "--", str(file)) is None
        found |= {"git_commit": commit, "git_dirty": changed or unknown}
    return found


def software() -> dict[str, Any]:
    """Versions of what is loaded of Python, datamodels, numpy and torch, and the CUDA device, where torch uses one."""
    versions = {"python": sys.version.split()[0], "datamodels": datamodels.__version__}
    for name in ("numpy", "torch"):
        if (version := getattr(sys.modules.get(name), "__version__", None)) is not None:
            versions[name] = str(version)
    found: dict[str, Any] = {"versions": versions}
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    with contextlib.suppress(Exception):  # half imported, or a device that has failed: a row does not fail for this
        if cuda is not None and cuda.is_initialized():
            device = cuda.current_device()
            found["cuda"] = f"{device}: {cuda.get_device_name(device)}"
    return found

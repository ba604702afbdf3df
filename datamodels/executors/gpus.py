"""Which GPUs this machine has, and which of them each worker sees; without torch, which takes seconds and memory."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from datamodels.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"
_PROC = Path("/proc/driver/nvidia/gpus")


def devices(wanted: str, environ: Mapping[str, str]) -> list[str]:
    """The GPUs that workers are to have: "auto" for all that `environ` lets us see, or their names, "0,1".

    Raises `ConfigError` where there is none, or for one that CUDA_VISIBLE_DEVICES hides.
    """
    allowed = None if VARIABLE not in environ else _names(environ[VARIABLE].partition("-1")[0])
    if wanted == "auto":
        found = _count() if allowed is None else allowed
        if not found:
            looked = "nvidia-smi and /proc know of none" if allowed is None else f"{VARIABLE} hides all"
            raise ConfigError(f"--pool.gpus=auto: there is no GPU here: {looked}; leave the option out to use the CPU")
        return found
    named = _names(wanted)
    hidden = [name for name in named if allowed is not None and name not in allowed]
    if not named or len(set(named)) < len(named) or hidden:
        what = f"got {wanted!r}" if not hidden else f"{VARIABLE}={environ[VARIABLE]} hides {', '.join(hidden)}"
        raise ConfigError(f"--pool.gpus: expected auto, or each GPU once as in 0,1; {what}")
    return named


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _count() -> list[str]:
    """Every GPU of this machine by its index, and by its UUID each part of one that is divided (MIG)."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return [str(number) for number in range(len(os.listdir(_PROC)) if _PROC.is_dir() else 0)]
    found: list[list[str]] = []
    for line in listed:
        if gpu := re.match(r"GPU (\d+):", line):
            found.append([gpu[1]])
        elif part := re.search(r"UUID: (MIG-[^)]+)\)", line):
            found[-1].append(part[1])
    return [name for gpu in found for name in (gpu[1:] or gpu)]


def capacity(gpus: int, each: float) -> int:
    """How many workers have a place on so many GPUs with `each` of one, or of several."""
    return int(gpus // each) if each >= 1 else gpus * int(1 / each + 1e-9)


def shares(names: Sequence[str], workers: int, each: float) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker; several workers are on one GPU only where `each` is a half or less.

    Raises `ConfigError` where that is more than there are.
    """
    if each > 1 and each != int(each):
        raise ConfigError(f"--pool.gpus_per_worker: expected a whole number of GPUs, or a part of one, got {each:g}")
    places = capacity(len(names), each)
    if workers > places:
        part = f"; --pool.gpus_per_worker={len(names) / workers:.2g} lets them share" if len(names) < workers else ""
        raise ConfigError(
            f"--pool.workers: {workers} workers with {each:g} GPU{'s' * (each != 1)} each do not fit the "
            f"{len(names)} there {'is' if len(names) == 1 else 'are'} ({', '.join(names)}): {places} do{part}"
        )
    if each < 1:
        return [names[number % len(names)] for number in range(workers)]
    step = int(each)
    return [",".join(names[number * step : (number + 1) * step]) for number in range(workers)]

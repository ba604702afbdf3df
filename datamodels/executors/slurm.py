"""Workers as the tasks of a SLURM job array.

SLURM is asked which tasks live and how they ended (`squeue`, which needs no accounting); how far the rows are is asked
of the store alone. The tasks need nobody: if the pool goes away they work on, and SLURM requeues those whose node
failed. What the pool adds is that a task whose worker died, or whose time was up, is submitted again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodels.errors import ConfigError, DatamodelsError
from datamodels.executors.base import Executor, Exit

TEMPLATE = """#!/bin/bash
trap '' USR1  # until the worker listens to it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}}"
export PYTHONUNBUFFERED=1
exec %s -m datamodels.worker "$@"
"""
_WARNING = 120  # seconds before the time limit at which a worker is told
_STOP_SECONDS = 60.0  # SLURM itself kills what does not listen after KillWait, 30 s by default
_QUICK, _PATIENCE = 1.0, 15.0  # seconds between two questions; the second is where it ends when nothing happens
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Resources:
    """What each task of the array is given; None leaves it to the cluster, or to the template."""

    partition: str | None = None
    time: str | None = None
    nodes: int | None = None
    gpus: str | None = None
    cpus: int | None = None
    memory: str | None = None
    account: str | None = None
    job_name: str | None = None
    extra: str | None = None

    def directives(self) -> list[str]:
        """The options of sbatch that say so."""
        named = {
            "partition": self.partition,
            "time": self.time,
            "nodes": self.nodes,
            "gres": None if self.gpus is None else f"gpu:{self.gpus}",
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "account": self.account,
            "job-name": self.job_name,
        }
        try:
            extra = shlex.split(self.extra or "")
        except ValueError as error:
            raise ConfigError(f"--pool.slurm.extra: {error}; got {self.extra!r}") from None
        for word in extra:
            if not word.startswith("-"):
                raise ConfigError(f"--pool.slurm.extra: expected options as in --qos=high, with =, got {word!r}")
        return [f"--{name}={value}" for name, value in named.items() if value is not None] + extra


def script(
    arguments: Sequence[str], workers: int, logs: Path, resources: Resources, template: str | None = None
) -> str:
    """The batch script: SLURM's options, then what `template` does with the worker's `arguments`, its `"$@"`.

    What `resources` say counts more than the template's own #SBATCH lines. `ConfigError` for a template that is no
    script, or that does nothing with its arguments.
    """
    text = TEMPLATE % shlex.quote(sys.executable) if template is None else template
    if not text.startswith("#!"):
        raise ConfigError("--pool.template: expected a batch script, its first line as in #!/bin/bash")
    if '"$@"' not in text:
        raise ConfigError(
            '--pool.template: expected a script that ends in exec python -m datamodels.worker "$@"; it has no "$@"'
        )
    lines = text.splitlines()
    body = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    options = [
        f"--array=0-{workers - 1}",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{_WARNING}",
        f"--chdir={os.getcwd()}",
        f"--output={str(logs.resolve()).replace('%', '%%')}/worker-%a.log",
        *resources.directives(),
    ]
    for option in options:
        if "\n" in option:
            raise ConfigError(f"--pool.slurm: an option of sbatch is one line, got {option!r}")
    name = [] if resources.job_name else ["#SBATCH --job-name=datamodels"]
    mine = [f"#SBATCH {shlex.quote(option)}" for option in options]
    call = f"set -- {shlex.join(arguments)}"
    return "\n".join([lines[0], *name, *lines[1:body], *mine, call, *lines[body:]]) + "\n"


@dataclass
class _Task:
    """A task of an array, from the moment when it is submitted."""

    job: str  # "123_4"
    log_begin: int
    since: float
    running: bool = False


class SlurmExecutor(Executor):
    """Submits `script` as an array; copy i is its task i, and a copy started again is an array of one."""

    def __init__(self, text: str, logs: Path):
        super().__init__(logs)
        self.script = logs / "slurm.sh"
        self.script.write_text(text)
        self._tasks: dict[int, _Task] = {}
        self._submitted = False
        self._ended: list[Exit] = []
        self._again: list[int] = []  # copies to be started again, which SLURM did not take the last time
        self._next, self._interval, self._slowest = 0.0, _QUICK, _PATIENCE

    def start(self, numbers: Sequence[int]) -> None:
        """Submit these copies. `ConfigError` where SLURM refuses the first ones; it is asked again for later ones."""
        try:
            job = sbatch(self.script, numbers)
        except ConfigError:
            if not self._submitted:
                raise
            self._again += numbers
            return
        self._submitted = True
        for number in numbers:
            self._tasks[number] = _Task(f"{job}_{number}", self.printed(number), time.monotonic())
        self._next, self._interval = 0.0, _QUICK

    def hello(self) -> str:
        return (
            f"job {' '.join(self.jobs)} of SLURM has the workers, and what they print is in {self.logs}; Ctrl-C here "
            f"cancels them, while a terminal that is closed leaves them at work"
        )

    @property
    def jobs(self) -> list[str]:
        """Numbers of the arrays whose tasks have not all ended."""
        return sorted({task.job.partition("_")[0] for task in self._tasks.values()}, key=int)

    def running(self) -> int:
        return sum(task.running for task in self._tasks.values())

    def waiting(self) -> int:
        return len(self._tasks) - self.running() + len(self._again)

    def withdraw(self) -> None:
        if self._slowest == _QUICK:
            return
        self._again.clear()
        if self.waiting():
            self._cancel("--state=PENDING")
        self._next, self._interval, self._slowest = 0.0, _QUICK, _QUICK

    def ended(self) -> list[Exit]:
        if (self._tasks or self._again) and time.monotonic() >= self._next:
            self._interval = _QUICK if self._look() else min(self._slowest, 1.2 * self._interval)
            self._next = time.monotonic() + self._interval
            again, self._again = self._again, []
            for number in again:
                self.start([number])
        found, self._ended = self._ended, []
        return found

    def _look(self) -> bool:
        """Ask SLURM; whether anything has changed."""
        seen = _squeue(self.jobs) if self._tasks else {}
        if seen is None:
            return False
        changed = False
        for number, task in list(self._tasks.items()):
            state, status = seen.get(task.job, ("", 0))
            if state and state not in _ENDED:
                running = state != "PENDING"
                if running != task.running:
                    task.running, task.since, changed = running, time.monotonic(), True
                continue
            changed = True
            del self._tasks[number]
            code = -(status & 127) if status & 127 else status >> 8
            said = "" if state in ("COMPLETED", "FAILED") else state or "a job that SLURM no longer knows"
            seconds = time.monotonic() - task.since if task.running else 0.0
            self._ended.append(
                Exit(
                    number,
                    code,
                    seconds,
                    self.words(number, task.log_begin),
                    str(self.log(number)),
                    said,
                    wanted=state == "CANCELLED",
                )
            )
        return changed

    def stop(self, seconds: float) -> int:
        self._again.clear()
        if not self._tasks:
            return 0
        self._cancel()
        deadline = time.monotonic() + max(seconds, _STOP_SECONDS)
        while self._tasks and time.monotonic() < deadline:
            self._look()
            time.sleep(0.2)
        if self._tasks:
            jobs = " ".join(self.jobs)
            print(
                f"SLURM does not say that they have ended; look with squeue, end them with scancel {jobs}",
                file=sys.stderr,
            )
        killed = sum(end.code == -9 for end in self._ended) + len(self._tasks)
        self._tasks.clear()
        self._ended.clear()
        return killed

    def close(self) -> None:
        """Nothing: SLURM has the tasks, and they need no pool."""

    def _cancel(self, *options: str) -> None:
        _ask("scancel", "--quiet", *options, *self.jobs)


def sbatch(path: Path, numbers: Sequence[int]) -> str:
    """Submit a script as the array of these task numbers; the job's number. `ConfigError` with what SLURM says."""
    array = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    done = _ask("sbatch", "--parsable", f"--array={array}", str(path))
    if done.returncode != 0:
        raise ConfigError(f"sbatch {path}: {' '.join(done.stderr.replace('sbatch: error: ', '').split())}")
    return done.stdout.strip().partition(";")[0]  # behind it the cluster's name


def _squeue(jobs: Sequence[str]) -> dict[str, tuple[str, int]] | None:
    """{"job_task": (state, wait status)} of all tasks that SLURM knows of these jobs; None where it does not answer."""
    fields = "ArrayJobID:24,ArrayTaskID:24,State:24,exit_code:24"
    done = _ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={fields}")
    if done.returncode != 0:
        return {} if "Invalid job id" in done.stderr else None
    found = {}
    for line in done.stdout.splitlines():
        job, task, state, status = line.split()
        found[f"{job}_{task}"] = (state, int(status))
    return found


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise ConfigError(f"--pool.executor=slurm: there is no {command[0]} here; run it where SLURM's commands are")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within two minutes")
    except OSError as error:
        raise DatamodelsError(f"{command[0]}: {error}") from error

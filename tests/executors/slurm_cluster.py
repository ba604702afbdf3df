"""A real SLURM cluster of two nodes, n0 and n1, on this host: Debian's daemons, in a folder of their own, as root.

slurmd would say `n0` to SLURM while its jobs see the machine's own name: both nodes are one host to the store.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.jobs import until

CONFIG = """
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=10000,sched_interval=1,bf_interval=1
SlurmdTimeout=10
KillWait=5
MessageTimeout=4
ReturnToService=2
JobRequeue=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
MailProg=/bin/true
NodeName=n0 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=work Nodes=n[0-1] Default=YES MaxTime=60 State=UP
"""
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """Use as a context; `environment` is what SLURM's commands need."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 letters
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons = {}

    def __enter__(self):
        try:
            host = socket.gethostname().partition(".")[0]
            text = CONFIG.format(host=host, folder=self.folder, ports=free_ports(3))
            (self.folder / "slurm.conf").write_text(text)
            (self.folder / "state").mkdir()
            key = self.folder / "munge.key"
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
            files = {"key-file": key, "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
            self.start(
                "munged",
                "--foreground",
                "--force",
                f"--socket={self.folder}/munge.socket",
                *(f"--{option}={self.folder / name}" for option, name in files.items()),
            )
            until(lambda: (self.folder / "munge.socket").exists())
            self.start_controller()
            for node in ("n0", "n1"):
                self.start_node(node)
            until(lambda: self.nodes() == {"n0": "idle", "n1": "idle"})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            until(lambda: not self.jobs(), 10)
        for process in reversed(self._daemons.values()):
            process.kill() if process.args[0] == "munged" else process.terminate()
        for process in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------ daemons

    def start(self, name, *argv):
        with open(self.folder / f"{name}{len(self._daemons)}.out", "wb") as out:
            self._daemons[" ".join((name, *argv))] = subprocess.Popen(
                [shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin"), *argv],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_controller(self):
        self.start("slurmctld", "-D")

    def stop_controller(self):
        process = self._daemons.pop("slurmctld -D")
        process.terminate()
        process.wait()

    def start_node(self, node):
        self.start("slurmd", "-D", "-N", node)

    def kill_node(self, node):
        """kill -9 of its slurmd; what it started lives on."""
        process = self._daemons.pop(f"slurmd -D -N {node}")
        process.kill()
        process.wait()

    # ------------------------------------------------------------------ questions

    def run(self, *argv):
        done = subprocess.run(
            argv, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def nodes(self):
        try:
            lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        except AssertionError:  # not up yet
            return {}
        return dict(line.split() for line in lines)

    def jobs(self, states="PENDING,RUNNING,COMPLETING,SUSPENDED"):
        """{"job_task": (state, node)}"""
        lines = self.run("squeue", "--noheader", "--array", f"--states={states}", "--format=%i|%T|%N").splitlines()
        return {job: (state, node) for job, state, node in (line.strip().split("|") for line in lines)}

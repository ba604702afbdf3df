"""A real Ray cluster of three nodes on this host, in a process of its own: Ray's warnings are not ours."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster()
small = {'object_store_memory': 80 << 20}
def node(**more):
    return cluster.add_node(**more, **small).all_processes['raylet'][0].process.pid
def say(what):
    print(json.dumps(what), flush=True)
node(num_cpus=0, include_dashboard=False)
say([cluster.address, [node(num_cpus=2, num_gpus=1) for _ in range(2)]])
for line in sys.stdin:
    nodes = cluster.global_state.node_table()
    say(node(num_cpus=2, num_gpus=1) if line.strip() == 'add' else sum(row['Alive'] for row in nodes))
cluster.shutdown()
"""


class Cluster:
    """A head without cores and two nodes with two cores and a GPU each, which is only said to be there."""

    def __init__(self):
        quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CLUSTER],
            env={**os.environ, **quick, "RAY_health_check_timeout_ms": "1000"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address, self.raylets = json.loads(self.process.stdout.readline())

    def ask(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self, pid, *, whole=False):
        """kill -9 of the raylet that a worker descends from; the processes that it had started.

        `whole`: of all of them in one moment, as when a node loses power; nobody has time to give a row back.
        """
        while pid not in self.raylets:
            pid = parent(pid)
        below = descendants(pid)
        killed = [*below, pid] if whole else [pid]
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            for process in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal_number)
        self.raylets.remove(pid)
        return below

    def heal(self):
        self.raylets.append(self.ask("add"))

    def close(self):
        self.process.communicate(timeout=60)


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid):
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]

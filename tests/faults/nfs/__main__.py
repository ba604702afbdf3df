"""Two hosts on NFS, for real: `make test-nfs`, or `python -m tests.faults.nfs [--cache DIR] [--versions 3 4.2]`.

Boots a server and two clients, tries what DESIGN promises of network file systems, by NFS 3 and 4.2, and prints a
table. Exit 1 where a row was lost, a claim had two winners or a mutant went unnoticed; 2 where it cannot run here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.nfs.guests import EXPORT, LEASE, ROOT, STORE, Guest, Lab, Missing, accelerator, image, lab, needs

TIME_TO_LIVE = 12.0
Finding = tuple[str, str, str, bool]  # version, experiment, what was seen, whether it is right
MUTANTS = ("plain", "mmap")


class Bench:
    """The lab, and what was found so far."""

    def __init__(self, lab: Lab, scale: float, found: list[Finding]):
        self.lab, self.scale, self.found = lab, scale, found
        self.one, self.two = lab.clients
        self.server = lab.server
        self._stores = itertools.count()

    def say(self, experiment: str, seen: str, right: bool) -> None:
        self.found.append((self.lab.version, experiment, seen, right))
        print(f"NFS {self.lab.version:4} {'ok  ' if right else 'FAIL'} {experiment}: {seen}", flush=True)

    def rows(self, number: int) -> int:
        return max(8, int(number * self.scale))

    def call(self, verb: str, **arguments: Any) -> str:
        return f"cd /project && exec python3 -m tests.faults.nfs.in_guest {verb} '{json.dumps(arguments)}'"

    def ask(self, guest: Guest, verb: str, **arguments: Any) -> Any:
        return json.loads(guest.run(self.call(verb, **arguments), 1200))

    def later(self, guest: Guest, verb: str, **arguments: Any) -> Callable[[], Any]:
        """Start a verb; what is returned waits for its result."""
        call = guest.start(self.call(verb, **arguments))
        return lambda: json.loads(guest.result(call, 1200))

    def both(self, verb: str, **arguments: Any) -> list[Any]:
        """A verb on both clients at once; `me` is 0 and 1, and `host` the server as each sees it."""
        waits = []
        for i, client in enumerate(self.lab.clients):
            mine = {k: v % (i + 1) if k == "host" else v for k, v in arguments.items()}
            waits.append(self.later(client, verb, me=i, **mine))
        return [wait() for wait in waits]

    def store(self, rows: int, wide: bool = False) -> str:
        """Name of a new store."""
        name = f"{self.lab.version}-{next(self._stores)}"
        self.ask(self.one, "create", path=f"{STORE}/{name}", rows=rows, wide=wide)
        return name

    def check(self, name: str, done: list[int], wide: bool = False) -> tuple[int, int]:
        """(rows lost, problems of `verify`), the most of what both clients and the server's own disk show."""
        seen = []
        for guest, root in ((self.server, EXPORT), (self.one, STORE), (self.two, STORE)):
            seen.append(self.ask(guest, "check", path=f"{root}/{name}", done=done, wide=wide))
        return max(len(s["lost"]) for s in seen), max(len(s["problems"]) for s in seen)

    def until(self, guest: Guest, path: str, seconds: float = 120) -> None:
        """Wait for a file in a guest."""
        guest.run(
            f"for i in $(seq {int(seconds * 10)}); do [ -e {path} ] && exit; sleep .1; done; exit 1", seconds + 60
        )


# ------------------------------------------------------------------ the experiments


def writers(bench: Bench) -> None:
    """Two writers on alternating rows, after reads of the same pages; our write path, then the mutants."""
    for what, rows, batch, wide in (
        ("rows one by one", 500, 1, False),
        ("in eights", 2000, 8, False),
        ("70 KB", 100, 4, True),
    ):
        name = bench.store(rows := bench.rows(rows), wide)
        out = bench.both("write", path=f"{STORE}/{name}", rows=rows, batch=batch, wide=wide)
        done = [row for o in out for row in o["done"]]
        lost, problems = bench.check(name, done, wide)
        rate = len(done) / max(o["seconds"] for o in out)
        errors = [error for o in out for error in o["errors"]]
        bench.say(
            f"two writers, {what}",
            f"{len(done)} of {rows} rows committed ({rate:.0f}/s), {lost} lost, {problems} problems {errors[:1] or ''}",
            len(done) == rows and not lost and not problems,
        )
    for mutant in MUTANTS:
        name = bench.store(rows := bench.rows(400))
        out = bench.both("write", path=f"{STORE}/{name}", rows=rows, disk=mutant)
        done = [row for o in out for row in o["done"]]
        lost, _ = bench.check(name, done)
        bench.say(f"mutant {mutant}", f"{lost} of {len(done)} rows lost ({100 * lost / len(done):.0f} %)", lost > 0)


def looks(bench: Bench) -> None:
    """What one client has committed, the other sees, though it has the same files open to write."""
    for disk in ("ours", "cached"):
        name = bench.store(rows := bench.rows(50))
        out = bench.both("look", path=f"{STORE}/{name}", rows=rows, host="10.0.%d.1", disk=disk)
        unseen, after = (sum(o[what] for o in out) for what in ("unseen", "after"))
        bench.say(
            "what the other did is seen" if disk == "ours" else f"mutant {disk}",
            f"{4 * rows} looks, {unseen} found rows missing; plain numpy misses {after} of {2 * rows} afterwards",
            unseen > 0 if disk == "cached" else not (unseen or after),
        )


def races(bench: Bench) -> None:
    """Both clients take each row at the same moment."""
    rows = bench.rows(1500)
    name = bench.store(rows)
    waits = [
        bench.later(client, "race", path=f"{STORE}/{name}", host=f"10.0.{i}.1", rows=rows)
        for i, client in enumerate(bench.lab.clients, 1)
    ]
    won = [set(wait()["won"]) for wait in waits]
    both, none = len(won[0] & won[1]), rows - 1 - len(won[0] | won[1])
    bench.say(
        "races for one row",
        f"{rows - 1} races, won {len(won[0])} : {len(won[1])}, {both} twice, {none} never",
        not (both or none),
    )


def cycles(bench: Bench) -> None:
    """Two processes per client take and give back four rows: undisturbed and killed, then on a network that loses."""
    for fault in ("kill -9", "5 % of packets lost, connections cut"):
        lossy = fault != "kill -9"
        name = bench.store(4)
        seconds = 60 * min(1.0, bench.scale)
        before = bench.ask(bench.one, "report", host="10.0.1.1")
        cycle = {"path": f"{STORE}/{name}", "seconds": seconds, "time_to_live": 120.0 if lossy else TIME_TO_LIVE}
        with disturbed(bench, lossy):
            waits = [
                (client, client.start(bench.call("cycle", host=f"10.0.{i}.1", **cycle)))
                for i, client in enumerate(bench.lab.clients, 1)
                for _ in range(2)
            ]
            killed = 0
            if not lossy:
                end = time.monotonic() + seconds / 2
                while time.monotonic() < end:
                    time.sleep(seconds / 12)
                    client, i = (bench.one, 1) if killed % 2 else (bench.two, 2)
                    client.signal(next(call for at, call in waits if at is client and not call.done()), signal.SIGKILL)
                    killed += 1
                    waits.append((client, client.start(bench.call("cycle", host=f"10.0.{i}.1", **cycle))))
            ended = [call.result(600) for _, call in waits]
        after = bench.ask(bench.one, "report", host="10.0.1.1")
        conflicts = after["conflicts"][len(before["conflicts"]) :]
        died = [end["err"][-300:] for end in ended if end["rc"] not in (0, -9, 137)]
        bench.say(
            f"claims, {fault}",
            f"{after['entries'] - before['entries']} times held, {killed} processes killed, "
            f"{len(conflicts)} times by two {conflicts[:1] or ''}{died[:1] or ''}",
            not conflicts and not died,
        )


@contextmanager
def disturbed(bench: Bench, lossy: bool) -> Iterator[None]:
    """A network that loses packets, and whose connections the server ends again and again."""
    if not lossy:
        yield
        return
    cables = [(bench.one, "eth0"), (bench.two, "eth0"), (bench.server, "eth0"), (bench.server, "eth1")]
    over = threading.Event()

    def cut() -> None:
        while not over.wait(1):
            bench.server.run("ss -K state established sport = :2049 >/dev/null; true")

    for guest, cable in cables:
        guest.run(f"tc qdisc add dev {cable} root netem delay 1ms 1ms loss 5%")
    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        yield
    finally:
        over.set()
        cutter.join()
        for guest, cable in cables:
            guest.run(f"tc qdisc del dev {cable} root")


def takeovers(bench: Bench) -> None:
    """One client claims a row and is gone, or stands still, between claim and commit or within the commit."""
    for how in ("kill", "pause", "stop"):
        takeover(bench, "main", how)
        takeover(bench, "commit", how)
    for how in ("pause", "stop"):
        takeover(bench, "main", how, late=True)


def takeover(bench: Bench, at: str, how: str, *, late: bool = False) -> None:
    """how: kill is a power cut of the client; pause stands its machine still, clocks and all; stop its process alone.

    late: the other commits only after the first has woken and tried.
    """
    name = bench.store(4)
    spot, one, two = f"/tmp/{name}", bench.one, bench.two
    row: dict[str, Any] = {"path": f"{STORE}/{name}", "row": 1, "time_to_live": TIME_TO_LIVE, "folder": spot}
    holds = one.start(bench.call("hold", at=at, salt=1, **row))
    bench.until(one, f"{spot}/ready")
    takes = two.start(bench.call("await", salt=2, patience=10 * TIME_TO_LIVE, pause=late, **row))
    bench.until(two, f"{spot}/looking")
    start = time.monotonic()
    if how == "kill":
        one.kill()
    elif how == "pause":
        one.monitor("stop")
    else:
        one.signal(holds, signal.SIGSTOP)
    if late:
        bench.until(two, f"{spot}/took")
    else:
        two.result(takes)
    seconds = time.monotonic() - start
    first = {"outcome": "killed", "writes": 0}
    if how == "kill":
        bench.lab.again(one)
    else:
        if how == "pause":
            one.monitor("cont")
        else:
            one.signal(holds, signal.SIGCONT)
        one.run(f"touch {spot}/go")
        first = json.loads(one.result(holds))
    two.run(f"touch {spot}/go")
    second = json.loads(two.result(takes))
    seen = bench.ask(bench.server, "found", path=f"{EXPORT}/{name}", row=1, salts=[1, 2])
    committed = [salt for salt, got in ((1, first), (2, second)) if got["outcome"] == "committed"]
    clean = seen["complete"] and not seen["problems"] and seen["holds"] == committed
    if how == "kill" or at == "main":
        right = clean and committed == [2] and not first["writes"]
    else:  # what was past its check when it was stopped cannot be fenced; then verify has to find it
        right = clean or bool(seen["problems"])
    bench.say(
        f"{how} in {at}{', the other commits later' if late else ''}",
        f"the other after {seconds:.0f} s: {_short(second)}; the first: {_short(first)}, {first['writes']} writes; "
        f"the row is {f'that of {committed}' if clean else seen}",
        right,
    )


def _short(got: dict[str, Any]) -> str:
    return str(got["outcome"]).split(";")[0]


def workers(bench: Bench) -> None:
    """The real pool with two workers on each client, on one store to its end."""
    name = bench.store(rows := bench.rows(300))
    command = (
        f"rm -f /tmp/calls; cd /project && python3 -m datamodels.pool --worker.logdir={STORE}/{name} "
        "--worker.main_import=tests.faults.nfs.job --pool.workers=2"
    )
    start = time.monotonic()
    calls = [client.start(command) for client in bench.lab.clients]
    ends = [call.result(1200) for call in calls]
    seconds = time.monotonic() - start
    ran = [row for client in bench.lab.clients for row in client.run("cat /tmp/calls || true").split()]
    lost, problems = bench.check(name, list(range(rows)))
    again = len(ran) - len(set(ran))
    died = [end["err"][-500:] for end in ends if end["rc"]]
    bench.say(
        "two pools of two workers",
        f"{rows} rows in {seconds:.0f} s, {lost} lost, {problems} problems, {again} run twice {died[:1] or ''}",
        not (lost or problems or again or died),
    )


def reboot(bench: Bench) -> None:
    """The server's power goes while both clients commit: the same rows, each from its end."""
    name = bench.store(rows := bench.rows(600))
    waits = [
        bench.later(client, "write", path=f"{STORE}/{name}", me=i, rows=rows, contend=True)
        for i, client in enumerate(bench.lab.clients)
    ]
    resets = 0
    for pause in (12, 6):
        time.sleep(pause)
        bench.server.reset()
        bench.lab.serve()
        start_arbiter(bench)
        resets += 1
    out = [wait() for wait in waits]
    done = [set(o["done"]) for o in out]
    lost, problems = bench.check(name, sorted(done[0] | done[1]))
    strange = [e for o in out for e in o["errors"] if "already complete" not in e and "another worker" not in e]
    twice, never = len(done[0] & done[1]), rows - len(done[0] | done[1])
    bench.say(
        "reboots of the server",
        f"{resets} power cuts, {rows - never} of {rows} rows committed, {lost} lost, {twice} by both, "
        f"{problems} problems, longest wait {max(o['longest'] for o in out):.0f} s {strange[:1] or ''}",
        not (lost or problems or twice or never or strange),
    )


EXPERIMENTS = {f.__name__: f for f in (writers, looks, races, cycles, takeovers, workers, reboot)}


def start_arbiter(bench: Bench) -> None:
    bench.server.start(bench.call("arbiter"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".venv" / "nfs", help="where the guests' image is kept")
    parser.add_argument("--versions", nargs="+", default=["3", "4.2"], choices=["3", "4.0", "4.1", "4.2"])
    parser.add_argument("--only", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--scale", type=float, default=1.0, help="how many rows, relative to the usual")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    found: list[Finding] = []
    try:
        needs()
        image(args.cache)
        print(
            f"three guests, {accelerator()[1]}; leases of the server {LEASE} s, of the claims {TIME_TO_LIVE:g} s",
            flush=True,
        )
        for version in args.versions:
            with lab(args.cache, version) as made:
                bench = Bench(made, args.scale, found)
                start_arbiter(bench)
                for name in args.only:
                    try:
                        EXPERIMENTS[name](bench)
                    except (RuntimeError, TimeoutError) as error:
                        bench.say(name, f"did not run to its end: {type(error).__name__}: {error}", False)
    except Missing as error:
        print(f"make test-nfs cannot run here: {error}", file=sys.stderr)
        return 2
    wrong = [finding for finding in found if not finding[3]]
    print(f"\n{time.monotonic() - start:.0f} s; {len(found)} findings, {len(wrong)} wrong")
    for version, experiment, seen, right in found:
        print(f"{'ok  ' if right else 'FAIL'} NFS {version:4} {experiment:42} {seen}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

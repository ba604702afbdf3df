"""`python -m datamodels.pool`: keep workers running until no row of the store is left to do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import numpy as np

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError
from datamodels.executors import gpus, ray, slurm
from datamodels.executors.base import Executor
from datamodels.executors.local import LocalExecutor, cores
from datamodels.executors.share import Judge, Share
from datamodels.executors.watch import Watch, failures, lacking, undone
from datamodels.row_filter import select
from datamodels.running import snapshot
from datamodels.store import Store
from datamodels.store.claims import run_record
from datamodels.store.keys import opened
from datamodels.worker import GAVE_UP, MISCONFIGURED, POOL_VARIABLE
from datamodels.worker import SECTIONS as WORKER

_ONE_ROW = ("index", "do_if_complete", "dry_run", "smoke")  # options of the worker that make no sense for many
_NOT_HERE = dict.fromkeys(_ONE_ROW, "a pool runs all rows; use python -m datamodels.worker for one")
SECTIONS = {
    "pool": {
        "workers": Option(int, "copies of the worker; 0 means one per core, or per GPU", default=0, min=0),
        "executor": Option(str, "where the workers run", default="local", choices=("local", "slurm", "ray")),
        "rows": Option(list, "only rows like these: lr=0.1,depth>=3,backbone=vit_s|vit_b,0-99"),
        "gpus": Option(str, "GPUs to share out among workers: auto for all, or 0,1"),
        "gpus_per_worker": Option(float, "GPUs of each worker; 0.5: two workers share one", default=1.0, min=0.01),
        "template": Option(str, 'batch script of yours for SLURM, ending in: exec python -m datamodels.worker "$@"'),
        "snapshot": Option(bool, "copy the code first, so that it can be edited while workers run", default=False),
        "submit": Option(bool, "false: write SLURM's batch script and print where it is", default=True),
    },
    "pool.slurm": {
        "partition": Option(str, "where SLURM puts the workers"),
        "time": Option(str, "limit of each worker, as in 8:00:00; rows in hand are given back and go on in the next"),
        "nodes": Option(int, "nodes of each worker", min=1),
        "gpus": Option(str, "GPUs of each worker, as in 1 or a100:2"),
        "cpus": Option(int, "cores of each worker", min=1),
        "memory": Option(str, "memory of each worker, as in 16G"),
        "account": Option(str, "who pays"),
        "job_name": Option(str, "name in the queue"),
        "extra": Option(str, "more options of sbatch, as in '--qos=high --exclude=n1,n2'"),
    },
    "worker": {name: option for name, option in WORKER["worker"].items() if name not in _NOT_HERE},
}
_STOP_SECONDS = 4.0
_BARREN_LIMIT = 5


class Interrupted(BaseException):
    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_pool(
    share: Share, executor: Executor, workers: int, *, say: Callable[[str], None] = _say, progress: bool = True
) -> int:
    """Start `workers` copies, restart those that die, until no row is left; the exit code.

    0: every row is complete. 1: rows are left undone, `say` tells which. 2: the workers cannot be configured, or main
    says that it is not; a copy that cannot begin after others have, as when somebody edits the module, is left out.
    """

    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        for stop in before:  # once is enough: what follows takes seconds
            signal.signal(stop, signal.SIG_IGN)
        asked.append(number)
        raise Interrupted(number)

    watch = Watch(share, progress)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for stop in before:
            signal.signal(stop, interrupt)
        barren, judge, earlier = 0, Judge(share), _runs(share)
        executor.start(range(workers))
        if hello := executor.hello():
            watch.write(hello)
        while executor.running() or executor.waiting():
            if asked:  # Python drops what is raised while it is in a finaliser, or in a callback from C
                raise Interrupted(asked[0])
            time.sleep(0.2)
            ended = executor.ended()
            done = watch.look(executor.waiting(), now=bool(ended))
            if done == share.count:
                executor.withdraw()
            if why := judge.hopeless(executor.running() + len(ended)):
                _stop(executor, share)
                watch.close()
                say(f"stopped: {why}")
                return _report(share, say)
            for end in ended:
                if end.wanted or done == share.count or (end.code in (0, GAVE_UP) and not share.free()):
                    continue
                refused = end.code == MISCONFIGURED and _refused(share, earlier)
                if end.code == MISCONFIGURED and judge.begun() and not refused:
                    watch.write(
                        f"worker {end.number} cannot start any more, was a file changed? It is left out; start the "
                        f"pool again to have it back:\n{end.last_words()}"
                    )
                    continue
                if end.code == MISCONFIGURED:
                    _stop(executor, share)
                    watch.close()
                    say(end.last_words() if refused else end.words)
                    return MISCONFIGURED
                barren = 0 if judge.moved() else barren + 1
                if barren >= _BARREN_LIMIT:
                    _stop(executor, share)
                    watch.close()
                    say(
                        f"{barren} workers in a row died before any row was finished; the last one {end.cause()}:\n"
                        f"{end.last_words()}"
                    )
                    return _report(share, say)
                watch.write(f"worker {end.number} {end.cause()}; starting it again (it prints to {end.log})")
                executor.start([end.number])
        watch.close()
        return _report(share, say)
    except Interrupted as interrupted:
        watch.write("stopping the workers; rows in hand are given back")
        _stop(executor, share)
        watch.close()
        status = share.status(3)
        safe = f"stopped: {status.completed} of {status.num_models} rows{share.kind} are complete and safe"
        say("\n".join([f"{safe}; run the same command again to go on", *failures(status)]))
        return 128 + interrupted.number
    finally:
        executor.close()
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _runs(share: Share) -> set[str]:
    return {name.removesuffix(".json") for name in share.store.disk.list("runs") if name.endswith(".json")}


def _refused(share: Share, earlier: set[str]) -> bool:
    """Whether main itself has raised ConfigError: a worker enters the store's runs only once it begins with rows."""
    records = [run_record(share.store.path, run) for run in _runs(share) - earlier]
    return any(record is not None and record.get("exit") == MISCONFIGURED for record in records)


def _stop(executor: Executor, share: Share) -> None:
    """Stop every worker. What the pool itself had to kill says nothing against its rows, so they are uncounted."""
    held = share.store.held()  # not those of workers that died by themselves
    if executor.stop(_STOP_SECONDS):
        share.give_back(held)


def _report(share: Share, say: Callable[[str], None]) -> int:
    status = share.status(10)
    if status.completed == status.num_models:
        return 0
    say(undone(share, status))
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = cli.parse(
        "python -m datamodels.pool",
        "Run all rows of a store with several workers at once; what neither the "
        "pool nor the worker knows goes to main's own sections.",
        SECTIONS,
        argv,
        passthrough=True,
    )
    for key, where in args.unknown:
        _refuse(key, where)
    for name in _NOT_HERE:
        for variable in (f"worker.{name}", cli.environment_name(f"worker.{name}")):
            if variable in os.environ:
                _refuse(f"worker.{name}", f"environment variable {variable}")
    _refuse_other_engines(args)
    with opened(args["worker.logdir"], args["worker.keys"]) as store:
        share = Share(store, store.within(_rows(args, store)))
        if bool(share.completed().all()):
            print(_full(share))
            return 0
        if args["pool.snapshot"]:
            args.rest.append(f"--worker.snapshot={snapshot.take(store.path, args['worker.main_import'])}")
        logs = Path(store.path) / "runs" / f"pool-{os.getpid()}"
        engine: Callable[..., tuple[int, Executor | None]] = {"local": _local, "slurm": _slurm, "ray": _ray}[
            args["pool.executor"]
        ]
        workers, executor = engine(args, logs)
        if executor is None:
            return 0
        code = run_pool(share, executor, workers)
        if code == 0:
            print(_full(share))
        return code


def _rows(args: cli.Arguments, store: Store) -> np.ndarray | None:
    """Which rows are meant, by the pool's option or the worker's; None is all."""
    given = {key: args[key] for key in ("pool.rows", "worker.rows") if args.given(key)}
    masks = [select(store.design, words, where=f"--{key} ({args.where(key)})") for key, words in given.items()]
    if any(not np.array_equal(mask, masks[0]) for mask in masks):
        said = " and ".join(f"--{key}={','.join(words)}" for key, words in given.items())
        raise ConfigError(f"{said} are not the same rows; the pool passes its own on to the workers, so leave one out")
    return masks[0] if masks else None


def _full(share: Share) -> str:
    failed = share.failed_keys()
    return f"all {share.count} rows{share.kind} are complete{'; ' if failed else ''}{lacking(share, failed)}"


def _local(args: cli.Arguments, logs: Path) -> tuple[int, Executor]:
    workers, visible = args["pool.workers"] or cores(), []
    environment = {POOL_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    if args.given("pool.gpus"):
        names, each = gpus.devices(args["pool.gpus"], os.environ), args["pool.gpus_per_worker"]
        workers = args["pool.workers"] or max(1, gpus.capacity(len(names), each))
        visible = gpus.shares(names, workers, each)
        if gpus.VARIABLE not in os.environ:  # numbers are nvidia-smi's; CUDA's own order is the fastest first
            environment["CUDA_DEVICE_ORDER"] = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return workers, LocalExecutor(
        _command(args),
        workers=workers,
        logs=logs,
        environment=environment,
        gpus=visible,
    )


def _ray(args: cli.Arguments, logs: Path) -> tuple[int, Executor]:
    each = args["pool.gpus_per_worker"] if args.given("pool.gpus") else 0
    module = ray.connect()
    places = ray.places(module, each)
    if places == 0:
        kind = f"one core and {each:g} GPU{'s' * (each != 1)}" if each else "one core"
        raise ConfigError(f"--pool.executor=ray: the cluster has no place for a worker with {kind}")
    executor = ray.RayExecutor(module, _command(args), logs=logs, pool=POOL_VARIABLE, gpus_each=each)
    return args["pool.workers"] or places, executor


def _slurm(args: cli.Arguments, logs: Path) -> tuple[int, Executor | None]:
    """The executor, or None where the script was only to be written."""
    workers = args["pool.workers"]
    if workers == 0:
        raise ConfigError("--pool.workers: SLURM must be told how many; each is one task of an array")
    template = None
    if args.given("pool.template"):
        try:
            template = Path(args["pool.template"]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--pool.template ({args.where('pool.template')}): cannot be read: {error}") from None
    resources = slurm.Resources(**args.section("pool.slurm"))
    executor = slurm.SlurmExecutor(slurm.script(_for_worker(args), workers, logs, resources, template), logs)
    if args["pool.submit"]:
        return workers, executor
    print(executor.script)
    _say(f"written, not submitted; {workers} workers start with: sbatch {executor.script}")
    return workers, None


def _refuse(key: str, where: str) -> None:
    section, _, name = key.partition(".")
    if section == "worker" and name in _NOT_HERE:
        raise ConfigError(f"{key} ({where}): {_NOT_HERE[name]}")
    if section == "pool":
        known = [f"{name}.{option}" for name in ("pool", "pool.slurm") for option in SECTIONS[name]]
        raise ConfigError(cli.unknown_message(key, where, known))


def _refuse_other_engines(args: cli.Arguments) -> None:
    """Options of an engine that was not asked for; one file may hold those of several where the engine is named."""
    engine = args["pool.executor"]
    for key in ("pool.template", "pool.submit", *(f"pool.slurm.{name}" for name in SECTIONS["pool.slurm"])):
        if args.given(key) and not args.given("pool.executor"):
            raise ConfigError(f"--{key} ({args.where(key)}): is for SLURM; say --pool.executor=slurm (or local)")
    if engine == "slurm" and args.given("pool.gpus"):
        raise ConfigError("--pool.gpus: is for workers of this machine; SLURM gives its own: --pool.slurm.gpus=1")
    if engine == "ray" and args.get("pool.gpus", "auto") != "auto":
        raise ConfigError(
            "--pool.gpus: Ray chooses the GPUs; say auto, and how much of one with --pool.gpus_per_worker"
        )
    if args.given("pool.gpus_per_worker") and not args.given("pool.gpus"):
        raise ConfigError("--pool.gpus_per_worker: GPUs are shared out only with --pool.gpus=auto (or 0,1)")


def _command(args: cli.Arguments) -> list[str]:
    return [sys.executable, "-m", "datamodels.worker", *_for_worker(args)]


def _for_worker(args: cli.Arguments) -> list[str]:
    """The worker's command line: its own options as resolved here, then whatever the pool does not know."""
    options = [
        f"--worker.{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in args.section("worker").items()
        if args.given(f"worker.{name}") and value is not None
    ]
    if args.given("pool.rows") and not args.given("worker.rows"):
        options.append(f"--worker.rows={','.join(args['pool.rows'])}")
    return [*options, *args.rest]


if __name__ == "__main__":
    try:
        cli.run(main)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C must not change how it ends

"""`python -m datamodels.store VERB DIR …`: look after a store. `VERBS` is the list; another verb is one entry."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Arguments, Option, Verb
from datamodels.errors import ConfigError, RowError, json_mistake
from datamodels.measurements import library
from datamodels.spec import ROLES, Field
from datamodels.store import Failure, Store, screens
from datamodels.store.check import verify
from datamodels.store.claims import who
from datamodels.store.compact import compact
from datamodels.store.export import export
from datamodels.store.grow import Change, add_key, grow
from datamodels.store.merge import FAILURES, Merged, merge
from datamodels.store.repair import repair
from datamodels.store.reset import FAILED, failed_rows, parse_rows, reset
from datamodels.store.status import progress

DIR = ("dir", "the store")
VERIFY_HINT = "python -m datamodels.store repair DIR --dry_run says what can be done"
_NAMED = 5  # processes that are named one by one
RESERVE = Option(str, "reserve disk space now, where the file system can", default="auto", choices=("auto", "no"))
JSON = Option(bool, "print it as JSON", default=False)


def status(args: Arguments) -> int:
    path, failures, as_json = args.positional["dir"], args["store.failures"], args["store.json"]
    if args["store.watch"]:
        screens.watch(path, failures=failures, as_json=as_json, interval=args["store.interval"])
        return 0
    with Store.open(path) as store:
        state = progress(store, failures=failures)
    print(json.dumps(asdict(state), indent=1) if as_json else "\n".join(screens.lines(path, state)))
    return 0


def check(args: Arguments) -> int:
    with Store.open(args.positional["dir"]) as store:
        rows, total = _complete(store)
        started, found = time.monotonic(), []
        with _bar(total) as bar:
            for problem in verify(store, bar.update):
                found.append(problem)
                if not args["store.json"]:
                    print(problem)
        seconds = max(time.monotonic() - started, 1e-9)
        if args["store.json"]:
            facts = {"rows": rows, "bytes": total, "seconds": seconds, "problems": [asdict(p) for p in found]}
            print(json.dumps(facts, indent=1))
        else:
            print(
                f"{rows:,} complete rows, {total / 1e9:.3f} GB, {total / 1e9 / seconds:.2f} GB/s: "
                + (f"problems: {len(found)}; {VERIFY_HINT}" if found else "all as committed")
            )
        return 1 if found else 0


def _complete(store: Store) -> tuple[int, int]:
    """How many rows are complete, and the bytes of their values."""
    rows = int(store.completed().sum())
    return rows, rows * sum(field.nbytes for field in store.spec.schema.values())


def _bar(total: int) -> tqdm[NoReturn]:
    return tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


def mend(args: Arguments) -> int:
    dry = args["store.dry_run"]
    with Store.open(args.positional["dir"]) as store:
        repaired: set[int] = set()
        left: set[int] = set()
        with _bar(_complete(store)[1]) as bar:
            for step in repair(store, dry_run=dry, progress=bar.update):
                (repaired if step.done else left).add(step.row)
                print(step)
        rows = f"{len(repaired):,} row{'s' * (len(repaired) != 1)}"
        summary = f"{rows} would be repaired (--dry_run)" if dry else f"{rows} repaired"
        print((summary if repaired or left else "nothing to repair") + (f", {len(left):,} left" if left else ""))
        return 1 if left else 0


def clear(args: Arguments) -> int:
    words, keys = args["store.rows"], args["store.keys"] or []
    with Store.open(args.positional["dir"]) as store:
        try:
            rows = failed_rows(store, keys) if words == FAILED else parse_rows(words, store.num_models)
        except RowError as error:
            raise ConfigError(f"--rows ({args.where('store.rows')}): {error}") from None
        with tqdm(total=len(rows), unit="row", disable=not sys.stderr.isatty()) as bar:
            done = reset(store, rows, keys=keys, progress=bar.update)
        if keys:
            print(
                f"{', '.join(keys)} cleared of {done.rows:,} rows, which stay complete; {done.untouched:,} had nothing"
            )
        else:
            complete = f", {done.complete:,} of them complete until now" if done.complete else ""
            untouched = f"; {done.untouched:,} had never been run" if done.untouched else ""
            print(f"{done.rows:,} rows cleared, to be run again{complete}{untouched}")
        return 0


def join(args: Arguments) -> int:
    sources = args.positional["stores"]
    if not sources:
        raise ConfigError("stores (command line): expected the stores to merge, as in: merge A B --into C")
    with _row_bar() as bar:
        merged = merge(sources, args["store.into"], progress=partial(_show_rows, bar))
    return _say_copied(merged)


def pack(args: Arguments) -> int:
    with _row_bar() as bar:
        done = compact(args.positional["dir"], args["store.into"], progress=partial(_show_rows, bar))
    code = _say_copied(done.merged)
    smaller = f"{done.before:,} bytes before, {done.after:,} after ({done.before / done.after:.1f} times smaller)"
    print(f"{', '.join(done.keys)} packed: {smaller}")
    return code


def tabulate(args: Arguments) -> int:
    with Store.open(args.positional["dir"]) as store, _row_bar() as bar:
        done = export(
            store,
            args["store.table"],
            rows=args["store.rows"] or (),
            keys=args["store.keys"] or (),
            progress=partial(_show_rows, bar),
        )
    size = f"{done.nbytes:,} bytes in {done.seconds:.1f} s"
    print(f"{done.path}: {done.rows:,} rows, {len(done.columns):,} columns, {size}; every value as committed")
    if done.incomplete:
        print(f"  {done.incomplete:,} rows are not complete and not in it")
    for key, why in done.left_out.items():
        print(f"  {key} is not in it: {why}; name it in --keys to have it")
    return 0


def _row_bar() -> tqdm[NoReturn]:
    """A bar whose total is known later; what it showed at the end is said by the verb."""
    return tqdm(unit="row", leave=False, disable=not sys.stderr.isatty())


def _show_rows(bar: tqdm[NoReturn], rows: int, total: int) -> None:
    bar.total = total
    bar.update(rows - bar.n)


def _say_copied(merged: Merged) -> int:
    """Print what a merge did; exit code 1 where a row that is complete in a source is not in the target."""
    if merged.created:
        print(f"{merged.target}: a new store")
    for source in merged.sources:
        added = "".join(f", {key} added to {count:,} that were there" for key, count in source.keys.items() if count)
        size = f", {source.nbytes / 1e9:.3f} GB" if source.nbytes else ""
        print(f"{source.path}: {source.complete:,} rows complete, {source.copied:,} copied{added}{size}")
        for row, what in list(source.damaged.items())[:FAILURES]:
            print(f"  row {row} is damaged: {what}")
        _more(len(source.damaged) - FAILURES)
        for failure in source.failures:
            print(f"  row {failure.row} failed: {_tried(failure)}; left to be run")
        _more(source.failed - len(source.failures))
    if merged.busy:
        one = len(merged.busy) == 1
        print(f"{len(merged.busy):,} row{' is' if one else 's are'} being run in {merged.target}: {_few(merged.busy)}")
    done = f"{merged.completed:,} of {merged.num_models:,} rows complete"
    if merged.missing:
        again = "repaired, or no longer being run; until then keep the sources"
        print(
            f"{merged.target}: {done}; complete in a source and not here: {_few(merged.missing)} "
            f"({len(merged.missing):,}); merge again when they are {again}"
        )
        return 1
    gigabytes = sum(source.nbytes for source in merged.sources) / 1e9
    said = f"{merged.copied:,} copied ({gigabytes / merged.seconds:.2f} GB/s)" if gigabytes else "nothing to do"
    print(f"{merged.target}: {done}, {said}")
    return 0


def _tried(failure: Failure) -> str:
    times = f"{failure.attempts} attempt{'s' * (failure.attempts != 1)}"
    return f"{times}, {failure.error or 'no traceback'}"


def _more(count: int) -> None:
    if count > 0:
        print(f"  … and {count:,} more")


def _few(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (" …" if len(rows) > 10 else "")


def extend(args: Arguments) -> int:
    block = args["store.block"]
    if block is not None and block.lstrip().startswith("{"):
        try:
            block = json.loads(block)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--block ({args.where('store.block')}): {json_mistake(error)}") from None
    change = grow(
        args.positional["dir"], args["store.num_models"], block=block, reserve=args["store.reserve"] == "auto"
    )
    before, after = change.before.num_models, change.after.num_models
    what = ""
    if change.after.design is not None:
        entry = change.after.design[-1]
        what = f": block {len(change.after.design) - 1}, {entry['role']}, seed {entry['seed']}"
    print(f"{args.positional['dir']}: {before:,} rows before, {after:,} now{what}")
    _tell_living(args.positional["dir"], change, "go on with the rows that they know; start others for the new ones")
    return 0


def add(args: Arguments) -> int:
    name, path = args.positional["name"], args.positional["dir"]
    try:
        shape = tuple(int(n) for n in args["store.shape"] or ())
    except ValueError:
        raise ConfigError(
            f"--shape ({args.where('store.shape')}): expected ints, as in 2,9, got {','.join(args['store.shape'])!r}; "
            f"a scalar has none"
        ) from None
    field = Field(
        name,
        shape,
        args["store.dtype"],
        role=args["store.role"],
        required=False,
        allow_nonfinite=args["store.allow_nonfinite"],
    )
    change = add_key(path, field, reserve=args["store.reserve"] == "auto")
    size = (change.after.num_models or 0) * field.nbytes
    print(
        f"{path}: {name}.npy, {field.dtype} {[change.after.num_models, *shape]}, {size / 1e6:,.1f} MB; no row has it "
        f"yet"
    )
    print(f"python -m datamodels.worker --worker.keys={name}{_measuring(change, name)}")
    _tell_living(path, change, "do not know of it")
    return 0


def _measuring(change: Change, key: str) -> str:
    """The rest of the command that fills a key in: where a spec says what is measured, nobody else says how this is."""
    asked, rest = change.after.measurements, " … fills it in, of rows that are complete"
    if asked is None:
        return rest
    for entry in library.places(asked["names"], asked.get("on")) or ():
        prefix = library.place(entry)[0]
        if key.startswith(prefix):
            key = f"{key.removeprefix(prefix)}@{entry}"
            break
    option = shlex.quote(f"--measure.names={key}")
    return f" {option}{rest}; --measure.names is the measurement that makes it, where that has another name"


def _tell_living(path: str, change: Change, what: str) -> None:
    if change.living:
        count = len(change.living)
        print(f"{count} process{'es' * (count != 1)} at work {what}:")
        for run in change.living[:_NAMED]:
            print(f"  {who(Path(path), run)}")
        if count > _NAMED:
            print(f"  … and {count - _NAMED} more")


VERBS = {
    "status": Verb(
        "how far it is, how fast it gets on, and what failed",
        status,
        {
            "watch": Option(bool, "go on showing it until all rows are complete; Ctrl-C ends it", default=False),
            "interval": Option(float, "seconds between two looks of --watch: 2 on a terminal, 15 elsewhere", min=0.1),
            "failures": Option(int, "how many failed rows to list", default=20, min=0),
            "json": Option(bool, "print it as JSON; with --watch an object a line", default=False),
        },
        (DIR,),
    ),
    "verify": Verb(
        "hold every complete row against its checksums; exit code 1 where one differs", check, {"json": JSON}, (DIR,)
    ),
    "repair": Verb(
        "put right what verify finds, without inventing a value",
        mend,
        {"dry_run": Option(bool, "say what would be done, change nothing", default=False)},
        (DIR,),
        "A complete row with damaged values is cleared, so that it is run again. A flag or a record is put back where "
        "the checksums of all keys agree with their bytes. Only a damaged optional key is taken back alone. Rows that "
        "a worker holds are left as they are, and named; then the exit code is 1.",
    ),
    "reset": Verb(
        "clear rows, so that they are run again and their attempts count from 0",
        clear,
        {
            "rows": Option(str, "3,7-9, or the word failed: rows that failed, or in which --keys did", required=True),
            "keys": Option(list, "clear these optional keys alone; the rows stay complete"),
        },
        (DIR,),
        "A complete row is cleared only when its number is given. If a worker holds one of the rows, nothing is "
        "changed.",
    ),
    "grow": Verb(
        "add rows behind those there are",
        extend,
        {
            "num_models": Option(int, "how many rows the store is to have", min=1),
            "block": Option(str, "block to append to the design: a JSON file, or JSON that begins with {"),
            "reserve": RESERVE,
        },
        (DIR,),
        "No row changes, and no array is rewritten. Where the store has a design, --num_models alone appends a block "
        "like its train blocks, with a seed of its own. Workers may run meanwhile.",
    ),
    "add-key": Verb(
        "add an optional key, which complete rows can get afterwards",
        add,
        {
            "dtype": Option(str, "as in a spec: float32, bits, U16, …", required=True),
            "shape": Option(list, "the row's shape, as in 2,9; without it a scalar"),
            "role": Option(str, "what it is in a regression", choices=ROLES),
            "allow_nonfinite": Option(bool, "NaN and infinities are values, not mistakes", default=False),
            "reserve": RESERVE,
        },
        (DIR, ("name", "the key")),
        "Complete rows stay complete without it. python -m datamodels.worker --worker.keys=NAME … calls main for those "
        "that lack it and writes that key alone. Workers may run meanwhile.",
    ),
    "merge": Verb(
        "copy the complete rows of stores, filled on different machines, into one",
        join,
        {"into": Option(str, "the store that gets them; made where there is none", required=True)},
        (("stores...", "the stores to copy from"),),
        "Checks every row; copies what the target lacks, with its times, run and folder. Refuses, before anything is "
        "written, stores whose specs or rows disagree. Interrupted, it is run again.",
    ),
    "compact": Verb(
        "copy a store to a new one whose bool arrays are packed into bits",
        pack,
        {"into": Option(str, "the new store, or one that an interrupted compact has begun", required=True)},
        (DIR,),
        "Checks every row and copies those that are complete, with their times, runs and folders. Interrupted, it is "
        "run again. The store itself is not changed.",
    ),
    "export": Verb(
        "write the complete rows to a table, parquet or csv",
        tabulate,
        {
            "table": Option(str, "the file to write, .parquet or .csv", required=True),
            "rows": Option(list, "rows as in lr=0.1,depth>=3,backbone=vit_s|vit_b,0-99; all by default"),
            "keys": Option(list, "keys of the schema; by default all but masks and, in csv, long ones"),
        },
        (DIR,),
        "A line for each row: number, role, seed, factors, attempts, times, run, and the keys. Every value is held "
        "against its checksum; one that differs is an error, and no table is written.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_verb("python -m datamodels.store", "Look after a store.", "store", VERBS, argv)


if __name__ == "__main__":
    cli.run(main)

"""`python -m datamodels.store VERB DIR …`: look after a store. `VERBS` is the list; another verb is one entry."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Arguments, Option, Verb
from datamodels.store import Store
from datamodels.store.check import verify

DIR = ("dir", "the store")
JSON = Option(bool, "print it as JSON", default=False)


def status(args: Arguments) -> int:
    with Store.open(args.positional["dir"]) as store:
        state = store.status(failures=args["store.failures"])
        if args["store.json"]:
            print(json.dumps(asdict(state), indent=1))
            return 0
        share = 100 * state.completed / state.num_models
        print(
            f"{store.path}: {state.completed:,} of {state.num_models:,} rows complete ({share:.1f} %), "
            f"{state.running:,} claimed, {state.failed:,} failed, {state.pending:,} to do"
        )
        for failure in state.failures:
            times = f"{failure.attempts} attempt{'s' * (failure.attempts != 1)}"
            print(f"  row {failure.row}: {times}, {failure.error or 'no traceback'}")
        if state.failed > len(state.failures):
            print(f"  … and {state.failed - len(state.failures):,} more (--failures)")
        return 0


def check(args: Arguments) -> int:
    with Store.open(args.positional["dir"]) as store:
        rows = int(store.completed().sum())
        total = rows * sum(field.nbytes for field in store.spec.schema.values())
        started, found = time.monotonic(), 0
        with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for problem in verify(store, bar.update):
                found += 1
                print(problem)
        seconds = time.monotonic() - started
        print(
            f"{rows:,} complete rows, {total / 1e9:.3f} GB, {total / 1e9 / max(seconds, 1e-9):.2f} GB/s: "
            f"{f'problems: {found}' if found else 'all as committed'}"
        )
        return 1 if found else 0


VERBS = {
    "status": Verb(
        "how far it is, and what failed",
        status,
        {"json": JSON, "failures": Option(int, "how many failed rows to list", default=20, min=0)},
        (DIR,),
    ),
    "verify": Verb("hold every complete row against its checksums; exit code 1 where one differs", check, {}, (DIR,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_verb("python -m datamodels.store", "Look after a store.", "store", VERBS, argv)


if __name__ == "__main__":
    cli.run(main)

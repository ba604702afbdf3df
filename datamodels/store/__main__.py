"""`python -m datamodels.store status|verify DIR`: look after a store."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError
from datamodels.store import Store
from datamodels.store.check import verify

SECTIONS = {
    "store": {
        "json": Option(bool, "status as JSON", default=False),
        "failures": Option(int, "how many failed rows to list", default=20, min=0),
    }
}


def status(store: Store, *, failures: int, as_json: bool) -> int:
    state = store.status(failures=failures)
    if as_json:
        print(json.dumps(asdict(state), indent=1))
        return 0
    share = 100 * state.completed / state.num_models
    print(
        f"{store.path}: {state.completed:,} of {state.num_models:,} rows complete ({share:.1f} %), {state.running:,} "
        f"claimed, {state.failed:,} failed, {state.pending:,} to do"
    )
    for failure in state.failures:
        times = f"{failure.attempts} attempt{'s' * (failure.attempts != 1)}"
        print(f"  row {failure.row}: {times}, {failure.error or 'no traceback'}")
    if state.failed > len(state.failures):
        print(f"  … and {state.failed - len(state.failures):,} more (--store.failures)")
    return 0


def check(store: Store) -> int:
    """Print what is wrong; 1 where something is."""
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


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.store",
        "Look after a store. status: how far it is, and what failed. "
        "verify: hold every complete row against its checksums.",
        SECTIONS,
        argv,
        positional=(("verb", "status or verify"), ("logdir", "the store")),
    )
    verb = args.positional["verb"]
    if verb not in ("status", "verify"):
        raise ConfigError(f"verb: expected status or verify, got {verb!r}")
    with Store.open(args.positional["logdir"]) as store:
        if verb == "status":
            return status(store, failures=args["store.failures"], as_json=args["store.json"])
        return check(store)


if __name__ == "__main__":
    cli.run(main)

"""Put the shards of a fit together: python -m datamodels.regression.merge OUT_DIR"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodels import cli
from datamodels.errors import RegressionError
from datamodels.regression import result
from datamodels.regression.compute_datamodels import draw, say
from datamodels.regression.datamodel import CERTIFICATES, PATH, Datamodel, RegularizationPath
from datamodels.regression.shard import GRAM, RESULT, Plan, alone
from datamodels.store import Store

MOST_WARNINGS = 10  # on the terminal; regression.json has all


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.regression.merge",
        "Put the shards of a fit together into one result, as a fit in one piece would have left it.",
        {},
        argv,
        positional=(("out_dir", "the cfg.out_dir of the fit"),),
    )
    merge(Path(args.positional["out_dir"]))
    return 0


def merge(out_dir: Path) -> None:
    """Write the result of all shards in out_dir/shards into out_dir: whole, or not at all; again: nothing to do.

    Raises RegressionError, by shard, for shards that are missing, that are not what was committed, or that disagree.
    """
    folder = out_dir / result.SHARDS
    plan = Plan.load(folder)
    with alone(folder), Store.open(folder) as store:
        completed = store.completed()
        if len(completed) != len(plan.bounds):
            raise RegressionError(f"{folder}: {len(completed)} rows, and a plan of {len(plan.bounds)} shards")
        if not completed.all():
            missing = np.flatnonzero(~completed).tolist()
            raise RegressionError(
                f"{out_dir}: {len(missing)} of {len(completed)} shards are missing ({_listed(missing)}); fill them: "
                f"python -m datamodels.pool --worker.logdir={folder} --worker.main_import=datamodels.regression.shard"
            )
        rows = {key: store.rows(key) for key in ("targets", "plan", "digest", "seconds")}
        for shard, bounds in enumerate(plan.bounds):
            if rows["plan"][shard] != plan.digest() or tuple(rows["targets"][shard]) != bounds:
                raise RegressionError(f"{out_dir}: shard {shard} belongs to another plan; {_again(folder, shard)}")
        digests = rows["digest"].tolist()
        if (out_dir / result.RESULTS[-1]).exists():
            if _merged(out_dir) == digests:
                say(f"{out_dir}: these {len(digests)} shards are merged already")
                return
            result.refuse(out_dir, shards=False)
        model, reports = _put_together(folder, plan, digests)
        report = result.report(
            model,
            config={"out_dir": out_dir, **plan.source, **plan.options, "shards": len(digests)},
            rows=reports[0]["rows"],
            warnings=list(dict.fromkeys(text for one in reports for text in one["warnings"])),
            seconds={name: sum(one["seconds"][name] for one in reports) for name in reports[0]["seconds"]},
            shards=[
                {"targets": list(bounds), "digest": digest, "seconds": one["seconds"], "versions": one["versions"]}
                for bounds, digest, one in zip(plan.bounds, digests, reports, strict=True)
            ],
        )
        for name, found in _disagreeing(reports).items():
            report["warnings"].append(f"shards were fitted with different versions of {name}: {found}")
        result.remove_unfinished(out_dir)  # of a merge that was killed
        result.write(out_dir, model, report, draw(model), shards=False)
        shutil.rmtree(folder / GRAM, ignore_errors=True)
    for text in report["warnings"][:MOST_WARNINGS]:
        say(f"warning: {text}")
    if len(report["warnings"]) > MOST_WARNINGS:
        say(f"warning: and {len(report['warnings']) - MOST_WARNINGS} more, in {out_dir / 'regression.json'}")
    say(f"{len(digests)} shards merged: " + result.describe(out_dir, model, report["seconds"]["fit"]))


def _put_together(folder: Path, plan: Plan, digests: Sequence[str]) -> tuple[Datamodel, list[dict[str, Any]]]:
    """One Datamodel of all shards, each held against the digest that it committed, and what each says of its fit."""
    first, last = plan.bounds[0][0], plan.bounds[-1][1]
    names = ("bias", "lam", *CERTIFICATES, "nnz", "ended", "targets")
    parts: dict[str, list[Any]] = {name: [] for name in (*names, *(f"path {name}" for name in PATH))}
    reports: list[dict[str, Any]] = []
    for shard, (bounds, digest) in enumerate(zip(plan.bounds, digests, strict=True)):
        files = folder / "workers" / str(shard) / RESULT
        try:
            model = Datamodel.load(files)
            reports.append(json.loads((files / "regression.json").read_text(encoding="utf-8")))
        except (RegressionError, OSError, ValueError) as error:
            raise RegressionError(f"shard {shard}: {error}; {_again(folder, shard)}") from None
        if result.digest(model) != digest:
            raise RegressionError(f"shard {shard}: {files} is not what it committed; {_again(folder, shard)}")
        assert model.path is not None
        if shard == 0:
            columns, about = model.columns, model.about
            weight = np.zeros((len(columns), last - first), dtype=np.float32)
        other = [name for name in {**about, **model.about} if about.get(name) != model.about.get(name)]
        if model.columns != columns or other:
            told = [f"{name} is {about.get(name)} there and {model.about.get(name)} here" for name in other]
            raise RegressionError(
                f"shard {shard} disagrees with shard 0: {'; '.join(told) or 'it has other columns'}; "
                f"{_again(folder, shard)}"
            )
        weight[:, bounds[0] - first : bounds[1] - first] = model.weight
        for name in names:
            parts[name].append(getattr(model, name))
        for name in PATH:
            parts[f"path {name}"].append(getattr(model.path, name))
    merged = Datamodel(
        weight=weight,
        columns=columns,
        about=about,
        ended=sum(parts.pop("ended"), ()),
        targets=sum(parts.pop("targets"), ()),
        path=RegularizationPath(**{name: np.concatenate(parts.pop(f"path {name}"), axis=1) for name in PATH}),
        **{name: np.concatenate(part) for name, part in parts.items()},
    )
    return merged, reports


def _merged(out_dir: Path) -> list[str] | None:
    """Digests of the shards of the result in out_dir; None if it was not made of shards."""
    try:
        report = json.loads((out_dir / "regression.json").read_text(encoding="utf-8"))
        return [shard["digest"] for shard in report["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _disagreeing(reports: Sequence[dict[str, Any]]) -> dict[str, str]:
    """{what: its versions}, where shards were fitted with several."""
    found = {name: sorted({str(one["versions"].get(name)) for one in reports}) for name in reports[0]["versions"]}
    return {name: ", ".join(versions) for name, versions in found.items() if len(versions) > 1}


def _again(folder: Path, shard: int) -> str:
    return (
        f"fit it again with python -m datamodels.worker --worker.logdir={folder} "
        f"--worker.main_import=datamodels.regression.shard --worker.index={shard} --worker.do_if_complete"
    )


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


if __name__ == "__main__":
    cli.run(main)

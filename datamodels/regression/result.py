"""What a fit leaves in its out_dir: there whole, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import datamodels
from datamodels.errors import RegressionError
from datamodels.regression.datamodel import CERTIFICATES, PATH, Datamodel, sparse_columns

# In the order in which they appear in out_dir; with datamodels.pt there, all are.
RESULTS = ("regularization_path", "final_lambda", "regression.json", "datamodels.pt")
SHARDS = "shards"  # the store of a fit in shards, in out_dir
WEIGHT = "final_lambda/weight"


def refuse(out_dir: Path, *, shards: bool = True) -> None:
    """RegressionError if out_dir is not a folder or holds (part of) a result, or the shards of one."""
    if out_dir.exists() and not out_dir.is_dir():
        raise RegressionError(f"cfg.out_dir={out_dir}: is a file; name a folder")
    held = [name for name in RESULTS if (out_dir / name).exists()]
    if held:
        raise RegressionError(
            f"cfg.out_dir={out_dir}: already holds a result ({', '.join(held)}), which is left as it is; "
            f"name another folder, or move that one away"
        )
    if shards and (out_dir / SHARDS).exists():
        raise RegressionError(
            f"cfg.out_dir={out_dir}: holds a fit in shards; give the command that began it, with its --cfg.shards, to "
            f"go on with that, or name another folder"
        )


def remove_unfinished(out_dir: Path) -> None:
    """Remove what a process that was killed while it put a result into out_dir had put there; a whole result stays."""
    if not (out_dir / RESULTS[-1]).exists():
        for name in reversed(RESULTS[:-1]):
            remove(out_dir / name)
    for beside in out_dir.parent.glob(f".{out_dir.name}.partial-*"):
        remove(beside)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(
    out_dir: Path,
    model: Datamodel,
    report: Mapping[str, Any],
    draw: Callable[[Path], object] = lambda path: None,
    *,
    shards: bool = True,
) -> None:
    """Write everything beside out_dir, sync, and rename: a result appears whole, datamodels.pt last.

    `draw` may leave a picture of the path at the place that it is given. `shards`: whether shards in out_dir are a
    reason to refuse it.
    """
    out_dir = Path(os.path.abspath(out_dir))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = out_dir.parent / f".{out_dir.name}.partial-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        for name, values in arrays(model).items():
            file = beside / f"{name}.npy"
            file.parent.mkdir(exist_ok=True)
            if name == WEIGHT and model.sparse_is_smaller():
                from scipy import sparse

                sparse.save_npz(file.with_suffix(".npz"), sparse_columns(values), compressed=False)
            else:
                np.save(file, values)
        draw(beside / "regularization_path" / "path.png")
        (beside / "regression.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        model.save(beside / "datamodels.pt")
        for path in [*beside.rglob("*"), beside]:
            _sync(path)

        refuse(out_dir, shards=shards)  # somebody else may have finished meanwhile
        if not out_dir.exists() or not any(out_dir.iterdir()):
            os.rename(beside, out_dir)
        else:
            for name in RESULTS:
                os.rename(beside / name, out_dir / name)
            _sync(out_dir)
        _sync(out_dir.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def arrays(model: Datamodel) -> dict[str, np.ndarray]:
    """The numbers of a result by the names of their files."""
    found = {f"final_lambda/{name}": getattr(model, name) for name in ("weight", "bias", "lam", *CERTIFICATES, "nnz")}
    if model.path is not None:
        found |= {f"regularization_path/{name}": getattr(model.path, name) for name in PATH}
    return found


def digest(model: Datamodel) -> str:
    """A hash of all numbers and names of a result: equal for results that are equal to the bit."""
    from scipy import sparse

    total = hashlib.blake2b(digest_size=16)
    for name, values in sorted(arrays(model).items()):
        weight = sparse.csc_array(values) if name == WEIGHT else None
        parts = [values] if weight is None else [weight.indptr, weight.indices, weight.data]
        total.update(f"{name} {values.dtype.str} {values.shape}".encode())
        for part in parts:
            total.update(np.ascontiguousarray(part).data)
    total.update(json.dumps([model.ended, model.columns, model.targets]).encode())
    return total.hexdigest()


def report(
    model: Datamodel,
    *,
    config: Mapping[str, Any],
    rows: Mapping[str, np.ndarray],
    warnings: Sequence[str],
    seconds: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """What regression.json says: how the fit was made, from which rows, and how it went."""
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in config.items()},
        "about": dict(model.about),
        "rows": {name: np.asarray(some).tolist() for name, some in rows.items()},
        "summary": {
            "columns": len(model.columns),
            "targets": len(model.targets),
            "gap_max": float(model.gap.max()),
            "kkt_max": float(model.kkt.max()),
            "nnz_mean": float(model.nnz.mean()),
            "lambdas": lambdas(model),
            "r2_val_mean": _mean(model.r2_val),
            "r2_train_mean": _mean(model.r2_train),
            "ended": {why: model.ended.count(why) for why in sorted(set(model.ended))},
        },
        "warnings": list(warnings),
        "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **more,
    }


def lambdas(model: Datamodel) -> int:
    """How many lambdas the paths of all targets had."""
    return 0 if model.path is None else int(np.isfinite(model.path.lam).sum())


def describe(out_dir: Path, model: Datamodel, seconds: float) -> str:
    """One line on a result, for a terminal."""
    validation = _mean(model.r2_val)
    return (
        f"{len(model.targets)} datamodels in {out_dir}: {seconds:.1f} s, {lambdas(model) / max(seconds, 1e-9):.0f} "
        f"lambdas/s, mean non-zeros {model.nnz.mean():.0f}, "
        f"validation R2 {np.nan if validation is None else validation:.3f}, largest duality gap {model.gap.max():.1e}"
    )


def versions() -> dict[str, str]:
    found = {"datamodels": datamodels.__version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "scikit-learn", "numba", "torch", "ffcv"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None

"""What a fit leaves in its out_dir: there whole, or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import datamodels
from datamodels.errors import RegressionError
from datamodels.regression.datamodel import Datamodel

# In the order in which they appear in out_dir; with datamodels.pt there, all are.
RESULTS = ("regularization_path", "final_lambda", "regression.json", "datamodels.pt")


def refuse(out_dir: Path) -> None:
    """RegressionError if out_dir is not a folder or holds (part of) a result."""
    if out_dir.exists() and not out_dir.is_dir():
        raise RegressionError(f"cfg.out_dir={out_dir}: is a file; name a folder")
    held = [name for name in RESULTS if (out_dir / name).exists()]
    if held:
        raise RegressionError(
            f"cfg.out_dir={out_dir}: already holds a result ({', '.join(held)}), which is left as it is; "
            f"name another folder, or move that one away"
        )


def write(out_dir: Path, model: Datamodel, report: Mapping[str, Any]) -> None:
    """Write everything beside out_dir, sync, and rename: a result appears whole, datamodels.pt last."""
    out_dir = Path(os.path.abspath(out_dir))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = out_dir.parent / f".{out_dir.name}.partial-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        arrays = {
            f"final_lambda/{name}": getattr(model, name)
            for name in ("weight", "bias", "lam", "gap", "kkt", "nnz", "r2_train", "r2_val")
        }
        if model.path is not None:
            arrays |= {f"regularization_path/{name}": getattr(model.path, name) for name in ("lam", "val_mse", "nnz")}
        for name, values in arrays.items():
            file = beside / f"{name}.npy"
            file.parent.mkdir(exist_ok=True)
            np.save(file, values)
        (beside / "regression.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        model.save(beside / "datamodels.pt")
        for path in [file for file in beside.rglob("*") if file.is_file()] + [beside]:
            _sync(path)

        refuse(out_dir)  # somebody else may have finished meanwhile
        if not out_dir.exists() or not any(out_dir.iterdir()):
            os.rename(beside, out_dir)
        else:
            for name in RESULTS:
                os.rename(beside / name, out_dir / name)
            _sync(out_dir)
        _sync(out_dir.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
            "r2_val_mean": _mean(model.r2_val),
            "r2_train_mean": _mean(model.r2_train),
            "ended": {why: model.ended.count(why) for why in sorted(set(model.ended))},
        },
        "warnings": list(warnings),
        "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **more,
    }


def describe(out_dir: Path, model: Datamodel, seconds: float) -> str:
    """One line on a result, for a terminal."""
    validation = _mean(model.r2_val)
    return (
        f"{len(model.targets)} datamodels in {out_dir}: {seconds:.1f} s, mean non-zeros {model.nnz.mean():.0f}, "
        f"validation R2 {np.nan if validation is None else validation:.3f}, largest duality gap {model.gap.max():.1e}"
    )


def versions() -> dict[str, str]:
    names = ("numpy", "scipy", "scikit-learn", "torch")
    return {"datamodels": datamodels.__version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None

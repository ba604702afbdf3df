"""A fitted datamodel: weights in the units of the columns, and what is known about each target's fit."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import RegressionError
from datamodels.regression.scale import BLOCK_VALUES, row_blocks

CONSTANT, TURNED, END_OF_PATH = "constant", "validation turned", "end of path"


@dataclass(frozen=True, eq=False)
class RegularizationPath:
    """What each target's path saw: lam, val_mse and nnz, all (k, T); NaN (nnz: -1) after the path ended."""

    lam: np.ndarray
    val_mse: np.ndarray
    nnz: np.ndarray


@dataclass(frozen=True, eq=False)
class Datamodel:
    """T sparse linear models of p columns: `x @ weight + bias` predicts, x as it is in the store.

    weight (p, T), bias (T,), lam (T,): float32; lam is the one chosen by validation and used on all rows.
    gap (T,): relative duality gap of exactly these float32 weights.  kkt (T,): largest violation of the
    optimality conditions, divided by lam.  nnz (T,).  r2_train, r2_val (T,): of the path's model at lam on
    the rows that fitted it and on the validation rows; the weights kept here were refitted on both.  ended
    (T,): why the path ended.
    columns, targets: names.  about: numbers of rows, seed, k, eps and the like.
    """

    weight: np.ndarray
    bias: np.ndarray
    lam: np.ndarray
    gap: np.ndarray
    kkt: np.ndarray
    nnz: np.ndarray
    r2_train: np.ndarray
    r2_val: np.ndarray
    ended: tuple[str, ...]
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    path: RegularizationPath | None = None  # not kept in datamodels.pt

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise RegressionError(f"weight must have shape (columns, targets), got {self.weight.shape}")
        p, T = self.weight.shape
        for name in ("bias", "lam", "gap", "kkt", "nnz", "r2_train", "r2_val"):
            if getattr(self, name).shape != (T,):
                raise RegressionError(f"{name}: expected shape ({T},), got {getattr(self, name).shape}")
        if len(self.columns) != p or len(self.targets) != T or len(self.ended) != T:
            raise RegressionError(
                f"{len(self.columns)} column names, {len(self.targets)} target names and "
                f"{len(self.ended)} reasons for weights of shape {self.weight.shape}"
            )

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Outcomes (rows, T), float64, of raw masks or other columns x (rows, p)."""
        x = np.asarray(x)
        if x.ndim != 2 or x.shape[1] != len(self.columns):
            raise RegressionError(f"expected masks of shape (rows, {len(self.columns)}), got {x.shape}")
        out = np.tile(self.bias.astype(np.float64), (len(x), 1))
        step = max(1, BLOCK_VALUES // max(1, len(self.columns)))  # weights are large; never all of them in float64
        for first in range(0, len(self.targets), step):
            some = slice(first, first + step)
            weight = self.weight[:, some].astype(np.float64)
            for block in row_blocks(np.arange(len(x)), len(self.columns)):
                out[block, some] += x[block].astype(np.float64) @ weight
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a torch file: `weight, bias, lam` (float32) as in the released code, and the rest."""
        import torch

        state: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(self, name)))
            for name in ("weight", "bias", "lam", "gap", "kkt", "nnz", "r2_train", "r2_val")
        }
        state |= {
            "ended": list(self.ended),
            "columns": list(self.columns),
            "targets": list(self.targets),
            "about": dict(self.about),
        }
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(beside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Datamodel:
        """Read what `save` wrote, or the released code did (what that lacks is NaN); no pickle runs."""
        import pickle

        import torch

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, about files that it is going to refuse
                state = torch.load(path, map_location="cpu", weights_only=True)
            weight, bias, lam = (state[name].float().numpy() for name in ("weight", "bias", "lam"))
        except FileNotFoundError:
            raise RegressionError(f"{path}: no such file") from None
        except (
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            EOFError,
            ValueError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            raise RegressionError(
                f"{path}: not a datamodels.pt ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'empty'})"
            ) from error
        p, T = weight.shape
        unknown = np.full(T, np.nan)

        def numbers(name: str) -> np.ndarray:
            return state[name].numpy() if name in state else unknown

        return cls(
            weight=weight,
            bias=bias.reshape(-1),
            lam=lam.reshape(-1),
            gap=numbers("gap"),
            kkt=numbers("kkt"),
            nnz=(weight != 0).sum(axis=0),
            r2_train=numbers("r2_train"),
            r2_val=numbers("r2_val"),
            ended=tuple(state.get("ended", ["unknown"] * T)),
            columns=tuple(state.get("columns", [f"x[{j}]" for j in range(p)])),
            targets=tuple(state.get("targets", [f"y[{t}]" for t in range(T)])),
            about=state.get("about", {}),
        )

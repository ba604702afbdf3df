"""A fitted datamodel: weights in the units of the columns, and what is known about each target's fit."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels import files
from datamodels.errors import RegressionError
from datamodels.regression.scale import BLOCK_VALUES, row_blocks

if TYPE_CHECKING:
    import torch
    from scipy import sparse

CONSTANT, TURNED, END_OF_PATH = "constant", "validation turned", "end of path"
CERTIFICATES = ("gap", "kkt", "r2_train", "r2_val")  # what the released code's files lack
PATH = ("lam", "val_mse", "nnz")
SPARSE_SHARE = 0.01  # of non-zeros, below which predictions skip the zeros: 2.6 times as fast at .005, no faster at .02


@dataclass(frozen=True, eq=False)
class RegularizationPath:
    """What each target's path saw: lam, val_mse and nnz, all (k, T); NaN (nnz: -1) after the path ended."""

    lam: np.ndarray
    val_mse: np.ndarray
    nnz: np.ndarray

    @classmethod
    def load(cls, folder: Path, targets: int) -> RegularizationPath | None:
        """What a fit of so many targets left in its folder `regularization_path`, or None."""
        try:
            parts = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in PATH}
        except FileNotFoundError:  # the released code's folder holds other files
            return None
        shapes = {name: part.shape for name, part in parts.items()}
        if any(part.ndim != 2 or part.shape != (len(parts["lam"]), targets) for part in parts.values()):
            raise RegressionError(f"{folder}: arrays of shape (lambdas, {targets}) are expected, got {shapes}")
        return cls(**parts)

    def __repr__(self) -> str:
        lambdas, targets = self.lam.shape
        return f"RegularizationPath({lambdas} lambdas, {targets} targets)"


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
    path: RegularizationPath | None = None  # kept beside datamodels.pt

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

    def __repr__(self) -> str:
        p, T = self.weight.shape
        gap = f"largest duality gap {self.gap.max():.1e}" if np.isfinite(self.gap).any() else "no certificates"
        return f"Datamodel({p} columns, {T} targets, {self.nnz.mean():.0f} non-zeros on average, {gap})"

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Outcomes (rows, T), float64, of raw masks or other columns x (rows, p)."""
        x, p = np.asarray(x), len(self.columns)
        if x.ndim != 2 or x.shape[1] != p:
            packed = x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == -(-p // 8)
            raise RegressionError(
                f"expected masks of shape (rows, {p}), got {x.shape}"
                + (
                    f"; these look like packed bits: take store.rows(), which unpacks them, or "
                    f'np.unpackbits(x, axis=1, count={p}, bitorder="little")'
                    if packed
                    else ""
                )
            )
        out = np.tile(self.bias.astype(np.float64), (len(x), 1))
        blocks = list(row_blocks(np.arange(len(x)), p))
        if int(self.nnz.sum()) < SPARSE_SHARE * self.weight.size:
            rows_of_targets = sparse_columns(self.weight).T.astype(np.float64)
            for block in blocks:
                out[block] += (rows_of_targets @ np.ascontiguousarray(x[block].T, dtype=np.float64)).T
            return out
        step = max(1, BLOCK_VALUES // max(1, p))  # weights are large; never all of them in float64
        for first in range(0, len(self.targets), step):
            some = slice(first, first + step)
            weight = self.weight[:, some].astype(np.float64)
            for block in blocks:
                out[block, some] += x[block].astype(np.float64) @ weight
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a torch file: `weight, bias, lam` (float32) as in the released code, and the rest.

        `weight` is a sparse tensor (COO) where that takes less space; `torch.load(path)["weight"].to_dense()` is the
        matrix either way.
        """
        import torch

        state: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(self, name)))
            for name in ("bias", "lam", "gap", "kkt", "nnz", "r2_train", "r2_val")
        }
        if self.sparse_is_smaller():
            at = np.nonzero(self.weight)
            state["weight"] = torch.sparse_coo_tensor(
                torch.from_numpy(np.stack(at)),
                torch.from_numpy(self.weight[at]),
                self.weight.shape,
                check_invariants=True,
                is_coalesced=True,
            )
        else:
            state["weight"] = torch.from_numpy(np.ascontiguousarray(self.weight))
        state |= {
            "ended": list(self.ended),
            "columns": list(self.columns),
            "targets": list(self.targets),
            "about": dict(self.about),
        }
        with files.whole(path) as file:
            torch.save(state, file)

    def sparse_is_smaller(self) -> bool:
        """Whether the non-zeros with their places take less space than all weights: 20 bytes each, or 4."""
        return 20 * int(np.count_nonzero(self.weight)) < 4 * self.weight.size

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Datamodel:
        """Read what `save` wrote, or the released code did (what that lacks is NaN); no pickle runs.

        `path` is a datamodels.pt or the folder that a fit left; from the folder the regularization path is read too.
        """
        import pickle

        import torch

        folder = Path(path) if Path(path).is_dir() else None
        path = Path(path) if folder is None else folder / "datamodels.pt"
        try:
            with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(enable=True):
                warnings.simplefilter("ignore", UserWarning)  # torch's, about files that it is going to refuse
                state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise RegressionError(f"{path}: not a datamodels.pt (it holds a {type(state).__name__}, not a dict)")
            weight, bias, lam = (_dense(state[name]) for name in ("weight", "bias", "lam"))
            if weight.ndim != 2:
                raise RegressionError(
                    f"{path}: not a datamodels.pt (its weight has shape {weight.shape}, not (columns, targets))"
                )
            p, T = weight.shape
            unknown = np.full(T, np.nan)
            numbers: dict[str, Any] = {name: state[name].numpy() if name in state else unknown for name in CERTIFICATES}
            texts: dict[str, Any] = {
                "ended": tuple(state.get("ended", ["unknown"] * T)),
                "columns": tuple(state.get("columns", [f"x[{j}]" for j in range(p)])),
                "targets": tuple(state.get("targets", [f"y[{t}]" for t in range(T)])),
            }
            about = dict(state.get("about", {}))
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
        try:
            return cls(
                weight=weight,
                bias=bias.reshape(-1),
                lam=lam.reshape(-1),
                nnz=np.count_nonzero(weight, axis=0),
                about=about,
                path=None if folder is None else RegularizationPath.load(folder / "regularization_path", T),
                **numbers,
                **texts,
            )
        except RegressionError as error:
            raise RegressionError(f"{path}: not a datamodels.pt ({error})") from None


def sparse_columns(weight: np.ndarray) -> sparse.csc_array:
    """The non-zeros of weight (p, T), column by column."""
    from scipy import sparse

    return sparse.csc_array(weight)


def _dense(tensor: torch.Tensor) -> np.ndarray:
    """float32, whatever layout the tensor has on disk."""
    return np.ascontiguousarray(tensor.to_dense().float().numpy())

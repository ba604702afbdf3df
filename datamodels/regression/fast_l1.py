"""The fit by MadryLab's fast_l1 (proximal SAGA on a GPU), which the released code used: fed, and its answer put back.

fast_l1 reads (inp, targ, index) batches of one size from anything that can be iterated, standardises the columns by
what it reads, and writes standardised weights and a bias into the tensors it is given. It is called here as the
released code calls it: calc_max_lambda on the training rows, train_saga along the path with the validation rows
choosing each target's lambda, train_saga once more at that lambda on all rows. Its weights are then divided by the
standard deviations; the rest (bias, certificate) is as for every solver.

What it does not tell stays unknown: path, validation and training R². It knows no penalty weights, and always
centres the columns, so a fit without a bias is not one it can do.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
import torch

from datamodels.errors import RegressionError
from datamodels.regression.gpu_columns import OnDevice, groups, is_binary, open_device
from datamodels.regression.lasso import PathOptions, Solution
from datamodels.regression.problem import Problem

NAME = "fast_l1"
BATCH, FEWEST = 1000, 8  # rows of a batch, at most and at least
INSTALL = "pip install cupy-cuda12x pandas tqdm 'git+https://github.com/MadryLab/fast_l1' (cupy-cuda13x for CUDA 13)"


@dataclass(frozen=True, eq=False)
class Loader:
    """Batches (inp, targ, index) of some rows, in a new random order each time it is iterated.

    x: (rows, p), on the device.  y: (rows, T), float32, there too.  inp comes as float32. index is each row's place,
    and stays on the CPU, where fast_l1 keeps the table it indexes with it. batch_size divides the rows: fast_l1's
    buffers have the size of the first batch.
    """

    x: torch.Tensor
    y: torch.Tensor
    batch_size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(len(self.x), generator=self.generator).split(self.batch_size):
            rows = index.to(self.x.device)
            yield self.x[rows].float(), self.y[rows], index


def import_fast_l1() -> ModuleType:
    """fast_l1's regressor; RegressionError that says how to install it where it is missing."""
    try:
        return import_module("fast_l1.regressor")
    except ImportError as error:
        raise RegressionError(
            f"solver=fast_l1 needs MadryLab's fast_l1, which is not on the package index, and CUDA ({error}); install "
            f"it with: {INSTALL}; or use solver=gpu, which needs nothing but torch"
        ) from error


def solve(
    problem: Problem,
    options: PathOptions,
    use_bias: bool,
    workers: int,
    progress: Callable[[int], None],
    device: str = "cuda",
    *,
    lr: float = 0.01,
    batch_size: int | None = None,
    check_every: int = 2,
    stop: float = 1e-5,
) -> Solution:
    """Path, choice of lambda and refit by fast_l1; options.patience and options.tol mean nothing to it.

    lr, check_every, stop: its learning rate, the epochs between its checks, and the squared change of standardised
    weights at which it takes a lambda as solved; the released code's defaults.  batch_size: None for the largest that
    divides both numbers of rows.

    Raises RegressionError where fast_l1 or the device is missing, for what it cannot do, and for numbers of rows that
    have no common divisor of use.
    """
    if problem.penalty is not None:
        raise RegressionError(
            "solver=fast_l1 shrinks all columns alike; leave the penalty weights out, or use solver=gpu"
        )
    if not use_bias:
        raise RegressionError(
            "solver=fast_l1 centres the columns, which is a fit with a bias; use solver=gpu without one"
        )
    regressor, where = import_fast_l1(), open_device(device)
    size = _batch_size(len(problem.train), len(problem.val), batch_size)

    data = OnDevice(problem, use_bias, where, is_binary(problem.x))
    solution = Solution.empty(problem.x.shape[1], problem.y.shape[1], options.k, data.train, data.full)
    generator = torch.Generator().manual_seed(problem.seed)
    y = data.outcomes(np.arange(problem.y.shape[1]))
    _fill_scales(data, y)
    outcomes = [out[:, : part.n].T.float() for out, part in zip(y, data.parts, strict=True)]
    # It divides by standard deviations in float32: constant columns would come out as anything.
    used = np.flatnonzero(data.train.sd > 0)
    x = [_rows(problem, rows, used, data.train.mean[used], where) for rows in (problem.train, problem.val)]
    loaders = [Loader(x[i], outcomes[i], size, generator) for i in range(2)]
    weight = torch.zeros((len(used), len(outcomes[0].T)), device=where)
    bias = torch.zeros(weight.shape[1], device=where)
    start = regressor.calc_max_lambda(loaders[0])
    with _quiet():
        lam = regressor.train_saga(
            weight,
            bias,
            loaders[0],
            loaders[1],
            lr=lr,
            start_lams=start,
            update_bias=True,
            lam_decay=math.exp(math.log(options.eps) / options.k),
            num_lambdas=options.k,
            early_stop_freq=check_every,
            early_stop_eps=stop,
        )
        refitted = np.flatnonzero(data.full.sd[used] > 0)
        weight = weight[torch.from_numpy(refitted).to(where)].contiguous()
        everything = Loader(torch.cat(x)[:, torch.from_numpy(refitted).to(where)], torch.cat(outcomes), size, generator)
        regressor.train_saga(
            weight,
            bias,
            everything,
            None,
            lr=lr,
            start_lams=lam,
            update_bias=True,
            lam_decay=1.0,
            num_lambdas=1,
            early_stop_freq=check_every,
            early_stop_eps=stop,
        )
    used = used[refitted]
    units = torch.from_numpy(data.full.inverse_sd[used]).to(where)
    solution.weight[used] = (weight.double() * units[:, None]).float().cpu().numpy()
    found, first = lam.double().cpu().numpy(), start.double().cpu().numpy()
    solution.weight[:, data.full.constant] = 0
    solution.lam[:] = np.where(data.full.constant, 0.0, found.astype(np.float32))
    fallen = np.divide(found, first, out=np.ones_like(found), where=(found > 0) & (first > 0))
    place = np.round(np.log(fallen) / math.log(options.eps) * options.k).astype(np.int64)
    solution.best[:] = np.where(found > 0, np.clip(place, 0, options.k - 1), options.k - 1)
    solution.turned[:] = solution.best < options.k - 1
    progress(len(found))
    return solution


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int) -> int:
    """Bytes that solve takes of the machine's memory: fast_l1 keeps a residual per row and target there."""
    return 8 * n * T + 3 * 8192 * 8 * max(min(p, 1 << 15), T)


def _fill_scales(data: OnDevice, y: list[torch.Tensor]) -> None:
    for group in groups(data.problem, data.problem.y.shape[1], data.width, data.device):
        data.units(group, y)


def _rows(problem: Problem, rows: np.ndarray, used: np.ndarray, mean: np.ndarray, device: torch.device) -> torch.Tensor:
    """Columns `used` of these rows on the device: 0/1 a byte each, others float32 less their mean."""
    binary, out = is_binary(problem.x), []
    for first in range(0, len(rows), 8192):
        block = problem.x[rows[first : first + 8192]][:, used]
        out.append(torch.from_numpy((block != 0).astype(np.uint8) if binary else (block - mean).astype(np.float32)))
    return torch.cat([block.to(device) for block in out])


def _batch_size(train: int, val: int, wanted: int | None) -> int:
    """A number of rows that divides both; RegressionError if there is none of use."""
    common = math.gcd(train, val)
    if wanted is not None:
        if wanted < 1 or common % wanted:
            raise RegressionError(
                f"batch_size={wanted} must divide the {train} training and the {val} validation rows; "
                f"{_largest(common)} does, or change data.num_train and data.num_val"
            )
        return wanted
    found = _largest(common)
    if found < FEWEST:
        raise RegressionError(
            f"solver=fast_l1 reads batches of one size, which must divide the {train} training and the {val} "
            f"validation rows: no size beyond {found} does; make data.num_train and data.num_val multiples of 100, say"
        )
    return found


def _largest(common: int) -> int:
    return max(size for size in range(1, min(common, BATCH) + 1) if common % size == 0)


class _Unwritten(io.TextIOBase):
    """Takes what fast_l1 prints, which is all it does when it is interrupted: it then returns as if all were well."""

    interrupted = False

    def write(self, text: str) -> int:
        self.interrupted |= "Interrupted" in text
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    out = _Unwritten()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield
    if out.interrupted:
        raise KeyboardInterrupt

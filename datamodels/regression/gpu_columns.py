"""Columns and outcomes on a device, and what is computed from them in float64: scales, gradients, certificates.

A 0/1 column is kept as bits along the rows, eight rows to a byte (n p / 8 bytes: .6 GB at n=100,000, p=50,000), and is
unpacked a tile of columns at a time where it is used; other columns are float64. Rows are padded with zeros to a
multiple of 64 and columns to one of 32, which is what the integer and half-precision products want; a padded row adds
nothing to any product, a padded column is constant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from datamodels.errors import RegressionError
from datamodels.regression.problem import Problem
from datamodels.regression.scale import Scale, Sums, scale_of

ROWS, COLUMNS = 64, 32  # what rows and columns are padded to
TILE_BYTES = 1 << 29  # of an unpacked tile
LOAD_VALUES = 1 << 28  # values of the rows that are sent to the device at a time
CHUNK_BYTES = 1 << 31  # of the residuals that are held at a time


def open_device(name: str) -> torch.device:
    """The torch device of this name; RegressionError if it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RegressionError(f"device={name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise RegressionError(f"device={name!r}: expected cuda, cuda:0 and the like, or cpu")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise RegressionError(
            f"device={name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; run on a "
            f"machine with one and a torch built for it, or use solver=cpu"
        )
    return device


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of some rows on a device: `bits` (p padded, n padded / 8) uint8, or `values`, float64, less `origin`.

    n, p: without padding.  device: where tiles are made; they may be kept in the machine's memory and come over.
    """

    n: int
    p: int
    origin: np.ndarray
    device: torch.device
    bits: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Columns with the padding."""
        return padded(self.p, COLUMNS)

    @property
    def rows(self) -> int:
        """Rows with the padding."""
        return padded(self.n, ROWS)

    def tile(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """These columns, (len, rows): 0 and 1, or values less their origin."""
        kept = self.bits if self.bits is not None else self.values
        assert kept is not None
        some = kept[which if isinstance(which, slice) else which.to(kept.device)].to(self.device, non_blocking=True)
        return some.to(dtype) if self.bits is None else unpack(some, dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[slice]:
        """Slices of the columns, each as many as TILE_BYTES hold when unpacked."""
        return slices(self.width, self.rows * dtype.itemsize)


def added(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum; of rows that are in several parts, say."""
    return functools.reduce(torch.add, parts)


def padded(count: int, to: int) -> int:
    return -(-count // to) * to


def slices(width: int, bytes_each: int, budget: int | None = None) -> Iterator[slice]:
    """0..width in steps that are multiples of 32 and take no more than the budget, if 32 do not."""
    step = max(COLUMNS, (budget or TILE_BYTES) // max(1, bytes_each) // COLUMNS * COLUMNS)
    return (slice(first, min(first + step, width)) for first in range(0, width, step))


def unpack(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(…, 8 m) of 0 and 1 from (…, m) bytes, lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    out = ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    return out.view(torch.int8) if dtype == torch.int8 else out.to(dtype)


def pack(values: torch.Tensor) -> torch.Tensor:
    """(…, m) bytes from (…, 8 m) bool, lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=values.device)
    return (values.unflatten(-1, (-1, 8)).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def is_binary(x: np.ndarray) -> bool:
    """Whether every value is 0 or 1."""
    if x.dtype == bool:
        return True
    return all(bool(((part == 0) | (part == 1)).all()) for part in np.array_split(x, max(1, x.size // LOAD_VALUES)))


def load(
    problem: Problem,
    rows: np.ndarray,
    use_bias: bool,
    device: torch.device,
    binary: bool,
    keep: torch.device | None = None,
) -> Columns:
    """The columns of these rows on the device, or kept on another (in the machine's memory, say) for it."""
    x, n, p = problem.x, len(rows), problem.x.shape[1]
    width = padded(p, COLUMNS)
    step = max(ROWS, min(8192, LOAD_VALUES // p // ROWS * ROWS))
    origin = np.zeros(p)
    if not binary and use_bias:
        origin = x.mean(axis=0, dtype=np.float64)
    if binary:
        held = torch.zeros((width, padded(n, ROWS) // 8), dtype=torch.uint8, device=keep or device)
    else:
        held = torch.zeros((width, padded(n, ROWS)), dtype=torch.float64, device=keep or device)
    for first in range(0, n, step):
        block = x[rows[first : first + step]]
        if binary:
            bits = torch.zeros((p, padded(len(block), 8)), dtype=torch.bool, device=device)
            bits[:, : len(block)] = torch.from_numpy(block if block.dtype == bool else block != 0).to(device).T
            held[:p, first // 8 : first // 8 + bits.shape[1] // 8] = pack(bits).to(held.device)
        else:
            held[:p, first : first + len(block)] = torch.from_numpy(block.astype(np.float64) - origin).to(held.device).T
    return Columns(n, p, origin, device, **{"bits" if binary else "values": held})


def outcomes(problem: Problem, rows: np.ndarray, targets: slice, device: torch.device) -> torch.Tensor:
    """(B, padded rows), float64: outcomes less offsets, 0 in the padding."""
    width = len(range(*targets.indices(problem.y.shape[1])))
    out = torch.zeros((width, padded(len(rows), ROWS)), dtype=torch.float64, device=device)
    step = max(1, min(8192, LOAD_VALUES // width))
    for first in range(0, len(rows), step):
        if problem.offset is None and problem.y.dtype.kind == "f":  # as it is: the way to the device is the slow part
            block = np.ascontiguousarray(problem.y[rows[first : first + step], targets])
        else:
            block = problem.outcomes(rows[first : first + step], targets)
        out[:, first : first + len(block)] = torch.from_numpy(block).to(device).double().T
    return out


def outcome_sums(y: torch.Tensor, n: int, y_origin: torch.Tensor) -> dict[str, np.ndarray]:
    """What `Sums` holds of outcomes (B, padded rows)."""
    found: dict[str, list[torch.Tensor]] = {"y_sum": [], "yy": [], "y_low": [], "y_high": []}
    for some in slices(len(y), y.shape[1] * 8):
        raw = y[some, :n]
        found["y_low"].append(raw.amin(1))
        found["y_high"].append(raw.amax(1))
        moved = raw - y_origin[some, None]
        found["y_sum"].append(moved.sum(1))
        found["yy"].append(moved.square_().sum(1))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def column_sums(columns: Columns) -> dict[str, np.ndarray]:
    """What `Sums` holds of columns, exact for 0/1 columns."""
    found: dict[str, list[torch.Tensor]] = {"x_sum": [], "xx": [], "low": [], "high": []}
    for some in columns.tiles(torch.float64):
        if columns.bits is not None:
            count = columns.tile(some, torch.int8).sum(1, dtype=torch.int64).double()
            parts = {"x_sum": count, "xx": count, "low": (count == columns.n).double(), "high": (count > 0).double()}
        else:
            values = columns.tile(some, torch.float64)[:, : columns.n]
            parts = {
                "x_sum": values.sum(1),
                "xx": values.square().sum(1),
                "low": values.amin(1),
                "high": values.amax(1),
            }
        for name, part in parts.items():
            found[name].append(part)
    return {name: torch.cat(parts).cpu().numpy()[: columns.p] for name, parts in found.items()}


def sums_of(n: int, x_origin: np.ndarray, y_origin: np.ndarray, x: dict, y: dict) -> Sums:
    return Sums(n=n, x_origin=x_origin, y_origin=y_origin, **x, **y)


def scales(
    parts: Sequence[Columns], y: Sequence[torch.Tensor], column_parts: Sequence[dict], use_bias: bool
) -> tuple[Scale, Scale]:
    """Scales of the first part's rows, and of all rows."""
    n = sum(part.n for part in parts)
    if use_bias:
        y_origin = added(out.sum(1) for out in y) / n
    else:
        y_origin = torch.zeros(len(y[0]), dtype=torch.float64, device=y[0].device)
    found = [
        sums_of(part.n, part.origin, y_origin.cpu().numpy(), x, outcome_sums(out, part.n, y_origin))
        for part, out, x in zip(parts, y, column_parts, strict=True)
    ]
    total = found[0]
    for more in found[1:]:
        total = total + more
    return scale_of(found[0], use_bias), scale_of(total, use_bias)


@dataclass(frozen=True, eq=False)
class Units:
    """A Scale on the device, padded: z_j = (column_j − shift_j) · inverse_sd_j.  shift: mean less the origin."""

    n: int
    shift: torch.Tensor
    sd: torch.Tensor
    inverse_sd: torch.Tensor
    y_mean: torch.Tensor

    @classmethod
    def of(cls, scale: Scale, columns: Columns) -> Units:
        def wide(values: np.ndarray) -> torch.Tensor:
            out = torch.zeros(columns.width, dtype=torch.float64)
            out[: columns.p] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
            return out.to(columns.device)

        return cls(
            n=scale.n,
            shift=wide(scale.mean - columns.origin) * (wide(scale.sd) > 0),
            sd=wide(scale.sd),
            inverse_sd=wide(scale.inverse_sd),
            y_mean=torch.from_numpy(scale.y_mean).to(columns.device),
        )

    def some(self, targets: torch.Tensor | slice) -> Units:
        return replace(self, y_mean=self.y_mean[targets])


def fresh(
    parts: Sequence[Columns], y: Sequence[torch.Tensor], units: Units, weight: torch.Tensor, use_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zᵀ r / n (B, width) and ‖r‖² / n (B,) in float64, of weights (B, width) in the units of the columns.

    r = y − y_mean − (X − mean) w, less its own mean if there is a bias.  2 · 2 n p B operations in float64, half of
    them where all weights are 0.
    """
    gradient = torch.empty((len(weight), parts[0].width), dtype=torch.float64, device=weight.device)
    power = torch.empty(len(weight), dtype=torch.float64, device=weight.device)
    rows = sum(part.rows for part in parts)
    for some in slices(len(weight), rows * 8, CHUNK_BYTES):
        w = weight[some].double()
        residual = [out[some] - units.y_mean[some, None] for out in y]
        at = w @ units.shift
        nonzero = bool(w.any())
        for r, part in zip(residual, parts, strict=True):
            r += at[:, None]
            if nonzero:
                for columns in part.tiles(torch.float64):
                    r -= w[:, columns] @ part.tile(columns, torch.float64)
            r[:, part.n :] = 0
        if use_bias:
            mean = added(r.sum(1) for r in residual) / units.n
            for r, part in zip(residual, parts, strict=True):
                r[:, : part.n] -= mean[:, None]
        power[some] = added(r.square().sum(1) for r in residual) / units.n
        total = added(r.sum(1) for r in residual)
        for columns in parts[0].tiles(torch.float64):
            out = added(
                r @ part.tile(columns, torch.float64).T for r, part in zip(residual, parts, strict=True)
            ) - torch.outer(total, units.shift[columns])
            gradient[some, columns] = out * (units.inverse_sd[columns] / units.n)
    return gradient, power


def half_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of float16 matrices with float32 sums and result, on the matrix units where there are some."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@functools.cache
def has_half_product(device: torch.device) -> bool:
    """Whether this torch has float16 products with float32 results there (CUDA: since torch 2.8)."""
    eye = torch.eye(32, dtype=torch.float16, device=device)
    try:
        return bool((half_product(eye, eye) == eye.float()).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


LOW = 2.0**-11  # what the second limb is scaled by: float16 keeps 11 bits


def limbs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float16 high and low and scale (B, 1): weight = (high + LOW · low) · scale, to 22 bits of each row's largest."""
    scale = weight.abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    unit = weight / scale
    high = unit.half()
    low = ((unit - high.to(unit.dtype)) / LOW).half()
    return high, low, scale


def predictions(columns: Columns, weight: torch.Tensor, precision: str) -> torch.Tensor:
    """X w, (B, rows), of weights (B, width) in the units of the columns; columns less their origin."""
    out = torch.zeros((len(weight), columns.rows), dtype=weight.dtype, device=weight.device)
    if precision == "half" and columns.bits is not None:
        high, low, scale = limbs(weight)
        for some in columns.tiles(torch.float16):
            tile = columns.tile(some, torch.float16)
            out += half_product(high[:, some], tile)
            out += half_product(low[:, some], tile) * LOW
        return out * scale
    for some in columns.tiles(weight.dtype):
        out += weight[:, some] @ columns.tile(some, weight.dtype)
    return out


def standardised(part: Columns, units: Units, some: slice | torch.Tensor) -> torch.Tensor:
    """Columns (len, rows) of Z, float64, 0 in the padding."""
    z = part.tile(some, torch.float64)
    z = (z - units.shift[some, None]) * units.inverse_sd[some, None]
    z[:, part.n :] = 0
    return z


@dataclass(frozen=True, eq=False)
class Span:
    """The unpenalised columns of some targets; `cross · rootᵀ g[which]` removes what they explain of a gradient g.

    which (m,): the columns.  root (m, r): root rootᵀ is the pseudo-inverse of their Gram matrix, so that weights of
    minimum norm fit.  cross (width, r): Gram matrix of all columns with them, times root.
    """

    which: torch.Tensor
    root: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[Columns], units: Units, which: torch.Tensor) -> Span:
        inner = [standardised(part, units, which) for part in parts]
        gram = torch.empty((parts[0].width, len(which)), dtype=torch.float64, device=which.device)
        for some in parts[0].tiles(torch.float64):
            gram[some] = (
                added(standardised(part, units, some) @ z.T for part, z in zip(parts, inner, strict=True)) / units.n
            )
        values, vectors = torch.linalg.eigh(gram[which])
        kept = values > 1e-10 * values.amax().clamp_min(1e-300)
        root = vectors[:, kept] / values[kept].sqrt()
        return cls(which, root, gram @ root)

    @property
    def rank(self) -> int:
        return self.root.shape[1]

    def explained(self, parts: Sequence[Columns], y: Sequence[torch.Tensor], units: Units) -> torch.Tensor:
        """What these columns and the bias explain of the power of the outcomes, (B,)."""
        share = added(
            (out - units.y_mean[:, None]) @ standardised(part, units, self.which).T
            for out, part in zip(y, parts, strict=True)
        )
        return (share / units.n @ self.root).square().sum(1)

    def project(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take from gradients (B, width), in place, what these columns explain; its power (B,), the weights (B, m)."""
        share = gradient[:, self.which].double() @ self.root
        gradient -= (share @ self.cross.T).to(gradient.dtype)
        return share.square().sum(1), share @ self.root.T


@dataclass(frozen=True, eq=False)
class Group:
    """Targets with the same unpenalised columns, which are fitted together.

    penalty: (width,) or (B, width), 0 for unpenalised columns and in the padding.  inverse: 1 / penalty, 0 where that
    is 0; a column with inverse 0 gets its weight from the Span, or none.
    """

    targets: np.ndarray
    unpenalised: np.ndarray
    penalty: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(
        cls, problem: Problem, targets: np.ndarray, unpenalised: np.ndarray, width: int, device: torch.device
    ) -> Group:
        p, given = problem.x.shape[1], problem.penalty
        if given is None or given.ndim == 1:
            penalty = torch.zeros(width, dtype=torch.float64)
            penalty[:p] = 1.0 if given is None else torch.from_numpy(given.astype(np.float64))
        else:
            penalty = torch.zeros((len(targets), width), dtype=torch.float64)
            penalty[:, :p] = torch.from_numpy(given[:, targets].T.astype(np.float64))
        penalty = penalty.to(device)
        inverse = torch.where(penalty > 0, 1 / penalty, torch.zeros_like(penalty))
        return cls(targets, unpenalised, penalty, inverse)

    def on(self, units: Units) -> Group:
        """The same, with no weight for columns that are constant in these units."""
        varies = units.inverse_sd > 0
        return replace(self, penalty=self.penalty * varies, inverse=self.inverse * varies)

    def some(self, rows: torch.Tensor | slice) -> Group:
        """The penalties of these rows of the group's targets; for loops that follow the target numbers themselves."""
        if self.penalty.ndim == 1:
            return self
        return replace(self, penalty=self.penalty[rows], inverse=self.inverse[rows])

    def to(self, dtype: torch.dtype) -> Group:
        return replace(self, penalty=self.penalty.to(dtype), inverse=self.inverse.to(dtype))


def groups(problem: Problem, at_once: int, width: int, device: torch.device) -> Iterator[Group]:
    """All targets in groups of at most `at_once` that share their unpenalised columns."""
    T, given = problem.y.shape[1], problem.penalty
    none = np.zeros(0, dtype=np.int64)
    if given is None or given.ndim == 1:
        sets = [(np.arange(T), none if given is None else np.flatnonzero(given == 0))]
    else:
        patterns, members = np.unique(np.packbits(given == 0, axis=0), axis=1, return_inverse=True)
        sets = []
        for i in range(patterns.shape[1]):
            targets = np.flatnonzero(members.reshape(-1) == i)
            sets.append((targets, np.flatnonzero(given[:, targets[0]] == 0)))
    for targets, unpenalised in sets:
        for first in range(0, len(targets), at_once):
            yield Group.of(problem, targets[first : first + at_once], unpenalised, width, device)


def gap_of(
    u: torch.Tensor,
    g: torch.Tensor,
    rr: torch.Tensor,
    lam: torch.Tensor,
    penalty: torch.Tensor,
    inverse: torch.Tensor,
    top: torch.Tensor | None = None,
) -> torch.Tensor:
    """Duality gap (B,), absolute, of standardised weights u and Zᵀr/n = g, both (B, m), with rr = ‖r‖²/n.

    With s = min(1, lam / max |g_j| / v_j) it is (1 − s)² rr / 2 + Σ (lam v_j |u_j| − s u_j g_j): a sum of terms that
    are not negative, and all small near the optimum, so nothing cancels. (Equal to P − D of certificate.certify.)
    top (B,): that largest |g_j| / v_j, where there are more columns than these.
    """
    top = (g.abs() * inverse).amax(1).double() if top is None else top
    s = torch.where(top > lam, lam / top, torch.ones_like(top))
    terms = lam.to(u.dtype)[:, None] * penalty * u.abs()
    terms -= s.to(u.dtype)[:, None] * (u * g)
    return (1 - s).square() * rr / 2 + terms.sum(1, dtype=torch.float64)


class OnDevice:
    """A problem on a device: columns of the training and of the validation rows, outcomes when asked for, scales.

    scales: of the training rows and of all; their y_mean, power and constant are filled in group by group.
    """

    def __init__(
        self,
        problem: Problem,
        use_bias: bool,
        device: torch.device,
        binary: bool,
        keep: torch.device | None = None,
    ) -> None:
        self.problem, self.use_bias, self.device, T = problem, use_bias, device, problem.y.shape[1]
        self.parts = [load(problem, rows, use_bias, device, binary, keep) for rows in (problem.train, problem.val)]
        self.x_sums = [column_sums(part) for part in self.parts]
        nothing = [torch.zeros((1, part.rows), dtype=torch.float64, device=device) for part in self.parts]
        found = scales(self.parts, nothing, self.x_sums, use_bias)
        self.train, self.full = (
            replace(scale, y_mean=np.zeros(T), power=np.zeros(T), constant=np.zeros(T, dtype=bool)) for scale in found
        )
        self.held: tuple[np.ndarray, list[torch.Tensor]] | None = None

    @property
    def width(self) -> int:
        return self.parts[0].width

    def outcomes(self, targets: np.ndarray) -> list[torch.Tensor]:
        """Of both parts; the last ones asked for are held, which are all there are when one group has them."""
        if self.held is None or not np.array_equal(self.held[0], targets):
            self.held = None
            rows = (self.problem.train, self.problem.val)
            self.held = targets, [target_outcomes(self.problem, some, targets, self.device) for some in rows]
        return self.held[1]

    def units(self, group: Group, y: list[torch.Tensor]) -> tuple[Units, Units]:
        """Of the training rows and of all, with these targets' means."""
        found = scales(self.parts, y, self.x_sums, self.use_bias)
        for into, scale in zip((self.train, self.full), found, strict=True):
            into.y_mean[group.targets] = scale.y_mean
            into.power[group.targets] = scale.power
            into.constant[group.targets] = scale.constant
        return Units.of(found[0], self.parts[0]), Units.of(found[1], self.parts[0])

    def span(self, group: Group, parts: list[Columns], units: Units) -> Span | None:
        if not len(group.unpenalised):
            return None
        return Span.of(parts, units, torch.from_numpy(group.unpenalised).to(self.device))


def certify(
    problem: Problem,
    weight: np.ndarray,
    lam: np.ndarray,
    use_bias: bool,
    device: str = "cuda",
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Relative duality gap (T,) and KKT violation / lam (T,) of weights (p, T) on the train and validation rows.

    The numbers of certificate.certify on a device: from a fresh residual, all in float64, about 4 n p T operations.
    """
    where, rows = open_device(device), np.sort(np.concatenate([problem.train, problem.val]))
    columns = load(problem, rows, use_bias, where, is_binary(problem.x))
    x_sums = column_sums(columns)
    T = problem.y.shape[1]
    gap, kkt = np.zeros(T), np.zeros(T)
    at_once = max(1, CHUNK_BYTES // (8 * max(columns.rows, columns.width)))
    span = None
    for group in groups(problem, at_once, columns.width, where):
        y = target_outcomes(problem, rows, group.targets, where)
        _, scale = scales([columns], [y], [x_sums], use_bias)
        units = Units.of(scale, columns)
        w = torch.zeros((len(y), columns.width), dtype=torch.float64, device=where)
        w[:, : columns.p] = torch.from_numpy(np.ascontiguousarray(weight[:, as_slice(group.targets)])).to(where).T
        if len(group.unpenalised) and (span is None or span.which.tolist() != group.unpenalised.tolist()):
            span = Span.of([columns], units, torch.from_numpy(group.unpenalised).to(where))
        found = certify_group(
            [columns],
            [y],
            units,
            group,
            span if len(group.unpenalised) else None,
            w,
            torch.from_numpy(lam[group.targets].astype(np.float64)).to(where),
            use_bias,
        )
        gap[group.targets], kkt[group.targets] = (values.cpu().numpy() for values in found[:2])
        if progress is not None:
            progress(len(group.targets))
    return gap, kkt


def as_slice(targets: np.ndarray) -> slice | np.ndarray:
    """A slice where the targets follow each other, which is read and written faster."""
    first, last = int(targets[0]), int(targets[-1])
    return slice(first, last + 1) if last - first + 1 == len(targets) else targets


def target_outcomes(problem: Problem, rows: np.ndarray, targets: np.ndarray, device: torch.device) -> torch.Tensor:
    """Outcomes of any targets."""
    some = as_slice(targets)
    if isinstance(some, slice):
        return outcomes(problem, rows, some, device)
    return torch.cat([outcomes(problem, rows, slice(int(t), int(t) + 1), device) for t in targets])


def certify_group(
    parts: Sequence[Columns],
    y: Sequence[torch.Tensor],
    units: Units,
    group: Group,
    span: Span | None,
    weight: torch.Tensor,
    lam: torch.Tensor,
    use_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gap, KKT violation, and the fresh gradient (B, width) and ‖r‖²/n without what the unpenalised columns explain.

    The gap and the violation are of `weight` as it is, those of unpenalised columns included.
    """
    gradient, rr = fresh(parts, y, units, weight, use_bias)
    penalty, inverse = group.on(units).penalty, group.on(units).inverse
    u = weight * units.sd
    bound = lam[:, None] * penalty
    violation = torch.where(u != 0, (gradient - bound * u.sign()).abs(), (gradient.abs() - bound).clamp_min(0))
    violation = (violation * (units.inverse_sd > 0)).amax(1)
    r0 = added((out[:, : part.n] - units.y_mean[:, None]).square().sum(1) for out, part in zip(y, parts, strict=True))
    r0 = r0 / units.n
    largest = torch.stack([out.abs().amax(1) for out in y]).amax(0)
    rest = torch.zeros_like(rr)
    if span is not None:
        rest, _ = span.project(gradient)
        rr = rr - rest
        r0 = r0 - span.explained(parts, y, units)
        u = u * (inverse > 0)
    gap = gap_of(u, gradient, rr, lam, penalty, inverse) + rest / 2
    fitted = r0 > (1e-12 * largest) ** 2
    return (
        torch.where(fitted, gap / torch.where(fitted, r0 / 2, torch.ones_like(r0)), gap),
        violation / torch.where(lam > 0, lam, torch.ones_like(lam)),
        gradient,
        rr,
    )

"""The design: a pure function of (spec, row) to what that run is asked to do.

Every number here derives from the raw output of PCG64, seeded by `SeedSequence((stream, block seed, ...))`. Both are
fixed by numpy's compatibility policy, which its higher-level streams (`Generator.random`, `permutation`) are not;
so a mask can be recomputed in ten years from the spec alone. A mask's stream is that of (0x6D61736B, block seed, mask
id), and the seed of a block's row i is the upper half of the first output of (0x73656564, block seed, i). With r_0,
r_1, … the raw 64-bit outputs for one mask, and alpha the float64 exactly as it is:

- `bernoulli`: example j is in when r_j < alpha · 2^64.
- `fixed_size`: the floor(alpha · n + ½) examples with the smallest (r_j, j) are in.
- `stratified`: the same inside each label c, with floor(alpha · n_c + ½) examples.
- `by_group`: group g, in sorted order of group names, is in with all its examples when r_g < alpha · 2^64.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import RowError, SpecError
from datamodels.spec import MAX_ROWS, Spec, nearest

SAMPLERS = ("bernoulli", "fixed_size", "stratified", "by_group")
BLOCK_ROLES = ("train", "eval")
RESERVED = (
    *("index", "indices", "logdir", "logdirs", "mask", "masks", "seed", "seeds", "smoke"),
    *("keys", "measurements"),
)
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}

_BLOCK_KEYS = (
    "role",
    "count",
    "masks",
    "repeats",
    "seed",
    "sampler",
    "alpha",
    "labels",
    "groups",
    "key",
    "choices",
    "filter",
)
_MASK_STREAM, _SEED_STREAM = 0x6D61736B, 0x73656564  # "mask", "seed"
# SeedSequence takes a number apart into words of 32 bits: from here on (seed, id) would no longer name one stream.
_SEEDS = 2**32


def raw_stream(*key: int) -> np.random.PCG64:
    """The bit generator of a key of non-negative ints; use its `random_raw` alone."""
    return np.random.PCG64(np.random.SeedSequence(key))


@dataclass(frozen=True)
class Assignment:
    """What one row is asked to do.

    `mask` has shape (num_examples,), bool, or is None where the design has no masks; `choices` maps each factor to its
    level; `role` is `train` or `eval`; `seed` is below 2^32. `mask_id` and `repeat` count inside the block.
    """

    row: int
    role: str
    seed: int
    block: int
    mask_id: int
    repeat: int
    choices: Mapping[str, Any]
    mask: np.ndarray | None


@dataclass(frozen=True)
class Block:
    """One block of rows: every grid cell, with every mask, repeated; rows in that order, the repeat moving fastest."""

    role: str
    masks: int
    repeats: int
    seed: int
    cells: tuple[Mapping[str, Any], ...]
    sampler: str | None = None
    alpha: float = 0.5
    key: str = "masks"
    num_examples: int = 0
    strata: np.ndarray | None = field(default=None, compare=False, repr=False)  # label or group number per example

    @property
    def rows(self) -> int:
        return len(self.cells) * self.masks * self.repeats

    def mask(self, mask_id: int) -> np.ndarray | None:
        """The mask (num_examples,), bool, of a mask id; the same for the same (block seed, mask id)."""
        if self.sampler is None:
            return None
        stream = raw_stream(_MASK_STREAM, self.seed, mask_id)
        if self.sampler == "bernoulli":
            return _below(stream.random_raw(self.num_examples), self.alpha)
        if self.sampler == "fixed_size":
            return _smallest(stream.random_raw(self.num_examples), self.alpha)
        if self.strata is None:
            raise SpecError(f"sampler {self.sampler!r} needs its label or group file")
        if self.sampler == "by_group":
            groups = _below(stream.random_raw(int(self.strata.max()) + 1), self.alpha)
            return np.asarray(groups[self.strata])
        raw = stream.random_raw(self.num_examples)
        counts = np.bincount(self.strata)
        # Stable: label by label, and in each by (r_j, j). Numpy sorts narrow integers in linear time.
        order = np.lexsort((raw, self.strata.astype(np.min_scalar_type(len(counts)))))
        place = np.arange(self.num_examples) - np.repeat(np.cumsum(counts) - counts, counts)
        mask = np.zeros(self.num_examples, bool)
        mask[order[place < np.repeat(_sizes(counts, self.alpha), counts)]] = True
        return mask

    def locate(self, offset: int) -> tuple[int, int, int]:
        """(cell, mask id, repeat) of the block's row `offset`."""
        cell, rest = divmod(offset, self.masks * self.repeats)
        return (cell, *divmod(rest, self.repeats))


@lru_cache(maxsize=4096)  # a worker asks three times for each row of a batch, and each time costs 40 µs
def _seed(block_seed: int, offset: int) -> int:
    return int(raw_stream(_SEED_STREAM, block_seed, offset).random_raw() >> 32)


def _below(raw: np.ndarray, alpha: float) -> np.ndarray:
    threshold = math.ceil(Fraction(alpha) * 2**64)
    if threshold >= 2**64:
        return np.ones(raw.shape, bool)
    return raw < np.uint64(threshold)


def _smallest(raw: np.ndarray, alpha: float) -> np.ndarray:
    mask = np.zeros(len(raw), bool)
    mask[np.argsort(raw, kind="stable")[: _size(len(raw), alpha)]] = True
    return mask


def _size(count: int, alpha: float) -> int:
    return math.floor(Fraction(alpha) * count + Fraction(1, 2))


def _sizes(counts: np.ndarray, alpha: float) -> np.ndarray:
    distinct, place = np.unique(counts, return_inverse=True)
    return np.array([_size(int(count), alpha) for count in distinct])[place]


@dataclass(frozen=True)
class Design:
    """The blocks of a spec, and through them the assignment of every row."""

    blocks: tuple[Block, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each block, and behind them the number of rows; int64 (blocks + 1,)."""
        return np.concatenate([[0], np.cumsum([block.rows for block in self.blocks])]).astype(np.int64)

    @property
    def num_models(self) -> int:
        return int(self.starts[-1])

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of all factors, in the order in which the blocks name them."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.cells[0]))

    @cached_property
    def roles(self) -> np.ndarray:
        """Role of each row, (num_models,): "train" or "eval"."""
        return np.repeat(np.array([b.role for b in self.blocks], dtype="U5"), [b.rows for b in self.blocks])

    @cached_property
    def mask_ids(self) -> np.ndarray:
        """int64 (num_models,): equal for rows that share a mask, and -1 where the design has none."""
        out, base = [], 0
        for block in self.blocks:
            if block.sampler is None:
                out.append(np.full(block.rows, -1, np.int64))
                continue
            ids = np.repeat(np.arange(base, base + block.masks, dtype=np.int64), block.repeats)
            out.append(np.tile(ids, len(block.cells)))
            base += block.masks
        return np.concatenate(out)

    def assignment(self, row: int, *, with_mask: bool = True) -> Assignment:
        """What `row` is asked to do. `RowError` for anything but an int in [0, num_models)."""
        row = check_index(row, self.num_models)
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        block = self.blocks[number]
        offset = row - int(self.starts[number])
        cell, mask_id, repeat = block.locate(offset)
        return Assignment(
            row,
            block.role,
            _seed(block.seed, offset),
            number,
            mask_id,
            repeat,
            block.cells[cell],
            block.mask(mask_id) if with_mask else None,
        )

    def seed(self, row: int) -> int:
        """The training seed of a row, as in its assignment."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return _seed(self.blocks[number].seed, row - int(self.starts[number]))

    def mask_key(self, row: int) -> str | None:
        """The schema key that audits this row's mask, or None where the design has no masks."""
        block = self.blocks[int(np.searchsorted(self.starts, row, side="right")) - 1]
        return block.key if block.sampler is not None else None


def check_index(row: Any, num_models: int) -> int:
    """`row` as an int. `RowError` unless it is an int in [0, num_models): -1 is not the last row, True is not 1."""
    if isinstance(row, (bool, np.bool_)) or not isinstance(row, (int, np.integer)):
        raise RowError(f"row: expected an int, got {row!r} of type {type(row).__name__}")
    if not 0 <= row < num_models:
        raise RowError(
            f"row {row}: expected an index in [0, {num_models}); a store counts from 0 and never from the end"
        )
    return int(row)


@dataclass(frozen=True)
class Resolved:
    """A spec whose rows are counted and whose files are pinned, its design, and the files to copy into the store."""

    spec: Spec
    design: Design
    files: Mapping[str, bytes]  # name inside the store -> content; what was hashed is what is copied


def resolve(spec: Spec, folder: str | Path) -> Resolved:
    """The spec with `num_models`, files and hashes filled in, and its design.

    `folder` is where relative file names of the design begin: the spec's own folder. Raises `SpecError`, naming
    the block and the key.
    """
    folder = Path(folder)
    if spec.design is None:
        assert spec.num_models is not None  # Spec refuses to be without both
        block = Block("train", 1, spec.num_models, 0, ({},))
        return Resolved(spec, Design((block,)), {})
    blocks: list[Block] = []
    resolved: list[Mapping[str, Any]] = []
    files: dict[str, bytes] = {}
    inherited: Mapping[str, Any] = {}
    for number, raw in enumerate(spec.design):
        builder = _BlockBuilder(spec, folder, number, raw, inherited, files)
        block, entry = builder.build()
        blocks.append(block)
        resolved.append(entry)
        if block.role == "train" and block.sampler is not None:
            inherited = {k: raw[k] for k in ("sampler", "alpha", "labels", "groups", "key") if k in raw}
    for i, j in itertools.combinations(range(len(blocks)), 2):
        if blocks[i].seed == blocks[j].seed:
            raise SpecError(
                f"design[{j}], seed: {blocks[j].seed} is already design[{i}]'s, so masks and seeds would "
                f"repeat; give each block its own"
            )
    design = Design(tuple(blocks))
    if design.num_models > MAX_ROWS:
        raise SpecError(f"design: {design.num_models:,} rows; the limit is {MAX_ROWS:,}")
    if spec.num_models is not None and spec.num_models != design.num_models:
        raise SpecError(
            f"num_models: {spec.num_models} does not fit the design, which gives {design.num_models} rows; "
            f"leave num_models out, or correct one"
        )
    return Resolved(spec.with_rows(design.num_models, resolved), design, files)


class _BlockBuilder:
    """Reads one block of the JSON; every refusal names the block and the key."""

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        number: int,
        raw: Mapping[str, Any],
        inherited: Mapping[str, Any],
        files: dict[str, bytes],
    ):
        self.spec, self.folder, self.number, self.raw, self.files = spec, folder, number, raw, files
        self.where = f"design[{number}]"
        for key in raw:
            if key not in _BLOCK_KEYS:
                raise SpecError(f"{self.where}: unknown key {key!r}{nearest(key, _BLOCK_KEYS)}")
        self.role = raw.get("role", "train")
        if self.role not in BLOCK_ROLES:
            raise SpecError(f"{self.where}, role: expected 'train' or 'eval', got {self.role!r}")
        self.settings = {**inherited, **raw} if self.role == "eval" else dict(raw)

    def build(self) -> tuple[Block, Mapping[str, Any]]:
        seed = self.integer("seed", self.number, low=0)
        if seed >= _SEEDS:
            raise SpecError(f"{self.where}, seed: expected an int in [0, 2^32), got {seed}")
        cells, choices = self.grid()
        repeats = self.integer("repeats", 1, low=1)
        sampler = self.settings.get("sampler")
        if sampler is None:
            return self.without_masks(seed, cells, choices, repeats)
        if sampler not in SAMPLERS:
            raise SpecError(
                f"{self.where}, sampler: expected one of {', '.join(SAMPLERS)}, "
                f"got {sampler!r}{nearest(str(sampler), SAMPLERS)}"
            )
        key, num_examples = self.mask_key()
        alpha = self.settings.get("alpha", 0.5)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
            raise SpecError(f"{self.where}, alpha: expected a fraction in (0, 1], got {alpha!r}")
        masks = self.mask_count(len(cells) * repeats)
        entry: dict[str, Any] = {
            "role": self.role,
            "masks": masks,
            "repeats": repeats,
            "seed": seed,
            "sampler": sampler,
            "alpha": alpha,
            "key": key,
            **choices,
        }
        strata = None
        wanted = {"stratified": "labels", "by_group": "groups"}.get(sampler)
        for name in ("labels", "groups"):
            if name in self.raw and name != wanted:
                raise SpecError(
                    f"{self.where}, {name}: sampler {sampler!r} does not use it; remove it, or choose the "
                    f"sampler that does"
                )
        if wanted is not None:
            strata, entry[wanted] = self.strata(wanted, num_examples)
        return Block(self.role, masks, repeats, seed, cells, sampler, float(alpha), key, num_examples, strata), entry

    def without_masks(
        self, seed: int, cells: tuple[Mapping[str, Any], ...], choices: Mapping[str, Any], repeats: int
    ) -> tuple[Block, Mapping[str, Any]]:
        for name in ("masks", "alpha", "labels", "groups", "key"):
            if name in self.raw:
                raise SpecError(
                    f'{self.where}, {name}: there is no sampler; expected "sampler": one of {", ".join(SAMPLERS)}'
                )
        count = self.integer("count", len(cells) * repeats if choices else None, low=1)
        if choices:
            if count != len(cells) * repeats:
                raise SpecError(
                    f"{self.where}, count: {count} does not fit {len(cells)} grid cells × {repeats} "
                    f"repeats = {len(cells) * repeats}; leave count out"
                )
        elif "repeats" in self.raw and repeats != count:
            raise SpecError(f"{self.where}: without masks or choices every row is a repeat; give count alone")
        else:
            repeats = count
        entry: dict[str, Any] = {"role": self.role, "count": count, "repeats": repeats, "seed": seed, **choices}
        if "sampler" in self.raw:  # null keeps an eval block from taking the sampler of the train block before it
            entry["sampler"] = None
        return Block(self.role, 1, repeats, seed, cells), entry

    def integer(self, name: str, default: int | None, *, low: int) -> int:
        value = self.raw.get(name, default)
        if value is None:
            raise SpecError(f"{self.where}, {name}: missing; expected an int >= {low}")
        if type(value) is not int or value < low:
            raise SpecError(f"{self.where}, {name}: expected an int >= {low}, got {value!r}")
        return value

    def mask_count(self, per_mask: int) -> int:
        if "masks" in self.raw:
            masks = self.integer("masks", None, low=1)
            if "count" in self.raw and self.integer("count", None, low=1) != masks * per_mask:
                raise SpecError(
                    f"{self.where}, count: {self.raw['count']} does not fit {masks} masks × {per_mask} "
                    f"rows each = {masks * per_mask}; leave count out"
                )
            return masks
        count = self.integer("count", None, low=1)
        if count % per_mask:
            raise SpecError(
                f"{self.where}, count: {count} rows do not divide into {per_mask} rows per mask "
                f"(grid cells × repeats); give masks instead"
            )
        return count // per_mask

    def mask_key(self) -> tuple[str, int]:
        key = self.settings.get("key", "masks")
        if not isinstance(key, str) or key not in self.spec.schema:
            raise SpecError(
                f"{self.where}, key: masks are kept under {key!r}, which the schema does not have; add "
                f'"{key}": {{"shape": [<number of examples>], "dtype": "bits"}}'
            )
        entry = self.spec.schema[key]
        if len(entry.shape) != 1 or entry.dtype not in ("bits", "bool") or entry.shape[0] < 1:
            raise SpecError(
                f"{self.where}, key: schema key {key!r} must be a vector of dtype bits or bool to hold a "
                f"mask, got shape {list(entry.shape)}, dtype {entry.dtype}"
            )
        return key, entry.shape[0]

    def strata(self, name: str, num_examples: int) -> tuple[np.ndarray, Mapping[str, str]]:
        where = f"{self.where}, {name}"
        value = self.settings.get(name)
        digest = None
        if isinstance(value, Mapping) and set(value) == {"file", "sha256"}:
            value, digest = value["file"], value["sha256"]
        if not isinstance(value, str):
            raise SpecError(f"{where}: expected the path of a .npy file with one entry per example, got {value!r}")
        path = self.folder / value
        try:
            content = path.read_bytes()
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except FileNotFoundError:
            raise SpecError(f"{where}: no such file {path}") from None
        except Exception as error:  # a hostile header raises more than numpy says
            raise SpecError(f"{where}: {path} is not a plain .npy file ({error})") from None
        sha256 = hashlib.sha256(content).hexdigest()
        if digest is not None and digest != sha256:
            raise SpecError(
                f"{where}: {path} has changed since the design was made (sha256 {sha256[:12]}…, expected "
                f"{digest[:12]}…); masks would differ; put the file back"
            )
        if not isinstance(array, np.ndarray) or array.shape != (num_examples,) or array.dtype.kind not in "biuUS":
            raise SpecError(
                f"{where}: expected {num_examples} ints or strings, one per example, in {path}, got shape "
                f"{list(np.shape(array))}, dtype {getattr(array, 'dtype', None)}"
            )
        inside = f"design/{name}-{sha256[:16]}.npy"
        self.files[inside] = content
        return np.unique(array, return_inverse=True)[1], {"file": inside, "sha256": sha256}

    def grid(self) -> tuple[tuple[Mapping[str, Any], ...], dict[str, Any]]:
        """The cells that the filter keeps, and the entries `choices` and `filter` as resolved."""
        raw = self.raw.get("choices")
        if raw is None:
            if "filter" in self.raw:
                raise SpecError(f"{self.where}, filter: there are no choices to filter")
            return ({},), {}
        if not isinstance(raw, Mapping) or not raw:
            raise SpecError(f'{self.where}, choices: expected {{"<factor>": [levels], ...}}, got {raw!r}')
        levels = {name: self.levels(name, value) for name, value in raw.items()}
        if math.prod(len(v) for v in levels.values()) > MAX_ROWS:
            raise SpecError(f"{self.where}, choices: the grid has more than {MAX_ROWS:,} cells")
        rules = self.raw.get("filter", [])
        keep = self.filters(rules, levels)
        cells = [
            cell
            for values in itertools.product(*levels.values())
            if keep(cell := dict(zip(levels, values, strict=True)))
        ]
        if not cells:
            raise SpecError(f"{self.where}, filter: it drops every one of the grid's cells; loosen it")
        return tuple(cells), {"choices": levels, **({"filter": rules} if rules else {})}

    def levels(self, name: str, value: Any) -> list[Any]:
        where = f"{self.where}, choices, {name!r}"
        if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
            raise SpecError(
                f"{where}: a factor reaches main() by name, so it must be a Python name, no keyword, other than "
                f"{', '.join(RESERVED)}"
            )
        if isinstance(value, list):
            levels = value
        elif isinstance(value, Mapping) and set(value) == {"range"}:
            bounds = value["range"]
            if (
                not isinstance(bounds, list)
                or not 1 <= len(bounds) <= 3
                or any(type(b) is not int for b in bounds)
                or (len(bounds) == 3 and bounds[2] == 0)
            ):
                raise SpecError(
                    f'{where}: expected {{"range": [start, stop, step]}} of ints as Python\'s range, got {value!r}'
                )
            if len(range(*bounds)) > MAX_ROWS:
                raise SpecError(f"{where}: {len(range(*bounds)):,} levels; the limit is {MAX_ROWS:,}")
            levels = list(range(*bounds))
        elif isinstance(value, Mapping) and set(value) == {"files"} and isinstance(value["files"], str):
            # root_dir, and not part of the pattern: a folder's own name may hold brackets.
            found = glob.glob(value["files"], root_dir=self.folder, recursive=True)
            levels = sorted(str((self.folder / name).resolve()) for name in found)
            if not levels:
                raise SpecError(f"{where}: no file matches {value['files']!r} in {self.folder.resolve()}")
        else:
            raise SpecError(
                f'{where}: expected a list, {{"range": [start, stop, step]}} or {{"files": GLOB}}, got {value!r}'
            )
        if not levels or any(not isinstance(v, (str, int, float, bool)) for v in levels):
            raise SpecError(f"{where}: expected at least one level, each a string, number or boolean, got {levels!r}")
        if any(isinstance(v, float) and not math.isfinite(v) for v in levels):
            raise SpecError(f"{where}: JSON has no NaN or infinity; got {levels!r}")
        if len({(type(v), v) for v in levels}) != len(levels):
            raise SpecError(f"{where}: a level stands twice in {levels!r}")
        if name in self.spec.schema:
            for level in levels:
                try:
                    self.spec.schema[name].encode(level, where=f"level {level!r}")
                except RowError as error:
                    raise SpecError(f"{where}: the schema key of that name cannot hold it: {error}") from None
        return levels

    def filters(self, rules: Any, levels: Mapping[str, Sequence[Any]]) -> Callable[[Mapping[str, Any]], bool]:
        where = f"{self.where}, filter"
        if not isinstance(rules, list) or any(not isinstance(r, list) or len(r) != 3 for r in rules):
            raise SpecError(f"{where}: expected a list of [factor, op, value or factor], got {rules!r}")
        for factor, op, _ in rules:
            if not isinstance(factor, str) or factor not in levels:
                raise SpecError(f"{where}: {factor!r} is not a factor{nearest(str(factor), levels)}")
            if not isinstance(op, str) or op not in OPERATORS:
                raise SpecError(f"{where}: unknown operator {op!r}; known: {' '.join(OPERATORS)}")

        def keep(cell: Mapping[str, Any]) -> bool:
            for factor, op, operand in rules:
                other = cell[operand] if isinstance(operand, str) and operand in levels else operand
                try:
                    if not OPERATORS[op](cell[factor], other):
                        return False
                except TypeError as error:
                    raise SpecError(
                        f"{where}: [{factor!r}, {op!r}, {operand!r}] cannot be compared for {cell} ({error})"
                    ) from None
            return True

        return keep

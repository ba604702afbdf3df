"""The spec: what every row of a store holds, as validated values."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from datamodels.errors import RowError, SpecError, json_mistake

FORMAT = 1
"""Version of the on-disk contract that this code reads and writes."""

COMPLETED = "_completed"
MAX_ROWS = 10**9
ROLES = ("mask", "choice", "outcome", "property", "benefit")

_NUMERIC = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)
# The released code took any attribute of numpy, of the numpy of its day.
_SPELLINGS = {
    "bool_": "bool",
    "bool8": "bool",
    "float": "float64",
    "float_": "float64",
    "double": "float64",
    "single": "float32",
    "half": "float16",
    "int": "int64",
    "int_": "int64",
    "long": "int64",
    "longlong": "int64",
    "intp": "int64",
    "intc": "int32",
    "short": "int16",
    "byte": "int8",
    "uint": "uint64",
    "ulong": "uint64",
    "ulonglong": "uint64",
    "uintp": "uint64",
    "uintc": "uint32",
    "ushort": "uint16",
    "ubyte": "uint8",
}
_MAX_AXES, _MAX_ROW_BYTES, _MAX_FILE_BYTES = 60, 2**40, 2**62
_TEXT = re.compile(r"U([1-9][0-9]{0,6})")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or the list of them."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


@dataclass(frozen=True)
class Field:
    """One key of the schema: what a row holds under that name.

    Parameters
    ----------
    name : a file name without a folder: letters, digits, `_ . -`, beginning with a letter or a digit.
    shape : the row's shape; () is a scalar row.
    dtype : `bool`, `int8`..`int64`, `uint8`..`uint64`, `float16`..`float64`, `U<n>` (text of at most n
        characters) or `bits` (bool packed along the last axis, little bit order).
    role : what the column is in a regression, or None.
    required : a row is complete only when every required key is valid.
    allow_nonfinite : NaN and infinities are values, not mistakes.

    Raises `SpecError`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str | None = None
    required: bool = True
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        where = f"schema key {self.name!r}"
        if not isinstance(self.name, str) or not _KEY.fullmatch(self.name):
            raise SpecError(
                f"{where}: expected a plain name (letters, digits, '_', '.', '-', beginning with a "
                f"letter or a digit, at most 128 characters); rename it"
            )
        if not isinstance(self.shape, tuple) or any(type(n) is not int or n < 0 for n in self.shape):
            raise SpecError(
                f"{where}, shape: expected a list of ints >= 0, got {_show(self.shape)}; a scalar row has []"
            )
        dtype = _SPELLINGS.get(self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        if dtype not in (*_NUMERIC, "bits") and not (isinstance(dtype, str) and _TEXT.fullmatch(dtype)):
            raise SpecError(
                f"{where}, dtype: expected one of numpy's number dtypes, bits or U<n>, got {self.dtype!r}"
                f"{nearest(str(self.dtype), (*_NUMERIC, 'bits', 'U<n>'))}"
            )
        object.__setattr__(self, "dtype", dtype)
        if dtype == "bits" and not self.shape:
            raise SpecError(
                f"{where}: dtype 'bits' packs the last axis, so the shape needs one; use 'bool' for a scalar"
            )
        if self.role is not None and self.role not in ROLES:
            raise SpecError(f"{where}, role: expected one of {', '.join(ROLES)}, got {self.role!r}")
        for flag in ("required", "allow_nonfinite"):
            if not isinstance(getattr(self, flag), bool):
                raise SpecError(f"{where}, {flag}: expected true or false, got {getattr(self, flag)!r}")
        if self.allow_nonfinite and not dtype.startswith("float"):
            raise SpecError(f"{where}: allow_nonfinite needs a float dtype, got {dtype}")
        if len(self.shape) > _MAX_AXES:
            raise SpecError(f"{where}, shape: {len(self.shape)} axes; numpy has at most {_MAX_AXES} beside the rows")
        # An axis of length 0 makes the product 0, and numpy refuses an array whose other axes multiply to too much.
        size = math.prod(n or 1 for n in self.shape) * self.value_dtype.itemsize
        if size > _MAX_ROW_BYTES:
            raise SpecError(f"{where}, shape: one row would take {size:,} bytes; the limit is 1 TiB; check the shape")

    @property
    def disk_dtype(self) -> np.dtype[Any]:
        """The dtype of `<key>.npy`; always little endian."""
        if self.dtype == "bits":
            return np.dtype("u1")
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """A row's shape in `<key>.npy`."""
        if self.dtype == "bits":
            return (*self.shape[:-1], -(-self.shape[-1] // 8))
        return self.shape

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The dtype in which a row is read: `bits` come back as bool."""
        return np.dtype("bool") if self.dtype == "bits" else self.disk_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a row on disk."""
        return math.prod(self.disk_shape) * self.disk_dtype.itemsize

    def encode(self, value: Any, *, where: str) -> np.ndarray:
        """What is written for `value`: an array of `disk_shape` and `disk_dtype`, C order.

        Raises `RowError`, beginning with `where`, for another shape (nothing is broadcast), a cast that is not
        allowed (to float: rounding and underflow are, a finite value becoming infinite is not; to int and bool:
        exact or refused; text must fit), or a value that is not finite where the schema does not allow it.
        """
        where = f"{where}, {self.name!r}"
        array = _as_array(value, where)
        _check_elements(value, array, self.value_dtype.kind, where)
        if array.shape != self.shape:
            raise RowError(
                f"{where}: expected shape {list(self.shape)}, got {list(array.shape)}; "
                f"fix what main() returns, or the shape in spec.json"
            )
        array = self._cast(array, where)
        if self.dtype == "bits":
            return np.packbits(array, axis=-1, bitorder="little")
        return np.asarray(array, dtype=self.disk_dtype, order="C")

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """The rows' values (m, *shape) of the bytes as stored, (m, *disk_shape)."""
        if self.dtype == "bits":
            return np.unpackbits(stored, axis=-1, count=self.shape[-1], bitorder="little").view(bool)
        return stored

    def _cast(self, array: np.ndarray, where: str) -> np.ndarray:
        target, kind = self.value_dtype, array.dtype.kind
        if target.kind == "U":
            if not array.size:
                return array.astype(target)  # an empty list is one of numbers to numpy
            if kind != "U":
                raise RowError(f"{where}: expected text, got dtype {array.dtype}; return str values")
            longest = int(np.strings.str_len(array).max())
            if longest > target.itemsize // 4:
                raise RowError(
                    f"{where}: expected text of at most {target.itemsize // 4} characters, got {longest}; "
                    f"shorten it, or raise n in dtype U<n>"
                )
            return array
        if kind not in "biuf":
            raise RowError(
                f"{where}: expected numbers for dtype {self.dtype}, got dtype {array.dtype}; fix what main() returns"
            )
        if target.kind == "f":
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                cast = array.astype(target, copy=False)
            if cast is array and (self.allow_nonfinite or bool(np.isfinite(array).all())):
                return array
            finite = np.isfinite(array) if kind == "f" else np.ones(array.shape, bool)
            if not self.allow_nonfinite and not bool(finite.all()):
                raise RowError(
                    f"{where}: {_first(~finite, array)} is not finite; fix the run, or say "
                    f'"allow_nonfinite": true in the schema'
                )
            overflow = finite & ~np.isfinite(cast)
            if bool(overflow.any()):
                raise RowError(
                    f"{where}: {_first(overflow, array)} does not fit {self.dtype} (largest "
                    f"{np.finfo(target).max:.6g}); use a wider dtype in spec.json"
                )
            return cast
        if target.kind == "b":
            bad = (array != 0) & (array != 1)
        else:
            info = np.iinfo(target)
            if kind == "f":
                wide = array.astype(np.promote_types(array.dtype, np.float64))  # a longdouble stays one
                with np.errstate(invalid="ignore"):
                    # max + 1 is a power of two and exact; max itself is not, for 64 bits.
                    bad = ~((wide >= float(info.min)) & (wide < float(info.max + 1)) & (wide == np.floor(wide)))
            elif kind == "b":
                bad = np.zeros(array.shape, bool)
            else:
                # Numpy compares a Python int with an array of another signedness exactly.
                bad = (array < info.min) | (array > info.max)
        if bool(np.any(bad)):
            raise RowError(
                f"{where}: {_first(np.asarray(bad), array)} is not exactly a {self.dtype}; "
                f"round it yourself, or change the dtype in spec.json"
            )
        return array.astype(target)

    def to_json(self) -> dict[str, Any]:
        """The schema entry, without what is left at its default."""
        entry: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        if self.role is not None:
            entry["role"] = self.role
        if not self.required:
            entry["required"] = False
        if self.allow_nonfinite:
            entry["allow_nonfinite"] = True
        return entry


def _as_array(value: Any, where: str) -> np.ndarray:
    """A numpy array of a Python scalar, a sequence, a numpy array or a torch tensor on any device."""
    if isinstance(value, np.ma.MaskedArray):
        raise RowError(f"{where}: a masked array would lose its mask; return .filled(...) or two keys")
    try:
        if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, without importing torch here
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                value = value.float()
            value = value.resolve_conj().resolve_neg().numpy()
        array = np.asarray(value)
    except Exception as error:  # whatever the value's own conversion raises
        raise RowError(
            f"{where}: expected an array, got {type(value).__name__} ({error}); "
            f"return plain numbers, numpy arrays or torch tensors"
        ) from None
    if array.dtype.kind == "O" and isinstance(value, np.ndarray):
        raise RowError(
            f"{where}: expected numbers or text, got an array of dtype object ({_show(value.ravel()[:9].tolist())}); "
            f"give it the dtype of its entries, as in .astype('float32')"
        )
    if array.dtype.kind == "O":
        raise RowError(
            f"{where}: expected numbers or text, got {_show(value)} of type {type(value).__name__}; "
            f"return plain numbers, numpy arrays or torch tensors"
        )
    return array


def _check_elements(value: Any, array: np.ndarray, target: str, where: str) -> None:
    """`RowError` where numpy changed the elements of a Python scalar or sequence on the way into `array`.

    It writes the 1 of ["a", 1] as text, cuts NULs off the end of text, and rounds the large int of [2**53 + 1, 0.5].
    """
    if isinstance(value, np.ndarray) or not (
        array.dtype.kind == "U" or (array.dtype.kind == "f" and target not in "fU" and isinstance(value, (list, tuple)))
    ):
        return
    given = np.asarray(value, dtype=object)
    if given.shape != array.shape:
        return  # a sequence of arrays; those have a dtype of their own
    if array.dtype.kind == "f":
        changed = np.asarray(given != array, bool) & ~np.isnan(array)
        if bool(changed.any()):
            raise RowError(f"{where}: {_first(changed, given)} loses digits beside floats; return one type of number")
        return
    for item in given.ravel():
        if not isinstance(item, str):
            kind = type(item).__name__
            raise RowError(f"{where}: expected text, got {_show(item)} of type {kind}; return str values")
        if "\0" in item:
            raise RowError(f"{where}: text with a NUL character cannot be stored unchanged; remove it")


def _first(bad: np.ndarray, array: np.ndarray) -> str:
    """The first offending value and where it stands."""
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"value {array[index]!s}" + (f" at {list(index)}" if index else "")


def _show(value: Any, limit: int = 80) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= limit else text[:limit] + "…"


_TOP = ("format", "num_models", "schema", "measurements", "design")
_MEASUREMENTS = ("names", "on", "samples")
_ENTRY = ("shape", "dtype", "role", "required", "allow_nonfinite")


@dataclass(frozen=True)
class Spec:
    """What a store holds: how many rows, which keys, and the design that chose them.

    `num_models` is None only until `datamodels.design.resolve` has counted the design's rows. `design` is the
    list of blocks as in the JSON, or None; `datamodels.design` gives it meaning. `measurements` is {"names": [...],
    "on": [...], "samples": int}, what `main` is to measure, on which data sets, and of how many examples of each it is
    to keep ids, labels and predictions, or None; `datamodels.measurements.library` gives it meaning, and keys of the
    schema when the store is made. Raises `SpecError`.
    """

    num_models: int | None
    schema: Mapping[str, Field]
    design: tuple[Mapping[str, Any], ...] | None = None
    measurements: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_models is None:
            if self.design is None:
                raise SpecError("num_models: expected an int >= 1, it is missing; a spec without a design needs it")
        elif type(self.num_models) is not int or self.num_models < 1:
            raise SpecError(f"num_models: expected an int >= 1, got {_show(self.num_models)}")
        elif self.num_models > MAX_ROWS:
            raise SpecError(f"num_models: {_show(self.num_models)} rows; the limit is {MAX_ROWS:,}")
        if not self.schema:
            raise SpecError("schema: expected at least one key; name what a row holds")
        folded: dict[str, str] = {}
        for key, field in self.schema.items():
            if key != field.name:
                raise SpecError(f"schema key {key!r}: its field is named {field.name!r}")
            if folded.setdefault(key.lower(), key) != key:
                raise SpecError(
                    f"schema keys {folded[key.lower()]!r} and {key!r} differ only in case, and would be "
                    f"one file on some file systems; rename one"
                )
            if field.nbytes * (self.num_models or 1) > _MAX_FILE_BYTES:
                raise SpecError(f"schema key {key!r}: {self.num_models:,} rows of {field.nbytes:,} bytes fit no file")
        object.__setattr__(self, "schema", MappingProxyType(dict(self.schema)))

    @classmethod
    def from_json(cls, raw: Any) -> Spec:
        """The spec of parsed JSON; every mistake is one `SpecError` that names its place."""
        if not isinstance(raw, dict):
            raise SpecError(f"expected a JSON object with 'schema', got {_show(raw)}")
        found = raw.get("format", FORMAT)  # before anything else: a newer format may have keys that this version lacks
        if type(found) is not int or found != FORMAT:
            raise SpecError(
                f"format: this version reads and writes format {FORMAT}, got {_show(found)}; "
                f"install the version of datamodels-store that wrote it, or newer"
            )
        _refuse_unknown(raw, _TOP, "")
        if "schema" not in raw:
            raise SpecError('schema: missing; expected {"<key>": {"shape": [...], "dtype": "..."}, ...}')
        if not isinstance(raw["schema"], dict):
            raise SpecError(f"schema: expected an object of keys, got {_show(raw['schema'])}")
        schema = {}
        for key, entry in raw["schema"].items():
            where = f"schema key {key!r}"
            if key == COMPLETED:
                raise SpecError(f"{where}: this name is the store's own record of complete rows; rename the key")
            if not isinstance(entry, dict):
                raise SpecError(f'{where}: expected {{"shape": [...], "dtype": "..."}}, got {_show(entry)}')
            _refuse_unknown(entry, _ENTRY, f"{where}, ")
            for name in ("shape", "dtype"):
                if name not in entry:
                    raise SpecError(f"{where}: {name} is missing")
            if not isinstance(entry["shape"], list):
                raise SpecError(
                    f"{where}, shape: expected a list of ints >= 0, got {_show(entry['shape'])}; a scalar row has []"
                )
            schema[key] = Field(
                key,
                tuple(entry["shape"]),
                entry["dtype"],
                **{k: v for k, v in entry.items() if k not in ("shape", "dtype")},
            )
        design = raw.get("design")
        if design is not None:
            if not isinstance(design, list) or not design or not all(isinstance(b, dict) for b in design):
                raise SpecError(f"design: expected a list of blocks (objects), got {_show(design)}")
            design = tuple(design)
        if "num_models" in raw and raw["num_models"] is None:
            raise SpecError("num_models: expected an int >= 1, got None")
        return cls(raw.get("num_models"), schema, design, measurements_of(raw))

    @classmethod
    def load(cls, path: str | Path) -> Spec:
        """The spec in a JSON file; a `SpecError` names the file, and the line and column of a JSON mistake."""
        path = Path(path)
        raw = read_json(path)
        try:
            return cls.from_json(raw)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The spec as it is stored; `Spec.from_json` of it is this spec."""
        out: dict[str, Any] = {
            "format": FORMAT,
            "num_models": self.num_models,
            "schema": {key: field.to_json() for key, field in self.schema.items()},
        }
        if self.measurements is not None:
            out["measurements"] = {
                name: list(given) if isinstance(given, tuple) else given for name, given in self.measurements.items()
            }
        if self.design is not None:
            out["design"] = [dict(block) for block in self.design]
        return out

    def with_rows(self, num_models: int, design: Sequence[Mapping[str, Any]] | None) -> Spec:
        """This spec with its rows counted and its design resolved."""
        return replace(self, num_models=num_models, design=None if design is None else tuple(design))


def measurements_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `measurements` of a parsed spec, {"names": (...), "on": (...), "samples": int}, or None where it has none.

    The last two where they are given. `SpecError`."""
    if "measurements" not in raw:
        return None
    given, form = raw["measurements"], '{"names": ["default", ...], "on": ["digits/test", ...], "samples": 5}'
    if not isinstance(given, dict):
        raise SpecError(f"measurements: expected {form}, got {_show(given)}")
    _refuse_unknown(given, _MEASUREMENTS, "measurements, ")
    if "names" not in given:
        raise SpecError(f"measurements: names is missing; expected {form}")
    found: dict[str, Any] = {}
    for name, words in given.items():
        if name == "samples":
            if type(words) is not int or words < 1:
                raise SpecError(f"measurements, samples: expected an int >= 1, got {_show(words)}; as in {form}")
            found[name] = words
            continue
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise SpecError(f"measurements, {name}: expected a list of names, got {_show(words)}; as in {form}")
        if len(set(words)) < len(words):
            raise SpecError(f"measurements, {name}: a name stands there twice: {_show(words)}")
        found[name] = tuple(words)
    return found


def _refuse_unknown(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in known:
            raise SpecError(f"{where}unknown key {key!r}{nearest(key, known)}")


def read_json(path: Path) -> Any:
    """Parsed JSON of a file. `SpecError` for a missing file, a syntax error, a name twice in one object, or a number
    that is not finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise SpecError(f"{path}: the name {key!r} stands twice in one object; remove one")
            seen[key] = value
        return seen

    def constant(text: str) -> None:
        raise SpecError(f"{path}: {text} is not JSON; write a number")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise SpecError(f"{path}: {text} is beyond the largest float64; write a smaller number")
        return number

    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_float=finite
        )
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; name a spec in JSON") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise SpecError(f"{path}, line {error.lineno}, column {error.colno}: {json_mistake(error)}") from None
    except (ValueError, RecursionError) as error:  # an int of thousands of digits; thousands of brackets
        raise SpecError(f"{path}: cannot be read as JSON ({error})") from None

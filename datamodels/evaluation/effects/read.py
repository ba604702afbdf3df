"""The columns of a store that are properties, and those that are benefits, of models that have all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from datamodels.errors import DatamodelsError
from datamodels.spec import nearest
from datamodels.store import Store

TRUSTED = "_trusted"  # 1 or 0: what the estimator itself says of a value
DIAGNOSTICS = (TRUSTED, "_se", "_rhat", "_acceptance", "_step_bias", "_n", "_nbeta")


@dataclass(frozen=True, eq=False)
class Table:
    """x (n, p) and y (n, T), float64, of models `rows`; `groups` (n,) tells models of the same choices.

    left_out: what is not in it, and why.  notes: what a reader must know of what is.
    """

    x: np.ndarray
    y: np.ndarray
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    rows: np.ndarray
    groups: np.ndarray
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read(store: Store, properties: Sequence[str] = (), benefits: Sequence[str] = ()) -> Table:
    """Properties and benefits of a store's complete rows.

    `properties` and `benefits` are keys or patterns (`digits_train_*`); by default the keys with these roles. Only by
    its whole name is a key taken that has no role, such as a time, or that describes an estimate: beside `K_trusted`
    those are K with one of DIAGNOSTICS. A key that half of the rows or more lack is left out, and then the rows that
    lack one of the others; so are columns that are the same in all rows. Raises DatamodelsError where nothing is left,
    and StoreError for damaged rows.
    """
    rows = np.flatnonzero(store.completed())
    if not len(rows):
        raise DatamodelsError(f"{store.path}: no row is complete yet")
    sides = [_keys(store, given, role) for given, role in ((properties, "property"), (benefits, "benefit"))]
    both = [key for key in sides[0] if key in sides[1]]
    if both:
        raise DatamodelsError(f"{', '.join(both)}: stands among the properties and among the benefits; choose one")
    left_out = []
    there = {key: _there(store, key, rows) for side in sides for key in side}
    for side in sides:
        for key in list(side):
            if there[key].sum() * 2 <= len(rows):
                left_out.append(f"{key}: {int((~there[key]).sum())} of {len(rows)} rows do not have it")
                side.remove(key)
    if not all(sides):
        raise DatamodelsError(f"{store.path}: no property, or no benefit, that most rows have: {'; '.join(left_out)}")
    whole = np.logical_and.reduce([there[key] for side in sides for key in side])
    for row in rows[~whole].tolist():
        missing = [key for side in sides for key in side if not there[key][np.searchsorted(rows, row)]]
        left_out.append(f"row {row}: has no {', '.join(missing)}")
    rows = rows[whole]
    tables, names = [], []
    for side in sides:
        values, found = _columns(store, side, rows)
        same = np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(axis=0, initial=0.0) if len(values) else []
        left_out += [f"{name}: the same in all rows" for name, flag in zip(found, same, strict=True) if flag]
        tables.append(values[:, ~np.array(same, bool)])
        names.append(tuple(name for name, flag in zip(found, same, strict=True) if not flag))
    if not all(names):
        raise DatamodelsError(
            f"{store.path}: nothing varies among the properties, or the benefits, of {len(rows)} rows"
        )
    choices = [repr(sorted(store.design.assignment(row, with_mask=False).choices.items())) for row in rows.tolist()]
    groups = np.unique(choices, return_inverse=True)[1] if any(c != "[]" for c in choices) else np.arange(len(rows))
    notes = [note for side in sides for key in side for note in _not_trusted(store, key, rows)]
    return Table(tables[0], tables[1], names[0], names[1], rows, groups, tuple(left_out), tuple(notes))


def _keys(store: Store, given: Sequence[str], role: str) -> list[str]:
    schema = store.spec.schema
    numbers = [key for key, field in schema.items() if field.value_dtype.kind in "biuf"]
    of_models = [key for key in numbers if schema[key].role is not None and not _is_diagnostic(key, schema)]
    if not given:
        found = [key for key in of_models if schema[key].role == role]
        if not found:
            raise DatamodelsError(f"{store.path}: no key has the role {role}; name some with --properties, --benefits")
        return found
    found = []
    for pattern in given:
        matching = [pattern] if pattern in numbers else [key for key in of_models if fnmatchcase(key, pattern)]
        if not matching:
            others = [key for key in numbers if fnmatchcase(key, pattern)]
            if others:
                raise DatamodelsError(
                    f"{store.path}: {pattern!r} is the pattern only of keys without a role, or that describe an "
                    f"estimate ({', '.join(others)}); such a key is taken by its whole name"
                )
            raise DatamodelsError(f"{store.path}: no number is called {pattern!r}{nearest(pattern, numbers)}")
        found += [key for key in matching if key not in found]
    return found


def _is_diagnostic(key: str, schema: Collection[str]) -> bool:
    """Whether it describes how an estimate came to be, and not the model."""
    return any(key.endswith(end) and key.removesuffix(end) + TRUSTED in schema for end in DIAGNOSTICS)


def _not_trusted(store: Store, key: str, rows: np.ndarray) -> list[str]:
    verdict = key + TRUSTED
    if verdict not in store.spec.schema:
        return []
    known = rows[_there(store, verdict, rows)]
    doubtful = int((store.rows(verdict, known) == 0).sum())
    return [f"{doubtful} of {len(rows)} values of {key} are not trusted"] if doubtful else []


def _there(store: Store, key: str, rows: np.ndarray) -> np.ndarray:
    """Which of the rows have a finite value; (len(rows),), bool."""
    there = store.having(key, rows.tolist())
    if there.any():
        values = store.rows(key, rows[there]).astype(np.float64).reshape(int(there.sum()), -1)
        there[there] = np.isfinite(values).all(axis=1)
    return there


def _columns(store: Store, keys: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    tables, names = [], []
    for key in keys:
        values = store.rows(key, rows).astype(np.float64)
        names += [key] if values.ndim == 1 else [f"{key}{list(place)}" for place in np.ndindex(values.shape[1:])]
        tables.append(values.reshape(len(rows), -1))
    return np.hstack(tables), names

"""Which rows of a store are meant, said in text: `lr=0.1`, `depth>=3`, `backbone=vit_s|vit_b`, `0-99`.

So that kinds of rows can be given to workers with different resources. Conditions are those of a design's filter,
[factor, op, value], and are data: nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datamodels.design import OPERATORS, Design
from datamodels.errors import ConfigError
from datamodels.spec import nearest

_CONDITION = re.compile(r"(\w+)\s*(==|!=|<=|>=|=|<|>)\s*(.*)", re.DOTALL)
_RANGE = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")
_SHOWN = 12


def select(design: Design, items: Sequence[str], *, where: str = "--worker.rows") -> np.ndarray:
    """Rows that fulfil all conditions and, where there are ranges `a-b` (both included), stand in one; bool (rows,).

    A row whose block does not have a factor is not equal to any of its levels: `f!=x` is every row but those of `f=x`.
    Raises `ConfigError`, beginning with `where`, for a factor or level that the design does not have, naming those
    that it has, and where no row is left.
    """
    conditions, ranges = [], []
    for item in map(str.strip, items):
        if span := _RANGE.fullmatch(item):
            ranges.append(_span(span, design.num_models, f"{where}: {item!r}"))
        elif condition := _CONDITION.fullmatch(item):
            conditions.append(_condition(design, *condition.groups(), where=f"{where}: {item!r}"))
        else:
            raise ConfigError(
                f"{where}: expected conditions and rows as in lr=0.1,depth>=3,backbone=vit_s|vit_b,0-99, got {item!r}"
            )
    kept = [[all(keep(cell) for keep in conditions) for cell in block.cells] for block in design.blocks]
    rows = np.concatenate(
        [np.repeat(flags, block.masks * block.repeats) for flags, block in zip(kept, design.blocks, strict=True)]
    )
    if ranges:
        inside = np.zeros(design.num_models, bool)
        for span_ in ranges:
            inside[span_] = True
        rows &= inside
    if not rows.any():
        raise ConfigError(f"{where}: no row of the store is {' and '.join(items)}; loosen it")
    return rows


def _span(match: re.Match[str], num_models: int, where: str) -> slice:
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < num_models:
        raise ConfigError(f"{where}: expected rows as in 0-99, ascending and in [0, {num_models})")
    return slice(first, last + 1)


def _condition(
    design: Design, factor: str, symbol: str, text: str, *, where: str
) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a cell fulfils `factor symbol text`."""
    if factor not in design.factors:
        known = nearest(factor, design.factors) if design.factors else "; the design of this store has no factors"
        raise ConfigError(f"{where}: {factor!r} is not a factor{known}")
    levels = list(dict.fromkeys(cell[factor] for block in design.blocks for cell in block.cells if factor in cell))
    words = [word.strip() for word in text.split("|")]
    if symbol in ("=", "==", "!="):
        for word in words:
            if not any(_is(level, word) for level in levels):
                raise ConfigError(f"{where}: {factor} has no level {word!r}; it has {_some(levels)}")
        equal = symbol != "!="
        return lambda cell: (factor in cell and any(_is(cell[factor], word) for word in words)) is equal
    numbers = [level for level in levels if not isinstance(level, (str, bool))]
    try:
        bound = float(text)
    except ValueError:
        bound = None
    if bound is None or len(numbers) < len(levels):
        raise ConfigError(f"{where}: {symbol} compares numbers; {factor} has the levels {_some(levels)}")
    return lambda cell: factor in cell and bool(OPERATORS[symbol](cell[factor], bound))


def _is(level: Any, word: str) -> bool:
    """Whether a word on the command line means this level."""
    if isinstance(level, bool):
        return word.lower() == str(level).lower()
    if isinstance(level, str):
        return word == level
    try:
        return bool(float(word) == level)
    except ValueError:
        return False


def _some(levels: Iterable[Any]) -> str:
    words = [str(level).lower() if isinstance(level, bool) else str(level) for level in levels]
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")

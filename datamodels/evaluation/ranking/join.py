"""Scores and what fine-tuning reached, side by side: joined on model and data set, with nothing dropped unsaid."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import RankingError
from datamodels.evaluation.ranking.scores import (
    ALL,
    FINE_TUNED,
    NO_SAMPLES,
    Grid,
    Scores,
    as_number,
    in_words,
    sizes,
    some,
)
from datamodels.spec import nearest

_UNMATCHED = 6  # names that are listed one by one


@dataclass(frozen=True, eq=False)
class Joined:
    """M models on D data sets: scores name -> (M, D) and what fine-tuning reached, (M, D); NaN where there is none.

    n_samples: what the scores were computed from, None where nothing says.  spreads: as in `Grid`.  seeds: (fewest,
    most) seeds of a score, and of an actual performance.  notes: what a reader must know of the join.  how: as in
    `Grid`.
    """

    where: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    scores: Mapping[str, np.ndarray]
    actual: np.ndarray
    actual_spread: np.ndarray
    actual_name: str
    n_samples: int | None
    seeds: tuple[int, int]
    actual_seeds: tuple[int, int]
    notes: tuple[str, ...] = ()
    how: str = FINE_TUNED


def chosen_samples(scores: Scores, n_samples: int | None) -> int | None:
    """The number of samples to rank by: the one asked for, else the largest; None where nothing says.

    RankingError for one that nothing was measured with.
    """
    levels = sizes(scores.n_samples)
    if n_samples is None:
        return levels[-1] if levels else None
    if n_samples not in levels:
        known = f"it has {some(levels)}" if levels else "nothing there says how many samples were used"
        raise RankingError(f"{scores.where}: nothing was measured with n_samples {n_samples}; {known}")
    return n_samples


def at_samples(scores: Scores, n_samples: int | None) -> Scores:
    """The lines of that many samples, and those of which nothing says how many there were."""
    return scores.take(
        (scores.n_samples == (NO_SAMPLES if n_samples is None else n_samples)) | (scores.n_samples == NO_SAMPLES)
    )


def join(
    scores: Scores,
    actual: Grid,
    *,
    n_samples: int | None = None,
    metrics: Sequence[str] = (),
    datasets: Sequence[str] = (),
    allow_unmatched: bool = False,
    notes: Sequence[str] = (),
) -> Joined:
    """Scores at one number of samples (the largest where none is given), beside the performances of `actual`.

    `metrics` are measurements or sums of them, as in `combined`; where none are given, all but the performance itself.
    RankingError where models or data sets do not match, with the nearest names, unless `allow_unmatched`: then they are
    left out and noted.
    """
    (name,) = actual.values
    size = chosen_samples(scores, n_samples)
    lines = at_samples(scores, size)
    if size is not None:  # lines without a number of samples may hold the fine-tuned rows of the same store
        lines = Scores(**{**vars(lines), "n_samples": np.full(len(lines.models), size)})
    default = [metric for metric in scores.metrics() if metric != name]
    wanted = [parse(expression, scores) for expression in metrics or default]
    parts = dict.fromkeys(part for terms in wanted for _, part in terms)
    there = np.any([~np.isnan(lines.values[part]) for part in parts], axis=0)
    lines = lines.take(there)
    if not there.any():
        raise RankingError(f"{scores.where}: no line at n_samples {size} holds a number of {some(parts)}")
    grid = lines.mean()
    left_out = _unmatched(scores, grid, actual, datasets, size, allow_unmatched)
    models = tuple(model for model in grid.models if model in actual.models)
    names = tuple(d for d in grid.datasets if d in actual.datasets and (not datasets or d in datasets))
    rows, columns = [grid.models.index(m) for m in models], [grid.datasets.index(d) for d in names]
    cut = {part: grid.values[part][np.ix_(rows, columns)] for part in parts}
    reached = np.ix_([actual.models.index(m) for m in models], [actual.datasets.index(d) for d in names])
    seeds = np.concatenate([grid.seeds[part][np.ix_(rows, columns)].ravel() for part in parts])
    finite = np.isfinite(actual.values[name][reached])
    return Joined(
        scores.where,
        models,
        names,
        {show(terms): combined(terms, cut) for terms in wanted},
        actual.values[name][reached],
        actual.spreads[name][reached],
        name,
        size,
        (int(seeds[seeds > 0].min()), int(seeds.max())),
        (int(actual.seeds[name][reached][finite].min()), int(actual.seeds[name][reached].max())),
        (*notes, *_incomplete(scores), *left_out, *_infinite(wanted, cut, models, names)),
        actual.how,
    )


def actual_of(
    scores: Scores, name: str, split: str | None = None, *, how: str = FINE_TUNED
) -> tuple[Grid, tuple[str, ...]]:
    """What fine-tuning reached, as measured under `name`, averaged over seeds, and notes on what was chosen.

    Of several splits it is `split`, or `test` where none is given; of several numbers of samples the largest.
    """
    scores.known(name)
    lines = scores.take(np.isfinite(scores.values[name]))
    if not len(lines.models):
        raise RankingError(f"{scores.where}: no complete line holds a number of {name!r}; run the fine-tuning first")
    notes = []
    splits = np.unique(lines.splits).tolist()
    if split is not None:
        lines = lines.of(splits=split)
    elif len(splits) > 1 and "test" in splits:
        lines = lines.of(splits="test")
        notes.append(f"{name} is that on the test split, out of {some(splits)}")
    elif len(splits) > 1:
        raise RankingError(f"{scores.where}: {name!r} was measured on {some(splits)}; choose with --actual_split")
    levels = sizes(lines.n_samples)
    if len(np.unique(lines.n_samples)) > 1:
        lines = lines.of(n_samples=levels[-1])
        notes.append(f"{name} is that at n_samples {in_words(levels[-1])}, out of {some(levels)}")
    grid = lines.mean()
    values, spreads, seeds = ({name: each[name]} for each in (grid.values, grid.spreads, grid.seeds))
    return Grid(grid.where, grid.models, grid.datasets, values, spreads, seeds, how), tuple(notes)


def from_mapping(where: str, raw: Mapping[str, Any], name: str, datasets: Sequence[str]) -> Grid:
    """Performances from {model: number}, or from {data set: {model: number}}; `datasets` are those of the scores.

    RankingError where an entry is not a number, or where several data sets are ranked and the file tells none apart.
    """
    if not isinstance(raw, dict) or not raw:
        raise RankingError(f"{where}: expected model: accuracy, or data set: {{model: accuracy}}; got {raw!r}")
    nested = [isinstance(value, dict) for value in raw.values()]
    if any(nested) and not all(nested):
        odd = next(key for key, deep in zip(raw, nested, strict=True) if not deep)
        raise RankingError(f"{where}: some entries are data sets and {odd!r} is a number; write all of them one way")
    if not any(nested):
        if len(datasets) > 1:
            inner = json.dumps(dict([next(iter(raw.items()))]), default=str)[:-1] + (", …}" if len(raw) > 1 else "}")
            form = ", ".join(f"{json.dumps(name)}: {inner if i == 0 else '{…}'}" for i, name in enumerate(datasets))
            raise RankingError(
                f"{where}: it says how good each model is and not on which data set, and {len(datasets)} are ranked "
                f"({some(datasets)}); write {{{form}}} in it, or choose one with --datasets={datasets[0]}"
            )
        raw = {datasets[0]: raw}
    models = tuple(dict.fromkeys(str(model) for inner in raw.values() for model in inner))
    values = np.full((len(models), len(raw)), np.nan)
    for column, (dataset, inner) in enumerate(raw.items()):
        for model, number in inner.items():
            plain = None if isinstance(number, bool) else as_number(number)  # to YAML 1.1 2.3e7 is text
            if plain is None or not np.isfinite(plain):
                raise RankingError(f"{where}: {dataset}, {model}: expected a number, got {number!r}")
            values[models.index(str(model)), column] = plain
    single = np.isfinite(values).astype(int)
    return Grid(
        where, models, tuple(map(str, raw)), {name: values}, {name: np.full(values.shape, np.nan)}, {name: single}
    )


def from_yaml(path: str | Path, name: str, datasets: Sequence[str]) -> Grid:
    """`from_mapping` of a YAML or JSON file."""
    return from_mapping(str(path), _yaml(path), name, datasets)


def with_parameters(scores: Scores, path: str | Path) -> Scores:
    """The scores with `num_params` from a YAML or JSON file {model: number}; RankingError unless it has every model."""
    numbers = _yaml(path)
    grid = from_mapping(str(path), numbers, "num_params", [ALL])
    missing = [model for model in dict.fromkeys(scores.models.tolist()) if model not in grid.models]
    if missing or len(grid.datasets) > 1:
        listed = "; ".join(_with_nearest(name, grid.models) for name in missing[:_UNMATCHED])
        raise RankingError(
            f"{path}: expected model: number of parameters for every model; missing: {listed or 'a flat list'}"
        )
    column = dict(zip(grid.models, grid.values["num_params"][:, 0], strict=True))
    return Scores(
        **{**vars(scores), "values": {**scores.values, "num_params": np.array([column[m] for m in scores.models])}}
    )


def _yaml(path: str | Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RankingError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except yaml.YAMLError as error:
        raise RankingError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


# --------------------------------------------------------------------------------------- sums of z-scores

Terms = tuple[tuple[int, str], ...]


def parse(expression: str, scores: Scores) -> Terms:
    """`log_me+num_params`, `-sharpness`: signs and measurements. RankingError for what is no measurement.

    Names are recognised whole, so that one may hold a sign itself.
    """
    names = sorted(scores.values, key=len, reverse=True)
    token = re.compile(rf"\s*([+-]?)\s*({'|'.join(map(re.escape, names))})\s*(?=[+-]|$)")
    terms: list[tuple[int, str]] = []
    at = 0
    while at < len(expression) or not terms:
        match = token.match(expression, at)
        if match is None or (terms and not match[1]):
            word = re.split(r"\s*\+\s*", expression[at:].strip().lstrip("+- "))[0]
            raise RankingError(f"{scores.where}: no measurement {word!r}{nearest(word, scores.values)}")
        terms.append((-1 if match[1] == "-" else 1, match[2]))
        at = match.end()
    return tuple(terms)


def show(terms: Terms) -> str:
    """The terms as one writes them."""
    text = "".join(("-" if sign < 0 else "+") + name for sign, name in terms)
    return text.removeprefix("+")


def combined(terms: Terms, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """(M, D): one measurement with its sign as it is, or of several the sum of their z-scores.

    z is taken in each data set over the models of which all terms are finite, the others having no sum; a term that is
    the same for all of them adds 0. An infinity that stands alone is kept: it ranks above or below all numbers.
    """
    if len(terms) == 1:
        ((sign, name),) = terms
        return sign * values[name]
    usable = np.all([np.isfinite(values[name]) for _, name in terms], axis=0)
    total = np.where(usable, 0.0, np.nan)
    for sign, name in terms:
        for column in range(total.shape[1]):
            rows = usable[:, column]
            part = values[name][rows, column]
            if len(part) and part.min() < part.max():
                total[rows, column] += sign * (part - part.mean()) / part.std()
    return total


def _infinite(
    wanted: Sequence[Terms], values: Mapping[str, np.ndarray], models: Sequence[str], datasets: Sequence[str]
) -> list[str]:
    """Which models have no sum because a term is infinite."""
    notes = []
    for terms in wanted:
        for _, name in dict.fromkeys(terms) if len(terms) > 1 else ():
            for d, dataset in enumerate(datasets):
                which = [models[m] for m in np.flatnonzero(np.isinf(values[name][:, d])).tolist()]
                if which:
                    notes.append(f"{show(terms)}: no sum for {some(which)} on {dataset}, where {name} is infinite")
    return notes


# -------------------------------------------------------------------------------------- names that do not join


def _incomplete(scores: Scores) -> list[str]:
    rows, plural = scores.incomplete, scores.incomplete > 1
    return [f"{rows} row{'s' * plural} of {scores.where} {'are' if plural else 'is'} not complete"] if rows else []


def _unmatched(
    scores: Scores, grid: Grid, actual: Grid, datasets: Sequence[str], size: int | None, allowed: bool
) -> tuple[str, ...]:
    """Notes on what is left out of the join; RankingError unless that is allowed, or where nothing is left."""
    wanted = [d for d in grid.datasets if not datasets or d in datasets]
    for name in datasets:
        if name not in grid.datasets:
            raise RankingError(f"{scores.where}: no data set {name!r}{nearest(name, grid.datasets)}")
    problems = []
    for kind, ours, theirs in (
        ("data set", wanted, [d for d in actual.datasets if not datasets or d in datasets]),
        ("model", grid.models, actual.models),
    ):
        for here, there, mine, other in (
            (ours, theirs, grid.where, actual.where),
            (theirs, ours, actual.where, grid.where),
        ):
            alone = [name for name in here if name not in there]
            if alone:
                listed = "; ".join(_with_nearest(name, there) for name in alone[:_UNMATCHED])
                more = f"; and {len(alone) - _UNMATCHED} more" if len(alone) > _UNMATCHED else ""
                problems.append(
                    f"{len(alone)} {kind}{'s' if len(alone) > 1 else ''} of {mine} {'are' if len(alone) > 1 else 'is'} "
                    f"not in {other}: {listed}{more}"
                )
    none_left = not set(wanted) & set(actual.datasets) or not set(grid.models) & set(actual.models)
    if problems and (none_left or not allowed):
        at = f" at n_samples {in_words(size)}" if size is not None else ""
        advice = (
            "nothing is left to rank; give both the same names"
            if none_left
            else "give both the same names, or rank what joins with --allow_unmatched"
        )
        raise RankingError(f"scores{at} and actual performances do not join: {'. '.join(problems)}. So {advice}")
    return tuple(f"left out: {problem}" for problem in problems)


def _with_nearest(name: str, known: Sequence[str]) -> str:
    short = {other.rsplit("/", 1)[-1].lower(): other for other in reversed(known)}
    last = name.rsplit("/", 1)[-1].lower()
    near = [short[last]] if last in short else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name!r} (nearest {near[0]!r})" if near else f"{name!r}"

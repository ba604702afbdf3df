"""A ranking as a table that a person reads, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datamodels.evaluation.ranking.interval import Estimate
from datamodels.evaluation.ranking.rank import Judged, Ranking
from datamodels.evaluation.ranking.scores import FINE_TUNED, in_words, short_names, some

MARK = "*"
_TITLES = {"tau": "Kendall's tau", "weighted_tau": "weighted tau", "spearman": "Spearman", "pearson": "Pearson"}
_WIDTH = 110
_FEW = 10
Column = tuple[str, Callable[[Judged], str]]


def lines(ranking: Ranking) -> list[str]:
    """The ranking in words: what was joined, two tables in the order of tau, and how to read them."""
    joined = ranking.joined
    tuned = joined.how == FINE_TUNED
    how_many = f"only the {ranking.ks[0]}" if len(ranking.ks) == 1 else "only the k"
    return [
        *_wrapped(heading(ranking)),
        "",
        *_wrapped(
            f"How the scores order the models: 1 as {'fine-tuning' if tuned else joined.actual_name} does, 0 "
            f"unrelated. {MARK} is the baseline."
        ),
        "",
        *_table(ranking, _correlations()),
        "",
        *_wrapped(
            f"What it costs to {'fine-tune' if tuned else 'take'} {how_many} models with the highest scores. "
            f"regret@k: share of the best {joined.actual_name} of all models that is lost; hit@k: how often the best "
            f"model is among them."
        ),
        "",
        *_table(ranking, _losses(ranking)),
        "",
        *_best(ranking),
        *notes(ranking),
    ]


def heading(ranking: Ranking) -> str:
    """What was ranked, in a line."""
    joined = ranking.joined
    where = joined.datasets[0] if len(joined.datasets) == 1 else f"{len(joined.datasets)} data sets"
    samples = f", scores from {in_words(joined.n_samples)} samples" if joined.n_samples is not None else ""
    return (
        f"{len(joined.models)} models on {where}{samples} ({_seeds(joined.seeds)}), against {joined.actual_name} "
        f"{joined.how} ({_seeds(joined.actual_seeds)})"
    )


def notes(ranking: Ranking) -> list[str]:
    """What the intervals are of, and all that was left out."""
    joined = ranking.joined
    models, datasets = len(joined.models), len(joined.datasets)
    over = (
        f"{models} models, and say nothing of other data sets"
        if datasets == 1
        else f"{models} models and {datasets} data sets"
    )
    few = f" With fewer than {_FEW} models expect little of them." if models < _FEW else ""
    found = [f"[low, high]: {ranking.level:.0%} bootstrap intervals over {over}.{few}"]
    found += [f"note: {note}" for note in joined.notes]
    short = short_names(joined.models)
    for d, dataset in enumerate(joined.datasets):
        if unknown := [short[m] for m, a in zip(joined.models, joined.actual[:, d], strict=True) if not np.isfinite(a)]:
            found.append(f"note: {joined.actual_name} is not known of {some(unknown)} on {dataset}: left out there")
    for row in ranking.rows:
        if lacking := [d for d in row.used if d.missing]:
            which = "; ".join(f"{some(short[m] for m in d.missing)} on {d.dataset}" for d in lacking)
            found.append(
                f"note: {row.metric} lacks {which}: its correlations are of the other models; it cannot choose these, "
                f"which count where they are the best"
            )
        if beyond := [d for d in row.used if d.infinite]:
            which = "; ".join(f"{some(short[m] for m in d.infinite)} on {d.dataset}" for d in beyond)
            found.append(f"note: {row.metric} is infinite for {which}: ranks, which Pearson's correlation leaves out")
        found += [f"note: {row.metric}: {d.dataset} does not count: {d.left_out}" for d in row.datasets if d.left_out]
    return [line for note in found for line in _wrapped(note)]


def _correlations() -> list[Column]:
    def column(name: str) -> Column:
        return _TITLES[name], lambda row: _number(row.estimates[name], "{:.2f}")

    return [column(name) for name in _TITLES]


def _losses(ranking: Ranking) -> list[Column]:
    def column(name: str, form: str) -> Column:
        return f"{name}, %", lambda row: _number(row.estimates[name].times(100), form)

    joined, baseline = ranking.joined, next(row.metric for row in ranking.rows if row.baseline)
    columns = [
        column(f"{what}@{k}", form) for what, form in (("regret", "{:.1f}"), ("hit", "{:.0f}")) for k in ranking.ks
    ]
    columns.append((f"tau above {baseline}", lambda row: _number(row.difference, "{:+.2f}")))
    if len(joined.datasets) == 1:
        short = short_names(joined.models)
        columns.append(("chooses", lambda row: _or([short[name] for name in row.datasets[0].chosen])))
    return columns


def _best(ranking: Ranking) -> list[str]:
    """What the tables come to."""
    judged = [row for row in ranking.rows if row.used]
    first, baseline = judged[0], next(row for row in ranking.rows if row.baseline)
    text = f"Highest tau: {first.metric}, {first.estimates['tau'].value:.2f}"
    if first.difference is not None and np.isfinite(first.difference.value):
        clear = first.difference.low > 0
        text += f"; more than {baseline.metric}, " + ("beyond chance" if clear else "which may be chance")
    name = f"regret@{ranking.ks[0]}"
    regrets = {row.metric: _by_dataset(row, name) for row in judged if _by_dataset(row, name)}
    alike = set.intersection(*map(set, regrets.values())) if regrets else set()
    means = {metric: float(np.mean([found[d] for d in sorted(alike)])) for metric, found in regrets.items() if alike}
    least = [metric for metric, value in means.items() if value == min(means.values())]
    every = set().union(*regrets.values())
    over = "" if alike == every else f" on {some(sorted(alike))}, which all scores have"
    return _wrapped(f"{text}. Lowest {name}{over}: {_or(least)}." if least else f"{text}.")


def _by_dataset(row: Judged, name: str) -> dict[str, float]:
    """A statistic by data set, of those where it is a number."""
    return {d.dataset: d.values[name] for d in row.used if d.values and np.isfinite(d.values[name])}


def as_json(ranking: Ranking) -> dict[str, Any]:
    """All of it, by names; what is missing is null."""
    joined = ranking.joined
    return {
        "models": list(joined.models),
        "datasets": list(joined.datasets),
        "n_samples": joined.n_samples,
        "actual": joined.actual_name,
        "actual_is": f"{joined.actual_name} {joined.how}",
        "seeds": list(joined.seeds),
        "actual_seeds": list(joined.actual_seeds),
        "level": ranking.level,
        "draws": ranking.draws,
        "seed": ranking.seed,
        "scores": [_row(row) for row in ranking.rows],
        "notes": list(joined.notes),
    }


def _row(row: Judged) -> dict[str, Any]:
    return {
        "score": row.metric,
        "baseline": row.baseline,
        **{name: _parts(estimate) for name, estimate in row.estimates.items()},
        "tau_minus_baseline": None if row.difference is None else _parts(row.difference),
        "datasets": [
            {
                "dataset": d.dataset,
                "models": d.models,
                "left_out": d.left_out or None,
                "missing": list(d.missing),
                "infinite": list(d.infinite),
                "best": d.best or None,
                "best_reached": _or_null(d.best_reached),
                "chosen": list(d.chosen),
                "chosen_reached": _or_null(d.chosen_reached),
                **{name: _or_null(value) for name, value in (d.values or {}).items()},
            }
            for d in row.datasets
        ],
    }


def _parts(estimate: Estimate) -> dict[str, float | None]:
    return {name: _or_null(getattr(estimate, name)) for name in ("value", "low", "high")}


def _or_null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _table(ranking: Ranking, columns: Sequence[Column]) -> list[str]:
    cells = [["", *(title for title, _ in columns)]]
    cells += [
        [f"{MARK if row.baseline else ' '} {row.metric}", *(of(row) for _, of in columns)] for row in ranking.rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def _number(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    if not np.isfinite(estimate.value):
        return "-"
    numbers = (estimate.value, estimate.low, estimate.high)
    value, low, high = (form.format(number + 0.0).replace("-", "\N{MINUS SIGN}") for number in numbers)
    return f"{value} [{low}, {high}]"


def _seeds(seeds: tuple[int, int]) -> str:
    few, many = seeds
    return f"{many} seed{'s' if many > 1 else ''}" if few == many else f"{few} to {many} seeds"


def _or(names: Sequence[str]) -> str:
    return " or ".join(names[:3]) + (f" or {len(names) - 3} more" if len(names) > 3 else "")

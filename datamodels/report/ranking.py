"""The pictures of a ranking: do scores settle, do they go with what fine-tuning reached, and how sure is that."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.errors import RankingError
from datamodels.evaluation.ranking.scores import ALL_SAMPLES, Grid, Scores, in_words, short_names, sizes, some
from datamodels.report.figures import FAINT, HELPS, HURTS, INK, PIXELS_PER_INCH, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from datamodels.evaluation.ranking.rank import Ranking

GRID = "#e4e4e4"
LONGEST = 24  # characters of a name that may stand beside a point
PANELS = 48  # more in one picture than anybody looks at
_MARKERS = "osD^vPX<>h"


def vs_samples(scores: Scores, *, metrics: Sequence[str] = (), actual: Grid | None = None) -> Figure:
    """Each measurement against the number of samples that it was computed from, a line per model.

    The band, where there are two seeds, is one standard deviation over them to both sides; what is infinite is not
    drawn. A row of panels per measurement, a column per data set; what changes with neither samples nor seeds has none.
    With `actual`, models are coloured and listed in the order of what fine-tuning reached, on average over the data
    sets shown.

    Raises RankingError where there are not two numbers of samples.
    """
    levels = sizes(scores.n_samples)
    if len(levels) < 2:
        raise RankingError(
            f"{scores.where}: against the number of samples one needs two of them, it has {some(levels) or 'none'}"
        )
    grids = [scores.take(scores.n_samples == level).mean() for level in levels]
    datasets = tuple(dict.fromkeys(d for grid in grids for d in grid.datasets))
    models = tuple(dict.fromkeys(m for grid in grids for m in grid.models))
    for name in metrics:
        scores.known(name)
    apart = () if actual is None else actual.values
    names = list(metrics) or [name for name in scores.metrics() if name not in apart and _varies(grids, name)]
    _few_panels(len(names), len(datasets), scores.where)
    reached = {} if actual is None else {model: _mean_reached(actual, model, datasets) for model in models}
    if reached:
        models = tuple(sorted(models, key=lambda model: -np.nan_to_num(reached[model], nan=-np.inf)))

    across, down, panel_wide, panel_high = _arranged(len(names), len(datasets))
    short, short_data = short_names(models), short_names(datasets)
    legend = 0.6 + 0.075 * max(len(short[m]) + 7 * bool(reached) for m in models)
    words_above = [] if actual is None else _reached_in_words(actual, datasets)
    legend = max(legend, 0.3 + 0.062 * max(map(len, words_above), default=0))
    left, right, head, foot, gap_x, gap_y = 0.75, 0.25, 0.95, 0.55, 0.62, 0.5
    width = left + across * panel_wide + (across - 1) * gap_x + right + legend
    height = max(
        head + down * panel_high + (down - 1) * gap_y + foot, head + 0.17 * len(models) + 0.14 * len(words_above) + 0.3
    )

    with style():
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        seeds = max(int(grid.seeds[name].max(initial=0)) for grid in grids for name in names)
        spread_out = any(np.nan_to_num(grid.spreads[name]).max(initial=0) > 0 for grid in grids for name in names)
        line = "Mean over seeds" if seeds > 1 else "A single seed"
        line += (", band: one standard deviation" if spread_out else "") + (
            f"; {short_data[datasets[0]]}" if len(datasets) == 1 else ""
        )
        _title(figure, left, "Do the scores settle as samples are added?", line)
        # "all" stands behind the largest number, for nothing says how many that is.
        places = np.array([level if level != ALL_SAMPLES else 2 * max(*levels, 1) for level in levels], float)
        # Best is darkest: an order that is seen in grey and with every colour blindness; markers tell neighbours apart.
        colours = colormaps["viridis"](np.linspace(0, 0.88, len(models)) if len(models) > 1 else [0.3])
        for panel, (name, dataset) in enumerate(_cells(names, datasets)):
            axes = _panel(figure, panel, across, (left, head, panel_wide, panel_high, gap_x, gap_y))
            for i, model in enumerate(models):
                mean, spread = np.array([_at(grid, name, model, dataset) for grid in grids]).T
                there = np.isfinite(mean)
                at = places[there]
                axes.plot(
                    at, mean[there], color=colours[i], marker=_MARKERS[i % len(_MARKERS)], markersize=4, linewidth=1.4
                )
                axes.fill_between(
                    at, (mean - spread)[there], (mean + spread)[there], color=colours[i], alpha=0.15, linewidth=0
                )
            _frame(axes, name, f", {short_data[dataset]}" if len(datasets) > 1 else "")
            axes.set_xscale("log")
            axes.set_xticks(places, _apart(places, [in_words(level) for level in levels]), size=8)
            axes.minorticks_off()
            if panel + across >= len(names) * len(datasets):
                axes.set_xlabel("samples", color=INK)
        x, y = width - legend + 0.12, height - head + 0.02
        for at, words in enumerate(words_above):
            figure.text(x / width, (y - 0.14 * at) / height, words, size=8, color=FAINT, parse_math=False)
        y -= 0.14 * len(words_above)
        for i, model in enumerate(models):
            y -= 0.17
            figure.add_artist(Line2D([x / width, (x + 0.25) / width], [(y + 0.045) / height] * 2, color=colours[i],
                                     linewidth=1.6, marker=_MARKERS[i % len(_MARKERS)], markersize=4))  # fmt: skip
            known = np.isfinite(reached.get(model, np.nan))
            words = short[model] + (f"  {reached[model]:.3g}" if known else "")
            figure.text((x + 0.33) / width, y / height, words, size=8.5, color=INK, parse_math=False)
    return figure


def vs_actual(ranking: Ranking) -> Figure:
    """Each score against what fine-tuning reached, a named point per model, Kendall's tau above.

    A row of panels per score, a column per data set; those without a point are dropped. Bars are one standard deviation
    of the fine-tuned performance over seeds. Where a short name has more than LONGEST characters, points have numbers
    and a list below says which model each is. Models without a value are missing from a panel, and so are infinite
    scores, of which it says how many. RankingError where no score is a number.
    """
    joined = ranking.joined
    cells = {
        (row.metric, dataset): np.isfinite(joined.scores[row.metric][:, d]) & np.isfinite(joined.actual[:, d])
        for row in ranking.rows
        for d, dataset in enumerate(joined.datasets)
    }
    order = [row.metric for row in ranking.rows if any(cells[row.metric, d].any() for d in joined.datasets)]
    datasets = [d for d in joined.datasets if any(cells[name, d].any() for name in order)]
    if not order:
        raise RankingError(f"{joined.where}: no score is a number, there is nothing to draw")
    _few_panels(len(order), len(datasets), joined.where)
    across, down, panel_wide, panel_high = _arranged(len(order), len(datasets), wide=3.1, high=2.5)
    short, short_data = short_names(joined.models), short_names(joined.datasets)
    numbered = max(map(len, short.values())) > LONGEST
    points = {m: str(i + 1) if numbered else short[m] for i, m in enumerate(joined.models)}
    left, right, head, foot, gap_x, gap_y = 0.8, 0.2, 0.95, 0.6, 0.62, 0.72
    width = left + across * panel_wide + (across - 1) * gap_x + right
    listed = [f"{i + 1}  {short[m]}" for i, m in enumerate(joined.models)] if numbered else []
    entry = 0.35 + 0.068 * max(map(len, listed), default=0)  # inches
    width = max(width, min(left + entry, 14.0))
    abreast = max(1, int((width - left) / entry))
    foot += 0.17 * -(-len(listed) // abreast) + 0.1 * numbered
    line = [] if joined.n_samples is None else [f"scores from {in_words(joined.n_samples)} samples"]
    line += [f"{joined.actual_name} {joined.how}"]
    line[-1] += ", bars: one standard deviation over seeds" if joined.actual_seeds[1] > 1 else ""
    line += [f"on {short_data[datasets[0]]}"] * (len(datasets) == 1 < len(joined.datasets))
    line += [short_data[datasets[0]]] * (len(joined.datasets) == 1)
    dropped = [row.metric for row in ranking.rows if row.metric not in order]
    line += [f"without a number: {some(dropped)}"] * bool(dropped)
    below = _lines("; ".join(line), width - left)
    head += 0.17 * (len(below) - 1)
    height = head + down * panel_high + (down - 1) * gap_y + foot
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        FigureCanvasAgg(figure)  # measures text
        _title(figure, left, f"Scores against {joined.actual_name}", *below)
        row_begun = set()
        for place, (name, dataset) in enumerate(_cells(order, datasets)):
            there = cells[name, dataset]
            if not there.any():
                continue
            axes = _panel(figure, place, across, (left, head, panel_wide, panel_high, gap_x, gap_y))
            d = joined.datasets.index(dataset)
            x, y, spread = joined.scores[name][:, d], joined.actual[:, d], joined.actual_spread[:, d]
            row = ranking[name]
            tau = (row.datasets[d].values or {}).get("tau")
            of = f", {short_data[dataset]}" if len(datasets) > 1 else ""
            _frame(axes, name, of, "" if tau is None else f"τ {_signed(tau)}")
            colour = FAINT if row.baseline else HELPS
            axes.errorbar(x[there], y[there], yerr=np.nan_to_num(spread[there]), fmt="o", color=colour, markersize=5.5,
                          elinewidth=1, markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
            axes.margins(0.16, 0.14)
            if place // across not in row_begun:
                row_begun.add(place // across)
                axes.set_ylabel(joined.actual_name, color=INK)
            axes.locator_params(axis="x", nbins=5)
            if np.abs(x[there]).max(initial=0) >= 1e5:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.tick_params(labelsize=8)
            if beyond := int((np.isinf(x) & np.isfinite(y)).sum()):
                axes.set_xlabel(f"{beyond} not drawn: infinite", color=FAINT, size=8)
            _name_points(
                axes,
                x[there],
                y[there],
                spread[there],
                [points[m] for m, kept in zip(joined.models, there, strict=True) if kept],
            )
        high = -(-len(listed) // abreast)
        for i, words in enumerate(listed):
            x0, y0 = left + i // high * entry, 0.14 + 0.17 * (high - 1 - i % high)
            figure.text(x0 / width, y0 / height, words, size=8, color=INK, parse_math=False)
    return figure


def tau(ranking: Ranking) -> Figure:
    """Kendall's tau of every score with its interval, best first; small dots are single data sets."""
    rows = [row for row in ranking.rows if np.isfinite(row.estimates["tau"].value)]
    joined = ranking.joined
    names = [row.metric + " (baseline)" * row.baseline for row in rows]
    left, wide, right, head, foot, step = 0.35 + 0.08 * max(map(len, names)), 4.6, 1.75, 0.85, 0.6, 0.3
    many = len(joined.datasets) > 1
    over = f"{len(joined.datasets)} data sets" if many else short_names(joined.datasets)[joined.datasets[0]]
    line = f"Kendall's tau with {joined.actual_name} {joined.how}, {len(joined.models)} models, {over}; bars: "
    line += f"{ranking.level:.0%} interval" + ("; dots: single data sets" if many else "")
    width = left + wide + right
    below = _lines(line, width - 0.25)
    head += 0.17 * (len(below) - 1)
    height = head + step * (len(rows) + 0.4) + foot
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        _title(figure, 0.25, "How well do scores rank the models?", *below)
        axes = figure.add_axes((left / width, foot / height, wide / width, (height - head - foot) / height))
        for place, row in enumerate(rows):
            estimate, colour = row.estimates["tau"], HURTS if row.baseline else HELPS
            if row.baseline:
                axes.axvline(estimate.value, color=HURTS, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
            axes.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=1.8, zorder=2)
            axes.plot(estimate.value, place, "D" if row.baseline else "o", color=colour, markersize=7,
                      markeredgecolor="white", markeredgewidth=1, zorder=4)  # fmt: skip
            if many:
                values = [(d.values or {})["tau"] for d in row.used]
                axes.plot(
                    values, np.full(len(values), place + 0.22), ".", color=colour, markersize=4, alpha=0.6, zorder=3
                )
            axes.text(1.02, place, f"{_signed(estimate.value)} [{_signed(estimate.low)}, {_signed(estimate.high)}]",
                      transform=axes.get_yaxis_transform(), va="center", size=8.5, color=INK)  # fmt: skip
        axes.set_yticks(range(len(rows)), names, parse_math=False)
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(HURTS if row.baseline else INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        lowest = min(0.0, *(row.estimates["tau"].low for row in rows))
        axes.set_xlim(max(-1.02, lowest - 0.06), 1.02)
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Kendall's tau", color=INK)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    return figure


# -------------------------------------------------------------------------------------------------- panels


def _few_panels(names: int, datasets: int, where: str) -> None:
    if not names:
        raise RankingError(f"{where}: no measurement changes with the number of samples; name some with --metrics")
    if names * datasets > PANELS:
        raise RankingError(
            f"{where}: {names} scores on {datasets} data sets are {names * datasets} panels, at most {PANELS} fit; "
            f"choose with --metrics and --datasets"
        )


def _arranged(names: int, datasets: int, wide: float = 2.6, high: float = 1.9) -> tuple[int, int, float, float]:
    """Panels across and down, and their size: a column per data set, or of one data set as it fits."""
    if datasets > 1:
        return datasets, names, wide, high
    across = min(names, 3)
    return across, -(-names // across), wide, high


def _cells(names: Sequence[str], datasets: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, dataset) for name in names for dataset in datasets]


def _panel(figure: Figure, place: int, across: int, box: tuple[float, float, float, float, float, float]) -> Axes:
    left, head, wide, high, gap_x, gap_y = box
    down, right = divmod(place, across)
    width, height = figure.get_size_inches()
    bottom = height - head - (down + 1) * high - down * gap_y
    return figure.add_axes(((left + right * (wide + gap_x)) / width, bottom / height, wide / width, high / height))


def _frame(axes: Axes, name: str, of: str = "", beside: str = "") -> None:
    """Grid and title, which is smaller, and its name at last cut, where it would reach what stands at the right."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    axes.set_title(beside, loc="right", size=9.5, color=INK)
    room = axes.get_window_extent().width * 72 / PIXELS_PER_INCH + (-10 if beside else 10)
    room -= TextPath((0, 0), beside, size=9.5).get_extents().width if beside else 0

    def fits(text: str, size: float) -> bool:
        held = text.replace("$", "S")  # which would be mathematics
        return bool(TextPath((0, 0), held, size=size, prop=bold).get_extents().width <= room)

    bold = FontProperties(weight="bold")
    size = next((size for size in (9.5, 8.5, 7.5) if fits(name + of, size)), 7.0)
    shown = name
    while not fits(shown + of, size) and len(shown) > 8:
        shown = shown.removesuffix("…")[:-1] + "…"
    axes.set_title(shown + of, loc="left", size=size, color=INK, weight="bold", parse_math=False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(text: str, width: float) -> list[str]:
    """As many characters as stand below a title of so many inches."""
    return textwrap.wrap(text, max(20, int(width / 0.066)), break_on_hyphens=False)


def _title(figure: Figure, left: float, title: str, *lines: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.3 / height, title, size=12.5, weight="bold", color=INK)
    for i, line in enumerate(lines):
        figure.text(left / width, 1 - (0.52 + 0.17 * i) / height, line, size=9, color=FAINT, parse_math=False)


def _varies(grids: Sequence[Grid], name: str) -> bool:
    """Whether a measurement of any model changes with the number of samples or with the seed."""
    seen: dict[tuple[str, str], float] = {}
    for grid in grids:
        if np.nanmax(np.nan_to_num(grid.spreads[name]), initial=0) > 0:
            return True
        for i, model in enumerate(grid.models):
            for j, dataset in enumerate(grid.datasets):
                value = float(grid.values[name][i, j])
                if np.isfinite(value) and seen.setdefault((model, dataset), value) != value:
                    return True
    return False


def _at(grid: Grid, name: str, model: str, dataset: str) -> tuple[float, float]:
    """Mean and standard deviation of one cell, NaN where there is none."""
    if model not in grid.models or dataset not in grid.datasets:
        return float("nan"), float("nan")
    cell = grid.models.index(model), grid.datasets.index(dataset)
    return float(grid.values[name][cell]), float(grid.spreads[name][cell])


def _mean_reached(actual: Grid, model: str, datasets: Sequence[str]) -> float:
    """What fine-tuning reached on average, NaN where it is not known on all of the data sets."""
    (values,) = actual.values.values()
    if model not in actual.models or not set(datasets) <= set(actual.datasets):
        return float("nan")
    return float(values[actual.models.index(model), [actual.datasets.index(d) for d in datasets]].mean())


def _reached_in_words(actual: Grid, datasets: Sequence[str]) -> list[str]:
    """What the numbers in the legend are, in short lines."""
    (name,) = actual.values
    lines = textwrap.wrap(f"{name} {actual.how}", 30)
    return lines + ["mean over data sets"] * (len(datasets) > 1)


def _apart(places: np.ndarray, words: Sequence[str]) -> list[str]:
    """Labels of a logarithmic axis, without those that would touch the one before."""
    at = np.log(places / places[0]) / np.log(places[-1] / places[0])
    kept, last = [], -np.inf
    for place, word in zip(at, words, strict=True):
        far = place - last > 0.045 * len(word)
        kept.append(word if far else "")
        last = place if far else last
    return kept


def _signed(value: float) -> str:
    return f"{value + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")


# ------------------------------------------------------------------------------------------ names on points


def _name_points(axes: Axes, x: np.ndarray, y: np.ndarray, spread: np.ndarray, names: Sequence[str]) -> None:
    """A name beside each point where it covers no other name, point or bar; a thin line where it is far off."""
    axes.autoscale_view()  # which matplotlib puts off, and with it where the points are
    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    points, ends = (axes.transData.transform(np.stack([x, at], axis=1)) for at in (y, y + np.nan_to_num(spread)))
    inside = axes.get_window_extent(renderer)
    dot, bar = 4.5 * PIXELS_PER_INCH / 72, 2.0
    taken = [(px - dot, py - dot, px + dot, py + dot) for px, py in points]
    taken += [(px - bar, 2 * py - top, px + bar, top) for (px, py), (_, top) in zip(points, ends, strict=True)]
    size = 7.5 if len(names) <= 16 else 6.5
    for i in np.argsort(points[:, 0], kind="stable"):
        label = axes.annotate(names[i], (x[i], y[i]), xytext=(0, 0), textcoords="offset points", size=size, color=INK,
                              ha="left", va="bottom", parse_math=False)  # fmt: skip
        extent = label.get_window_extent(renderer)
        places = (
            _place(points[i], angle, radius, extent.width, extent.height)
            for radius in (7, 12, 19, 28, 40, 55)
            for angle in range(0, 360, 30)
        )
        box = min(places, key=lambda box: _cost(box, taken, inside))  # of equal ones the first, which is the nearest
        taken.append(box)
        label.set_position((np.array(box[:2]) - points[i]) * 72 / PIXELS_PER_INCH)  # pixels differ between formats
        near = np.clip(points[i], box[:2], box[2:])
        if np.hypot(*(near - points[i])) > 14:
            line = axes.transData.inverted().transform([points[i], near])
            axes.plot(line[:, 0], line[:, 1], color=FAINT, linewidth=0.5, zorder=1, scalex=False, scaley=False)


Box = tuple[float, float, float, float]


def _place(point: np.ndarray, angle: float, radius: float, wide: float, high: float) -> Box:
    """Box of a label, in pixels, whose nearest side or corner lies at an angle and distance from a point."""
    right, up = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    x0 = float(point[0] + radius * right - wide * (1 - right) / 2)
    y0 = float(point[1] + radius * up - high * (1 - up) / 2)
    return x0, y0, x0 + wide, y0 + high


def _cost(box: Box, taken: Sequence[Box], inside: Any) -> float:
    """Pixels of a box that are covered already or lie outside the axes."""
    x0, y0, x1, y1 = box
    covered = sum(max(0.0, min(x1, b[2]) - max(x0, b[0])) * max(0.0, min(y1, b[3]) - max(y0, b[1])) for b in taken)
    visible = max(0.0, min(x1, inside.x1) - max(x0, inside.x0)) * max(0.0, min(y1, inside.y1) - max(y0, inside.y0))
    return round(covered + (x1 - x0) * (y1 - y0) - visible, 3)  # what rounding leaves decides nothing

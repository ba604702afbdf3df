"""The pictures of local learning coefficients: a sweep of settings, the draws of one of them, a curve over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.errors import DatamodelsError
from datamodels.report.figures import FAINT, HELPS, HURTS, INK, PIXELS_PER_INCH, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Sequence[float] | np.ndarray
GRID = "#e4e4e4"


def sweep(
    epsilon: Numbers,
    gamma: Numbers,
    acceptance: Numbers,
    llc: Numbers,
    llc_se: Numbers,
    trusted: Sequence[bool] | np.ndarray,
    *,
    chosen: int | None = None,
    band: tuple[float, float],
    subtitle: str = "",
) -> Figure:
    """Acceptance and LLC, with 95 % intervals, against the step, a line for each localisation; one entry for each row.

    Hollow points are not `trusted`, as their verdicts say. Rows without a finite LLC have diverged and are
    counted. `chosen` is ringed.
    """
    columns = [np.asarray(column, float) for column in (epsilon, gamma, acceptance, llc, llc_se, trusted)]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1 or not len(columns[0]):
        raise DatamodelsError(f"picture: expected columns of one length, got {[column.shape for column in columns]}")
    x, pulls, accepted, value, error, sure = columns
    with style():
        from matplotlib import colormaps
        from matplotlib.lines import Line2D

        figure = _figure(7.8, 5.6, "Acceptance and LLC by step size and localisation", subtitle)
        above, below = figure.add_axes((0.105, 0.49, 0.675, 0.36)), figure.add_axes((0.105, 0.1, 0.675, 0.33))
        above.axhspan(*band, color=FAINT, alpha=0.18, linewidth=0)
        above.text(
            0.01, 0.04, f"shaded: the band to choose from, {band[0]:g} to {band[1]:g}", va="bottom", size=8,
            color=FAINT, transform=above.transAxes,
        )  # fmt: skip
        levels = np.unique(pulls)
        colours = colormaps["viridis_r"](np.linspace(0.25, 1, len(levels)) if len(levels) > 1 else [0.75])
        handles: list[Any] = []
        for level, colour in zip(levels, colours, strict=True):
            rows = np.flatnonzero((pulls == level) & np.isfinite(value))
            rows = rows[np.argsort(x[rows], kind="stable")]
            for axes, y in ((above, accepted), (below, value)):
                axes.plot(x[rows], y[rows], color=colour, linewidth=1.5)
                for row in rows:
                    axes.plot(x[row], y[row], "o", color=colour, markersize=5.5,
                              markerfacecolor=colour if sure[row] else "white")  # fmt: skip
            below.errorbar(x[rows], value[rows], yerr=1.96 * error[rows], fmt="none", color=colour, capsize=3,
                           elinewidth=1.1)  # fmt: skip
            handles.append(Line2D([], [], color=colour, linewidth=2, label=f"γ = {level:g}"))
        handles.append(
            Line2D(
                [],
                [],
                color=INK,
                marker="o",
                markerfacecolor="white",
                linestyle="",
                label="not trusted",
            )
        )
        if chosen is not None:
            for axes, y in ((above, accepted), (below, value)):
                axes.plot(
                    x[chosen], y[chosen], "o", color=HURTS, markersize=13, markerfacecolor="none", markeredgewidth=1.8
                )
            label = f"chosen:\nε = {x[chosen]:.3g}\nγ = {pulls[chosen]:g}"
            handles.append(Line2D([], [], color=HURTS, marker="o", markersize=11, markerfacecolor="none",
                                  markeredgewidth=1.8, linestyle="", label=label))  # fmt: skip
        if lost := int((~np.isfinite(value)).sum()):
            handles.append(Line2D([], [], linestyle="", label=f"{lost} diverged,\nnot drawn"))
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.79, 0.86), frameon=False, fontsize=8.5)
        for axes in (above, below):
            axes.set_xscale("log")
            axes.set_xlim(x.min() / 1.4, x.max() * 1.4)
            _plain(axes)
        above.set_ylim(-0.03, 1.04)
        above.tick_params(which="both", labelbottom=False)
        above.set_ylabel("acceptance probability", color=INK)
        finite = np.isfinite(value)
        if finite.any() and value[finite].max() > 20 * max(np.median(np.abs(value[finite])), 1e-12):
            below.set_yscale("symlog", linthresh=max(float(np.median(np.abs(value[finite]))), 1e-12))
        below.set_ylabel("LLC, with 95 % interval", color=INK)
        below.set_xlabel("step size ε", color=INK)
    return figure


def trace(values: np.ndarray, *, interval: tuple[float, float, float], title: str, subtitle: str = "") -> Figure:
    """The draws of each chain, (chains, draws) of nβ (L(w) − L(w*)), and the mean so far; NaN rows are left out.

    interval: the LLC and the ends of its 95 % interval.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or not np.isfinite(values).all(axis=1).any():
        raise DatamodelsError(f"picture: expected draws (chains, draws), one chain at least finite; got {values.shape}")
    values = values[np.isfinite(values).all(axis=1)]
    draws = np.arange(1, values.shape[1] + 1)
    running = values.cumsum(axis=1) / draws
    with style():
        from matplotlib import colormaps

        figure = _figure(7.6, 5.2, title, subtitle)
        above, below = figure.add_axes((0.095, 0.5, 0.875, 0.35)), figure.add_axes((0.095, 0.105, 0.875, 0.33))
        colours = colormaps["viridis"](np.linspace(0, 0.88, len(values)))
        for chain, mean, colour in zip(values, running, colours, strict=True):
            above.plot(draws, chain, color=colour, linewidth=0.7, alpha=0.75)
            below.plot(draws, mean, color=colour, linewidth=1.2)
        value, low, high = interval
        below.axhspan(low, high, color=HELPS, alpha=0.15, linewidth=0)
        below.plot(draws, running.mean(axis=0), color=INK, linewidth=2.2)
        words = f"LLC {value:.4g}, band: 95 % [{low:.4g}, {high:.4g}]"
        below.text(1, 1.03, words, ha="right", va="bottom", size=9, color=HELPS, weight="bold",
                   transform=below.transAxes)  # fmt: skip
        settled = running[:, len(draws) // 10 :]
        reach = max(settled.max() - settled.min(), high - low)
        below.set_ylim(min(settled.min(), low) - 0.15 * reach, max(settled.max(), high) + 0.25 * reach)
        for axes in (above, below):
            axes.set_xlim(0.5, draws[-1] + 0.5)
            _plain(axes)
        above.axhline(0, color=FAINT, linewidth=1)
        above.tick_params(labelbottom=False)
        above.set_ylabel("nβ (L(w) − L(w*))", color=INK)
        below.set_ylabel("mean so far: LLC", color=INK)
        below.set_xlabel("draw", color=INK)
    return figure


def curve(
    steps: Numbers,
    llc: Numbers,
    llc_se: Numbers,
    loss: Numbers,
    trusted: Sequence[bool] | np.ndarray,
    *,
    subtitle: str = "",
) -> Figure:
    """LLC, with 95 % intervals, and the loss of the checkpoint itself against the training step; hollow: no trust."""
    columns = [np.asarray(column, float) for column in (steps, llc, llc_se, loss, trusted)]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1 or not len(columns[0]):
        raise DatamodelsError(f"picture: expected columns of one length, got {[column.shape for column in columns]}")
    x, value, error, losses, believed = (column[np.argsort(columns[0], kind="stable")] for column in columns)
    with style():
        from matplotlib.lines import Line2D

        figure = _figure(7.0, 5.2, "The local learning coefficient over training", subtitle)
        above, below = figure.add_axes((0.11, 0.4, 0.86, 0.45)), figure.add_axes((0.11, 0.105, 0.86, 0.25))
        there = np.isfinite(value)
        sure = there & (believed == 1)
        above.plot(x[there], value[there], color=FAINT, linewidth=0.9, linestyle=(0, (2, 3)))
        above.plot(x, np.where(sure, value, np.nan), color=HELPS, linewidth=1.6)
        for those, colour, face in ((sure, HELPS, HELPS), (there & ~sure, FAINT, "white")):
            above.errorbar(x[those], value[those], yerr=1.96 * error[those], fmt="o", color=colour, markersize=6,
                           markerfacecolor=face, capsize=3, elinewidth=1.1)  # fmt: skip
        below.plot(x, losses, color=HURTS, linewidth=1.6, marker="o", markersize=4)
        if not believed.all():
            hollow = Line2D([], [], color=FAINT, marker="o", markerfacecolor="white", linestyle="",
                            label="no LLC: verdict other than trust")  # fmt: skip
            above.legend(handles=[hollow], loc="best", frameon=False, fontsize=8.5)
        for axes in (above, below):
            if x.min() > 0 and x.max() > 20 * x.min():
                axes.set_xscale("log")
            elif x.max() > 20:
                axes.set_xscale("symlog", linthresh=1)
            _plain(axes)
        if losses.min() > 0 and losses.max() > 20 * losses.min():
            below.set_yscale("log")
        above.tick_params(which="both", labelbottom=False)
        above.set_ylabel("LLC, with 95 % interval", color=INK)
        below.set_ylabel("loss", color=INK)
        below.set_xlabel("training step of the checkpoint", color=INK)
    return figure


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
    left = 0.75 / width
    figure.text(left, 1 - 0.34 / height, title, size=12.5, weight="bold", color=INK)
    figure.text(left, 1 - 0.57 / height, subtitle, size=9, color=FAINT, parse_math=False)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

"""The picture of effects: a table of properties by benefits, coloured by how much one goes with the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodels.report.figures import FAINT, HELPS, HURTS, INK, PIXELS_PER_INCH, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from datamodels.evaluation.effects import Effects

_CELL = 0.92, 0.34  # inches


def heatmap(found: Effects) -> Figure:
    """Effects (p, T), properties as rows; those whose interval does not reach 0 are bold and framed.

    Rows are in the order of their largest effect. Save the figure with `figures.save`.
    """
    p, T = found.value.shape
    order = np.argsort(-np.abs(found.value).max(axis=1), kind="stable")
    rows = [found.columns[j] for j in order]
    left = 0.3 + 0.075 * max(map(len, rows))
    top = 1.05 + 0.055 * max(map(len, found.targets))
    width, height = max(6.4, left + T * _CELL[0] + 0.55), top + p * _CELL[1] + 0.35
    with style():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        figure.text(0.2 / width, 1 - 0.3 / height, "Which property goes with which benefit", size=12.5, weight="bold",
                    color=INK)  # fmt: skip
        figure.text(0.2 / width, 1 - 0.54 / height, f"lasso over {found.models} models, in standard deviations; "
                    "framed: the 95 % interval does not reach 0", size=9, color=FAINT)  # fmt: skip
        axes = figure.add_axes((left / width, 0.35 / height, T * _CELL[0] / width, p * _CELL[1] / height))
        colours = LinearSegmentedColormap.from_list("effects", [HURTS, "#f7f7f7", HELPS])
        most = max(0.3, float(np.abs(found.value).max()))
        axes.imshow(found.value[order], cmap=colours, vmin=-most, vmax=most, aspect="auto")
        for i, j in enumerate(order):
            for t in range(T):
                clear, value = bool(found.clear[j, t]), found.value[j, t]
                if clear:
                    axes.add_patch(
                        Rectangle((t - 0.47, i - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, linewidth=1.3)
                    )
                if value or clear:
                    axes.text(t, i, f"{value:+.2f}", ha="center", va="center", size=8.5,
                              weight="bold" if clear else "normal",
                              color="white" if abs(value) > 0.6 * most else INK if clear else FAINT)  # fmt: skip
        axes.set_xticks(range(T), found.targets, rotation=32, ha="left", va="bottom", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks(range(p), rows)
        axes.tick_params(length=0, labelsize=9, labelcolor=INK, pad=4)
        for t in range(T):
            axes.text(t, p - 0.35, f"R² {found.r2[t]:.2f}", ha="center", va="top", size=8.5, color=FAINT)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure

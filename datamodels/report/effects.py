"""The picture of effects: a table of properties by benefits, coloured by how much one goes with the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.report.figures import FAINT, HELPS, HURTS, INK, PIXELS_PER_INCH, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from datamodels.evaluation.effects import Effects

MANY = 16  # properties, or benefits, of which those without an effect are left out
WIDEST = 14.5  # inches; what is wider goes on below
_CELL, _NARROW, _HIGH = 0.92, 0.6, 0.34  # inches: how wide a cell is, at least, and how high
_SLANT = 32  # degrees
_LONGEST = 44  # characters of a name
_HEAD = 0.75


def heatmap(found: Effects) -> Figure:
    """Effects (p, T), properties as rows; those whose interval does not reach 0 are bold and framed.

    Rows are in the order of their largest effect. Of more than MANY properties only those that are chosen for a benefit
    are shown, of more than MANY benefits those that one is chosen for; the picture says how many are not. Save the
    figure with `figures.save`.
    """
    told = (found.value != 0) | found.clear
    order = np.argsort(-np.abs(found.value).max(axis=1), kind="stable")
    rows = _kept(order, told.any(axis=1))
    columns = _kept(np.arange(len(found.targets)), told.any(axis=0))
    names = [_short(found.columns[j]) for j in rows]
    lines = [
        f"lasso, then least squares over {found.models} models; in standard deviations; framed: the interval is off 0",
        *(
            f"not shown: {gone} of {len(of)} {what}"
            for gone, of, what in (
                (len(found.columns) - len(rows), found.columns, "properties, which are chosen for no benefit"),
                (len(found.targets) - len(columns), found.targets, "benefits, which no property is chosen for"),
            )
            if gone
        ),
    ]
    head = _HEAD + 0.17 * (len(lines) - 1)
    with style():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        left = 0.35 + max(map(_wide, names))
        slanted = {t: _wide(_short(found.targets[t])) for t in columns}
        over = max(0.25, np.cos(np.radians(_SLANT)) * max(slanted.values()))  # to the right of the last cell at most
        room = max(WIDEST - left - over, _NARROW)
        cell = float(np.clip(room / len(columns), _NARROW, _CELL))
        per = max(1, int(room / cell + 1e-9))
        per = -(-len(columns) // -(-len(columns) // per))  # as many below each other, equally long
        blocks = [columns[i : i + per] for i in range(0, len(columns), per)]
        tops = [0.2 + np.sin(np.radians(_SLANT)) * max(slanted[t] for t in block) for block in blocks]
        table = len(rows) * _HIGH
        width = max(6.6, left + len(blocks[0]) * cell + over, 0.4 + max(map(_wide, lines)))
        height = head + sum(tops) + len(blocks) * (table + 0.42)
        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        figure.text(0.2 / width, 1 - 0.3 / height, "Which property goes with which benefit", size=12.5, weight="bold",
                    color=INK)  # fmt: skip
        for i, line in enumerate(lines):
            figure.text(0.2 / width, 1 - (0.54 + 0.17 * i) / height, line, size=9, color=FAINT)
        colours = LinearSegmentedColormap.from_list("effects", [HURTS, "#f7f7f7", HELPS])
        most = max(0.3, float(np.abs(found.value).max()))
        y = height - head
        for block, top in zip(blocks, tops, strict=True):
            T, y = len(block), y - top - table
            axes = figure.add_axes((left / width, y / height, T * cell / width, table / height))
            axes.imshow(found.value[np.ix_(rows, block)], cmap=colours, vmin=-most, vmax=most, aspect="auto")
            for i, j in enumerate(rows):
                for at, t in enumerate(block):
                    clear, value = bool(found.clear[j, t]), float(found.value[j, t])
                    if clear:
                        axes.add_patch(
                            Rectangle((at - 0.47, i - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, linewidth=1.3)
                        )
                    if value or clear:
                        axes.text(at, i, f"{value:+.2f}", ha="center", va="center", size=8.5,
                                  weight="bold" if clear else "normal",
                                  color=_readable(colours((value / most + 1) / 2)))  # fmt: skip
            axes.set_xticks(range(T), [_short(found.targets[t]) for t in block], rotation=_SLANT, ha="left",
                            va="bottom", rotation_mode="anchor", parse_math=False)  # fmt: skip
            axes.xaxis.tick_top()
            axes.set_yticks(range(len(rows)), names, parse_math=False)
            axes.tick_params(length=0, labelsize=9, labelcolor=INK, pad=4)
            for at, t in enumerate(block):
                axes.text(at, len(rows) - 0.35, f"R² {found.r2[t]:.2f}", ha="center", va="top", size=8.5 if cell > 0.7
                          else 7.5, color=FAINT)  # fmt: skip
            for side in axes.spines.values():
                side.set_visible(False)
            y -= 0.42
    return figure


def _kept(order: np.ndarray, told: np.ndarray) -> list[int]:
    """All of a few; of many those that there is an effect of, or the first where there is none."""
    some = [int(i) for i in order if told[i]] if len(order) > MANY else order.tolist()
    return some or order[:MANY].tolist()


def _short(name: str) -> str:
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[1 - half :]}"


def _wide(text: str) -> float:
    """Inches, at the size of a label."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text.replace("$", "S"), size=9).get_extents().x1) / 72 if text else 0.0


def _readable(colour: Sequence[float]) -> Any:
    """Ink or white, whichever contrasts more with a colour (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / (0.016 + 0.05) else INK

"""Pictures of LLCs: what is in them, and what cannot be drawn."""

import numpy as np
import pytest

from datamodels.errors import DatamodelsError
from datamodels.report import figures, llc

EPSILON, GAMMA = np.tile([1e-6, 1e-5, 1e-4], 2), np.repeat([10, 100], 3)
ACCEPTANCE = [0.99, 0.93, 0.4, 0.99, 0.92, np.nan]
LLC, SE = np.array([3.0, 9, 10, 2, 6, np.nan]), np.array([0.1, 0.2, 0.3, 0.1, 0.2, np.nan])
STATIONARY = np.array([0, 1, 1, 0, 1, 0], bool)


def texts(figure):
    from matplotlib.text import Text

    return " ".join(t.get_text() for t in figure.findobj(Text))


def test_a_sweep(tmp_path):
    figure = llc.sweep(EPSILON, GAMMA, ACCEPTANCE, LLC, SE, STATIONARY, chosen=1, band=(0.9, 0.95), subtitle="n = 5")
    said = texts(figure)
    for part in ("γ = 10", "γ = 100", "not trusted", "chosen:\nε = 1e-05", "1 diverged", "n = 5", "0.9 to 0.95"):
        assert part in said, part
    from matplotlib.colors import to_hex

    above = figure.axes[0]
    points = [line for line in above.lines if line.get_marker() == "o"]
    hollow = [line for line in points if line.get_markersize() < 10 and to_hex(line.get_markerfacecolor()) == "#ffffff"]
    assert len(points) == 5 + 1 and len(hollow) == 2  # and the ring
    assert figures.save(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DatamodelsError, match="one length"):
        llc.sweep(EPSILON, GAMMA[:2], ACCEPTANCE, LLC, SE, STATIONARY, band=(0.9, 0.95))


def test_a_trace(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    values[1, 2:] = np.nan
    figure = llc.trace(values, interval=(5.0, 4.5, 5.5), title="Row 3", subtitle="trust")
    above, below = figure.axes
    assert [line.get_ydata().tolist() for line in above.lines[:2]] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert below.lines[2].get_ydata().tolist() == [4, 4.5, 5, 5.5]
    assert "LLC 5, band: 95 % [4.5, 5.5]" in texts(figure) and "Row 3" in texts(figure)
    figures.save(figure, tmp_path / "a.svg")
    with pytest.raises(DatamodelsError, match="one chain at least finite"):
        llc.trace(np.full((2, 3), np.nan), interval=(0, 0, 0), title="")


def test_a_curve(tmp_path):
    figure = llc.curve([100, 0, 10], [3, 1, np.nan], [0.1, 0.1, np.nan], [0.1, 2.3, 1], [True, False, False])
    above, below = figure.axes
    assert above.lines[0].get_xdata().tolist() == [0, 100]
    assert below.lines[0].get_ydata().tolist() == [2.3, 1, 0.1]
    assert "verdict other than trust" in texts(figure)
    figures.save(figure, tmp_path / "a.pdf")
    with pytest.raises(DatamodelsError, match="one length"):
        llc.curve([], [], [], [], [])

import itertools
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from datamodels.errors import DatamodelsError
from datamodels.learning.cifar10 import CLASSES
from datamodels.regression import Datamodel, RegularizationPath
from datamodels.report import figures
from datamodels.report.figures import (
    choose_targets,
    influential_examples,
    lds_curve,
    regularization_path,
    save,
    spread_targets,
)

ROOT = Path(__file__).parents[2]
P, T = 60, 30


def problem(shape=(8, 8), *, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(P, T)).astype(np.float32)
    train, test = rng.random((P, *shape), np.float32), rng.random((T, *shape), np.float32)
    return weights, train, np.arange(P) % classes, test, np.arange(T) % classes


def pictures(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def words(figure):
    return [text.get_text() for text in figure.texts]


def captions(label, weight):
    return f"{label}  {weight:+.2f}".replace("-", "\N{MINUS SIGN}")


# --- the picture of influential examples


@pytest.mark.parametrize("shape", [(8, 8), (3, 5, 6)])
def test_each_row_shows_the_target_and_the_extreme_weights(shape):
    weights, train, train_labels, test, test_labels = problem(shape)
    figure = influential_examples(weights, train, train_labels, test, test_labels, targets=[4, 17], top=3)
    expected, lines = [], []
    for t in (4, 17):
        ranked = sorted(range(P), key=lambda i: weights[i, t])
        best = ranked[::-1][:3] + ranked[:3]
        expected += [test[t], *(train[i] for i in best)]
        lines += [captions(train_labels[i], weights[i, t]) for i in best]
    for shown, pixels in zip(pictures(figure), expected, strict=True):
        assert np.array_equal(shown, pixels if len(shape) == 2 else pixels.transpose(1, 2, 0))
    assert [w for w in words(figure) if w in lines] == lines
    assert {"4", "#4", "7", "#17"} <= set(words(figure))


def test_the_title_says_what_it_is_and_the_score():
    figure = influential_examples(*problem(), targets=[0], lds=(0.7406, 0.7219, 0.7581), what="digit")
    said = " ".join(words(figure))
    assert "training digits help" in said
    assert "LDS 0.741 [0.722, 0.758]" in said
    assert "LDS" not in " ".join(words(influential_examples(*problem(), targets=[0])))


def test_the_score_may_be_what_the_evaluation_returns():
    from datamodels.evaluation import lds

    rng = np.random.default_rng(0)
    outcomes = rng.normal(size=(20, 6))
    score = lds(outcomes + rng.normal(size=(20, 6)), outcomes, np.arange(20), draws=50)
    said = " ".join(words(influential_examples(*problem(), targets=[0], lds=score)))
    assert f"LDS {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" in said


def test_only_weights_of_the_right_sign_are_shown():
    weights, *rest = problem()
    weights[:, 5] = 0
    weights[[3, 9, 11], 5] = (0.5, 0.25, -0.125)
    figure = influential_examples(weights, *rest, targets=[5], top=5)
    assert len(figure.axes) == 1 + 2 + 1
    assert [w for w in words(figure) if "  " in w and "." in w and len(w) < 12] == [
        "3  +0.50", "9  +0.25", "1  \N{MINUS SIGN}0.12",
    ]  # fmt: skip


def test_help_and_hurt_differ_by_more_than_colour():
    figure = influential_examples(*problem(), targets=[0], top=1)
    _, helps, hurts = (axes.spines["left"] for axes in figure.axes)
    assert helps.get_edgecolor() != hurts.get_edgecolor()
    assert helps.get_linestyle() == "solid"
    assert hurts.get_linestyle() != "solid"


@pytest.mark.parametrize(("targets", "top", "names"), [(8, 5, None), (1, 1, None), (3, 7, None), (4, 5, CLASSES)])
def test_nothing_overlaps_or_leaves_the_picture(targets, top, names):
    what = "digit" if names is None else "image"
    figure = influential_examples(
        *problem(), targets=targets, top=top, lds=(0.741, 0.722, 0.758), class_names=names, what=what
    )
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts]
    boxes += [(f"image {i}", axes.get_window_extent()) for i, axes in enumerate(figure.axes)]
    width, height = figure.get_size_inches() * figure.dpi
    for name, box in boxes:
        assert box.x0 >= 20, name
        assert box.y0 >= 10, name
        assert box.x1 <= width - 10, name
        assert box.y1 <= height - 10, name
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        apart = first.x1 < second.x0 or second.x1 < first.x0 or first.y1 < second.y0 or second.y1 < first.y0
        assert apart, f"{a!r} overlaps {b!r}"


def test_small_images_get_whole_dots_per_pixel():
    """Otherwise nearest-neighbour scaling draws some of the 8 columns wider than others."""
    figure = influential_examples(*problem(), targets=[0])
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width / 8 == pytest.approx(round(box.width / 8), abs=1e-6)
        assert box.x0 == pytest.approx(round(box.x0), abs=1e-6)
        assert box.y0 == pytest.approx(round(box.y0), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": np.zeros(P)}, r"weights \(p, T\), got shape \(60,\)"),
        ({"weights": np.full((P, T), np.nan)}, "finite"),
        ({"train_images": np.zeros((P - 1, 8, 8))}, r"60 training images .* got \(59, 8, 8\)"),
        ({"test_images": np.zeros((T, 64))}, r"30 test images .* got \(30, 64\)"),
        ({"test_images": np.zeros((T, 8, 8, 3))}, r"got \(30, 8, 8, 3\)"),
        ({"train_labels": np.zeros(P + 1, int)}, r"60 training labels, got shape \(61,\)"),
        ({"test_labels": np.zeros((T, 1), int)}, r"30 test labels, got shape \(30, 1\)"),
        ({"targets": [T]}, r"ints in \[0, 30\), got \[30\]"),
        ({"targets": [-1]}, r"got \[-1\]"),
        ({"targets": [0.5]}, r"got \[0.5\]"),
        ({"targets": []}, "one or more targets"),
        ({"targets": 0}, "one or more targets"),
        ({"top": 0}, "top >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    names = ("weights", "train_images", "train_labels", "test_images", "test_labels")
    arguments = dict(zip(names, problem(), strict=True)) | change
    with pytest.raises(DatamodelsError, match=says):
        influential_examples(**arguments)


# --- which targets


def test_targets_have_both_signs_and_classes_take_turns():
    weights, *_, labels = problem()
    weights[:, 10:] = np.abs(weights[:, 10:])  # no negative weight: not eligible
    chosen = choose_targets(weights, labels, count=8)
    assert len(chosen) == 8
    assert chosen.max() < 10
    assert len(set(labels[chosen])) == 8
    assert list(labels[chosen]) == sorted(labels[chosen])


def test_more_targets_than_classes_use_each_class_again():
    weights, *_, labels = problem(classes=3)
    chosen = choose_targets(weights, labels, count=8, top=5)
    assert sorted(np.bincount(labels[chosen])) == [2, 3, 3]
    assert len(set(chosen.tolist())) == 8


def test_a_class_with_few_targets_is_made_up_for():
    weights, *_, labels = problem(classes=2)
    labels = np.where(np.arange(T) == 7, 1, 0)
    assert len(choose_targets(weights, labels, count=6)) == 6
    assert len(choose_targets(weights, labels, count=T + 5)) == T


def test_without_any_full_target_all_are_eligible():
    weights, *_, labels = problem()
    assert len(choose_targets(np.abs(weights), labels, count=4)) == 4


def test_places_run_from_the_hardest_to_the_median():
    weights, *_, _ = problem()
    margins = np.random.default_rng(1).normal(size=T)
    one_class = choose_targets(weights, np.zeros(T, int), margins, count=1)
    assert one_class.tolist() == [int(margins.argmin())]
    two = choose_targets(weights, np.zeros(T, int), margins, count=2)
    rest = np.sort(np.delete(margins, margins.argmin()))
    assert sorted(margins[two]) == [margins.min(), rest[round(0.5 * (len(rest) - 1))]]
    strongest = choose_targets(weights, np.zeros(T, int), count=1)
    assert strongest.tolist() == [int(np.abs(weights).sum(0).argmax())]


def test_the_seed_draws_which_classes():
    weights, *_, labels = problem()
    picks = {tuple(choose_targets(weights, labels, count=4, seed=s)) for s in range(10)}
    assert len(picks) > 5
    assert tuple(choose_targets(weights, labels, count=4, seed=3)) in picks


# --- the curve


def test_the_curve_shows_scores_intervals_and_ceiling():
    scores = [(0.70, 0.67, 0.72), (0.55, 0.52, 0.58)]
    figure = lds_curve([2000, 500], scores, (0.88, 0.86, 0.90))
    (axes,) = figure.axes
    line = next(line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert list(line.get_xdata()) == [500, 2000]
    assert list(line.get_ydata()) == [0.55, 0.70]
    bars = axes.collections[-1].get_segments()
    assert np.allclose([bar[:, 1] for bar in bars], [[0.52, 0.58], [0.67, 0.72]])
    said = [text.get_text() for text in axes.texts]
    assert {"0.55", "0.70"} <= set(said)
    assert any("ceiling 0.88" in text for text in said)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["500", "2,000"]
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((0.86, 0.90))


def test_the_curve_without_a_ceiling_and_with_a_poor_score():
    figure = lds_curve([10], [(-0.1, -0.3, 0.1)])
    assert figure.axes[0].get_ylim()[0] < -0.3
    assert len(figure.axes[0].patches) == 0


@pytest.mark.parametrize(("rows", "scores"), [([], []), ([1, 2], [(0.5, 0.4, 0.6)])])
def test_the_curve_refuses_what_does_not_pair_up(rows, scores):
    with pytest.raises(DatamodelsError, match="one score for each"):
        lds_curve(rows, scores)


# --- files


def make():
    return influential_examples(*problem(), targets=[0, 1])


def test_a_png_is_1200_pixels_wide_and_always_the_same(tmp_path):
    first = save(make(), tmp_path / "new" / "a.png").read_bytes()
    assert os.listdir(tmp_path / "new") == ["a.png"]
    assert first.startswith(b"\x89PNG")
    assert struct.unpack(">I", first[16:20]) == (1200,)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "image.cmap": "hot", "savefig.dpi": 30}):
        assert save(make(), tmp_path / "b.png").read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["b.png", "new"]


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_other_formats_by_their_ending(tmp_path, suffix):
    first, second = (save(make(), tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert first == second
    assert first.startswith({".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"the old one")
    figure = make()

    def savefig(file, **kwargs):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", savefig)
    with pytest.raises(OSError, match="No space"):
        save(figure, path)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_picture_has_the_permissions_of_any_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert save(make(), tmp_path / "a.png").stat().st_mode == plain.stat().st_mode


def test_no_display_no_pyplot_and_matplotlib_only_when_drawing(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from datamodels.report import figures\n"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        "w = np.random.default_rng(0).normal(size=(9, 4)); i = np.zeros((9, 8, 8)); l = np.zeros(9, int)\n"
        f"figures.save(figures.influential_examples(w, i, l, i[:4], l[:4]), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment | {"MPLBACKEND": "qtagg"})


def test_the_palette_is_told_apart_when_blind_to_red_or_green():
    """Machado et al. 2009, severity 1: simulated, the two colours stay far apart (Euclidean in linear RGB)."""
    matrices = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(c) for c in (figures.HELPS, figures.HURTS)]) ** 2.2
    for matrix in matrices.values():
        a, b = np.clip(colours @ np.array(matrix).T, 0, 1)
        assert np.linalg.norm(a - b) > 0.3


# --- the picture of the regularization path


def path_model(T=12, K=8, *, names=None, seed=0):
    """A datamodel of which only the path is of interest: each target's ends at another place, its best three before."""
    rng = np.random.default_rng(seed)
    lam, mse, nnz = np.full((K, T), np.nan), np.full((K, T), np.nan), np.full((K, T), -1)
    best = np.zeros(T, dtype=int)
    for t in range(T):
        end = int(rng.integers(5, K + 1))
        best[t] = end - 3
        lam[:end, t] = (t + 1) * 0.1 ** (np.arange(end) / 4)
        mse[:end, t] = 5 * (1 + (np.arange(end) - best[t]) ** 2)
        nnz[:end, t] = 10 * np.arange(end) + t
    numbers = rng.permutation(T) / T
    zeros = np.zeros(T)
    return Datamodel(
        np.zeros((4, T), "f4"), zeros.astype("f4"), lam[best, np.arange(T)].astype("f4"), zeros, zeros,
        zeros.astype(int), numbers, numbers, ("validation turned",) * T, tuple("abcd"),
        tuple(names or [f"margins[{t}]" for t in range(T)]), {}, RegularizationPath(lam, mse, nnz),
    )  # fmt: skip


def curves(axes):
    """{colour: (x, y)} of lines, and {colour: (x, y)} of dots."""
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    return [{tuple(one.get_color()): one.get_data() for one in some} for some in (lines, dots)]


def test_the_path_shows_each_targets_errors_and_non_zeros_and_marks_the_choice():
    model = path_model()
    figure = regularization_path(model, targets=[2, 7])
    for axes, values in zip(figure.axes, (model.path.val_mse / model.path.val_mse[0], model.path.nnz), strict=True):
        lines, dots = curves(axes)
        assert len(lines) == len(dots) == 2 and set(lines) == set(dots)
        for (colour, (x, y)), t in zip(lines.items(), (2, 7), strict=True):
            there = np.isfinite(model.path.lam[:, t])
            np.testing.assert_array_equal(x, model.path.lam[there, t])
            np.testing.assert_array_equal(y, values[there, t])
            at = there.sum() - 3
            assert [float(part[0]) for part in dots[colour]] == [x[at], y[at]]
        assert axes.get_xscale() == "log" and axes.xaxis_inverted()
    assert {"margins[2]", "margins[7]", "Along the regularization path"} <= set(words(figure))
    assert f"R² {model.r2_val[2]:.2f}, {model.path.nnz[:, 2].max() - 20} non-zeros" in words(figure)
    assert figure.axes[0].get_ylabel().startswith("validation error")
    assert figure.axes[1].get_ylabel() == "non-zero weights"


@pytest.mark.parametrize(
    ("T", "count", "quantiles"), [(10_000, 5, [10, 30, 50, 70, 90]), (1, 5, [50]), (3, 3, [0, 50, 100])]
)
def test_targets_stand_at_quantiles_of_their_r2(T, count, quantiles):
    model = path_model(T)
    chosen = spread_targets(model, count)
    expected = np.percentile(model.r2_val, quantiles)
    np.testing.assert_allclose(model.r2_val[chosen], expected, atol=1 / T)
    assert len(set(chosen.tolist())) == len(quantiles)


def test_as_many_targets_as_there_are_and_none_that_is_constant():
    model = path_model(6)
    model.path.lam[:, 4] = np.nan
    model.r2_val[4] = np.nan
    assert sorted(spread_targets(model, 9).tolist()) == [0, 1, 2, 3, 5]
    assert sorted(spread_targets(model, 3).tolist()) != [0, 1, 2, 3, 5]


@pytest.mark.parametrize("T", [1, 2, 5, 40])
@pytest.mark.parametrize("name", ["margins[{t}]", "$x^2$ of a long name with_under_scores and more, number {t}"])
def test_no_two_words_of_the_path_overlap_and_none_leaves_the_picture(T, name):
    model = path_model(T, names=[name.format(t=t) for t in range(T)])
    figure = regularization_path(model, targets=T)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [*figure.texts]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for which in ("major", "minor") for tick in getattr(axis, f"get_{which}_ticks")()]
            shown += [axis.label, *(tick.label1 for tick in ticks if low <= tick.get_loc() <= high)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown if text.get_visible() and text.get_text()]
    assert len(boxes) > T + 8
    for text, box in boxes:
        assert inside(box, figure), text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not (a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1), (one, other)


def inside(box, figure):
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_one_lambda_is_a_dot():
    model = path_model(2)
    for values in (model.path.lam, model.path.val_mse):
        values[1:] = np.nan
    figure = regularization_path(replace(model, lam=model.path.lam[0].astype("f4")))
    for axes in figure.axes:
        assert sorted(line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o") == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("change", "targets", "told"),
    [
        ({"path": None}, 5, "holds no path; load it by the folder"),
        ({"path": None}, [1], "holds no path; load it by the folder"),
        ({}, 0, "at least one target, got 0"),
        ({}, [], r"expected targets as ints in \[0, 12\)"),
        ({}, [12], r"expected targets as ints in \[0, 12\), got \[12\]"),
        ({}, [-1], "expected targets as ints"),
        ({}, [0.5], "expected targets as ints"),
        ({"r2_val": np.full(12, np.nan)}, 5, "no target has a path"),
    ],
)
def test_a_path_that_cannot_be_drawn_is_refused(change, targets, told):
    with pytest.raises(DatamodelsError, match=told):
        regularization_path(replace(path_model(), **change), targets=targets)


def test_a_constant_target_has_no_path():
    model = path_model()
    model.path.val_mse[:, 3] = np.nan
    with pytest.raises(DatamodelsError, match=r"target 'margins\[3\]' is constant and has no path"):
        regularization_path(model, targets=[2, 3])

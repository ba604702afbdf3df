"""The pictures of a datamodel: which training examples it says help and hurt, and how well it predicts.

Drawn without a display and without pyplot's global state; nobody's matplotlibrc changes them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodels import files
from datamodels.errors import DatamodelsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from datamodels.evaluation import Score
    from datamodels.regression import Datamodel, RegularizationPath

# Okabe and Ito's blue and vermilion: told apart with every common colour blindness, and in grey by the dashes.
HELPS, HURTS, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#6b6b6b"
PIXELS_PER_INCH = 120


class Interval(NamedTuple):
    """A score and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, score: Interval | Score | tuple[float, float, float]) -> Interval:
        """What `evaluation.lds` returns, or three numbers."""
        return cls(*map(float, score if isinstance(score, tuple) else (score.value, score.low, score.high)))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def choose_targets(
    weights: np.ndarray,
    labels: np.ndarray,
    margins: np.ndarray | None = None,
    *,
    count: int = 8,
    top: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Test examples worth a look, (count,) at most, ascending in label: no class twice before each was once.

    Only targets with `top` positive and `top` negative weights are eligible (if none has, all are). Within its
    class each is taken from another place between the hardest and the median example, by `margins` (T,), or by
    the size of the weights where no margins are given. Which class gets which place is drawn from `seed`.
    """
    weights, labels = np.asarray(weights), np.asarray(labels)
    full = ((weights > 0).sum(0) >= top) & ((weights < 0).sum(0) >= top)
    eligible = np.flatnonzero(full) if full.any() else np.arange(weights.shape[1])
    hardness = np.abs(weights).sum(0) if margins is None else -np.asarray(margins, float)
    order = eligible[np.argsort(-hardness[eligible], kind="stable")]
    queues = {c: [int(t) for t in order if labels[t] == c] for c in np.unique(labels[eligible]).tolist()}
    words = np.random.PCG64(seed).random_raw(len(queues)).tolist()
    turns = itertools.cycle([c for _, c in sorted(zip(words, queues, strict=True))])
    chosen: list[int] = []
    while len(chosen) < min(count, len(eligible)):
        if queue := queues[next(turns)]:
            place = len(chosen) / max(count - 1, 1) / 2
            chosen.append(queue.pop(round(place * (len(queue) - 1))))
    return np.array(sorted(chosen, key=lambda t: (labels[t], t)), dtype=np.int64)


def influential_examples(
    weights: np.ndarray,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    targets: int | Sequence[int] | np.ndarray = 8,
    top: int = 5,
    margins: np.ndarray | None = None,
    lds: Score | tuple[float, float, float] | None = None,
    class_names: Sequence[str] | None = None,
    what: str = "digit",
    seed: int = 0,
) -> Figure:
    """For some test examples, the training examples whose presence raises and lowers their margin most.

    `weights` (p, T) are a datamodel's, in margin per training example. Images are (n, h, w) or (n, 3, h, w) with
    values in [0, 1]. `targets`: which test examples, or how many `choose_targets` shall pick. `margins` (T,): mean
    margin of each test example, for that choice. `lds` goes into the title. Save the figure with `save`.

    Raises DatamodelsError if the shapes do not fit together.
    """
    weights = np.asarray(weights)
    _, T = _check(weights, train_images, train_labels, test_images, test_labels)
    if isinstance(targets, int | np.integer):
        targets = choose_targets(weights, test_labels, margins, count=int(targets), top=top, seed=seed)
    targets = np.asarray(targets)
    if targets.ndim != 1 or len(targets) == 0 or top < 1:
        raise DatamodelsError(f"picture: expected one or more targets and top >= 1, got {targets!r} and {top}")
    if targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= T:
        raise DatamodelsError(f"picture: expected targets as ints in [0, {T}), got {targets.tolist()}")

    from matplotlib.lines import Line2D

    def name(label: int) -> str:
        return str(label) if class_names is None else class_names[label]

    # In inches, from the left: row titles, the target, a gap, the helping images, a gap, the hurting ones.
    width, head, foot = 10.0, 1.26, 0.4
    cell = 1.0 if class_names is None else 1.12  # names take a line of their own
    target_at, helps_at, gap = 0.42, 1.8, 0.4
    step = (width - helps_at - gap - 0.28) / (2 * top)
    rows = train_images.shape[-2]
    small, large = _whole(min(0.64, step - 0.08), rows), _whole(0.72, rows)
    hurts_at = helps_at + top * step + gap
    height = head + cell * len(targets) + foot

    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")

        def text(x: float, y: float, words: str, **kwargs: Any) -> None:
            """At x inches from the left and y inches from the top."""
            figure.text(x / width, 1 - y / height, words, **{"color": INK, "va": "baseline", **kwargs})

        def image(x: float, y: float, pixels: np.ndarray, size: float, colour: str, dashed: bool, line: float) -> None:
            x, bottom = (round(at * PIXELS_PER_INCH) / PIXELS_PER_INCH for at in (x, height - y - size))
            axes = figure.add_axes((x / width, bottom / height, size / width, size / height))
            axes.imshow(_displayed(pixels), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=line, linestyle=(0, (2.2, 1.3)) if dashed else "solid")

        text(0.42, 0.38, f"Which training {what}s help a network, and which hurt it", size=15.5, weight="bold")
        line = f"For {len(targets)} test {what}s, the training {what}s with the largest datamodel weights"
        if lds is not None:
            line += f".  LDS {Interval.of(lds)} on masks not used for the fit"
        text(0.42, 0.64, line, size=9.5, color=FAINT)
        line = f"Under each training {what}: its label, and what its presence in training adds to the margin."
        text(0.42, height - 0.22, line, size=9.5, color=FAINT)
        for x, words, colour, dashed in (
            (helps_at, f"training {what}s that help most", HELPS, False),
            (hurts_at, f"training {what}s that hurt most", HURTS, True),
        ):
            end = x + (top - 1) * step + small
            text(x, 1.02, words, size=9.5, color=colour, weight="bold")
            figure.add_artist(
                Line2D(
                    [x / width, end / width], [1 - 1.1 / height] * 2, color=colour, linewidth=1.4,
                    linestyle=(0, (4, 2)) if dashed else "solid",
                )
            )  # fmt: skip
        text(target_at, 1.02, f"test {what}", size=9.5, weight="bold")

        for row, target in enumerate(targets):
            y = head + row * cell
            image(target_at, y, test_images[target], large, INK, False, 1.0)
            label = name(int(test_labels[target]))
            if class_names is None:
                text(target_at + large + 0.09, y + 0.3, label, size=12, weight="bold")
                text(target_at + large + 0.09, y + 0.47, f"#{target}", size=7.5, color=FAINT)
            else:
                text(target_at, y + large + 0.15, label, size=8, weight="bold")
                text(target_at, y + large + 0.28, f"#{target}", size=7.5, color=FAINT)
            column = weights[:, target]
            order = np.argsort(column, kind="stable")
            for x, best, sign, colour, dashed in (
                (helps_at, order[::-1][:top], 1, HELPS, False),
                (hurts_at, order[:top], -1, HURTS, True),
            ):
                for i, example in enumerate(best):
                    if sign * column[example] <= 0:  # fewer than `top` of this sign
                        break
                    at = x + i * step
                    image(at, y, train_images[example], small, colour, dashed, 1.5)
                    caption = [name(int(train_labels[example])), _signed(column[example])]
                    for below, part in enumerate(["  ".join(caption)] if class_names is None else caption):
                        text(at + small / 2, y + small + 0.16 + 0.13 * below, part, size=8, ha="center")
    return figure


def lds_curve(
    rows: Sequence[int],
    scores: Sequence[Score | tuple[float, float, float]],
    ceiling: tuple[float, float, float] | None = None,
    *,
    title: str = "How well datamodels predict, by number of networks",
) -> Figure:
    """LDS, with its 95 % interval, against the number of rows that the datamodel was fitted on.

    `scores` are (value, low, high), or what `evaluation.lds` returns, one for each of `rows`; `ceiling` is the
    noise ceiling in the same form.
    """
    if len(rows) != len(scores) or len(rows) == 0:
        raise DatamodelsError(f"picture: expected one score for each number of rows, got {len(scores)} for {len(rows)}")
    order = np.argsort(rows)
    at = np.asarray(rows, float)[order]
    value, low, high = np.array([Interval.of(scores[i]) for i in order], float).T
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), dpi=PIXELS_PER_INCH, facecolor="white")
        axes = figure.add_axes((0.105, 0.14, 0.865, 0.72))
        figure.text(0.105, 0.925, title, size=12.5, weight="bold", color=INK)
        if ceiling is not None:
            top = Interval(*ceiling)
            axes.axhspan(top.low, top.high, color=FAINT, alpha=0.16, linewidth=0)
            axes.axhline(top.value, color=FAINT, linewidth=1.2, linestyle=(0, (5, 3)))
            words = f"noise ceiling {top.value:.2f}: what a perfect prediction would reach"
            axes.text(0.015, top.high + 0.01, words, transform=axes.get_yaxis_transform(), va="bottom",
                      size=8.5, color=FAINT)  # fmt: skip
        axes.errorbar(at, value, yerr=[value - low, high - value], color=HELPS, marker="o", markersize=5,
                      linewidth=1.8, capsize=3.5, elinewidth=1.2)  # fmt: skip
        for x, y, end in zip(at, value, high, strict=True):
            axes.annotate(f"{y:.2f}", (x, max(y, end)), xytext=(0, 5), textcoords="offset points", ha="center",
                          size=9, color=HELPS, weight="bold")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(at, [f"{x:,.0f}" for x in at])
        axes.minorticks_off()
        axes.set_xlim(at[0] / 1.25, at[-1] * 1.25)
        bottom = min(low.min(), *([] if ceiling is None else [Interval(*ceiling).low]), 1)
        axes.set_ylim(min(0.0, bottom - 0.05), 1.0 if ceiling is None else max(1.0, ceiling[2] + 0.08))
        axes.set_xlabel("rows (trained networks) used for the fit", color=INK)
        axes.set_ylabel("LDS, with 95 % interval", color=INK)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def spread_targets(model: Datamodel, count: int = 5) -> np.ndarray:
    """Targets that have a path, (count,) at most, from the worst predicted to the best.

    Where there are more they stand at equally spaced quantiles of the validation R², so that neither end is an outlier:
    of five, at 10, 30, 50, 70 and 90 %.
    """
    if count < 1:
        raise DatamodelsError(f"picture: expected at least one target, got {count}")
    if model.path is None:
        raise DatamodelsError("picture: this datamodel holds no path; load it by the folder of its fit")
    drawn = np.flatnonzero((_on_path(model.path).sum(axis=0) > 0) & np.isfinite(model.r2_val))
    if len(drawn) == 0:
        raise DatamodelsError("picture: no target has a path: all of them are constant")
    order = drawn[np.argsort(model.r2_val[drawn], kind="stable")]
    count = min(count, len(order))
    return order[((np.arange(count) + 0.5) / count * len(order)).astype(int)]


def regularization_path(model: Datamodel, *, targets: int | Sequence[int] | np.ndarray = 5) -> Figure:
    """Validation error and number of non-zeros of some targets against lambda, with the lambda that was chosen.

    `targets`: which, or how many `spread_targets` shall pick. Errors are divided by the error at the largest lambda, at
    which no column takes part, so that targets of any size can be compared. Save the figure with `save`.

    Raises DatamodelsError if the model holds no path, or a target has none.
    """
    chosen = spread_targets(model, int(targets)) if isinstance(targets, int | np.integer) else np.asarray(targets)
    path, T = model.path, len(model.targets)
    if path is None:
        raise DatamodelsError("picture: this datamodel holds no path; load it by the folder of its fit")
    if chosen.ndim != 1 or len(chosen) == 0 or chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= T:
        raise DatamodelsError(f"picture: expected targets as ints in [0, {T}), got {chosen.tolist()}")
    there = _on_path(path)
    for t in chosen[there[:, chosen].sum(axis=0) == 0]:
        raise DatamodelsError(f"picture: target {model.targets[t]!r} is constant and has no path")

    step = 0.42 if len(chosen) <= 8 else 0.17  # of the legend; many targets have a line each
    width, height, left, right, legend = 7.3, max(4.9, 1.2 + step * len(chosen)), 0.85, 5.05, 5.4  # inches

    with style():
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        title = "Along the regularization path"
        figure.text(left / width, 1 - 0.3 / height, title, size=12.5, weight="bold", color=INK)
        if len(chosen) == T:
            line = "the only target" if T == 1 else f"all {T} targets"
        else:
            line = f"{len(chosen)} of {T:,} targets, from badly to well predicted"
        figure.text(
            left / width, 1 - 0.52 / height, f"{line}; a dot is the λ with the smallest error",
            size=9, color=FAINT,
        )  # fmt: skip
        tall = (height - 1.53) / 2
        boxes = [(0.87 + tall, tall), (0.55, tall)]  # bottom and height of both panels
        errors, counts = (
            figure.add_axes((left / width, bottom / height, (right - left) / width, tall / height))
            for bottom, tall in boxes
        )
        # Light to dark as R2 grows: an order that is seen in grey and with every colour blindness.
        colours = colormaps["viridis_r"](np.linspace(0.2, 1, len(chosen)) if len(chosen) > 1 else [0.75])
        highest = 1.0
        for place, (t, colour) in enumerate(zip(chosen, colours, strict=True)):
            on = there[:, t]
            lam, mse, nnz = path.lam[on, t], path.val_mse[on, t], path.nnz[on, t]
            error = mse / mse[0] if mse[0] > 0 else mse
            at = int(np.argmin(np.abs(np.log(lam) - np.log(max(float(model.lam[t]), 1e-300)))))
            for axes, y in ((errors, error), (counts, nnz)):
                axes.plot(lam, y, color=colour, linewidth=1.6, zorder=2 + place, marker="." if len(lam) == 1 else None)
                axes.plot(lam[at], y[at], "o", color=colour, markersize=7, markeredgecolor="white",
                          markeredgewidth=1.2, zorder=20 + place, clip_on=False)  # fmt: skip
            highest = max(highest, error.max())
            y = 1 - (0.95 + step * place) / height  # as the lines stand: the best predicted below
            figure.add_artist(
                Line2D([legend / width, (legend + 0.26) / width], [y + 0.05 / height] * 2, color=colour, linewidth=2.2)
            )
            name = model.targets[t] if len(model.targets[t]) <= 18 else model.targets[t][:17] + "…"
            words = f"R² {model.r2_val[t]:.2f}, {int(nnz[at]):,} non-zero{'' if nnz[at] == 1 else 's'}"
            if len(chosen) <= 8:
                figure.text((legend + 0.36) / width, y, name, size=9, color=INK, parse_math=False)
                figure.text((legend + 0.36) / width, y - 0.15 / height, words, size=7.5, color=FAINT)
            else:
                figure.text((legend + 0.36) / width, y, name, size=7.5, color=INK, parse_math=False)
        errors.set_ylim(None, min(highest * 1.04, 1.6))
        counts.set_yscale("symlog", linthresh=1, linscale=0.4)
        counts.set_ylim(0, None)
        most = int(max(path.nnz[:, chosen].max(), 1))
        decades = [0, *(10**power for power in range(len(str(most)) + (most > 5 * 10 ** (len(str(most)) - 1))))]
        counts.set_yticks(decades, [f"{tick:,}" for tick in decades])
        counts.minorticks_off()
        for axes in (errors, counts):
            axes.set_xscale("log")
            axes.invert_xaxis()
            axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        reach = np.nanmax(path.lam[:, chosen]) / np.nanmin(path.lam[:, chosen])
        if reach < 100:  # too few powers of ten to read a curve by
            plain = FuncFormatter(lambda value, place: f"{value:g}")
            counts.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if reach > 4 else MaxNLocator(4))
            counts.xaxis.set_major_formatter(plain)
            counts.xaxis.set_minor_formatter(NullFormatter())
        errors.sharex(counts)
        errors.tick_params(which="both", labelbottom=False)
        errors.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axes in (errors, counts):
            axes.yaxis.set_label_coords(-0.5 / (right - left), 0.5)
        errors.set_ylabel("validation error\n(1: at the largest \N{GREEK SMALL LETTER LAMDA})", color=INK)
        counts.set_ylabel("non-zero weights", color=INK)
        counts.set_xlabel("λ, falling along the path", color=INK)
    return figure


def _on_path(path: RegularizationPath) -> np.ndarray:
    """(k, T): which lambdas each target's path had."""
    return np.isfinite(path.lam) & np.isfinite(path.val_mse) & (path.lam > 0)


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's ending; the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style(), files.whole(path) as file:
        # No date and no version in it: the same picture is the same file.
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", metadata=_METADATA.get(path.suffix))
    return path


_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, while a figure is made or saved."""
    import matplotlib

    # The backend is not a matter of style: naming it here would make matplotlib choose one.
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    with matplotlib.rc_context(defaults):
        matplotlib.rcParams.update({"font.size": 9.5, "svg.hashsalt": "datamodels", "axes.edgecolor": FAINT})
        yield


def _displayed(pixels: np.ndarray) -> np.ndarray:
    """(h, w) as it is, (3, h, w) as (h, w, 3)."""
    return np.clip(pixels, 0, 1) if pixels.ndim == 2 else np.clip(np.moveaxis(pixels, 0, -1), 0, 1)


def _whole(inches: float, pixels: int) -> float:
    """At most so many inches, and a whole number of dots for each pixel of an image that is small enough."""
    dots = int(inches * PIXELS_PER_INCH)
    return (dots // pixels * pixels if pixels <= dots else dots) / PIXELS_PER_INCH


def _signed(weight: float) -> str:
    return f"{weight:+.2f}".replace("-", "\N{MINUS SIGN}")


def _check(
    weights: np.ndarray,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
) -> tuple[int, int]:
    if weights.ndim != 2 or not np.isfinite(weights).all():
        raise DatamodelsError(f"picture: expected finite weights (p, T), got shape {weights.shape}")
    for n, part, images, labels in (
        (weights.shape[0], "training", train_images, train_labels),
        (weights.shape[1], "test", test_images, test_labels),
    ):
        shape = np.shape(images)
        if shape[:1] != (n,) or not (len(shape) == 3 or (len(shape) == 4 and shape[1] == 3)):
            raise DatamodelsError(
                f"picture: weights {weights.shape} go with {n} {part} images (n, h, w) or (n, 3, h, w), got {shape}"
            )
        if np.shape(labels) != (n,):
            raise DatamodelsError(
                f"picture: weights {weights.shape} go with {n} {part} labels, got shape {np.shape(labels)}"
            )
    return weights.shape[0], weights.shape[1]

"""The picture of effects: it fits a screen, its labels stand in it, and its numbers can be read."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from datamodels.evaluation.effects import Effects
from datamodels.report import effects


def made(p, T, *, share=0.3, seed=0):
    """Effects of which a few are not 0, of properties and benefits with the names that measurements have."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(p, T)) * (rng.random((p, T)) < share) * 0.4
    value[p // 2 :] = 0
    return Effects(
        columns=tuple(f"digits_train_effective_rank_of_layer_{j}" for j in range(p)),
        targets=tuple(f"digits_test_to_noisy_test_accuracy_drop_{t}" for t in range(T)),
        value=value,
        low=value - 0.3,
        high=value + 0.3,
        chosen=np.abs(value),
        correlation=value,
        r2=rng.random(T),
        models=128,
        groups=128,
        draws=200,
    )


def drawn(found):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = effects.heatmap(found)
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize(("p", "T"), [(1, 1), (10, 8), (40, 12), (12, 40), (40, 60)])
def test_it_fits_a_screen_and_all_labels_stand_in_it(p, T):
    figure = drawn(made(p, T))
    whole = figure.bbox
    assert whole.width <= 1800
    texts = [*figure.texts, *(label for a in figure.axes for label in (*a.get_xticklabels(), *a.get_yticklabels()))]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.width and box.y1 <= whole.height
    names = [box for axes in figure.axes for box in [axes.get_window_extent()]]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))
    highest = max(label.get_window_extent().y1 for a in figure.axes[:1] for label in a.get_xticklabels())
    lowest = min(text.get_window_extent().y0 for text in figure.texts)
    assert 0 < lowest - highest < 60, "room that nothing stands in"
    for axes in figure.axes:
        numbers = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(numbers, 2))


def test_what_has_no_effect_is_left_out_of_many_and_counted():
    found = made(40, 12)
    figure = drawn(found)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    some = np.flatnonzero((found.value != 0).any(axis=1))
    assert set(shown) == {found.columns[j] for j in some} and len(some) < 40
    assert f"not shown: {40 - len(some)} of 40 properties, which are chosen for no benefit" in [
        text.get_text() for text in figure.texts
    ]
    few = drawn(made(10, 8))
    assert len(few.axes[0].get_yticklabels()) == 10 and len(few.texts) == 2
    nothing = drawn(made(40, 12, share=0))
    assert len(nothing.axes[0].get_yticklabels()) == effects.MANY


def test_numbers_contrast_with_their_cells():
    """At least 3.9, about what ink or white can have on the worst cell; WCAG asks for 4.5, or 3 of large type."""

    def luminance(colour):
        linear = np.where(
            np.array(colour) <= 0.04045, np.array(colour) / 12.92, ((np.array(colour) + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    found = made(3, 8, share=1)
    found.value[:] = np.linspace(-1, 1, 24).reshape(3, 8)
    figure = drawn(found)
    (axes,) = figure.axes
    (image,) = axes.images
    seen = set()
    for text in axes.texts:
        if text.get_text().startswith("R²"):
            continue
        t, i = map(int, text.get_position())
        cell = image.cmap(image.norm(image.get_array()[i, t]))[:3]
        a, b = sorted((luminance(cell), luminance(to_rgb(text.get_color()))))
        assert (b + 0.05) / (a + 0.05) >= 3.9, text.get_text()
        seen.add(text.get_color())
    assert seen == {"white", "#222222"}

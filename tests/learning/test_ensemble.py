"""The ensemble against separate runs of the plain loop, margins compared after the whole run."""

import numpy as np
import pytest
import torch
from torch import nn

from datamodels.errors import DatamodelsError
from datamodels.learning import data, ensemble, loop, outputs
from datamodels.learning.loop import Recipe
from datamodels.learning.models import MLP, Seeded

ATOL = {torch.float64: 1e-9, torch.float32: 1e-3}

SHORT = Recipe(epochs=4, batch_size=32)
EVERYTHING = Recipe(
    epochs=4, batch_size=30, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01, label_smoothing=0.1, warmup=0.5
)


class Scaled(nn.Module):
    """A module that is no stack of linear layers: its forward pass shares a parameter and uses no torch.nn.ReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.norm = nn.LayerNorm(12)
        self.scale = nn.Parameter(torch.ones(()))
        self.last = nn.Linear(12, 10, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x)) * self.scale) * self.scale)


def digits(dtype):
    dataset = data.load("digits")
    return tuple(
        tensor
        for split in (dataset.train, dataset.test)
        for tensor in (torch.from_numpy(split.inputs).flatten(1).to(dtype), torch.from_numpy(split.labels))
    )


def unequal_masks(count, seed=0):
    """Masks that keep from 1 in 40 to 4 in 5 examples: other numbers of batches, other last batches."""
    rng = np.random.default_rng(seed)
    fractions = np.resize([0.5, 0.8, 0.3, 0.025, 0.5, 0.55, 0.45], count)
    return rng.random((count, 1000)) < fractions[:, None]


def separate(architecture, x, y, test_x, test_y, masks, recipe, seeds, **options):
    rows = []
    for mask, seed in zip(masks, seeds, strict=True):
        model = loop.train(architecture(seed).to(x.dtype), x, y, mask, recipe, seed=seed, **options)
        with torch.no_grad():
            rows.append(outputs.margins(model(test_x), test_y))
    return torch.stack(rows)


def together(architecture, x, y, test_x, test_y, masks, recipe, seeds, **options):
    models = ensemble.train(architecture, x, y, masks, recipe, seeds=seeds, **options)
    return outputs.margins(models.logits(test_x), test_y)


def close(a, b, dtype):
    torch.testing.assert_close(a, b, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        (MLP((64, 32, 10)), SHORT),
        (MLP((64, 32, 10)), EVERYTHING),
        (MLP((64, 20, 16, 10)), SHORT),
        (MLP((64, 10)), EVERYTHING),
        (Seeded(Scaled), SHORT),
        (Seeded(Scaled), EVERYTHING),
    ],
    ids=["mlp", "mlp-everything", "deep-everything", "linear-everything", "module", "module-everything"],
)
def test_many_at_once_are_separate_runs(architecture, recipe, count, dtype):
    tensors, masks, seeds = digits(dtype), unequal_masks(count), range(20, 20 + count)
    a = together(architecture, *tensors, masks, recipe, seeds)
    b = separate(architecture, *tensors, masks, recipe, seeds)
    close(a, b, dtype)
    assert a.dtype == dtype
    assert (a.std(1) > 0.1).all()  # the comparison is of something


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_demos_networks_are_separate_runs_to_the_end(dtype):
    from worker_scripts import train_mlp

    _, _, architecture, recipe, _ = train_mlp._setup()
    masks = np.random.default_rng(1).random((6, 1000)) < 0.5
    tensors, seeds = digits(dtype), [3, 1, 4, 15, 9, 2**31]
    a = together(architecture, *tensors, masks, recipe, seeds)
    close(a, separate(architecture, *tensors, masks, recipe, seeds), dtype)
    assert (a > 0).to(dtype).mean() > 0.9


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
@pytest.mark.parametrize("architecture", [MLP((64, 32, 10)), Seeded(Scaled)], ids=["mlp", "module"])
def test_who_shares_a_step_does_not_matter(architecture, at_once):
    tensors, masks, seeds = digits(torch.float64), unequal_masks(7), range(7)
    whole = together(architecture, *tensors, masks, SHORT, seeds, at_once=7)
    close(together(architecture, *tensors, masks, SHORT, seeds, at_once=at_once), whole, torch.float64)
    order = [4, 0, 6, 2, 5, 1, 3]
    moved = together(architecture, *tensors, masks[order], SHORT, [seeds[k] for k in order], at_once=at_once)
    close(moved, whole[order], torch.float64)


@pytest.mark.parametrize("limit", [1, 3, 30])
@pytest.mark.parametrize("architecture", [MLP((64, 32, 10)), Seeded(Scaled)], ids=["mlp", "module"])
def test_max_batches_stops_each_model_after_so_many_updates(architecture, limit):
    """Also where one model's epoch ends before the limit and another's does not."""
    tensors, masks, seeds = digits(torch.float64), unequal_masks(5), range(5)
    a = together(architecture, *tensors, masks, SHORT, seeds, max_batches=limit)
    close(a, separate(architecture, *tensors, masks, SHORT, seeds, max_batches=limit), torch.float64)
    assert not torch.allclose(a, together(architecture, *tensors, masks, SHORT, seeds, max_batches=limit + 1))


def test_images_are_flattened_for_an_mlp():
    x, y, test_x, _ = digits(torch.float64)
    masks = unequal_masks(2)
    flat = ensemble.train(MLP((64, 8, 10)), x, y, masks, SHORT, seeds=[1, 2])
    square = ensemble.train(MLP((64, 8, 10)), x.view(-1, 8, 8), y, masks, SHORT, seeds=[1, 2])
    torch.testing.assert_close(flat.logits(test_x), square.logits(test_x))


@pytest.mark.parametrize("architecture", [MLP((64, 20, 16, 10)), Seeded(Scaled)], ids=["mlp", "module"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_update_moves_against_autograds_gradient(architecture, smoothing):
    x, y, _, _ = digits(torch.float64)
    masks = unequal_masks(4)
    recipe = Recipe(epochs=1, batch_size=1000, lr=0.25, momentum=0.0, label_smoothing=smoothing, warmup=1.0)
    models = ensemble.train(architecture, x, y, masks, recipe, seeds=range(4))
    for k, mask in enumerate(masks):
        before = architecture(k).double()
        loss = nn.functional.cross_entropy(before(x[mask]), y[mask], label_smoothing=smoothing)
        gradients = torch.autograd.grad(loss, list(before.parameters()))
        after = models.model(k)
        for p, g, q in zip(before.parameters(), gradients, after.parameters(), strict=True):
            torch.testing.assert_close(q, p - 0.125 * g, rtol=0, atol=1e-12)  # the rate is half way up at its middle
            assert g.abs().max() > 1e-4


def test_a_model_of_an_ensemble_is_a_module():
    x, y, test_x, _ = digits(torch.float32)
    for architecture in (MLP((64, 32, 10)), Seeded(Scaled)):
        models = ensemble.train(architecture, x, y, unequal_masks(3), SHORT, seeds=[5, 6, 7])
        assert len(models) == 3
        logits = models.logits(test_x)
        assert logits.shape == (3, 797, 10)
        for k in range(3):
            with torch.no_grad():
                torch.testing.assert_close(models.model(k)(test_x), logits[k], rtol=0, atol=1e-5)


def test_logits_of_many_examples_are_those_of_few():
    x, y, test_x, _ = digits(torch.float32)
    models = ensemble.train(MLP((64, 32, 10)), x, y, unequal_masks(3), SHORT, seeds=[5, 6, 7])
    whole = models.logits(test_x)
    parts = torch.cat([models.logits(test_x[:300]), models.logits(test_x[300:])], 1)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_training_leaves_the_inputs_and_the_global_generators_alone():
    x, y, _, _ = digits(torch.float32)
    before = x.clone(), y.clone(), torch.get_rng_state()
    for architecture in (MLP((64, 32, 10)), Seeded(Scaled)):
        ensemble.train(architecture, x, y, unequal_masks(2), SHORT, seeds=[1, 2])
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, torch.get_rng_state()), strict=True))


X, Y = torch.zeros(20, 6), torch.arange(20) % 4
MASKS = np.ones((3, 20), bool)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"masks": MASKS[:, :9]}, r"one entry for each of the 20 training examples, got shape \(9,\)"),
        ({"masks": MASKS[0]}, "one entry for each of the 20"),
        ({"masks": MASKS & (np.arange(3) != 1)[:, None]}, "mask 1: keeps none of 20 examples"),
        ({"masks": MASKS.astype(np.uint8)}, "expected bool, got uint8"),
        ({"masks": MASKS[:0], "seeds": []}, "one seed per mask and at least one, got 0 seeds"),
        ({"seeds": [1, 2]}, "one seed per mask and at least one, got 2 seeds"),
        ({"seeds": [1, 2, -3]}, r"int in \[0, 2\*\*63\), got -3"),
        ({"y": Y + 1}, r"labels in \[0, 4\).*got 1 to 4"),
        ({"y": Y[:5]}, r"labels of shape \(20,\), one per input; got \(5,\)"),
        ({"x": X.long()}, r"float inputs \(n, ...\), got torch.int64"),
        ({"x": X[:, :5]}, r"inputs of 6 numbers each.*got shape \(20, 5\)"),
        ({"x": X + torch.inf}, "seed 7 became infinite or NaN, one of 3 such models out of 3"),
        ({"at_once": 0}, "at_once of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    given = {"x": X, "y": Y, "masks": MASKS, "seeds": [7, 8, 9]} | change
    options = {name: given[name] for name in ("seeds", "at_once") if name in given}
    with pytest.raises(DatamodelsError, match=says):
        ensemble.train(MLP((6, 5, 4)), given["x"], given["y"], given["masks"], SHORT, **options)


def test_only_the_models_that_diverge_are_named():
    x = X.clone()
    x[0] = torch.inf
    masks = np.ones((3, 20), bool)
    masks[[0, 2], 0] = False
    with pytest.raises(DatamodelsError, match="seed 8 became infinite or NaN, one of 1 such models out of 3"):
        ensemble.train(MLP((6, 5, 4)), x, Y, masks, SHORT, seeds=[7, 8, 9])


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (lambda: nn.BatchNorm1d(6), "holds buffers, as batch normalisation does.*GroupNorm"),
        (lambda: nn.BatchNorm1d(6, track_running_stats=False), "0 is a BatchNorm1d, which.*use loop.train"),
        (lambda: nn.Dropout(0.5), "0 is a Dropout, which draws random numbers.*use loop.train"),
    ],
)
def test_modules_that_mix_examples_or_draw_numbers_are_refused(layer, says):
    with pytest.raises(DatamodelsError, match=says):
        ensemble.train(Seeded(lambda: nn.Sequential(layer(), nn.Linear(6, 4))), X, Y, MASKS, SHORT, seeds=[7, 8, 9])

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import nn

from datamodels.errors import DatamodelsError
from datamodels.learning import loop
from datamodels.learning.loop import Recipe
from datamodels.learning.models import MLP, Seeded

RNG = np.random.default_rng(0)
INPUTS = torch.from_numpy(RNG.normal(size=(60, 6)))
LABELS = torch.from_numpy(RNG.integers(0, 4, size=60))
MASK = np.arange(60) % 3 != 1  # 40 of 60
RECIPE = Recipe(epochs=3, batch_size=12, lr=0.3)


def trained(recipe=RECIPE, mask=MASK, seed=5, inputs=INPUTS, sizes=(6, 5, 4), **options):
    model = MLP(sizes)(seed).to(inputs.dtype)
    return loop.train(model, inputs, LABELS, mask, recipe, seed=seed, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("decay", "smoothing", "momentum"), [(0.0, 0.0, 0.9), (0.05, 0.2, 0.5)])
def test_a_linear_model_is_trained_as_the_formulas_say(nesterov, decay, smoothing, momentum):
    recipe = Recipe(3, 12, 0.3, momentum, nesterov, decay, smoothing, warmup=0.25)
    model = trained(recipe, sizes=(6, 4))

    start = MLP((6, 4))(5).double().state_dict()
    x1 = np.c_[INPUTS.numpy(), np.ones(60)]
    w = np.c_[start["0.weight"].numpy(), start["0.bias"].numpy()]
    v = np.zeros_like(w)
    updates = 3 * math.ceil(40 / 12)
    for t, batch in enumerate(loop.batches(np.flatnonzero(MASK), recipe, seed=5)):
        p = np.exp(x1[batch] @ w.T)
        p /= p.sum(1, keepdims=True)
        target = np.eye(4)[LABELS.numpy()[batch]] * (1 - smoothing) + smoothing / 4
        g = (p - target).T @ x1[batch] / len(batch) + decay * w
        v = momentum * v + g
        at = (t + 0.5) / updates
        rate = 0.3 * (at / 0.25 if at < 0.25 else (1 - at) / 0.75)
        w = w - rate * (g + momentum * v if nesterov else v)
    got = model.state_dict()
    np.testing.assert_allclose(np.c_[got["0.weight"], got["0.bias"]], w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("warmup", "peak"), [(0.0, 0), (0.2, 2), (1.0, 9)])
def test_the_rate_rises_to_a_peak_and_falls(warmup, peak):
    rates = Recipe(epochs=5, batch_size=10, lr=2.0, warmup=warmup).rates(15)
    assert len(rates) == 10
    assert rates.argmax() in (peak, peak - 1)
    assert (np.diff(rates[: rates.argmax() + 1]) > 0).all()
    assert (np.diff(rates[max(peak, 1) :]) < 0).all()
    assert rates.min() > 0
    assert rates.max() <= 2.0
    np.testing.assert_allclose(rates.mean(), 1.0, atol=0.06)  # a triangle's mean is half its height


def test_every_epoch_visits_the_members_once_in_another_order():
    members = np.flatnonzero(MASK)
    cut = list(loop.batches(members, RECIPE, seed=3))
    assert [len(batch) for batch in cut] == [12, 12, 12, 4] * 3
    epochs = [np.concatenate(cut[i : i + 4]) for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch) == members.tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = np.concatenate(list(loop.batches(members, RECIPE, seed=4)))
    assert not np.array_equal(np.concatenate(epochs), other)


def test_the_order_is_the_documented_one():
    """Sort the raw words of PCG64(SeedSequence((seed, 1))), the low 24 bits replaced by the position."""
    raw = np.random.PCG64(np.random.SeedSequence((0x6F726465, 7)))
    members = np.flatnonzero(MASK)
    for batch in loop.batches(members, Recipe(epochs=2, batch_size=60), seed=7):
        word = [(int(w) >> 24 << 24) + i for i, w in enumerate(raw.random_raw(40))]
        assert batch.tolist() == [members[w % 2**24] for w in sorted(word)]


def test_the_order_and_the_start_never_change():
    members = np.arange(1000)
    order = np.concatenate(list(loop.batches(members, Recipe(epochs=2), seed=11))).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == "28ac9cd372f3cc5e"
    start = weights(MLP((64, 32, 10))(11)).numpy().astype("<f4")
    assert hashlib.sha256(start.tobytes()).hexdigest()[:16] == "0f5eede373a8dacc"


def test_orders_are_uniform():
    first = [next(loop.batches(np.arange(8), Recipe(batch_size=1), seed=seed))[0] for seed in range(4000)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-squared with 7 degrees of freedom: p = 1e-4


def test_the_seed_alone_decides():
    a = weights(trained())
    torch.manual_seed(123)
    np.random.seed(123)
    assert torch.equal(a, weights(trained()))
    assert not torch.allclose(a, weights(trained(seed=6)))


def test_training_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    trained(augment=lambda x, generator: x + torch.rand(x.shape, generator=generator))
    Seeded(lambda: nn.Linear(3, 2))(4)
    assert torch.equal(before, torch.get_rng_state())


def test_what_the_mask_drops_does_not_matter():
    changed = INPUTS.clone()
    changed[~MASK] = 1e6
    assert torch.equal(weights(trained()), weights(trained(inputs=changed)))
    changed = INPUTS.clone()
    changed[0] += 1
    assert not torch.equal(weights(trained()), weights(trained(inputs=changed)))


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_max_batches_stops_after_so_many_updates(limit):
    seen = []

    def augment(x, generator):
        seen.append(len(x))
        return x

    model = trained(max_batches=limit, augment=augment)
    assert seen == ([12, 12, 12, 4] * 3)[:limit]
    assert not model.training
    assert not torch.equal(weights(model), weights(MLP((6, 5, 4))(5).double()))


def test_augmentation_is_used_and_comes_from_the_seed():
    def noise(x, generator):
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    a, b = weights(trained(augment=noise)), weights(trained(augment=noise))
    assert torch.equal(a, b)
    assert not torch.allclose(a, weights(trained()))
    draws = []
    for seed in (1, 2):
        trained(seed=seed, augment=lambda x, generator: (draws.append(torch.rand(1, generator=generator)), x)[1])
    assert len({float(d) for d in draws}) == len(draws)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask": MASK[:50]}, r"one entry for each of the 60 training examples, got shape \(50,\); give a mask"),
        ({"mask": np.zeros(60, bool)}, "keeps none of 60 examples; expected at least one"),
        ({"mask": MASK.astype(float)}, r"expected bool, got float64; convert with mask.astype\(bool\)"),
        ({"mask": np.stack([MASK, MASK])}, r"got shape \(2, 60\)|expected one entry"),
        ({"labels": LABELS + 1}, r"labels in \[0, 4\).*got 1 to 4"),
        ({"labels": LABELS[:50]}, r"labels of shape \(60,\), one per input; got \(50,\)"),
        ({"labels": LABELS.int()}, "int64, got torch.int32"),
        ({"inputs": LABELS[:, None]}, r"float inputs \(n, ...\), got torch.int64 \(60, 1\)"),
        ({"inputs": INPUTS * 1e300}, "seed 5 became infinite or NaN.*lower lr .now 0.3"),
        ({"seed": -1}, r"int in \[0, 2\*\*63\), got -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    given = {"inputs": INPUTS, "labels": LABELS, "mask": MASK, "recipe": RECIPE, "seed": 5} | change
    with pytest.raises(DatamodelsError, match=says):
        loop.train(MLP((6, 5, 4))(5).double(), **given)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.0),
        ("warmup", 1.1),
    ],
)
def test_a_recipe_is_refused(field, value):
    with pytest.raises(DatamodelsError, match=rf"recipe: expected {field} .*got {value}"):
        Recipe(**{field: value})


def test_nesterov_needs_momentum():
    with pytest.raises(DatamodelsError, match="nesterov false where momentum is 0"):
        Recipe(momentum=0.0, nesterov=True)

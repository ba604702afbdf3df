"""Chains against closed forms: stationary laws, acceptance, boxes; what is promised of seeds, batches, the model."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from datamodels.errors import MeasurementError
from datamodels.measurements.samplers import SAMPLERS, Settings, default_nbeta, sample

N = 1000
NBETA = N / math.log(N)  # 144.765


class Potential(nn.Module):
    """A loss of the weights alone; the data are not looked at."""

    def __init__(self, of, start):
        super().__init__()
        self.of, self.w = of, nn.Parameter(torch.as_tensor(start, dtype=torch.float32))

    def forward(self, x):
        return self.of(self.w)


def itself(outputs, labels):
    return outputs


def nothing(n=N):
    return torch.zeros(n, 1), torch.zeros(n)


def quadratic(curvatures):
    a = torch.as_tensor(curvatures, dtype=torch.float32)
    return Potential(lambda w: 0.5 * (a * w * w).sum(), torch.zeros(len(a)))


def network(seed=0, *, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, (torch.randn(60, 5, dtype=dtype), torch.randint(0, 3, (60,)))


class Branching(nn.Module):
    """The same network with a branch on a number, which vmap cannot take."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if float(self.inner[0].weight.detach().sum()) < 1e6 else x


def run(model, data, loss_fn=functional.cross_entropy, *, seed=0, masks=None, at_once=None, **settings):
    given = Settings(**{"checks": 20, **settings})
    return sample(model, loss_fn, data, given, seed=seed, masks=masks, at_once=at_once)


# -- the laws ---------------------------------------------------------------------------------------------


def mean_and_error(values):
    """Of independent chains, whose means know nothing of autocorrelation."""
    means = values.mean(axis=1)
    return means.mean(), means.std(ddof=1) / math.sqrt(len(means))


@pytest.mark.parametrize("h", [0.3, 1.0, 2.0, 3.0])
def test_sgld_has_its_own_stationary_variance(h):
    # variance 1/(H(1 − h/4)) at h = εH: the step's own error is part of the answer
    H = 2 * NBETA + 100
    found = run(quadratic([2.0] * 8), nothing(), itself, epsilon=h / H, gamma=100, chains=200, draws=500, burn_in=40)
    mean, error = mean_and_error(NBETA * found.excess)
    truth = 8 * 0.5 * 2 * NBETA / (H * (1 - h / 4))
    assert 3.5 * error < 0.025 * truth
    assert abs(mean - truth) < 3.5 * error
    assert found.nbeta == pytest.approx(NBETA) and found.n == N and found.num_parameters == 8
    # and how much of it is the step's error is known
    assert found.step_bias.mean() == pytest.approx(mean * h / 4, rel=0.05)


@pytest.mark.parametrize("h", [0.3, 1.5, 3.0])
def test_acceptance_is_its_closed_form_over_sglds_own_law(h):
    # ½ + arccos(a′)/(π√(1−a′²)), a′ = (h^{3/2}/4)/√(1−h/4), arccosh and √(a′²−1) above 1
    a = h**1.5 / 4 / math.sqrt(1 - h / 4)
    ratio = math.acos(a) / math.sqrt(1 - a * a) if a < 1 else math.acosh(a) / math.sqrt(a * a - 1)
    truth = 0.5 + ratio / math.pi
    H = 2 * NBETA + 1
    found = run(quadratic([2.0]), nothing(), itself, epsilon=h / H, gamma=1, chains=400, draws=150, burn_in=50,
                thin=2, checks=150)  # fmt: skip
    mean, error = mean_and_error(found.acceptance)
    assert 3.5 * error < 0.01
    assert abs(mean - truth) < 3.5 * error


@pytest.mark.parametrize(
    ("sampler", "epsilon", "bias"), [("sgld", 6e-5, 0.008), ("sgnht", 2e-4, 0.008), ("rmsprop", 1e-5, 0.01)]
)
def test_unequal_curvatures(sampler, epsilon, bias):
    curvatures, gamma = np.array([0.5, 2, 5, 8.0] * 4), 50
    H = curvatures * NBETA + gamma
    truth = (0.5 * curvatures * NBETA / H).sum()
    found = run(quadratic(curvatures), nothing(), itself, epsilon=epsilon, gamma=gamma, sampler=sampler, chains=300,
                draws=120, burn_in=500, thin=8)  # fmt: skip
    mean, error = mean_and_error(NBETA * found.excess)
    assert 3.5 * error < 0.03 * truth
    assert abs(mean - truth) < 3.5 * error + bias * truth


def test_rmsprop_preconditioner_stands_still_after_burn_in():
    # one with a memory this short, still learning, would be small where weights are large, and so would their moves
    found = run(quadratic([2.0] * 16), nothing(), itself, epsilon=6e-5, gamma=50, sampler="rmsprop", decay=0.5,
                chains=300, draws=150, burn_in=300, thin=4, checks=150)  # fmt: skip
    truth = 16 * NBETA / (2 * NBETA + 50)
    mean, error = mean_and_error(NBETA * found.excess - found.step_bias)
    assert 3.5 * error < 0.02 * truth
    assert abs(mean - truth) < 3.5 * error


def test_sgnht_cools_what_small_batches_heat():
    # noise of the gradient, of variance v, adds (ε/2)² nβ² v to sgld's ε; the thermostat takes it away again
    shifts = 0.76 * torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    data = (shifts - shifts.mean(0), torch.zeros(200))

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(20))

        def forward(self, x):
            return self.w + x

    def loss(outputs, labels):
        return 0.5 * outputs.square().sum(-1).mean()

    truth = 20 * 0.5 * NBETA / (NBETA + 10)
    settings = {"epsilon": 2e-3, "gamma": 10, "nbeta": NBETA, "batch_size": 20, "chains": 60, "draws": 150,
                "burn_in": 200, "thin": 4, "checks": 150}  # fmt: skip
    heat = 2e-3 / 4 * NBETA**2 * 0.76**2 / 20
    hot = run(Shifted(), data, loss, **settings)
    heated, error = mean_and_error(NBETA * hot.excess)
    assert (
        abs(heated / truth - 1 - heat - 2e-3 * (NBETA + 10) / 4) < 0.05
    )  # noise of the batches, and of the step's size
    assert hot.step_bias.mean() == pytest.approx(heated - truth, rel=0.15)
    found = run(Shifted(), data, loss, sampler="sgnht", **settings)
    mean, error = mean_and_error(NBETA * found.excess)
    assert 3.5 * error < 0.04 * truth
    assert abs(mean - truth) < 3.5 * error + 0.01 * truth


def test_a_box_without_a_loss_is_filled_evenly():
    flat = Potential(lambda w: 1e-9 * w.sum(), torch.full((3,), 5.0))
    for sampler in ("sgld", "sgnht"):
        found = run(flat, nothing(), itself, epsilon=0.02, gamma=0, sampler=sampler, box=0.5, chains=200, draws=200,
                    burn_in=100, thin=5)  # fmt: skip
        mean, error = mean_and_error(found.distance**2)
        assert abs(mean - 3 * 0.25 / 3) < 3.5 * error, sampler
        assert 3.5 * error < 0.02
        assert found.distance.max() <= 0.5 * math.sqrt(3) + 1e-6
        np.testing.assert_allclose(found.acceptance, 1, atol=1e-5)  # nothing to refuse on even ground


def test_acceptance_behind_the_wall_of_a_box():
    # Langevin steps whose acceptance is computed right leave exp(−U) as it is: E α(w, w') summed both ways agrees with
    # detailed balance. Here against a direct Metropolis computation in numpy, on one coordinate of a slope.
    slope, gamma, epsilon, half = 0.05, 3.0, 0.2, 0.5
    found = run(Potential(lambda w: slope * w.sum(), torch.zeros(1)), nothing(), itself, epsilon=epsilon, gamma=gamma,
                box=half, chains=800, draws=100, burn_in=50, checks=100)  # fmt: skip
    rng = np.random.default_rng(0)

    def fold(u):
        r = np.mod(u + half, 4 * half)
        return np.where(r < 2 * half, r - half, 3 * half - r), np.where(r < 2 * half, 1.0, -1.0)

    def energy(u):
        w, _ = fold(u)
        return NBETA * slope * w + gamma / 2 * w**2

    def force(u):
        w, sign = fold(u)
        return -(NBETA * slope + gamma * w) * sign

    w, accepted = np.zeros(80_000), []
    for step in range(60):
        new = w + epsilon / 2 * force(w) + math.sqrt(epsilon) * rng.standard_normal(len(w))
        forth = -((new - w - epsilon / 2 * force(w)) ** 2) / (2 * epsilon)
        back = -((w - new - epsilon / 2 * force(new)) ** 2) / (2 * epsilon)
        if step >= 50:
            accepted.append(np.exp(np.minimum(0, energy(w) - energy(new) + back - forth)).mean())
        w = fold(new)[0]
    mean, error = mean_and_error(found.acceptance)
    assert 3.5 * error < 0.01
    assert abs(mean - np.mean(accepted)) < 3.5 * error + 0.003


# -- which states are kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_kept_states_are_those_after_burn_in_and_each_thinning(sampler, at_once):
    settings = {"epsilon": 1e-3, "gamma": 10, "sampler": sampler, "chains": 3}
    every = run(quadratic([2.0, 2.0]), nothing(), itself, burn_in=7, draws=30, at_once=at_once, **settings)
    third = run(quadratic([2.0, 2.0]), nothing(), itself, burn_in=7, draws=10, thin=3, at_once=at_once, **settings)
    np.testing.assert_array_equal(every.trace, third.trace)
    np.testing.assert_allclose(third.excess, every.trace[:, [10 + 3 * i for i in range(10)]])
    np.testing.assert_allclose(every.excess, every.trace[:, 8:])
    # the loss is that of the state it stands beside, not of the one before
    np.testing.assert_allclose(every.excess, every.distance**2, rtol=1e-5)
    assert every.initial_loss == 0 and (every.trace[:, 0] == 0).all()


def test_norms_are_those_of_the_parts_of_a_step():
    epsilon, gamma, p = 1e-3, 30, 400
    found = run(quadratic([2.0] * p), nothing(), itself, epsilon=epsilon, gamma=gamma, chains=2, draws=50, burn_in=3,
                checks=50)  # fmt: skip
    np.testing.assert_allclose(found.pull_norm[:, 1:], epsilon / 2 * gamma * found.distance[:, :-1], rtol=1e-5)
    np.testing.assert_allclose(found.gradient_norm[:, 1:], epsilon / 2 * NBETA * 2 * found.distance[:, :-1], rtol=1e-5)
    np.testing.assert_allclose(found.noise_norm**2 / (epsilon * p), 1, atol=6 * math.sqrt(2 / p))


# -- seeds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("at_once", [1, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_chain_does_not_depend_on_those_beside_it(sampler, at_once, batch_size):
    model, data = network(dtype=torch.float64)
    settings = {"epsilon": 1e-3, "gamma": 10, "sampler": sampler, "draws": 12, "burn_in": 3, "batch_size": batch_size}
    few, many = (run(model, data, chains=c, at_once=at_once, **settings) for c in (2, 5))
    assert many.at_once == at_once
    np.testing.assert_allclose(many.excess[:2], few.excess, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(many.trace[:2], few.trace, rtol=1e-9)
    everywhere = many.excess.round(9)
    assert len(np.unique(everywhere)) == everywhere.size  # no two chains share their noise
    again, other = (run(model, data, chains=2, at_once=at_once, seed=s, **settings) for s in (0, 1))
    np.testing.assert_array_equal(again.excess, few.excess)
    assert not np.isin(other.excess.round(9), everywhere).any()


def test_chains_of_one_seed_are_uncorrelated():
    found = run(quadratic([2.0]), nothing(), itself, epsilon=6e-3, gamma=1, chains=200, draws=400, burn_in=10)
    correlation = np.corrcoef(found.excess)[~np.eye(200, dtype=bool)]
    assert abs(correlation).max() < 0.35  # 1/√draws is .05; shared noise would give 1
    assert abs(correlation.mean()) < 0.005


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_together_and_one_by_one_agree(sampler, batch_size):
    model, data = network(dtype=torch.float64)
    settings = {"epsilon": 2e-3, "gamma": 10, "sampler": sampler, "chains": 4, "draws": 20, "burn_in": 5,
                "batch_size": batch_size, "box": 0.2}  # fmt: skip
    together, pairs, alone = (run(model, data, at_once=k, **settings) for k in (4, 2, 1))
    assert (together.at_once, pairs.at_once, alone.at_once) == (4, 2, 1)
    for name in ("excess", "trace", "acceptance", "gradient_norm", "pull_norm", "noise_norm", "distance"):
        for other in (pairs, alone):
            np.testing.assert_allclose(
                getattr(other, name), getattr(together, name), rtol=1e-6, atol=1e-10, err_msg=name
            )


# -- batches ---------------------------------------------------------------------------------------------------------


def test_losses_of_batches_and_of_all_examples_mean_the_same():
    # both compare w and w* on the same data; a chain's path is the same for both, so that they may be held side by side
    torch.manual_seed(0)
    n = 300
    x = torch.randn(n, 6)
    y = x @ torch.arange(6.0) + 0.3 * torch.randn(n)
    model = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Flatten(0))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.T)

    def loss(outputs, labels):
        return 0.5 * (outputs - labels).square().mean()

    nbeta = n / math.log(n)
    settings = {"epsilon": 1e-3, "gamma": 20, "batch_size": 60, "chains": 40, "draws": 80, "burn_in": 100, "thin": 5}
    batch, every = (run(model, (x, y), loss, losses=losses, **settings) for losses in ("batch", "all"))
    np.testing.assert_array_equal(batch.trace, every.trace)
    mean, error = mean_and_error(nbeta * (batch.excess - every.excess))
    assert abs(mean) < 3.5 * error and 3.5 * error < 0.05 * nbeta * every.excess.mean()
    # the losses of the trace are not held against those of w* on the same batch: the same mean, and all its noise
    raw, noise = mean_and_error(nbeta * (batch.trace[:, 105::5] - batch.initial_loss))
    assert abs(raw - nbeta * every.excess.mean()) < 3.5 * noise
    # chains that do not move have no excess, whatever the batch
    still = run(model, (x, y), loss, **{**settings, "epsilon": 1e-16, "draws": 20})
    assert abs(still.excess).max() < 1e-6 and still.trace.std() > 1e-3


def test_every_example_is_drawn_and_batches_are_a_chains_own():
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            seen.append(x.flatten().tolist())
            return self.w * x.flatten()

    data = (torch.arange(10.0)[:, None], torch.zeros(10))
    run(
        Watching(),
        data,
        functional.mse_loss,
        epsilon=1e-4,
        gamma=1,
        chains=2,
        draws=200,
        batch_size=4,
        checks=1,
        at_once=1,
    )
    drawn = [tuple(batch) for batch in seen if len(batch) == 4]
    assert {example for batch in drawn for example in batch} == set(range(10))
    assert len(set(drawn)) > 300
    counts = np.bincount(np.array(drawn, int).ravel(), minlength=10)
    assert counts.min() > 0.8 * counts.mean()


def test_the_initial_loss_is_over_all_examples_in_eval_mode():
    model, data = normed()
    with torch.no_grad():
        truth = float(functional.cross_entropy(copy.deepcopy(model).eval()(data[0]), data[1]))
    for batch_size in (None, 7):
        found = run(model, data, epsilon=1e-6, gamma=1, chains=1, draws=1, batch_size=batch_size)
        assert found.initial_loss == pytest.approx(truth, rel=1e-6)


# -- the model -------------------------------------------------------------------------


def normed():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )
    data = (torch.randn(40, 1, 6, 6) * 2 + 1, torch.randint(0, 3, (40,)))
    model(data[0])  # running statistics that are neither 0 and 1 nor the data's
    return model.train(), data


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_the_model_is_left_as_it_was(at_once):
    model, data = normed()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[5].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    found = run(model, data, epsilon=1e-4, gamma=10, chains=2, draws=5, batch_size=8, at_once=at_once)
    assert found.at_once == (at_once or 1) and np.isfinite(found.excess).all()
    for (name, one), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[5].weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_loss_is_one_function_of_the_weights():
    # eval mode: no dropout, and statistics that do not follow the batch
    model, data = normed()
    found = run(model, data, epsilon=1e-14, gamma=0, chains=2, draws=6)
    np.testing.assert_allclose(found.trace, found.initial_loss, rtol=1e-4)


def test_what_vmap_cannot_take_goes_one_by_one():
    model, data = network()
    settings = {"epsilon": 1e-3, "gamma": 10, "chains": 9, "draws": 6, "batch_size": 10}
    plain, branching = run(model, data, at_once=1, **settings), run(Branching(model), data, **settings)
    assert branching.at_once == 1 and "vmap" in branching.one_by_one_because
    np.testing.assert_array_equal(branching.excess, plain.excess)
    together = run(model, data, **settings)
    assert together.one_by_one_because is None and together.at_once == 9
    few = run(model, data, **{**settings, "chains": 3})
    assert few.at_once == 1 and "fewer than 8 chains" in few.one_by_one_because
    with pytest.raises(MeasurementError, match="2 chains at once cannot be computed for this model.*vmap"):
        run(Branching(model), data, at_once=2, **settings)


def test_masked_weights_stand_still():
    found = run(quadratic([2.0] * 6), nothing(), itself, epsilon=4e-3, gamma=1, chains=100, draws=200, burn_in=20,
                masks={"w": torch.tensor([True, False] * 3)})  # fmt: skip
    mean, error = mean_and_error(NBETA * found.excess)
    H = 2 * NBETA + 1
    truth = 3 * 0.5 * 2 * NBETA / (H * (1 - 4e-3 * H / 4))
    assert found.num_parameters == 3
    assert abs(mean - truth) < 3.5 * error and 3.5 * error < 0.05 * truth
    slope = Potential(lambda w: w[0].square() + 5 * w[1], torch.zeros(2))  # one that would have the masked weight move
    held = run(
        slope, nothing(), itself, epsilon=1e-3, gamma=1, chains=2, draws=20, masks={"w": torch.tensor([True, False])}
    )
    np.testing.assert_allclose(held.excess, held.distance**2, rtol=1e-5)

    model, data = network()
    settings = {"epsilon": 1e-3, "gamma": 10, "chains": 2, "draws": 5}
    names = {"0.weight": False, "0.bias": False}
    by_name = run(model, data, masks=names, **settings)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    frozen = run(model, data, **settings)
    assert by_name.num_parameters == frozen.num_parameters == 27
    np.testing.assert_array_equal(by_name.excess, frozen.excess)


def test_tied_parameters_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    data = (torch.randn(20, 4), torch.randint(0, 4, (20,)))
    together, alone = (
        run(Tied(), data, epsilon=1e-3, gamma=1, chains=2, draws=10, at_once=k, seed=4) for k in (2, 1)
    )  # fmt: skip
    assert together.num_parameters == 16
    torch.manual_seed(0)
    assert together.excess.shape == alone.excess.shape


# -- what goes wrong -------------------------------------------------------------------


def test_a_chain_that_diverges_is_stopped_and_named():
    # steep far out: some chains jump over the edge from which there is no way back, others do not in this time
    steep = Potential(lambda w: 0.25 * w.pow(4).sum(), torch.zeros(1))
    found = run(steep, nothing(), itself, epsilon=0.06, gamma=0, chains=40, draws=60)
    assert 0 < len(found.stopped) < 40
    for chain in range(40):
        trace = found.trace[chain]
        if chain in found.stopped:
            step = found.stopped[chain]
            assert np.isfinite(trace[:step]).all() and not np.isfinite(trace[step])
            assert np.isnan(found.excess[chain]).all()
        else:
            assert np.isfinite(trace).all() and np.isfinite(found.excess[chain]).all()
    assert found.running == [c for c in range(40) if c not in found.stopped]
    alone = run(steep, nothing(), itself, epsilon=0.06, gamma=0, chains=40, draws=60, checks=1, at_once=1)
    assert alone.stopped == found.stopped


@pytest.mark.parametrize("at_once", [1, 3])
def test_if_all_diverge_it_is_an_error_with_step_and_settings(at_once):
    h = 60 * (2 * NBETA + 1)
    with pytest.raises(
        MeasurementError, match=r"all 3 chains, first in chain \d at step \d+; lower epsilon.*n=1000.*epsilon=60.*sgld"
    ):
        run(quadratic([2.0]), nothing(), itself, epsilon=60, gamma=1, chains=3, draws=400, at_once=at_once)
    assert h > 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0}, "epsilon above 0"),
        ({"epsilon": math.nan}, "epsilon above 0"),
        ({"gamma": -1}, "gamma at least 0"),
        ({"sampler": "hmc"}, "sampler as one of sgld, sgnht, rmsprop, got 'hmc'"),
        ({"nbeta": 0}, "nbeta above 0"),
        ({"chains": 0}, "chains as an int"),
        ({"draws": 1.5}, "draws as an int"),
        ({"burn_in": -1}, "burn_in as an int"),
        ({"thin": 0}, "thin as an int"),
        ({"batch_size": 0}, "batch_size as an int"),
        ({"losses": "fresh"}, "losses as one of batch, all"),
        ({"box": 0}, "box above 0"),
        ({"checks": 0}, "checks as an int"),
        ({"friction": 1}, r"friction in \(0, 1\)"),
        ({"decay": 1}, r"decay in \(0, 1\)"),
        ({"stabilizer": 0}, "stabilizer above 0"),
        ({"sampler": "rmsprop"}, "burn_in of at least 1, got 0"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(MeasurementError, match=message):
        Settings(**{"epsilon": 1e-3, "gamma": 1, **wrong})


def test_what_does_not_fit_is_refused():
    model, data = network()
    given = {"epsilon": 1e-3, "gamma": 1, "draws": 2}
    with pytest.raises(MeasurementError, match="no parameter '0.wait'"):
        run(model, data, masks={"0.wait": False}, **given)
    with pytest.raises(MeasurementError, match=r"expected bool \(8, 5\), got torch.bool \(5,\)"):
        run(model, data, masks={"0.weight": torch.ones(5, dtype=torch.bool)}, **given)
    with pytest.raises(MeasurementError, match="none of 4 parameters is free"):
        run(model, data, masks={name: False for name, _ in model.named_parameters()}, **given)
    with pytest.raises(MeasurementError, match="same n >= 2 examples, got 60 and 3"):
        run(model, (data[0], data[1][:3]), **given)
    with pytest.raises(MeasurementError, match="batch_size of at most n = 60, got 61"):
        run(model, data, batch_size=61, **given)
    with pytest.raises(MeasurementError, match=r"return a scalar, got shape \(\d+,\)"):
        run(model, data, lambda o, y: functional.cross_entropy(o, y, reduction="none"), **given)
    with pytest.raises(MeasurementError, match="one dtype, float32 or float64.*torch.float16"):
        run(copy.deepcopy(model).half(), data, **given)
    with pytest.raises(MeasurementError, match="at_once as an int of at least 1"):
        run(model, data, at_once=0, **given)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(MeasurementError, match="loss of the model itself is nan"):
        run(model, data, **given)


def test_nbeta_is_recorded_with_n():
    assert default_nbeta(1000) == pytest.approx(144.765, abs=1e-3)
    model, data = network()
    found = run(model, data, epsilon=1e-3, gamma=1, draws=2, batch_size=10)
    assert (found.n, found.nbeta) == (60, pytest.approx(60 / math.log(60)))  # of all examples, not of a batch
    found = run(model, data, epsilon=1e-3, gamma=1, draws=2, nbeta=7)
    assert (found.n, found.nbeta) == (60, 7.0)


def test_progress_counts_every_step_of_every_chain():
    told = []
    settings = Settings(epsilon=1e-3, gamma=1, chains=3, draws=60, burn_in=11, thin=2)
    model, data = network()
    for at_once in (1, 3):
        told.clear()
        sample(model, functional.cross_entropy, data, settings, seed=0, at_once=at_once, progress=told.append)
        assert sum(told) == 3 * 131 and len(told) > 2

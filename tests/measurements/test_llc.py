"""The local learning coefficient at finite nβ against exact values, and what is said of chains against closed forms."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from datamodels.errors import MeasurementError
from datamodels.measurements import llc
from datamodels.measurements.samplers import Settings

N = 1000
NBETA = N / math.log(N)  # 144.765


class Potential(nn.Module):
    """A loss of the weights alone; the data are not looked at."""

    def __init__(self, of, **start):
        super().__init__()
        self.of = of
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(torch.as_tensor(value, dtype=torch.float32)))

    def forward(self, x):
        return self.of(*self.parameters())


def estimate(model, *, seed=0, **settings):
    data = (torch.zeros(N, 1), torch.zeros(N))
    given = Settings(**{"checks": 20, **settings})
    return llc.estimate(model, lambda outputs, labels: outputs, data, given, seed=seed)


def agrees(found, truth, *, truth_error=0.0, bias=0.0):
    """Within 3.5 of the estimator's own standard errors, and so close that 5 % to either side would be far outside."""
    width = 3.5 * math.hypot(found.standard_error, truth_error) + bias * truth
    assert width < 0.035 * truth, f"{width / truth:.3f}: too wide to tell"
    assert abs(found.mean - truth) < width, f"{found} against {truth:.4f}"
    assert found.verdict.word == llc.TRUST, found


# -- exact values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "truth"), [(1, 0.498279), (100, 0.371640)])
@pytest.mark.parametrize(
    ("sampler", "epsilon", "bias"), [("sgld", 1e-4, 0.011), ("sgnht", 1e-3, 0.005), ("rmsprop", 4e-5, 0.018)]
)
def test_quadratics(sampler, epsilon, bias, gamma, truth):
    model = Potential(lambda w: w.square().sum(), w=torch.zeros(20))
    found = estimate(model, epsilon=epsilon, gamma=gamma, sampler=sampler, chains=240, draws=150, burn_in=250, thin=8)
    agrees(found, 20 * truth, bias=bias)


@pytest.mark.parametrize(("k", "truth"), [((1, 1), 0.35588), ((1, 2), 0.20898)])
@pytest.mark.parametrize(
    ("sampler", "epsilon", "steps"),
    [
        ("sgnht", 1e-3, {"chains": 4000, "draws": 40, "burn_in": 700, "thin": 20}),
        pytest.param("sgld", 1e-3, {"chains": 2500, "draws": 80, "burn_in": 3000, "thin": 30}, marks=pytest.mark.slow),
    ],
)
def test_normal_crossings_in_a_box(sampler, epsilon, steps, k, truth):
    grid = (np.arange(2000) + 0.5) / 2000  # the midpoint rule, one quadrant
    K = grid[:, None] ** (2 * k[0]) * grid ** (2 * k[1])
    density = np.exp(-NBETA * K)
    assert (NBETA * K * density).sum() / density.sum() == pytest.approx(truth, abs=2e-5)
    model = Potential(lambda w: w[0] ** (2 * k[0]) * w[1] ** (2 * k[1]), w=torch.zeros(2))
    found = estimate(model, epsilon=epsilon, gamma=0, sampler=sampler, box=1, **steps)
    agrees(found, truth, bias=0.01)


def reduced_rank(rank):
    """K = ½ ‖BA − T‖² of (5, 3, 5), at the diagonal truth of that rank."""
    truth = torch.diag((torch.arange(5) < rank).float())
    return Potential(lambda A, B: 0.5 * (B @ A - truth).square().sum(), A=truth[:3], B=truth[:, :3])


@functools.cache
def gibbs(rank, gamma, *, chains=400, sweeps=400, burn_in=200, seed=0):
    """λ̂ and its standard error by drawing A given B and B given A, both normal, in turn."""
    rng = np.random.default_rng(seed)
    T = np.diag((np.arange(5) < rank).astype(float))
    A0, B0 = T[:3], T[:, :3]
    A, B = np.tile(A0, (chains, 1, 1)), np.tile(B0, (chains, 1, 1))

    def draw(design, target, centre):
        """X (3, m) of nβ/2 ‖design X − target‖² + γ/2 ‖X − centre‖²."""
        precision = NBETA * design.transpose(0, 2, 1) @ design + gamma * np.eye(3)
        mean = np.linalg.solve(precision, NBETA * design.transpose(0, 2, 1) @ target + gamma * centre)
        root = np.linalg.cholesky(precision)
        noise = rng.standard_normal(mean.shape)
        return mean + np.linalg.solve(root.transpose(0, 2, 1), noise)

    values = np.empty((sweeps, chains))
    for sweep in range(burn_in + sweeps):
        A = draw(B, T, A0)
        B = draw(A.transpose(0, 2, 1), T.T, B0.T).transpose(0, 2, 1)
        if sweep >= burn_in:
            values[sweep - burn_in] = 0.5 * NBETA * ((B @ A - T) ** 2).sum((1, 2))
    means = values.mean(axis=0)
    return means.mean(), means.std(ddof=1) / math.sqrt(chains)


REDUCED_RANK = {1: (6.05, 7.71, 9.20, 10.51), 10: (4.32, 6.44, 8.35, 10.02), 100: (0.46, 2.95, 5.11, 6.90)}


@pytest.mark.slow
@pytest.mark.parametrize("gamma", REDUCED_RANK)
@pytest.mark.parametrize("rank", range(4))
def test_reduced_rank_regression(rank, gamma):
    truth, error = gibbs(rank, gamma)
    assert abs(truth - REDUCED_RANK[gamma][rank]) < 3.5 * math.hypot(error, 0.02)
    chains = 120 if rank or gamma < 100 else 600
    found = estimate(reduced_rank(rank), epsilon=3e-4, gamma=gamma, sampler="sgnht", chains=chains, draws=150,
                     burn_in=900, thin=8, friction=0.05)  # fmt: skip
    agrees(found, truth, truth_error=error, bias=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "gamma"), [(0, 100), (3, 10)])
def test_reduced_rank_regression_by_sgld(rank, gamma):
    truth, error = gibbs(rank, gamma)
    found = estimate(
        reduced_rank(rank), epsilon=1e-4, gamma=gamma, chains=500 if rank else 1500, draws=100, burn_in=1500, thin=20
    )
    agrees(found, truth, truth_error=error, bias=0.015)


def test_wbic_is_n_times_the_mean_loss():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = (torch.randn(50, 4), torch.randint(0, 3, (50,)))
    settings = Settings(epsilon=1e-3, gamma=10, chains=3, draws=40, burn_in=5)
    found = llc.estimate(model, functional.cross_entropy, data, settings, seed=1)
    assert found.wbic == pytest.approx(50 * found.chains.trace[:, 6:].mean())
    assert found.mean == pytest.approx(
        50 / math.log(50) * (found.chains.trace[:, 6:] - found.chains.initial_loss).mean()
    )


# -- what is said of the draws ---------------------------------------------------------------------------------------


def autoregressive(phi, chains, draws, seed=0):
    """x_t = φ x_{t−1} + noise, from its stationary law of variance 1."""
    rng = np.random.default_rng(seed)
    x = np.empty((draws, chains))
    x[0] = rng.standard_normal(chains)
    for t in range(1, draws):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi * phi) * rng.standard_normal(chains)
    return x.T


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.97, -0.4])
def test_effective_sample_size_and_error_of_autoregressions(phi):
    found = [llc.effective_sample_size(autoregressive(phi, 4, 4000, seed)) for seed in range(20)]
    assert np.mean(found) == pytest.approx(16_000 * (1 - phi) / (1 + phi), rel=0.1)
    values = autoregressive(phi, 4, 2000)
    assert llc.standard_error(values) == pytest.approx(math.sqrt((1 + phi) / (1 - phi) / 8000), rel=0.2)


@pytest.mark.parametrize("shape", [(1, 1000), (4, 500), (40, 60)])
def test_intervals_cover_as_often_as_they_say(shape):
    scores = []
    for seed in range(200):
        values = autoregressive(0.8, *shape, seed=seed)
        scores.append(values.mean() / llc.standard_error(values))
    assert np.mean(np.abs(scores) < 1.96) == pytest.approx(0.95, abs=0.04)
    assert np.std(scores) == pytest.approx(1, abs=0.12)


def test_disagreement_between_chains_is_in_the_error():
    values = autoregressive(0.0, 4, 200) + np.array([[0.0], [1], [2], [3]])
    assert llc.standard_error(values) > 0.4  # of four means with deviation 1.3
    assert llc.standard_error(values - values.mean(axis=1, keepdims=True)) < 0.05


def test_split_rhat():
    # by hand: halves (1, 2), (3, 4), (2, 3), (4, 7); within .5, .5, .5, 4.5; means 1.5, 3.5, 2.5, 5.5
    values = np.array([[1.0, 2, 3, 4], [2, 3, 4, 7]])
    within, between = 1.5, np.var([1.5, 3.5, 2.5, 5.5], ddof=1)
    assert llc.split_rhat(values) == pytest.approx(math.sqrt((within / 2 + between) / within))
    assert llc.split_rhat(autoregressive(0.5, 4, 4000)) == pytest.approx(1, abs=0.01)
    assert llc.split_rhat(autoregressive(0.5, 2, 400) + [[0], [5]]) > 2
    trend = np.linspace(0, 5, 400) + autoregressive(0, 2, 400)
    assert llc.split_rhat(trend) > 1.5  # each chain agrees with the other and not with itself
    assert llc.split_rhat(np.ones((2, 10))) == 1
    assert llc.split_rhat(np.repeat([[1.0], [2.0]], 10, axis=1)) == math.inf


def test_few_and_constant_values():
    assert llc.standard_error(np.ones((1, 1))) == math.inf
    assert llc.effective_sample_size(np.ones((3, 50))) == 1
    assert llc.effective_sample_size(np.array([[1.0], [2], [3]])) == 3
    assert llc.standard_error(np.array([[1.0], [2], [3]])) == pytest.approx(math.sqrt(1 / 3))
    with pytest.raises(MeasurementError, match="finite values"):
        llc.effective_sample_size(np.array([[1.0, math.nan]]))


def test_errors_of_single_chains_are_honest():
    # each chain is an estimate of its own; the truth is known, so its standard error can be held against its error
    model = Potential(lambda w: w.square().sum(), w=torch.zeros(5))
    epsilon, gamma = 2e-4, 100
    H = 2 * NBETA + gamma
    truth = 5 * NBETA / (H * (1 - epsilon * H / 4))
    found = estimate(model, epsilon=epsilon, gamma=gamma, chains=300, draws=1000, burn_in=100)
    scores = [(v.mean() - truth) / llc.standard_error(v[None]) for v in found.values]
    assert np.std(scores) == pytest.approx(1, abs=0.15)
    assert abs(np.mean(scores)) < 0.25
    assert found.standard_error == pytest.approx(np.std(found.per_chain) / math.sqrt(300), rel=0.15)


# -- verdicts --------------------------------------------------------------------------


def bowl(p=10):
    return Potential(lambda w: w.square().sum(), w=torch.zeros(p))


def test_trust():
    found = estimate(bowl(), epsilon=5e-4, gamma=10, draws=600, burn_in=200)
    assert found.verdict.word == "trust", found
    assert "R-hat" in found.verdict.reason and "effective draws" in found.verdict.reason
    low, high = found.interval
    assert high - found.mean == pytest.approx(1.96 * found.standard_error)
    assert found.mean - low == pytest.approx(1.96 * found.standard_error + found.step_bias) and found.step_bias > 0
    assert found.running[:, -1] == pytest.approx(found.per_chain)
    assert found.running[:, 1] == pytest.approx(found.values[:, :2].mean(axis=1))
    row = found.columns()
    assert row["llc"] == found.mean and row["n"] == N and row["nbeta"] == pytest.approx(NBETA)
    assert row["verdict"] == "trust" and row["num_parameters"] == 10 and row["share_below"] == 0
    assert all(isinstance(v, str) or math.isfinite(v) for v in row.values())


def test_step_too_large():
    found = estimate(bowl(), epsilon=3 / (2 * NBETA + 10), gamma=10, draws=600, burn_in=200)
    assert found.verdict.word == "step too large", found
    assert found.step_bias == pytest.approx(found.mean * 3 / 4, rel=0.1)
    assert f"epsilon={3 / (2 * NBETA + 10):g}" in found.verdict.reason


def test_a_stopped_chain_makes_the_step_too_large_and_does_not_count():
    steep = Potential(lambda w: 0.25 * w.pow(4).sum(), w=torch.zeros(1))
    found = estimate(steep, epsilon=0.06, gamma=0, chains=40, draws=60)
    count = len(found.chains.stopped)
    assert 0 < count < 40
    assert found.verdict.word == "step too large"
    assert f"in {count} of 40 chains" in found.verdict.reason and "at step" in found.verdict.reason
    assert (
        np.isnan(found.per_chain).sum() == count
        and math.isfinite(found.mean)
        and found.values.shape == (40 - count, 60)
    )
    assert found.columns()["chains_stopped"] == count


def test_not_localised():
    slope = Potential(lambda w: w.sum(), w=torch.zeros(5))
    found = estimate(slope, epsilon=1e-3, gamma=100, draws=200, burn_in=300)
    assert found.verdict.word == "not localised", found
    assert found.share_below > 0.9 and "gamma (now 100)" in found.verdict.reason


def test_not_stationary():
    found = estimate(bowl(100), epsilon=2e-5, gamma=1, draws=200)
    assert found.verdict.word == "not stationary", found
    assert found.drift > 0 and found.drift_z > 3 and not found.stationary


def regression(scale=1.0):
    """A linear regression at its minimum: model, mean squared error / 2, data, and the exact λ̂ at gamma 100."""
    torch.manual_seed(0)
    x = torch.randn(N, 5, dtype=torch.float64)
    y = x @ torch.arange(5.0, dtype=torch.float64) + scale * torch.randn(N, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 1, bias=False), nn.Flatten(0)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.T)
    curvatures = torch.linalg.eigvalsh(x.T @ x / N) * NBETA
    truth = {gamma: float((curvatures / (curvatures + gamma) / 2).sum()) for gamma in (1, 100)}
    return model, lambda outputs, labels: (outputs - labels).square().mean() / 2, (x, y), truth


def test_a_regression():
    model, loss, data, truth = regression()
    found = llc.estimate(model, loss, data, Settings(epsilon=2e-4, gamma=100, draws=3000, burn_in=300), seed=0)
    low, high = found.interval
    assert found.arrival == pytest.approx(1, abs=0.15) and found.verdict.word == llc.TRUST, found
    assert low < truth[100] < high


@pytest.mark.parametrize("batch_size", [10, 512])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-7, 1e-12])
def test_chains_that_have_hardly_moved_are_not_trusted_however_noisy_their_batches(batch_size, epsilon):
    model, loss, data, _ = regression()
    settings = Settings(epsilon=epsilon, gamma=100, batch_size=batch_size, draws=200, burn_in=100)
    for seed in range(4):
        found = llc.estimate(model, loss, data, settings, seed=seed)
        assert found.verdict.word != llc.TRUST, found


def test_arrival_is_where_the_distance_stands_still():
    # |w|² of a chain in a bowl, from 0: (1 − exp(−εHt)) of its end; its speed is exp(−εHt) of what it was
    model, (epsilon, gamma) = bowl(4000), (2e-5, 10)
    H = 2 * NBETA + gamma
    for steps in (5, 100, 400):
        found = estimate(model, epsilon=epsilon, gamma=gamma, chains=8, draws=2, burn_in=steps, checks=2)
        assert found.arrival == pytest.approx(1 - math.exp(-epsilon * H * (steps + 1)), abs=0.02)
    assert estimate(bowl(), epsilon=1e-7, gamma=0, box=1, draws=20).arrival == 1  # nobody can say


def test_too_few_digits():
    model, loss, (x, y), truth = regression(scale=600)
    settings = Settings(epsilon=1e-3, gamma=1, draws=600, burn_in=200)
    found = llc.estimate(model, loss, (x, y), settings, seed=0)
    assert abs(found.mean - truth[1]) < 4 * found.standard_error + 0.05 * truth[1] and found.verdict.word == llc.TRUST
    single = llc.estimate(model.float(), loss, (x.float(), y.float()), settings, seed=0)
    assert single.verdict.word == "too few digits" and "use float64" in single.verdict.reason, single
    assert single.rounding > 1 > found.rounding


def test_one_chain_is_nobodys_witness():
    assert estimate(bowl(), epsilon=1e-4, gamma=10, chains=1, draws=3000, burn_in=300).verdict.word == "one chain"


def test_trusted_intervals_hold_the_truth():
    H = 2 * NBETA + 100
    covered = []
    for seed in range(40):
        found = estimate(bowl(50), epsilon=0.18 / H, gamma=100, chains=8, draws=300, burn_in=200, seed=seed)
        low, high = found.interval
        assert found.verdict.word == llc.TRUST, found
        covered.append(low < 50 * NBETA / H < high)
    assert np.mean(covered) >= 0.9


def test_chains_disagree():
    found = estimate(bowl(), epsilon=5e-4, gamma=10, chains=4, draws=600, burn_in=200)
    elsewhere = found.chains.excess + np.array([[0], [4], [0], [4]]) / found.chains.nbeta  # as in a valley of their own
    apart = llc.Estimate(dataclasses.replace(found.chains, excess=elsewhere))
    assert apart.verdict.word == "chains disagree", apart
    assert f"{apart.rhat:.2f}" in apart.verdict.reason


def test_too_few_draws():
    found = estimate(bowl(100), epsilon=2e-4, gamma=100, draws=10, burn_in=300, thin=30)
    assert found.verdict.word == "too few draws", found
    assert "worth 63 independent ones" in found.verdict.reason and "100, and a mean of 2 errors" in found.verdict.reason
    assert estimate(bowl(), epsilon=2e-4, gamma=100, draws=1, burn_in=99, chains=2).verdict.word != llc.TRUST


# -- the choice ------------------------------------------------------------------------


def test_choose_within_the_band_and_not_the_highest_acceptance():
    acceptance = [0.999, 0.96, 0.94, 0.92, 0.91, 0.93, 0.5, 0.93]
    verdict = ["trust"] * 4 + ["not stationary", "step too large", "trust", "trust"]
    ess = [900, 500, 200, 300, 800, 700, 900, 1000]
    gamma = [10, 10, 10, 10, 10, 10, 10, 100]
    band = (0.9, 0.95)
    row, reason = llc.choose(acceptance, verdict, ess, gamma, band=band)
    assert row == 3 and "gamma 10 is the least of 3 such rows, 300 effective draws the most of 2 with it" in reason
    assert llc.choose(acceptance, verdict, ess, gamma, band=(0.99, 1)).row == 0
    assert llc.choose(acceptance[4:], verdict[4:], ess[4:], gamma[4:], band=band).row == 3
    row, reason = llc.choose(acceptance, ["not localised"] * 8, ess, gamma, band=band)
    assert row is None and "5 of 8 rows accept within" in reason and "0 are trusted (8 not localised)" in reason
    with pytest.raises(MeasurementError, match="one length"):
        llc.choose(acceptance, verdict[:3], ess, gamma)
    with pytest.raises(MeasurementError, match="lower end first"):
        llc.choose(acceptance, verdict, ess, gamma, band=(0.95, 0.9))


def chosen_of(sweep):
    table = [s.columns() for s in sweep]
    gamma = [s.chains.settings.gamma for s in sweep]
    return llc.choose(*([row[name] for row in table] for name in ("acceptance", "verdict", "ess")), gamma)


def test_choose_on_a_sweep():
    # the highest acceptance is the smallest step, whose chains have not arrived
    epsilons = [1e-7, 1e-5, 6e-4, 3e-3]
    sweep = [
        estimate(bowl(100), epsilon=e, gamma=g, chains=8, draws=150, burn_in=150, thin=2)
        for e in epsilons
        for g in (10, 100)
    ]
    assert np.argmax([s.acceptance for s in sweep]) in (0, 1) and sweep[0].mean < 5
    chosen = chosen_of(sweep)
    assert chosen.row == 4, ([str(s) for s in sweep], chosen)
    truth = 100 * NBETA / (2 * NBETA + 10)
    assert abs(sweep[4].mean - sweep[4].step_bias - truth) < 3.5 * sweep[4].standard_error < 0.06 * truth


def test_nothing_is_chosen_where_there_is_no_minimum():
    slope = Potential(lambda w: w.sum() + w.square().sum(), w=torch.zeros(5))
    sweep = [estimate(slope, epsilon=e, gamma=100, draws=200, burn_in=300) for e in (1e-3, 1.7e-3)]
    assert any(llc.BAND[0] < s.acceptance < llc.BAND[1] for s in sweep) and chosen_of(sweep).row is None

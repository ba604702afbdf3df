"""The solver without a p × p matrix, on the CPU: against scikit-learn and against the solver that has one."""

import numpy as np
import pytest
import torch

from datamodels.errors import RegressionError
from datamodels.regression import gpu_columns, gpu_path, gpu_tiles, make_problem
from datamodels.regression.lasso import PathOptions
from tests.regression.test_gpu_path import agree, certificate, rows_of, simulate


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[("double", 1), ("double", 3), ("half", 2)], ids=str)
def way(request):
    return dict(zip(("precision", "ahead"), request.param, strict=True))


def solve(problem, use_bias=True, device="cpu", progress=lambda done: None, options=None, **way):
    return gpu_tiles.solve(problem, options or PathOptions(), use_bias, 1, progress, device, **way)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [{"T": 2}, {"n": 60, "p": 90, "T": 2}, {"alpha": 0.15, "T": 1}, {"p": 5}], ids=str)
def test_the_job_is_scikit_learns(shape, use_bias, way):
    problem = make_problem(*simulate(**shape))
    agree(problem, solve(problem, use_bias, **way), use_bias, weights=5e-4)


def test_penalties_and_offsets(way):
    x, y = simulate(T=3)
    rng = np.random.default_rng(3)
    penalty = np.where(rng.random((40, 3)) < 0.1, 0.0, rng.uniform(0.5, 2, (40, 3)))
    problem = make_problem(x, y, penalty=penalty, offset=rng.standard_normal(y.shape))
    for use_bias in (True, False):
        agree(problem, solve(problem, use_bias, **way), use_bias, weights=5e-4)
    problem = make_problem(x, y, penalty=penalty[:, 0])
    found = solve(problem, **way)
    agree(problem, found, weights=5e-4)
    assert (found.path_nnz[0] == (penalty[:, 0] == 0).sum()).all()
    problem = make_problem(x, y, penalty=rng.uniform(0.3, 3, (40, 3)))  # all targets together, each with its own
    agree(problem, solve(problem, **way), weights=5e-4)


def test_real_columns(way):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((120, 30)) * 10.0 ** rng.integers(-2, 3, 30) + 100
    y = ((x - x.mean(axis=0)) / x.std(axis=0))[:, :5] @ rng.standard_normal((5, 2)) + rng.standard_normal((120, 2))
    problem = make_problem(x, y)
    found, expected = solve(problem, **way), gpu_path.solve(problem, PathOptions(), True, 1, lambda done: None, "cpu")
    np.testing.assert_array_equal(found.best, expected.best)
    scale = x.std(axis=0)[:, None]
    np.testing.assert_allclose(found.weight * scale, expected.weight * scale, atol=1e-4)


def test_same_as_with_a_gram_matrix(way):
    """All of the answer, with constant and repeated columns and constant targets among them."""
    x, y = simulate(n=150, p=300, T=9, noise=3.0)
    x[:, 7], x[:, 8], x[:, 9] = True, False, x[:, 10]
    y[:, 2] = 4.0
    problem = make_problem(x, y)
    y[problem.train, 5] = 4.0
    problem, options = make_problem(x, y), PathOptions(k=30)
    done = []
    found = solve(problem, options=options, progress=done.append, **way)
    expected = gpu_path.solve(problem, options, True, 1, lambda done: None, "cpu")
    assert sum(done) == 9
    for name in ("best", "turned", "path_nnz"):
        same = getattr(found, name) == getattr(expected, name)
        assert same.mean() > 0.97 if name == "path_nnz" else same.all()
    np.testing.assert_allclose(found.lam, expected.lam, rtol=1e-6)
    np.testing.assert_allclose(found.path_lam, expected.path_lam, rtol=1e-9)
    np.testing.assert_allclose(found.path_mse, expected.path_mse, rtol=2e-3)
    np.testing.assert_allclose(found.r2_val, expected.r2_val, atol=2e-3)
    np.testing.assert_allclose(found.r2_train, expected.r2_train, atol=2e-3)
    np.testing.assert_allclose(found.train.power, expected.train.power, rtol=1e-9)
    keep = np.delete(np.arange(300), [9, 10])
    np.testing.assert_allclose(found.weight[keep], expected.weight[keep], atol=5e-4)
    np.testing.assert_allclose(found.weight[[9, 10]].sum(0), expected.weight[[9, 10]].sum(0), atol=5e-4)
    fitted = ~found.train.constant
    assert certificate(problem, found.weight[:, fitted], found.lam[fitted])[0].max() <= 1e-5 or fitted.sum() < 9
    gap, _ = gpu_path.certify(problem, found.weight, found.lam, True, "cpu")
    assert gap.max() <= 1e-5


def test_what_the_strong_rule_misses_is_found():
    """A rule that lets almost nothing in must cost rounds, never the answer."""
    problem = make_problem(*simulate(T=3))
    expected = solve(problem)
    rounds = []

    class Meagre(gpu_tiles.TiledFit):
        def _screen(self, grid, at):
            rounds.append(len(at))
            return np.take_along_axis(grid, at[:, None], axis=1)[:, 0] * 0.999

    original, gpu_tiles.TiledFit = gpu_tiles.TiledFit, Meagre
    try:
        found = solve(problem)
    finally:
        gpu_tiles.TiledFit = original
    assert len(rounds) > 20
    np.testing.assert_array_equal(found.best, expected.best)
    np.testing.assert_allclose(found.path_mse, expected.path_mse, rtol=2e-3)
    np.testing.assert_allclose(found.weight, expected.weight, atol=5e-4)


def test_small_tiles_and_columns_in_the_machines_memory(monkeypatch):
    problem = make_problem(*simulate(n=300, p=100, T=7))
    whole = solve(problem)
    kept = []
    load = gpu_columns.load

    def watched(*given):
        kept.append(given[-1])
        return load(*given)

    monkeypatch.setattr(gpu_columns, "load", watched)
    monkeypatch.setattr(gpu_columns, "TILE_BYTES", 1 << 15)
    monkeypatch.setitem(gpu_path.VALUES, "cpu", 1 << 12)
    monkeypatch.setattr(gpu_tiles, "available", lambda device: 4 * (1 << 15) + 48 * (1 << 12) + 8 * 384 * 10 * 7 // 2)
    done = []
    tiled = solve(problem, progress=done.append)
    assert kept == [torch.device("cpu")] * 2
    assert sorted(done) == [1, 3, 3]
    np.testing.assert_array_equal(tiled.best, whole.best)
    np.testing.assert_allclose(tiled.weight, whole.weight, atol=1e-4)


def test_gpu_path_hands_over_what_does_not_fit(monkeypatch):
    problem = make_problem(*simulate(T=3))
    stages = []
    monkeypatch.setattr(gpu_path, "available", lambda device: 1 << 20)  # no room for a p × p matrix
    found = gpu_path.solve(problem, PathOptions(), True, 1, lambda done: None, "cpu", stage=stages.append)
    assert "lambda_max" in stages and "gram" not in stages
    agree(problem, found)


def test_options_are_checked():
    problem = make_problem(*simulate())
    for given in ({"precision": "quarter"}, {"ahead": 0}):
        with pytest.raises(RegressionError, match="expected one of half, single, double, and 1 or more"):
            solve(problem, **given)


def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for shape in ({}, {"n": 60, "p": 90}, {"n": 2000, "p": 3000, "T": 40}):
        problem = make_problem(*simulate(**shape))
        for precision in ("half", "single", "double"):
            found = solve(problem, device="cuda", precision=precision)
            agree(problem, found, weights=1e-3, targets=[0, problem.y.shape[1] - 1])
            assert len(rows_of(problem)) == len(problem.x)

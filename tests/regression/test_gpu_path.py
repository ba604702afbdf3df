"""The GPU solver, on the CPU and where there is one on a GPU: against scikit-learn, closed forms and plain numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from datamodels.errors import RegressionError
from datamodels.regression import gpu_columns, gpu_path, gpu_prox, make_problem
from datamodels.regression.lasso import PathOptions
from tests.regression import path_oracle

WAYS = [("double", "active"), ("single", "prox"), ("half", "active")]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=WAYS, ids="-".join)
def way(request):
    precision, engine = request.param
    return {"precision": precision, "engine": engine}


def simulate(n=200, p=40, T=4, *, alpha=0.5, noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, p)) < alpha
    weight = rng.standard_normal((p, T)) * (rng.random((p, T)) < 0.3)
    return x, x @ weight + 3.0 + noise * rng.standard_normal((n, T))


def solve(problem, use_bias=True, device="cpu", progress=lambda done: None, options=None, **way):
    return gpu_path.solve(problem, options or PathOptions(), use_bias, 1, progress, device, **way)


def rows_of(problem):
    return np.sort(np.concatenate([problem.train, problem.val]))


def certificate(problem, weight, lam, use_bias=True):
    """Relative gaps and KKT violations by the formula, in plain numpy."""
    rows = rows_of(problem)
    x, n = problem.x[rows].astype(float), len(rows)
    sd = x.std(axis=0)
    out = []
    for t in range(weight.shape[1]):
        v = problem.penalty_of(slice(t, t + 1))[:, 0]
        y = problem.outcomes(rows, slice(t, t + 1))[:, 0]
        free = x[:, (v == 0) & (sd > 0)]
        free = np.column_stack([free, np.ones(n)]) if use_bias else free

        def without(values, free=free):
            return values - free @ np.linalg.lstsq(free, values, rcond=None)[0] if free.shape[1] else values

        w = weight[:, t].astype(float)
        residual = y - x @ w
        residual = residual - residual.mean() if use_bias else residual
        r, r0 = without(residual), without(y)
        g, bound = x.T @ r / n, lam[t] * v * sd
        held = (v > 0) & (sd > 0)
        with np.errstate(divide="ignore"):
            s = min(1.0, (bound[held] / np.abs(g[held])).min(initial=1.0))
        primal = residual @ residual / (2 * n) + bound @ np.abs(w)
        dual = (r0 @ r0 - (r0 - s * r) @ (r0 - s * r)) / (2 * n)
        h = x.T @ residual / n
        violation = np.where(w != 0, np.abs(h - bound * np.sign(w)), np.maximum(np.abs(h) - bound, 0))[sd > 0]
        out.append(((primal - dual) / (r0 @ r0 / (2 * n)), (violation / sd[sd > 0]).max() / lam[t]))
    return np.array(out).T


def agree(problem, found, use_bias=True, *, at_most=1e-5, weights=1e-4, targets=None):
    """The answer is scikit-learn's: the same lambda, the same path, the same weights; and its gap holds."""
    for t in range(problem.y.shape[1]) if targets is None else targets:
        expected = path_oracle.fit(problem, t, PathOptions(), use_bias)
        assert found.best[t] == expected.best
        assert found.turned[t] == expected.turned
        np.testing.assert_allclose(found.lam[t], expected.lam, rtol=1e-6)
        np.testing.assert_allclose(found.path_lam[:, t], expected.path_lam, rtol=1e-9)
        np.testing.assert_allclose(found.path_mse[:, t], expected.path_mse, rtol=5e-3)
        np.testing.assert_allclose(found.r2_train[t], expected.r2_train, atol=1e-3)
        scale = np.abs(expected.weight).max()
        np.testing.assert_allclose(found.weight[:, t], expected.weight, atol=weights * scale)
    if at_most is not None:
        assert certificate(problem, found.weight, found.lam, use_bias)[0].max() <= at_most


SHAPES = [
    ({}, True),
    ({}, False),
    ({"n": 60, "p": 80, "T": 2}, True),
    ({"n": 82, "p": 80, "T": 2}, True),
    ({"alpha": 0.15}, False),
    ({"T": 1}, True),
    ({"p": 3}, True),
]


@pytest.mark.parametrize(("shape", "use_bias"), SHAPES, ids=str)
def test_the_job_is_scikit_learns(shape, use_bias, way):
    problem = make_problem(*simulate(**shape))
    agree(problem, solve(problem, use_bias, **way), use_bias, weights=5e-4)


def test_orthogonal_columns_have_a_closed_form(way):
    x = scipy.linalg.hadamard(64)[:, 1:33] > 0  # over all rows: mean ½, orthogonal when centred
    rng = np.random.default_rng(1)
    y = x[:, :5] @ rng.standard_normal((5, 4)) + rng.standard_normal((64, 4)) + 7
    found = solve(make_problem(x, y, num_val=8), **way)
    correlation = (2.0 * x - 1).T @ (y - y.mean(axis=0)) / 64
    expected = np.sign(correlation) * np.maximum(np.abs(correlation) - found.lam, 0) / 0.5
    np.testing.assert_allclose(found.weight, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("use_bias", [True, False])
def test_lambda_max_is_exact(use_bias, way):
    x, y = simulate()
    problem = make_problem(x, y)
    found = solve(problem, use_bias, **way)
    fitted, r0 = x[problem.train].astype(float), y[problem.train]
    r0 = r0 - r0.mean(axis=0) if use_bias else r0
    expected = (np.abs(fitted.T @ r0) / (len(r0) * fitted.std(axis=0)[:, None])).max(axis=0)
    np.testing.assert_allclose(found.path_lam[0], expected, rtol=1e-12)
    assert (found.path_nnz[0] == 0).all()
    assert (found.path_nnz[1] > 0).all()


PENALTIES = {
    "some columns cheaper": lambda rng, p, T: rng.uniform(0.3, 3, p),
    "per target": lambda rng, p, T: rng.uniform(0.3, 3, (p, T)),
    "three free": lambda rng, p, T: np.where(np.arange(p) < 3, 0.0, 1.0),
    "free per target": lambda rng, p, T: np.where(rng.random((p, T)) < 0.1, 0.0, rng.uniform(0.5, 2, (p, T))),
}


@pytest.mark.parametrize(
    ("penalty", "use_bias"), [*((name, True) for name in PENALTIES), ("free per target", False)], ids=str
)
def test_penalties_and_offsets(penalty, use_bias, way):
    x, y = simulate()
    rng = np.random.default_rng(3)
    penalty = PENALTIES[penalty](rng, *[x.shape[1], y.shape[1]])
    problem = make_problem(x, y, penalty=penalty, offset=rng.standard_normal(y.shape))
    found = solve(problem, use_bias, **way)
    agree(problem, found, use_bias, weights=5e-4)
    np.testing.assert_array_equal(found.path_nnz[0], (problem.penalty_of(slice(None)) == 0).sum(axis=0))


def test_free_columns_that_repeat_each_other(way):
    x, y = simulate()
    x[:, 1] = x[:, 0]
    x[:, 20] = x[:, 0]  # penalised, but all of it is explained already
    problem = make_problem(x, y, penalty=np.where(np.arange(40) < 4, 0.0, 1.0))
    found = solve(problem, **way)
    assert certificate(problem, found.weight, found.lam)[0].max() <= 1e-5
    assert (found.weight[20] == 0).all()
    np.testing.assert_allclose(found.weight[0], found.weight[1], rtol=1e-3)  # the shortest of the equally good


def test_no_column_is_penalised():
    x, y = simulate()
    problem = make_problem(x, y, penalty=np.zeros(40))
    found = solve(problem)
    rows = rows_of(problem)
    expected = np.linalg.lstsq(np.column_stack([x[rows], np.ones(len(rows))]), y[rows], rcond=None)[0][:-1]
    np.testing.assert_allclose(found.weight, expected, atol=1e-5)


def test_the_certificate_is_the_formula():
    x, y = simulate(n=150, p=30, T=5)
    rng = np.random.default_rng(0)
    for use_bias in (True, False):
        for penalty in (None, np.where(np.arange(30) < 2, 0.0, 1.5), rng.uniform(0.5, 2, (30, 5))):
            problem = make_problem(x, y, penalty=penalty, offset=rng.standard_normal(y.shape))
            weight = (0.1 * rng.standard_normal((30, 5)) * (rng.random((30, 5)) < 0.7)).astype(np.float32)
            lam = rng.uniform(0.01, 0.3, 5)
            expected = certificate(problem, weight, lam, use_bias)
            np.testing.assert_allclose(gpu_path.certify(problem, weight, lam, use_bias, "cpu"), expected, rtol=1e-8)


@pytest.mark.parametrize(("value", "use_bias"), [(0, True), (1, False), (0.25, True), (0.25, False)])
def test_constant_columns_and_targets(value, use_bias, way):
    x, y = simulate(T=5)
    x = x.astype(float) if value == 0.25 else x
    x[:, 2] = value
    problem = make_problem(x, y)
    y[:, 1] = 0.1 * use_bias
    y[problem.train, 3] = 5.0 * use_bias
    problem = make_problem(x, y)
    found = solve(problem, use_bias, **way)
    assert (found.weight[2] == 0).all()
    assert (found.weight[:, [1, 3]] == 0).all()
    assert found.full.constant.tolist() == [False, True, False, False, False]
    assert found.train.constant.tolist() == [False, True, False, True, False]
    assert found.lam[1] == 0
    assert np.isnan(found.path_lam[:, [1, 3]]).all()
    agree(problem, found, use_bias, weights=5e-4, targets=[0, 2, 4], at_most=None)
    r0 = y[rows_of(problem), 3] - y[rows_of(problem), 3].mean() * use_bias
    z = x[rows_of(problem)].astype(float)
    z = (z - z.mean(axis=0) * use_bias) / np.where(z.std(axis=0) > 0, z.std(axis=0), np.inf)
    np.testing.assert_allclose(found.lam[3], np.abs(z.T @ r0).max() / len(r0), rtol=1e-6)
    assert found.lam[3] >= np.abs(z.T @ r0).max() / len(r0) * (1 - 1e-12)
    np.testing.assert_allclose(found.full.y_mean, y[rows_of(problem)].mean(axis=0) * use_bias, atol=1e-12)


def test_column_constant_on_the_training_rows_alone(way):
    x, y = simulate()
    problem = make_problem(x, y)
    x[problem.train, 2], x[problem.val, 2] = True, False
    problem = make_problem(x, y)
    found = solve(problem, **way)
    assert certificate(problem, found.weight, found.lam)[0].max() <= 1e-5
    assert (found.weight[2] != 0).any()


def test_duplicate_columns(way):
    x, y = simulate()
    both, alone = make_problem(np.concatenate([x, x[:, :20]], axis=1), y), make_problem(x, y)
    found = solve(both, **way)
    assert certificate(both, found.weight, found.lam)[0].max() <= 1e-5
    expected = solve(alone, **way).weight
    np.testing.assert_allclose(found.weight[:20] + found.weight[40:], expected[:20], atol=1e-2)


def test_real_columns_far_from_zero(way):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((150, 10)) * 10.0 ** rng.integers(-3, 4, 10) + 1e4
    x[:, 3] = rng.random(150) < 0.5
    y = ((x - x.mean(axis=0)) / x.std(axis=0)) @ rng.standard_normal((10, 3)) + rng.standard_normal((150, 3))
    problem = make_problem(x, y)
    found = solve(problem, **way)
    for t in range(3):
        expected = path_oracle.fit(problem, t, PathOptions())
        assert found.best[t] == expected.best
        scale = x.std(axis=0)
        np.testing.assert_allclose(found.weight[:, t] * scale, expected.weight * scale, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_outcomes_of_any_float_type(dtype, way):
    x, y = simulate()
    y = y.astype(dtype)
    short, long = solve(make_problem(x, y), **way), solve(make_problem(x, y.astype(np.float64)), **way)
    np.testing.assert_array_equal(short.weight, long.weight)


def test_integer_masks_are_masks(way):
    x, y = simulate()
    expected = solve(make_problem(x, y), **way).weight
    for dtype in (np.uint8, np.int32, np.float32):
        np.testing.assert_array_equal(solve(make_problem(x.astype(dtype), y), **way).weight, expected)


def test_path_stops_after_patience_lambdas(way):
    problem = make_problem(*simulate(T=12, noise=4.0))
    found = solve(problem, options=PathOptions(k=30, eps=1e-4, patience=2), **way)
    for t in range(12):
        count = np.isfinite(found.path_lam[:, t]).sum()
        errors = found.path_mse[:count, t]
        assert (found.path_nnz[count:, t] == -1).all() and (found.path_nnz[:count, t] >= 0).all()
        since = [i - int(np.argmin(errors[: i + 1])) for i in range(count)]
        assert max(since[:-1]) < 2
        assert since[-1] == 2 if found.turned[t] else count == 30
        assert found.lam[t] == np.float32(found.path_lam[np.argmin(errors), t])
        null = ((problem.y[problem.val, t] - problem.y[problem.train, t].mean()) ** 2).mean()
        np.testing.assert_allclose(found.r2_val[t], 1 - errors.min() / null, rtol=1e-6, atol=1e-9)
    assert found.turned.any()


def test_one_lambda():
    problem = make_problem(*simulate())
    found = solve(problem, options=PathOptions(k=1))
    assert certificate(problem, found.weight, found.lam)[0].max() <= 1e-5
    np.testing.assert_allclose(found.lam, found.path_lam[0], rtol=1e-6)


def test_a_tighter_tolerance_is_met(way):
    problem = make_problem(*simulate())
    found = solve(problem, options=PathOptions(tol=2e-7), **way)
    assert certificate(problem, found.weight, found.lam)[0].max() <= 2e-7


def test_what_half_precision_cannot_finish_float64_does(monkeypatch):
    """Without a bias the columns are nearly parallel, and far down the path float32 stays above the tolerance."""
    x, y = simulate(n=400, p=100, T=4, noise=0.5)
    penalty = np.where(np.arange(100) < 2, 0.0, 1.0)
    problem, options = make_problem(x, y, penalty=penalty), PathOptions(tol=1e-6)
    finished, original = [], gpu_path.Fit._finish

    def watched(self, group, rows, start):
        finished.extend(rows.tolist())
        return original(self, group, rows, start)

    monkeypatch.setattr(gpu_path.Fit, "_finish", watched)
    found = solve(problem, False, options=options, precision="half")
    assert finished
    assert certificate(problem, found.weight, found.lam, False)[0].max() <= 1e-6


def test_targets_in_groups_and_tiles_are_the_same(monkeypatch):
    x, y = simulate(n=300, p=100, T=7)
    penalty = np.ones((100, 7))
    penalty[:2, 3] = 0
    problem = make_problem(x, y, penalty=penalty)
    done = []
    whole = solve(problem, progress=done.append)
    assert sum(done) == 7
    for module in (gpu_columns, gpu_path):
        monkeypatch.setattr(module, "TILE_BYTES", 1 << 15)
    monkeypatch.setattr(gpu_columns, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(gpu_columns, "LOAD_VALUES", 1 << 12)
    monkeypatch.setitem(gpu_path.VALUES, "cpu", 1 << 10)
    tiled = solve(problem)
    np.testing.assert_allclose(tiled.weight, whole.weight, atol=1e-4)
    monkeypatch.setattr(gpu_path, "FEWEST", 2)
    monkeypatch.setattr(gpu_path, "available", lambda device: 320)
    monkeypatch.setattr(gpu_path, "needs", lambda *given: (0, 100))  # three at a time
    done = []
    grouped = solve(problem, progress=done.append)
    assert sorted(done) == [1, 3, 3]
    np.testing.assert_allclose(grouped.weight, whole.weight, atol=1e-4)
    np.testing.assert_array_equal(grouped.best, whole.best)


@pytest.mark.parametrize("precision", ["double", "single", "half"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_gram_matrix_is_exact(precision, use_bias, monkeypatch):
    monkeypatch.setattr(gpu_path, "TILE_BYTES", 1 << 14)
    rng = np.random.default_rng(0)
    x = rng.random((11000, 70)) < np.linspace(0.5, 0.9, 70)
    x[:, 1], x[:, 40], x[:, 2] = x[:, 0], ~x[:, 0], True  # beyond 2,048 from what chance gives
    for j in range(3, 20):  # and some of those odd
        x[:, j] = x[:, 0] ^ (np.arange(11000) < j)
    problem = make_problem(x, rng.standard_normal((11000, 1)), num_val=1000)
    counts = x.astype(int)
    device = torch.device("cpu")
    parts = [gpu_columns.load(problem, rows, use_bias, device, True) for rows in (problem.train, problem.val)]
    zeros = [torch.zeros((1, part.rows), dtype=torch.float64) for part in parts]
    sums = [gpu_columns.column_sums(part) for part in parts]
    train, full = (gpu_columns.Units.of(s, parts[0]) for s in gpu_columns.scales(parts, zeros, sums, use_bias))
    gram = gpu_path.Gram(parts[:1], train, precision)

    def check(rows):
        expected = counts[rows].T @ counts[rows]
        got = gram.counts(slice(0, 70), slice(0, 70)).numpy()
        np.testing.assert_array_equal(got, expected)
        z = x[rows] - x[rows].mean(axis=0) * use_bias
        z = z / np.where(x[rows].std(axis=0) > 0, x[rows].std(axis=0), np.inf)
        d = torch.zeros((3, gram.width), dtype=gram.work)
        d[:, :70] = torch.from_numpy(rng.standard_normal((3, 70)))
        expected = d[:, :70].double().numpy() @ (z.T @ z / len(rows))
        relative = {"double": 1e-12, "single": 2e-5, "half": 2e-5}[precision]
        np.testing.assert_allclose(gram.norms[:70], (z**2).mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(gram.product(d, None)[:, :70], expected, atol=relative * np.abs(expected).max())
        which = torch.from_numpy(np.stack([rng.permutation(20)[:9] for _ in range(3)]))  # the last two are padding
        valid = (torch.arange(9) < 7).expand(3, 9)
        small = torch.from_numpy(rng.standard_normal((3, 9))).to(gram.work)
        got = gram.local(which, valid, None).product(small)
        for b in range(3):
            own = z[:, which[b, :7].numpy()]
            expected = np.r_[own.T @ own / len(rows) @ small[b, :7].double().numpy(), 0, 0]
            np.testing.assert_allclose(got[b], expected, atol={"double": 1e-12}.get(precision, 1e-5))
        d[:, 5:] = 0  # few columns change
        expected = d[:, :70].double().numpy() @ (z.T @ z / len(rows))
        np.testing.assert_allclose(gram.product(d, None)[:, :70], expected, atol=relative * np.abs(expected).max())

    assert len(gram.entries) == (2 if precision == "half" else 1)
    check(problem.train)
    gram.add(parts[1], full)
    check(np.arange(11000))


def test_half_needs_one_matrix_where_columns_are_by_chance():
    rng = np.random.default_rng(0)
    problem = make_problem(rng.random((4000, 64)) < 0.5, rng.standard_normal((4000, 1)))
    part = gpu_columns.load(problem, problem.train, True, torch.device("cpu"), True)
    zeros = [torch.zeros((1, part.rows), dtype=torch.float64)]
    scale, _ = gpu_columns.scales([part], zeros, [gpu_columns.column_sums(part)], True)
    gram = gpu_path.Gram([part], gpu_columns.Units.of(scale, part), "half")
    assert len(gram.entries) == 1
    assert 0 < gram.largest <= gpu_path.EXACT_IN_HALF


def test_small_and_large_problems_in_one_round(monkeypatch):
    """Gathered for some targets and on the whole matrix for others, turn and turn about."""
    x, y = simulate(n=300, p=100, T=8)
    y[:, ::2] += 20 * x[:, :4]  # few columns for every other target
    problem = make_problem(x, y)
    monkeypatch.setattr(gpu_path, "SMALL", 12)
    kinds = []
    for name, original in [(name, getattr(gpu_path, name)) for name in ("_solve_local", "_solve_whole")]:

        def watched(*given, name=name, original=original):
            kinds.append(name)
            return original(*given)

        monkeypatch.setattr(gpu_path, name, watched)
    for precision in ("double", "half"):
        kinds.clear()
        agree(problem, solve(problem, precision=precision), weights=5e-4)
        assert set(kinds) == {"_solve_local", "_solve_whole"}


def test_gradients_are_made_afresh_as_lambda_falls(monkeypatch):
    """What half precision loses along a long path is made good: the state is that of float64."""
    monkeypatch.setattr(gpu_path, "FRESH_EVERY", 1.5)
    problem = make_problem(*simulate(n=300, p=60, T=3, noise=0.1))
    renewed, original = [], gpu_path.Fit._renew

    def watched(self, state, units, span, y, grid, at, fallen):
        before = state.g.clone()
        original(self, state, units, span, y, grid, at, fallen)
        renewed.append(bool((state.g != before).any()))
        x = problem.x[problem.train].astype(float)
        z = (x - x.mean(axis=0)) / x.std(axis=0)
        r0 = (problem.y[problem.train] - problem.y[problem.train].mean(axis=0))[:, state.number.numpy()]
        r = r0 - z @ state.u[:, :60].double().numpy().T
        np.testing.assert_allclose(state.g[:, :60], (z.T @ r / len(z)).T, atol=1e-5)
        np.testing.assert_allclose(state.rr, (r**2).mean(axis=0), atol=1e-5)

    monkeypatch.setattr(gpu_path.Fit, "_renew", watched)
    solve(problem, precision="half")
    assert sum(renewed) > 3


def test_a_second_matrix_may_be_needed_by_all_rows_alone(monkeypatch):
    """Of 7,501 rows a quarter is less than 2,048, which float16 holds; of 12,001 it is more, and odd here and there."""
    monkeypatch.setattr(gpu_path, "TILE_BYTES", 1 << 14)
    rng = np.random.default_rng(0)
    x = rng.random((12001, 64)) < 0.5
    x[:, 1] = x[:, 0] ^ (np.arange(12001) % 101 == 0)
    x[:, 63] = x[:, 0] ^ (np.arange(12001) % 107 == 0)
    problem = make_problem(x, rng.standard_normal((12001, 1)), num_val=4500)
    data = gpu_columns.OnDevice(problem, True, torch.device("cpu"), True)
    units = [gpu_columns.Units.of(scale, data.parts[0]) for scale in (data.train, data.full)]
    gram = gpu_path.Gram(data.parts[:1], units[0], "half")
    assert len(gram.entries) == 1
    gram.add(data.parts[1], units[1])
    assert len(gram.entries) == 2
    every = slice(0, 64)
    np.testing.assert_array_equal(gram.counts(every, every), x.T.astype(int) @ x)


@pytest.mark.parametrize("n", [1, 8, 63, 64, 65, 1000])
def test_bits_are_the_columns(n):
    rng = np.random.default_rng(n)
    x = rng.random((n + 3, 37)) < 0.4
    problem = make_problem(x, rng.standard_normal((n + 3, 2)), num_val=1)
    rows = rng.permutation(n + 3)[:n]
    part = gpu_columns.load(problem, rows, True, torch.device("cpu"), True)
    assert part.bits.shape == (64, -(-n // 64) * 8)
    tile = part.tile(slice(0, 64), torch.int8).numpy()
    np.testing.assert_array_equal(tile[:37, :n], x[rows].T)
    assert not tile[37:].any() and not tile[:, n:].any()
    np.testing.assert_array_equal(np.unpackbits(part.bits.numpy(), axis=1, bitorder="little"), tile)
    np.testing.assert_array_equal(part.tile(torch.tensor([3, 1]), torch.float64)[:, :n], x[rows][:, [3, 1]].T)


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_minimise_many_at_once(condition):
    """Each row to its own tolerance, at its own lambda, whatever the guess of the step."""
    rng = np.random.default_rng(0)
    B, m, n = 6, 12, 40
    z = rng.standard_normal((B, n, m)) * np.geomspace(1, condition**-0.5, m)
    gram = torch.from_numpy(np.einsum("bij,bik->bjk", z, z) / n)
    r0 = rng.standard_normal((B, n))
    q, power = torch.from_numpy(np.einsum("bij,bi->bj", z, r0) / n), torch.from_numpy((r0**2).mean(axis=1))
    lam = q.abs().amax(1) * torch.linspace(0.05, 1.1, B)
    at_work = [gram]

    def narrow(rows):
        at_work[0] = at_work[0][rows]

    ones = torch.ones(m, dtype=torch.float64)
    enough = 1e-12 * power
    u, g, rr, _ = gpu_prox.minimise(
        torch.zeros_like(q), q, power, lam, ones, ones,
        lambda d: torch.bmm(at_work[0], d[:, :, None])[:, :, 0], narrow, enough,
        torch.full((B,), 1e-3, dtype=torch.float64), gram.diagonal(dim1=1, dim2=2).sum(1), 100_000,
    )  # fmt: skip
    u, g, rr, lam = (values.numpy() for values in (u, g, rr, lam))
    for b in range(B):
        residual = r0[b] - z[b] @ u[b]
        np.testing.assert_allclose(g[b], z[b].T @ residual / n, atol=1e-9)
        np.testing.assert_allclose(rr[b], (residual**2).mean(), rtol=1e-9)
        on = u[b] != 0
        np.testing.assert_allclose(g[b][on], lam[b] * np.sign(u[b][on]), atol=1e-4 * lam[b])
        assert (np.abs(g[b]) <= lam[b] * (1 + 1e-4)).all()
    assert (u[-1] == 0).all() and (u[0] != 0).any()


def test_no_such_device():
    problem = make_problem(*simulate())
    for name, message in (("tpu9", "tpu9"), ("meta", "expected cuda"), ("cuda:97", "CUDA devices")):
        with pytest.raises(RegressionError, match=message):
            solve(problem, device=name)
    with pytest.raises(RegressionError, match="precision='quarter'"):
        solve(problem, precision="quarter")


def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for use_bias in (True, False):
        for shape in ({}, {"n": 60, "p": 80}, {"n": 3000, "p": 600, "T": 50}):
            problem = make_problem(*simulate(**shape))
            for precision in ("half", "single", "double"):
                for engine in ("active", "prox"):
                    found = solve(problem, use_bias, device="cuda", precision=precision, engine=engine)
                    agree(problem, found, use_bias, weights=1e-3, targets=[0, problem.y.shape[1] - 1])
                    gap, kkt = gpu_path.certify(problem, found.weight, found.lam, use_bias, "cuda")
                    expected = certificate(problem, found.weight, found.lam, use_bias)
                    np.testing.assert_allclose((gap, kkt), expected, rtol=1e-6, atol=1e-9)

"""The solver without a Gram matrix against the one with it, and how fit chooses between them."""

import time
import tracemalloc
import warnings

import numpy as np
import pytest

from datamodels.errors import RegressionError
from datamodels.regression import (
    RegressionWarning,
    certificate,
    fit,
    gram_path,
    lasso,
    make_problem,
    memory,
    scale,
    wide_path,
)
from datamodels.regression.datamodel import CONSTANT


def simulate(n, p, T, *, alpha=0.5, fixed=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, p)) < alpha
    if fixed:
        x = rng.random((n, p)).argsort(axis=1) < round(alpha * p)
    weight = rng.standard_normal((p, T)) * (rng.random((p, T)) < 8 / p)
    return x, x @ weight + 3.0 + rng.standard_normal((n, T))


def quiet_fit(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        return fit(problem, **options)


@pytest.fixture
def exact_paths(monkeypatch):
    """Paths solved so far that both solvers see the same validation errors, and so choose the same lambdas."""
    monkeypatch.setattr(gram_path, "PATH_TOL", 1e-5)  # less than float32 tells
    monkeypatch.setattr(wide_path, "PATH_TOL", 1e-8)
    monkeypatch.setattr(wide_path, "PATH_LIMBS", 6)


SHAPES = {
    "wide": {"n": 60, "p": 400, "T": 5},
    "square": {"n": 80, "p": 80, "T": 5},
    "tall": {"n": 200, "p": 50, "T": 5},
    "fixed size": {"n": 60, "p": 300, "T": 5, "fixed": True},
    "few kept": {"n": 70, "p": 300, "T": 5, "alpha": 0.1},
}


def with_trouble(x, y):
    """Constant columns, copies, and constant targets."""
    x, y = x.copy(), y.copy()
    x[:, 3], x[:, 4] = True, False
    x[:, 5] = x[:, 6]
    x[:, 7] = ~x[:, 8]
    y[:, 1] = 0.3
    return x, y


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["bool", "real"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_answers_as_with_a_gram_matrix(shape, kind, use_bias, monkeypatch, exact_paths):
    monkeypatch.setattr(wide_path, "TARGETS", 3)  # more than one block
    x, y = with_trouble(*simulate(**shape))
    if kind == "real":
        noise = np.random.default_rng(1).standard_normal(x.shape)
        x = x * 2.0 + 5 * x.std(axis=0) * noise + 100 * use_bias  # far from 0, where a mean can be taken out
    problem = make_problem(x, y, num_val=15)
    options = {"k": 25, "eps": 0.02, "tol": 1e-8, "use_bias": use_bias}
    gram, wide = (quiet_fit(problem, solver=name, **options) for name in ("gram", "wide"))
    np.testing.assert_allclose(wide.path.lam[0], gram.path.lam[0], rtol=1e-11)
    assert wide.gap.max() < 2e-6
    assert wide.nnz.max() > 3
    assert (wide.ended[1] == CONSTANT) == use_bias
    np.testing.assert_array_equal(wide.path.nnz >= 0, gram.path.nnz >= 0)  # stopped at the same lambda
    np.testing.assert_allclose(wide.path.val_mse, gram.path.val_mse, rtol=2e-3)
    np.testing.assert_allclose(wide.lam, gram.lam, rtol=1e-6)
    # Copies share their weight in any proportion, so predictions are compared; they are unique at the optimum.
    np.testing.assert_allclose(wide.predict(x), gram.predict(x), atol=2e-3 * y.std())
    np.testing.assert_allclose(
        *((x.std(axis=0)[:, None] * np.abs(model.weight)).sum(axis=0) for model in (wide, gram)), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(wide.r2_val, gram.r2_val, atol=2e-3)
    np.testing.assert_allclose(wide.r2_train, gram.r2_train, atol=2e-3)
    assert (wide.weight[3:5] == 0).all() or kind == "real"


def test_a_path_to_very_small_lambdas():
    """float32 gradients would choose other lambdas here, and take a hundred times as long."""
    rng = np.random.default_rng(0)
    few = rng.random((60, 5)) < 0.5
    x = few[:, rng.integers(0, 5, 300)] ^ (rng.random((60, 300)) < 0.02)
    y = np.column_stack([x[:, :3].sum(axis=1) + 0.1 * rng.standard_normal(60), rng.standard_normal(60)])
    problem = make_problem(x, y)
    gram, wide = (quiet_fit(problem, solver=name, k=60, eps=1e-7, patience=60) for name in ("gram", "wide"))
    assert (gram.path.nnz >= 0).all()
    np.testing.assert_allclose(gram.path.val_mse, wide.path.val_mse, rtol=0.03)
    np.testing.assert_array_equal(gram.lam, wide.lam)
    soon = quiet_fit(problem, solver="gram", k=60, eps=1e-7)  # stops before
    seen = soon.path.nnz >= 0
    np.testing.assert_allclose(soon.path.val_mse[seen], wide.path.val_mse[seen], rtol=0.01)
    assert 3 < seen.sum(axis=0).min() <= seen.sum(axis=0).max() < 40


def test_columns_that_the_first_look_left_out_are_found(monkeypatch, exact_paths):
    """Where the line through the last solutions tells nothing, every column must enter through the check of all."""
    x, y = simulate(60, 300, 4)
    problem = make_problem(x, y, num_val=15)
    expected = quiet_fit(problem, tol=1e-7, solver="gram")

    def blind(target, ahead):
        target.w, target.last_w = target.w, target.w
        target.r, target.last_r = target.r, target.r
        target.g, target.last_g = 0 * target.g, target.g

    monkeypatch.setattr(wide_path.Target, "go_on", blind)
    got = quiet_fit(problem, tol=1e-7, solver="wide")
    np.testing.assert_array_equal(got.lam, expected.lam)
    np.testing.assert_allclose(got.weight, expected.weight, atol=1e-3)
    assert got.gap.max() < 2e-6


def test_blocks_of_targets_and_threads_change_nothing(monkeypatch, exact_paths):
    x, y = simulate(60, 300, 7)
    problem = make_problem(x, y)
    whole = quiet_fit(problem, solver="wide")
    monkeypatch.setattr(wide_path, "TARGETS", 2)
    one, two = (quiet_fit(problem, workers=workers, solver="wide") for workers in (1, 2))
    np.testing.assert_array_equal(one.weight, two.weight)
    np.testing.assert_array_equal(whole.lam, one.lam)
    np.testing.assert_allclose(whole.weight, one.weight, atol=1e-4)


@pytest.mark.parametrize(("n", "p", "name"), [(10, 300, "wide"), (20, 300, "gram"), (80, 60, "gram")])
def test_far_fewer_rows_than_columns_go_without_a_gram_matrix(n, p, name):
    assert quiet_fit(make_problem(*simulate(n, p, 1))).about["solver"] == name


def test_a_gram_matrix_that_does_not_fit_is_not_made(monkeypatch):
    problem = make_problem(*simulate(1500, 1400, 1))
    assert lasso._choose_solver(problem, 1)[0] is gram_path
    needs = [lasso._needed(solver, problem, 1, workers=1) for solver in (gram_path, wide_path)]
    assert needs[1] < needs[0]
    monkeypatch.setattr(memory, "available", lambda: sum(needs) // 2)
    assert lasso._choose_solver(problem, 1)[0] is wide_path
    monkeypatch.setattr(memory, "available", lambda: None)
    assert lasso._choose_solver(problem, 1)[0] is gram_path


@pytest.mark.parametrize(
    ("shape", "name"), [((200, 20_000, 64), "wide"), ((40, 10_000, 200), "wide"), ((700, 600, 400), "gram")]
)
def test_memory_is_what_was_asked_for(shape, name):
    x, y = np.random.default_rng(0).random(shape[:2]) < 0.5, np.random.default_rng(1).random(shape[::2])
    problem = make_problem(x, y)
    solver, _ = lasso._choose_solver(problem, 2)
    assert name == solver.NAME
    quiet_fit(make_problem(x[:, :50], y), k=2, eps=0.9, solver=name)  # compiled
    tracemalloc.start()
    quiet_fit(problem, k=3, eps=0.8, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 < peak / lasso._needed(solver, problem, problem.y.shape[1], workers=2) <= 1


@pytest.mark.parametrize(("solver", "eps", "free"), [(wide_path, 0.02, 0), (gram_path, 0.5, 150)])
def test_memory_of_many_chosen_or_unpenalised_columns(solver, eps, free):
    """Working sets larger than the number of rows, or other unpenalised columns for each target."""
    rng = np.random.default_rng(0)
    x, y = rng.random((250, 750)) < 0.5, rng.standard_normal((250, 64))
    penalty = np.ones((750, 64))
    for t in range(64):
        penalty[rng.permutation(750)[:free], t] = 0
    problem = make_problem(x, y, penalty=penalty)
    quiet_fit(problem, k=2, eps=0.9, solver=solver.NAME)  # compiled
    tracemalloc.start()
    quiet_fit(problem, k=10, eps=eps, patience=10, workers=2, solver=solver.NAME)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= lasso._needed(solver, problem, 64, workers=2)


def test_too_little_memory_is_refused_before_any_is_taken(monkeypatch):
    x, y = np.zeros((40, 20_000), dtype=bool), np.zeros((40, 50_000), dtype=np.float16)
    problem = make_problem(x, y)
    monkeypatch.setattr(memory, "available", lambda: 800_000_000)
    tracemalloc.start()
    match = r"40 rows, 20000 columns and 50000 targets needs about 4\.\d GB of memory, and 0\.8 GB are available; "
    with pytest.raises(RegressionError, match=match + r".*data.target_start_ind.*: 6250 need 0.\d GB.*data.num_train"):
        fit(problem, workers=2)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    with pytest.raises(RegressionError, match=r"and 0\.001 GB are available; fit fewer rows"):
        fit(problem)


def test_an_interrupt_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(wide_path, "TARGETS", 1)
    settle, steps, at = wide_path._settle, [], []

    def slow(*args):
        steps.append(time.sleep(0.02))
        settle(*args)

    def interrupt(done, lambdas):
        at.append(len(steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(wide_path, "_settle", slow)
    with pytest.raises(KeyboardInterrupt):
        fit(make_problem(*simulate(60, 300, 20)), workers=1, progress=interrupt, solver="wide")
    assert len(at) == 1
    assert at[0] > 8
    assert len(steps) - at[0] < 5


def test_the_certificate_in_blocks_is_the_certificate(monkeypatch):
    x, y = simulate(60, 100, 40)
    weight = np.random.default_rng(0).standard_normal((100, 40)) / 10
    arguments = (x, y, np.arange(60), weight, np.full(40, 0.1), x.std(axis=0), True)
    whole = certificate.certify(*arguments)
    monkeypatch.setattr(certificate, "TARGETS", 3)
    monkeypatch.setattr(scale, "BLOCK_VALUES", 700)
    np.testing.assert_allclose(certificate.certify(*arguments), whole, rtol=1e-10)
    problem = make_problem(x, y)
    few = quiet_fit(problem, solver="wide")
    monkeypatch.undo()
    np.testing.assert_array_equal(few.weight, quiet_fit(problem, solver="wide").weight)

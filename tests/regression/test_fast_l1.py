"""The adapter to fast_l1, without a GPU: what its loader yields, and a stand-in that keeps to what fast_l1 documents.

The stand-in sees the problem through the loader alone, checks each thing that fast_l1 relies on, standardises by what
it reads, and writes standardised weights back, as fast_l1 does. What it does in between is plain coordinate descent.
"""

import sys
import textwrap

import numpy as np
import pytest
import torch

from datamodels.errors import RegressionError
from datamodels.regression import fast_l1, make_problem
from datamodels.regression.lasso import PathOptions
from tests.regression.test_gpu_path import certificate, rows_of, simulate

STAND_IN = """
    import numpy as np
    import torch
    from sklearn.linear_model import Lasso

    calls = []

    def read(loader):
        # Two passes: every index once in each, in another order, always the same row, batches of one size.
        passes = []
        for _ in range(2):
            batches = list(loader)
            assert {len(batch) for batch in batches} == {3}
            assert {len(inp) for inp, _, _ in batches} == {len(targ) for _, targ, _ in batches}
            assert len({len(inp) for inp, _, _ in batches}) == 1
            inp, targ, index = (torch.cat([batch[i] for batch in batches]) for i in range(3))
            assert inp.dtype == targ.dtype == torch.float32 and index.dtype == torch.int64
            assert sorted(index.tolist()) == list(range(len(index)))
            table = torch.zeros(int(index.max()) + len(batches[0][0]), targ.shape[1])
            table[index] = targ  # on the CPU, as fast_l1's
            passes.append((inp[index.argsort()], table[: len(index)], index))
        assert torch.equal(passes[0][0], passes[1][0]) and torch.equal(passes[0][1], passes[1][1])
        assert not torch.equal(passes[0][2], passes[1][2])
        return passes[0][0].double().numpy(), passes[0][1].double().numpy(), len(batches[0][0])

    def calc_max_lambda(loader):
        x, y, _ = read(loader)
        return torch.from_numpy(np.abs(x.T @ (y - y.mean(0))).max(0) / len(x)).float()

    def train_saga(weight, bias, loader, val_loader, *, lr, start_lams, lam_decay, num_lambdas, early_stop_freq=2,
                   early_stop_eps=1e-5, logdir=None, update_bias=True, min_lams_to_try=10):
        print("epoch: 0")
        x, y, size = read(loader)
        calls.append({"rows": len(x), "lr": lr, "num_lambdas": num_lambdas, "lam_decay": lam_decay, "size": size,
                      "early_stop_freq": early_stop_freq, "early_stop_eps": early_stop_eps})
        assert weight.shape == (x.shape[1], y.shape[1]) and bias.shape == (y.shape[1],)
        assert weight.dtype == bias.dtype == torch.float32 and weight.is_contiguous()
        assert (np.ptp(x, axis=0) > 0).all()
        mean, std = x.mean(0), np.sqrt((x**2).mean(0) - x.mean(0)**2)
        z = (x - mean) / (std + 1e-32)
        if val_loader is not None:
            val_x, val_y, val_size = read(val_loader)
            assert val_size == size
            val_z = (val_x - mean) / (std + 1e-32)
        best = torch.zeros(len(bias))
        for t in range(len(bias)):
            least = np.inf
            for i in range(num_lambdas):
                lam = float(start_lams[t]) * lam_decay**i
                solved = Lasso(alpha=max(lam, 1e-12), tol=1e-12, max_iter=10**6).fit(z, y[:, t])
                weight[:, t], bias[t] = torch.from_numpy(solved.coef_), float(solved.intercept_)
                if val_loader is not None:
                    error = ((val_y[:, t] - solved.predict(val_z)) ** 2).mean()
                    if error <= least:
                        best[t], least = lam, error
        if "interrupt" in calls[0]:
            print("Interrupted, quitting...")
        return best
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "fast_l1").mkdir()
    (tmp_path / "fast_l1/__init__.py").touch()
    (tmp_path / "fast_l1/regressor.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("fast_l1", "fast_l1.regressor"):
        sys.modules.pop(name, None)


def solve(problem, use_bias=True, **given):
    return fast_l1.solve(problem, PathOptions(k=20, eps=1e-2), use_bias, 1, lambda done: None, "cpu", **given)


def test_it_says_how_to_install_what_is_missing():
    with pytest.raises(RegressionError, match=r"fast_l1.*pip install.*cupy.*git\+https.*solver=gpu"):
        solve(make_problem(*simulate()))


@pytest.mark.parametrize("kind", ["masks", "real", "float16 outcomes", "offset"])
def test_the_answer_is_in_the_units_of_the_data_and_certified(stand_in, kind, capsys):
    x, y = simulate(n=240, p=12, T=3)
    given = {}
    if kind == "real":
        x = x * np.linspace(0.5, 20, 12) + 100.0
    if kind == "float16 outcomes":
        y = y.astype(np.float16)
    if kind == "offset":
        given["offset"] = np.random.default_rng(0).standard_normal(y.shape)
    problem = make_problem(x, y, num_val=40, **given)
    done = []
    found = fast_l1.solve(problem, PathOptions(k=20, eps=1e-2), True, 1, done.append, "cpu")
    assert sum(done) == 3
    assert certificate(problem, found.weight, found.lam)[0].max() <= 1e-5
    rows = rows_of(problem)
    np.testing.assert_allclose(found.full.sd, x[rows].astype(float).std(axis=0), rtol=1e-9)
    outcomes = problem.outcomes(rows, slice(None))
    np.testing.assert_allclose(found.full.y_mean, outcomes.mean(axis=0), rtol=1e-9)
    train = x[problem.train].astype(float)
    of_train = problem.outcomes(problem.train, slice(None))
    # its own first lambda: of columns that are not standardised
    raw = np.abs((train - train.mean(axis=0) * (kind == "real")).T @ (of_train - of_train.mean(axis=0))).max(axis=0)
    expected = raw / len(train) * 1e-2 ** (found.best / 20)
    np.testing.assert_allclose(found.lam, expected, rtol=1e-4)
    assert (found.lam == found.lam.astype(np.float32)).all()
    assert capsys.readouterr().out == ""


def test_it_is_called_as_the_released_code_does(stand_in):
    problem = make_problem(*simulate(n=240, p=12, T=2), num_val=40)
    solve(problem, lr=0.003, check_every=5, stop=1e-9)
    path, refit = sys.modules["fast_l1.regressor"].calls
    common = {"lr": 0.003, "early_stop_freq": 5, "early_stop_eps": 1e-9, "size": 40}
    assert path == common | {"rows": 200, "num_lambdas": 20, "lam_decay": pytest.approx(1e-2 ** (1 / 20))}
    assert refit == common | {"rows": 240, "num_lambdas": 1, "lam_decay": 1.0}


def test_constant_columns_never_reach_it(stand_in):
    x, y = simulate(n=240, p=12, T=2)
    problem = make_problem(x, y, num_val=40)
    x[:, 3], x[problem.train, 5], x[problem.val, 5] = True, True, False
    problem = make_problem(x, y, num_val=40)
    found = solve(problem)
    assert (found.weight[3] == 0).all()
    assert np.isfinite(found.weight).all()
    assert (found.weight != 0).any()


def test_constant_target(stand_in):
    x, y = simulate(n=240, p=12, T=2)
    y[:, 0] = 2.5
    found = solve(make_problem(x, y, num_val=40))
    assert (found.weight[:, 0] == 0).all()
    assert found.lam[0] == 0


def test_an_interrupt_is_one(stand_in):
    from fast_l1 import regressor

    class Calls(list):
        def append(self, call):
            super().append(call | {"interrupt": True})

    regressor.calls = Calls()
    with pytest.raises(KeyboardInterrupt):
        solve(make_problem(*simulate(n=240, p=12, T=1), num_val=40))


def test_what_it_cannot_do_is_refused(stand_in):
    x, y = simulate(n=240, p=12, T=2)
    with pytest.raises(RegressionError, match="penalty"):
        solve(make_problem(x, y, num_val=40, penalty=np.ones(12)))
    with pytest.raises(RegressionError, match="centres the columns"):
        solve(make_problem(x, y, num_val=40), use_bias=False)
    with pytest.raises(RegressionError, match="no size beyond 1 does"):
        solve(make_problem(x, y, num_val=41))
    with pytest.raises(RegressionError, match="batch_size=30 must divide.*40 does"):
        solve(make_problem(x, y, num_val=40), batch_size=30)


def test_batches_are_as_large_as_may_be():
    assert fast_l1._batch_size(80_000, 20_000, None) == 1000
    assert fast_l1._batch_size(80_000, 20_000, 500) == 500
    assert fast_l1._batch_size(90, 10, None) == 10


def test_the_loader():
    x = torch.arange(12, dtype=torch.uint8).reshape(6, 2)
    loader = fast_l1.Loader(x, torch.arange(6.0)[:, None], 3, torch.Generator().manual_seed(0))
    assert len(loader) == 2
    first, second = (torch.cat([index for _, _, index in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    for inp, targ, index in loader:
        assert inp.dtype == torch.float32
        assert torch.equal(inp, x[index].float()) and torch.equal(targ[:, 0], index.float())

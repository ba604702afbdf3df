"""What a fit leaves on disk: sparse or dense, and what reads it."""

import io
import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch

from datamodels.errors import RegressionError
from datamodels.regression import Datamodel, RegressionWarning, RegularizationPath, datamodel, fit, make_problem, result

P, T, K = 40, 6, 5


def model_of(density, *, p=P, seed=0):
    """A datamodel whose weights have this share of non-zeros, and a path."""
    rng = np.random.default_rng(seed)
    weight = np.zeros(p * T, dtype=np.float32)
    weight[rng.permutation(p * T)[: round(density * p * T)]] = rng.standard_normal(round(density * p * T))
    weight = weight.reshape(p, T)
    numbers = {name: rng.random(T) for name in ("gap", "kkt", "r2_train", "r2_val")}
    lam = np.sort(rng.random((K, T)), axis=0)[::-1]
    return Datamodel(
        weight=weight,
        bias=rng.random(T).astype("f4"),
        lam=lam[2].astype("f4"),
        nnz=np.count_nonzero(weight, axis=0),
        ended=("validation turned",) * T,
        columns=tuple(f"masks[{j}]" for j in range(p)),
        targets=tuple(f"margins[{t}]" for t in range(T)),
        about={"k": K},
        path=RegularizationPath(lam=lam, val_mse=rng.random((K, T)), nnz=rng.integers(0, p, (K, T))),
        **numbers,
    )


def write(model, out, **options):
    report = result.report(model, config={}, rows={"train": [1], "val": [2]}, warnings=[], seconds={"fit": 1})
    result.write(out, model, report, **options)


def same(one, other):
    assert (one.ended, one.columns, one.targets, one.about) == (other.ended, other.columns, other.targets, other.about)
    for name, values in result.arrays(one).items():
        found = result.arrays(other)[name]
        assert values.dtype == found.dtype
        np.testing.assert_array_equal(values, found, err_msg=name)


# ------------------------------------------------------------------ sparse and dense


@pytest.mark.parametrize("density", [0.0, 0.05, 0.19, 0.21, 1.0])
def test_a_result_comes_back_whatever_its_density(tmp_path, density):
    model = model_of(density)
    write(model, tmp_path / "out")
    back = Datamodel.load(tmp_path / "out")
    same(model, back)
    assert back.weight.flags.c_contiguous and back.weight.flags.writeable
    assert result.digest(back) == result.digest(model)

    sparse = density < 0.2
    state = torch.load(tmp_path / "out" / "datamodels.pt", weights_only=True)
    assert state["weight"].is_sparse == sparse
    np.testing.assert_array_equal(state["weight"].to_dense().numpy(), model.weight)  # what the README says
    names = os.listdir(tmp_path / "out" / "final_lambda")
    assert ("weight.npz" in names, "weight.npy" in names) == (sparse, not sparse)
    kept = (
        scipy.sparse.load_npz(tmp_path / "out" / "final_lambda" / "weight.npz").toarray()
        if sparse
        else np.load(tmp_path / "out" / "final_lambda" / "weight.npy")
    )
    np.testing.assert_array_equal(kept, model.weight)


def test_sparse_is_smaller_exactly_where_it_is_chosen(tmp_path, monkeypatch):
    """Both ways on disk, for weights large enough that names and certificates do not count."""
    for density in (0.17, 0.23):
        model = model_of(density, p=20_000)
        model = replace(model, columns=("",) * 20_000)
        sizes = {}
        for sparse in (False, True):
            monkeypatch.setattr(Datamodel, "sparse_is_smaller", lambda self, sparse=sparse: sparse)
            model.save(tmp_path / "d.pt")
            sizes[sparse] = (tmp_path / "d.pt").stat().st_size
            same(Datamodel.load(tmp_path / "d.pt"), replace(model, path=None))
        monkeypatch.undo()
        assert model.sparse_is_smaller() == (sizes[True] < sizes[False])


def test_torch_reads_a_sparse_file_without_a_warning(tmp_path):
    model_of(0.05).save(tmp_path / "d.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = torch.load(tmp_path / "d.pt", weights_only=True)
        assert (torch.ones(2, P) @ state["weight"]).shape == (2, T)


def test_a_sparse_file_with_places_outside_is_refused(tmp_path):
    weight = torch.sparse_coo_tensor(torch.tensor([[1], [9]]), torch.ones(1), (4, 2), check_invariants=False)
    torch.save({"weight": weight, "bias": torch.ones(2), "lam": torch.ones(2)}, tmp_path / "d.pt")
    with pytest.raises(RegressionError, match=r"not a datamodels.pt \(RuntimeError: size is inconsistent"):
        Datamodel.load(tmp_path / "d.pt")


@pytest.mark.parametrize("density", [0.009, 0.5])
@pytest.mark.parametrize("block", [7, datamodel.BLOCK_VALUES])
def test_sparse_predictions_are_those_of_dense_weights(monkeypatch, density, block):
    monkeypatch.setattr(datamodel, "BLOCK_VALUES", block)
    model = model_of(density)
    x = np.random.default_rng(1).standard_normal((9, P))
    np.testing.assert_allclose(model.predict(x), x @ model.weight.astype("f8") + model.bias, rtol=1e-12, atol=1e-12)
    assert model.predict(x[:0]).shape == (0, T)


# ------------------------------------------------------------------ loading


def test_a_folder_loads_with_its_path_and_a_file_without(tmp_path):
    model = model_of(0.5)
    write(model, tmp_path / "out")
    same(Datamodel.load(str(tmp_path / "out")), model)
    same(Datamodel.load(tmp_path / "out" / "datamodels.pt"), replace(model, path=None))


def test_a_folder_of_the_released_code_has_no_path_that_is_ours(tmp_path):
    (tmp_path / "regularization_path").mkdir()
    state = {"weight": torch.zeros(4, 2), "bias": torch.ones(2), "lam": torch.ones(2)}
    torch.save(state, tmp_path / "datamodels.pt")
    assert Datamodel.load(tmp_path).path is None


def test_a_folder_without_a_result(tmp_path):
    with pytest.raises(RegressionError, match=r"datamodels.pt: no such file"):
        Datamodel.load(tmp_path)


def test_a_path_of_other_targets_is_refused(tmp_path):
    write(model_of(0.5), tmp_path / "out")
    np.save(tmp_path / "out/regularization_path/lam.npy", np.ones((K, T + 1)))
    with pytest.raises(RegressionError, match=r"regularization_path: arrays of shape \(lambdas, 6\) are expected"):
        Datamodel.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": None}, "KeyError: 'weight'"),
        ({"weight": torch.ones(3)}, r"its weight has shape \(3,\), not \(columns, targets\)"),
        ({"weight": torch.ones(3, 2, 1)}, r"its weight has shape \(3, 2, 1\)"),
        ({"weight": [[1.0]]}, "AttributeError"),
        ({"bias": torch.ones(3)}, r"bias: expected shape \(2,\), got \(3,\)"),
        ({"gap": torch.ones(3)}, r"gap: expected shape \(2,\), got \(3,\)"),
        ({"gap": 3}, "AttributeError"),
        ({"columns": ["a"]}, "1 column names"),
        ({"about": 3}, "TypeError"),
    ],
)
def test_what_is_not_a_datamodel_is_refused_by_name(tmp_path, change, told):
    state = {"weight": torch.ones(4, 2), "bias": torch.ones(2), "lam": torch.ones(2)} | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "d.pt")
    with pytest.raises(RegressionError, match=rf"d.pt: not a datamodels.pt \({told}"):
        Datamodel.load(tmp_path / "d.pt")


@pytest.mark.parametrize("state", [[1, 2], torch.ones(2), "text"])
def test_what_is_not_even_a_dict_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "d.pt")
    name = type(state).__name__
    with pytest.raises(RegressionError, match=rf"d.pt: not a datamodels.pt \(it holds a {name}, not a dict\)"):
        Datamodel.load(tmp_path / "d.pt")


def test_packed_masks_are_told_how_to_be_unpacked():
    model = model_of(0.5)
    x = np.random.default_rng(0).random((3, P)) < 0.5
    packed = np.packbits(x, axis=1, bitorder="little")
    with pytest.raises(RegressionError, match=r"got \(3, 5\); these look like packed bits: .*np.unpackbits") as caught:
        model.predict(packed)
    code = str(caught.value).rpartition("or ")[2]
    np.testing.assert_array_equal(model.predict(eval(code, {"np": np, "x": packed})), model.predict(x))
    with pytest.raises(RegressionError, match=r"got \(3, 5\)$"):
        model.predict(packed.astype("f4"))


def test_representations_fit_a_line():
    model = model_of(0.5)
    assert repr(model) == (
        f"Datamodel(40 columns, 6 targets, 20 non-zeros on average, largest duality gap {model.gap.max():.1e})"
    )
    assert repr(model.path) == "RegularizationPath(5 lambdas, 6 targets)"
    released = replace(model, gap=np.full(T, np.nan))
    assert repr(released).endswith("20 non-zeros on average, no certificates)")


# ------------------------------------------------------------------ writing


def test_digests_differ_with_any_number_or_name():
    model = model_of(0.5)
    changed = [
        replace(model, **{name: getattr(model, name) + 1})
        for name in ("bias", "lam", "gap", "kkt", "nnz", "r2_train", "r2_val")
    ]
    changed += [replace(model, path=replace(model.path, **{name: getattr(model.path, name) + 1}))
                for name in ("lam", "val_mse", "nnz")]  # fmt: skip
    weight = model.weight.copy()
    weight[np.nonzero(weight)[0][0], np.nonzero(weight)[1][0]] *= 1.000001
    moved = model.weight.copy()  # a non-zero to a place that was zero, in the same order
    at = next(j for j in range(P - 1) if moved[j, 0] != 0 and moved[j + 1, 0] == 0)
    moved[[at, at + 1], 0] = moved[[at + 1, at], 0]
    changed += [
        replace(model, weight=moved),
        replace(model, kkt=np.zeros(T)),
        replace(model, kkt=np.zeros(T, dtype=np.int64)),
        replace(model, weight=weight),
        replace(model, weight=np.roll(model.weight, 1, axis=0)),
        replace(model, targets=("a", *model.targets[1:])),
        replace(model, columns=("a", *model.columns[1:])),
        replace(model, ended=("constant", *model.ended[1:])),
    ]
    digests = {result.digest(one) for one in [model, *changed]}
    assert len(digests) == len(changed) + 1
    assert result.digest(model_of(0.5)) == result.digest(model)


def test_a_picture_that_cannot_be_drawn_is_one_line(tmp_path, capsys, monkeypatch):
    from datamodels.regression.compute_datamodels import draw
    from datamodels.report import figures

    model = model_of(0.5)
    write(model, tmp_path / "with", draw=draw(model))
    assert (tmp_path / "with/regularization_path/path.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""

    def broken(*args, **kwargs):
        raise ValueError("no ink")

    monkeypatch.setattr(figures, "regularization_path", broken)
    write(model, tmp_path / "without", draw=draw(model))
    assert capsys.readouterr().err == "warning: no picture of the path: ValueError: no ink\n"
    same(Datamodel.load(tmp_path / "without"), model)
    assert not (tmp_path / "without/regularization_path/path.png").exists()


def test_targets_without_a_path_are_one_line_too(tmp_path, capsys):
    from datamodels.regression.compute_datamodels import draw

    x = np.random.default_rng(0).random((20, 3)) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        model = fit(make_problem(x, np.ones((20, 2))))
    write(model, tmp_path / "out", draw=draw(model))
    assert "no target has a path: all of them are constant" in capsys.readouterr().err
    same(Datamodel.load(tmp_path / "out"), model)


def test_what_a_killed_process_left_is_removed_and_a_result_is_not(tmp_path):
    out = tmp_path / "out"
    write(model_of(0.5), out)
    (tmp_path / ".out.partial-7").mkdir()
    result.remove_unfinished(out)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(out)) == sorted(result.RESULTS)
    (out / "datamodels.pt").unlink()
    (out / "log.txt").write_text("mine")
    result.remove_unfinished(out)
    assert os.listdir(out) == ["log.txt"]


def test_the_report_counts_lambdas_and_is_json(tmp_path):
    model = model_of(0.5)
    model.path.lam[3:, 1] = np.nan
    write(model, tmp_path / "out")
    report = json.loads((tmp_path / "out/regression.json").read_text())
    assert report["summary"]["lambdas"] == K * T - 2
    assert set(report) == {"config", "about", "rows", "summary", "warnings", "versions", "seconds"}
    assert f"{(K * T - 2) / 2:.0f} lambdas/s" in result.describe(tmp_path, model, 2.0)


def test_the_bar_counts_targets_and_shows_lambdas_a_second():
    from tqdm import tqdm

    from datamodels.regression.compute_datamodels import _Rate

    shown = io.StringIO()
    with tqdm(total=9, unit="target", file=shown, mininterval=0) as bar:
        rate = _Rate(bar)
        rate(2)
        assert bar.postfix is None  # a solver that does not count them
        rate(3, 40)
        rate(lambdas=2, targets=0)
        assert bar.n == 5
        assert bar.postfix.endswith(" lambdas/s") and float(bar.postfix.split()[0]) > 42
    assert "5/9" in shown.getvalue() and "lambdas/s" in shown.getvalue()

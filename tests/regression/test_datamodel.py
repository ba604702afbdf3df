import os
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodels.errors import RegressionError
from datamodels.regression import Datamodel, RegressionWarning, datamodel, fit, make_problem, scale


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    x = rng.random((200, 10)) < 0.5
    y = x @ rng.standard_normal((10, 3)) + rng.standard_normal((200, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        return fit(make_problem(x, y, targets=["a", "b", "c"]))


def test_load_gives_back_what_was_saved(model, tmp_path):
    model.save(tmp_path / "datamodels.pt")
    back = Datamodel.load(tmp_path / "datamodels.pt")
    for name in ("weight", "bias", "lam", "gap", "kkt", "nnz", "r2_train", "r2_val"):
        np.testing.assert_array_equal(getattr(back, name), getattr(model, name))
    assert (back.ended, back.columns, back.targets) == (model.ended, model.columns, model.targets)
    assert back.about == model.about
    assert os.listdir(tmp_path) == ["datamodels.pt"]
    replace(model, bias=model.bias + 1).save(tmp_path / "datamodels.pt")
    np.testing.assert_array_equal(Datamodel.load(tmp_path / "datamodels.pt").bias, model.bias + 1)


def test_file_is_the_released_one_and_more(model, tmp_path):
    model.save(tmp_path / "datamodels.pt")
    state = torch.load(tmp_path / "datamodels.pt", weights_only=True)
    for name, shape in (("weight", (10, 3)), ("bias", (3,)), ("lam", (3,))):
        assert state[name].dtype == torch.float32
        assert state[name].shape == shape
    assert {"gap", "kkt", "nnz", "r2_val"} <= set(state)


def test_released_file_loads(tmp_path):
    weight = torch.zeros(4, 2)
    weight[1, 0] = 2.0
    torch.save({"weight": weight, "bias": torch.ones(2), "lam": torch.ones(2)}, tmp_path / "d.pt")
    model = Datamodel.load(tmp_path / "d.pt")
    np.testing.assert_array_equal(model.predict(np.eye(4, dtype=bool)), [[1, 1], [3, 1], [1, 1], [1, 1]])
    assert model.nnz.tolist() == [1, 0]
    assert np.isnan(model.gap).all()


def test_predict_takes_raw_masks(model):
    masks = np.random.default_rng(1).random((5, 10)) < 0.5
    expected = [
        [sum(model.weight[j, t] for j in range(10) if mask[j]) + model.bias[t] for t in range(3)] for mask in masks
    ]
    np.testing.assert_allclose(model.predict(masks), expected, rtol=1e-5)
    assert model.predict(masks[:0]).shape == (0, 3)
    for wrong in (masks[:, :9], masks[0]):
        with pytest.raises(RegressionError, match=r"expected masks of shape \(rows, 10\)"):
            model.predict(wrong)


def test_predict_in_blocks_of_rows_and_targets(model, monkeypatch):
    masks = np.random.default_rng(1).random((7, 10)) < 0.5
    whole = model.predict(masks)
    monkeypatch.setattr(scale, "BLOCK_VALUES", 20)
    monkeypatch.setattr(datamodel, "BLOCK_VALUES", 20)
    np.testing.assert_allclose(model.predict(masks), whole, rtol=1e-12)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_files_that_are_not_datamodels_are_refused_and_not_run(tmp_path):
    evil = Evil(tmp_path / "ran")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"weight": evil}))
    torch.save({"weights": torch.ones(2)}, tmp_path / "keys.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": evil}, tmp_path / "evil.pt")
    for name in ("text.pt", "empty.pt", "pickle.pt", "keys.pt", "list.pt", "evil.pt"):
        with pytest.raises(RegressionError, match=rf"{name}: not a datamodels.pt"):
            Datamodel.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RegressionError, match="no such file"):
        Datamodel.load(tmp_path / "nothing.pt")


def test_shapes_are_checked(model):
    with pytest.raises(RegressionError, match=r"bias: expected shape \(3,\), got \(2,\)"):
        replace(model, bias=model.bias[:2])
    with pytest.raises(RegressionError, match="weight must have shape"):
        replace(model, weight=model.bias)
    with pytest.raises(RegressionError, match="9 column names"):
        replace(model, columns=model.columns[1:])


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    model.save(tmp_path / "datamodels.pt")
    before = (tmp_path / "datamodels.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "datamodels.pt")
    assert (tmp_path / "datamodels.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["datamodels.pt"]

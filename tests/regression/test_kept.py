"""Arrays that one process makes and all use, with real processes."""

import multiprocessing
import os

import numpy as np
import pytest

from datamodels.regression import gram_path, make_problem
from datamodels.regression.kept import kept
from datamodels.regression.lasso import PathOptions


def _make(folder, made):
    def make():
        made.append(os.getpid())
        return {"a": np.arange(60_000, dtype=np.int16).reshape(300, 200), "b": np.ones(3)}

    got = kept(folder, make)
    return len(made), int(np.asarray(got["a"], dtype=np.int64).sum()), got["a"].dtype.str, got["b"].tolist()


def _job(folder):
    return _make(folder, [])


def test_many_processes_make_them_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        got = pool.map(_job, [tmp_path / "g"] * 6, chunksize=1)
    assert sum(made for made, *_ in got) == 1
    assert {tuple(map(str, rest)) for _, *rest in got} == {tuple(map(str, got[0][1:]))}


def test_no_folder_keeps_nothing(tmp_path):
    assert _make(None, [])[0] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["a.npy", ".a.npy.partial", ".names.json.partial"])
def test_what_a_killed_process_left_is_made_again(tmp_path, left):
    (tmp_path / left).write_bytes(b"half")
    assert _make(tmp_path, [])[0] == 1
    assert _make(tmp_path, [])[0] == 0


def test_a_disk_that_is_full_costs_no_result(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert _make(tmp_path, [])[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_fit_with_a_kept_matrix_has_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 70)) < 0.5, rng.standard_normal((200, 5))
    problem = make_problem(x, y)
    plain = gram_path.solve(problem, PathOptions(), True, 1, lambda *done: None)
    for _ in range(2):
        again = gram_path.solve(problem, PathOptions(), True, 1, lambda *done: None, keep=tmp_path)
        np.testing.assert_array_equal(again.weight, plain.weight)
    assert np.load(tmp_path / "full.npy").dtype == np.int16

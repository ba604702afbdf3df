"""The rows of digits: plain loop and many at once agree, smoke is three batches, sections reach the training."""

import subprocess
import sys

import numpy as np
import torch
from fastargs import get_current_config

from datamodels.learning import data
from worker_scripts import train_mlp

MASKS = np.random.default_rng(0).random((4, 1000)) < 0.5
SEEDS = np.array([3, 1, 4, 2**32 - 1], np.int64)


def smoked(**given):
    """The margins of a smoke run under `--training.name=value` for each of the given."""
    content = get_current_config().content
    before = dict(content)
    try:
        content.update({("training", name): value for name, value in given.items()})
        return train_mlp.main(mask=MASKS[0], seed=3, smoke=True)["margins"]
    finally:
        content.clear()
        content.update(before)


def test_one_row_and_many_agree():
    many = train_mlp.main_many(masks=MASKS, seeds=SEEDS)
    assert many.keys() == {"margins"}
    assert many["margins"].shape == (4, 797)
    assert many["margins"].dtype == np.float32
    for k in (0, 3):
        one = train_mlp.main(mask=MASKS[k], seed=int(SEEDS[k]))
        assert one["margins"].shape == (797,)
        np.testing.assert_allclose(one["margins"], many["margins"][k], rtol=0, atol=1e-3)
    assert (many["margins"] > 0).mean() > 0.9  # of the test digits are classified right


def test_smoke_stops_after_three_batches(monkeypatch):
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k)))
    one = train_mlp.main(mask=MASKS[0], seed=3, smoke=True)["margins"]
    assert len(steps) == 3
    monkeypatch.undo()
    many = train_mlp.main_many(masks=MASKS, seeds=SEEDS, smoke=True)["margins"]
    np.testing.assert_allclose(many[0], one, rtol=0, atol=1e-3)
    assert np.abs(many[0] - train_mlp.main(mask=MASKS[0], seed=3)["margins"]).max() > 1


def test_sections_reach_the_training():
    seen = [
        smoked(),
        smoked(lr=0.01),
        smoked(hidden=5),
        smoked(batch_size=7),
        smoked(momentum=0.0),
        smoked(weight_decay=0.5),
        smoked(label_smoothing=0.3),
        smoked(warmup=0.9),
        smoked(epochs=2),
        smoked(nesterov=True, momentum=0.7),
        smoked(momentum=0.7),
        smoked(margin="max"),
    ]
    for i, a in enumerate(seen):
        assert all(not np.allclose(a, b) for b in seen[:i]), i
    np.testing.assert_array_equal(seen[0], smoked())


def test_data_are_loaded_once_and_standardised(monkeypatch):
    train_mlp._tensors.cache_clear()
    calls, load = [], data.load
    monkeypatch.setattr(data, "load", lambda *a: (calls.append(a), load(*a))[1])
    for _ in range(2):
        train_mlp.main(mask=MASKS[0], seed=3, smoke=True)
    assert calls == [("digits", None)]
    train, test, classes = train_mlp._tensors("digits", None)
    assert classes == 10
    assert abs(float(train[0].mean())) < 1e-5
    assert abs(float(train[0].std(unbiased=False)) - 1) < 1e-5
    raw = load("digits")
    pixels = (raw.test.inputs.reshape(797, 64) - raw.train.inputs.mean()) / raw.train.inputs.std()
    np.testing.assert_allclose(test[0].numpy(), pixels, atol=1e-5)


def test_training_code_never_loads_a_store():
    code = "import sys, worker_scripts.train_mlp; sys.exit(any(m.startswith('datamodels.store') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The CIFAR-10 example on a tiny folder of the real formats: network, worker script, and the script a user runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fastargs
import numpy as np
import pytest
import torch
import yaml

from datamodels.learning import data
from datamodels.spec import Spec
from tests import image_files

ROOT = Path(__file__).parents[2]
TRAIN, TEST = 60, 20


@pytest.fixture
def train_cifar():
    """The module, imported afresh: its sections leave fastargs' one registry again afterwards."""
    config = fastargs.get_current_config()
    before = {name: value.copy() for name, value in vars(config).items() if hasattr(value, "copy")}
    from examples.cifar10 import train_cifar as module

    yield module
    vars(config).update(before)
    del sys.modules[module.__name__], sys.modules["examples.cifar10"].train_cifar


@pytest.fixture
def folder(tmp_path):
    image_files.write_cifar10(tmp_path, train=TRAIN, test=TEST)
    return tmp_path


def run(module, folder, mask, *, seed=0, smoke=False, **training):
    small = {"width": 4, "epochs": 2, "batch_size": 16, "lr": 0.1, "lr_peak_epoch": 1} | training
    options = {"data.dir": str(folder)} | {f"training.{name}": str(value) for name, value in small.items()}
    fastargs.get_current_config().collect(options)
    return module.main(mask=mask, seed=seed, smoke=smoke)["margins"]


def half(seed=0):
    return np.random.default_rng(seed).permutation(TRAIN) < TRAIN // 2


def test_the_network_has_the_size_of_its_layers(train_cifar):
    model = train_cifar.ResNet9(10)
    convolutions = [(3, 64, 3), (64, 128, 5), (128, 128, 3), (128, 128, 3), (128, 256, 3)]
    convolutions += [(256, 256, 3), (256, 256, 3), (256, 128, 3)]
    expected = sum(i * o * k * k + 2 * o for i, o, k in convolutions) + 128 * 10
    assert sum(p.numel() for p in model.parameters()) == expected
    logits = model.eval()(torch.rand(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    assert logits.dtype == torch.float32


def test_a_residual_block_adds_its_input(train_cifar):
    block = train_cifar.Residual(torch.nn.Flatten(), torch.nn.Linear(3, 3))
    x = torch.rand(2, 3)
    assert torch.equal(block(x), x + block[1](x))


def test_predict_averages_an_image_and_its_left_to_right_mirror(train_cifar):
    images = torch.rand(5, 3, 32, 32)

    def model(x):  # sees the channel, the row and the column of a pixel
        return torch.stack([x[:, 0, 1, 2], x[:, 2, 1, 0]], dim=1)

    plain = train_cifar.predict(model, images, mirror=False)
    assert torch.equal(plain, torch.stack([images[:, 0, 1, 2], images[:, 2, 1, 0]], 1))
    mirrored = torch.stack([images[:, 0, 1, 29], images[:, 2, 1, 31]], 1)
    torch.testing.assert_close(train_cifar.predict(model, images, mirror=True), (plain + mirrored) / 2)


def test_predict_takes_more_images_than_one_batch(train_cifar, monkeypatch):
    monkeypatch.setattr(train_cifar, "TEST_BATCH", 4)
    images = torch.rand(10, 3, 32, 32)
    out = train_cifar.predict(lambda x: x.mean((2, 3)), images, mirror=False)
    torch.testing.assert_close(out, images.mean((2, 3)))


def test_a_row_is_its_mask_and_seed(train_cifar, folder):
    margins = run(train_cifar, folder, half())
    assert margins.shape == (TEST,)
    assert margins.dtype == np.float32
    assert np.isfinite(margins).all()
    assert np.array_equal(margins, run(train_cifar, folder, half()))
    assert not np.allclose(margins, run(train_cifar, folder, half(), seed=1), atol=1e-3)
    assert not np.allclose(margins, run(train_cifar, folder, half(1)), atol=1e-3)


def test_the_seed_makes_the_weights_and_the_order_and_batches_are_augmented(train_cifar, folder, monkeypatch):
    calls = []

    def train(model, *args, seed, augment, **kwargs):
        calls.append((torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]), seed, augment))
        return model.eval()

    monkeypatch.setattr(train_cifar.loop, "train", train)
    for seed in (0, 0, 7):
        run(train_cifar, folder, half(), seed=seed)
    (first, *_), (again, *_), (other, *_) = calls
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [seed for _, seed, _ in calls] == [0, 0, 7]
    assert calls[0][2] == data.Augment(flip=True, translate=2, cutout=4, pad="zero")


def test_the_two_margins_differ_as_a_maximum_and_a_soft_maximum_do(train_cifar, folder):
    soft = run(train_cifar, folder, half(), margin="logsumexp")
    assert np.array_equal(soft, run(train_cifar, folder, half()))
    hard = run(train_cifar, folder, half(), margin="max")
    assert (hard > soft).all()
    assert (hard <= soft + np.log(9) + 1e-5).all()


def test_test_time_mirroring_can_be_switched_off(train_cifar, folder):
    mirrored = run(train_cifar, folder, half())
    assert not np.array_equal(mirrored, run(train_cifar, folder, half(), lr_tta=""))


def test_smoke_stops_after_three_batches(train_cifar, folder, monkeypatch):
    trained = []
    original = train_cifar.loop.train

    def train(model, *args, **kwargs):
        trained.append(original(model, *args, **kwargs))
        return trained[-1]

    monkeypatch.setattr(train_cifar.loop, "train", train)
    run(train_cifar, folder, half(), smoke=True, epochs=30)
    run(train_cifar, folder, half(), epochs=3)
    batches = [int(model.features[0][1].num_batches_tracked) for model in trained]
    assert batches == [3, 6]


def test_it_learns(train_cifar, tmp_path):
    """Classes that an eye tells apart, from 150 images: far above the tenth that guessing gets."""
    image_files.write_cifar10(tmp_path, train=300, test=100)
    mask = np.arange(300) % 2 == 0
    margins = run(train_cifar, tmp_path, mask, width=8, epochs=12, lr=0.3, lr_peak_epoch=3, margin="max")
    assert (margins > 0).mean() > 0.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_trains_on_a_gpu(train_cifar, folder):
    margins = run(train_cifar, folder, half(), width=64)
    assert margins.shape == (TEST,)
    assert np.isfinite(margins).all()


def example(*args, **settings):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | settings
    command = ["bash", str(ROOT / "examples/cifar10/example.sh"), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("form", ["python", "binary"])
def test_the_example_runs_from_files_to_datamodels(tmp_path, form):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    image_files.write_cifar10(images, train=TRAIN, test=TEST, form=form)
    spec = json.loads((ROOT / "examples/cifar10/spec.json").read_text())
    spec["schema"]["masks"]["shape"], spec["schema"]["margins"]["shape"] = [TRAIN], [TEST]
    spec["design"][0]["masks"] = 8
    spec["design"][1] |= {"masks": 1, "repeats": 2}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "regression.yaml").write_text("data: {num_train: 6, num_val: 2}\ncfg: {k: 5}\n")
    settings = {"SPEC": str(tmp_path / "spec.json"), "REGRESSION": str(tmp_path / "regression.yaml")}
    options = ("--training.width=4", "--training.epochs=2", "--training.batch_size=16")
    done = example(images, out, *options, **settings)
    assert done.returncode == 0, done.stderr
    assert np.load(out / "store/_completed.npy").all()
    masks = np.unpackbits(np.load(out / "store/masks.npy"), axis=1, count=TRAIN, bitorder="little")
    assert masks.sum(1).tolist() == [TRAIN // 2] * 10
    assert (masks[8] == masks[9]).all()
    margins = np.load(out / "store/margins.npy")
    assert margins.dtype == np.float16
    assert not np.array_equal(margins[8], margins[9])  # the same mask, another seed
    saved = torch.load(out / "datamodels/datamodels.pt", weights_only=True)
    assert saved["weight"].shape == (TRAIN, TEST)
    again = example(images, out, *options, **settings)
    assert again.returncode == 0, again.stderr
    assert np.array_equal(margins, np.load(out / "store/margins.npy"))


def test_the_example_says_what_it_needs(tmp_path):
    done = example()
    assert done.returncode == 2
    assert "IMAGES holds CIFAR-10's python or binary batches" in done.stderr
    done = example(tmp_path / "nothing", tmp_path / "out")
    assert done.returncode != 0
    assert "neither data_batch_1 nor data_batch_1.bin" in done.stderr
    assert not np.load(tmp_path / "out/store/_rows.npy")["attempts"].any()  # no row is spent on it


def test_the_shipped_spec_is_cifar10s():
    spec = Spec.load(ROOT / "examples/cifar10/spec.json")
    assert spec.schema["masks"].shape == (50_000,)
    assert spec.schema["margins"].shape == (10_000,)
    assert spec.schema["masks"].dtype == "bits"
    assert spec.schema["margins"].dtype == "float16"


def test_the_shipped_regression_takes_rows_and_images_that_there_are():
    spec = Spec.load(ROOT / "examples/cifar10/spec.json")
    config = yaml.safe_load((ROOT / "examples/cifar10/regression.yaml").read_text())["data"]
    assert int(config["num_train"]) + int(config["num_val"]) == spec.design[0]["masks"]
    assert 0 <= config["target_start_ind"] < config["target_end_ind"] <= spec.schema["margins"].shape[0]

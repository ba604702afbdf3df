"""The LLC examples, small: the whole way on digits, twice; and the commands for others' ResNet checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodels.learning.resnet import resnet18
from datamodels.store import Store
from examples.llc.train import kept_steps
from tests.image_files import write_cifar10

ROOT = Path(__file__).parents[2]


def command(*words, env=None, code=0, seconds=300):
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, **(env or {})}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False)  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("llc") / "out"
    return out, command(sys.executable, "-m", "examples.llc.run", "--smoke", "--out", str(out))


def test_from_training_to_the_curve(whole):
    out, text = whole
    for picture in ("sweep.png", "trace.png", "curve.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "acceptance" in text and "95 % interval" in text and "chosen" in text
    steps = kept_steps(200)
    np.testing.assert_array_equal(np.sort(np.load(out / "curve/store/step.npy")), steps)
    # each row is of a checkpoint of its own: other weights, another loss
    assert len(set(np.load(out / "curve/store/weights_hash.npy"))) == len(steps)
    losses = np.load(out / "curve/store/initial_loss.npy")
    assert len(set(losses)) == len(steps)
    last = np.argmax(np.load(out / "curve/store/step.npy"))
    assert (np.load(out / "sweep/store/initial_loss.npy") == losses[last]).all()
    assert np.load(out / "sweep/store/n.npy").tolist() == [1000] * 4


def test_run_again_it_estimates_nothing_twice(whole):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".npy", ".pt")}
    text = command(sys.executable, "-m", "examples.llc.run", "--smoke", "--out", str(out))
    assert "4 of 4 rows complete" in text and {p: p.stat().st_mtime_ns for p in before} == before
    pool = f"--worker.logdir={out}/curve/store"
    assert "rows are complete" in command(sys.executable, "-m", "datamodels.pool", pool,
                                          "--worker.main_import=worker_scripts.llc", "--llc.model=a.b")  # fmt: skip


def test_a_smoke_run_says_that_its_setting_is_a_fallback_and_another_run_ends_there(whole):
    out, text = whole
    if "none chosen" not in text:
        pytest.fail(
            "the smoke run's sweep chooses a setting now: make its chains shorter, or this test asserts nothing"
        )
    assert "this smoke run goes on with the nearest setting, only to show the rest" in text
    call = "import sys; from pathlib import Path; from examples.llc import run; " \
           f"sys.exit(run.main(Path({str(out)!r}), run.SMOKE))"  # fmt: skip
    text = command(sys.executable, "-c", call, code=1)
    assert "no setting of the sweep will do" in text and "other epsilons, or longer chains" in text
    assert "2. The chains" not in text and "3. Every" not in text


def test_another_size_on_the_same_folder_says_what_differs(whole):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    text = command(sys.executable, "-m", "examples.llc.run", "--out", str(out), code=2)
    assert "choices.epsilon is [1e-05, 0.001] there and [1e-06, " in text and text.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_row_that_was_lost_is_estimated_again_and_no_other(whole):
    out, _ = whole
    store = out / "curve/store"
    values = np.load(store / "llc.npy").copy()
    command(sys.executable, "-m", "datamodels.store", "reset", str(store), "--rows=2")
    command(sys.executable, "-m", "examples.llc.run", "--smoke", "--out", str(out))
    np.testing.assert_array_equal(np.load(store / "llc.npy"), values)


def test_pictures_by_command(whole, tmp_path):
    out, _ = whole
    show = (sys.executable, "-m", "examples.llc.show")
    for picture in (("sweep", "sweep"), ("trace", "sweep"), ("trace", "curve"), ("curve", "curve")):
        file = tmp_path / f"{'-'.join(picture)}.png"
        assert str(file) in command(*show, picture[0], f"{out}/{picture[1]}/store", "--out", str(file))
        assert file.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text('{"num_models": 2, "schema": {"x": {"shape": [], "dtype": "float64"}}}')
    command(sys.executable, "-m", "datamodels.initialize_logdir", f"--logging.logdir={tmp_path}/other",
            f"--logging.spec={tmp_path}/other.json")  # fmt: skip
    assert "has no llc, llc_se, " in command(*show, "curve", f"{tmp_path}/other", code=1)
    assert "row 99 is not complete" in command(*show, "trace", f"{out}/curve/store", "--row=99", code=1)
    assert "--row goes with trace" in command(*show, "curve", f"{out}/curve/store", "--row=1", code=2)


def test_checkpoints_are_log_spaced():
    steps = kept_steps(20_000)
    assert steps[:6] == [0, 1, 2, 4, 8, 16] and steps[-1] == 20_000 and steps == sorted(set(steps))
    ratios = np.array(steps[9:-1]) / np.array(steps[8:-2])
    assert ratios.max() < 1.3


def resnets(folder, stem):
    """Two ResNet-18s as torch's ImageNet example saves them."""
    folder.mkdir()
    for epoch in (1, 5):
        torch.manual_seed(epoch)
        state = {f"module.{k}": v for k, v in resnet18(10, stem).state_dict().items()}
        torch.save({"state_dict": state, "epoch": epoch, "arch": "resnet18"}, folder / f"epoch{epoch}.pth.tar")


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
    for folder in (f"{tmp_path}/none", "/nonexistent/none", str(tmp_path)):
        text = command("bash", "examples/llc/cifar.sh", folder, "cifar10:data", f"{tmp_path}/out", code=2)
        assert text.startswith("error: ") and folder in text and text.count("\n") == 1


@pytest.mark.slow
def test_somebodys_resnet_on_cifar10_as_far_as_the_choice(tmp_path):
    (tmp_path / "data").mkdir()
    write_cifar10(tmp_path / "data", train=50, test=10)
    resnets(tmp_path / "runs", "cifar")
    call = ("bash", "examples/llc/cifar.sh", f"{tmp_path}/runs", f"cifar10:{tmp_path}/data", f"{tmp_path}/out",
            "--llc.samples=4", "--llc.batch_size=2", "--llc.burn_in=1")  # fmt: skip
    env = {"CHAINS": "1", "DRAWS": "3", "EPSILONS": "[1e-7]", "GAMMAS": "[100]"}
    text = command(*call, code=1, env=env, seconds=900)
    assert "none chosen" in text and "no setting of the sweep will do" in text  # of three draws
    sweep = tmp_path / "out/sweep"
    assert np.load(sweep / "step.npy").tolist() == [5] and np.load(sweep / "num_parameters.npy").tolist() == [
        11_173_962
    ]
    assert np.isfinite(np.load(sweep / "llc.npy")).all() and (tmp_path / "out/sweep.png").exists()
    text = command(*call, code=2, env={**env, "EPSILONS": "[1e-6]"})
    assert "choices.epsilon is [1e-07] there and [1e-06] here" in text and f"remove {sweep}" in text
    assert "expected whole numbers, and lists" in command(*call, code=2, env={**env, "EPSILONS": "1e-6 1e-5"})


@pytest.mark.slow
def test_somebodys_resnet_on_a_folder_of_images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 256, (40, 30 + k, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{k}.jpeg")
    resnets(tmp_path / "runs", "imagenet")
    call = ("bash", "examples/llc/cifar.sh", f"{tmp_path}/runs", f"folder:{tmp_path}/data?size=32", f"{tmp_path}/out",
            "--llc.split=all", "--llc.batch_size=4", "--llc.burn_in=1")  # fmt: skip
    env = {"CHAINS": "1", "DRAWS": "3", "EPSILON": "1e-8", "GAMMA": "100", "NORMALISE": "imagenet",
           "MODEL": "datamodels.learning.resnet.resnet18?num_classes=10"}  # fmt: skip
    done = subprocess.run([*call, "--llc.loss=no_such_loss"], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHON": sys.executable, **env})  # fmt: skip
    assert done.returncode and "no_such_loss" in done.stderr
    with Store.open(tmp_path / "out/curve") as store:
        assert store.status().failed == 0, "a smoke row comes first, which is no attempt"
    command(*call, env=env, seconds=900)  # and the mended option is not another setting
    curve = tmp_path / "out/curve"
    assert np.load(curve / "step.npy").tolist() == [1, 5] and len(set(np.load(curve / "weights_hash.npy"))) == 2
    assert np.isfinite(np.load(curve / "llc.npy")).all() and (np.load(curve / "n.npy") == 8).all()
    assert (tmp_path / "out/curve.png").exists()
    text = command(*call, env={**env, "DRAWS": "5", "GAMMA": "10"}, code=2)
    assert "schema.llc_trace.shape is [1, 3] there and [1, 5] here" in text
    assert "--llc.gamma is 100.0 there and 10.0 here" in text

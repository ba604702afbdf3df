"""Checkpoints of other code: wrapped, prefixed, old formats; and nothing in them is run."""

import argparse
import collections
import os

import numpy as np
import pytest
import torch
from torch import nn

from datamodels.errors import DatamodelsError
from datamodels.learning import foreign


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


STATE = network(1).state_dict()


def prefixed(prefix):
    return collections.OrderedDict((prefix + name, value) for name, value in STATE.items())


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        prefixed("module."),
        prefixed("_orig_mod.module."),
        {"state_dict": prefixed("module."), "epoch": 7, "arch": "resnet18", "best_acc1": torch.tensor(71.3)},
        {"model": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "args": argparse.Namespace(lr=0.1)},
        {"model_state_dict": prefixed("net."), "acc": np.float64(0.5), "losses": [np.float32(1), np.int64(3)]},
        {"net": {"state_dict": STATE}},
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_weights_are_found_and_fit(tmp_path, content, old):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    model = network(2)
    assert foreign.digest(model) != foreign.digest(network(1))
    foreign.fill(model, foreign.read(path))
    assert foreign.digest(model) == foreign.digest(network(1))


def test_old_batch_norms_do_not_count_their_batches(tmp_path):
    torch.save({k: v for k, v in STATE.items() if "num_batches" not in k}, tmp_path / "a.pt")
    model = network(2)
    foreign.fill(model, foreign.read(tmp_path / "a.pt"))
    assert foreign.digest(model) == foreign.digest(network(1))


@pytest.mark.parametrize(
    ("name", "content", "step"),
    [
        ("step-000128.pt", STATE, 128),
        ("resnet18_epoch_12.pth.tar", STATE, 12),
        ("step-000128.pt", {"model": STATE, "step": 64, "epoch": 2}, 64),
        ("a.pt", {"model": STATE, "epoch": 3}, 3),
        ("a.pt", {"model": STATE, "iteration": torch.tensor(9)}, 9),
        ("final.pt", STATE, None),
        ("resnet18.pth", STATE, None),
        ("vit_b_16.pth", STATE, None),
        ("epoch_010_acc_93.12.pth.tar", STATE, 10),
        ("model_e05_top1_76.pth", STATE, 5),
        ("ckpt_epoch10_lr0.1.pth", STATE, 10),
        ("resnet18_lr1e-3_wd5e-4.pt", STATE, None),
        ("epoch=3-step=2048.ckpt", STATE, 2048),
        ("ep7_it900.pt", STATE, 900),
        ("netEpoch12.pth", STATE, 12),
        ("iteration-40000.pth", STATE, 40000),
        ("step_10k.pt", STATE, None),
        ("epoch1_of_epoch90.pt", STATE, None),
        ("seed3.pt", STATE, None),
        ("checkpoint-500.pt", STATE, 500),
        ("ckpt.100.pt", STATE, 100),
        ("00250.pt", STATE, 250),
    ],
)
def test_training_steps(tmp_path, name, content, step):
    torch.save(content, tmp_path / name)
    assert foreign.read(tmp_path / name).step == step


def test_the_checkpoints_of_a_folder_by_step(tmp_path):
    for name in ("epoch10.pth", "epoch9.pth", "epoch_011_acc_93.1.pth.tar"):
        torch.save(STATE, tmp_path / name)
    (tmp_path / "log.txt").write_text("of no interest")
    names = ("epoch9.pth", "epoch10.pth", "epoch_011_acc_93.1.pth.tar")
    assert list(foreign.by_step(tmp_path).items()) == list(zip((9, 10, 11), map(tmp_path.joinpath, names), strict=True))
    torch.save({"model": STATE, "epoch": 10}, tmp_path / "best.pth")
    with pytest.raises(DatamodelsError, match=r"best\.pth and epoch10\.pth: both say that they are of step 10"):
        foreign.by_step(tmp_path)
    torch.save(STATE, tmp_path / "best.pth")
    with pytest.raises(DatamodelsError, match=r"best\.pth: nothing says its training step"):
        foreign.by_step(tmp_path)
    with pytest.raises(DatamodelsError, match="no checkpoint"):
        foreign.by_step(tmp_path, "*.bin")


def test_numbers_of_an_older_numpy(tmp_path):
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": STATE, "acc": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert b"cnumpy._core.multiarray\n" in raw
    path.write_bytes(raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert foreign.read(path).state.keys() == STATE.keys()


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "extra": Bomb()}, "bomb.pth.tar")
    with pytest.raises(
        DatamodelsError, match="bomb.pth.tar: cannot be read: it holds a .*system, which could run code"
    ):
        foreign.read("bomb.pth.tar")
    assert not (tmp_path / "exploded").exists()


def test_what_holds_no_weights_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(DatamodelsError, match="no such file"):
        foreign.read(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(DatamodelsError, match="cannot be read"):
        foreign.read(path)
    torch.save({"epoch": 1, "lr": 0.1}, path)
    with pytest.raises(DatamodelsError, match="found epoch, lr; expected weights, bare or under state_dict"):
        foreign.read(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(DatamodelsError, match="expected weights by name, got Tensor"):
        foreign.read(path)


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    state = {**STATE, "3.weight": torch.zeros(5, 8), "fc.weight": torch.zeros(2)}
    del state["0.bias"]
    torch.save(state, tmp_path / "a.pt")
    model = network(2)
    with pytest.raises(DatamodelsError) as caught:
        foreign.fill(model, foreign.read(tmp_path / "a.pt"))
    for part in ("missing: 0.bias", "unknown: fc.weight", "shapes: 3.weight (5, 8), not (3, 8)", "Sequential"):
        assert part in str(caught.value)
    assert foreign.digest(model) == foreign.digest(network(2))


def test_digests_tell_weights_names_and_shapes_apart():
    model, other = network(), network()
    assert foreign.digest(model) == foreign.digest(other)
    with torch.no_grad():
        other[3].bias[0] += 1e-6
    assert foreign.digest(model) != foreign.digest(other)
    flat, turned = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        turned.weight.copy_(flat.weight.view(2, 3))
    assert foreign.digest(flat) != foreign.digest(turned)

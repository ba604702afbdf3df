import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

from datamodels.errors import DatamodelsError
from datamodels.learning import checkpoints


def state(value=1.0):
    return {"0.weight": torch.full((3, 2), value), "0.bias": torch.arange(3), "scale": torch.tensor(value)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_is_loaded(tmp_path):
    checkpoints.save(tmp_path / "model.pt", state())
    assert same(checkpoints.load(tmp_path / "model.pt"), state())
    assert same(torch.load(tmp_path / "model.pt", weights_only=True), state())  # and anyone can read it
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_slice_is_saved_without_the_rest(tmp_path):
    checkpoints.save(tmp_path / "one.pt", {"w": torch.zeros(1000, 100)[3]})
    assert (tmp_path / "one.pt").stat().st_size < 5_000


@pytest.mark.parametrize("fails", ["save", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "model.pt"
    checkpoints.save(path, state(1.0))

    def stop(*args):
        if fails == "save":
            args[1].write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[fails], stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, state(2.0))
    monkeypatch.undo()
    assert same(checkpoints.load(path), state(1.0))
    assert os.listdir(tmp_path) == ["model.pt"]


def test_the_bytes_are_synced_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(os.path.isdir(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("rename"), replace(a, b)))
    checkpoints.save(tmp_path / "model.pt", state())
    assert happened == [False, "rename", True]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "model.pt"
    code = (
        "import sys, torch; from datamodels.learning import checkpoints\n"
        "for i in range(10**6): checkpoints.save(sys.argv[1], {'w': torch.full((200_000,), float(i))})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(20):
            time.sleep(0.003)
            values = checkpoints.load(path)["w"]
            assert (values == values[0]).all()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    values = checkpoints.load(path)["w"]
    assert len(values) == 200_000
    assert (values == values[0]).all()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, how):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    if how == "torch":
        torch.save({"w": torch.zeros(2), "x": Hostile(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Hostile(trace)}))
    with pytest.raises(DatamodelsError, match=r"model\.pt: expected tensors by name.*cannot be read"):
        checkpoints.load(path)
    assert not trace.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(DatamodelsError, match=r"missing\.pt: no such file"):
        checkpoints.load(tmp_path / "missing.pt")
    checkpoints.save(tmp_path / "whole.pt", state())
    whole = (tmp_path / "whole.pt").read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(DatamodelsError, match=r"damaged\.pt: expected tensors by name"):
            checkpoints.load(tmp_path / "damaged.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(DatamodelsError, match="got list"):
        checkpoints.load(tmp_path / "list.pt")
    with pytest.raises(DatamodelsError, match=r"got int under 'epoch'; give model.state_dict\(\)"):
        checkpoints.save(tmp_path / "x.pt", {"epoch": 3})
    assert not (tmp_path / "x.pt").exists()

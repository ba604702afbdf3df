"""Models by name: torch modules and their checkpoints, from files and from a server; what is not installed."""

import functools
import hashlib
import http.server
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from datamodels.errors import DatamodelsError, MeasurementError
from datamodels.learning import checkpoints
from datamodels.measurements import backbones, datasets

USERS = """
import torch
from torch import nn

def net(width=5, drop=0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Dropout(drop), nn.ReLU(), nn.Linear(width, 10))

class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)
    def prepare(self, texts):
        return torch.tensor([[len(text), text.count("a")] for text in texts], dtype=torch.float32)
    def forward(self, x):
        return self.head(x)

class Backwards(nn.Module):
    '''Its head is registered first and called last.'''
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 10)
        self.body = nn.Linear(64, 4)
    def forward(self, x):
        return self.head(self.body(x.flatten(1)))

def linear_free():
    return nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())

def sequence():
    return nn.Sequential(nn.Linear(8, 3), nn.Flatten(1), nn.Flatten(1))

def number():
    return 3
"""


@pytest.fixture(autouse=True)
def users(tmp_path, monkeypatch):
    (tmp_path / "users_nets.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def server(tmp_path):
    """A folder's address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(arguments)

    asked = []
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_address[1]}", asked
    served.shutdown()
    served.server_close()
    thread.join()


IMAGES = datasets.load("digits", "test").inputs[:6]


def test_a_dotted_module_is_the_same_every_time_and_features_are_the_last_layers_inputs():
    first, second = (backbones.load("torch:users_nets.net?width=7&drop=0.5", "image") for _ in range(2))
    batch = first.prepare(IMAGES)
    features, logits = first.module.both(batch)
    assert features.shape == (6, 7) and logits.shape == (6, 10)
    net = first.module.model
    by_hand = torch.relu(batch.flatten(1) @ net[1].weight.T + net[1].bias)
    torch.testing.assert_close(features, by_hand)
    torch.testing.assert_close(logits, by_hand @ net[4].weight.T + net[4].bias)
    torch.testing.assert_close(first.module(batch), logits)
    torch.testing.assert_close(second.module(batch), logits)  # dropout is off, the seed the same
    assert not any(module._forward_hooks for module in net)


def test_the_last_layer_is_the_one_called_last():
    found = backbones.load("torch:users_nets.Backwards", "image")
    batch = found.prepare(IMAGES)
    torch.testing.assert_close(found.module.both(batch)[0], found.module.model.body(batch.flatten(1)))


def test_loading_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    backbones.load("torch:users_nets.net", "image")
    assert (torch.rand(3) == expected).all()


def test_a_module_that_prepares_its_own_inputs():
    found = backbones.load("torch:users_nets.Sums", "text")
    assert found.prepare(["banana", "b"]).tolist() == [[6, 3], [1, 0]]


def test_a_checkpoint_file(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Dropout(0), nn.ReLU(), nn.Linear(5, 10))
    checkpoints.save(tmp_path / "net.pt", net.state_dict())
    found = backbones.load(f"torch:users_nets.net@{tmp_path}/net.pt", "image")
    torch.testing.assert_close(found.module(found.prepare(IMAGES)), net(torch.from_numpy(IMAGES)))
    sha = hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    backbones.load(f"torch:users_nets.net@{tmp_path}/net.pt#sha256={sha.upper()}", "image")
    with pytest.raises(MeasurementError, match="expected sha256 0000"):
        backbones.load(f"torch:users_nets.net@{tmp_path}/net.pt#sha256={'0' * 64}", "image")
    with pytest.raises(DatamodelsError, match="does not fit"):
        backbones.load(f"torch:users_nets.net?width=6@{tmp_path}/net.pt", "image")
    with pytest.raises(DatamodelsError, match="no such file"):
        backbones.load(f"torch:users_nets.net@{tmp_path}/gone.pt", "image")


def test_a_url_is_fetched_once_and_only_what_has_the_hash_is_kept(tmp_path, server):
    address, asked = server
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Dropout(0), nn.ReLU(), nn.Linear(5, 10))
    checkpoints.save(tmp_path / "net.pt", net.state_dict())
    sha = hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    cache = tmp_path / "cache"
    name = f"torch:users_nets.net@{address}/net.pt#sha256={sha}"
    for _ in range(2):
        found = backbones.load(name, "image", cache=cache)
        torch.testing.assert_close(found.module(found.prepare(IMAGES)), net(torch.from_numpy(IMAGES)))
    assert len(asked) == 1
    assert [path.name for path in cache.iterdir()] == [f"{sha}.pt"]
    (cache / f"{sha}.pt").write_bytes(b"damaged since")
    backbones.load(name, "image", cache=cache)
    assert len(asked) == 2
    wrong = f"torch:users_nets.net@{address}/net.pt#sha256={'0' * 64}"
    with pytest.raises(MeasurementError, match=f"got {sha}; nothing was kept"):
        backbones.load(wrong, "image", cache=cache)
    assert [path.name for path in cache.iterdir()] == [f"{sha}.pt"]
    with pytest.raises(MeasurementError, match="expected the file's hash behind it"):
        backbones.load(f"torch:users_nets.net@{address}/net.pt", "image", cache=cache)
    with pytest.raises(MeasurementError, match="cannot be fetched"):
        backbones.load(f"torch:users_nets.net@{address}/gone.pt#sha256={'1' * 64}", "image", cache=cache)


def test_grey_images_and_files_become_pictures(tmp_path):
    images = np.stack([np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)])
    images[0, 0, 1, 2] = 0.5
    first, second = backbones.pictures(images)
    assert first.mode == "RGB" and first.size == (3, 2)
    assert first.getpixel((2, 1)) == (128, 128, 128) and second.getpixel((0, 0)) == (255, 255, 255)
    colour = np.zeros((1, 3, 2, 2), np.float32)
    colour[0, 0] = 1
    assert backbones.pictures(colour)[0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("torch:users_nets.gone", "image", "has no 'gone'"),
        ("torch:users_nets.number", "image", "expected a torch module from its function, got int"),
        ("timm:resnet18", "text", "takes images, and the data set has texts"),
        ("torchvision:resnet18", "text", "takes images, and the data set has texts"),
        ("timm:resnet18?pretraned=false", "image", "no option but pretrained"),
    ],
)
def test_models_that_cannot_be(name, kind, says):
    with pytest.raises(MeasurementError, match=says):
        backbones.load(name, kind)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_what_is_not_installed_says_so(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # also where it is
    with pytest.raises(MeasurementError, match=f"{package} is not installed; pip install {package}"):
        backbones.load(f"{package}:resnet18?pretrained=false", "image")


@pytest.mark.parametrize("name", ["linear_free", "sequence"])
def test_features_that_are_not_there(name):
    found = backbones.load(f"torch:users_nets.{name}", "image")
    with pytest.raises(MeasurementError, match="expected"):
        found.module.both(found.prepare(IMAGES))


def test_a_pooling_that_there_is_not():
    with pytest.raises(MeasurementError, match="expected one of auto, cls, mean"):
        backbones.load("torch:users_nets.net", "image", pooling="max")

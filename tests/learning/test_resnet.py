"""ResNets with torchvision's names; what torchvision 0.28 says of its own is written down here."""

import hashlib

import pytest
import torch

from datamodels.errors import DatamodelsError
from datamodels.learning.resnet import resnet18, resnet50

# Of torchvision.models.resnet18() and resnet50(): how many parameters, sha256 of "name shape" lines, and some logits of
# two images in eval mode, with weights and images as `filled` makes them.
TORCHVISION = {
    resnet18: (
        11_689_512,
        "761022b221a39ceb0afbf6540088f2c88938ca83e3adf823383af010f42a10c3",
        [
            [0.1050990373, 1.0112415552, 0.9405681491, 1.0353683233],
            [0.1057575196, 1.0112957954, 0.9405937195, 1.0353652239],
        ],
    ),
    resnet50: (
        25_557_032,
        "3fa57287149b51c43a043a424dcd918aaa5a894c977b50e35a9154f41f9c8fd0",
        [
            [-2.5093526840, -0.3147884011, -0.8847116828, -1.6046524048],
            [-2.5093479156, -0.3147627711, -0.8846802115, -1.6046154499],
        ],
    ),
}


def filled(model):
    """Waves in all weights and buffers, around 1 where they multiply channels."""
    for k, (name, value) in enumerate(model.state_dict().items()):
        if value.is_floating_point():
            waves = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.37 + k).reshape(value.shape) * 0.05
            value.copy_(waves + (1 if value.ndim == 1 and not name.endswith(("bias", "mean")) else 0))
    images = torch.cos(torch.arange(2 * 3 * 64 * 64, dtype=torch.float64) * 0.11).reshape(2, 3, 64, 64).float()
    return model.eval(), images


@pytest.mark.parametrize("make", TORCHVISION)
def test_it_is_torchvisions(make):
    count, digest, logits = TORCHVISION[make]
    model, images = filled(make())
    assert sum(p.numel() for p in model.parameters()) == count
    lines = "".join(f"{name} {tuple(value.shape)}\n" for name, value in model.state_dict().items())
    assert hashlib.sha256(lines.encode()).hexdigest() == digest
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:, [0, 1, 500, 999]], torch.tensor(logits), rtol=1e-3, atol=1e-3)


def test_stems_and_classes():
    torch.manual_seed(0)
    model = resnet18(10, "cifar").eval()
    shapes = []
    model.layer4.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    resnet18(10).eval()(torch.randn(1, 3, 64, 64))
    assert shapes == [(2, 512, 4, 4)] and tuple(model.conv1.weight.shape) == (64, 3, 3, 3)
    with pytest.raises(DatamodelsError, match="expected a stem of imagenet, cifar, got 'tiny'"):
        resnet18(10, "tiny")

import numpy as np
import pytest
import torch
from torch import nn

from datamodels.errors import DatamodelsError
from datamodels.learning.models import MLP, Seeded


def test_an_mlp_is_linear_layers_with_relu_between():
    model, x = MLP((6, 5, 4, 3))(2), torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    p = [values.numpy() for values in model.state_dict().values()]
    plain = x.numpy()
    for layer in range(3):
        plain = plain @ p[2 * layer].T + p[2 * layer + 1]
        plain = np.maximum(plain, 0) if layer < 2 else plain
    np.testing.assert_allclose(model(x).detach().numpy(), plain, atol=1e-6)
    assert list(model.state_dict()) == MLP((6, 5, 4, 3)).parameter_names


def test_an_mlp_starts_as_torchs_linear_layers_do():
    """Uniform on ±1/sqrt(fan in), weight and bias alike."""
    layers = [m for m in MLP((400, 300, 10))(1) if isinstance(m, nn.Linear)]
    for layer, fan_in in zip(layers, (400, 300), strict=True):
        for p in (layer.weight, layer.bias):
            assert p.abs().max() <= fan_in**-0.5
        scaled = layer.weight.detach() * fan_in**0.5
        assert abs(scaled.mean()) < 4 * (1 / 3 / scaled.numel()) ** 0.5
        assert abs(scaled.var() - 1 / 3) < 0.03
        assert scaled.max() > 0.98


@pytest.mark.parametrize("architecture", [MLP((6, 5, 4)), Seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()))])
def test_the_seed_alone_decides_the_start(architecture):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = architecture(3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = architecture(np.int64(3)).state_dict(), architecture(4).state_dict()
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("sizes", [(6,), (6, 0), (6, 2.0), ()])
def test_sizes_are_checked(sizes):
    with pytest.raises(DatamodelsError, match="two or more sizes"):
        MLP(sizes)


@pytest.mark.parametrize("seed", [-1, 1.0, 2**63, True, "1"])
@pytest.mark.parametrize("architecture", [MLP((6, 4)), Seeded(lambda: nn.Linear(6, 4))])
def test_seeds_are_checked(architecture, seed):
    with pytest.raises(DatamodelsError, match=r"int in \[0, 2\*\*63\)"):
        architecture(seed)

"""Architectures: a recipe for an untrained network, whose weights at the start come from a seed alone.

An architecture is called with a seed and gives a fresh `torch.nn.Module`, the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from datamodels.errors import DatamodelsError


class Architecture(Protocol):
    """Anything that makes a fresh module from a seed, the same for the same seed."""

    def __call__(self, seed: int) -> nn.Module: ...


@dataclass(frozen=True)
class MLP:
    """Linear layers with ReLU between them; `sizes` runs from the inputs to the classes, e.g. (64, 32, 10).

    Weights and biases start uniform on ±1/sqrt(fan in), from raw PCG64 words (see `uniform`), so they do not
    change with torch's or numpy's version. `ensemble.train` has a path of its own for this architecture.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or any(not isinstance(s, int) or s < 1 for s in self.sizes):
            raise DatamodelsError(f"MLP: expected two or more sizes, each an int of at least 1; got {self.sizes}")

    def __call__(self, seed: int) -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in self.layers:
            linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # torch's own start would use its global generator
            layers += [linear, nn.ReLU()]
        module = nn.Sequential(*layers[:-1])
        values = [p[0] for layer in self.initials([seed]) for p in layer]
        module.load_state_dict(dict(zip(self.parameter_names, values, strict=True)))
        return module

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(fan in, fan out) of each linear layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @property
    def parameter_names(self) -> list[str]:
        """The module's names of its parameters, in order: weight (out, in) and bias (out,) of each layer."""
        return [f"{2 * layer}.{kind}" for layer in range(len(self.layers)) for kind in ("weight", "bias")]

    def initials(self, seeds: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's weights (K, out, in) and biases (K, out) at the start, float32, for K seeds."""
        bounds = np.concatenate([np.full((i + 1) * o, i**-0.5) for i, o in self.layers])
        starts = np.stack([2 * uniform(seed, len(bounds)) - 1 for seed in seeds]) * bounds
        values = torch.from_numpy(starts.astype(np.float32))
        result = []
        for (i, o), block in zip(self.layers, values.split([(i + 1) * o for i, o in self.layers], dim=1), strict=True):
            result.append((block[:, : i * o].unflatten(1, (o, i)), block[:, i * o :]))
        return result


@dataclass(frozen=True)
class Seeded:
    """Any function that makes a module, with torch's global generator seeded around the call and put back after."""

    build: Callable[[], nn.Module]

    def __call__(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(check_seed(seed))
            return self.build()


def check_seed(seed: int) -> int:
    """The seed as a plain int, or an error unless it is an integer in [0, 2**63)."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise DatamodelsError(f"expected a seed that is an int in [0, 2**63), got {seed!r}")
    return int(seed)


# One model's randomness is separate streams of its seed, so that a longer initialisation cannot move the data order.
INITIAL, ORDER, AUGMENT = 0x696E6974, 0x6F726465, 0x6175676D  # "init", "orde", "augm"


def words(seed: int, stream: int) -> np.random.PCG64:
    """The bit generator of one stream of a model's seed; only its raw words are used, which numpy never changes."""
    # the stream first: behind a seed of more than 32 bits it could not be told from the seed's upper half
    return np.random.PCG64(np.random.SeedSequence((stream, check_seed(seed))))


def uniform(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64: the top 53 bits of each raw word of the seed's INITIAL stream."""
    return (words(seed, INITIAL).random_raw(count) >> np.uint64(11)) * 2.0**-53

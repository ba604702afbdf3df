"""Architectures: a recipe for an untrained network, whose weights at the start come from a seed alone.

An architecture is called with a seed and gives a fresh `torch.nn.Module`, the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
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
        nn.utils.vector_to_parameters(torch.from_numpy(self.initial(seed)), module.parameters())
        return module

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(fan in, fan out) of each linear layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def initial(self, seed: int) -> np.ndarray:
        """All parameters at the start, (parameters,), float32, in the module's order: weight (out, in), bias, …"""
        bounds = np.concatenate([np.full((i + 1) * o, i**-0.5, np.float32) for i, o in self.layers])
        return (2 * uniform(seed, len(bounds)) - 1).astype(np.float32) * bounds


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


# One model's randomness is two streams of its seed, so that a longer initialisation cannot move the data order.
INITIAL, ORDER = 0, 1


def words(seed: int, stream: int) -> np.random.PCG64:
    """The bit generator of one stream of a model's seed; only its raw words are used, which numpy never changes."""
    return np.random.PCG64(np.random.SeedSequence((check_seed(seed), stream)))


def uniform(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64: the top 53 bits of each raw word of the seed's first stream."""
    return (words(seed, INITIAL).random_raw(count) >> np.uint64(11)) * 2.0**-53

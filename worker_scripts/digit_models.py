"""Small models and data to try a scan with: networks trained on some of the handwritten digits, and digits turned.

They need no file and no network: specs/scan.json and specs/properties.json name them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from datamodels.learning import data, loop
from datamodels.learning.models import MLP


def pretrained(width: int = 32, classes: int = 10, epochs: int = 10) -> nn.Module:
    """A network of one hidden layer, trained on the training digits below `classes`; with epochs=0 as it starts."""
    train = data.load("digits").train
    inputs, labels = torch.from_numpy(train.inputs)[:, None], torch.from_numpy(train.labels)
    seen = labels < classes
    module = nn.Sequential(nn.Flatten(), MLP((64, width, classes))(0))
    if epochs:
        recipe = loop.Recipe(epochs=epochs, lr=0.3)
        loop.train(module, inputs[seen], labels[seen], np.ones(int(seen.sum()), bool), recipe, seed=0)
    return module


def upright(split: str) -> dict[str, np.ndarray]:
    """The digits, in groups: whether one looks (nearly) the same upside down."""
    return _digits(split, turn=False)


def turned(split: str) -> dict[str, np.ndarray]:
    """The digits upside down, in the same groups."""
    return _digits(split, turn=True)


def _digits(split: str, *, turn: bool) -> dict[str, np.ndarray]:
    part = getattr(data.load("digits"), split)
    images = part.inputs[:, None]
    return {
        "inputs": images[..., ::-1, ::-1].copy() if turn else images,
        "labels": part.labels,
        "groups": np.where(np.isin(part.labels, (0, 1, 8)), "symmetric", "other"),
    }

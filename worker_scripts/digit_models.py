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
    dataset = data.load("digits")
    inputs = torch.from_numpy(dataset.train.inputs)[:, None]
    labels = torch.from_numpy(dataset.train.labels)
    module = nn.Sequential(nn.Flatten(), MLP((64, width, classes))(0))
    if epochs:
        loop.train(module, inputs, labels, dataset.train.labels < classes, loop.Recipe(epochs=epochs, lr=0.3), seed=0)
    return module


def turned(split: str) -> dict[str, np.ndarray]:
    """The digits upside down, in groups: whether the digit looks (nearly) the same that way."""
    part = getattr(data.load("digits"), split)
    return {
        "inputs": part.inputs[:, None, ::-1, ::-1].copy(),
        "labels": part.labels,
        "groups": np.where(np.isin(part.labels, (0, 1, 8)), "symmetric", "other"),
    }

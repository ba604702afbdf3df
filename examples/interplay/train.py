"""A row is one small network of a zoo: trained as its choices say, then measured.

The choices (width, epochs, learning rate, …) only make the models differ; what is asked afterwards is which *property*
of a model, measured on its training digits, goes with which *benefit* on digits that it has not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from datamodels.learning import data, loop
from datamodels.learning.models import MLP
from datamodels.measurements import backbones, datasets, library
from datamodels.measurements.view import View
from examples import steps

SMOKE_BATCHES = 3


def main(
    *,
    keys: Sequence[str],
    measurements: Mapping[str, Sequence[str]],
    seed: int,
    width: int,
    epochs: int,
    lr: float,
    weight_decay: float,
    label_smoothing: float,
    noise: float,
    smoke: bool = False,
) -> dict[str, Any]:
    """Train the network of a row, and measure it; values by key, and exceptions for those that failed."""
    inputs, labels = _digits()
    recipe = loop.Recipe(
        epochs=epochs, batch_size=32, lr=lr, momentum=0.5, weight_decay=weight_decay, label_smoothing=label_smoothing
    )

    def blurred(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (batch + noise * torch.randn(batch.shape, generator=generator)).clamp(0, 1)

    model = nn.Sequential(nn.Flatten(), MLP((64, width, 10))(seed))
    everything = np.ones(len(labels), bool)
    loop.train(
        model, inputs, labels, everything, recipe,
        seed=seed, augment=blurred if noise else None, max_batches=SMOKE_BATCHES if smoke else None,
    )  # fmt: skip

    backbone = backbones.from_factory("a row's", lambda: model, {}, None).ready("cpu")
    names = measurements["names"]
    places = {place for entry in library.places(names) or () for place in library.split_pair(entry)}
    views = {place: View(backbone, _examples(place), seed=seed) for place in sorted(places)}
    return library.measure(names, views, keys=keys)


def shifted(split: str) -> dict[str, np.ndarray]:
    """The digits one pixel to the right."""
    part = getattr(data.load("digits"), split)
    moved = np.zeros_like(part.inputs[:, None])
    moved[..., 1:] = part.inputs[:, None, :, :-1]
    return {"inputs": moved, "labels": part.labels}


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    train = data.load("digits").train
    return torch.from_numpy(train.inputs[:, None]), torch.from_numpy(train.labels)


@functools.cache
def _examples(place: str) -> datasets.Examples:
    return datasets.load(*place.rsplit("/", 1))


if __name__ == "__main__":
    steps.only_for_workers("examples.interplay.train")

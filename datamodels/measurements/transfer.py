"""The scores of `transferability` in the library: what a model makes of a data set before any fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodels.errors import MeasurementError
from datamodels.measurements import transferability
from datamodels.measurements.library import measurement

if TYPE_CHECKING:
    import torch


@measurement(infinite=True)
def log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """Largest log evidence of a linear model on the features; inf where they fit a class exactly."""
    return transferability.log_me(features, labels)


@measurement()
def leep(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log probability of the labels when read off the classes that the model was trained for."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return transferability.leep(shifted / shifted.sum(1, keepdims=True), labels)


@measurement()
def nce(logits: np.ndarray, labels: np.ndarray) -> float:
    """Negative conditional entropy of the labels given the model's predicted classes."""
    return transferability.nce(logits.argmax(1), labels)


@measurement()
def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Variance of the class means in units of the features' own; of few examples chance alone gives much of it."""
    return transferability.h_score(features, labels)


@measurement()
def h_score_shrunk(features: np.ndarray, labels: np.ndarray) -> float:
    """The same with the features' covariance shrunk, which bears few examples."""
    return transferability.h_score(features, labels, shrinkage=True)


@measurement()
def parc(features: np.ndarray, labels: np.ndarray, dims: int = 32) -> float:
    """How far examples with different labels have different features, −100 to 100."""
    return transferability.parc(features, labels, dims=dims)


@measurement()
def linear_probe(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Held-out accuracy of logistic regression on the features."""
    return transferability.linear_probe(features, labels, seed=seed)


@measurement()
def num_params(model: torch.nn.Module) -> float:
    """How many parameters the model has."""
    return transferability.num_params(model)


@measurement()
def published_accuracy(checkpoint: str, table: str = "") -> float:
    """What a table (YAML or JSON, model: accuracy) says of the model; ?table=FILE."""
    if not table:
        raise MeasurementError("published_accuracy: expected a table of accuracies; name it with ?table=FILE")
    return transferability.published_accuracy(checkpoint, table)

"""The scores of `transferability` in the library: what a model makes of a data set before any fine-tuning."""

from __future__ import annotations

import functools

import numpy as np

from datamodels.errors import MeasurementError
from datamodels.measurements import transferability
from datamodels.measurements.arrays import check_finite
from datamodels.measurements.library import Measurement, measurement

log_me = Measurement("log_me", transferability.log_me, infinite=True)  # where features fit a class exactly
h_score = Measurement("h_score", transferability.h_score)
h_score_shrunk = Measurement("h_score_shrunk", functools.partial(transferability.h_score, shrinkage=True))
parc = Measurement("parc", transferability.parc)
linear_probe = Measurement("linear_probe", transferability.linear_probe)
num_params = Measurement("num_params", transferability.num_params)


@measurement()
def leep(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log probability of the labels when read off the classes that the model was trained for."""
    logits = check_finite(logits, "leep", "logits")
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return transferability.leep(shifted / shifted.sum(1, keepdims=True), labels)


@measurement()
def nce(logits: np.ndarray, labels: np.ndarray) -> float:
    """Negative conditional entropy of the labels given the model's predicted classes."""
    return transferability.nce(check_finite(logits, "nce", "logits").argmax(1), labels)


@measurement()
def published_accuracy(checkpoint: str, table: str = "") -> float:
    """What a table (YAML or JSON, model: accuracy) says of the model; ?table=FILE."""
    if not table:
        raise MeasurementError("published_accuracy: expected a table of accuracies; name it with ?table=FILE")
    return transferability.published_accuracy(checkpoint, table)

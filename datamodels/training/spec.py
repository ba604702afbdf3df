"""The released names around a spec; `datamodels.spec` has the spec itself."""

from collections.abc import Mapping
from typing import Any

from datamodels.spec import COMPLETED, Spec

NUM_MODELS = "num_models"
SCHEMA = "schema"
DTYPE = "dtype"
SHAPE = "shape"

__all__ = ["COMPLETED", "DTYPE", "NUM_MODELS", "SCHEMA", "SHAPE", "preprocess_spec", "verify_spec"]


def verify_spec(spec: Mapping[str, Any]) -> None:
    """Raises `SpecError` where the spec, as read from JSON, cannot be used."""
    Spec.from_json(spec)


def preprocess_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A verified copy of the spec in which the array of completed rows stands beside the schema's own keys."""
    verify_spec(spec)
    return {**spec, SCHEMA: {**spec[SCHEMA], COMPLETED: {DTYPE: "bool_", SHAPE: []}}}

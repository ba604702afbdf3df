"""How good a datamodel is, always with an interval and with the best that the noise allows beside it."""

from datamodels.evaluation.score import Score, lds, lds_of_store

__all__ = ["Score", "lds", "lds_of_store"]

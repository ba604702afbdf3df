"""Which property of a model goes with which benefit: sparse regression between columns of a store, with intervals."""

from datamodels.evaluation.effects.estimate import Effects, estimate
from datamodels.evaluation.effects.read import Table, read

__all__ = ["Effects", "Table", "estimate", "read"]

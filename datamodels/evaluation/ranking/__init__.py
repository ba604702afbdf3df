"""Which scores rank pretrained models as fine-tuning does, with intervals and the number of parameters beside them."""

from datamodels.evaluation.ranking.interval import Estimate
from datamodels.evaluation.ranking.join import Joined, actual_of, from_mapping, from_yaml, join, with_parameters
from datamodels.evaluation.ranking.rank import Judged, OnDataset, Ranking, rank
from datamodels.evaluation.ranking.scores import Grid, Scores, read
from datamodels.evaluation.ranking.show import as_json, lines

__all__ = [
    "Estimate",
    "Grid",
    "Joined",
    "Judged",
    "OnDataset",
    "Ranking",
    "Scores",
    "actual_of",
    "as_json",
    "from_mapping",
    "from_yaml",
    "join",
    "lines",
    "rank",
    "read",
    "with_parameters",
]

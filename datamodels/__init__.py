"""Datamodels: from a training job's choices, over thousands of runs, to a sparse linear model of what they did."""

__version__ = "0.1.0"

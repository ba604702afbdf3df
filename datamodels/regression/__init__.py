"""Sparse linear datamodels: from what each run was given (masks, choices) to what came out of it."""

from datamodels.regression.datamodel import Datamodel, RegularizationPath
from datamodels.regression.lasso import RegressionWarning, certify, fit
from datamodels.regression.problem import Problem, make_problem, problem_from_store

__all__ = [
    "Datamodel",
    "Problem",
    "RegressionWarning",
    "RegularizationPath",
    "certify",
    "fit",
    "make_problem",
    "problem_from_store",
]

"""Sparse linear datamodels: from what each run was given (masks, choices) to what came out of it."""

from datamodels.regression.beton import Beton
from datamodels.regression.certificate import certify
from datamodels.regression.columns import columns_of_store
from datamodels.regression.datamodel import Datamodel, RegularizationPath
from datamodels.regression.lasso import RegressionWarning, fit
from datamodels.regression.problem import Problem, make_problem, problem_from_beton, problem_from_store

__all__ = [
    "Beton",
    "Datamodel",
    "Problem",
    "RegressionWarning",
    "RegularizationPath",
    "certify",
    "columns_of_store",
    "fit",
    "make_problem",
    "problem_from_beton",
    "problem_from_store",
]

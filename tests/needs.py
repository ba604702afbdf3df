"""What a test needs of a machine: where it is missing the test is skipped with the reason, in CI it fails."""

import importlib.util
import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{what}; CI must have it, see .ci/run")
    pytest.skip(what)


def ffcv() -> None:
    """FFCV, which `make ffcv` installs."""
    if importlib.util.find_spec("ffcv") is None:
        missing("FFCV is not installed; make ffcv does that")

"""`python -m tests.faults` (`make test-faults`): the whole bench, with all its amounts; arguments are pytest's."""

import os
import sys

import pytest

from tests.faults.bench import FULL

os.environ[FULL] = "1"
sys.exit(pytest.main(["tests/faults", "--ignore=tests/faults/nfs", "--runslow", "-q", *sys.argv[1:]]))

"""Reads the store with plain numpy and says whether it holds what train_minimal.py computes."""

import sys
from pathlib import Path

import numpy as np

from datamodels import cli
from datamodels.cli import Option

OPTIONS = {
    "checking": {"logdir": Option(str, "the store", required=True)},
    "trainer": {"multiple": Option(int, "the number that the rows were made with", required=True)},
}


def differences(logdir, multiple):
    """One line for each row that is not what it should be."""
    products = np.load(Path(logdir) / "products.npy", mmap_mode="r")
    completed = np.load(Path(logdir) / "_completed.npy", mmap_mode="r")
    for row in range(len(products)):
        expected = [row * multiple, 2 * row * multiple, 3 * row * multiple]
        if not completed[row]:
            yield f"row {row} is not complete"
        elif products[row].tolist() != expected:
            yield f"row {row}: expected {expected}, got {products[row].tolist()}"


def main():
    args = cli.parse("python -m examples.minimal.check", __doc__, OPTIONS)
    wrong = list(differences(args["checking.logdir"], args["trainer.multiple"]))
    print("\n".join(wrong) or "every row is complete and right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""The released name of `python -m datamodels.worker`."""

from datamodels import cli
from datamodels.worker import main

if __name__ == "__main__":
    cli.run(main)

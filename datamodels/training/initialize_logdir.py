"""The released name of `python -m datamodels.initialize_logdir`."""

from datamodels import cli
from datamodels.initialize_logdir import main

if __name__ == "__main__":
    cli.run(main)

"""The smallest job there is: row i is i, 2i and 3i, times a number from the command line. No model, no data."""

import numpy as np
from fastargs import Param, Section
from fastargs.decorators import param

Section("trainer", "what this job reads from the command line").params(
    multiple=Param(int, "what everything is multiplied by", required=True),
)


@param("trainer.multiple")
def main(*, index, multiple):
    """What row `index` of the store holds; the keys and shapes are those of spec.json."""
    return {"products": index * multiple * np.array([1, 2, 3])}

"""The package `datamodels`; on the package index it is `datamodels-store`, since `datamodels` is taken there.

Only the library is installed. `worker_scripts` and `examples` run from the repository root: names as common as
these have no place in anybody's site-packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "datamodels/__init__.py").read_text("utf-8"), re.MULTILINE)[1]
README = HERE / "README.md"
FFCV = ["ffcv==1.0.2", "pillow"]  # it imports pillow without saying so; its build needs headers: see make ffcv
HUB = ["transformers", "pillow"]  # models by name, in worker_scripts/measure.py
LINT = ["ruff", "mypy"]
RAY = ["ray"]  # --pool.executor=ray
TABLE = ["pyarrow"]  # store export to parquet
WANDB = ["wandb"]  # --wandb.project
TEST = ["pytest", "hypothesis"]

setup(
    name="datamodels-store",
    version=VERSION,
    description="Which training choices made the model good or bad at what: many runs, one store, sparse linear models",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="datamodels contributors",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["datamodels", "datamodels.*"]),
    python_requires=">=3.11",
    install_requires=[
        "fastargs",
        "matplotlib",
        "numba",  # the CPU solver is compiled by it
        "numpy>=2",
        "pyyaml",  # fastargs imports it without saying so
        "scikit-learn",
        "scipy",
        "terminaltables",  # likewise
        "threadpoolctl",
        "torch",
        "tqdm",
    ],
    extras_require={"ffcv": FFCV, "hub": HUB, "lint": LINT, "ray": RAY, "table": TABLE, "test": TEST, "wandb": WANDB},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

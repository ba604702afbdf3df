"""A row is one small network trained on the examples of its mask; its outcome is the margin of every test example.

    python -m datamodels.pool --worker.logdir=DIR --worker.main_import=worker_scripts.train_mlp --worker.batch=64 \\
           --data.name=digits --training.epochs=15

`main` trains one network with a plain loop, `main_many` many at once; the margins are the same to float tolerance.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from fastargs import Param, Section, get_current_config
from fastargs.validation import And, InRange, OneOf

from datamodels.learning import data, ensemble, loop, outputs
from datamodels.learning.models import MLP

Section("data", "what is learned").params(
    name=Param(OneOf(["digits", "fashion_mnist"]), "data set", default="digits"),
    dir=Param(str, "folder with the data set's files; digits takes none"),
)
Section("training", "how one network is trained; the defaults suit digits").params(
    hidden=Param(And(int, InRange(min=1)), "hidden units", default=32),
    epochs=Param(And(int, InRange(min=1)), "passes over the kept examples", default=15),
    batch_size=Param(And(int, InRange(min=1)), "examples per update", default=32),
    lr=Param(And(float, InRange(min=0)), "highest learning rate", default=0.3),
    momentum=Param(And(float, InRange(0, 1)), "momentum of SGD", default=0.5),
    nesterov=Param(bool, "Nesterov's momentum", default=False),
    weight_decay=Param(And(float, InRange(min=0)), "weight decay of SGD", default=3e-3),
    label_smoothing=Param(And(float, InRange(0, 1)), "share of the target spread over all classes", default=0.0),
    warmup=Param(And(float, InRange(0, 1)), "share of the updates in which the learning rate rises", default=0.2),
    margin=Param(OneOf(outputs.MARGIN_KINDS), "what the right class's logit is held against", default="logsumexp"),
)

SMOKE_BATCHES = 3


def main(*, mask: np.ndarray, seed: int, smoke: bool = False) -> dict[str, np.ndarray]:
    """Train one network on the mask (n,); margins (test examples,), float32."""
    train, test, architecture, recipe, kind = _setup()
    limit = SMOKE_BATCHES if smoke else None
    model = loop.train(architecture(seed), *train, mask, recipe, seed=seed, max_batches=limit)
    with torch.no_grad():
        return {"margins": outputs.margins(model(test[0]), test[1], kind).numpy()}


def main_many(*, masks: np.ndarray, seeds: np.ndarray, smoke: bool = False) -> dict[str, np.ndarray]:
    """Train one network on each of the masks (K, n); margins (K, test examples), float32."""
    train, test, architecture, recipe, kind = _setup()
    limit = SMOKE_BATCHES if smoke else None
    models = ensemble.train(architecture, *train, masks, recipe, seeds=seeds, max_batches=limit)
    return {"margins": outputs.margins(models.logits(test[0]), test[1], kind).numpy()}


def _setup() -> tuple[tuple, tuple, MLP, loop.Recipe, str]:
    config = get_current_config()
    recipe = loop.Recipe(**{field.name: config[f"training.{field.name}"] for field in dataclasses.fields(loop.Recipe)})
    train, test, num_classes = _tensors(config["data.name"], config["data.dir"])
    sizes = (train[0].shape[1], config["training.hidden"], num_classes)
    return train, test, MLP(sizes), recipe, config["training.margin"]


@functools.cache
def _tensors(name: str, folder: str | None) -> tuple[tuple, tuple, int]:
    """Training and test (inputs, labels), inputs flat with the training pixels' mean 0 and deviation 1."""
    dataset = data.load(name, folder)
    mean, deviation = float(dataset.train.inputs.mean()), float(dataset.train.inputs.std())
    train, test = (
        ((torch.from_numpy(split.inputs).flatten(1) - mean) / deviation, torch.from_numpy(split.labels))
        for split in (dataset.train, dataset.test)
    )
    return train, test, dataset.num_classes

"""Fine-tune a whole model on labelled texts for a few epochs: what the scores of a scan are held against."""

from __future__ import annotations

import math
import time

import torch
from fastargs import Param, Section
from fastargs.decorators import param
from torch.nn import functional

from datamodels.learning.data import permutation
from datamodels.measurements import backbones, datasets
from examples import steps

Section("finetune", "fine-tuning of all parameters with AdamW").params(
    models=Param(str, "folder of the models; the factor is a name in it", required=True),
    data=Param(str, "folder with <dataset>.csv, columns text, label and split", required=True),
    epochs=Param(int, "passes over the training examples", default=3),
    lr=Param(float, "highest learning rate; it rises in the first tenth and then falls to 0 as a cosine", default=3e-4),
    batch_size=Param(int, "examples per step", default=32),
)


@param("finetune.models")
@param("finetune.data")
@param("finetune.epochs")
@param("finetune.lr")
@param("finetune.batch_size")
def main(*, model, dataset, seed, smoke=False, models, data, epochs, lr, batch_size):
    """{"accuracy": share of the test examples that are right, "seconds_finetune": time of training alone}."""
    name = f"csv:{data}/{dataset}.csv?text=text&label=label&split=split"
    train, test = (datasets.load(name, split) for split in ("train", "test"))
    network = backbones.load(f"{models}/{model}", train.kind, local_files_only=True)
    started = time.perf_counter()
    head = fit(network, train, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, most=3 if smoke else None)
    seconds = time.perf_counter() - started
    return {"accuracy": accuracy(network, head, test, batch_size), "seconds_finetune": seconds}


def fit(network, train, *, epochs, lr, batch_size, seed, most):
    """Train the network in place, at most `most` steps; the head, a linear layer on its features."""
    labels = torch.from_numpy(train.labels)
    with torch.no_grad():
        width = network.module.both(network.prepare(train.inputs[:1]))[0].shape[1]
    head = torch.nn.Linear(width, len(train.classes))
    torch.nn.init.zeros_(head.weight)
    parameters = [p for p in network.module.parameters() if p.requires_grad] + list(head.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    per_epoch = math.ceil(len(labels) / batch_size)
    steps = epochs * per_epoch
    network.module.train()
    for step in range(steps if most is None else min(most, steps)):
        if step % per_epoch == 0:
            order = permutation(len(labels), seed=(seed + step) % 2**32)
        chosen = order[step % per_epoch * batch_size :][:batch_size]
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / max(1, steps // 10), (1 + math.cos(math.pi * step / steps)) / 2)
        features, _ = network.module.both(network.prepare([train.inputs[i] for i in chosen]))
        loss = functional.cross_entropy(head(features), labels[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    network.module.eval()
    return head


@torch.no_grad()
def accuracy(network, head, test, batch_size):
    right = 0
    for start in range(0, len(test), batch_size):
        features, _ = network.module.both(network.prepare(test.inputs[start : start + batch_size]))
        right += int((head(features).argmax(1).numpy() == test.labels[start : start + batch_size]).sum())
    return right / len(test)


if __name__ == "__main__":
    steps.only_for_workers("examples.select_backbone.finetune")

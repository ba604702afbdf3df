"""Train one model on the examples that a mask keeps: a plain loop over batches of tensors held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from datamodels.errors import DatamodelsError
from datamodels.learning.models import AUGMENT, ORDER, words
from datamodels.learning.outputs import check_labels

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

# The low bits of an order's sort key hold the position, the other 40 are random.
POSITION_BITS = 24


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: SGD as `torch.optim.SGD` defines it, cross-entropy, a triangular learning rate.

    The rate rises from 0 to `lr` over the first `warmup` of all updates and falls to 0 over the rest.
    """

    epochs: int = 15
    batch_size: int = 50
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    warmup: float = 0.2

    def __post_init__(self) -> None:
        rules = {
            "epochs": (isinstance(self.epochs, int) and self.epochs >= 1, "as an int of at least 1"),
            "batch_size": (isinstance(self.batch_size, int) and self.batch_size >= 1, "as an int of at least 1"),
            "lr": (0 < self.lr < float("inf"), "above 0 and finite"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "nesterov": (self.momentum > 0 or not self.nesterov, "false where momentum is 0"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "at least 0 and finite"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "warmup": (0 <= self.warmup <= 1, "in [0, 1]"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise DatamodelsError(f"recipe: expected {name} {expected}, got {getattr(self, name)!r}")

    def rates(self, num_examples: int) -> np.ndarray:
        """The learning rate of each update of a whole run, (updates,): the triangle at the middle of each update."""
        updates = self.epochs * -(-num_examples // self.batch_size)
        at = (np.arange(updates) + 0.5) / updates
        with np.errstate(divide="ignore"):
            return self.lr * np.minimum(at / np.float64(self.warmup), (1 - at) / np.float64(1 - self.warmup))


def sort_keys(raw: np.ndarray) -> np.ndarray:
    """Raw words (n,) with the low bits replaced by the position; sorted, their low bits are a random permutation.

    No two keys are equal, so the order does not depend on the sorting algorithm.
    """
    return (raw & ~np.uint64(2**POSITION_BITS - 1)) | np.arange(len(raw), dtype=np.uint64)


def train(
    model: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    mask: np.ndarray,
    recipe: Recipe,
    *,
    seed: int,
    augment: Augment | None = None,
    max_batches: int | None = None,
) -> nn.Module:
    """Train `model` in place on the examples that the mask (n,), bool, keeps, and return it in eval mode.

    Each epoch visits every kept example once, in an order from `seed` alone (`sort_keys` of the next raw words
    of the seed's ORDER stream); the last batch may be smaller. `augment(inputs, generator)` changes a batch
    before it is used; its generator is on the CPU and comes from the seed too. `max_batches` ends training early,
    with the learning rates of the whole run. What the model itself draws, as dropout does, comes from torch's
    global generator, which is the caller's to seed.

    Raises DatamodelsError for a mask, labels or shapes that do not fit, and when the loss is no longer finite.
    """
    check_data(inputs, labels)
    members = check_masks(np.asarray(mask)[None], len(inputs))[0]
    generator = torch.Generator().manual_seed(int(words(seed, AUGMENT).random_raw() >> 1))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    model.train()
    rates = recipe.rates(len(members))[:max_batches]
    for update, (rate, batch) in enumerate(zip(rates, batches(members, recipe, seed=seed), strict=False)):
        kept = torch.from_numpy(batch).to(inputs.device)
        x = inputs[kept] if augment is None else augment(inputs[kept], generator)
        logits = model(x)
        if update == 0:
            check_labels(labels, logits.shape[-1], "train")
        loss = functional.cross_entropy(logits, labels[kept], label_smoothing=recipe.label_smoothing)
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    check_finite([seed], [all(bool(torch.isfinite(p).all()) for p in model.parameters())], recipe)
    return model.eval()


def batches(members: np.ndarray, recipe: Recipe, *, seed: int) -> Iterator[np.ndarray]:
    """The examples of each update of a whole run: every epoch the members in a new order, cut into batches."""
    order = words(seed, ORDER)
    for _ in range(recipe.epochs):
        keys = np.sort(sort_keys(order.random_raw(len(members))))
        shuffled = members[(keys & np.uint64(2**POSITION_BITS - 1)).astype(np.int64)]
        yield from np.split(shuffled, range(recipe.batch_size, len(members), recipe.batch_size))


def check_data(inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise unless inputs (n, ...) and labels (n,) go together."""
    if inputs.ndim < 2 or not inputs.is_floating_point():
        raise DatamodelsError(f"train: expected float inputs (n, ...), got {inputs.dtype} {tuple(inputs.shape)}")
    if labels.shape != inputs.shape[:1]:
        raise DatamodelsError(
            f"train: expected labels of shape ({len(inputs)},), one per input; got {tuple(labels.shape)}"
        )
    if len(inputs) > 2**POSITION_BITS:
        raise DatamodelsError(f"train: expected at most {2**POSITION_BITS} examples, got {len(inputs)}")


def check_masks(masks: np.ndarray, num_examples: int) -> list[np.ndarray]:
    """The kept examples' indices of each mask, ascending int64; raises unless masks is (K, n), bool, none empty."""
    if masks.dtype != np.bool_:
        raise DatamodelsError(f"mask: expected bool, got {masks.dtype}; convert with mask.astype(bool)")
    if masks.ndim != 2 or masks.shape[1] != num_examples:
        raise DatamodelsError(
            f"mask: expected one entry for each of the {num_examples} training examples, got shape {masks.shape[1:]}; "
            f"give a mask of this data set, or the data set that the mask was drawn for"
        )
    members = [np.flatnonzero(mask) for mask in masks]
    for k, kept in enumerate(members):
        if len(kept) == 0:
            raise DatamodelsError(f"mask {k}: keeps none of {num_examples} examples; expected at least one")
    return members


def check_finite(seeds: list[int], finite: list[bool], recipe: Recipe) -> None:
    """Raise if a model's weights are no longer finite, which is what a non-finite loss leaves behind."""
    lost = [seed for seed, ok in zip(seeds, finite, strict=True) if not ok]
    if lost:
        raise DatamodelsError(
            f"train: the loss of the model with seed {lost[0]} became infinite or NaN, one of {len(lost)} such models "
            f"out of {len(seeds)}; expected a finite loss; lower lr (now {recipe.lr}), or look for huge inputs"
        )

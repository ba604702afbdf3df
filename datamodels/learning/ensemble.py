"""Train K models of one architecture at the same time, each on its own mask, as K separate runs of `loop.train`.

Every model keeps its own seed, order, batches and learning rates, so the result does not depend on K or on which
models share a call, beyond rounding. An `MLP` takes a path of its own: batched matrix products, gradients written
out by hand, no autograd. Any other module goes through `torch.func.vmap`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from datamodels.errors import DatamodelsError
from datamodels.learning.loop import POSITION_BITS, Recipe, check_data, check_finite, check_masks
from datamodels.learning.models import MLP, ORDER, Architecture, check_seed, words
from datamodels.learning.outputs import check_labels

# What a step touches should stay near a core's second-level cache of 2 MiB, yet be large against the cost of a call:
# the best of benchmarks/throughput.py.
WORKING_SET_BYTES = 3 * 2**20


@dataclass(frozen=True)
class Ensemble:
    """K trained models: `parameters` holds each parameter of the architecture's module with a leading axis of K."""

    architecture: Architecture
    parameters: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def model(self, k: int) -> nn.Module:
        """The k-th model as a module of its own, in eval mode."""
        module = self.architecture(0).to(next(iter(self.parameters.values())).dtype)
        module.load_state_dict({name: values[k] for name, values in self.parameters.items()})
        return module.eval()

    @torch.no_grad()
    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (K, m, c) of every model on the same inputs (m, ...)."""
        module = self.architecture(0).to(inputs.dtype).eval()
        return vmap(lambda p: functional_call(module, p, (inputs,)))(self.parameters)


def train(
    architecture: Architecture,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    masks: np.ndarray,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    max_batches: int | None = None,
    at_once: int | None = None,
) -> Ensemble:
    """Train K models on the masks (K, n), bool, with one seed each; the same as K calls of `loop.train`.

    Equal to `loop.train(architecture(seed), …, seed=seed)` per mask, to rounding. `at_once` is how many models
    share a step; by default as many as keep a step's working set in cache.

    Raises DatamodelsError as `loop.train` does, and for a module that cannot be trained together with others.
    """
    check_data(inputs, labels)
    masks = np.asarray(masks)
    members = check_masks(masks, len(inputs))
    seeds = [check_seed(seed) for seed in seeds]
    if len(seeds) != len(members) or not members:
        raise DatamodelsError(
            f"ensemble: expected one seed per mask and at least one, got {len(seeds)} seeds for masks {masks.shape}"
        )
    if at_once is None:
        at_once = _at_once(architecture, inputs, recipe)
    if at_once < 1:
        raise DatamodelsError(f"ensemble: expected at_once of at least 1, got {at_once}")
    by_size = np.argsort([-len(kept) for kept in members], kind="stable")
    parts = []
    for group in np.array_split(by_size, -(-len(by_size) // at_once)):
        chosen = [members[k] for k in group], [seeds[k] for k in group]
        if isinstance(architecture, MLP):
            parts.append(_mlp(architecture, inputs, labels, *chosen, recipe, max_batches))
        else:
            parts.append(_vmapped(architecture, inputs, labels, *chosen, recipe, max_batches))
    back = torch.from_numpy(np.argsort(by_size))
    parameters = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
    finite = torch.stack([torch.isfinite(p.reshape(len(seeds), -1)).all(1) for p in parameters.values()]).all(0)
    check_finite(seeds, finite.tolist(), recipe)
    return Ensemble(architecture, parameters)


def _at_once(architecture: Architecture, inputs: torch.Tensor, recipe: Recipe) -> int:
    if not isinstance(architecture, MLP):
        return 64
    batch, sizes = recipe.batch_size, architecture.sizes
    floats = batch * (sizes[0] + 2 * sum(sizes[1:])) + 2 * sum((i + 1) * o for i, o in architecture.layers)
    return max(16, min(256, WORKING_SET_BYTES // (floats * inputs.element_size())))


class _Step(NamedTuple):
    """One update of the first `models` models.

    `examples` (models, m) and `labels` (models, 1, m), int64; `weights` (models, 1, m), what each example's gradient
    counts: 1/batch, or 0 for padding; `rates` (models, 1, 1), the learning rates.
    """

    examples: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    rates: torch.Tensor


def _steps(
    members: Sequence[np.ndarray],
    seeds: Sequence[int],
    labels: torch.Tensor,
    recipe: Recipe,
    limit: int | None,
    dtype: torch.dtype,
) -> Iterator[_Step]:
    """Every update of models that are sorted by falling number of examples.

    Epochs start together. In an epoch's last steps only the models that still have examples take part, which
    are the first ones; a ragged last batch is padded with one of the model's own examples at weight 0. A model
    that has had `limit` updates goes on at rate 0 until all have, as those with short epochs need more epochs.
    """
    sizes = np.array([len(kept) for kept in members])
    longest, batch = int(sizes[0]), recipe.batch_size
    num_steps = -(-longest // batch)
    kept_examples = torch.empty(len(members), longest, dtype=torch.int64)
    rates = np.zeros((len(members), recipe.epochs, num_steps))
    for model, kept in enumerate(members):
        kept_examples[model, : len(kept)] = torch.from_numpy(kept)
        kept_examples[model, len(kept) :] = int(kept[0])  # its own, as 0 times another's infinity is NaN
        each = recipe.rates(len(kept))
        each[limit if limit is not None else len(each) :] = 0
        rates[model, :, : -(-len(kept) // batch)] = each.reshape(recipe.epochs, -1)
    live = rates.max(0) > 0
    rates_at = torch.from_numpy(np.ascontiguousarray(rates.transpose(1, 2, 0))).to(dtype)[..., None, None]

    plan = []  # per step of an epoch: how many models take part, the widest batch among them, the weights
    for step in range(num_steps):
        left = np.minimum(sizes - step * batch, batch)
        active, wide = int((left > 0).sum()), int(left[0])
        weights = (np.arange(wide) < left[:active, None]) / left[:active, None]
        plan.append(
            (active, slice(step * batch, step * batch + wide), torch.from_numpy(weights).to(dtype).unsqueeze(1))
        )

    low = np.uint64(2**POSITION_BITS - 1)
    positions = np.arange(longest, dtype=np.uint64)
    padding = np.arange(longest) >= sizes[:, None]
    orders = [words(seed, ORDER) for seed in seeds]
    keys = np.zeros(kept_examples.shape, np.uint64)
    for epoch in range(recipe.epochs):
        if not live[epoch].any():
            return
        for row, order, size in zip(keys, orders, sizes.tolist(), strict=True):
            row[:size] = order.random_raw(size)
        keys[padding] = ~np.uint64(0)  # sorts after every real key of the row, as its position is larger
        keys &= ~low
        keys |= positions
        keys.sort(axis=1)
        keys &= low
        examples = torch.gather(kept_examples, 1, torch.from_numpy(keys.view(np.int64)))
        labelled = labels.index_select(0, examples.flatten()).view_as(examples).unsqueeze(1)
        for step, (active, columns, weights) in enumerate(plan):
            if not live[epoch, step]:
                break
            rate = rates_at[epoch, step, :active]
            yield _Step(examples[:active, columns], labelled[:active, :, columns], weights, rate)


class _Layer(NamedTuple):
    """What one layer of the first `active` models reads and writes in an update of `wide` examples each.

    All are views. out = left @ right; gradient of the parameters = slopes[0] @ slopes[1]; what flows back =
    back[0] @ back[1]. `below` are the layer's inputs, with a last column of ones that carries the bias.
    """

    below: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor
    slopes: tuple[torch.Tensor, torch.Tensor]
    back: tuple[torch.Tensor, torch.Tensor]
    parameters: torch.Tensor
    velocity: torch.Tensor


@torch.no_grad()
def _mlp(
    architecture: MLP,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    members: Sequence[np.ndarray],
    seeds: Sequence[int],
    recipe: Recipe,
    max_batches: int | None,
) -> dict[str, torch.Tensor]:
    """Train MLPs by hand-written gradients; at the top these are (softmax − target) / batch.

    A step is a few dozen calls on tensors that fit in cache, so calls are what is saved. Parameters lie as
    (K, in + 1, out) with the bias as last row, the last layer's as (K, classes, in + 1) with logits
    (K, classes, m): torch's softmax over a last axis of ten is fifteen times slower than over a middle one. The
    result of every batched product is contiguous, as torch otherwise makes one call for each matrix.
    """
    dtype, batch, sizes = inputs.dtype, recipe.batch_size, architecture.sizes
    if inputs[0].numel() != sizes[0]:
        raise DatamodelsError(
            f"ensemble: expected inputs of {sizes[0]} numbers each, as the MLP's first size says; "
            f"got shape {tuple(inputs.shape)}"
        )
    check_labels(labels, sizes[-1], "train")
    table = functional.pad(inputs.flatten(1), (0, 1), value=1.0)
    count, depth = len(members), len(sizes) - 1
    top = depth - 1
    starts = [torch.cat([weight, bias.unsqueeze(2)], 2).to(dtype) for weight, bias in architecture.initials(seeds)]
    parameters = [p if layer == top else p.transpose(1, 2).contiguous() for layer, p in enumerate(starts)]
    velocities = [torch.zeros_like(p) for p in parameters]
    momentum, decay, smooth = recipe.momentum, recipe.weight_decay, recipe.label_smoothing

    chosen = torch.empty(count * batch * (sizes[0] + 1), dtype=dtype)
    hidden = [torch.ones(count, batch, size + 1, dtype=dtype) for size in sizes[1:-1]]
    # a layer's sums before relu, and later what flows back to them
    outs = [torch.empty(count * batch * size, dtype=dtype) for size in sizes[1:]]
    errors = torch.empty_like(outs[top])
    hit = torch.full((1, 1, 1), smooth - 1, dtype=dtype)

    @functools.cache
    def views(active: int, wide: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[_Layer]]:
        """The flat batch, what to add at the labels, the errors at the top, and the layers."""

        def shaped(store: torch.Tensor, *shape: int) -> torch.Tensor:
            return store[: math.prod(shape)].view(shape)

        flat = shaped(chosen, active * wide, sizes[0] + 1)
        belows = [flat.view(active, wide, -1)] + [h[:active, :wide] for h in hidden]
        stack = []
        for layer, (below, size) in enumerate(zip(belows, sizes[1:], strict=True)):
            p, v = parameters[layer][:active], velocities[layer][:active]
            if layer == top:
                out, error = (shaped(store, active, size, wide) for store in (outs[layer], errors))
                left, right = p, below.transpose(1, 2)
                slopes, back = (error, below), (error.transpose(1, 2), p[:, :, :-1])
            else:
                out = shaped(outs[layer], active, wide, size)
                left, right = below, p
                slopes, back = (below.transpose(1, 2), out), (out, p[:, :-1].transpose(1, 2))
            stack.append(_Layer(below[:, :, :-1], left, right, out, slopes, back, p, v))
        return flat, hit.expand(active, 1, wide), error, stack

    for step in _steps(members, seeds, labels, recipe, max_batches, dtype):
        x, at_labels, error, stack = views(*step.examples.shape)
        torch.index_select(table, 0, step.examples.flatten(), out=x)
        for layer, part in enumerate(stack):
            torch.bmm(part.left, part.right, out=part.out)
            if layer < top:
                torch.clamp_min(part.out, 0, out=stack[layer + 1].below)
        torch.softmax(stack[top].out, 1, out=error)
        error.scatter_add_(1, step.labels, at_labels)
        if smooth:
            error.sub_(smooth / sizes[-1])
        error.mul_(step.weights)
        for layer in range(top, -1, -1):
            part = stack[layer]
            if layer > 0:
                under = stack[layer - 1].out
                torch.bmm(*part.back, out=under)
                # relu's derivative: 0 wherever relu gave 0
                torch.ops.aten.threshold_backward.grad_input(under, part.below, 0, grad_input=under)
            p, v = part.parameters, part.velocity
            if recipe.nesterov:
                slope = torch.bmm(*part.slopes).add_(p, alpha=decay)
                v.mul_(momentum).add_(slope)
                p.addcmul_(slope, step.rates, value=-1).addcmul_(v, step.rates, value=-momentum)
            else:
                v.baddbmm_(*part.slopes, beta=momentum)
                if decay:
                    v.add_(p, alpha=decay)
                p.addcmul_(v, step.rates, value=-1)

    parameters[:top] = [p.transpose(1, 2) for p in parameters[:top]]
    split = [part for p in parameters for part in (p[:, :, :-1], p[:, :, -1])]
    return dict(zip(architecture.parameter_names, split, strict=True))


def _vmapped(
    architecture: Architecture,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    members: Sequence[np.ndarray],
    seeds: Sequence[int],
    recipe: Recipe,
    max_batches: int | None,
) -> dict[str, torch.Tensor]:
    """Train any module whose forward pass treats examples one by one and draws no random numbers."""
    modules = [architecture(seed).to(inputs.dtype).train() for seed in seeds]
    _check_separable(modules[0])
    parameters, _ = stack_module_state(modules)
    parameters = {name: values.detach() for name, values in parameters.items()}
    velocities = {name: torch.zeros_like(values) for name, values in parameters.items()}

    def weighed_loss(p: dict, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = functional_call(modules[0], p, (x,))
        return functional.cross_entropy(logits, y, reduction="none", label_smoothing=recipe.label_smoothing) @ weights

    gradients = vmap(grad(weighed_loss))
    with torch.no_grad():
        check_labels(labels, modules[0](inputs[:1]).shape[-1], "train")
    for step in _steps(members, seeds, labels, recipe, max_batches, inputs.dtype):
        active = len(step.examples)
        now = {name: values[:active] for name, values in parameters.items()}
        slopes = gradients(now, inputs[step.examples], step.labels.squeeze(1), step.weights.squeeze(1))
        for name, p in now.items():
            g, v = slopes[name], velocities[name][:active]
            rate = step.rates.view(active, *[1] * (p.ndim - 1))
            if recipe.weight_decay:
                g = g.add(p, alpha=recipe.weight_decay)
            v.mul_(recipe.momentum).add_(g)
            if recipe.nesterov:
                p.addcmul_(g, rate, value=-1).addcmul_(v, rate, value=-recipe.momentum)
            else:
                p.addcmul_(v, rate, value=-1)
    return parameters


def _check_separable(module: nn.Module) -> None:
    """Raise for a module whose update of one model is not a function of that model's examples alone."""
    if next(module.buffers(), None) is not None:
        raise DatamodelsError(
            f"ensemble: {type(module).__name__} holds buffers, as batch normalisation does, which depend on the whole "
            f"padded batch; expected parameters only; use loop.train, or normalise by example (GroupNorm, LayerNorm)"
        )
    for name, part in module.named_modules():
        if isinstance(part, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)):
            raise DatamodelsError(
                f"ensemble: {name} is a {type(part).__name__}, which draws random numbers or mixes the batch; "
                f"expected layers that treat each example alone; use loop.train"
            )

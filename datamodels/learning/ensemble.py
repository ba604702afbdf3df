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
    return max(1, min(256, WORKING_SET_BYTES // (floats * inputs.element_size())))


class _Step(NamedTuple):
    """One update of the first `models` models.

    `examples` and `labels` (models, m), int64; `weights` (models, m), what each example's gradient counts: 1/batch,
    or 0 for padding; `rates` (models,), the learning rates.
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
    rates_at = torch.from_numpy(np.ascontiguousarray(rates.transpose(1, 2, 0))).to(dtype)

    plan = []  # per step of an epoch: how many models take part, the widest batch among them, the weights
    for step in range(num_steps):
        left = np.minimum(sizes - step * batch, batch)
        active, wide = int((left > 0).sum()), int(left[0])
        weights = (np.arange(wide) < left[:active, None]) / left[:active, None]
        plan.append((active, slice(step * batch, step * batch + wide), torch.from_numpy(weights).to(dtype)))

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
        labelled = labels.index_select(0, examples.flatten()).view_as(examples)
        for step, (active, columns, weights) in enumerate(plan):
            if not live[epoch, step]:
                break
            yield _Step(examples[:active, columns], labelled[:active, columns], weights, rates_at[epoch, step, :active])


class _Layer(NamedTuple):
    """What one layer of the first `active` models reads and writes in an update of `wide` examples each.

    All are views. out = bias + left @ right; weight gradient = slope_left @ slope_right; bias gradient = delta
    summed over `axis`; what flows back = back_left @ back_right, into `below_delta`.
    """

    bias_wide: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor
    delta: torch.Tensor
    axis: int
    slopes: tuple[torch.Tensor, torch.Tensor]
    back: tuple[torch.Tensor, torch.Tensor]
    below: torch.Tensor
    below_delta: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    weight_velocity: torch.Tensor
    bias_velocity: torch.Tensor


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

    Weights lie as (K, in, out), but the last layer's as (K, classes, in) with logits (K, classes, m): torch's
    softmax over a last axis of ten is fifteen times slower than over a middle one. And torch's batched products
    run one call per matrix unless the result is contiguous, so no two of these tensors share a row.
    """
    dtype, batch, sizes = inputs.dtype, recipe.batch_size, architecture.sizes
    table = inputs.flatten(1).contiguous()
    if table.shape[1] != sizes[0]:
        raise DatamodelsError(
            f"ensemble: expected inputs of {sizes[0]} numbers each, as the MLP's first size says; "
            f"got shape {tuple(inputs.shape)}"
        )
    check_labels(labels, sizes[-1], "train")
    count, depth = len(members), len(sizes) - 1
    top = depth - 1
    weights, biases = [], []
    for layer, (weight, bias) in enumerate(architecture.initials(seeds)):
        weights.append((weight if layer == top else weight.transpose(1, 2)).to(dtype).contiguous())
        biases.append(bias.unsqueeze(2 if layer == top else 1).to(dtype).contiguous())
    weight_velocities, bias_velocities = ([torch.zeros_like(p) for p in bank] for bank in (weights, biases))
    outs, deltas = ([torch.empty(count * batch * size, dtype=dtype) for size in sizes] for _ in range(2))
    momentum, decay, smooth = recipe.momentum, recipe.weight_decay, recipe.label_smoothing
    hit = torch.full((1, 1, 1), smooth - 1, dtype=dtype)

    @functools.cache
    def layers(active: int, wide: int) -> tuple[torch.Tensor, list[_Layer]]:
        def shaped(store: torch.Tensor, *shape: int) -> torch.Tensor:
            return store[: math.prod(shape)].view(shape)

        flat = shaped(outs[0], active * wide, sizes[0])
        below, below_delta = flat.view(active, wide, sizes[0]), None
        result = []
        for layer in range(depth):
            weight, bias = weights[layer][:active], biases[layer][:active]
            size = sizes[layer + 1]
            shape = (active, size, wide) if layer == top else (active, wide, size)
            out, delta = shaped(outs[layer + 1], *shape), shaped(deltas[layer + 1], *shape)
            weight_t, below_t, delta_t = (t.transpose(1, 2) for t in (weight, below, delta))
            result.append(
                _Layer(
                    bias_wide=bias.expand_as(out),
                    left=weight if layer == top else below,
                    right=below_t if layer == top else weight,
                    out=out,
                    delta=delta,
                    axis=2 if layer == top else 1,
                    slopes=(delta, below) if layer == top else (below_t, delta),
                    back=(delta_t, weight) if layer == top else (delta, weight_t),
                    below=below,
                    below_delta=below_delta,
                    weight=weight,
                    bias=bias,
                    weight_velocity=weight_velocities[layer][:active],
                    bias_velocity=bias_velocities[layer][:active],
                )
            )
            below, below_delta = out, delta
        return flat, result

    for step in _steps(members, seeds, labels, recipe, max_batches, dtype):
        active, wide = step.examples.shape
        x, stack = layers(active, wide)
        torch.index_select(table, 0, step.examples.flatten(), out=x)
        for part in stack:
            torch.baddbmm(part.bias_wide, part.left, part.right, out=part.out)
            if part is not stack[-1]:
                part.out.relu_()
        delta, target = stack[-1].delta, step.labels.unsqueeze(1)
        torch.softmax(stack[-1].out, 1, out=delta)
        delta.scatter_add_(1, target, hit.expand_as(target))
        if smooth:
            delta.sub_(smooth / sizes[-1])
        delta.mul_(step.weights.unsqueeze(1))
        rate = step.rates.neg().view(active, 1, 1)
        for part in reversed(stack):
            if part.below_delta is not None:
                torch.bmm(*part.back, out=part.below_delta)
                # relu's derivative: 0 wherever the layer below gave 0
                torch.ops.aten.threshold_backward.grad_input(
                    part.below_delta, part.below, 0, grad_input=part.below_delta
                )
            bias_slope = part.delta.sum(part.axis, keepdim=True)
            if recipe.nesterov:
                weight_slope = torch.bmm(*part.slopes)
                for p, v, g in (
                    (part.weight, part.weight_velocity, weight_slope),
                    (part.bias, part.bias_velocity, bias_slope),
                ):
                    g.add_(p, alpha=decay)
                    v.mul_(momentum).add_(g)
                    p.addcmul_(g, rate).addcmul_(v, rate, value=momentum)
            else:
                part.weight_velocity.baddbmm_(*part.slopes, beta=momentum)
                part.bias_velocity.mul_(momentum).add_(bias_slope)
                for p, v in ((part.weight, part.weight_velocity), (part.bias, part.bias_velocity)):
                    if decay:
                        v.add_(p, alpha=decay)
                    p.addcmul_(v, rate)

    names = architecture.parameter_names
    weights[:top] = [weight.transpose(1, 2) for weight in weights[:top]]
    return dict(zip(names, [p for w, b in zip(weights, biases, strict=True) for p in (w, b.flatten(1))], strict=True))


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
        slopes = gradients(now, inputs[step.examples], step.labels, step.weights)
        for name, p in now.items():
            g, v = slopes[name], velocities[name][:active]
            rate = step.rates.neg().view(active, *[1] * (p.ndim - 1))
            if recipe.weight_decay:
                g = g.add(p, alpha=recipe.weight_decay)
            v.mul_(recipe.momentum).add_(g)
            if recipe.nesterov:
                p.addcmul_(g, rate).addcmul_(v, rate, value=recipe.momentum)
            else:
                p.addcmul_(v, rate)
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

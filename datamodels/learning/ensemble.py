"""Train K models of one architecture at the same time, each on its own mask, as K separate runs of `loop.train`.

Every model keeps its own seed, order, batches and learning rates, so the result does not depend on K or on which
models share a call, beyond rounding. An `MLP` takes a path of its own: batched matrix products, gradients written
out by hand, no autograd. Any other module goes through `torch.func.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from datamodels.errors import DatamodelsError
from datamodels.learning.loop import POSITION_BITS, Recipe, check_data, check_finite, check_masks, sort_keys
from datamodels.learning.models import MLP, ORDER, Architecture, words
from datamodels.learning.outputs import check_labels

# What a step touches should stay in a core's second-level cache; see benchmarks/throughput.py for the measurement.
WORKING_SET_BYTES = 2 * 2**20


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
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != len(members) or not members:
        raise DatamodelsError(f"ensemble: expected one seed per mask and at least one, got {len(seeds)} seeds for masks {masks.shape}")
    path = _mlp if isinstance(architecture, MLP) else _vmapped
    if at_once is None:
        at_once = _at_once(architecture, inputs, recipe)
    parts = [
        path(architecture, inputs, labels, members[k : k + at_once], seeds[k : k + at_once], recipe, max_batches)
        for k in range(0, len(members), at_once)
    ]
    parameters = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    finite = torch.stack([torch.isfinite(p.flatten(1)).all(1) for p in parameters.values()]).all(0)
    check_finite(seeds, finite.tolist(), recipe)
    return Ensemble(architecture, parameters)


def _at_once(architecture: Architecture, inputs: torch.Tensor, recipe: Recipe) -> int:
    if not isinstance(architecture, MLP):
        return 64
    batch, sizes = recipe.batch_size, architecture.sizes
    floats = batch * (sizes[0] + 2 * sum(sizes[1:])) + 2 * sum((i + 1) * o for i, o in architecture.layers)
    return max(1, min(256, WORKING_SET_BYTES // (floats * inputs.element_size())))


@dataclass(frozen=True)
class _Step:
    """One update of the first `models` models: which examples each sees, and what an example's gradient weighs.

    `examples` (models, m), int64; `weights` (models, m), 1/batch for a real entry and 0 for padding; `rates` (models,).
    """

    examples: torch.Tensor
    weights: torch.Tensor
    rates: torch.Tensor


def _steps(
    members: Sequence[np.ndarray], seeds: Sequence[int], recipe: Recipe, limit: int | None, dtype: torch.dtype
) -> Iterator[_Step]:
    """Every update of models that are sorted by falling number of examples.

    Epochs start together. In an epoch's last steps only the models that still have examples take part, which
    are the first ones; a ragged last batch is padded with example 0 at weight 0. A model that has had `limit`
    updates goes on at rate 0 until all have, as models with short epochs get there in a later epoch.
    """
    sizes = np.array([len(kept) for kept in members])
    longest, batch = int(sizes[0]), recipe.batch_size
    num_steps = -(-longest // batch)
    padded = np.zeros((len(members), longest), np.int64)
    for row, kept in zip(padded, members, strict=True):
        row[: len(kept)] = kept
    flat = padded.ravel()
    offsets = (np.arange(len(members)) * longest)[:, None]
    low = np.uint64(2**POSITION_BITS - 1)
    keys = np.empty(padded.shape, np.uint64)
    positions = np.arange(longest, dtype=np.uint64)
    padding = positions | ~low  # sorts after every real key of the row
    orders = [words(seed, ORDER) for seed in seeds]
    plan = []  # per step of an epoch: models taking part, widest batch among them, weights
    for step in range(num_steps):
        left = np.minimum(sizes - step * batch, batch)
        active = int((left > 0).sum())
        wide = int(left[0])
        weights = (np.arange(wide) < left[:active, None]) / left[:active, None]
        plan.append((active, wide, torch.from_numpy(weights).to(dtype)))
    per_epoch = -(-sizes // batch)
    rates = np.zeros((len(sizes), recipe.epochs, num_steps))
    for row, size, steps in zip(rates, sizes, per_epoch, strict=True):
        each = recipe.rates(int(size))
        if limit is not None:
            each[limit:] = 0
        row[:, :steps] = each.reshape(recipe.epochs, steps)
    for epoch in range(recipe.epochs):
        if not rates[:, epoch].any():
            return
        for row, order, size in zip(keys, orders, sizes, strict=True):
            row[:size] = order.random_raw(int(size))
        keys &= ~low
        keys |= positions
        for row, size in zip(keys, sizes, strict=True):
            row[size:] = padding[size:]
        keys.sort(axis=1)
        examples = flat[(keys & low).astype(np.int64) + offsets]
        for step, (active, wide, weights) in enumerate(plan):
            if not rates[:active, epoch, step].any():
                break
            chosen = np.ascontiguousarray(examples[:active, step * batch : step * batch + wide])
            yield _Step(torch.from_numpy(chosen), weights, torch.from_numpy(rates[:active, epoch, step]).to(dtype))


@torch.no_grad()
def _mlp(
    architecture: Architecture,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    members: Sequence[np.ndarray],
    seeds: Sequence[int],
    recipe: Recipe,
    max_batches: int | None,
) -> dict[str, torch.Tensor]:
    """Train MLPs by hand-written gradients, with softmax's derivative p − target weighed by 1/batch at the top.

    Weights lie as (K, in, out), but the last layer's as (K, classes, in) with logits (K, classes, m): torch's
    softmax over a last axis of ten is fifteen times slower than over a middle one, and torch's batched products
    fall back to one call per matrix unless the result is contiguous, which rules out slices of one buffer.
    """
    assert isinstance(architecture, MLP)
    dtype, batch, classes = inputs.dtype, recipe.batch_size, architecture.sizes[-1]
    count, depth = len(members), len(architecture.layers)
    table = inputs.flatten(1)
    if table.shape[1] != architecture.sizes[0]:
        raise DatamodelsError(
            f"ensemble: expected inputs of {architecture.sizes[0]} numbers each, as the MLP's first size says; "
            f"got shape {tuple(inputs.shape)}"
        )
    check_labels(labels, classes, "train")
    by_size = np.argsort([-len(kept) for kept in members], kind="stable")
    initial = torch.from_numpy(np.stack([architecture.initial(seeds[k]) for k in by_size])).to(dtype)
    matrices, biases, at = [], [], 0
    for layer, (fan_in, fan_out) in enumerate(architecture.layers):
        matrix = initial[:, at : at + fan_in * fan_out].reshape(count, fan_out, fan_in)
        matrices.append(matrix.contiguous() if layer == depth - 1 else matrix.transpose(1, 2).contiguous())
        at += fan_in * fan_out
        biases.append(initial[:, at : at + fan_out].reshape(count, 1, fan_out).contiguous())
        at += fan_out
    biases[-1] = biases[-1].transpose(1, 2).contiguous()
    parameters = matrices + biases
    velocities = [torch.zeros_like(p) for p in parameters]
    momentum, decay, smooth = recipe.momentum, recipe.weight_decay, recipe.label_smoothing

    x_store = torch.empty(count * batch * table.shape[1], dtype=dtype)
    h_stores = [[torch.empty(count * batch * size, dtype=dtype) for size in architecture.sizes[1:]] for _ in "hd"]

    def shaped(store: torch.Tensor, *shape: int) -> torch.Tensor:
        return store[: math.prod(shape)].view(shape)

    for step in _steps([members[k] for k in by_size], [seeds[k] for k in by_size], recipe, max_batches, dtype):
        active, wide = step.examples.shape
        x = shaped(x_store, active * wide, table.shape[1])
        torch.index_select(table, 0, step.examples.view(-1), out=x)
        layers_in = [x.view(active, wide, -1)]
        for layer in range(depth - 1):
            h = shaped(h_stores[0][layer], active, wide, architecture.sizes[layer + 1])
            bias = biases[layer][:active].expand_as(h)
            torch.baddbmm(bias, layers_in[-1], matrices[layer][:active], out=h)
            layers_in.append(h.relu_())
        z = shaped(h_stores[0][-1], active, classes, wide)
        bias = biases[-1][:active].expand_as(z)
        torch.baddbmm(bias, matrices[-1][:active], layers_in[-1].transpose(1, 2), out=z)
        delta = torch.softmax(z, 1, out=shaped(h_stores[1][-1], active, classes, wide))
        target = labels[step.examples].unsqueeze(1)
        delta.scatter_add_(1, target, torch.full((1, 1, 1), smooth - 1, dtype=dtype).expand_as(target))
        if smooth:
            delta.sub_(smooth / classes)
        delta.mul_(step.weights.unsqueeze(1))

        rate = step.rates.neg().view(active, 1, 1)
        for layer in reversed(range(depth)):
            last = layer == depth - 1
            below = layers_in[layer]
            pair = (delta, below) if last else (below.transpose(1, 2), delta)
            slope = delta.sum(2 if last else 1, keepdim=True)
            if layer > 0:
                back = shaped(h_stores[1][layer - 1], active, wide, architecture.sizes[layer])
                weight = matrices[layer][:active]
                if last:
                    torch.bmm(delta.transpose(1, 2), weight, out=back)
                else:
                    torch.bmm(delta, weight.transpose(1, 2), out=back)
                torch.ops.aten.threshold_backward.grad_input(back, below, 0, grad_input=back)
            for kind, bank in ((0, matrices), (1, biases)):
                p = bank[layer][:active]
                v = velocities[kind * depth + layer][:active]
                if recipe.nesterov:
                    g = torch.bmm(*pair) if kind == 0 else slope
                    if decay:
                        g.add_(p, alpha=decay)
                    v.mul_(momentum).add_(g)
                    p.addcmul_(g, rate).addcmul_(v, rate, value=momentum)
                else:
                    if kind == 0:
                        v.baddbmm_(*pair, beta=momentum)
                    else:
                        v.mul_(momentum).add_(slope)
                    if decay:
                        v.add_(p, alpha=decay)
                    p.addcmul_(v, rate)
            if layer > 0:
                delta = back

    restore = torch.from_numpy(np.argsort(by_size))
    result = {}
    for layer in range(depth):
        last = layer == depth - 1
        result[f"{2 * layer}.weight"] = (matrices[layer] if last else matrices[layer].transpose(1, 2))[restore]
        result[f"{2 * layer}.bias"] = biases[layer].flatten(1)[restore]
    return result


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
    by_size = np.argsort([-len(kept) for kept in members], kind="stable")
    modules = [architecture(seeds[k]).to(inputs.dtype).train() for k in by_size]
    _check_separable(modules[0])
    parameters, _ = stack_module_state(modules)
    parameters = {name: values.detach() for name, values in parameters.items()}
    velocities = {name: torch.zeros_like(values) for name, values in parameters.items()}

    def weighed_loss(p: dict, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = functional_call(modules[0], p, (x,))
        return functional.cross_entropy(logits, y, reduction="none", label_smoothing=recipe.label_smoothing) @ weights

    gradients = vmap(grad(weighed_loss))
    checked = False
    for step in _steps([members[k] for k in by_size], [seeds[k] for k in by_size], recipe, max_batches, inputs.dtype):
        active = len(step.examples)
        if not checked:
            with torch.no_grad():
                check_labels(labels, modules[0](inputs[:1]).shape[-1], "train")
            checked = True
        now = {name: values[:active] for name, values in parameters.items()}
        slopes = gradients(now, inputs[step.examples], labels[step.examples], step.weights)
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
    restore = torch.from_numpy(np.argsort(by_size))
    return {name: values[restore] for name, values in parameters.items()}


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

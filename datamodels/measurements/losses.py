"""A model's mean loss as a function of its weights, for many weight vectors at once.

The weights that are sampled lie as rows of one matrix (C, p), so that whoever moves them needs a few calls on whole
matrices. The model stays in eval mode: its loss is one function of its weights, without dropout's noise and with the
batch-norm statistics that it came with. What was given is never touched: work is done on a copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import vmap

from datamodels.errors import MeasurementError

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Masks = Mapping[str, "bool | torch.Tensor"]


class Loss:
    """The mean loss of a model over n examples, and which of its parameters are free to move.

    `data` is (inputs, labels) on the model's device, `loss_fn(outputs, labels)` a scalar mean over examples. Free are
    the parameters that require gradients; `masks` narrows that: by a parameter's name, False, or a bool tensor of its
    shape.

    Raises MeasurementError for data, parameters or masks that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: tuple[torch.Tensor, torch.Tensor],
        masks: Masks | None = None,
    ):
        self.inputs, self.labels = data
        self.n = len(self.inputs)
        if len(self.labels) != self.n or self.n < 2:
            raise MeasurementError(
                f"loss: expected inputs and labels of the same n >= 2 examples, got {self.n} and {len(self.labels)}"
            )
        self.module = copy.deepcopy(model).eval()
        self.loss_fn = loss_fn
        named = dict(self.module.named_parameters())
        masks = dict(masks or {})
        for name, mask in masks.items():
            if name not in named:
                raise MeasurementError(f"masks: there is no parameter {name!r}; expected one of {', '.join(named)}")
            if isinstance(mask, torch.Tensor) and (mask.dtype != torch.bool or mask.shape != named[name].shape):
                raise MeasurementError(
                    f"masks: {name}: expected bool {tuple(named[name].shape)}, got {mask.dtype} {tuple(mask.shape)}"
                )
        self.free = {
            name: parameter
            for name, parameter in named.items()
            if parameter.requires_grad and bool(torch.as_tensor(masks.get(name, True)).any())
        }
        if not self.free:
            raise MeasurementError(
                f"loss: none of {len(named)} parameters is free to move; expected one that requires gradients and is "
                f"not masked"
            )
        dtypes, devices = ({getattr(p, what) for p in self.free.values()} for what in ("dtype", "device"))
        if len(dtypes) > 1 or len(devices) > 1 or dtypes - {torch.float32, torch.float64}:
            raise MeasurementError(
                f"loss: expected parameters of one dtype, float32 or float64, on one device; got {_listed(dtypes)} on "
                f"{_listed(devices)}; use model.float().to(device): in half precision small steps are lost"
            )
        (self.device,), (self.dtype,) = devices, dtypes
        for what, tensor in (("inputs", self.inputs), ("labels", self.labels)):
            if tensor.device != self.device:
                raise MeasurementError(
                    f"loss: {what} are on {tensor.device}, the model on {self.device}; move one of them"
                )
        for parameter in named.values():
            parameter.requires_grad_(False)
        # where each stands in the module, a tied one more than once: `functional_call` would look for it at every call
        self.places: list[list[tuple[dict[str, Any], str]]] = [
            [(m._parameters, name) for m in self.module.modules() for name, p in m._parameters.items() if p is free]
            for free in self.free.values()
        ]
        self.start = torch.cat([p.detach().flatten() for p in self.free.values()])
        self.mask: torch.Tensor | None = None
        if any(isinstance(masks.get(name), torch.Tensor) for name in self.free):
            parts = [torch.as_tensor(masks.get(name, True)).expand(p.shape).flatten() for name, p in self.free.items()]
            self.mask = torch.cat([part.to(self.device) for part in parts]).to(self.dtype)

    @property
    def count(self) -> int:
        """How many weights are free to move."""
        return len(self.start) if self.mask is None else int(self.mask.sum())

    def views(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Each free parameter's part of rows (C, p), as (C, *shape); nothing is copied."""
        parts = rows.split([p.numel() for p in self.free.values()], dim=1)
        return [part.view(len(rows), *p.shape) for part, p in zip(parts, self.free.values(), strict=True)]

    def value(self, parameters: list[torch.Tensor], inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of one model, a scalar, with these in the place of its free parameters."""
        for places, parameter in zip(self.places, parameters, strict=True):
            for holder, name in places:
                holder[name] = parameter
        return self._scalar(self.loss_fn(self.module(inputs), labels))

    def _scalar(self, loss: torch.Tensor) -> torch.Tensor:
        if loss.shape != ():
            raise MeasurementError(
                f"loss: expected loss_fn to return a scalar, got shape {tuple(loss.shape)}; take its mean"
            )
        return loss

    def whole(self, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], chunk: int | None) -> torch.Tensor:
        """The mean over all n examples, float64, of `of(inputs, labels)`, which gives the mean of at most `chunk`."""
        if chunk is None or chunk >= self.n:
            return of(self.inputs, self.labels).double()
        parts = zip(self.inputs.split(chunk), self.labels.split(chunk), strict=True)
        return torch.stack([of(x, y).double() * (len(x) / self.n) for x, y in parts]).sum(0)

    def why_not_together(self) -> str | None:
        """Why several copies cannot be computed at once; None where they can."""
        rows = self.start.expand(2, -1).clone()
        x, y = self.inputs[:2], self.labels[:2]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="There is a performance drop")
                together = Together(self, rows, torch.empty_like(rows))
                own = x.expand(2, *x.shape), y.expand(2, *y.shape)
                for ask in (together.gradient, together.value):
                    ask(x, y, shared=True)
                    ask(*own, shared=False)
                together.at_start(*own)
        except MeasurementError:
            raise
        except Exception as error:  # vmap has no one error for what it cannot do
            return next(iter(str(error).splitlines()), "") or type(error).__name__
        return None


class Rows(Protocol):
    """Losses (C,) of the rows of a matrix of weights, on the same batch for all (`shared`) or on one for each."""

    def gradient(self, inputs: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> torch.Tensor:
        """The losses; their gradients (C, p) are written into the matrix that is kept for them."""

    def value(self, inputs: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> torch.Tensor:
        """The losses alone."""

    def at_start(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The losses, each on its own batch, of the weights that the model came with."""


class Together:
    """All rows in one call, through `torch.func.vmap`."""

    def __init__(self, loss: Loss, weights: torch.Tensor, gradients: torch.Tensor):
        self.loss, self.gradients, self.slots = loss, gradients, loss.views(gradients)
        self.leaves = [view.detach().requires_grad_() for view in loss.views(weights)]
        self.origin = [view[0] for view in loss.views(loss.start[None])]
        self.shared = vmap(loss.value, in_dims=(0, None, None))
        self.own = vmap(loss.value, in_dims=(0, 0, 0))
        self.starts = vmap(loss.value, in_dims=(None, 0, 0))

    def gradient(self, inputs: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> torch.Tensor:
        with torch.enable_grad():
            losses = (self.shared if shared else self.own)(self.leaves, inputs, labels)
        _gradients(losses.sum(), self.leaves, self.slots, self.gradients, self.loss.mask)
        return losses.detach()

    @torch.no_grad()
    def value(self, inputs: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> torch.Tensor:
        return (self.shared if shared else self.own)(self.leaves, inputs, labels)

    @torch.no_grad()
    def at_start(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.starts(self.origin, inputs, labels)


class Alone:
    """One row, its parts in place of the module's parameters: no more calls than plain training has."""

    def __init__(self, loss: Loss, weights: torch.Tensor, gradients: torch.Tensor):
        self.loss, self.gradients = loss, gradients
        self.leaves = [view[0].detach().requires_grad_() for view in loss.views(weights)]
        self.slots = [view[0] for view in loss.views(gradients)]
        self.origin = [view[0] for view in loss.views(loss.start[None])]

    def gradient(self, inputs: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> torch.Tensor:
        with torch.enable_grad():
            loss = self._loss(inputs, labels, shared)
        _gradients(loss, self.leaves, self.slots, self.gradients, self.loss.mask)
        return loss.detach()[None]

    @torch.no_grad()
    def value(self, inputs: torch.Tensor, labels: torch.Tensor, *, shared: bool) -> torch.Tensor:
        return self._loss(inputs, labels, shared)[None]

    @torch.no_grad()
    def at_start(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss.value(self.origin, inputs[0], labels[0])[None]

    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor, shared: bool) -> torch.Tensor:
        x, y = (inputs, labels) if shared else (inputs[0], labels[0])
        return self.loss.value(self.leaves, x, y)


def _gradients(
    loss: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    slots: list[torch.Tensor],
    whole: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """Write the gradients of a scalar into their slots, which are views of `whole`."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    if any(g is None for g in found):
        whole.zero_()
        pairs = [(slot, g) for slot, g in zip(slots, found, strict=True) if g is not None]
        torch._foreach_copy_([slot for slot, _ in pairs], [g for _, g in pairs])
    else:
        torch._foreach_copy_(slots, found)
    if mask is not None:
        whole.mul_(mask)


def _listed(things: set) -> str:
    return ", ".join(sorted(map(str, things)))

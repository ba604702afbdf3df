"""Chains of weights around a trained model: SGLD, SGNHT and RMSprop-preconditioned SGLD.

All of them sample exp(−nβ L(w) − γ/2 |w − w*|²), the tempered posterior localised at the model's own weights w*
(Lau et al., 2023, eq. 7). With step ε, gradient b = −(nβ ∇L + γ (w − w*)) and N standard normal:

    sgld      Δw = (ε/2) b + √ε N                                        Welling and Teh, 2011
    rmsprop   Δw = (ε/2) G b + √(εG) N,  G = 1/(stabilizer + √V)         Li et al., 2016; V stands still after burn-in,
                                                                         so that no correction by ∂G/∂w is missing
    sgnht     v ← (1 − α) v + (ε/2) b + √(aε) N,  Δw = v                 Ding et al., 2014, with v = p·√(ε/2);
              α ← α + a²/2 ((1 − α/2)|v|²/(pε/2) − 1)                    the thermostat α is critically damped; 1 − α/2
                                                                         makes the variance of w right, not that of v

A chain's noise and batches come from its own seed: they do not depend on the chains beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from datamodels.errors import MeasurementError
from datamodels.learning.models import words
from datamodels.measurements.losses import Alone, Loss, LossFn, Masks, Rows, Together

SAMPLERS = ("sgld", "sgnht", "rmsprop")
LOSSES = ("batch", "all")

NOISE, BATCHES = 0x6E6F6973, 0x62617463  # "nois", "batc": streams of a seed, as in learning.models
BLOCK = 4096  # numbers that a chain draws in one call; one number a call would cost more than the step
WORTH_A_CALL = 8  # chains; benchmarks/llc.py
STRIDE = 50  # steps between two looks at whether the losses are finite, which make a GPU wait


@dataclass(frozen=True)
class Settings:
    """How chains move, and which of their states are kept.

    epsilon: step. gamma: localisation. nbeta: inverse temperature times n; None is n/ln n. A chain makes `burn_in`
    steps, then `draws` times `thin` steps, and keeps the last state of each `thin`. batch_size: examples per step,
    drawn anew with replacement; None is all. losses: a kept state's loss minus that of w*, both over the step's batch
    ("batch") or both over all examples ("all"). box: weights stay within this distance of w*, reflected at the wall.
    checks: how many steps after burn-in are looked at with a second gradient, for acceptance and norms.
    """

    epsilon: float
    gamma: float
    sampler: str = "sgld"
    nbeta: float | None = None
    chains: int = 4
    draws: int = 200
    burn_in: int = 0
    thin: int = 1
    batch_size: int | None = None
    losses: str = "batch"
    box: float | None = None
    checks: int = 100
    friction: float = 0.1  # a of sgnht
    decay: float = 0.99  # of rmsprop's V
    stabilizer: float = 0.1  # of rmsprop

    def __post_init__(self) -> None:
        positive = "above 0 and finite"
        rules = {
            "epsilon": (_above(self.epsilon, 0), positive),
            "gamma": (_above(self.gamma, 0) or self.gamma == 0, "at least 0 and finite"),
            "sampler": (self.sampler in SAMPLERS, f"as one of {', '.join(SAMPLERS)}"),
            "nbeta": (self.nbeta is None or _above(self.nbeta, 0), f"{positive}, or None for n/ln n"),
            "chains": (_whole(self.chains, 1), "as an int of at least 1"),
            "draws": (_whole(self.draws, 1), "as an int of at least 1"),
            "burn_in": (_whole(self.burn_in, 0), "as an int of at least 0"),
            "thin": (_whole(self.thin, 1), "as an int of at least 1"),
            "batch_size": (self.batch_size is None or _whole(self.batch_size, 1), "as an int of at least 1, or None"),
            "losses": (self.losses in LOSSES, f"as one of {', '.join(LOSSES)}"),
            "box": (self.box is None or _above(self.box, 0), f"{positive}, or None"),
            "checks": (_whole(self.checks, 1), "as an int of at least 1"),
            "friction": (0 < self.friction < 1, "in (0, 1)"),
            "decay": (0 < self.decay < 1, "in (0, 1)"),
            "stabilizer": (_above(self.stabilizer, 0), positive),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise MeasurementError(f"sampling: expected {name} {expected}, got {getattr(self, name)!r}")
        if self.sampler == "rmsprop" and self.burn_in == 0:
            raise MeasurementError(
                "sampling: rmsprop learns its preconditioner during burn-in; expected burn_in of at least 1, got 0"
            )

    @property
    def steps(self) -> int:
        """Updates of one chain."""
        return self.burn_in + self.draws * self.thin

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))


def _above(value: float, least: float) -> bool:
    return isinstance(value, int | float) and least < value < math.inf


def _whole(value: int, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def default_nbeta(n: int) -> float:
    """n/ln n, the inverse temperature 1/ln n (Watanabe, 2013) times n."""
    return n / math.log(n)


@dataclass(frozen=True)
class Chains:
    """What C chains left behind; a chain that was stopped is NaN from there on, and at all its kept draws.

    excess (C, draws): L(w) − L(w*) of the kept states, both on the same data. trace (C, steps + 1): the loss on the
    step's batch before each update. acceptance (C, checks): the Metropolis acceptance probability of a Langevin step of
    this size from the chain's own state, on the same batch (Roberts and Tweedie, 1996). gradient_norm, pull_norm,
    noise_norm (C, checks): lengths of that step's parts, in units of the weights. step_bias (C, checks):
    ε/8 nβ∇L·G(−b), whose mean is what the step's size adds to nβ (E L − L(w*)): exact for a quadratic loss and all
    examples, where a step of εH = h makes variances 1/(1 − h/4) times too large; and an upper bound of what the noise
    of batches adds. sgnht has less of the one and none of the other. arrival (C, checks): −(w − w*)·Gb / tr G, by which
    |w − w*|² has stopped growing; its mean is 1 in equilibrium (the virial theorem), 0 where chains have hardly moved,
    and means nothing in a box. distance (C, draws): |w − w*|. stopped: by chain,
    the update that made its loss infinite or NaN. resolution: distance between the numbers of the model's dtype at
    initial_loss.
    """

    settings: Settings
    seed: int
    n: int
    nbeta: float
    num_parameters: int
    initial_loss: float
    resolution: float
    excess: np.ndarray
    trace: np.ndarray
    acceptance: np.ndarray
    gradient_norm: np.ndarray
    pull_norm: np.ndarray
    noise_norm: np.ndarray
    step_bias: np.ndarray
    arrival: np.ndarray
    distance: np.ndarray
    stopped: dict[int, int]
    at_once: int
    one_by_one_because: str | None

    @property
    def running(self) -> list[int]:
        """The chains that came to their end."""
        return [c for c in range(self.settings.chains) if c not in self.stopped]


class Diverged(MeasurementError):
    """The loss became infinite or NaN in every one of `chains`."""

    def __init__(self, chains: Chains):
        chain, step = min(chains.stopped.items(), key=lambda item: item[1])
        self.chains = chains
        super().__init__(
            f"sampling: the loss became infinite or NaN in all {chains.settings.chains} chains, first in chain {chain} "
            f"at step {step}; lower epsilon, or raise gamma. nbeta={chains.nbeta:g} (n={chains.n}), {chains.settings}"
        )


def sample(
    model: nn.Module,
    loss_fn: LossFn,
    data: tuple[torch.Tensor, torch.Tensor],
    settings: Settings,
    *,
    seed: int,
    masks: Masks | None = None,
    at_once: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Chains:
    """Run `settings.chains` chains from the model's own weights; the model is left as it was.

    `data`, `loss_fn` and `masks` as in `losses.Loss`. `at_once`: how many chains share a step; by default all where
    `torch.func.vmap` can compute the model, and on a CPU where it pays: not for convolutions, nor for few chains; else
    one. `progress` is told of every so many chain-steps.

    Raises MeasurementError for what does not fit, and its `Diverged` if every chain was stopped.
    """
    loss = Loss(model, loss_fn, data, masks)
    if settings.batch_size is not None and settings.batch_size > loss.n:
        raise MeasurementError(
            f"sampling: expected batch_size of at most n = {loss.n}, got {settings.batch_size}; None takes all examples"
        )
    why, size = _group_size(loss, settings, at_once)
    nbeta = default_nbeta(loss.n) if settings.nbeta is None else float(settings.nbeta)
    with torch.no_grad():
        origin = [view[0] for view in loss.views(loss.start[None])]
        initial = float(loss.whole(lambda x, y: loss.value(origin, x, y), settings.batch_size))
    if not math.isfinite(initial):
        raise MeasurementError(f"sampling: the loss of the model itself is {initial}; expected a finite one")
    parts: list[dict[str, np.ndarray]] = []
    stopped: dict[int, int] = {}
    for first in range(0, settings.chains, size):
        group = range(first, min(first + size, settings.chains))
        part, ends = _run(loss, settings, nbeta, initial, group, seed, together=size > 1, progress=progress)
        parts.append(part)
        stopped |= ends
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = Chains(
        settings=settings, seed=seed, n=loss.n, nbeta=nbeta, num_parameters=loss.count, initial_loss=initial,
        resolution=abs(initial) * torch.finfo(loss.dtype).eps,
        stopped=stopped, at_once=size, one_by_one_because=why, **joined,
    )  # fmt: skip
    if not found.running:
        raise Diverged(found)
    return found


def _group_size(loss: Loss, settings: Settings, at_once: int | None) -> tuple[str | None, int]:
    """Why chains go one by one, if they do not have to; and how many share a step."""
    if at_once is not None and not _whole(at_once, 1):
        raise MeasurementError(f"sampling: expected at_once as an int of at least 1, or None; got {at_once!r}")
    if min(settings.chains, at_once or settings.chains) == 1:
        return None, 1
    if at_once is None and loss.device.type == "cpu":
        if settings.chains < WORTH_A_CALL:
            return f"on a CPU, fewer than {WORTH_A_CALL} chains take longer in one call than one after another", 1
        if any(isinstance(part, nn.modules.conv._ConvNd) for part in loss.module.modules()):
            return "on a CPU, convolutions of several chains in one call take longer than one after another", 1
    why = loss.why_not_together()
    if why is None:
        return None, min(settings.chains, at_once or settings.chains)
    if at_once is not None:
        raise MeasurementError(
            f"sampling: {at_once} chains at once cannot be computed for this model: {why}; leave at_once"
        )
    return why, 1


def _run(
    loss: Loss,
    settings: Settings,
    nbeta: float,
    initial: float,
    group: range,
    seed: int,
    *,
    together: bool,
    progress: Callable[[int], object] | None,
) -> tuple[dict[str, np.ndarray], dict[int, int]]:
    """Run the chains of a group; what they left by field of `Chains`, and where chains were stopped."""
    count, steps, device = len(group), settings.steps, loss.device
    weights = loss.start.repeat(count, 1)
    gradients = torch.empty_like(weights)
    rows: Rows = (Together if together else Alone)(loss, weights, gradients)
    walk = WALKS[settings.sampler](loss, settings, nbeta, weights, gradients)
    box = Box(loss.start, settings.box, weights) if settings.box is not None else None
    noise = _Noise(seed, group, loss)
    batches = _Batches(seed, group, loss, settings.batch_size)

    trace = torch.full((steps + 1, count), math.nan, dtype=loss.dtype, device=device)
    excess = torch.full((settings.draws, count), math.nan, dtype=torch.float64, device=device)
    distance = torch.full_like(excess, math.nan)
    checks = {int(at): place for place, at in enumerate(_spread(settings))}
    checked = torch.full((len(checks), 6, count), math.nan, dtype=torch.float64, device=device)
    offset = torch.empty_like(weights)

    looked = 0
    for step in range(steps + 1):
        inputs, labels, shared = batches.next()
        losses = rows.gradient(inputs, labels, shared=shared)
        trace[step] = losses
        kept = step - settings.burn_in
        if kept > 0 and kept % settings.thin == 0:
            draw = kept // settings.thin - 1
            if shared:
                excess[draw] = losses.double() - initial
            elif settings.losses == "batch":
                excess[draw] = losses.double() - rows.at_start(inputs, labels)
            else:
                excess[draw] = loss.whole(lambda x, y: rows.value(x, y, shared=True), settings.batch_size) - initial
            distance[draw] = torch.linalg.vector_norm(torch.sub(weights, loss.start, out=offset), dim=1)
        if step == steps or step % STRIDE == STRIDE - 1:
            alive = bool(torch.isfinite(trace[step]).any())
            if progress is not None:
                progress((min(step + 1, steps) - looked) * count)
            looked = step + 1
            if not alive or step == steps:
                break
        noise.next()
        if step in checks:
            batch = (inputs, labels, shared, losses)
            checked[checks[step]] = _check(
                loss, settings, nbeta, rows, weights, gradients, noise.now, walk.scale, box, batch
            )
        walk.step(step, noise.now)
        if box is not None:
            walk.reflected(box.fold())
    traces = trace.double().T.cpu().numpy()
    lost = ~np.isfinite(traces[:, : step + 1])
    sound = torch.isfinite(weights).all(1).cpu().numpy()  # of the last update; all others have their loss
    stopped = {
        chain: int(np.argmax(lost[row])) if lost[row].any() else steps
        for row, chain in enumerate(group)
        if lost[row].any() or not sound[row]
    }
    for row, chain in enumerate(group):
        if chain in stopped:
            excess[:, row] = math.nan
    acceptance, gradient, pull, noise_norm, step_bias, arrival = checked.permute(1, 2, 0).cpu().numpy()
    return {
        "excess": excess.T.cpu().numpy(),
        "trace": traces,
        "acceptance": acceptance,
        "gradient_norm": gradient,
        "pull_norm": pull,
        "noise_norm": noise_norm,
        "step_bias": step_bias,
        "arrival": arrival,
        "distance": distance.T.cpu().numpy(),
    }, stopped


def _spread(settings: Settings) -> np.ndarray:
    """The steps after burn-in that are checked: the middles of equal parts."""
    after = settings.steps - settings.burn_in
    count = min(settings.checks, after)
    return settings.burn_in + ((np.arange(count) + 0.5) * after / count).astype(int)


class Walk(Protocol):
    """One update of all chains, in place. `scale` (C, p) is the preconditioner G, or None for 1."""

    @property
    def scale(self) -> torch.Tensor | None: ...

    def step(self, number: int, noise: torch.Tensor) -> None:
        """Update the weights from their gradients and standard normal noise (C, p)."""

    def reflected(self, signs: torch.Tensor) -> None:
        """Told, as −1 and 1, which coordinates were turned round at the wall of the box."""


class Langevin:
    """sgld."""

    scale: torch.Tensor | None = None

    def __init__(self, loss: Loss, settings: Settings, nbeta: float, weights: torch.Tensor, gradients: torch.Tensor):
        self.weights, self.gradients = weights, gradients
        self.start = loss.start.expand_as(weights)
        half = settings.epsilon / 2
        self.pull, self.slope, self.spread = half * settings.gamma, half * nbeta, math.sqrt(settings.epsilon)

    def step(self, number: int, noise: torch.Tensor) -> None:
        self.weights.lerp_(self.start, self.pull)
        self.weights.add_(self.gradients, alpha=-self.slope).add_(noise, alpha=self.spread)

    def reflected(self, signs: torch.Tensor) -> None:
        """The chain has no momentum to turn round."""


class Preconditioned:
    """rmsprop."""

    scale: torch.Tensor

    def __init__(self, loss: Loss, settings: Settings, nbeta: float, weights: torch.Tensor, gradients: torch.Tensor):
        self.weights, self.gradients, self.nbeta, self.settings = weights, gradients, nbeta, settings
        self.start = loss.start.expand_as(weights)
        self.squares = torch.zeros_like(weights)
        self.scale = torch.empty_like(weights)
        self.root, self.drift = torch.empty_like(weights), torch.empty_like(weights)

    def step(self, number: int, noise: torch.Tensor) -> None:
        given = self.settings
        if number < given.burn_in:
            self.squares.mul_(given.decay).addcmul_(self.gradients, self.gradients, value=1 - given.decay)
            torch.div(self.squares, 1 - given.decay ** (number + 1), out=self.scale)
            self.scale.sqrt_().add_(given.stabilizer).reciprocal_()
            torch.sqrt(self.scale, out=self.root)
        torch.sub(self.weights, self.start, out=self.drift)
        self.drift.mul_(given.gamma).add_(self.gradients, alpha=self.nbeta)
        self.weights.addcmul_(self.drift, self.scale, value=-given.epsilon / 2)
        self.weights.addcmul_(noise, self.root, value=math.sqrt(given.epsilon))

    def reflected(self, signs: torch.Tensor) -> None:
        """The chain has no momentum to turn round."""


class NoseHoover:
    """sgnht."""

    scale: torch.Tensor | None = None

    def __init__(self, loss: Loss, settings: Settings, nbeta: float, weights: torch.Tensor, gradients: torch.Tensor):
        self.weights, self.gradients, self.nbeta, self.settings = weights, gradients, nbeta, settings
        self.start = loss.start.expand_as(weights)
        self.drift, self.velocity = torch.empty_like(weights), torch.zeros_like(weights)
        self.friction = torch.full_like(weights[:, :1], settings.friction)
        self.heat = torch.empty_like(self.friction)
        self.keep = torch.empty_like(self.friction)
        self.rest = loss.count * settings.epsilon / 2  # |v|² at temperature 1

    def step(self, number: int, noise: torch.Tensor) -> None:
        given = self.settings
        torch.sub(self.weights, self.start, out=self.drift)
        self.drift.mul_(given.gamma).add_(self.gradients, alpha=self.nbeta)
        torch.neg(self.friction, out=self.keep).add_(1)
        self.velocity.mul_(self.keep).add_(self.drift, alpha=-given.epsilon / 2)
        self.velocity.add_(noise, alpha=math.sqrt(given.friction * given.epsilon))
        self.weights.add_(self.velocity)
        torch.linalg.vector_norm(self.velocity, dim=1, keepdim=True, out=self.heat)
        self.heat.square_().div_(self.rest).mul_(self.keep.add_(1).div_(2)).sub_(1)
        self.friction.add_(self.heat, alpha=given.friction**2 / 2)

    def reflected(self, signs: torch.Tensor) -> None:
        self.velocity.mul_(signs)


WALKS: dict[str, Callable[..., Walk]] = {"sgld": Langevin, "rmsprop": Preconditioned, "sgnht": NoseHoover}


class Box:
    """Walls at a distance `half` from w*, coordinate by coordinate, at which weights are reflected."""

    def __init__(self, start: torch.Tensor, half: float, weights: torch.Tensor):
        self.start, self.half, self.weights = start, half, weights
        self.signs = torch.empty_like(weights)

    def fold(self) -> torch.Tensor:
        """Reflect in place until all are inside; −1 where a coordinate's direction is turned round by it, else 1."""
        half, turned = self.half, self.signs
        torch.sub(self.weights, self.start, out=turned).add_(half).remainder_(4 * half).neg_().add_(2 * half)
        torch.abs(turned, out=self.weights).neg_().add_(half).add_(self.start)
        return turned.sign_()


def _check(
    loss: Loss,
    settings: Settings,
    nbeta: float,
    rows: Rows,
    weights: torch.Tensor,
    gradients: torch.Tensor,
    noise: torch.Tensor,
    scale: torch.Tensor | None,
    box: Box | None,
    batch: tuple[torch.Tensor, torch.Tensor, bool, torch.Tensor],
) -> torch.Tensor:
    """(6, C): acceptance of a Langevin step from here, lengths of its gradient, pull and noise, its bias, and arrival.

    With Δ the step, g and g' the gradients of L at both ends of it, b and b' those of log π, and the preconditioner
    held still, log α = nβ (L − L') + nβ/2 Δ·(g + g') + ε/8 (b·Gb − b'·Gb'); what localisation adds to the first two
    terms cancels exactly. In a box the step goes on unfolded behind the wall, where the loss is its mirror image.
    """
    inputs, labels, shared, before = batch
    epsilon, gamma = settings.epsilon, settings.gamma
    w, g = weights.clone(), gradients.clone()
    metric = torch.ones((), dtype=w.dtype, device=w.device) if scale is None else scale
    pull = gamma * (w - loss.start)
    b = -(nbeta * g + pull)
    shake = noise * (epsilon * metric).sqrt()
    delta = epsilon / 2 * metric * b + shake
    weights.add_(delta)
    signs = box.fold() if box is not None else torch.ones((), dtype=w.dtype, device=w.device)
    after = rows.gradient(inputs, labels, shared=shared)
    offset = weights - loss.start
    g2 = gradients * signs
    b2 = -(nbeta * g2 + gamma * offset * signs)

    def dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.sum(one * other, dim=1, dtype=torch.float64)

    log_alpha = nbeta * (before.double() - after.double()) + nbeta / 2 * dot(delta, g + g2)
    log_alpha += epsilon / 8 * dot(metric * (b - b2), b + b2)
    if box is not None:
        d = w - loss.start
        log_alpha += gamma / 2 * (dot(d, d) - dot(offset, offset) + dot(delta, d + offset * signs))
    weights.copy_(w)
    gradients.copy_(g)
    parts = (nbeta * epsilon / 2 * metric * g, epsilon / 2 * metric * pull, shake)
    norms = [torch.linalg.vector_norm(part, dim=1).double() for part in parts]
    log_alpha.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # a step to where the loss is not finite
    moving = (
        loss.count if scale is None else (scale if loss.mask is None else scale * loss.mask).sum(1, dtype=torch.float64)
    )
    arrival = -dot(w - loss.start, metric * b) / moving
    bias = -epsilon / 8 * nbeta * dot(g, metric * b)
    return torch.stack([log_alpha.clamp(max=0).exp(), *norms, bias, arrival])


def _generators(seed: int, stream: int, group: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """One for each chain. On a CPU torch reads 32 bits of a seed: an odd multiple keeps chains apart in them."""
    base = int(words(seed, stream).random_raw())
    return [torch.Generator(device).manual_seed((base + 0x9E3779B9 * chain) % 2**32) for chain in group]


class _Noise:
    """Standard normal numbers (C, p) for each step; `now` is the step's own. Masked weights get none."""

    def __init__(self, seed: int, group: range, loss: Loss):
        self.generators = _generators(seed, NOISE, group, loss.device)
        size = len(loss.start)
        self.ahead = max(1, BLOCK // size)  # of p alone: a chain's draws must not depend on the number of chains
        self.block = torch.empty(len(group), self.ahead, size, dtype=loss.dtype, device=loss.device)
        self.mask, self.used = loss.mask, self.ahead
        self.now = self.block[:, 0]

    def next(self) -> None:
        if self.used == self.ahead:
            for row, generator in zip(self.block, self.generators, strict=True):
                row.normal_(generator=generator)
            if self.mask is not None:
                self.block.mul_(self.mask)
            self.used = 0
        self.now = self.block[:, self.used]
        self.used += 1


class _Batches:
    """The examples of each step: (inputs, labels, shared), for all chains the same ones, or a batch for each."""

    def __init__(self, seed: int, group: range, loss: Loss, size: int | None):
        self.loss, self.size = loss, size
        if size is None:
            return
        self.generators = _generators(seed, BATCHES, group, loss.device)
        self.ahead = max(1, BLOCK // size)
        self.block = torch.empty(len(group), self.ahead, size, dtype=torch.int64, device=loss.device)
        self.used = self.ahead
        self.inputs, self.labels = (
            torch.empty(len(group) * size, *t.shape[1:], dtype=t.dtype, device=t.device)
            for t in (loss.inputs, loss.labels)
        )

    def next(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        loss = self.loss
        if self.size is None:
            return loss.inputs, loss.labels, True
        if self.used == self.ahead:
            for row, generator in zip(self.block, self.generators, strict=True):
                torch.randint(loss.n, row.shape, generator=generator, out=row)
            self.used = 0
        chosen = self.block[:, self.used].flatten()
        self.used += 1
        torch.index_select(loss.inputs, 0, chosen, out=self.inputs)
        torch.index_select(loss.labels, 0, chosen, out=self.labels)
        shape = (len(self.block), self.size)
        return self.inputs.view(*shape, *loss.inputs.shape[1:]), self.labels.view(*shape, *loss.labels.shape[1:]), False

"""Many lasso problems at once, each with its own lambda: accelerated proximal gradient on a batch of quadratics.

Per row of the batch, with the gradient g(u) = g0 − G (u − u0) of the fit (its sign turned, as everywhere here),

    minimise over u   ‖r‖² / 2n + Σ_j threshold_j |u_j|,   u ← soft(y + g(y) / L, threshold / L)

where y runs ahead of u by Nesterov's momentum, dropped whenever it points uphill (O'Donoghue and Candès 2015, the
gradient scheme). Gradients are linear, so that of y is got from those of the last two u: one product with G per
iteration, and the duality gap of u for free. The same product checks the step, eᵀ G e ≤ L eᵀe for e = u − y; where it
fails the step is taken back and L raised to what was seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from datamodels.regression.gpu_columns import gap_of

CHECK = 4  # iterations between two looks at the gaps, each of which waits for the device


def minimise(
    u: torch.Tensor,
    g: torch.Tensor,
    rr: torch.Tensor,
    lam: torch.Tensor,
    penalty: torch.Tensor,
    inverse: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    narrow: Callable[[torch.Tensor], None],
    enough: torch.Tensor,
    lipschitz: torch.Tensor,
    bound: torch.Tensor,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, g, rr, lipschitz) where the gap of each row is at most `enough`, or the iterations are spent.

    u, g (B, m).  rr (B,) = ‖r‖²/n.  lam (B,).  penalty, inverse (m,) or (B, m).  product(d) = G d for the rows at work;
    narrow(rows) tells it that only those rows of them are at work from now on.  lipschitz, bound (B,): a guess of the
    largest eigenvalue, and what it cannot exceed.
    """
    out = [u.clone(), g.clone(), rr.clone(), lipschitz.clone()]
    rows = torch.arange(len(u), device=u.device)
    dtype, wide = u.dtype, penalty.ndim == 2
    at, at_g, power, L, t = u, g, rr, lipschitz, torch.ones_like(lam)  # the points reached, and those run ahead to
    ahead, ahead_g = u, g
    for iteration in range(1, iterations + 1):
        step = (1 / L).to(dtype)[:, None]
        cut = step * lam.to(dtype)[:, None] * penalty
        new = ahead + step * ahead_g
        new = new.sign() * (new.abs() - cut).clamp_min_(0)
        new_g = at_g - product(new - at)

        e = new - ahead
        ee = e.square().sum(1, dtype=torch.float64)
        seen = (e * (ahead_g - new_g)).sum(1, dtype=torch.float64) / ee.clamp_min(1e-300)
        failed = (ee > 0) & (seen > L * (1 + 1e-3)) & (bound > L)
        uphill = ((ahead - new) * (new - at)).sum(1) > 0
        back = failed[:, None]
        move = torch.where(back, torch.zeros_like(new), new - at)
        change = torch.where(back, torch.zeros_like(new), new_g - at_g)
        power = power - (move * (2 * at_g + change)).sum(1, dtype=torch.float64)
        L = torch.where(failed, torch.minimum(seen * 1.02, bound), L)
        t = torch.where(failed | uphill, torch.ones_like(t), t)
        following = (1 + (1 + 4 * t * t).sqrt()) / 2
        momentum = torch.where(failed | uphill, torch.zeros_like(t), (t - 1) / following).to(dtype)[:, None]
        at = torch.where(back, at, new)  # and not at + move, which would not be 0 where new is
        at_g = at_g + change
        ahead, ahead_g = at + momentum * move, at_g + momentum * change
        t = torch.where(failed | uphill, t, following)

        if iteration % CHECK and iteration < iterations:
            continue
        going = gap_of(at, at_g, power, lam, penalty, inverse) > enough
        left = int(going.sum())
        if left == 0 or left <= 0.6 * len(rows) or iteration == iterations:
            for into, values in zip(out, (at, at_g, power, L), strict=True):
                into[rows] = values
            if left == 0 or iteration == iterations:
                break
            keep = going.nonzero()[:, 0]
            narrow(keep)
            rows, at, at_g, power, L, t = (values[keep] for values in (rows, at, at_g, power, L, t))
            ahead, ahead_g, lam, enough, bound = (values[keep] for values in (ahead, ahead_g, lam, enough, bound))
            if wide:
                penalty, inverse = penalty[keep], inverse[keep]
    return out[0], out[1], out[2], out[3]

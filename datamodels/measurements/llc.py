"""The local learning coefficient of a trained model: how fast the volume of almost as good weights around it shrinks.

    λ̂ = nβ (E L(w) − L(w*))                                               Lau et al., 2023, eq. 9

with the expectation over chains of `samplers`. At finite nβ and with localisation this is not the limit that theory
names (for a regular model, half the number of parameters; ½ a nβ / (a nβ + γ) per direction of curvature a), so n, nβ
and γ stand beside every number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from datamodels.errors import MeasurementError
from datamodels.measurements.losses import LossFn, Masks
from datamodels.measurements.samplers import Chains, Settings, sample

TRUST = "trust"
MOST_STEP_BIAS = 0.05  # of the mean
MOST_ROUNDING = 0.02  # of the mean: nβ times the spacing of numbers at the initial loss
LEAST_ACCEPTANCE = (
    0.6  # for sgnht; over the law of its own chain, a Langevin step on a quadratic never has less than 1/2
)
MOST_RHAT = 1.1  # Gelman and Rubin, 1992
LEAST_ESS = 100  # Vehtari et al., 2021, ask for 50 in each of two halves
MOST_DRIFT_Z, MOST_DRIFT = 3.0, 0.05  # of the last third against the first: in standard errors, and as a share
LEAST_ARRIVAL = 0.75  # and by a standard error more
MOST_BELOW = 0.5
LEAST_Z = 2.0  # standard errors between 0 and the mean
# Acceptance that `choose` looks for. Published advice ends at .95; small models have too large a `step_bias` there, and
# steps so small that chains do not move are not trusted.
BAND = (0.9, 0.99)


class Verdict(NamedTuple):
    """Whether to believe an estimate, in a word or two, and why."""

    word: str
    reason: str


@dataclass(frozen=True)
class Estimate:
    """A local learning coefficient and what there is to know about its chains; stopped chains do not count."""

    chains: Chains

    @property
    def trace(self) -> np.ndarray:
        """nβ (L(w) − L(w*)) of each kept state, (chains, draws); NaN in chains that were stopped."""
        return self.chains.nbeta * self.chains.excess

    @cached_property
    def values(self) -> np.ndarray:
        """The trace of the chains that were not stopped."""
        return self.trace[self.chains.running]

    @property
    def mean(self) -> float:
        """λ̂."""
        return float(self.values.mean())

    @property
    def per_chain(self) -> np.ndarray:
        """λ̂ of each chain, (chains,); NaN for one that was stopped."""
        return self.trace.mean(axis=1)

    @cached_property
    def ess(self) -> float:
        """How many independent draws they are worth."""
        return effective_sample_size(self.values)

    @cached_property
    def standard_error(self) -> float:
        """Of the mean, over draws and chains, autocorrelation and disagreement between chains included."""
        return standard_error(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: 1.96 standard errors to both sides, and below also the `step_bias`, which makes the mean too large."""
        return self.mean - self.step_bias_of_mean - 1.96 * self.standard_error, self.mean + 1.96 * self.standard_error

    @property
    def std(self) -> float:
        """Between the draws."""
        return float(self.values.std())

    @cached_property
    def rhat(self) -> float:
        """Split R̂: 1 where chains, and the halves of each, agree."""
        return split_rhat(self.values)

    @property
    def running(self) -> np.ndarray:
        """λ̂ after each draw, from all draws up to it, (running chains, draws)."""
        return self.values.cumsum(axis=1) / np.arange(1, self.values.shape[1] + 1)

    @property
    def wbic(self) -> float:
        """n times the mean loss; the WBIC (Watanabe, 2013) where nβ is n/ln n."""
        return self.chains.n * (self.chains.initial_loss + self.mean / self.chains.nbeta)

    @property
    def acceptance(self) -> float:
        """Mean Metropolis acceptance probability of a Langevin step of this size."""
        return float(self.chains.acceptance[self.chains.running].mean())

    @property
    def step_bias(self) -> float:
        """What the size of the steps, and the noise of batches, add to the mean: see `Chains`."""
        return float(self.chains.step_bias[self.chains.running].mean())

    @property
    def step_bias_of_mean(self) -> float:
        """How much of the mean may be `step_bias`; 0 for sgnht, whose steps have less of it."""
        return 0.0 if self.chains.settings.sampler == "sgnht" else max(self.step_bias, 0.0)

    @property
    def rounding(self) -> float:
        """nβ times the distance between numbers of the model's dtype at the initial loss."""
        return self.chains.nbeta * self.chains.resolution

    @property
    def share_below(self) -> float:
        """The share of draws whose loss is below that of the model itself."""
        return float((self.values < 0).mean())

    @property
    def drift(self) -> float:
        """Mean of the last third of the draws minus that of the first."""
        return self._drift[0]

    @property
    def drift_z(self) -> float:
        """The drift in its standard errors (Geweke, 1992)."""
        return self._drift[1]

    @property
    def stationary(self) -> bool:
        """Whether the chains have arrived, and the losses of the last third are as those of the first."""
        drifts = abs(self.drift_z) > MOST_DRIFT_Z and abs(self.drift) > MOST_DRIFT * abs(self.mean)
        return not drifts and self._arrived

    @property
    def arrival(self) -> float:
        """How near |w − w*|² is to growing no more: 1 there, 0 at the start; 1 in a box, where nobody can say.

        In chains that have hardly moved the noise of batches hides all change of the loss, and not of this.
        """
        if self.chains.settings.box is not None:
            return 1.0
        return float(self.chains.arrival[self.chains.running].mean())

    @cached_property
    def _arrived(self) -> bool:
        if self.chains.settings.box is not None:
            return True
        table = self.chains.arrival[self.chains.running]
        return self.arrival >= LEAST_ARRIVAL + (standard_error(table) if table.size > 1 else 0.0)

    @cached_property
    def _drift(self) -> tuple[float, float]:
        third = max(1, self.values.shape[1] // 3)
        first, last = self.values[:, :third], self.values[:, -third:]
        drift, error = float(last.mean() - first.mean()), math.hypot(standard_error(first), standard_error(last))
        return drift, drift / error if error > 0 else 0.0

    @cached_property
    def verdict(self) -> Verdict:
        """The first complaint, or `trust`."""
        given, found = self.chains.settings, self.chains
        if found.stopped:
            chain, step = min(found.stopped.items(), key=lambda item: item[1])
            return Verdict(
                "step too large",
                f"the loss became infinite or NaN in {len(found.stopped)} of {given.chains} chains, first in chain "
                f"{chain} at step {step} (epsilon={given.epsilon:g}, gamma={given.gamma:g}, {given.sampler})",
            )
        if given.sampler == "sgnht" and self.acceptance < LEAST_ACCEPTANCE:
            return Verdict(
                "step too large",
                f"Langevin steps of epsilon={given.epsilon:g} are accepted with probability {self.acceptance:.2f}; "
                f"lower it",
            )
        if self.rounding > MOST_ROUNDING * abs(self.mean):
            return Verdict(
                "too few digits",
                f"a loss of {found.initial_loss:.4g} is known to {self.chains.resolution:.2g}, which nbeta makes "
                f"{self.rounding:.2g} of a mean of {self.mean:.3g}; use float64, or a loss on another scale",
            )
        if self.step_bias_of_mean > MOST_STEP_BIAS * abs(self.mean):
            return Verdict(
                "step too large",
                f"steps of epsilon={given.epsilon:g} and the noise of batches add up to {self.step_bias:.3g} to a mean "
                f"of {self.mean:.3g}; lower epsilon, take larger batches, or let sgnht cool them",
            )
        fell = self.mean < -LEAST_Z * self.standard_error
        if not fell and not self.stationary:
            pull = f", where localisation alone takes {2 / (given.epsilon * given.gamma):.3g}" if given.gamma else ""
            how = (
                f"chains are still on their way out: |w - w*|^2 grows at {1 - self.arrival:.0%} of the speed it began "
                f"with (at most {1 - LEAST_ARRIVAL:.0%} will do, by a standard error)"
                if not self._arrived
                else f"the last third of the draws has a mean {self.drift:+.3g} from the first's, "
                f"{abs(self.drift_z):.1f} standard errors"
            )
            return Verdict(
                "not stationary",
                f"{how}, in {given.steps} steps{pull}; raise burn_in (now {given.burn_in}), epsilon (now "
                f"{given.epsilon:g}) or gamma (now {given.gamma:g})",
            )
        if self.mean <= 0 or self.share_below > MOST_BELOW:
            return Verdict(
                "not localised",
                f"{self.share_below:.0%} of the draws have a lower loss than the model itself (mean {self.mean:.3g}): "
                f"it is not at a minimum, or chains left it; raise gamma (now {given.gamma:g}), or train longer",
            )
        if given.chains == 1:
            return Verdict("one chain", "nothing says whether another chain would agree; raise chains (now 1)")
        if self.rhat > MOST_RHAT:
            return Verdict(
                "chains disagree",
                f"split R-hat is {self.rhat:.2f}, above {MOST_RHAT}; more draws, or a larger epsilon that is still "
                f"accepted",
            )
        if self.ess < LEAST_ESS or self.mean < LEAST_Z * self.standard_error:
            return Verdict(
                "too few draws",
                f"{self.values.size} draws are worth {self.ess:.0f} independent ones, of a mean of {self.mean:.3g} "
                f"with a standard error of {self.standard_error:.2g}; {LEAST_ESS}, and a mean of {LEAST_Z:g} errors, "
                f"are needed: raise draws, thin or chains",
            )
        return Verdict(
            TRUST,
            f"R-hat {self.rhat:.3f}, {self.ess:.0f} effective draws, acceptance {self.acceptance:.2f}, stationary",
        )

    def columns(self) -> dict[str, float | int | bool | str]:
        """Everything that is one number or one word, by name: a row of a table."""
        found = self.chains
        return {
            "llc": self.mean, "llc_se": self.standard_error, "llc_std": self.std, "wbic": self.wbic,
            "initial_loss": found.initial_loss, "n": found.n, "nbeta": found.nbeta,
            "num_parameters": found.num_parameters,
            "rhat": self.rhat, "arrival": self.arrival, "ess": self.ess, "acceptance": self.acceptance,
            "step_bias": self.step_bias, "share_below": self.share_below,
            "drift_z": self.drift_z, "stationary": self.stationary, "chains_stopped": len(found.stopped),
            "gradient_norm": float(found.gradient_norm[found.running].mean()),
            "pull_norm": float(found.pull_norm[found.running].mean()),
            "noise_norm": float(found.noise_norm[found.running].mean()),
            "distance": float(found.distance[found.running].mean()),
            "verdict": self.verdict.word, "reason": self.verdict.reason,
        }  # fmt: skip

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"LLC {self.mean:.4g} [{low:.4g}, {high:.4g}] at nbeta {self.chains.nbeta:.4g} (n={self.chains.n}), gamma "
            f"{self.chains.settings.gamma:g}: {self.verdict.word}: {self.verdict.reason}"
        )


def estimate(
    model: nn.Module,
    loss_fn: LossFn,
    data: tuple[torch.Tensor, torch.Tensor],
    settings: Settings,
    *,
    seed: int,
    masks: Masks | None = None,
    at_once: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Estimate:
    """The local learning coefficient of a model at its own weights; arguments and errors are those of `sample`."""
    return Estimate(sample(model, loss_fn, data, settings, seed=seed, masks=masks, at_once=at_once, progress=progress))


class Choice(NamedTuple):
    """Which row of a sweep to use, and why; no row where none will do."""

    row: int | None
    reason: str


def choose(
    acceptance: Sequence[float] | np.ndarray,
    verdict: Sequence[str] | np.ndarray,
    ess: Sequence[float] | np.ndarray,
    gamma: Sequence[float] | np.ndarray,
    *,
    band: tuple[float, float] = BAND,
) -> Choice:
    """The row to use of those that are trusted and accept within the band: the least gamma, then the most draws.

    Not the highest acceptance: that only means the smallest step, which does not move. Nor the most effective draws
    of all: the more localisation, the faster chains mix, and the less of the valley they see.

    Raises MeasurementError for columns of different lengths, or an empty band.
    """
    columns = [np.asarray(acceptance, float), np.asarray(verdict), np.asarray(ess, float), np.asarray(gamma, float)]
    low, high = band
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1 or not len(columns[0]):
        raise MeasurementError(f"choose: expected columns of one length, got {[column.shape for column in columns]}")
    if not 0 <= low < high <= 1:
        raise MeasurementError(f"choose: expected a band within [0, 1], its lower end first; got {band}")
    accepted, words, worth, pull = columns
    within = (accepted >= low) & (accepted <= high)
    trusted = words == TRUST
    eligible = np.flatnonzero(within & trusted & np.isfinite(worth))
    if len(eligible) == 0:
        others = ", ".join(f"{(words == word).sum()} {word}" for word in np.unique(words) if word != TRUST)
        sure = np.nan_to_num(accepted[trusted] if trusted.any() else accepted)
        return Choice(
            None,
            f"{int(within.sum())} of {len(accepted)} rows accept within [{low:g}, {high:g}], {int(trusted.sum())} are "
            f"trusted{f' ({others})' * bool(others)}, none is both; acceptance of "
            f"{'those' if trusted.any() else 'all'} runs from {sure.min():.3f} to {sure.max():.3f}: try "
            f"epsilons between, or longer chains",
        )
    least = eligible[pull[eligible] == pull[eligible].min()]
    best = int(least[np.argmax(worth[least])])
    return Choice(
        best,
        f"acceptance {accepted[best]:.3f} within [{low:g}, {high:g}], trusted; gamma {pull[best]:g} is the least of "
        f"{len(eligible)} such rows, {worth[best]:.0f} effective draws the most of {len(least)} with it",
    )


def effective_sample_size(values: np.ndarray) -> float:
    """How many independent draws the mean of values (chains, draws) is worth.

    Autocorrelations of split chains, with the variance between chains in them, summed while Geyer's initial pairs stay
    positive and made monotone (Vehtari et al., 2021, section 3.2; Geyer, 1992). 1 where all values are the same.
    """
    values = _split(_table(values))
    chains, draws = values.shape
    within, total = _variances(values)
    if not total > 0:
        return 1.0
    if draws < 4:
        return float(chains)
    covariance = _autocovariance(values).mean(axis=0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    pairs = rho[: draws // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    positive = pairs[: ends[0]] if len(ends) else pairs
    time = -1 + 2 * np.minimum.accumulate(positive).sum()
    count = chains * draws
    return float(min(count / max(time, 1e-300), count * math.log10(count)))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values (chains, draws), correlated within chains: their deviation over √(effective draws).

    Infinite for a single value.
    """
    values = _table(values)
    if values.size == 1:
        return math.inf
    _, total = _variances(_split(values))
    return math.sqrt(total / effective_sample_size(values))


def split_rhat(values: np.ndarray) -> float:
    """R̂ of the halves of all chains, values (chains, draws) (Gelman et al., 2013, section 11.4)."""
    within, total = _variances(_split(_table(values)))
    return math.sqrt(total / within) if within > 0 else (1.0 if not total > 0 else math.inf)


def _table(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise MeasurementError(
            f"chains: expected finite values (chains, draws), got shape {values.shape} or NaN among them"
        )
    return values


def _split(values: np.ndarray) -> np.ndarray:
    """The halves of each chain as chains of their own; of an odd number of draws the middle one is left out."""
    half = values.shape[1] // 2
    return values if half == 0 else np.concatenate([values[:, :half], values[:, -half:]])


def _variances(values: np.ndarray) -> tuple[float, float]:
    """The mean variance within chains, and the variance of all with that between chains in it."""
    chains, draws = values.shape
    within = float(values.var(axis=1, ddof=1).mean()) if draws > 1 else 0.0
    between = float(values.mean(axis=1).var(ddof=1)) if chains > 1 else 0.0
    return within, within * (draws - 1) / draws + between


def _autocovariance(values: np.ndarray) -> np.ndarray:
    """Of each chain, at every lag, (chains, draws); unbiased up to the factor (draws − lag)/draws."""
    draws = values.shape[1]
    size = 1 << (2 * draws - 1).bit_length()
    spectrum = np.fft.rfft(values - values.mean(axis=1, keepdims=True), size)
    return np.fft.irfft(spectrum * spectrum.conj(), size)[:, :draws] / (draws - 1)

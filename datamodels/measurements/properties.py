"""What a model is like by itself, or in what it makes of data: norms, geometry of features, symmetries, sharpness."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.errors import MeasurementError
from datamodels.measurements.benefits import image_array
from datamodels.measurements.library import attribute, measurement
from datamodels.measurements.transferability import SmallSampleWarning

if TYPE_CHECKING:
    import torch

Pixels = np.ndarray

TRANSFORMATIONS: dict[str, Callable[[Pixels], Pixels]] = {
    "flip": lambda images: images[..., ::-1],
    "shift": lambda images: np.roll(images, max(1, images.shape[-1] // 8), axis=-1),
    "rotation": lambda images: np.rot90(images, axes=(-2, -1)),
    "invert": lambda images: 1 - images,
}
_GIVEN = ("flip", "shift", "rotation")
MISSED = 0.05  # of the spectrum's width, that the largest eigenvalue may be higher than found, with probability 0.01
CHANCE = 0.1  # of a factor's entropy, that chance may tell before a warning


@measurement(columns={"l2": (), "rms": (), "spectral": ()})
def weight_norms(model: torch.nn.Module) -> dict[str, float]:
    """Of all parameters together: `l2`, and `rms` = l2/√count; `spectral`: the largest singular value of any weight.

    Weights are the parameters of two axes or more, an (o, i, …) one read as the matrix (o, i · …).
    """
    import torch

    parameters = [p.detach().double() for p in model.parameters()]
    if not parameters:
        raise MeasurementError("weight_norms: the model has no parameters")
    squares = math.fsum(float(p.square().sum()) for p in parameters)
    matrices = [p.flatten(1) for p in parameters if p.ndim > 1]
    return {
        "l2": math.sqrt(squares),
        "rms": math.sqrt(squares / sum(p.numel() for p in parameters)),
        "spectral": max((float(torch.linalg.matrix_norm(m, ord=2)) for m in matrices), default=0.0),
    }


@measurement()
def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the singular values over their sum, features (n, d) centred; in [1, min(n − 1, d)].

    Roy & Vetterli 2007, definition 1. It does not change with scale or rotation of the features.
    """
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    if not values.sum() > 1e-12 * np.abs(features).sum():
        raise MeasurementError("effective_rank: all examples have the same features")
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


@measurement()
def anisotropy(features: np.ndarray) -> float:
    """Mean cosine between the features of two different examples (Ethayarajh 2019, section 3.1), over all pairs.

    The cosine with an example whose features are all 0 counts as 0.
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    seen = int((lengths > 0).sum())
    if len(features) < 2 or not seen:
        raise MeasurementError("anisotropy: expected two examples or more, and features that are not all 0")
    total = (features / np.where(lengths > 0, lengths, 1)).sum(0)
    return float((total @ total - seen) / (len(features) * (len(features) - 1)))


def _by_transformation(transformations: Sequence[str] | str, **_: Any) -> dict[str, tuple[int, ...]]:
    return {name.rpartition(".")[2]: () for name in _listed(transformations)}


@measurement(columns=_by_transformation)
def invariance(
    embed: Callable[[Any], np.ndarray],
    inputs: np.ndarray,
    features: np.ndarray,
    transformations: Sequence[str] | str = _GIVEN,
) -> dict[str, float]:
    """1 − mean ‖f(Tx) − f(x)‖² / mean ‖f(x′) − f(x)‖² for each transformation T: 1 where f does not see T.

    x′ is any other example, so 0 says that T moves the features as far as another image would. Transformations are
    flip, shift (an eighth of the width, around the edge), rotation (a quarter turn), invert, or dotted paths of
    functions of images (n, c, h, w) in [0, 1].
    """
    n = len(features)
    spread = 2 * n / (n - 1) * features.var(0).sum() if n > 1 else 0.0
    if not spread > 0:
        raise MeasurementError("invariance: all examples have the same features")
    moved = _transformed(embed, inputs, transformations)
    return {name: float(1 - ((f - features) ** 2).sum(1).mean() / spread) for name, f in moved}


@measurement(columns=_by_transformation)
def equivariance(
    embed: Callable[[Any], np.ndarray],
    inputs: np.ndarray,
    features: np.ndarray,
    transformations: Sequence[str] | str = _GIVEN,
    seed: int = 0,
) -> dict[str, float]:
    """How well a linear map of f(x) gives f(Tx), for each transformation T: R² on the half that did not fit the map.

    1 where T acts on the features as one linear map (Lenc & Vedaldi 2015, section 3), whether or not it leaves them as
    they are. The map is ridge regression with its penalty chosen by leave-one-out on its own half, so it is defined
    for fewer examples than features. Transformations as for `invariance`.
    """
    from sklearn.linear_model import RidgeCV

    if len(features) < 10:
        raise MeasurementError(f"equivariance: expected ten examples or more, got {len(features)}")
    order = np.random.default_rng(seed).permutation(len(features))
    fit, held = order[::2], order[1::2]
    scale = features[fit].std() or 1.0
    found = {}
    for name, moved in _transformed(embed, inputs, transformations):
        spread = ((moved[held] - moved[held].mean(0)) ** 2).sum()
        if not spread > 0:
            raise MeasurementError(f"equivariance, {name}: all transformed examples have the same features")
        model = RidgeCV(np.logspace(-8, 4, 13)).fit(features[fit] / scale, moved[fit])
        found[name] = float(1 - ((model.predict(features[held] / scale) - moved[held]) ** 2).sum() / spread)
    return found


def _listed(transformations: Sequence[str] | str) -> list[str]:
    return [transformations] if isinstance(transformations, str) else list(transformations)


def _transformed(
    embed: Callable[[Any], np.ndarray], inputs: np.ndarray, transformations: Sequence[str] | str
) -> Iterator[tuple[str, np.ndarray]]:
    """The features (n, d) of the transformed images, by the transformation's name."""
    images = image_array(inputs, "transformations")
    for name in _listed(transformations):
        if "." in name:
            function = attribute(name, f"transformation {name!r}")
        elif name in TRANSFORMATIONS:
            function = TRANSFORMATIONS[name]
        else:
            raise MeasurementError(
                f"there is no transformation {name!r}; expected one of {', '.join(TRANSFORMATIONS)}, or a dotted path"
            )
        moved = np.ascontiguousarray(function(images), dtype=np.float32)
        if moved.shape != images.shape:
            raise MeasurementError(f"transformation {name!r}: images {images.shape} became {moved.shape}")
        yield name.rpartition(".")[2], embed(moved)


@measurement()
def sharpness(
    model: torch.nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int = 0,
    batch_size: int = 250,
    tolerance: float = 0.01,
    iterations: int = 500,
) -> float:
    """Largest eigenvalue of the Hessian of the mean loss, by Lanczos: power iteration that forgets no step.

    Hessian-vector products by differentiating twice, at most `iterations`; beside the gradients it holds four vectors
    as long as the parameters. It ends where two things hold of the value λ (the largest Ritz value, never above the
    eigenvalue but by rounding): the residual ‖Hv − λv‖ is at most tolerance · |λ|, so an eigenvalue is that near; and
    the products are so many, some 25, that with probability 0.99 over the random start no eigenvalue is above λ by
    more than 5 % (or the tolerance, if that is more) of the whole spectrum's width, whatever the spectrum (Kuczyński &
    Woźniakowski 1992, theorem 4.2). Most are found far closer. MeasurementError where `iterations` do not get there.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise MeasurementError("sharpness: no parameter of the model takes a gradient")
    device = parameters[0].device
    inputs, labels = data

    def product(direction: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(direction)
        parts = [
            p.view_as(q) for p, q in zip(direction.split([q.numel() for q in parameters]), parameters, strict=True)
        ]
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
                loss = loss_fn(model(x.to(device)), y.to(device)) * (len(y) / len(labels))
                first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                slope = sum((g * v).sum() for g, v in zip(first, parts, strict=True) if g is not None)
                second = torch.autograd.grad(slope, parameters, allow_unused=True)
            total += torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(second, parameters, strict=True)]
            )
        return total

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(sum(p.numel() for p in parameters), generator=generator).to(device, parameters[0].dtype)
    return _largest_eigenvalue(product, start, tolerance, iterations)


def _largest_eigenvalue(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, tolerance: float, iterations: int
) -> float:
    """Lanczos without reorthogonalisation, whose rounding adds copies of eigenvalues and no others (Paige 1980)."""
    import torch
    from scipy.linalg import eigh_tridiagonal

    eps = torch.finfo(start.dtype).eps
    missed = max(tolerance, MISSED)  # 1.648 √p exp(−√missed (2k − 1)) ≤ 0.01
    least = math.ceil((1 + math.log(1.648 * math.sqrt(len(start)) / 0.01) / math.sqrt(missed)) / 2)
    alphas: list[float] = []
    betas: list[float] = []
    vector, before, beta, scale = start / start.norm(), torch.zeros_like(start), 0.0, 0.0
    value = residual = float("nan")
    for k in range(iterations):
        image = product(vector).sub_(before, alpha=beta)
        alpha = 0.0
        for _ in range(2):  # what the first time leaves of the vector may be as long as all the rest
            part = float((vector * image).sum(dtype=torch.float64))
            image.sub_(vector, alpha=part)
            alpha += part
        beta = math.sqrt(float(image.square().sum(dtype=torch.float64)))
        if not math.isfinite(alpha) or not math.isfinite(beta):
            raise MeasurementError("sharpness: a Hessian-vector product is not finite")
        alphas.append(alpha)
        values, vectors = eigh_tridiagonal(alphas, betas, select="i", select_range=(k, k))
        value, residual = float(values[0]), beta * abs(float(vectors[-1, 0]))
        scale = max(scale, abs(alpha) + beta)
        if beta <= eps * scale:  # the vectors so far span all that the start has a part in, which is everything
            return value
        if k + 1 >= least and residual <= max(tolerance * abs(value), 8 * eps * scale):
            return value
        betas.append(beta)
        vector, before = image / beta, vector
    raise MeasurementError(
        f"sharpness: after {iterations} products the eigenvalue is {value:.4g} with a residual of {residual:.2g}; "
        f"expected at most {tolerance:g} of it, after {least} products or more; raise ?iterations= or ?tolerance="
    )


@measurement()
def disentanglement(features: np.ndarray, factors: np.ndarray, bins: int = 20) -> float:
    """Mutual information gap, mean over factors: J(z₁; v) − J(z₂; v), z₁ and z₂ the two most telling features.

    Chen et al. 2018, eq. 6, with J = (I − E) / (H(v) − E) in place of I / H(v): E is what I is on average when v is
    shuffled (Vinh et al. 2010), some (levels − 1)² / 2n that I is too high by; less than E counts as 0. 1: each factor
    is told by exactly one feature and wholly; rotated features tell each factor by several, and score less.

    A feature of few values (up to `bins`, or to twice a factor's levels where ten examples share each) is taken as it
    is, any other cut at quantiles into `bins` parts. SmallSampleWarning where E is above a tenth of H(v).
    """
    n, count = factors.shape
    if features.shape[1] < 2:
        raise MeasurementError("disentanglement: expected two features or more")
    for name, values in (("features", features), ("factors", factors)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise MeasurementError(
                f"disentanglement: expected finite {name}; got {values[row, column]} in column {column} of example "
                f"{row}"
            )
    known = []
    for k in range(count):
        values, factor = np.unique(factors[:, k], return_inverse=True)
        if len(values) < 2:
            raise MeasurementError(f"disentanglement: factor {k} has the same value in all {n} examples")
        if len(values) > n / 2:
            raise MeasurementError(
                f"disentanglement: factor {k} has {len(values)} values in {n} examples; expected a few levels each"
            )
        known.append(factor)
    few = max(bins, min(2 * max(int(factor.max()) + 1 for factor in known), n // 10))
    codes = [_levels(column, bins, few) for column in features.T]
    gaps, chances = [], []
    for factor in known:
        expected: dict[bytes, float] = {}  # by a feature's counts, which those cut at quantiles have in common
        told = [_told(code, factor, expected) for code in codes]
        second, first = np.argsort([share for share, _ in told], kind="stable")[-2:]
        gaps.append(told[first][0] - told[second][0])
        chances.append(max(told[first][1], told[second][1]))
    if max(chances) > CHANCE:
        k = int(np.argmax(chances))
        warnings.warn(
            f"disentanglement: with {n} examples, chance alone tells {chances[k]:.0%} of factor {k}'s entropy; use "
            f"some {math.ceil(n * chances[k] / CHANCE)} examples, or fewer ?bins=",
            SmallSampleWarning,
            stacklevel=3,
        )
    return float(np.mean(gaps))


def _levels(column: np.ndarray, bins: int, few: int) -> np.ndarray:
    """Each example's level: the feature's value where it has few of them, otherwise its part between quantiles."""
    values, codes = np.unique(column, return_inverse=True)
    if len(values) > few:
        edges = np.quantile(column, np.arange(1, bins) / bins, method="inverted_cdf")
        codes = np.unique(np.searchsorted(np.unique(edges), column), return_inverse=True)[1]
    return codes


def _told(code: np.ndarray, factor: np.ndarray, expected: dict[bytes, float]) -> tuple[float, float]:
    """(I − E) / (H − E), at least 0, and E / H, of levels that all occur."""
    from sklearn.metrics.cluster import expected_mutual_information

    n, levels = len(factor), int(factor.max()) + 1
    joint = np.bincount(code * levels + factor, minlength=(int(code.max()) + 1) * levels).reshape(-1, levels)
    rows, columns = joint.sum(1), joint.sum(0)
    seen = joint > 0
    information = (joint[seen] * np.log(n * joint[seen] / np.outer(rows, columns)[seen])).sum() / n
    entropy = (columns * np.log(n / columns)).sum() / n
    key = np.sort(rows).tobytes()
    if key not in expected:
        expected[key] = float(expected_mutual_information(joint, n))
    chance = expected[key]
    if entropy - chance < 1e-9 * entropy:  # every example has a level of its own
        return 0.0, 1.0
    return max(0.0, float((information - chance) / (entropy - chance))), chance / entropy


@measurement(columns={
    "": (), "se": (), "rhat": (), "acceptance": (), "step_bias": (), "trusted": (), "n": (), "nbeta": ()
})  # fmt: skip
def llc(
    model: torch.nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int = 0,
    step: float = 0.15,
    gamma: float = 100.0,
    draws: int = 1000,
    burn_in: int = 400,
    chains: int = 4,
    strict: bool = False,
) -> dict[str, float]:
    """Local learning coefficient by SGLD with all examples of `data` in every step (`llc.estimate`).

    A cheap estimate whose step size needs no calibration: h = `step` in ε = h / (nβ · sharpness + γ), which makes it
    too high by 1/(1 − h/4), 4 %, in the stiffest direction and less in others; `step_bias` says by how much. With its
    standard error, R̂, acceptance, whether the estimator itself trusts it (1 or 0), and n and nβ, without which the
    number says nothing. With `strict` one that is not trusted is a failure: MeasurementError with the reason.
    """
    from datamodels.measurements import llc as chains_of
    from datamodels.measurements.samplers import Settings, default_nbeta

    nbeta = default_nbeta(len(data[1]))
    curvature = sharpness.function(model, data, loss_fn, seed=seed)
    settings = Settings(
        epsilon=step / (nbeta * max(curvature, 0.0) + gamma),
        gamma=gamma,
        draws=draws,
        burn_in=burn_in,
        chains=chains,
        losses="all",
    )
    found = chains_of.estimate(model, loss_fn, data, settings, seed=seed)
    trusted = found.verdict.word == chains_of.TRUST
    if strict and not trusted:
        raise MeasurementError(
            f"llc: {found.mean:.4g} is not to be trusted: {found.verdict.word}: {found.verdict.reason}"
        )
    columns = found.columns()
    return {
        "": found.mean,
        "trusted": float(trusted),
        "se": found.standard_error,
        **{name: float(columns[name]) for name in ("rhat", "acceptance", "step_bias", "n", "nbeta")},
    }

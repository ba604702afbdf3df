"""How well a pretrained model's features or predictions suit labelled data, without fine-tuning: higher is better.

Plain functions of numpy arrays or torch tensors. Labels are any integers or text; only classes that are present
count, so that no metric depends on how labels are named or numbered. Logarithms are natural. Every function raises
MeasurementError for what it cannot use: other shapes, values that are not finite, fewer than two classes.

A SmallSampleWarning says that a number rests on too few examples to choose a model by. Compare models by what was
measured on the same examples.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.errors import MeasurementError
from datamodels.learning.data import permutation
from datamodels.measurements import spectrum
from datamodels.measurements.arrays import BLOCK_BYTES, Features, Labels, check_features, encode
from datamodels.measurements.spectrum import EPS, Spectrum

if TYPE_CHECKING:
    import torch

PER_CLASS = 10  # examples a class, on average, below which a metric of classes says little
TEST_EXAMPLES = 100  # held out; below it the standard error of an accuracy may be over 5 %


class SmallSampleWarning(UserWarning):
    """A measurement of too few examples; the message says how many it would take."""


def log_me(features: Any, labels: Any) -> float:
    """Largest log evidence of a Bayesian linear model of each class's 0/1 indicator, nats per example, class mean.

    The evidence is log N(y; 0, F Fᵀ/α + I/β), its maximum over α and β the fixed point of You et al. 2022, "Ranking
    and Tuning Pre-trained Models", JMLR 23, algorithm 3, here found to rounding, and the highest where there are
    several. With t = α/β and the singular values √σ of F it is, per example,
    −½ log(2πe · yᵀ(I + F Fᵀ/t)⁻¹y / n) − 1/(2n) · Σ_i log(1 + σ_i/t).

    features: (n, d). labels: (n,). The same for features times any constant or rotation, and for any order of examples;
    not for shifted features or scaled columns: the model has no bias, and one α. Features that are all 0 give the
    evidence of noise. Where fewer than n directions fit a class exactly, it has no maximum: inf, with a warning.
    """
    where = "log_me"
    checked = check_features(features, where)
    n, d = checked.shape
    classes = encode(labels, where, num=n)
    _warn_small(where, n, classes, 4 * d, f"until n is a few times the {d} features, the evidence mostly rises with n")
    found = spectrum.by_gram(checked, classes)
    value, trusted = _evidence(found, classes.counts)
    if not trusted:
        found = spectrum.exact(checked, classes)
        value, _ = _evidence(found, classes.counts, exact=True)
    if np.isinf(value).any():
        warnings.warn(
            f"{where}: the features fit {int(np.isinf(value).sum())} of {len(value)} classes exactly, so that the "
            f"evidence has no maximum and is inf; it ranks above every finite one, and no further",
            RuntimeWarning,
            stacklevel=2,
        )
    return float(value.mean())


def _evidence(found: Spectrum, counts: np.ndarray, *, exact: bool = False) -> tuple[np.ndarray, bool]:
    """(c,) maximal evidence per example, and whether the spectrum's own error is below 1e-8 there."""
    n, sigma, power, rest = found.n, found.sigma, found.power, found.rest
    if len(sigma) == 0:
        return -0.5 * np.log(2 * np.pi * np.e * counts / n), True
    if exact:
        rest = np.where(rest <= counts * (16 * EPS * max(n, found.d)) ** 2, 0.0, rest)

    def quadratic(shrunk: np.ndarray) -> np.ndarray:  # yᵀ(I + F Fᵀ/t)⁻¹y; shrunk: t/(σ + t)
        return np.maximum(rest + (power * shrunk).sum(axis=1), np.finfo(np.float64).tiny)

    # One bump of the evidence is some units of log t wide, so that steps of one unit miss none. Beyond both ends it
    # is flat or falls.
    grid = np.exp(np.arange(math.log(sigma[0]) - 46, math.log(sigma[-1]) + 35))
    quad = np.maximum(rest[:, None] + power @ (grid / (sigma[:, None] + grid)), np.finfo(np.float64).tiny)
    logs = np.log1p(sigma[:, None] / grid).sum(axis=0)
    on_grid = -0.5 * np.log(2 * np.pi * np.e * quad / n) - logs / (2 * n)
    best = on_grid.argmax(axis=1)
    low = np.log(grid[np.maximum(best - 1, 0)])
    high = np.log(grid[np.minimum(best + 1, len(grid) - 1)])
    for _ in range(52):  # bisection: two units of log t, to their last bit
        middle = (low + high) / 2
        t = np.exp(middle)[:, None]
        kept, shrunk = sigma / (sigma + t), t / (sigma + t)
        # The fixed point, α‖m‖² = γ and β‖y − Fm‖² = n − γ, with α = tβ and β = n / quad.
        rising = kept.sum(axis=1) * quadratic(shrunk) > n * (power * kept * shrunk).sum(axis=1)
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    t = np.exp(low)
    quad = quadratic(t[:, None] / (sigma + t[:, None]))
    value = -0.5 * np.log(2 * np.pi * np.e * quad / n) - np.log1p(sigma / t[:, None]).sum(axis=1) / (2 * n)
    if exact:
        return np.where((rest == 0) & (len(sigma) < n), np.inf, value), True
    lost = counts / quad if n > found.d else 1.0  # by cancellation
    error = EPS * sigma[-1] / np.maximum(t, found.smallest) * (found.d / n + lost)
    return value, bool((error < 1e-8).all())


def leep(probabilities: Any, labels: Any) -> float:
    """Mean log probability of the labels when read off the source classes, ≤ 0.

    log Σ_z P(y_i | z) θ_iz averaged over examples, with P(y, z) = 1/n Σ_{i: y_i = y} θ_iz (Nguyen et al. 2020, "LEEP",
    ICML, equation 2). Source classes without any mass do not count.

    probabilities: θ (n, z), the source model's, rows summing to 1 (softmax of the logits); those that miss it by less
    than 1 % are rescaled. labels: (n,).
    """
    where = "leep"
    checked = check_features(probabilities, where, "probabilities")
    n, z = checked.shape
    classes = encode(labels, where, num=n)
    _warn_small(where, n, classes)
    step = max(1, BLOCK_BYTES // (8 * z))
    blocks = [slice(first, min(first + step, n)) for first in range(0, n, step)]
    total, joint = np.empty(n), np.zeros((classes.num_classes, z))
    for rows in blocks:
        theta = checked.values[rows].astype(np.float64)
        total[rows] = theta.sum(axis=1)
        if theta.min() < 0 or np.abs(total[rows] - 1).max() > 0.01:
            row = int(np.argmax((theta < 0).any(axis=1) | (np.abs(total[rows] - 1) > 0.01)))
            raise MeasurementError(
                f"{where}: expected probabilities of at least 0 whose rows sum to 1; row {rows.start + row} sums to "
                f"{theta[row].sum():.6g}, its least is {theta[row].min():.6g}; take the softmax of the logits"
            )
        joint += classes.indicator(rows, 1 / total[rows]) @ theta
    mass = joint.sum(axis=0)
    conditional = joint / np.where(mass > 0, mass, 1)
    expected = np.empty(n)
    for rows in blocks:
        expected[rows] = np.einsum("iz,iz->i", checked.values[rows], conditional[classes.codes[rows]])
    return float(np.log(expected / total).mean())


def nce(source_labels: Any, labels: Any) -> float:
    """Negative conditional entropy −H(labels | source labels), ≤ 0: 0 where source labels determine the labels.

    Σ_{y,z} P(y, z) log(P(y, z) / P(z)) (Tran et al. 2019, "Transferability and Hardness of Supervised Classification
    Tasks", ICCV). The order matters: first what the source model predicts, then the labels of the data.

    source_labels: (n,), the source model's predicted classes. labels: (n,).
    """
    where = "nce"
    source = encode(source_labels, where, "source labels", least=1)
    classes = encode(labels, where, num=len(source.codes))
    n = len(source.codes)
    cells, counts = np.unique(source.codes * classes.num_classes + classes.codes, return_counts=True)
    # Miller and Madow: so many nats too high, on average, if every cell that is not empty were filled well
    missing = (len(cells) - source.num_classes) / (2 * n)
    if missing > 0.1:
        _warn(f"{where}: {n} examples in {len(cells)} pairs of source class and class: the entropy is too low by about "
              f"{missing:.1f} nats; use more examples, or compare only models with as many source classes")  # fmt: skip
    return float((counts * np.log(counts / source.counts[cells // classes.num_classes])).sum() / n) + 0.0


def h_score(features: Any, labels: Any, *, shrinkage: bool = False) -> float:
    """tr(cov(f)⁺ cov(E[f | y])): variance of the class means in units of the features' own, between 0 and c − 1.

    Bao et al. 2019, "An Information-Theoretic Approach to Transferability in Task Transfer Learning", ICIP. With
    `shrinkage`, tr(((1 − a) cov(f) + a μ I)⁻¹ (1 − a) cov(E[f | y])), a of Ledoit and Wolf 2004 and μ = tr cov(f) / d
    (Ibrahim et al. 2022, "Newer Is Not Always Better", ECML PKDD). All covariances are over n.

    features: (n, d). labels: (n,). Plain, it is the same for any invertible affine map of the features and tends to
    c − 1 as n falls to d, whatever the labels. Shrunk, it is the same for shifts, rotations and one factor for all, and
    bears n < d. Directions whose variance is below max(n, d) roundings of the largest count as absent (plain: once
    every feature has variance 1). Features that do not vary give 0.
    """
    where = "h_score"
    checked = check_features(features, where)
    n, d = checked.shape
    classes = encode(labels, where, num=n)
    if shrinkage:
        _warn_small(where, n, classes)
        used = checked.centred()
    else:
        _warn_small(where, n, classes, 10 * d, "chance alone then gives much of it; take shrinkage=True")
        used = checked.standardised()
    found = spectrum.by_gram(used, classes)
    largest = found.sigma[-1] if len(found.sigma) else 0.0
    a = _ledoit_wolf(used, found) if shrinkage else 0.0
    ridge = a * found.sigma.sum() / d
    absent = max(n, d) * EPS * largest
    if ridge < 1e-8 * largest and ((found.sigma > absent) & (found.sigma < 1e-8 * largest)).any():
        found = spectrum.exact(used, classes)
    kept = found.sigma > absent
    sigma, power = found.sigma[kept], found.power[:, kept]
    weight = (1 - a) * sigma / ((1 - a) * sigma + ridge)
    return float(((power * weight).sum(axis=1) / classes.counts).sum())


def _ledoit_wolf(features: Features, found: Spectrum) -> float:
    """The shrinkage of centred features, in [0, 1] (Ledoit and Wolf 2004, lemma 3.4 and below)."""
    n, d = features.shape
    fourth = 0.0
    for _, block in features.rows():
        fourth += float((np.einsum("ij,ij->i", block, block) ** 2).sum())
    squares = float((found.sigma**2).sum()) / n**2
    away = squares - float(found.sigma.sum() / n) ** 2 / d  # ‖S − μI‖²
    noise = (fourth / n - squares) / n
    return min(noise, away) / away if away > 0 and noise > 0 else 0.0


def parc(features: Any, labels: Any, *, dims: int | None = 32, scale: bool = True) -> float:
    """How far examples with different labels have different features: 100 × Spearman's rank correlation, −100 to 100.

    Over all pairs of examples, between 1 − Pearson correlation of their features and that of their one-hot labels
    (Bolya et al. 2021, "Scalable Diverse Model Selection for Accessible Transfer Learning", NeurIPS). As in the
    authors' code, features are first reduced to their `dims` main components (None: not at all), then each is
    scaled to mean 0 and deviation 1 unless `scale` is off. The components are exact, fewer where the features have a
    lower rank, and each has the sign that makes its largest score positive; so features may be rotated or multiplied.

    features: (n, d). labels: (n,). All n(n − 1)/2 pairs count, in n²/2 steps and little memory: correlations of
    features are ties when they are closer than 5e-7, beyond 5,000 examples 2e-5. An example whose features are all
    equal correlates 0 with every other.
    """
    from datamodels.measurements.pairs import histograms

    where = "parc"
    checked = check_features(features, where)
    n = checked.shape[0]
    classes = encode(labels, where, num=n)
    if dims is not None and dims < 2:
        raise MeasurementError(f"{where}: expected dims of at least 2, or None for all features; got {dims}")
    _warn_small(where, n, classes)
    if dims is None:
        values = (checked.standardised() if scale else checked).whole()
    else:
        values = _components(checked.centred(), dims)
        if scale:
            values /= values.std(axis=0)
    values -= values.sum(axis=1, keepdims=True) / max(1, values.shape[1])
    length = np.sqrt(np.einsum("ij,ij->i", values, values))
    flat = length <= 8 * EPS * length.max()
    values /= np.where(flat, 1, length)[:, None]
    same, different = histograms(values, classes.codes)
    # With one-hot labels a pair's second distance has two values, so that Spearman's coefficient is Pearson's between
    # the (mid)rank of the first and 0 or 1.
    filled = np.flatnonzero(same | different)[::-1]
    apart = different[filled].astype(np.float64)
    every = same[filled] + apart
    pairs = every.sum()
    rank = every.cumsum() - (every - 1) / 2 - (pairs + 1) / 2
    spread = (every * rank**2).sum()
    both = apart.sum() * (pairs - apart.sum()) / pairs
    if not (spread > 0 and both > 0):
        raise MeasurementError(
            f"{where}: {'all pairs of examples have the same distance' if both else 'no two examples share a class'}; "
            f"a rank correlation needs features of at least two dimensions that vary, and two examples of some class"
        )
    return float(100 * (apart * rank).sum() / math.sqrt(spread * both))


def _components(centred: Features, dims: int) -> np.ndarray:
    """Scores (n, ≤ dims) of the main components that are not 0, largest first."""
    from scipy.linalg import eigh

    n, d = centred.shape
    gram = np.zeros((min(n, d),) * 2)
    if n > d:
        for _, block in centred.rows():
            gram += block.T @ block
    else:
        for block in centred.columns():
            gram += block @ block.T
    first = max(0, len(gram) - dims)
    values, vectors = eigh(gram, subset_by_index=(first, len(gram) - 1))
    vectors = vectors[:, values > max(n, d) * EPS * max(values[-1], 0)][:, ::-1]
    if n > d:
        scores = np.empty((n, vectors.shape[1]))
        for rows, block in centred.rows():
            scores[rows] = block @ vectors
    else:
        scores = vectors * np.sqrt(values[values > max(n, d) * EPS * max(values[-1], 0)][::-1])
    top = np.abs(scores).argmax(axis=0)
    return scores * np.sign(scores[top, np.arange(scores.shape[1])])


def linear_probe(features: Any, labels: Any, *, seed: int = 0, test: float = 0.25, l2: float = 1.0) -> float:
    """Accuracy on held-out examples of a logistic regression on standardised features, in [0, 1].

    Renggli et al. 2022, "Which Model to Transfer? Finding the Needle in the Growing Haystack", CVPR. Means and
    deviations are of the training part; the loss is Σ cross-entropy + l2/2 · ‖W‖², of two classes l2/2 · ‖w‖² with one
    column w: l2=1 is scikit-learn's C=1.

    features: (n, d). labels: (n,). Of a class of m examples round(m · test) are held out, never all of them: a class
    with one example is trained on and not tested. Which ones follows from `seed` and the order of the examples.
    """
    from datamodels.measurements.probe import logistic

    where = "linear_probe"
    checked = check_features(features, where)
    n, d = checked.shape
    classes = encode(labels, where, num=n)
    if not 0 < test < 1 or not l2 > 0:
        raise MeasurementError(f"{where}: expected 0 < test < 1 and l2 > 0; got test={test} and l2={l2}")
    held = _stratified(classes, test, seed)
    if not held.any():
        raise MeasurementError(
            f"{where}: nothing is held out: no class of the {n} examples has enough for a share of {test:g}; use more "
            f"examples of each class"
        )
    count = int(held.sum())
    if count < TEST_EXAMPLES:
        _warn(f"{where}: {count} held-out examples give the accuracy a standard error of up to "
              f"{50 / math.sqrt(count):.0f} %; use at least {math.ceil(TEST_EXAMPLES / test)} examples")  # fmt: skip
    train = Features(checked.values[~held], checked.scale).standardised()
    rest = Features(checked.values[held], train.scale, train.mean, train.factor)
    if n - count > d:
        x, unseen = (np.concatenate([block.astype(np.float32) for _, block in part.rows()]) for part in (train, rest))
    else:  # in the span of the training rows, where the optimal weights are
        basis, triangle = np.linalg.qr(train.whole().T)
        x, unseen = triangle.T.astype(np.float32, order="C"), (rest.whole() @ basis).astype(np.float32)
    weight, bias = logistic(x, classes.codes[~held], classes.num_classes, l2)
    return float(((unseen @ weight + bias).argmax(axis=1) == classes.codes[held]).mean())


def _stratified(classes: Labels, share: float, seed: int) -> np.ndarray:
    """(n,) bool: about this share of each class, but never a whole class."""
    order = permutation(len(classes.codes), seed=seed)
    held = np.zeros(len(order), dtype=bool)
    by_class = order[np.argsort(classes.codes[order], kind="stable")]
    for members in np.split(by_class, np.cumsum(classes.counts.astype(int))[:-1]):
        held[members[: min(len(members) - 1, int(len(members) * share + 0.5))]] = True
    return held


def num_params(model: torch.nn.Module) -> int:
    """How many numbers a torch module learns, frozen or not; parameters that are shared count once."""
    from torch.nn.parameter import is_lazy

    total = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise MeasurementError(
                f"num_params: {name!r} has no shape before the first batch; pass one through the model"
            )
        total += parameter.numel()
    return total


def published_accuracy(name: str, table: Mapping[str, float] | str | os.PathLike[str]) -> float:
    """What a table {model: accuracy} says of a model: a number that others measured, say on ImageNet.

    table: a mapping, or a YAML or JSON file of one. Accuracies are taken as they stand, in percent or not.

    Raises MeasurementError for a file that is no such table, and for a model that is not in it.
    """
    source = "the table"
    if not isinstance(table, Mapping):
        source = str(table)
        table = _read_table(Path(table))
    if name not in table:
        near = difflib.get_close_matches(name, list(map(str, table)), n=1)
        raise MeasurementError(
            f"published_accuracy: {source} has no {name!r} among its {len(table)} models"
            + (f"; did you mean {near[0]!r}?" if near else "; add it, or leave this metric out for the model")
        )
    value = table[name]
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise MeasurementError(f"published_accuracy: expected a finite number for {name!r} in {source}; got {value!r}")
    return float(value)


def _read_table(path: Path) -> Mapping[str, float]:
    import yaml  # JSON is YAML, all but tabs

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8").replace("\t", " "))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MeasurementError(f"published_accuracy: {path} cannot be read as YAML or JSON: {error}") from None
    if not isinstance(table, dict):
        raise MeasurementError(
            f"published_accuracy: expected {path} to map models to accuracies, `name: 76.1` on each line; got "
            f"{type(table).__name__}"
        )
    return table


def _warn_small(where: str, n: int, classes: Labels, least: int = 0, why: str = "") -> None:
    wanted = max(PER_CLASS * classes.num_classes, least)
    if n < wanted:
        reason = why if n < least else f"{PER_CLASS} a class are the least that says much"
        _warn(f"{where}: {n} examples of {classes.num_classes} classes; use at least {wanted}: {reason}", 4)


def _warn(message: str, stacklevel: int = 3) -> None:
    warnings.warn(message, SmallSampleWarning, stacklevel=stacklevel)

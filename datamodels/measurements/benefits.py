"""What a model is good for, downstream: right answers, honest probabilities, no group left behind, robustness.

Accuracies are shares in [0, 1]; logarithms are natural. All but `agreement` look at a head that has one output for each
class of the data set, and refuse another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.errors import MeasurementError
from datamodels.measurements.arrays import check_finite, encode
from datamodels.measurements.library import measurement

if TYPE_CHECKING:
    import torch

STRENGTHS = 5
CORRUPTIONS = ("noise", "blur", "contrast")
# After Hendrycks & Dietterich 2019: the noise and contrast that they give ImageNet, the blur of their smaller images.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)


@measurement(role="benefit")
def accuracy(logits: np.ndarray, labels: np.ndarray, num_classes: int | None = None) -> float:
    """Share of examples whose largest logit is the label's; of equal logits the first counts."""
    return float((_checked(logits, labels, num_classes).argmax(1) == labels).mean())


@measurement(role="benefit")
def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, num_classes: int | None = None, k: int = 5) -> float:
    """Share of examples whose label is among the k largest logits; equal logits count against the model."""
    logits = _checked(logits, labels, num_classes)
    if not 0 < k < logits.shape[1]:
        raise MeasurementError(f"top_k_accuracy: expected 0 < k < {logits.shape[1]}, the classes, got {k}; set ?k=")
    right = np.take_along_axis(logits, labels[:, None], 1)
    return float(((logits >= right).sum(1) <= k).mean())


@measurement(role="benefit")
def nll(logits: np.ndarray, labels: np.ndarray, num_classes: int | None = None) -> float:
    """Mean cross-entropy in nats."""
    logs = _log_probabilities(_checked(logits, labels, num_classes))
    return float(-np.take_along_axis(logs, labels[:, None], 1).mean())


@measurement(role="benefit")
def brier(logits: np.ndarray, labels: np.ndarray, num_classes: int | None = None) -> float:
    """Mean over examples of Σ_c (p_c − 1[c = y])², in [0, 2] (Brier 1950)."""
    p = np.exp(_log_probabilities(_checked(logits, labels, num_classes)))
    p[np.arange(len(labels)), labels] -= 1
    return float((p**2).sum(1).mean())


@measurement(role="benefit")
def calibration_error(logits: np.ndarray, labels: np.ndarray, num_classes: int | None = None, bins: int = 15) -> float:
    """Expected calibration error: Σ_b n_b/n |accuracy_b − confidence_b| over `bins` equal parts of (0, 1].

    Confidence is the largest probability; a bin holds its upper end (Guo et al. 2017, eq. 3; 15 bins as there).
    """
    if bins < 1:
        raise MeasurementError(f"calibration_error: expected bins >= 1, got {bins}")
    logits = _checked(logits, labels, num_classes)
    confidence = np.exp(_log_probabilities(logits).max(1))
    right = logits.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


@measurement(role="benefit", columns={"worst": (), "gap": ()})
def group_accuracy(
    logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_classes: int | None = None
) -> dict[str, float]:
    """`worst`: the lowest accuracy of a group; `gap`: the highest minus the lowest. Groups are integers or text."""
    right = _checked(logits, labels, num_classes).argmax(1) == labels
    found = encode(groups, "group_accuracy", "groups", num=len(labels))
    shares = np.bincount(found.codes, weights=right) / found.counts
    return {"worst": float(shares.min()), "gap": float(shares.max() - shares.min())}


@measurement(role="benefit")
def accuracy_drop(
    logits: np.ndarray,
    labels: np.ndarray,
    other_logits: np.ndarray,
    other_labels: np.ndarray,
    num_classes: int | None = None,
    other_num_classes: int | None = None,
) -> float:
    """Accuracy on the first data set minus that on the second."""
    first = accuracy(logits, labels, num_classes)
    return float(first - accuracy(other_logits, other_labels, other_num_classes))


@measurement(role="benefit")
def agreement(logits: np.ndarray, reference_logits: np.ndarray) -> float:
    """Share of examples to which the model and the reference model give the same class."""
    if logits.shape != reference_logits.shape:
        raise MeasurementError(
            f"agreement: expected the same classes of both models, got logits {logits.shape} and, of the reference, "
            f"{reference_logits.shape}"
        )
    first = check_finite(logits, "agreement", "logits").argmax(1)
    return float((first == check_finite(reference_logits, "agreement", "the reference's logits").argmax(1)).mean())


@measurement(role="benefit", columns={"": (), **dict.fromkeys(CORRUPTIONS, (STRENGTHS,))})
def corruption(
    predict: Callable[[Any], np.ndarray],
    inputs: np.ndarray,
    labels: np.ndarray,
    num_classes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on images with noise, blur and low contrast, each at five strengths, and the mean of all 15.

    Images are corrupted as the data set gives them, before a model resizes them: see `corrupted`.
    """
    found: dict[str, Any] = {}
    for kind in CORRUPTIONS:
        shares = []
        for strength in range(STRENGTHS):
            logits = _checked(predict(corrupted(inputs, kind, strength, seed=seed)), labels, num_classes)
            shares.append(float((logits.argmax(1) == labels).mean()))
        found[kind] = np.array(shares)
    return {"": float(np.mean([found[kind] for kind in CORRUPTIONS])), **found}


def corrupted(images: np.ndarray, kind: str, strength: int, *, seed: int) -> np.ndarray:
    """Images (n, c, h, w) in [0, 1], float32, corrupted with a strength in [0, 5), clipped to [0, 1].

    `noise`: Gaussian, of deviation NOISE. `blur`: Gaussian, of deviation BLUR pixels, h/32 times as
    many where h is above 32. `contrast`: each image's
    distance from its mean colour times CONTRAST. The noise is the same for the same seed, at every strength.
    """
    pixels = image_array(images, f"corruption, {kind}").astype(np.float32)  # of 0 and 1 as uint8, noise would be cut
    if kind == "noise":
        drawn = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32)
        pixels = pixels + np.float32(NOISE[strength]) * drawn
    elif kind == "blur":
        from scipy.ndimage import gaussian_filter

        deviation = BLUR[strength] * max(1.0, pixels.shape[2] / 32)
        pixels = gaussian_filter(pixels, (0, 0, deviation, deviation), mode="nearest")
    elif kind == "contrast":
        mean = pixels.mean((2, 3), keepdims=True)
        pixels = mean + np.float32(CONTRAST[strength]) * (pixels - mean)
    else:
        raise MeasurementError(f"corruption: unknown kind {kind!r}; expected one of {', '.join(CORRUPTIONS)}")
    return np.clip(pixels, 0, 1)


def image_array(inputs: Any, where: str) -> np.ndarray:
    """The inputs as an array, if they are images (n, c, h, w) in [0, 1]; MeasurementError, beginning with `where`."""
    if not isinstance(inputs, np.ndarray) or inputs.ndim != 4:
        got = f"shape {inputs.shape}" if isinstance(inputs, np.ndarray) else type(inputs).__name__
        raise MeasurementError(f"{where}: expected images (n, c, h, w), got {got}")
    if inputs.size and not (inputs.min() >= 0 and inputs.max() <= 1):
        raise MeasurementError(
            f"{where}: expected pixels in [0, 1], got {inputs.min():.4g} to {inputs.max():.4g}; leave scaling to "
            f"the model"
        )
    return inputs


@measurement(role="benefit")
def adversarial(
    model: torch.nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    epsilon: float = 1 / 255,
    batch_size: int = 64,
) -> float:
    """Accuracy after one step x + ε sign(∇_x loss), clipped to [0, 1] (FGSM: Goodfellow et al. 2015, section 4).

    The step is taken on what the model sees: float inputs in [0, 1], at its own resolution, before it normalises them.
    """
    import torch

    inputs, labels = data
    if not inputs.is_floating_point():
        raise MeasurementError(f"adversarial: expected float inputs, which have a gradient, got {inputs.dtype}")
    if not (inputs.min() >= 0 and inputs.max() <= 1):
        raise MeasurementError(
            f"adversarial: expected inputs in [0, 1], got {float(inputs.min()):.4g} to {float(inputs.max()):.4g}; "
            f"leave scaling to the model"
        )
    device = next((p.device for p in model.parameters()), inputs.device)
    right = 0
    for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
        x, y = x.to(device).requires_grad_(), y.to(device)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_fn(model(x), y), x)
        with torch.no_grad():
            logits = model((x + epsilon * gradient.sign()).clamp(0, 1))
            check_finite(logits.float().cpu().numpy(), "adversarial", "logits")
            right += int((logits.argmax(1) == y).sum())
    return right / len(labels)


def _checked(logits: np.ndarray, labels: np.ndarray, num_classes: int | None) -> np.ndarray:
    """The logits (n, c) as float64, if there is one for each class of the data set and one row for each label."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) != len(labels) or not len(labels):
        raise MeasurementError(f"expected logits (n, c) and labels (n,), got {logits.shape} and {labels.shape}")
    classes = logits.shape[1]
    if num_classes is not None and classes != num_classes:
        raise MeasurementError(
            f"the model's head has {classes} outputs, and the data set {num_classes} classes; it was made for other "
            f"data, and its answers say nothing about these labels"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise MeasurementError(f"expected labels in [0, {classes}), got {labels.min()} to {labels.max()}")
    return check_finite(logits, "the model", "logits")


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

"""What a trained model says about each example: its margin, its loss, and whether it is right.

Every function takes logits (..., c) and labels that broadcast against the axes before the last, so one call
serves a single model's (m, c) and an ensemble's (K, m, c).
"""

from __future__ import annotations

import torch

from datamodels.errors import DatamodelsError

MARGIN_KINDS = ("logsumexp", "max")


def margins(logits: torch.Tensor, labels: torch.Tensor, kind: str = "logsumexp") -> torch.Tensor:
    """How far the right class leads, (...): z_y − log Σ_{j≠y} exp z_j, or z_y − max_{j≠y} z_j with kind="max".

    The first is log(p_y / (1 − p_y)), smooth in the logits (Park et al. 2023, TRAK, eq. 3); the second is the
    margin of Ilyas et al. 2022, "Datamodels", section 3.
    """
    if kind not in MARGIN_KINDS:
        raise DatamodelsError(f"margins: unknown kind {kind!r}; expected one of {', '.join(MARGIN_KINDS)}")
    index = _index(logits, labels, "margins")
    right = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, float("-inf"))
    return right - (others.logsumexp(-1) if kind == "logsumexp" else others.amax(-1))


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each example, (...), in nats: log Σ_j exp z_j − z_y."""
    index = _index(logits, labels, "loss")
    return logits.logsumexp(-1) - logits.gather(-1, index).squeeze(-1)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Fraction of the m examples of logits (..., m, c) whose largest logit is the label's, (...)."""
    index = _index(logits, labels, "accuracy").squeeze(-1)
    return (logits.argmax(-1) == index).to(logits.dtype).mean(-1)


def _index(logits: torch.Tensor, labels: torch.Tensor, where: str) -> torch.Tensor:
    """The labels as an index (..., 1) into the last axis of the logits, checked."""
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise DatamodelsError(
            f"{where}: expected logits (..., examples, classes) with at least two classes; "
            f"got shape {tuple(logits.shape)}"
        )
    check_labels(labels, logits.shape[-1], where)
    try:
        index = labels.broadcast_to(logits.shape[:-1])
    except RuntimeError:
        raise DatamodelsError(
            f"{where}: expected labels of shape {tuple(logits.shape[:-1])}, or one that broadcasts to it, to go with "
            f"logits {tuple(logits.shape)}; got {tuple(labels.shape)}"
        ) from None
    return index.unsqueeze(-1)


def check_labels(labels: torch.Tensor, num_classes: int, where: str) -> None:
    """Raise unless labels is an int64 tensor with every entry in [0, num_classes)."""
    if labels.dtype != torch.int64:
        raise DatamodelsError(f"{where}: expected labels as int64, got {labels.dtype}; convert with labels.long()")
    if labels.numel() == 0:
        raise DatamodelsError(f"{where}: expected at least one label, got none")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DatamodelsError(
            f"{where}: expected labels in [0, {num_classes}), one per class of the logits; got {low} to {high}; "
            f"renumber the labels or widen the model's last layer"
        )

import numpy as np
import pytest
import torch

from datamodels.errors import DatamodelsError
from datamodels.learning import outputs


def example(shape=(4, 5), classes=7, scale=5.0):
    rng = np.random.default_rng(len(shape))
    return rng.normal(size=(*shape, classes)) * scale, rng.integers(0, classes, size=shape)


def each(function, logits, labels):
    """`function(logits of one example, its label)` in plain numpy, over all leading axes."""
    flat = [function(z, y) for z, y in zip(logits.reshape(-1, logits.shape[-1]), labels.ravel(), strict=True)]
    return np.array(flat).reshape(labels.shape)


PLAIN = {
    "logsumexp": lambda z, y: z[y] - np.log(np.exp(np.delete(z, y)).sum()),
    "max": lambda z, y: z[y] - np.delete(z, y).max(),
}


@pytest.mark.parametrize("kind", outputs.MARGIN_KINDS)
@pytest.mark.parametrize("shape", [(6,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("classes", [2, 7])
def test_margins_are_those_of_plain_numpy(kind, shape, classes):
    logits, labels = example(shape, classes)
    got = outputs.margins(torch.from_numpy(logits), torch.from_numpy(labels), kind)
    np.testing.assert_allclose(got.numpy(), each(PLAIN[kind], logits, labels), rtol=0, atol=1e-12)


def test_the_margin_is_the_log_odds_of_the_right_class():
    logits, labels = (torch.from_numpy(a) for a in example())
    p = torch.softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(outputs.margins(logits, labels), torch.log(p) - torch.log1p(-p), rtol=0, atol=1e-9)


def test_margins_of_huge_logits_are_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e4, 1e4, 0.0]])
    got = outputs.margins(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(got, torch.tensor([1e30, -2e4]))


def test_loss_and_accuracy_are_those_of_plain_numpy():
    logits, labels = example((3, 50), 4, scale=1.0)
    got = outputs.loss(torch.from_numpy(logits), torch.from_numpy(labels))
    plain = each(lambda z, y: -np.log(np.exp(z[y]) / np.exp(z).sum()), logits, labels)
    np.testing.assert_allclose(got.numpy(), plain, rtol=0, atol=1e-12)
    right = outputs.accuracy(torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(right.numpy(), (logits.argmax(-1) == labels).mean(-1))


@pytest.mark.parametrize("function", [outputs.margins, outputs.loss, outputs.accuracy])
def test_one_row_of_labels_serves_every_model(function):
    logits, labels = example((3, 5))
    together = function(torch.from_numpy(logits), torch.from_numpy(labels[0]))
    for k in range(3):
        torch.testing.assert_close(together[k], function(torch.from_numpy(logits[k]), torch.from_numpy(labels[0])))


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), r"margins: expected labels in \[0, 3\).*got 0 to 3.*renumber"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, -1]), "got -1 to 2"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2]), r"labels of shape \(4,\).*got \(3,\)"),
        (torch.zeros(4, 3), torch.tensor([0.0, 1, 2, 1]), r"int64, got torch.float32; convert with labels.long\(\)"),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), "at least two classes"),
        (torch.zeros(3), torch.zeros(1, dtype=torch.int64), "at least two classes"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "at least one label"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, says):
    with pytest.raises(DatamodelsError, match=says):
        outputs.margins(logits, labels)


def test_an_unknown_kind_of_margin_is_refused():
    with pytest.raises(DatamodelsError, match="unknown kind 'mean'; expected one of logsumexp, max"):
        outputs.margins(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), "mean")

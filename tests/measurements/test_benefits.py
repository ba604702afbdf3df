"""Benefits against closed forms, scikit-learn and loops that spell out their definitions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import nn
from torch.nn import functional

from datamodels.errors import MeasurementError
from datamodels.measurements import benefits

RNG = np.random.default_rng(0)
LABELS = RNG.integers(4, size=300)
LOGITS = RNG.standard_normal((300, 4)) * 2 + 1.5 * np.eye(4)[LABELS]
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
IMAGES = RNG.random((20, 3, 16, 12)).astype(np.float32)


def test_accuracies_and_losses_are_those_of_scikit_learn():
    assert benefits.accuracy(LOGITS, LABELS) == pytest.approx(accuracy_score(LABELS, LOGITS.argmax(1)), abs=1e-12)
    for k in (1, 2, 3):
        expected = top_k_accuracy_score(LABELS, LOGITS, k=k)
        assert benefits.top_k_accuracy(LOGITS, LABELS, k=k) == pytest.approx(expected, abs=1e-12)
    assert benefits.nll(LOGITS, LABELS) == pytest.approx(log_loss(LABELS, P), rel=1e-12)
    assert benefits.brier(LOGITS, LABELS) == pytest.approx(((P - np.eye(4)[LABELS]) ** 2).sum(1).mean(), rel=1e-12)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e5, 0.0], [0.0, 1e5]])
    assert benefits.nll(logits, np.array([0, 0])) == 5e4
    assert benefits.brier(logits, np.array([0, 1])) == 0


def test_ties_count_against_top_k():
    assert benefits.top_k_accuracy(np.zeros((5, 3)), np.array([0, 1, 2, 0, 1]), k=2) == 0


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_its_definition(bins):
    confidence, right = P.max(1), LOGITS.argmax(1) == LABELS
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert benefits.calibration_error(LOGITS, LABELS, bins=bins) == pytest.approx(total, rel=1e-12)


def test_calibration_error_of_known_confidence():
    """Confidence .8 everywhere, right .6 of the time: .2; confidences .9 and .6 that are each met: 0."""
    logits = np.log(np.tile([0.8, 0.2], (10, 1)))
    labels = np.array([0] * 6 + [1] * 4)
    assert benefits.calibration_error(logits, labels) == pytest.approx(0.2)
    logits = np.log(np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10))
    labels = np.array([0] * 9 + [1] + [0] * 6 + [1] * 4)
    assert benefits.calibration_error(logits, labels) == pytest.approx(0, abs=1e-12)


def test_a_bin_holds_its_upper_end():
    """Of two bins, .5 is in the first and .75 in the second: (.5 + .25) / 2; together they would cancel."""
    logits = np.log(np.array([[0.5, 0.5], [0.75, 0.25]]))
    assert benefits.calibration_error(logits, np.array([1, 0]), bins=2) == pytest.approx(0.375)


def test_groups():
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1])
    logits = np.stack([right, 1 - right], 1).astype(float)
    groups = np.array(["rich"] * 4 + ["poor"] * 4 + ["other"] * 2)
    found = benefits.group_accuracy(logits, np.zeros(10, int), groups)
    assert found == {"worst": pytest.approx(0.25), "gap": pytest.approx(0.75)}
    with pytest.raises(MeasurementError, match="group_accuracy: expected at least 2 classes among the groups; got 1"):
        benefits.group_accuracy(logits, np.zeros(10, int), np.zeros(10))
    unknown = np.where(np.arange(10) > 6, np.nan, np.arange(10) % 2)
    for groups in (unknown, unknown.astype(object)):
        with pytest.raises(MeasurementError, match="group_accuracy: expected groups that name classes; got nan"):
            benefits.group_accuracy(logits, np.zeros(10, int), groups)


def test_drop_and_agreement():
    other = LOGITS[::-1].copy()
    drop = benefits.accuracy_drop(LOGITS, LABELS, other, LABELS)
    assert drop == pytest.approx((LOGITS.argmax(1) == LABELS).mean() - (other.argmax(1) == LABELS).mean())
    assert benefits.agreement(LOGITS, 3 * LOGITS + 1) == 1
    assert benefits.agreement(LOGITS, -LOGITS) == 0
    assert benefits.agreement(LOGITS, other) == pytest.approx((LOGITS.argmax(1) == other.argmax(1)).mean())
    with pytest.raises(MeasurementError, match="expected the same classes of both models"):
        benefits.agreement(LOGITS, other[:, :3])
    unknown = np.where(np.arange(300)[:, None] % 100 == 5, np.nan, LOGITS)
    for pair in ((unknown, LOGITS), (LOGITS, unknown), (unknown, unknown)):
        with pytest.raises(MeasurementError, match="logits of 3 of 300 examples are not finite, first of example 5"):
            benefits.agreement(*pair)


@pytest.mark.parametrize(
    "function",
    [benefits.accuracy, benefits.top_k_accuracy, benefits.nll, benefits.brier, benefits.calibration_error],
)
def test_a_head_for_other_data_is_refused(function):
    options = {"k": 2} if function is benefits.top_k_accuracy else {}
    function(LOGITS, LABELS, 4, **options)
    with pytest.raises(MeasurementError, match="head has 4 outputs, and the data set 3 classes"):
        function(LOGITS, LABELS % 3, 3, **options)
    with pytest.raises(MeasurementError, match="labels in"):
        function(LOGITS, LABELS + 1, **options)
    with pytest.raises(MeasurementError, match="not finite"):
        function(np.where(LOGITS > 3, np.nan, LOGITS), LABELS, **options)


@pytest.mark.parametrize("k", [0, 4, 5])
def test_k_that_says_nothing(k):
    with pytest.raises(MeasurementError, match="expected 0 < k < 4"):
        benefits.top_k_accuracy(LOGITS, LABELS, k=k)


# --------------------------------------------------------------------------------------------------- corruptions


def test_noise_has_its_deviation_and_is_the_seeds():
    grey = np.full((50, 1, 32, 32), 0.5, np.float32)
    for strength, deviation in enumerate(benefits.NOISE[:3]):
        noise = benefits.corrupted(grey, "noise", strength, seed=3) - grey
        assert noise.std() == pytest.approx(deviation, rel=0.02)
        assert abs(noise.mean()) < 0.01
    first = benefits.corrupted(IMAGES, "noise", 1, seed=3)
    assert (first == benefits.corrupted(IMAGES, "noise", 1, seed=3)).all()
    assert not (first == benefits.corrupted(IMAGES, "noise", 1, seed=4)).all()


def test_blur_is_a_gaussian_on_each_channel_and_keeps_the_mean():
    dot = np.zeros((1, 1, 65, 65), np.float32)
    dot[0, 0, 32, 32] = 1
    blurred = benefits.corrupted(dot, "blur", 4, seed=0)[0, 0]
    deviation = benefits.BLUR[4] * 65 / 32
    assert blurred.sum() == pytest.approx(1, rel=1e-5)
    at = np.arange(65) - 32
    assert (blurred.sum(0) * at**2).sum() == pytest.approx(deviation**2, rel=0.02)
    two = np.zeros((2, 2, 16, 16), np.float32)
    two[0, 0] = 1
    assert (benefits.corrupted(two, "blur", 4, seed=0) == two).all()  # nothing leaks between images or channels


def test_contrast_shrinks_towards_each_images_mean():
    found = benefits.corrupted(IMAGES, "contrast", 2, seed=0)
    mean = IMAGES.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(found - mean, (IMAGES - mean) * benefits.CONTRAST[2], atol=1e-6)


@pytest.mark.parametrize("kind", benefits.CORRUPTIONS)
def test_strengths_go_further_and_further_and_stay_in_range(kind):
    distances = []
    for strength in range(benefits.STRENGTHS):
        found = benefits.corrupted(IMAGES, kind, strength, seed=0)
        assert found.shape == IMAGES.shape and found.dtype == np.float32
        assert found.min() >= 0 and found.max() <= 1
        distances.append(np.abs(found - IMAGES).mean())
    assert (np.diff(distances) > 0).all() and distances[0] > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, np.float64])
@pytest.mark.parametrize("kind", benefits.CORRUPTIONS)
def test_images_of_whole_numbers_are_corrupted_as_floats_are(kind, dtype):
    squares = (IMAGES > 0.5).astype(dtype)
    found = benefits.corrupted(squares, kind, 1, seed=0)
    assert found.dtype == np.float32 and len(np.unique(found)) > 2
    assert (found == benefits.corrupted(squares.astype(np.float32), kind, 1, seed=0)).all()


def test_corruption_is_accuracy_on_what_is_corrupted():
    """A model that reads off the brightest quarter; its answers are asked for 15 sets of images."""
    images = np.zeros((40, 1, 8, 8), np.float32) + 0.2
    labels = RNG.integers(4, size=40)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] = 0.8
    seen = []

    def predict(x):
        seen.append(x)
        return x.reshape(len(x), 4, 16).mean(2)

    found = benefits.corruption(predict, images, labels, 4, seed=5)
    assert found["contrast"].tolist() == [1] * 5
    for i, kind in enumerate(benefits.CORRUPTIONS):
        for strength in range(5):
            expected = benefits.corrupted(images, kind, strength, seed=5)
            assert (seen[5 * i + strength] == expected).all()
            share = (expected.reshape(40, 4, 16).mean(2).argmax(1) == labels).mean()
            assert found[kind][strength] == share
    assert found[""] == pytest.approx(np.mean([found[kind].mean() for kind in benefits.CORRUPTIONS]))


@pytest.mark.parametrize(
    ("inputs", "says"), [(["a text"], "got list"), (IMAGES[0], "got shape"), (IMAGES * 255, "in \\[0, 1\\], got")]
)
def test_what_cannot_be_corrupted(inputs, says):
    with pytest.raises(MeasurementError, match=says):
        benefits.corrupted(inputs, "noise", 0, seed=0)


# --------------------------------------------------------------------------------------------------- adversarial


class TwoPixels(nn.Module):
    """logit difference = 3 (x₀ − x₁)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))

    def forward(self, x):
        return x @ self.weight.T


def test_a_gradient_sign_step_flips_what_is_within_twice_epsilon():
    """x₀ − x₁ moves by 2ε, so class 0 is lost below a lead of 2ε."""
    lead = torch.tensor([0.01, 0.03, 0.05, 0.2])
    x = torch.stack([0.5 + lead / 2, 0.5 - lead / 2], 1)
    y = torch.zeros(4, dtype=torch.int64)
    for epsilon, expected in ((0.001, 1), (0.01, 0.75), (0.02, 0.5), (0.03, 0.25), (0.2, 0)):
        found = benefits.adversarial(TwoPixels(), (x, y), functional.cross_entropy, epsilon=epsilon, batch_size=3)
        assert found == expected


def test_the_step_stays_within_the_pixels_range():
    class Seen(TwoPixels):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    seen = []
    x = torch.tensor([[0.02, 0.99]])
    benefits.adversarial(Seen(), (x, torch.tensor([0])), functional.cross_entropy, epsilon=0.1)
    assert seen[1].tolist() == [[0, 1]]  # where it goes down .1 and up .1


def test_a_model_that_gives_no_numbers_has_no_adversarial_accuracy():
    """argmax takes NaN for the largest, so that such a model would be right wherever the label is 0."""
    model, inputs = TwoPixels(), (torch.rand(4, 2), torch.zeros(4, dtype=torch.int64))
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(MeasurementError, match="adversarial: logits of 4 of 4 examples are not finite"):
        benefits.adversarial(model, inputs, functional.cross_entropy)


def test_nothing_is_left_behind_in_the_model():
    model = TwoPixels()
    benefits.adversarial(model, (torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)), functional.cross_entropy)
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("inputs", "says"),
    [(torch.zeros(2, 2, dtype=torch.int64), "float inputs"), (torch.full((2, 2), 2.0), "in \\[0, 1\\]")],
)
def test_what_has_no_adversary(inputs, says):
    with pytest.raises(MeasurementError, match=says):
        benefits.adversarial(TwoPixels(), (inputs, torch.zeros(2, dtype=torch.int64)), functional.cross_entropy)

"""A view computes what it is asked for, once: one forward pass for all measurements that look at one."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from datamodels.errors import MeasurementError
from datamodels.measurements import library
from datamodels.measurements.backbones import Answer, Backbone, Module, _arrays
from datamodels.measurements.datasets import Examples, ImageFiles
from datamodels.measurements.library import NEEDS, Unmet, measure
from datamodels.measurements.view import View

RNG = np.random.default_rng(0)
INPUTS = RNG.random((150, 1, 4, 4)).astype(np.float32)
LABELS = (INPUTS.mean((1, 2, 3)) > 0.5).astype(np.int64)
EXAMPLES = Examples("made", "image", INPUTS, LABELS, ("dark", "light"), np.arange(150))


def backbone(outputs=2, classes=None, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, outputs))
    return Backbone("a net", Module(net, "a net"), _arrays, classes).ready("cpu")


class Counted(Module):
    batches = 0

    def both(self, batch):
        self.batches += 1
        return super().both(batch)


def counted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2))
    return Backbone("counted", Counted(net, "counted"), _arrays).ready("cpu")


def test_features_and_logits_are_the_models_whatever_the_batches():
    one = backbone()
    x = torch.from_numpy(INPUTS)
    with torch.no_grad():
        features, logits = torch.tanh(one.module.model[:2](x)), one.module(x)
    for batch_size in (1, 64, 150, 1000):
        view = View(one, EXAMPLES, batch_size=batch_size)
        np.testing.assert_allclose(view["features"], features, atol=1e-6)
        np.testing.assert_allclose(view["logits"], logits, atol=1e-6)
        assert view["features"].dtype == view["logits"].dtype == np.float64


def test_one_forward_pass_serves_all_that_need_one():
    model = counted()
    names = ["default", "accuracy", "nll", "calibration_error", "leep", "nce"]
    many = Examples("many", "image", INPUTS[:100].repeat(6, 0), LABELS[:100].repeat(6), ("a", "b"), np.arange(600))
    found = measure(names, {"": View(model, many, batch_size=200)})
    assert not [value for value in found.values() if isinstance(value, Exception)]
    assert set(found) == set(library.schema(names))
    assert model.module.batches == 3  # of 200 examples each
    assert found["seconds_inference"] > 0


def test_a_pass_that_fails_is_not_tried_again():
    class Broken(Counted):
        def both(self, batch):
            super().both(batch)
            raise RuntimeError("out of memory")

    model = Broken(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), "broken")
    view = View(Backbone("broken", model, _arrays).ready("cpu"), EXAMPLES)
    found = measure(["accuracy", "log_me", "num_params"], {"": view})
    assert model.batches == 1
    assert str(found["accuracy"]) == str(found["log_me"]) == str(found["seconds_inference"]) == "out of memory"
    assert found["num_params"] == 34


def test_numbers_that_are_not_finite_are_refused_where_they_are_handed_out():
    class Halved(Module):
        def both(self, batch):
            features, logits = super().both(batch)
            dark = batch.mean((1, 2, 3)) < 0.5
            return torch.where(dark[:, None], torch.inf, features), torch.where(dark[:, None], torch.nan, logits)

    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2))
    bad, fine = Backbone("bad", Halved(net, "bad"), _arrays).ready("cpu"), backbone()
    dark = int((LABELS == 0).sum())
    view = View(bad, EXAMPLES)
    for name, get in {
        "features": lambda: view["features"], "logits": lambda: view["logits"],
        "features ": lambda: view["embed"](INPUTS), "logits ": lambda: view["predict"](INPUTS),
    }.items():  # fmt: skip
        with pytest.raises(MeasurementError, match=f"model bad: {name.strip()} of {dark} of 150 examples are not fin"):
            get()
    assert view["seconds_inference"] > 0
    for one in (view, View(fine, EXAMPLES, reference=bad)):
        found = measure(["agreement"], {"": one})["agreement"]
        assert isinstance(found, MeasurementError)
    found = measure(["accuracy", "nce", "leep", "log_me", "effective_rank", "corruption"], {"": View(bad, EXAMPLES)})
    for key, value in found.items():
        assert "seconds" in key or "not finite" in str(value), key


def test_every_need_is_there_or_says_why_not():
    view = View(backbone(), EXAMPLES, seed=7)
    for need in NEEDS:
        if need in ("groups", "factors"):
            with pytest.raises(Unmet, match=f"needs {need}, which the data set made does not have"):
                view[need]
        else:
            assert view[need] is not None
    assert view["seed"] == 7 and view["checkpoint"] == "a net" and view["num_classes"] == 2
    assert set(view) == {*NEEDS, "seconds_inference"} and len(view) == len(list(view))
    with pytest.raises(KeyError):
        view["weights"]


def test_model_data_and_loss_go_together():
    view = View(backbone(), EXAMPLES)
    inputs, labels = view["data"]
    loss = view["loss_fn"](view["model"](inputs), labels)
    expected = functional.cross_entropy(torch.from_numpy(view["logits"]), torch.from_numpy(LABELS))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert not view["model"].training


def test_data_is_some_of_many_with_classes_in_proportion():
    sorted_ = EXAMPLES.take(np.argsort(LABELS, kind="stable"))
    inputs, labels = View(backbone(), sorted_, data_examples=30, seed=2)["data"]
    assert len(inputs) == len(labels) == 30
    assert abs(labels.double().mean() - LABELS.mean()) < 1 / 30
    drawn = sorted_.sample(30, seed=2)
    assert (inputs.numpy() == drawn.inputs).all() and (labels.numpy() == drawn.labels).all()


def test_groups_and_factors_of_the_data():
    more = Examples("m", "image", INPUTS, LABELS, ("a", "b"), np.arange(150), LABELS, np.zeros((150, 2)))
    view = View(backbone(), more)
    assert view["groups"] is LABELS and view["factors"].shape == (150, 2)


def test_predict_and_embed_take_other_inputs():
    view = View(backbone(), EXAMPLES, batch_size=7)
    np.testing.assert_allclose(view["predict"](INPUTS[::-1])[::-1], view["logits"], atol=1e-6)
    np.testing.assert_allclose(view["embed"](INPUTS[:10]), view["features"][:10], atol=1e-6)


@pytest.mark.parametrize("need", ["data", "predict_it", "logits"])
def test_a_model_without_a_head(need):
    class Headless(Answer):
        def both(self, batch):
            return batch.flatten(1), None

    view = View(Backbone("headless", Headless(), _arrays), EXAMPLES)
    assert view["features"].shape == (150, 16)
    with pytest.raises(Unmet, match=r"(no head)"):
        view["predict"](INPUTS) if need == "predict_it" else view[need]
    with pytest.raises(MeasurementError, match="no head"):
        view["model"](torch.zeros(1, 1, 4, 4))


def test_a_head_for_other_classes():
    """Its logits tell what LEEP asks; neither an accuracy nor a loss."""
    view = View(backbone(outputs=5), EXAMPLES)
    found = measure(["leep", "accuracy", "sharpness", "adversarial"], {"": view})
    assert found["leep"] < 0
    assert "head has 5 outputs, and the data set 2 classes" in str(found["accuracy"])
    for name in ("sharpness", "adversarial"):
        assert "needs a head for 2 classes, and the model a net has a head of 5 outputs" in str(found[name])


def test_outputs_are_put_into_the_order_of_the_data_sets_classes():
    straight, turned = backbone(), backbone(classes=("light", "dark"))
    plain, view = View(straight, EXAMPLES), View(turned, EXAMPLES)
    np.testing.assert_allclose(view["logits"], plain["logits"][:, ::-1], atol=1e-9)
    np.testing.assert_allclose(view["model"](view["data"][0]).detach(), view["logits"], atol=1e-6)
    np.testing.assert_allclose(view["predict"](INPUTS), view["logits"], atol=1e-9)
    others = View(backbone(classes=("cat", "dog")), EXAMPLES)  # names that say nothing of this data: order as it is
    np.testing.assert_allclose(others["logits"], plain["logits"], atol=1e-9)


def test_a_reference_is_a_second_model_on_the_same_examples():
    view = View(backbone(), EXAMPLES, reference=backbone(seed=1))
    expected = View(backbone(seed=1), EXAMPLES)["logits"]
    np.testing.assert_allclose(view["reference_logits"], expected)
    share = (view["logits"].argmax(1) == expected.argmax(1)).mean()
    assert measure(["agreement"], {"": view})["agreement"] == share
    found = measure(["agreement"], {"": View(backbone(), EXAMPLES)})
    assert "name it with measure.reference" in str(found["agreement"])


def test_images_stay_in_their_files_until_a_batch_needs_them(tmp_path):
    opened = []

    class Watched(ImageFiles):
        def open(self):
            opened.append(len(self))
            return super().open()

        def __getitem__(self, index):
            return Watched(self.paths[index], self.size)

    for i, image in enumerate(INPUTS[:10]):
        Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    files = Watched(sorted(tmp_path.iterdir()))
    examples = Examples("files", "image", files, LABELS[:10], ("dark", "light"), np.arange(10))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    view = View(Backbone("net", Module(net, "net"), _arrays).ready("cpu"), examples, batch_size=4)
    logits = net(torch.from_numpy(INPUTS[:10]).repeat(1, 3, 1, 1)).detach()
    np.testing.assert_allclose(view["logits"], logits, atol=0.01)  # eight bits a pixel
    assert opened == [4, 4, 2]
    assert view["inputs"].shape == (10, 3, 4, 4)


def test_texts_of_like_length_go_together_and_come_back_in_order():
    seen = []

    class Lengths(Answer):
        def both(self, batch):
            return batch, batch[:, :2]

    def prepare(texts):
        seen.append([len(text) for text in texts])
        return torch.tensor([[len(text), text.count("a"), 1.0] for text in texts])

    texts = ["a" * n for n in (5, 1, 9, 2, 7, 3)]
    examples = Examples("t", "text", texts, np.zeros(6, np.int64), ("x", "y"), np.arange(6))
    view = View(Backbone("lengths", Lengths(), prepare), examples, batch_size=2)
    assert view["features"][:, 0].tolist() == [5, 1, 9, 2, 7, 3]
    assert seen == [[9, 7], [5, 3], [2, 1]]

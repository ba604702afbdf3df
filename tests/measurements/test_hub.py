"""Transformers, saved by the test: what they answer here is what transformers itself says of the same folder."""

import numpy as np
import pytest
import torch

from datamodels.errors import MeasurementError
from datamodels.measurements import backbones
from datamodels.measurements.datasets import Examples, load
from datamodels.measurements.library import measure, schema
from datamodels.measurements.view import View
from tests import needs

WORDS = [
    "a",
    "package",
    "for",
    "reading",
    "writing",
    "python",
    "music",
    "image",
    "files",
    "sound",
    "the",
    "of",
    "and",
    "small",
    "fast",
]
TEXTS = [
    "a small library for reading files",
    "music and sound",
    "python",
    "the fast package of image writing files for the package and reading of the image files of python",
]


@pytest.fixture(scope="module")
def hub():
    needs.transformers()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def vit(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = hub.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=10, hidden_dropout_prob=0.1, attn_implementation="sdpa",
    )  # fmt: skip
    hub.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    hub.ViTImageProcessor(size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return str(folder)


def save_tokenizer(hub, folder, **more):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    hub.BertTokenizer(str(folder / "vocab.txt"), **more).save_pretrained(folder)
    return len(vocabulary)


def bert_config(hub, words, **more):
    return hub.BertConfig(
        vocab_size=words, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    hub.BertModel(bert_config(hub, save_tokenizer(hub, folder))).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names = {0: "sport", 1: "art", 2: "news"}
    config = bert_config(hub, save_tokenizer(hub, folder), id2label=names, label2id={v: k for k, v in names.items()})
    hub.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


# ----------------------------------------------------------------------------------------------------------- images


def test_a_vit_answers_as_transformers_says(hub, vit):
    found = backbones.load(vit, "image", local_files_only=True)
    images = load("digits", "test").inputs[:9]
    model, processor = (
        hub.ViTForImageClassification.from_pretrained(vit).eval(),
        hub.AutoImageProcessor.from_pretrained(vit),
    )
    with torch.no_grad():
        pixels = processor(images=backbones.pictures(images), return_tensors="pt")["pixel_values"]
        states = model.vit(pixel_values=pixels).last_hidden_state
        logits = model(pixel_values=pixels).logits
        features, answer = found.module.both(found.prepare(images))
        torch.testing.assert_close(features, states[:, 0])
        torch.testing.assert_close(answer, logits)
        torch.testing.assert_close(found.module(found.prepare(images)), logits)
        mean = backbones.load(vit, "image", pooling="mean").module.both(found.prepare(images))[0]
        torch.testing.assert_close(mean, states.mean(1))
    prepared = found.prepare(images)
    assert prepared.shape == (9, 3, 16, 16) and prepared.min() >= 0 and prepared.max() <= 1


def test_a_vit_is_measured_from_end_to_end(vit):
    """Attention is differentiated twice for sharpness, once for the adversary; corruptions pass the processor."""
    view = View(backbones.load(vit, "image"), load("digits", "test").sample(120, seed=0), data_examples=20)
    names = ["num_params", "h_score_shrunk", "accuracy", "leep", "adversarial", "sharpness?tolerance=0.1"]
    names += ["corruption", "invariance"]
    found = measure(names, {"": view})
    assert [value for value in found.values() if isinstance(value, Exception)] == []
    assert found["num_params"] == sum(p.numel() for p in view["model"].parameters())
    assert found["sharpness"] > 0


def test_a_convolutional_model_is_averaged_over_the_image(hub, tmp_path):
    config = hub.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    hub.ResNetForImageClassification(config).save_pretrained(tmp_path)
    hub.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = backbones.load(str(tmp_path), "image")
    batch = found.prepare(load("digits", "test").inputs[:3])
    with torch.no_grad():
        features = found.module.both(batch)[0]
        states = found.module.model.resnet(pixel_values=(batch - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(features, states.mean((2, 3)))
    assert features.shape == (3, 8)


def test_images_without_a_processor(hub, tmp_path):
    hub.ViTModel(hub.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(MeasurementError, match="that save_pretrained wrote \\(model and image processor\\)"):
        backbones.load(str(tmp_path), "image", local_files_only=True)


# ------------------------------------------------------------------------------------------------------------ texts


def by_hand(hub, folder, texts, most=12):
    """Last hidden states of each text alone, so that there is no padding."""
    model, tokenizer = hub.AutoModel.from_pretrained(folder).eval(), hub.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [
            model(**tokenizer(text, truncation=True, max_length=most, return_tensors="pt")).last_hidden_state[0]
            for text in texts
        ]


def test_features_of_texts_are_the_mean_over_what_is_no_padding(hub, bert):
    found = backbones.load(bert, "text", local_files_only=True)
    tokens = found.prepare(TEXTS)
    assert tokens.shape == (4, 3, 12)  # ids, mask, types; the longest cut to the positions that there are
    with torch.no_grad():
        features, logits = found.module.both(tokens)
    assert logits is None
    states = by_hand(hub, bert, TEXTS)
    torch.testing.assert_close(features, torch.stack([s.mean(0) for s in states]), rtol=1e-4, atol=1e-5)
    first = backbones.load(bert, "text", pooling="cls").module.both(tokens)[0]
    torch.testing.assert_close(first, torch.stack([s[0] for s in states]), rtol=1e-4, atol=1e-5)
    short = backbones.load(bert, "text", max_length=5)
    assert short.prepare(TEXTS).shape == (4, 3, 5)


def test_a_view_of_texts_in_batches(hub, bert):
    texts = TEXTS * 5
    examples = Examples("t", "text", texts, np.arange(20) % 2, ("a", "b"), np.arange(20))
    features = View(backbones.load(bert, "text"), examples, batch_size=3)["features"]
    expected = torch.stack([s.mean(0) for s in by_hand(hub, bert, TEXTS)]).numpy()
    np.testing.assert_allclose(features, np.tile(expected, (5, 1)), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_texts_and_its_classes_by_name(hub, classifier):
    model, tokenizer = (
        found.from_pretrained(classifier) for found in (hub.BertForSequenceClassification, hub.AutoTokenizer)
    )
    with torch.no_grad():
        logits = torch.cat(
            [
                model.eval()(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).logits
                for text in TEXTS
            ]
        )
    labels = np.array([0, 1, 2, 0])
    examples = Examples("t", "text", TEXTS, labels, ("art", "news", "sport"), np.arange(4))
    view = View(backbones.load(classifier, "text"), examples)
    np.testing.assert_allclose(view["logits"], logits[:, [1, 2, 0]], rtol=1e-4, atol=1e-5)
    inputs, targets = view["data"]
    np.testing.assert_allclose(view["model"](inputs).detach(), view["logits"], rtol=1e-4, atol=1e-5)
    assert targets.tolist() == labels.tolist()


def test_names_that_say_nothing_leave_the_order(hub, tmp_path):
    config = bert_config(hub, save_tokenizer(hub, tmp_path), num_labels=4)
    hub.BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert backbones.load(str(tmp_path), "text").classes is None


def test_positions_of_roberta_begin_behind_the_padding(hub, tmp_path):
    words = save_tokenizer(hub, tmp_path)
    config = hub.RobertaConfig(
        vocab_size=words, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=10, pad_token_id=1,
    )  # fmt: skip
    hub.RobertaModel(config).save_pretrained(tmp_path)
    save_tokenizer(hub, tmp_path)
    found = backbones.load(str(tmp_path), "text")
    tokens = found.prepare(TEXTS)
    assert tokens.shape[2] == 8
    with torch.no_grad():
        assert found.module.both(tokens)[0].shape == (4, 8)


def test_a_tokenizer_that_cannot_pad(hub, tmp_path):
    hub.BertModel(bert_config(hub, save_tokenizer(hub, tmp_path))).save_pretrained(tmp_path)
    save_tokenizer(hub, tmp_path, pad_token=None)
    with pytest.raises(MeasurementError, match="no token to pad with"):
        backbones.load(str(tmp_path), "text")


def test_a_row_of_texts_from_a_csv_file(classifier, tmp_path):
    """From a file and a folder to numbers, as a worker runs it."""
    from worker_scripts import measure as script

    rows = [
        f"{text},{('sport', 'art', 'news')[i % 3]},{'north' if i % 2 else 'south'}" for i, text in enumerate(TEXTS * 15)
    ]
    (tmp_path / "a.csv").write_text("\n".join(["text,topic,region", *rows]) + "\n", encoding="utf-8")
    names = [
        "num_params",
        "h_score_shrunk",
        "leep",
        "nce",
        "accuracy",
        "group_accuracy",
        "effective_rank",
        "anisotropy",
    ]
    found = script.main(
        keys=tuple(schema(names)),
        measurements={"names": tuple(names)},
        seed=0,
        model=classifier,
        dataset=f"csv:{tmp_path}/a.csv?text=text&label=topic&group=region",
        split="all",
        n_samples=60,
    )
    assert set(found) == set(schema(names))
    assert not [value for value in found.values() if isinstance(value, Exception)]
    assert 0 <= found["group_accuracy_worst"] <= found["accuracy"] <= 1


# ---------------------------------------------------------------------------------------------------------- neither


def test_names_that_cannot_be_loaded(hub, tmp_path, bert):
    for name in (str(tmp_path), "no/such-model-anywhere"):
        with pytest.raises(MeasurementError, match="transformers cannot load it"):
            backbones.load(name, "text", local_files_only=True)
    with pytest.raises(MeasurementError, match="takes texts or images, and the data set has neither"):
        backbones.load(bert, "array")
    with pytest.raises(MeasurementError, match="expected texts, got int"):
        backbones.load(bert, "text").prepare([1])

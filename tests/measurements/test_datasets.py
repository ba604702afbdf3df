"""Data sets by name: what is read, how it is split, which examples a seed draws."""

import numpy as np
import pytest
from PIL import Image

from datamodels.errors import DatamodelsError, MeasurementError
from datamodels.learning import data
from datamodels.measurements import datasets
from tests.image_files import write_fashion_mnist


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "news.csv"
    rows = ["title,body,topic,region,part"]
    rows += [
        f'title {i},"body, {i}",{"sport" if i % 3 else "art"},{"n" if i % 2 else "s"},{"a" if i < 8 else "b"}'
        for i in range(30)
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------- what is read


def test_digits_are_images_with_a_channel():
    whole = data.load("digits")
    for split, part in (("train", whole.train), ("test", whole.test)):
        found = datasets.load("digits", split)
        assert found.kind == "image" and found.inputs.shape == (len(part), 1, 8, 8)
        assert (found.inputs[:, 0] == part.inputs).all() and (found.labels == part.labels).all()
        assert found.classes == tuple("0123456789")
    assert len(datasets.load("digits", "all")) == 1797


def test_a_folder_behind_the_name(tmp_path):
    write_fashion_mnist(tmp_path, train=30, test=20)
    found = datasets.load(f"fashion_mnist:{tmp_path}", "test")
    assert found.inputs.shape == (20, 1, 28, 28) and len(found.classes) == 10


def test_csv(csv_file):
    found = datasets.load(f"csv:{csv_file}?text=title,body&label=topic&group=region", "all")
    assert found.kind == "text" and found.inputs[4] == "title 4 body, 4"
    assert found.classes == ("art", "sport") and found.labels.tolist() == [int(i % 3 > 0) for i in range(30)]
    assert found.groups.tolist() == ["s", "n"] * 15
    part = datasets.load(f"csv:{csv_file}?text=body&label=topic&split=part", "b")
    assert part.inputs == [f"body, {i}" for i in range(8, 30)] and part.ids.tolist() == list(range(22))


def test_numbers_as_classes_are_sorted_by_size(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("t,y\na,10\nb,9\nc,2\n")
    assert datasets.load(f"csv:{path}?text=t&label=y", "all").classes == ("2", "9", "10")


@pytest.mark.parametrize(
    ("options", "split", "says"),
    [
        ("text=title", "all", "expected the columns of texts and labels"),
        ("text=title&label=kind", "all", "no column 'kind'; it has title, body, topic"),
        ("text=title&label=topic&split=part", "c", "no row has 'c' in the column 'part', which holds a, b"),
        ("text=title&label=topic", "dev", "expected the split train, test or all"),
        ("text=title&label=topic&sep=x", "all", "unknown option 'sep'"),
    ],
)
def test_csv_that_cannot_be_used(csv_file, options, split, says):
    with pytest.raises(MeasurementError) as caught:
        datasets.load(f"csv:{csv_file}?{options}", split)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"t,y\n", "no rows under its header"),
        (b"t,y\na\n", "line 2: too few columns"),
        (b"t,y\na,\n", "line 2: too few columns, or no label"),
        (b"t,y\n\xff,1\n", "not a CSV file in UTF-8"),
    ],
)
def test_csv_that_is_damaged(tmp_path, content, says):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(MeasurementError, match=says):
        datasets.load(f"csv:{path}?text=t&label=y", "all")
    with pytest.raises(MeasurementError, match="cannot be read"):
        datasets.load("csv:/nowhere/a.csv?text=t&label=y", "all")


def write_images(folder, count, size=(6, 4)):
    for name, level in (("cat", 40), ("dog", 200)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L" if i else "RGB", size, level if i else (level, 0, 0)).save(folder / name / f"{i}.png")


def test_image_folders(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "test", 2)
    (tmp_path / "test/cat/notes.txt").write_text("not an image")
    found = datasets.load(f"folder:{tmp_path}", "test")
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 0, 1, 1]
    array = found.inputs.array()
    assert array.shape == (4, 3, 4, 6) and array.dtype == np.float32
    assert array[:, 1].max(axis=(1, 2)).tolist() == pytest.approx([0, 40 / 255, 0, 200 / 255])
    assert len(datasets.load(f"folder:{tmp_path}", "all")) == 10
    taken = found.take(np.array([3, 0]))
    assert taken.labels.tolist() == [1, 0] and taken.inputs.array()[0, 0, 0, 0] == pytest.approx(200 / 255)
    sized = datasets.load(f"folder:{tmp_path}?size=2", "test")
    assert sized.inputs.array().shape == (4, 3, 2, 2)
    with pytest.raises(MeasurementError, match="no split 'dev'"):
        datasets.load(f"folder:{tmp_path}", "dev")


def test_an_image_folder_without_splits(tmp_path):
    write_images(tmp_path, 10)
    train, test = (datasets.load(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert not set(train.inputs.paths) & set(test.inputs.paths)


def test_images_of_several_sizes_need_one(tmp_path):
    write_images(tmp_path, 1)
    Image.new("L", (9, 9)).save(tmp_path / "cat/large.png")
    found = datasets.load(f"folder:{tmp_path}", "all")
    with pytest.raises(MeasurementError, match="images of 2 sizes"):
        found.inputs.array()
    assert datasets.load(f"folder:{tmp_path}?size=4", "all").inputs.array().shape == (3, 3, 4, 4)
    (tmp_path / "cat/broken.png").write_bytes(b"not a png")
    with pytest.raises(MeasurementError, match="broken.png: cannot be read as an image"):
        datasets.load(f"folder:{tmp_path}?size=4", "all").inputs.array()


USERS = """
import numpy as np
def shapes(split, n=6):
    return {"inputs": np.zeros((n, 1, 4, 4)), "labels": [split] * n, "groups": ["g"] * n,
            "factors": np.zeros((n, 2)), "classes": ["train", "test"]}
def texts(split):
    return {"inputs": ["a", "b"], "labels": [3, 1]}
def bare(split):
    return {"inputs": np.full((2, 5), 7), "labels": np.array([0, 1])}
def pair(split):
    return [1], [2]
def more(split):
    return {"inputs": [[1]], "labels": [0], "weights": [1]}
def short(split):
    return {"inputs": np.zeros((2, 5)), "labels": [0, 1], "groups": [1]}
def stranger(split):
    return {"inputs": ["a"], "labels": ["b"], "classes": ["c"]}
"""


def test_a_users_function(tmp_path, monkeypatch):
    (tmp_path / "users_data.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    found = datasets.load("users_data.shapes?n=4", "test")
    assert (found.kind, len(found), found.inputs.dtype) == ("image", 4, np.float32)
    assert found.labels.tolist() == [1] * 4 and found.groups.tolist() == ["g"] * 4 and found.factors.shape == (4, 2)
    found = datasets.load("users_data.texts", "test")
    assert (found.kind, found.classes, found.labels.tolist()) == ("text", ("0", "1", "2", "3"), [3, 1])
    assert datasets.load("users_data.bare", "test").kind == "array"
    for name, says in (
        ("pair", "expected a dict with inputs and labels"),
        ("more", "returned weights; expected only"),
        ("short", "expected groups for each of 2 examples"),
        ("stranger", "'b' is none of the classes c"),
        ("missing", "has no 'missing'"),
    ):
        with pytest.raises(MeasurementError, match=says):
            datasets.load(f"users_data.{name}", "test")


@pytest.mark.parametrize("name", ["digts", "digits?x=1", "csv", "folder:/nowhere", "cifar10"])
def test_names_that_are_none(name):
    with pytest.raises(DatamodelsError):
        datasets.load(name, "test")


# ----------------------------------------------------------------------------------------------- what is drawn


def test_every_beginning_has_the_classes_in_proportion():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = datasets.stratified_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    for n in range(1, 101):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert np.abs(counts - n * np.array([0.6, 0.3, 0.1])).max() <= 1
    assert (order == datasets.stratified_order(labels, seed=3)).all()
    assert not (order == datasets.stratified_order(labels, seed=4)).all()


def test_an_order_is_the_same_in_ten_years():
    """By the rule of the docstring, with numbers that any PCG64 gives."""
    labels = np.array([0, 1, 0, 0, 1, 0])
    words = np.random.PCG64(np.random.SeedSequence((0x73616D70, 7))).random_raw(6)
    first, second = (sorted(np.flatnonzero(labels == c), key=lambda j: words[j]) for c in (0, 1))
    expected = [first[0], second[0], first[1], first[2], second[1], first[3]]  # at 1/8, 1/4, 3/8, 5/8, 3/4, 7/8
    assert datasets.stratified_order(labels, seed=7).tolist() == expected
    assert words[:2].tolist() == [9902207201166223326, 12188040528079197010]


def test_inside_a_class_every_example_is_as_likely():
    labels = np.repeat([0, 1], [8, 4])
    drawn = [datasets.stratified_order(labels, seed=seed)[:6] for seed in range(600)]
    counts = np.bincount(np.concatenate(drawn), minlength=12)
    assert np.abs(counts - 300).max() < 5 * np.sqrt(600 * 0.25)


def test_fewer_are_among_more_of_the_same_seed():
    found = datasets.load("digits", "test")
    few, more = found.sample(50, seed=1), found.sample(200, seed=1)
    assert few.ids.tolist() == more.ids[:50].tolist()
    assert (few.labels == found.labels[few.ids]).all() and (few.inputs == found.inputs[few.ids]).all()
    assert few.classes == found.classes
    assert set(few.ids) != set(found.sample(50, seed=2).ids)


def test_a_sample_that_there_is_not():
    found = datasets.load("digits", "test")
    assert len(found.sample(797, seed=0)) == 797
    with pytest.raises(MeasurementError, match="asked for 798 examples of 797; let the design's filter"):
        found.sample(798, seed=0)


def test_kept_classes_keep_their_numbers():
    found = datasets.load("digits", "test")
    kept = found.keep(["7", "3"])
    assert set(kept.labels) == {3, 7} and kept.classes == found.classes
    assert len(kept) == np.isin(found.labels, [3, 7]).sum()
    with pytest.raises(MeasurementError, match="there is no class 'seven'"):
        found.keep(["seven"])

import contextlib
import gzip
import hashlib
import itertools
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodels.errors import DatamodelsError
from datamodels.learning import data
from datamodels.learning.data import Augment, Dataset, Split, load, masked
from tests import image_files
from tests.needs import missing


def images(n=3, shape=(2, 2)):
    return np.zeros((n, *shape), np.float32)


def labels(n=3):
    return np.zeros(n, np.int64)


# --- Split and Dataset


@pytest.mark.parametrize(
    ("inputs", "targets", "says"),
    [
        (images().astype(np.float64), labels(), "float32, got float64"),
        (images(), labels().astype(np.int32), "int64, got int32"),
        (images().tolist(), labels(), "got list"),
        (images(3), labels(4), r"\(3, 2, 2\) and \(4,\)"),
        (images(), np.zeros((3, 1), np.int64), r"\(3, 1\)"),
        (np.zeros(3, np.float32), labels(), r"\(n, ...\)"),
        (images(0), labels(0), "at least one"),
        (np.full((3, 2), np.nan, np.float32), labels(), "not finite"),
    ],
)
def test_a_split_is_refused(inputs, targets, says):
    with pytest.raises(DatamodelsError, match=says):
        Split(inputs, targets)


def test_a_dataset_checks_its_splits_against_each_other():
    split = Split(images(), np.array([0, 1, 2]))
    assert len(Dataset("x", split, split, 3).train) == 3
    with pytest.raises(DatamodelsError, match=r"labels in \[0, 2\), got 0 to 2"):
        Dataset("x", split, split, 2)
    with pytest.raises(DatamodelsError, match="expected the same"):
        Dataset("x", split, Split(images(3, (4,)), labels()), 3)
    with pytest.raises(DatamodelsError, match="got -1 to 0"):
        Dataset("x", Split(images(), np.array([0, -1, 0])), split, 3)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DatamodelsError, match="'mnist'; expected one of digits, fashion_mnist, cifar10"):
        load("mnist")


# --- digits


def test_digits_are_scikit_learns_in_the_documented_split():
    from sklearn.datasets import load_digits

    raw = load_digits()
    words = np.random.PCG64(0).random_raw(1797).tolist()
    order = sorted(range(1797), key=lambda i: (words[i], i))  # the rule of `permutation`, without numpy
    train, test = sorted(order[:1000]), sorted(order[1000:])
    digits = load("digits")
    assert digits.num_classes == 10
    for split, indices in ((digits.train, train), (digits.test, test)):
        assert (split.labels == raw.target[indices]).all()
        assert split.inputs.dtype == np.float32
        assert split.inputs.reshape(-1, 64).astype(float) * 16 == pytest.approx(raw.data[indices], abs=0)
    assert np.bincount(digits.train.labels).min() >= 80


def test_the_digits_split_stays():
    """Golden: a mask column and a target mean the same digit in every version."""
    train, test = data.digits_indices()
    golden = "e0daeba2767705cbf14259af85818dc4f271b41a75c25971424d8f0137a9679a"
    assert hashlib.sha256(train.astype("<i8").tobytes()).hexdigest() == golden
    assert sorted([*train, *test]) == list(range(1797))
    assert data.permutation(8, seed=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(DatamodelsError, match="takes no folder"):
        load("digits", tmp_path)


def test_data_needs_no_torch():
    code = "import sys; from datamodels.learning import data; data.load('digits'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- Fashion-MNIST


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_idx_files(tmp_path, suffix):
    image_files.write_fashion_mnist(tmp_path, train=30, test=20, suffix=suffix)
    fashion = load("fashion_mnist", tmp_path)
    assert fashion.train.inputs.shape == (30, 28, 28)
    assert fashion.test.inputs.shape == (20, 28, 28)
    raw = (tmp_path / f"t10k-images-idx3-ubyte{suffix}").read_bytes()
    pixels = list((gzip.decompress(raw) if suffix else raw)[16:])
    assert (fashion.test.inputs.ravel() * 255).round().astype(int).tolist() == pixels
    raw = (tmp_path / f"train-labels-idx1-ubyte{suffix}").read_bytes()
    assert fashion.train.labels.tolist() == list((gzip.decompress(raw) if suffix else raw)[8:])


def test_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(DatamodelsError, match=r"apt-get install dataset-fashion-mnist.*--data\.dir"):
        load("fashion_mnist", tmp_path)
    monkeypatch.setattr(data, "FASHION_MNIST_FOLDER", tmp_path / "none")
    with pytest.raises(DatamodelsError, match=r"none; .*apt-get install dataset-fashion-mnist"):
        load("fashion_mnist")


def test_the_real_fashion_mnist():
    if not data.FASHION_MNIST_FOLDER.is_dir():
        missing("needs Debian's package dataset-fashion-mnist")
    fashion = load("fashion_mnist")
    assert fashion.train.inputs.shape == (60_000, 28, 28)
    assert np.bincount(fashion.train.labels).tolist() == [6_000] * 10
    assert np.bincount(fashion.test.labels).tolist() == [1_000] * 10
    assert fashion.train.inputs.mean() == pytest.approx(0.2860, abs=1e-4)  # the published mean and deviation
    assert fashion.train.inputs.std() == pytest.approx(0.3530, abs=1e-4)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (IMAGES, lambda raw: raw[:-1], "truncated"),
        (IMAGES, lambda raw: raw[:10], "ends inside its header"),
        (IMAGES, lambda raw: b"", "first bytes are 00 00 08 03; got"),
        (IMAGES, lambda raw: raw + b"\0", "goes on after"),
        (IMAGES, lambda raw: b"\0\0\x0d" + raw[3:], "first bytes are 00 00 08 03; got 00 00 0d 03"),
        (IMAGES, lambda raw: raw[:4] + struct.pack(">3I", 2**31, 2**31, 4) + raw[16:], "its header says"),
        (IMAGES, lambda raw: raw[:4] + struct.pack(">3I", 0, 28, 28), "its header says"),
        (LABELS, lambda raw: raw[:-1], "truncated"),
        (LABELS, lambda raw: raw[:4] + struct.pack(">I", 29) + raw[8:-1], "29 labels for 30 images"),
        (LABELS, lambda raw: raw[:-1] + b"\x0a", r"labels in \[0, 10\), got 10"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_idx_file_is_named(tmp_path, name, damage, says, suffix):
    image_files.write_fashion_mnist(tmp_path, train=30, test=20, suffix=suffix)
    path = tmp_path / (name + suffix)
    raw = path.read_bytes()
    path.write_bytes(gzip.compress(damage(gzip.decompress(raw))) if suffix else damage(raw))
    with pytest.raises(DatamodelsError, match=f"{name}.*{says}"):
        load("fashion_mnist", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-8] + b"\0" * 8,  # its checksum and length
        lambda raw: raw[: len(raw) // 2] + b"\xff" * 20 + raw[len(raw) // 2 + 20 :],
        lambda raw: raw[:10] + b"\xff" * 20 + raw[30:],  # after the header: no such kind of block
        lambda raw: b"<html>404</html>",
    ],
)
def test_a_damaged_gzip_is_named(tmp_path, damage):
    image_files.write_fashion_mnist(tmp_path, train=30, test=20)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatamodelsError, match=f"{IMAGES}.gz: .*fetch it again"):
        load("fashion_mnist", tmp_path)


# --- CIFAR-10


def test_the_hand_written_pickle_is_what_numpy_would_read():
    pixels, targets = image_files.cifar10_examples(300, seed=1)
    content = pickle.loads(image_files.python2_batch(pixels, targets.tolist()), encoding="bytes")
    assert list(content) == [b"batch_label", b"labels", b"data", b"filenames"]
    assert content[b"labels"] == targets.tolist()
    assert content[b"data"].dtype == np.uint8
    assert (content[b"data"] == pixels).all()


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("nested", [False, True])
def test_cifar10_reads_its_batches_in_order(tmp_path, form, nested):
    sub = "cifar-10-batches-py" if form == "python" else "cifar-10-batches-bin"
    folder = tmp_path / sub if nested else tmp_path
    folder.mkdir(exist_ok=True)
    image_files.write_cifar10(folder, train=42, test=7, form=form)
    cifar = load("cifar10", tmp_path)
    parts = [image_files.cifar10_examples(n, seed=i) for i, n in enumerate((9, 9, 8, 8, 8, 7))]
    for split, expected in ((cifar.train, parts[:5]), (cifar.test, parts[5:])):
        pixels = np.concatenate([pixels for pixels, _ in expected])
        assert split.inputs.shape == (len(pixels), 3, 32, 32)
        assert (np.round(split.inputs * 255).astype(np.uint8).reshape(-1, 3072) == pixels).all()
        assert split.labels.tolist() == [label for _, targets in expected for label in targets]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar10_reads_what_python_3_writes(tmp_path, protocol, order):
    image_files.write_cifar10(tmp_path, train=20, test=4)
    pixels, targets = image_files.cifar10_examples(4, seed=5)
    for keys in (("data", "labels"), (b"data", b"labels")):
        content = dict(zip(keys, (np.asarray(pixels, order=order), targets.tolist()), strict=True))
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
        test = load("cifar10", tmp_path).test
        assert (np.round(test.inputs * 255).astype(np.uint8).reshape(-1, 3072) == pixels).all()
        assert test.labels.tolist() == targets.tolist()


@pytest.mark.parametrize("gone", ["data_batch_1", "data_batch_3", "test_batch"])
@pytest.mark.parametrize(("form", "suffix"), [("python", ""), ("binary", ".bin")])
def test_a_missing_batch_is_named(tmp_path, gone, form, suffix):
    image_files.write_cifar10(tmp_path, train=20, test=4, form=form)
    (tmp_path / f"{gone}{suffix}").unlink()
    with pytest.raises(DatamodelsError, match=rf"{gone}{suffix}: cannot be read \(No such file .*all six"):
        load("cifar10", tmp_path)


def test_cifar10_without_a_folder_says_where_it_is_from(tmp_path):
    with pytest.raises(DatamodelsError, match=r"no folder given; name it with --data\.dir=DIR.*cs\.toronto\.edu"):
        load("cifar10")
    with pytest.raises(DatamodelsError, match=r"neither data_batch_1 nor data_batch_1\.bin in .*--data\.dir"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], "bytes; expected a multiple of 3073"),
        (lambda raw: b"", "0 bytes; expected"),
        (lambda raw: b"\x0a" + raw[1:], r"labels in \[0, 10\), got \d to 10"),
    ],
)
def test_a_damaged_binary_batch_is_named(tmp_path, damage, says):
    image_files.write_cifar10(tmp_path, train=20, test=4, form="binary")
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatamodelsError, match=f"data_batch_2.bin: .*{says}"):
        load("cifar10", tmp_path)


PIXELS, TARGETS = image_files.cifar10_examples(4, seed=5)
GOOD = {b"data": PIXELS, b"labels": TARGETS.tolist()}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "expected a dict of 'data' and 'labels', got list"),
        ({}, "expected b'data' as a numpy array, got NoneType"),
        (GOOD | {b"data": PIXELS.tobytes()}, "numpy array, got bytes"),
        (GOOD | {b"data": PIXELS.astype(np.float32)}, r"as u1 \(uint8\) of shape \(n, 3072\), got f4"),
        (GOOD | {b"data": PIXELS.astype(np.int8)}, "got i1"),
        (GOOD | {b"data": PIXELS.reshape(-1)}, r"got u1 \(12288,\)"),
        (GOOD | {b"data": PIXELS[:, 1:]}, r"got u1 \(4, 3071\)"),
        (GOOD | {b"data": PIXELS[:3]}, "4 labels for 3 images"),
        (GOOD | {b"labels": []}, "0 labels for 4 images"),
        (GOOD | {b"labels": "0123"}, "list of ints, got str"),
        (GOOD | {b"labels": [0, 1, 2, True]}, "list of ints"),
        (GOOD | {b"labels": [0, 1, 2, 10]}, r"labels in \[0, 10\), got 0 to 10"),
        (GOOD | {b"labels": [0, 1, 2, -(2**70)]}, r"labels in \[0, 10\)"),
        (GOOD | {b"data": np.array([[object()]])}, "refused, because it uses the pickle opcode NEWOBJ"),
        (GOOD | {b"data": np.array([[{}]], dtype=object)}, "refused, because an array holds something else"),
        (GOOD | {b"extra": Path("/")}, "refused, because it asks for pathlib"),
        (GOOD | {b"extra": {1, 2}}, "refused"),
        (GOOD | {b"extra": [(i, i) for i in range(200)]}, "more than 100 tuples"),
    ],
)
def test_a_python_batch_of_something_else_is_named(tmp_path, content, says):
    image_files.write_cifar10(tmp_path, train=20, test=4)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, 3))
    with pytest.raises(DatamodelsError, match=f"test_batch: .*{says}"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"K\x04M\x00\x0c\x86", b"K\x04M\x01\x0c\x86", r"got u1 \(4, 3073\)"),
        (b"T\x00\x30\x00\x00", b"T\xff\x2f\x00\x00", "fetch it again"),
        (PIXELS.tobytes(), PIXELS.tobytes()[:-1], "fetch it again"),
        (b"T\x00\x30\x00\x00" + PIXELS.tobytes(), b"U\x03abc", r"3 bytes for shape \(4, 3072\)"),
        (b"K\x04M\x00\x0c\x86", b"M\x00\x30K\x01]", "not a CIFAR-10 batch"),
        (b"(K\x01K\x04M\x00\x0c\x86", b"(K\x01K\x04", "refused, because the shape of an array"),
        (b"K\x04M\x00\x0c\x86", b"K\x04U\x01a\x86", "refused, because the shape of an array"),
        (b"K\x04M\x00\x0c\x86", b"K\x04J\xff\xff\xff\xff\x86", "refused, because the shape of an array"),
        (b"U\x02u1", b"K\x01", "refused, because the dtype of an array"),
    ],
)
def test_a_python_batch_of_false_parts_is_named(tmp_path, old, new, says):
    image_files.write_cifar10(tmp_path, train=20, test=4)
    raw = image_files.python2_batch(PIXELS, TARGETS.tolist())
    assert raw.count(old) == 1
    (tmp_path / "test_batch").write_bytes(raw.replace(old, new))
    with pytest.raises(DatamodelsError, match=f"test_batch: .*{says}"):
        load("cifar10", tmp_path)


def test_an_absurdly_large_batch_is_not_read(tmp_path):
    image_files.write_cifar10(tmp_path, train=20, test=4)
    with (tmp_path / "data_batch_4").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room on disk, and would take a terabyte of memory
    with pytest.raises(DatamodelsError, match="data_batch_4: 1099511627776 bytes"):
        load("cifar10", tmp_path)


class Runs:
    """What a hostile file holds: to unpickle it is to run `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested_tuple_key(depth=1_000_000):
    """A dict key of a million tuples in each other: hashing it recurses in C without a limit."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def hostile(flag: Path) -> dict[str, bytes]:
    """Pickles that would create the file `flag`, crash or ask for memory, if they were simply unpickled."""
    run = f"__import__('pathlib').Path({str(flag)!r}).touch()"
    good = image_files.python2_batch(PIXELS, TARGETS.tolist())
    quoted = run.encode()
    text = struct.pack("<cI", b"X", len(quoted)) + quoted
    return {
        "reduce": pickle.dumps(Runs(eval, run), 2),
        "reduce, protocol 0": pickle.dumps(Runs(eval, run), 0),
        "reduce, protocol 5": pickle.dumps(Runs(eval, run), 5),
        "inside a good batch": pickle.dumps(GOOD | {b"extra": Runs(eval, run)}, 2),
        "before a good batch": pickle.dumps(Runs(eval, run), 2)[:-1] + b"0" + good[2:],
        "instance": b"(" + text + b"ibuiltins\neval\n.",
        "object": b"(cbuiltins\neval\n" + text + b"o.",
        "stack global": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93" + text + b"\x85R.",
        "python 2's builtins": good[:-2] + b"U\x01xc__builtin__\neval\n" + text + b"\x85Ru.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__init__\x93.",
        "numpy's own loader": b"\x80\x02cnumpy\nload\nU\x06/tmp/xq\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x02U\x01xQ.",
        "a buffer": b"\x80\x05\x97.",
        "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "a large memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a large byte array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "a large string": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
        "a large array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R.",
        "a deep key": nested_tuple_key(),
        "a deep list": b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b".",
        "a damaged one": good[: len(good) // 2],
        "one byte": b"\x80",
        "nothing": b"",
        "a web page": b"<html>404</html>",
    }


@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_nothing_of_a_hostile_batch_is_run(tmp_path, name):
    flag = tmp_path / "ran"
    image_files.write_cifar10(tmp_path, train=20, test=4)
    (tmp_path / "data_batch_1").write_bytes(hostile(flag)[name])
    with pytest.raises(DatamodelsError, match="data_batch_1: "):
        load("cifar10", tmp_path)
    assert not flag.exists()


def test_the_hostile_batches_are_hostile(tmp_path):
    """Otherwise the test above would prove nothing."""
    ran = []
    for name, raw in hostile(tmp_path / "ran").items():
        if name.startswith(("a deep", "a large", "numpy's")):
            continue  # would take this process down, or its memory
        with contextlib.suppress(Exception):
            pickle.loads(raw, encoding="bytes")
        if (tmp_path / "ran").exists():
            ran.append(name)
            (tmp_path / "ran").unlink()
    assert set(ran) >= {
        "reduce", "reduce, protocol 0", "reduce, protocol 5", "inside a good batch", "before a good batch",
        "instance", "object", "stack global", "python 2's builtins",
    }  # fmt: skip


def test_a_hostile_batch_costs_little_memory(tmp_path):
    """In a process of its own: 2 GiB of address space are enough to refuse what asks for a terabyte."""
    image_files.write_cifar10(tmp_path, train=20, test=4)
    for name in ("a large memo", "a large byte array", "a large string", "a large array", "a deep key"):
        (tmp_path / "data_batch_1").write_bytes(hostile(tmp_path / "ran")[name])
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))\n"
            "from datamodels.learning import cifar10\n"
            "from datamodels.errors import DatamodelsError\n"
            "from pathlib import Path\n"
            f"try: cifar10.read(Path({str(tmp_path)!r}))\n"
            "except DatamodelsError as error: assert 'MemoryError' not in str(error), error\n"
            "else: raise SystemExit('read it')\n"
        )
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each would reserve a stack
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=threads, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr[-500:])


# --- tensors


def test_masked_selects_in_order():
    inputs, targets = torch.arange(12.0).reshape(6, 2), torch.arange(6)
    mask = np.array([1, 0, 1, 1, 0, 0], bool)
    mask.flags.writeable = False  # as rows of a store are; torch warns at sharing one, and warnings are errors
    chosen, chosen_labels = masked(inputs, targets, mask)
    assert chosen_labels.tolist() == [0, 2, 3]
    assert chosen.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert masked(inputs, targets, torch.from_numpy(mask.copy()))[1].tolist() == [0, 2, 3]


@pytest.mark.parametrize("mask", [np.array([0, 2]), np.ones(5, bool), np.ones((6, 1), bool), np.ones(6)])
def test_masked_refuses_what_is_not_a_mask(mask):
    with pytest.raises(DatamodelsError, match=r"mask: expected bool of shape \(6,\)"):
        masked(torch.zeros(6, 2), torch.zeros(6, dtype=torch.long), mask)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_augment_is_the_generators_alone():
    batch = torch.rand(16, 3, 32, 32, generator=generator())
    torch.manual_seed(1)
    first = Augment()(batch, generator(5))
    torch.manual_seed(2)
    assert torch.equal(first, Augment()(batch, generator(5)))
    assert not torch.equal(first, Augment()(batch, generator(6)))
    assert first.shape == batch.shape
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_augment_switched_off_changes_nothing():
    batch = torch.rand(8, 3, 9, 7, generator=generator())
    assert torch.equal(Augment(flip=False, translate=0, cutout=0)(batch, generator()), batch)


def test_flip_turns_about_half_of_the_images_left_to_right():
    batch = torch.rand(400, 2, 5, 6, generator=generator())
    out = Augment(flip=True, translate=0, cutout=0)(batch, generator())
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(out, batch, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(out, batch, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 150 < sum(flipped) < 250


@pytest.mark.parametrize("pad", ["zero", "reflect"])
def test_translate_shifts_each_image_by_one_of_all_offsets(pad):
    batch = torch.rand(600, 2, 6, 5, generator=generator())
    out = Augment(flip=False, translate=2, cutout=0, pad=pad)(batch, generator())
    seen = set()
    for image, moved in zip(batch.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode={"zero": "constant", "reflect": "reflect"}[pad])
        offsets = itertools.product(range(5), range(5))
        hits = [(y, x) for y, x in offsets if np.array_equal(padded[:, y : y + 6, x : x + 5], moved)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) == 25


def test_cutout_zeroes_one_square_anywhere():
    out = Augment(flip=False, translate=0, cutout=3)(torch.ones(500, 2, 6, 5), generator())
    seen = set()
    for image in out:
        rows, columns = np.nonzero((image == 0).all(0).numpy())
        assert (image == 0).sum() == 2 * 9
        assert (np.ptp(rows), np.ptp(columns)) == (2, 2)
        seen.add((rows.min(), columns.min()))
    assert len(seen) == 4 * 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"pad": "wrap"}, "'wrap'"), ({"translate": -1}, ">= 0"), ({"cutout": -1}, ">= 0")],
)
def test_augment_refuses(arguments, says):
    with pytest.raises(DatamodelsError, match=says):
        Augment(**arguments)


def test_a_cutout_larger_than_the_image_is_refused():
    with pytest.raises(DatamodelsError, match="does not fit in 8x8"):
        Augment(cutout=9)(torch.zeros(1, 1, 8, 8), generator())

"""The design is a pure function of (spec, row), by a rule that is written down and pinned here."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest

from datamodels.design import check_index, resolve
from datamodels.errors import RowError, SpecError, StoreError
from datamodels.spec import Spec
from datamodels.store import Store

N = 101
LABELS = np.arange(N) * 7 % 5  # five classes of 21 or 20
GROUPS = np.array([f"patient {(j * j) % 17:02d}" for j in range(N)])
SCHEMA = {"masks": {"shape": [N], "dtype": "bits"}, "margins": {"shape": [2], "dtype": "float32"}}
TRAIN = {"sampler": "bernoulli", "alpha": 0.3, "masks": 6, "seed": 11}


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "labels.npy", LABELS)
    np.save(tmp_path / "groups.npy", GROUPS)
    return tmp_path


def design_of(folder, *blocks, schema=SCHEMA, **top):
    return resolve(Spec.from_json({"schema": schema, "design": list(blocks), **top}), folder)


def of_sampler(sampler, alpha=0.3, **more):
    extra = {"stratified": {"labels": "labels.npy"}, "by_group": {"groups": "groups.npy"}}.get(sampler, {})
    return {"sampler": sampler, "alpha": alpha, "masks": 6, "seed": 11, **extra, **more}


def masks_of(design, rows=None):
    return np.array([design.assignment(row).mask for row in (range(design.num_models) if rows is None else rows)])


# ------------------------------------------------------------------------------------ the rule

# If one of these changes, every store that was ever made has other masks than its spec says. There is no good reason.
GOLDEN = {
    "bernoulli": "d2d0879721fc9288a38f05aff89beb9cbae420a890e34e11017253495aa031ea",
    "fixed_size": "2faf19dd3f056b3eb24e8610e845b2a4f7f8a5fb9fc41c46f60bd1a84eb9e767",
    "stratified": "6374655cf70f4235730fac91dff11d8dd4a7d7fd57958e512a62195beec06581",
    "by_group": "7a5ca31e6058430ff4fcb6b7ab8629e5e334dfc0bac3f3ff63beaa934cdd9673",
}
GOLDEN_SEEDS = "6c48616de90c9bf6ef721a6190fbe0fed55b48f00f84651d706e448f18a9a825"


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("sampler", GOLDEN)
def test_masks_are_what_they_always_were(sampler, folder):
    assert sha(masks_of(design_of(folder, of_sampler(sampler)).design)) == GOLDEN[sampler]


def test_seeds_are_what_they_always_were(folder):
    design = design_of(folder, TRAIN, {"role": "eval", "masks": 2, "repeats": 3, "seed": 2**32 - 1}).design
    assert sha(np.array([design.assignment(row).seed for row in range(12)], np.uint64)) == GOLDEN_SEEDS


def raw_outputs(*key):
    """Raw PCG64 by the reference: numpy's SeedSequence for the state, then the generator in Python's own integers."""
    words = np.random.SeedSequence(key).generate_state(4, np.uint64)
    start, step = (int(words[0]) << 64) | int(words[1]), (int(words[2]) << 64) | int(words[3])
    mask128, factor = (1 << 128) - 1, 0x2360ED051FC65DA44385DF649FCCF645
    increment = (step << 1 | 1) & mask128
    state = (increment + start) & mask128
    state = (state * factor + increment) & mask128
    while True:
        state = (state * factor + increment) & mask128
        high, low, turn = state >> 64, state & (2**64 - 1), state >> 122
        word = high ^ low
        yield ((word >> turn) | (word << (64 - turn))) & (2**64 - 1)


def by_the_rule(sampler, alpha, seed, mask_id):
    """The docstring of `datamodels.design`, in plain Python."""
    outputs = raw_outputs(0x6D61736B, seed, mask_id)
    alpha = Fraction(alpha)
    if sampler == "by_group":
        names = sorted(set(GROUPS.tolist()))
        chosen = {name for name in names if next(outputs) < alpha * 2**64}
        return [name in chosen for name in GROUPS.tolist()]
    r = list(itertools.islice(outputs, N))
    if sampler == "bernoulli":
        return [value < alpha * 2**64 for value in r]
    strata = LABELS.tolist() if sampler == "stratified" else [0] * N
    mask = [False] * N
    for label in set(strata):
        members = [j for j in range(N) if strata[j] == label]
        size = math.floor(alpha * len(members) + Fraction(1, 2))
        for _, j in sorted((r[j], j) for j in members)[:size]:
            mask[j] = True
    return mask


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1e-5, 1])
@pytest.mark.parametrize("sampler", GOLDEN)
def test_masks_follow_the_documented_rule(sampler, alpha, folder):
    design = design_of(folder, of_sampler(sampler, alpha)).design
    for mask_id in range(6):
        assert design.assignment(mask_id).mask.tolist() == by_the_rule(sampler, alpha, 11, mask_id)


def test_seeds_follow_the_documented_rule(folder):
    design = design_of(folder, TRAIN, {**TRAIN, "seed": 2**32 - 1}).design
    for row in range(12):
        seed = 11 if row < 6 else 2**32 - 1
        assert design.assignment(row).seed == next(raw_outputs(0x73656564, seed, row % 6)) >> 32 == design.seed(row)


def test_the_same_in_any_order_and_in_a_fresh_process(folder):
    (folder / "spec.json").write_text(json.dumps({"schema": SCHEMA, "design": [of_sampler("stratified")]}))
    design = design_of(folder, of_sampler("stratified")).design
    forwards = masks_of(design)
    np.random.seed(3)
    np.testing.assert_array_equal(masks_of(design, range(5, -1, -1))[::-1], forwards)
    script = (
        "import sys, hashlib, numpy as np; from datamodels.design import resolve; from datamodels.spec import Spec\n"
        "d = resolve(Spec.load(sys.argv[1] + '/spec.json'), sys.argv[1]).design\n"
        "a = [d.assignment(r) for r in (3, 0, 5, 1, 4, 2)]\n"
        "a.sort(key=lambda x: x.row)\n"
        "print(hashlib.sha256(np.array([x.mask for x in a]).tobytes()).hexdigest(), [x.seed for x in a])"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == f"{sha(forwards)} {[design.assignment(r).seed for r in range(6)]}".split()


# ------------------------------------------------------------------------------------ the samplers


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75, 1.0, 0.001])
def test_fixed_size_has_its_size(alpha, folder):
    masks = masks_of(design_of(folder, of_sampler("fixed_size", alpha, masks=20)).design)
    assert (masks.sum(1) == math.floor(alpha * N + 0.5)).all()


def test_stratified_has_its_size_in_every_class(folder):
    masks = masks_of(design_of(folder, of_sampler("stratified", 0.5, masks=20)).design)
    for label in range(5):
        assert set(masks[:, label == LABELS].sum(1)) == {(21 if label == 0 else 20) // 2 + (label == 0)}


def test_stratified_over_many_labels_is_quick_and_follows_the_rule(tmp_path):
    """As many labels as examples, near enough: speakers, patients, sites."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(20_000), 2)).astype("U5")
    np.save(tmp_path / "labels.npy", labels)
    schema = {**SCHEMA, "masks": {**SCHEMA["masks"], "shape": [40_000]}}
    design = design_of(tmp_path, of_sampler("stratified", 0.5), schema=schema).design
    started = time.perf_counter()
    masks = masks_of(design, range(3))
    assert time.perf_counter() - started < 1
    for mask in masks:
        assert (np.unique(labels[mask], return_counts=True)[1] == 1).all() and mask.sum() == 20_000


def test_by_group_takes_whole_groups(folder):
    masks = masks_of(design_of(folder, of_sampler("by_group", 0.5, masks=50)).design)
    share = []
    for name in np.unique(GROUPS):
        members = masks[:, name == GROUPS]
        assert (members.all(1) == members.any(1)).all()
        share.append(members[:, 0].mean())
    assert 0.35 < np.mean(share) < 0.65


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_bernoulli_statistics(alpha, folder):
    masks = masks_of(design_of(folder, of_sampler("bernoulli", alpha, masks=400)).design).astype(float)
    sd = math.sqrt(alpha * (1 - alpha))
    assert abs(masks.mean() - alpha) < 4 * sd / math.sqrt(masks.size)
    assert np.abs(masks.mean(0) - alpha).max() < 5 * sd / math.sqrt(400)
    correlation = np.corrcoef(masks.T) - np.eye(N)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(400)


# ------------------------------------------------------------------------------------ blocks and rows


def test_rows_are_cell_then_mask_then_repeat_in_block_order(folder):
    design = design_of(
        folder,
        {"count": 2, "seed": 1},
        {**TRAIN, "masks": 2, "repeats": 3, "choices": {"lr": [0.1, 0.2], "width": {"range": [8, 17, 8]}}},
        {"role": "eval", "masks": 2, "repeats": 2, "seed": 5},
    ).design
    got = [
        (a.row, a.role, a.block, a.choices.get("lr"), a.choices.get("width"), a.mask_id, a.repeat)
        for a in map(design.assignment, range(design.num_models))
    ]
    expected, row = [], itertools.count()
    expected += [(next(row), "train", 0, None, None, 0, repeat) for repeat in range(2)]
    for lr, width, mask, repeat in itertools.product([0.1, 0.2], [8, 16], range(2), range(3)):
        expected.append((next(row), "train", 1, lr, width, mask, repeat))
    expected += [(next(row), "eval", 2, None, None, m, r) for m in range(2) for r in range(2)]
    assert got == expected
    assert design.roles.tolist() == [entry[1] for entry in expected]
    assert design.factors == ("lr", "width")


def test_rows_share_a_mask_id_exactly_when_they_share_a_mask(folder):
    design = design_of(
        folder,
        {"count": 3, "seed": 1},
        {**TRAIN, "masks": 3, "repeats": 2, "choices": {"lr": [1, 2]}},
        {"role": "eval", "masks": 2, "repeats": 5, "seed": 2},
    ).design
    ids, masks = design.mask_ids, [design.assignment(row).mask for row in range(design.num_models)]
    assert ids[:3].tolist() == [-1] * 3 and masks[:3] == [None] * 3
    for a, b in itertools.combinations(range(3, design.num_models), 2):
        assert (ids[a] == ids[b]) == np.array_equal(masks[a], masks[b])
    assert not set(ids[design.roles == "train"]) & set(ids[design.roles == "eval"]) - {-1}
    seeds = [design.assignment(row).seed for row in range(design.num_models)]
    assert len(set(seeds)) == len(seeds)


def test_seeds_that_would_share_streams_are_refused(folder):
    # SeedSequence takes numbers apart into 32-bit words: mask 0 of seed 1 + 5 · 2^32 would be mask 5 of seed 1.
    with pytest.raises(SpecError, match=r"design\[1\], seed: 7 is already design\[0\]'s"):
        design_of(folder, {**TRAIN, "seed": 7}, {"role": "eval", "masks": 2, "seed": 7})
    with pytest.raises(SpecError, match=r"design\[0\], seed: expected an int in \[0, 2\^32\)"):
        design_of(folder, {**TRAIN, "seed": 1 + (5 << 32)})
    with pytest.raises(SpecError, match=r"design\[1\], seed: 1 is already"):  # the default is the block's number
        design_of(folder, {**TRAIN, "seed": 1}, {"role": "eval", "masks": 2})


def test_a_block_that_is_appended_changes_no_earlier_row(folder):
    blocks = [of_sampler("stratified"), {"role": "eval", "masks": 2, "repeats": 2, "seed": 3}]
    before = design_of(folder, *blocks).design
    after = design_of(folder, *blocks, {**TRAIN, "seed": 9}, {"role": "eval", "masks": 1, "seed": 10}).design
    for row in range(before.num_models):
        a, b = before.assignment(row), after.assignment(row)
        assert (a.role, a.seed, a.block, a.mask_id, a.repeat) == (b.role, b.seed, b.block, b.mask_id, b.repeat)
        np.testing.assert_array_equal(a.mask, b.mask)


def test_eval_takes_sampler_alpha_and_labels_of_the_train_block_before_it(folder):
    resolved = design_of(
        folder,
        of_sampler("stratified", 0.5),
        {"role": "eval", "masks": 4, "seed": 3},
        of_sampler("fixed_size", 0.2, seed=4),
        {"role": "eval", "masks": 4, "seed": 5},
        {"role": "eval", "masks": 4, "seed": 6, "sampler": "bernoulli", "alpha": 1},
        {"role": "eval", "count": 2, "seed": 7, "sampler": None},
    )
    blocks = resolved.design.blocks
    assert [(b.sampler, b.alpha) for b in blocks[1:5:2]] == [("stratified", 0.5), ("fixed_size", 0.2)]
    assert blocks[4].sampler == "bernoulli" and blocks[5].sampler is None
    assert resolved.design.assignment(6).mask[LABELS == 3].sum() == 10
    assert resolved.spec.design[1]["labels"] == resolved.spec.design[0]["labels"]
    # what is stored stands for itself
    again = resolve(Spec.from_json(json.loads(json.dumps(resolved.spec.to_json()))), stored_in(resolved, folder / "s"))
    assert again.spec == resolved.spec and again.design == resolved.design


def stored_in(resolved, folder):
    for name, content in resolved.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_paths_begin_at_the_spec_and_not_at_the_working_directory(folder, tmp_path_factory, monkeypatch):
    (folder / "data[1]").mkdir()
    for name in ("b.pt", "a.pt"):
        (folder / "data[1]" / name).touch()
    blocks = [
        {**of_sampler("by_group"), "choices": {"backbone": {"files": "*.pt"}}},
        {"role": "eval", "masks": 2, "seed": 3},
    ]
    blocks[0]["groups"] = "../groups.npy"
    (folder / "data[1]" / "spec.json").write_text(json.dumps({"schema": SCHEMA, "design": blocks}))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    with Store.create("store", folder / "data[1]" / "spec.json") as store:
        expected = masks_of(store.design)
        assert {row.choices["backbone"] for row in map(store.design.assignment, range(12))} == {
            str(folder / "data[1]" / name) for name in ("a.pt", "b.pt")
        }
    (folder / "data[1]" / "c.pt").touch()  # the choice was made when the store was
    (folder / "groups.npy").unlink()  # and the groups are in it
    monkeypatch.chdir(folder)
    with Store.open(elsewhere / "store") as store:
        np.testing.assert_array_equal(masks_of(store.design), expected)
        assert len(store.design.blocks[0].cells) == 2


def test_a_label_file_that_changed_is_refused(folder):
    (folder / "spec.json").write_text(json.dumps({"schema": SCHEMA, "design": [of_sampler("stratified")]}))
    Store.create(folder / "store", folder / "spec.json").close()
    (copy,) = (folder / "store" / "design").iterdir()
    np.testing.assert_array_equal(np.load(copy, allow_pickle=False), LABELS)
    raw = bytearray(copy.read_bytes())
    raw[-8] ^= 1
    copy.write_bytes(raw)
    with pytest.raises(StoreError, match=r"design\[0\], labels: .*has changed since the design was made"):
        Store.open(folder / "store")


# ------------------------------------------------------------------------------------ choices


def cells(folder, choices, rules=None):
    block = {"seed": 1, "choices": choices} | ({} if rules is None else {"filter": rules})
    return [dict(cell) for cell in design_of(folder, block).design.blocks[0].cells]


def test_levels(folder):
    assert cells(folder, {"a": {"range": [3]}}) == [{"a": 0}, {"a": 1}, {"a": 2}]
    assert cells(folder, {"a": {"range": [4, 0, -2]}}) == [{"a": 4}, {"a": 2}]
    assert cells(folder, {"a": [1, 1.5, "x", True]}) == [{"a": 1}, {"a": 1.5}, {"a": "x"}, {"a": True}]


@pytest.mark.parametrize("op", ["==", "!=", "<", "<=", ">", ">="])
def test_filters_compare_with_values_and_factors(op, folder):
    compare = {
        "==": int.__eq__,
        "!=": int.__ne__,
        "<": int.__lt__,
        "<=": int.__le__,
        ">": int.__gt__,
        ">=": int.__ge__,
    }[op]
    grid = {"a": [1, 2, 3], "b": [1, 2, 3]}
    pairs = [{"a": a, "b": b} for a in (1, 2, 3) for b in (1, 2, 3)]
    assert cells(folder, grid, [["a", op, "b"]]) == [c for c in pairs if compare(c["a"], c["b"])]
    assert cells(folder, grid, [["a", op, 2]]) == [c for c in pairs if compare(c["a"], 2)]


def test_filters_with_lists_and_all_of_them(folder):
    grid = {"a": [1, 2, 3], "name": ["x", "y"]}
    assert cells(folder, grid, [["a", "in", [1, 3]], ["name", "not in", ["y"]]]) == [
        {"a": 1, "name": "x"},
        {"a": 3, "name": "x"},
    ]


# ------------------------------------------------------------------------------------ mistakes

BITS = {"shape": [N], "dtype": "bits"}
BLOCKS = {
    "unknown key": ({"sampel": 1}, r"unknown key 'sampel'; did you mean 'sampler'"),
    "unknown role": ({"role": "test", "count": 1}, "role: expected 'train' or 'eval', got 'test'"),
    "role a list": ({"role": [], "count": 1}, "role: expected"),
    "no count": ({}, "count: missing"),
    "count 0": ({"count": 0}, "count: expected an int >= 1, got 0"),
    "count true": ({"count": True}, "count: expected an int >= 1, got True"),
    "count a float": ({"count": 2.0}, "count: expected an int >= 1, got 2.0"),
    "negative seed": ({"count": 2, "seed": -1}, "seed: expected an int >= 0, got -1"),
    "seed text": ({"count": 2, "seed": "1"}, "seed: expected an int >= 0"),
    "seed too large": ({"count": 2, "seed": 2**32}, r"seed: expected an int in \[0, 2\^32\)"),
    "too many rows": ({"count": 10**10}, ".*the limit is 1,000,000,000"),
    "unknown sampler": ({**TRAIN, "sampler": "bernouli"}, "sampler: .*did you mean 'bernoulli'"),
    "sampler a list": ({**TRAIN, "sampler": ["bernoulli"]}, "sampler: expected one of"),
    "alpha 0": ({**TRAIN, "alpha": 0}, r"alpha: expected a fraction in \(0, 1\], got 0"),
    "alpha above 1": ({**TRAIN, "alpha": 1.5}, "alpha: expected a fraction"),
    "alpha true": ({**TRAIN, "alpha": True}, "alpha: expected a fraction"),
    "alpha text": ({**TRAIN, "alpha": "half"}, "alpha: expected a fraction"),
    "alpha NaN": ({**TRAIN, "alpha": float("nan")}, "alpha: expected a fraction"),
    "masks 0": ({**TRAIN, "masks": 0}, "masks: expected an int >= 1"),
    "repeats 0": ({**TRAIN, "repeats": 0}, "repeats: expected an int >= 1"),
    "count against masks": ({**TRAIN, "count": 7}, "count: 7 does not fit 6 masks"),
    "count does not divide": ({"sampler": "bernoulli", "count": 7, "repeats": 2}, "count: 7 rows do not divide into 2"),
    "neither count nor masks": ({"sampler": "bernoulli"}, "count: missing"),
    "masks without a sampler": ({"masks": 3}, "masks: there is no sampler"),
    "alpha without a sampler": ({"count": 3, "alpha": 0.5}, "alpha: there is no sampler"),
    "repeats alone against count": ({"count": 3, "repeats": 2}, "without masks or choices every row is a repeat"),
    "unknown mask key": ({**TRAIN, "key": "mask"}, "key: masks are kept under 'mask', which the schema does not have"),
    "mask key a number": ({**TRAIN, "key": 3}, "key: masks are kept under 3"),
    "mask key of floats": ({**TRAIN, "key": "margins"}, "key: schema key 'margins' must be a vector of dtype bits"),
    "no labels": ({**TRAIN, "sampler": "stratified"}, "labels: expected the path of a .npy file"),
    "labels of nobody": ({**TRAIN, "labels": "labels.npy"}, "labels: sampler 'bernoulli' does not use it"),
    "labels missing": ({**TRAIN, "sampler": "stratified", "labels": "no.npy"}, "labels: no such file"),
    "labels a folder": ({**TRAIN, "sampler": "stratified", "labels": "."}, "labels: .* is not a plain .npy file"),
    "labels pickled": ({**TRAIN, "sampler": "stratified", "labels": "evil.npy"}, "labels: .* is not a plain .npy file"),
    "labels a zip": ({**TRAIN, "sampler": "stratified", "labels": "zip.npz"}, "labels: expected 101 ints or strings"),
    "labels garbage": ({**TRAIN, "sampler": "stratified", "labels": "garbage.npy"}, "labels: .* is not a plain .npy"),
    "labels endless": ({**TRAIN, "sampler": "stratified", "labels": "endless.npy"}, "labels: .* is not a plain .npy"),
    "labels too few": ({**TRAIN, "sampler": "stratified", "labels": "few.npy"}, r"labels: .*got shape \[3\]"),
    "labels of floats": ({**TRAIN, "sampler": "stratified", "labels": "floats.npy"}, "labels: .*dtype float64"),
    "choices a list": ({"choices": [1]}, "choices: expected"),
    "choices empty": ({"choices": {}}, "choices: expected"),
    "choices do not count": ({"choices": {"a": [1, 2]}, "count": 3}, "count: 3 does not fit 2 grid cells"),
    "factor no name": ({"choices": {"learning rate": [1]}}, "choices, 'learning rate': a factor reaches main"),
    "factor a keyword": ({"choices": {"lambda": [1]}}, "choices, 'lambda': a factor reaches main"),
    "factor reserved": ({"choices": {"seed": [1]}}, "choices, 'seed': a factor reaches main"),
    "no levels": ({"choices": {"a": []}}, "choices, 'a': expected at least one level"),
    "level null": ({"choices": {"a": [None]}}, "choices, 'a': expected at least one level, each a string"),
    "level a list": ({"choices": {"a": [[1]]}}, "choices, 'a': expected at least one level"),
    "level NaN": ({"choices": {"a": [float("nan")]}}, "choices, 'a': JSON has no NaN"),
    "level twice": ({"choices": {"a": [1, 1]}}, "choices, 'a': a level stands twice"),
    "levels unknown": ({"choices": {"a": {"rnage": [3]}}}, "choices, 'a': expected a list"),
    "range of floats": ({"choices": {"a": {"range": [0.5]}}}, "choices, 'a': expected {\"range\""),
    "range of step 0": ({"choices": {"a": {"range": [0, 3, 0]}}}, "choices, 'a': expected {\"range\""),
    "range empty": ({"choices": {"a": {"range": [3, 3]}}}, "choices, 'a': expected at least one level"),
    "range endless": ({"choices": {"a": {"range": [10**12]}}}, "choices, 'a': 1,000,000,000,000 levels"),
    "grid endless": ({"choices": {k: {"range": [10**4]} for k in "abc"}}, "choices: the grid has more than"),
    "no file": ({"choices": {"a": {"files": "*.nothing"}}}, "choices, 'a': no file matches"),
    "level not for its key": ({"choices": {"level": [300]}}, "choices, 'level': the schema key of that name"),
    "filter without choices": ({"count": 3, "filter": []}, "filter: there are no choices"),
    "filter an object": ({"choices": {"a": [1]}, "filter": {}}, "filter: expected a list"),
    "filter null": ({"choices": {"a": [1]}, "filter": None}, "filter: expected a list"),
    "filter too short": ({"choices": {"a": [1]}, "filter": [["a", "=="]]}, "filter: expected a list"),
    "filter of nothing": ({"choices": {"a": [1]}, "filter": [["b", "==", 1]]}, "filter: 'b' is not a factor"),
    "filter of a list": ({"choices": {"a": [1]}, "filter": [[["a"], "==", 1]]}, "filter: .* is not a factor"),
    "filter operator": ({"choices": {"a": [1]}, "filter": [["a", "=", 1]]}, "filter: unknown operator '='"),
    "filter operator a list": ({"choices": {"a": [1]}, "filter": [["a", ["=="], 1]]}, "filter: unknown operator"),
    "filter of two kinds": ({"choices": {"a": [1]}, "filter": [["a", "<", "z"]]}, "filter: .*cannot be compared"),
    "filter drops all": ({"choices": {"a": [1]}, "filter": [["a", "==", 2]]}, "filter: it drops every one"),
}


@pytest.mark.parametrize(("block", "place"), BLOCKS.values(), ids=BLOCKS)
def test_a_bad_block_is_one_error_that_names_block_and_key(block, place, folder):
    np.save(folder / "evil.npy", np.array([print] * N, dtype=object), allow_pickle=True)
    np.savez(folder / "zip.npz", a=LABELS)
    np.save(folder / "few.npy", LABELS[:3])
    np.save(folder / "floats.npy", LABELS / 2)
    (folder / "garbage.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((")
    plain = (folder / "labels.npy").read_bytes()
    (folder / "endless.npy").write_bytes(plain.replace(b"(101,), }        ", b"(10000000000,), }"))
    schema = {**SCHEMA, "level": {"shape": [], "dtype": "uint8"}}
    spec = {"schema": schema, "design": [{"count": 1, "seed": 99}, block]}
    with pytest.raises(SpecError, match=rf"design(\[1\],? ?:?|:) ?.*{place}") as caught:
        resolve(Spec.from_json(spec), folder)
    assert "\n" not in str(caught.value)


def test_num_models_has_to_fit_the_design(folder):
    assert design_of(folder, TRAIN, num_models=6).design.num_models == 6
    with pytest.raises(SpecError, match="num_models: 7 does not fit the design, which gives 6 rows"):
        design_of(folder, TRAIN, num_models=7)


def test_a_spec_without_a_design_is_rows_of_their_own(folder):
    design = resolve(Spec.from_json({"num_models": 5, "schema": SCHEMA}), folder).design
    assert design.num_models == 5 and design.roles.tolist() == ["train"] * 5 and design.mask_ids.tolist() == [-1] * 5
    assert design.assignment(3).mask is None and design.mask_key(3) is None


@pytest.mark.parametrize("row", [-1, 6, True, np.True_, 1.5, 1.0, "3", None, np.float64(1), 10**30, [1]])
def test_an_index_that_is_no_row(row, folder):
    design = design_of(folder, TRAIN).design
    with pytest.raises(RowError, match="row"):
        check_index(row, 6)
    with pytest.raises(RowError, match="row"):
        design.assignment(row)


def test_numpy_ints_are_indices(folder):
    for kind in (np.int8, np.uint64, np.int64):
        assert type(check_index(kind(3), 6)) is int

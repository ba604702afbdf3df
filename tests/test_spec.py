"""Every mistake in a spec is one error that names its place; a value is stored as the schema says, or refused."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamodels.errors import RowError, SpecError
from datamodels.spec import Field, Spec

INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")
ENTRY = {"shape": [3], "dtype": "float32"}


def spec(**changes):
    return {"num_models": 4, "schema": {"margins": dict(ENTRY)}, **changes}


def with_entry(**changes):
    return spec(schema={"margins": {**ENTRY, **changes}})


def without(raw, *path):
    *parents, last = path
    inner = raw
    for name in parents:
        inner = inner[name]
    del inner[last]
    return raw


MISTAKES = {
    "not an object": ([1], "expected a JSON object with 'schema'"),
    "no schema": (without(spec(), "schema"), "schema: missing"),
    "schema not an object": (spec(schema=[1]), "schema: expected an object"),
    "schema empty": (spec(schema={}), "schema: expected at least one key"),
    "entry not an object": (spec(schema={"margins": 3}), "schema key 'margins': expected"),
    "no shape": (without(spec(), "schema", "margins", "shape"), "schema key 'margins': shape is missing"),
    "no dtype": (without(spec(), "schema", "margins", "dtype"), "schema key 'margins': dtype is missing"),
    "no rows": (without(spec(), "num_models"), "num_models: expected an int >= 1, it is missing"),
    "negative rows": (spec(num_models=-1), "num_models: expected an int >= 1, got -1"),
    "zero rows": (spec(num_models=0), "num_models: expected an int >= 1, got 0"),
    "bool rows": (spec(num_models=True), "num_models: expected an int >= 1, got True"),
    "float rows": (spec(num_models=4.0), "num_models: expected an int >= 1, got 4.0"),
    "text rows": (spec(num_models="4"), "num_models: expected an int >= 1, got '4'"),
    "null rows": (spec(num_models=None), "num_models: expected an int >= 1, got None"),
    "endless rows": (spec(num_models=10**30), "num_models: 1000.* the limit is 1,000,000,000"),
    "unknown top key": (spec(num_model=3), "unknown key 'num_model'; did you mean 'num_models'"),
    "unknown entry key": (with_entry(dtyp="x"), "schema key 'margins', unknown key 'dtyp'; did you mean 'dtype'"),
    "shape a number": (with_entry(shape=3), "'margins', shape: expected a list of ints >= 0, got 3"),
    "shape null": (with_entry(shape=None), "'margins', shape: expected a list of ints >= 0, got None"),
    "shape with a float": (with_entry(shape=[3.0]), r"'margins', shape: expected a list of ints >= 0, got \[3.0\]"),
    "shape with a bool": (with_entry(shape=[True]), r"'margins', shape: expected a list of ints >= 0, got \[True\]"),
    "shape with a negative": (with_entry(shape=[-1]), r"'margins', shape: expected a list of ints >= 0, got \[-1\]"),
    "shape too large": (with_entry(shape=[2**50]), "'margins', shape: one row would take"),
    "shape too large beside a 0": (with_entry(shape=[2**62, 0]), "'margins', shape: one row would take"),
    "shape with too many axes": (with_entry(shape=[1] * 70), "'margins', shape: 70 axes"),
    "more than a file": (
        {"num_models": 10**9, "schema": {"x": {"shape": [2**36], "dtype": "float64"}}},
        "schema key 'x': 1,000,000,000 rows",
    ),
    "unknown dtype": (with_entry(dtype="flaot32"), "'margins', dtype: .*got 'flaot32'; did you mean 'float32'"),
    "object dtype": (with_entry(dtype="object"), "'margins', dtype: expected one of"),
    "complex dtype": (with_entry(dtype="complex128"), "'margins', dtype: expected one of"),
    "dtype with byte order": (with_entry(dtype=">f4"), "'margins', dtype: expected one of"),
    "text of no length": (with_entry(dtype="U0"), "'margins', dtype: expected one of"),
    "dtype a list": (with_entry(dtype=["float32"]), "'margins', dtype: expected one of"),
    "dtype null": (with_entry(dtype=None), "'margins', dtype: expected one of"),
    "scalar bits": (with_entry(shape=[], dtype="bits"), "'margins': dtype 'bits' packs the last axis"),
    "unknown role": (with_entry(role="outcom"), "'margins', role: expected one of mask"),
    "role a list": (with_entry(role=[]), "'margins', role: expected one of mask"),
    "required a number": (with_entry(required=1), "'margins', required: expected true or false, got 1"),
    "required null": (with_entry(required=None), "'margins', required: expected true or false, got None"),
    "nonfinite a word": (with_entry(allow_nonfinite="yes"), "'margins', allow_nonfinite: expected true or false"),
    "nonfinite ints": (with_entry(dtype="int8", allow_nonfinite=True), "'margins': allow_nonfinite needs a float"),
    "our own record": (spec(schema={"_completed": ENTRY}), "schema key '_completed': .*rename the key"),
    "two names, one file": (spec(schema={"A": ENTRY, "a": ENTRY}), "'A' and 'a' differ only in case"),
    "newer format": (spec(format=2, novel=1), "format: this version reads and writes format 1, got 2"),
    "format true": (spec(format=True), "format: .*got True"),
    "format text": (spec(format="1"), "format: .*got '1'"),
    "design an object": (spec(design={}), "design: expected a list of blocks"),
    "design empty": (spec(design=[]), "design: expected a list of blocks"),
    "design of numbers": (spec(design=[1]), "design: expected a list of blocks"),
}


@pytest.mark.parametrize(("raw", "place"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_error_that_names_its_place(raw, place, tmp_path):
    with pytest.raises(SpecError, match=place):
        Spec.from_json(raw)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(SpecError, match=rf"{file}: .*{place}") as caught:
        Spec.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "/x",
        "..",
        ".",
        "",
        ".x",
        "_x",
        "_keys",
        "a\0b",
        "a b",
        "a\n",
        "ä",
        "x" * 129,
        "-x",
        "a\\b",
        "~",
        "x*",
    ],
)
def test_names_that_could_leave_the_folder_or_hide_in_it_are_refused(name):
    with pytest.raises(SpecError, match="schema key .*expected a plain name"):
        Spec.from_json(spec(schema={name: ENTRY}))


@pytest.mark.parametrize(
    "name", ["a", "0", "x" * 128, "spec", "spec.json", "cmds", "runs", "design", "a..b", "x.npy", "A-b_c.d"]
)
def test_names_that_only_look_like_our_files_are_fine(name):
    assert name in Spec.from_json(spec(schema={name: ENTRY})).schema


FILES = {
    "not JSON": ('{\n "num_models": 4,,\n}', "line 2, column 18: not JSON: names stand in double quotes, and no comma"),
    "a comma too many": ('{"schema": {"a": [1,]}}', "line 1, column 2.: not JSON: .*no comma behind the last"),
    "Python's names": ('{"num_models": True}', "line 1, column 16: not JSON: .*true, false and null in lower case"),
    "a comma too few": ('{"num_models": 4\n "schema": {}}', "line 2, column 2: not JSON: a comma between two entries"),
    "two values": ('{"num_models": 4}\n{}', "line 2, column 1: not JSON: the file goes on"),
    "cut short": ('{"num_models": 4', "line 1, column 17: not JSON: it ends too soon"),
    "empty": ("", "line 1, column 1: not JSON: it is empty"),
    "NaN": ('{"num_models": NaN}', "NaN is not JSON"),
    "infinity": ('{"num_models": -Infinity}', "-Infinity is not JSON"),
    "beyond float64": ('{"num_models": 1e999}', "1e999 is beyond the largest float64"),
    "an int of 5,000 digits": ('{"num_models": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    "5,000 brackets": ("[" * 200_000, "cannot be read as JSON"),
    "a name twice": ('{"num_models": 4, "num_models": 5}', "the name 'num_models' stands twice"),
    "a key twice": ('{"num_models": 4, "schema": {"a": {}, "a": {}}}', "the name 'a' stands twice"),
}


@pytest.mark.parametrize(("text", "place"), FILES.values(), ids=FILES)
def test_a_file_that_is_not_json_is_refused_with_its_place(text, place, tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(text)
    with pytest.raises(SpecError, match=f"{file}.*{place}"):
        Spec.load(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, why in (
        (tmp_path / "none.json", "no such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.json" / "x", "cannot be read"),
        (tmp_path / "latin.json", "not UTF-8"),
    ):
        (tmp_path / "latin.json").write_bytes(b'{"\xe4": 1}')
        with pytest.raises(SpecError, match=f"{path}: .*{why}"):
            Spec.load(path)


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("bool_", "bool"),
        ("float", "float64"),
        ("int", "int64"),
        ("half", "float16"),
        ("intc", "int32"),
        ("uint", "uint64"),
    ],
)
def test_released_spellings(spelling, dtype):
    field = Spec.from_json(with_entry(dtype=spelling)).schema["margins"]
    assert field.dtype == dtype and field.disk_dtype == np.dtype(dtype)


@pytest.mark.parametrize("shape", [[], [7], [0], [2, 3], [2, 0, 3], [1] * 60])
@pytest.mark.parametrize("dtype", ["float16", "int64", "bool", "U7", "bits"])
def test_any_shape_goes_round(shape, dtype):
    if dtype == "bits" and not shape:
        return
    raw = {
        "format": 1,
        "num_models": 3,
        "schema": {"x": {"shape": shape, "dtype": dtype, "role": "outcome", "required": False}, "y": ENTRY},
    }
    parsed = Spec.from_json(raw)
    assert parsed.to_json() == raw
    assert Spec.from_json(json.loads(json.dumps(parsed.to_json()))) == parsed


# ------------------------------------------------------------------------------------ values


def stored(field, value):
    """What a reader gets of `value` after it went to disk."""
    encoded = field.encode(value, where="row 0")
    assert encoded.shape == field.disk_shape and encoded.dtype == field.disk_dtype and encoded.flags.c_contiguous
    assert len(encoded.tobytes()) == field.nbytes
    back = np.frombuffer(encoded.tobytes(), field.disk_dtype).reshape(1, *field.disk_shape)
    return field.decode(back)[0]


def refused(field, value, why=""):
    with pytest.raises(RowError, match=f"^row 0, 'x'.*{why}"):
        field.encode(value, where="row 0")


def exact(a, b):
    """Equality of Python numbers, which is exact between ints and floats."""
    return all(x == y for x, y in zip(np.asarray(a).ravel().tolist(), np.asarray(b).ravel().tolist(), strict=True))


anything = st.sampled_from([*INTS, *FLOATS, "bool"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(max_examples=200, deadline=None)
@given(array=anything, target=st.sampled_from([*INTS, "bool"]))
def test_to_int_and_bool_exact_or_refused(array, target):
    field = Field("x", array.shape, target)
    low, high = (0, 1) if target == "bool" else (np.iinfo(target).min, np.iinfo(target).max)
    fits = all(
        not (isinstance(v, float) and not math.isfinite(v)) and v == int(v) and low <= int(v) <= high
        for v in array.ravel().tolist()
    )
    if fits:
        assert exact(stored(field, array), array)
    else:
        refused(field, array, f"is not exactly a {target}")


@settings(max_examples=200, deadline=None)
@given(array=anything, target=st.sampled_from(FLOATS), allow=st.booleans())
def test_to_float_rounds_and_never_overflows(array, target, allow):
    field = Field("x", array.shape, target, allow_nonfinite=allow)
    finite = np.isfinite(array.astype(np.float64))
    with np.errstate(over="ignore", under="ignore"):
        plain = array.astype(target)
    if not finite.all() and not allow:
        refused(field, array, "is not finite")
    elif not np.isfinite(plain[finite]).all():
        refused(field, array, f"does not fit {target}")
    else:
        np.testing.assert_array_equal(stored(field, array), plain)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=70)))
def test_bits_go_round(array):
    field = Field("x", array.shape, "bits")
    np.testing.assert_array_equal(stored(field, array), array)
    if array.size:  # the documented order, by hand
        packed = field.encode(array, where="row 0").reshape(-1, field.disk_shape[-1])[0]
        line = array.reshape(-1, array.shape[-1])[0]
        for j, bit in enumerate(line):
            assert (packed[j // 8] >> (j % 8)) & 1 == bit


@pytest.mark.parametrize("length", range(20))
def test_bits_of_every_length(length):
    array = np.arange(length) % 3 == 0
    np.testing.assert_array_equal(stored(Field("x", (length,), "bits"), array), array)
    two = np.stack([array, ~array])
    np.testing.assert_array_equal(stored(Field("x", (2, length), "bits"), two), two)


def test_bits_take_zeros_and_ones_alone():
    field = Field("x", (3,), "bits")
    assert stored(field, [0, 1, 1.0]).tolist() == [False, True, True]
    refused(field, [0, 1, 2], "value 2 at \\[2\\] is not exactly a bits")
    refused(field, [0, 1, np.nan])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6), max_size=4))
def test_text_fits_or_is_refused(texts):
    field = Field("x", (len(texts),), "U4")
    if all(len(text) <= 4 for text in texts):
        assert stored(field, texts).tolist() == texts
    else:
        refused(field, texts, "text of at most 4 characters")


def test_text_that_numpy_would_change_is_refused():
    one, two = Field("x", (), "U4"), Field("x", (2,), "U4")
    assert stored(one, "abc") == "abc" and stored(one, "") == ""
    for value in ("a\0", "\0", "a\0b"):
        refused(one, value, "NUL character")
    refused(two, ["a\0", "b"], "NUL character")
    refused(two, ["a", 1], "expected text, got 1 of type int")
    refused(two, [b"a", "b"], "expected text, got b'a' of type bytes")
    refused(one, 3, "expected text")
    refused(one, b"abc", "expected text")
    refused(Field("x", (), "int64"), "3", "expected numbers")
    assert stored(two, np.array(["ab", "cdef"])).tolist() == ["ab", "cdef"]


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((3,), 1.0),
        ((3,), [1.0]),
        ((3,), np.ones((1, 3))),
        ((3,), np.ones((3, 1))),
        ((), [1.0]),
        ((0,), []),
        ((0,), 1.0),
    ],
)
def test_nothing_is_broadcast(shape, value):
    field = Field("x", shape, "float64")
    if np.shape(value) == shape:
        assert stored(field, value).shape == shape
    else:
        refused(field, value, f"expected shape \\{list(shape)!s}")


@pytest.mark.parametrize(
    ("value", "target", "why"),
    [
        (1e39, "float32", "does not fit float32"),
        (-70000, "float16", "does not fit float16"),
        (2**64 - 1, "float16", "does not fit float16"),
        (np.nan, "float64", "is not finite"),
        (-np.inf, "float64", "is not finite"),
        (256, "uint8", "not exactly a uint8"),
        (-1, "uint64", "not exactly a uint64"),
        (2**63, "int64", "not exactly a int64"),
        (2.0**63, "int64", "not exactly a int64"),
        (2.0**64, "uint64", "not exactly a uint64"),
        (0.5, "int8", "not exactly a int8"),
        (2, "bool", "not exactly a bool"),
        (2**70, "int64", "expected numbers or text"),
        (1 + 0j, "float64", "expected numbers"),
        (np.datetime64("2020-01-01"), "int64", "expected numbers"),
        (np.timedelta64(3), "int64", "expected numbers"),
        (None, "float64", "expected numbers or text, got None"),
        ({"a": 1}, "float64", "expected numbers or text"),
        (np.array(1.0, dtype=object), "float64", r"array of dtype object \(\[1.0\]\); give it the dtype"),
        (np.ma.masked_array(1.0), "float64", "would lose its mask"),
        (np.longdouble(2**53) + np.longdouble(0.5), "int64", "not exactly a int64"),
        (np.array(1, dtype=[("a", "i4")]), "int64", "expected numbers"),
        (object(), "float64", "expected numbers or text"),
    ],
)
def test_a_scalar_that_would_not_be_itself_is_refused(value, target, why):
    refused(Field("x", (), target), value, why)


@pytest.mark.parametrize(
    ("value", "target", "result"),
    [
        (True, "float32", 1.0),
        (1.0, "bool", True),
        (2**64 - 1, "uint64", 2**64 - 1),
        (-(2**63), "int64", -(2**63)),
        (-(2.0**63), "int64", -(2**63)),
        (1e-60, "float32", 0.0),
        (0.1, "float16", np.float16(0.1)),
        (np.float64(3.0), "int8", 3),
        (np.array(5), "int8", 5),
    ],
)
def test_a_scalar_that_is_itself_is_stored(value, target, result):
    assert stored(Field("x", (), target), value) == result


def test_lists_that_numpy_cannot_hold_exactly():
    refused(Field("x", (2,), "float64"), [[1], [2, 3]], "expected an array")
    refused(Field("x", (2,), "int64"), [2**53 + 1, 1.0], "loses digits beside floats")
    refused(Field("x", (2,), "int64"), [0.5, 1], "not exactly a int64")
    refused(Field("x", (2,), "int64"), [np.nan, 1], "not exactly a int64")
    assert stored(Field("x", (2,), "int64"), [3.0, 4]).tolist() == [3, 4]
    assert stored(Field("x", (2,), "float64"), [2**53 + 1, 1.0]).tolist() == [2.0**53, 1.0]  # rounding is allowed


def test_the_layout_of_what_comes_in_does_not_matter():
    plain = np.arange(12, dtype=np.float64).reshape(3, 4)
    field = Field("x", (3, 4), "float32")
    for value in (plain.astype(">f8"), np.asfortranarray(plain), plain.tolist(), plain[::-1][::-1]):
        np.testing.assert_array_equal(stored(field, value), plain)
    wide = np.zeros((6, 8))
    wide[::2, ::2] = plain
    np.testing.assert_array_equal(stored(field, wide[::2, ::2]), plain)
    np.testing.assert_array_equal(stored(Field("x", (2,), "U3"), np.array(["a", "b"], dtype=">U9")), ["a", "b"])


def test_what_its_own_conversion_refuses():
    class Hostile:
        def __array__(self, dtype=None, copy=None):
            raise ZeroDivisionError("no")

    refused(Field("x", (), "float64"), Hostile(), "expected an array, got Hostile")


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    field = Field("x", (2,), "float32")
    weight = torch.tensor([1.5, -2.0], requires_grad=True)
    for value in (
        weight,
        weight * 1,
        weight.detach().double(),
        weight.to(torch.bfloat16),
        weight.half(),
        torch.tensor([[1.5, 0], [-2.0, 0]])[:, 0],
        torch.stack([weight, weight], 1).conj()[:, 1],
    ):
        assert stored(field, value).tolist() == [1.5, -2.0]
    assert stored(Field("x", (), "int64"), torch.tensor(7)) == 7
    assert stored(Field("x", (3,), "bits"), torch.tensor([True, False, True])).tolist() == [True, False, True]
    refused(field, torch.tensor([1.0, float("nan")]), "is not finite")
    refused(field, torch.tensor([1.0, 2.0, 3.0]), "expected shape")
    refused(field, torch.tensor([1j, 2j]), "expected numbers")
    refused(field, torch.tensor([1.0, 2.0]).to_sparse(), "expected an array, got Tensor")
    refused(field, torch.empty(2, device="meta"), "expected an array, got Tensor")
    refused(field, [weight.sum(), weight.sum()], "expected an array, got list")
    refused(Field("x", (2,), "int8"), torch.tensor([1.0, 2.5]).to(torch.bfloat16), "value 2.5 at \\[1\\]")

"""Properties against closed forms and dense computations."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from datamodels.errors import MeasurementError
from datamodels.measurements import properties
from datamodels.measurements.transferability import SmallSampleWarning

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((60, 7)) @ np.diag([5, 3, 1, 1, 0.5, 0.1, 0.1]) + 2
IMAGES = RNG.random((60, 1, 6, 6)).astype(np.float32)


def orthogonal(d):
    return np.linalg.qr(np.random.default_rng(1).standard_normal((d, d)))[0]


# --------------------------------------------------------------------------------------------------------- norms


def test_weight_norms():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5))
    model[0].weight.data *= 10
    found = properties.weight_norms(model)
    values = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    assert found["l2"] == pytest.approx(np.linalg.norm(values), rel=1e-6)
    assert found["rms"] == pytest.approx(np.sqrt((values**2).mean()), rel=1e-6)
    largest = [np.linalg.svd(p.detach().numpy().reshape(len(p), -1))[1][0] for p in (model[0].weight, model[2].weight)]
    assert found["spectral"] == pytest.approx(max(largest), rel=1e-5)
    with pytest.raises(MeasurementError, match="no parameters"):
        properties.weight_norms(nn.ReLU())


# ------------------------------------------------------------------------------------------------------ geometry


def test_effective_rank_of_equal_singular_values_is_their_number():
    basis = np.linalg.qr(RNG.standard_normal((40, 6)) - 0)[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]
    assert properties.effective_rank(basis[:, :4] * 3) == pytest.approx(4, rel=1e-9)


def test_effective_rank_of_two_known_singular_values():
    """Values 3 and 1: p = ¾, ¼, so exp(¾ ln 4/3 + ¼ ln 4)."""
    basis = np.linalg.qr(RNG.standard_normal((40, 2)))[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]
    expected = np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4))
    assert properties.effective_rank(basis * [3, 1] + 7) == pytest.approx(expected, rel=1e-9)


def test_effective_rank_knows_no_rotation_scale_or_shift():
    once = properties.effective_rank(FEATURES)
    assert properties.effective_rank(100 * FEATURES @ orthogonal(7) - 3) == pytest.approx(once, rel=1e-9)
    with pytest.raises(MeasurementError, match="the same features"):
        properties.effective_rank(np.full((5, 3), 0.1))


def test_anisotropy_is_the_mean_cosine_over_pairs():
    unit = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(60, 1)]
    assert properties.anisotropy(FEATURES) == pytest.approx(cosines.mean(), rel=1e-12)
    assert properties.anisotropy(np.array([[1.0, 0], [5, 0], [2, 0]])) == pytest.approx(1)
    assert properties.anisotropy(np.array([[1.0, 0], [-3, 0]])) == pytest.approx(-1)
    assert properties.anisotropy(np.array([[1.0, 0], [0, 0], [3, 0]])) == pytest.approx(1 / 3)  # of 0 with anything: 0
    with pytest.raises(MeasurementError, match="features that are not all 0"):
        properties.anisotropy(np.zeros((3, 2)))


# ---------------------------------------------------------------------------------------------------- symmetries


def pixels(images):
    """Features that are the pixels: every transformation is a linear map of them, and none leaves them alone."""
    return images.reshape(len(images), -1).astype(float)


def sums(images):
    """Features that do not see where a pixel is."""
    return np.stack([images.sum((1, 2, 3)), (images**2).sum((1, 2, 3))], 1).astype(float)


def columns(images):
    """Features that a flip or shift permutes, and a rotation mixes with what they do not tell."""
    return images.sum((1, 2)).astype(float)


def test_invariance():
    found = properties.invariance(sums, IMAGES, sums(IMAGES))
    assert found == pytest.approx({"flip": 1, "shift": 1, "rotation": 1}, abs=1e-9)
    # the pixels are independent: a flipped image is as far as any other
    found = properties.invariance(pixels, IMAGES, pixels(IMAGES))
    assert found == pytest.approx({"flip": 0, "shift": 0, "rotation": 0}, abs=0.1)


def test_invariance_of_known_distances():
    """f(Tx) = f(x) + (1, 0, …): 1 − 1 / the mean squared distance of two examples."""
    f = pixels(IMAGES)
    shifted = f + np.eye(36)[0]
    pairs = ((f[:, None] - f[None]) ** 2).sum(2)
    spread = pairs[~np.eye(60, dtype=bool)].mean()
    found = properties.invariance(lambda images: shifted, IMAGES, f, transformations="flip")
    assert found["flip"] == pytest.approx(1 - 1 / spread, rel=1e-9)


def test_equivariance():
    many = RNG.random((200, 1, 6, 6)).astype(np.float32)
    found = properties.equivariance(pixels, many, pixels(many))
    assert found == pytest.approx({"flip": 1, "shift": 1, "rotation": 1}, abs=1e-3)
    found = properties.equivariance(columns, many, columns(many))
    assert found["flip"] == pytest.approx(1, abs=1e-3)
    assert found["shift"] == pytest.approx(1, abs=1e-3)
    assert found["rotation"] < 0.3  # the rows' sums: of the columns' they have only the total in common


def test_equivariance_is_measured_on_what_did_not_fit_the_map():
    noise = np.random.default_rng(5).standard_normal((60, 40))
    found = properties.equivariance(lambda images: noise[::-1].copy(), IMAGES, noise, transformations="flip")
    assert found["flip"] < 0.1  # 30 examples of 40 features fit anything
    # 15 examples of 36 pixels say little of the map of 15 others; themselves they would fit exactly
    found = properties.equivariance(pixels, IMAGES[:30], pixels(IMAGES[:30]), transformations="flip")
    assert 0 < found["flip"] < 0.6


def test_transformations_are_what_their_names_say():
    image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    t = properties.TRANSFORMATIONS
    assert t["flip"](image)[0, 0, 0].tolist() == [3, 2, 1, 0]
    assert t["shift"](image)[0, 0, 0].tolist() == [3, 0, 1, 2]
    assert t["rotation"](image)[0, 0, 0].tolist() == [3, 7, 11, 15]
    assert t["invert"](image)[0, 0, 0].tolist() == [1, 0, -1, -2]


def test_a_users_transformation(tmp_path, monkeypatch):
    (tmp_path / "users_moves.py").write_text(
        "def same(images): return images\ndef cut(images): return images[:, :, 1:]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    measured = properties.invariance
    assert measured.columns(transformations=["flip", "users_moves.same"]) == {"flip": (), "same": ()}
    found = measured(pixels, IMAGES, pixels(IMAGES), transformations=["flip", "users_moves.same"])
    assert found["same"] == 1 and found["flip"] < 0.2
    for name, says in (("users_moves.cut", "became"), ("turn", "there is no transformation 'turn'")):
        with pytest.raises(MeasurementError, match=says):
            measured(pixels, IMAGES, pixels(IMAGES), transformations=name)


@pytest.mark.parametrize("measured", [properties.invariance, properties.equivariance])
def test_texts_cannot_be_transformed(measured):
    with pytest.raises(MeasurementError, match="expected images"):
        measured(pixels, ["a text"] * 60, FEATURES)


# ----------------------------------------------------------------------------------------------------- sharpness


def small_net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, (torch.randn(50, 4).double(), torch.randint(3, (50,)))


def dense(model, data, loss_fn):
    """Eigenvalues of the Hessian, in one matrix."""
    names = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in names.values()])

    def loss(vector):
        parts = vector.split([p.numel() for p in names.values()])
        given = {name: part.view_as(p) for (name, p), part in zip(names.items(), parts, strict=True)}
        return loss_fn(torch.func.functional_call(model, given, (data[0],)), data[1])

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(seed):
    model, data = small_net(seed)
    expected = dense(model, data, functional.cross_entropy).max()
    found = properties.sharpness(model, data, functional.cross_entropy, seed=seed, batch_size=16, tolerance=1e-3)
    assert found == pytest.approx(expected, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


class Weights(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d, dtype=torch.float64))

    def forward(self, x):
        return x * self.w


@pytest.mark.parametrize(
    ("curvature", "largest"), [([-5, 2, 1], 2), ([7, -5, 1], 7), ([-5, -2, -1], -1), ([0, 0, 0], 0)]
)
def test_sharpness_is_the_largest_not_the_one_of_largest_size(curvature, largest):
    data = (torch.ones(6, 3).double(), torch.zeros(6, dtype=torch.int64))
    a = torch.tensor(curvature).double()
    found = properties.sharpness(Weights(3), data, lambda out, _: (a * out**2).sum(1).mean() / 2, tolerance=1e-4)
    assert found == pytest.approx(largest, rel=1e-3, abs=1e-9)


def diagonal(curvature, dtype=torch.float32, **options):
    """Sharpness of ½ Σ a w², whose Hessian has the eigenvalues a."""
    a = torch.as_tensor(curvature, dtype=dtype)

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(len(a), dtype=dtype))

        def forward(self, x):
            return (a * self.w**2).sum() / 2

    data = (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
    return properties.sharpness(Quadratic(), data, lambda out, _: out, **options)


HIDDEN = {
    "below a negative one, zeros": ([-100, 1] + [0] * 50, 1),
    "below a negative one, others too": ([-100, 1] + [-1] * 50, 1),
    "far below a negative one": ([-1000, 5] + [0] * 1000, 5),
    "opposite of the smallest": ([-10, 9.9] + [0] * 50, 9.9),
    "opposite of the smallest, others between": (np.r_[-10, 9.9, np.linspace(-9, 9, 500)], 9.9),
    "all negative": ([-3, -1, -2], -1),
    "zero": ([-5, 0, 0, -1], 0),
    "above a flat bulk": ([10] + [9] * 20_000, 10),
    "above a bulk": (np.r_[10, np.linspace(8.9, 9.1, 20_000)], 10),
    "above a flat bulk of many": ([2] + [1] * 200_000, 2),
    "one parameter": ([7], 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("curvature", "largest"), HIDDEN.values(), ids=HIDDEN)
def test_sharpness_is_found_in_spectra_that_hide_it(curvature, largest, dtype):
    assert diagonal(curvature, dtype) == pytest.approx(largest, rel=2e-3, abs=1e-5)


def test_sharpness_of_millions_of_parameters_in_single_precision():
    """Rounded sums of so many terms would leave more of the last vector in the next than there is new in it."""
    assert diagonal(np.r_[1, np.full(3_000_000, 0.1)]) == pytest.approx(1, rel=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_sharpness_of_a_continuous_spectrum_is_within_its_bound(seed):
    """Nothing stands out of these: 5 % of the width is what is promised, and the residual alone would end sooner."""
    for curvature in (np.linspace(-1, 1, 20_000), np.linspace(9, 10, 20_000), np.linspace(-10, -1, 5_000)):
        width = curvature.max() - curvature.min()
        found = diagonal(curvature, torch.float64, seed=seed, tolerance=0.3)
        missed = 0.3 if width > abs(curvature.max()) else 0.1
        assert -1e-9 <= curvature.max() - found <= missed * width


def test_sharpness_takes_few_products():
    """Some 25, whatever the largest eigenvalue stands above: each is a pass forward and back, twice."""
    passes = []
    model, data = small_net()
    properties.sharpness(model, data, lambda *given: passes.append(1) or functional.cross_entropy(*given))
    assert 10 <= len(passes) <= 30


def test_sharpness_follows_from_the_seed():
    model, data = small_net()
    first, again, other = (
        properties.sharpness(model, data, functional.cross_entropy, seed=seed, tolerance=0.1) for seed in (0, 0, 1)
    )
    assert first == again and first == pytest.approx(other, rel=0.1)


def test_sharpness_says_where_it_did_not_get():
    model, data = small_net()
    with pytest.raises(MeasurementError, match="after 2 products"):
        properties.sharpness(model, data, functional.cross_entropy, iterations=2, tolerance=1e-6)
    with pytest.raises(MeasurementError, match="not finite"):
        properties.sharpness(model, (data[0] * torch.inf, data[1]), functional.cross_entropy)
    model.requires_grad_(False)
    with pytest.raises(MeasurementError, match="no parameter"):
        properties.sharpness(model, data, functional.cross_entropy)


# ----------------------------------------------------------------------------------------------- disentanglement

FACTORS = np.stack(np.meshgrid(range(4), range(5), range(3), indexing="ij"), -1).reshape(-1, 3)
few_examples = pytest.mark.filterwarnings("ignore::datamodels.measurements.transferability.SmallSampleWarning")


@few_examples
def test_disentangled_codes_give_one_and_rotated_ones_less():
    codes = FACTORS * [2.0, -1, 7] + 1
    assert properties.disentanglement(codes, FACTORS) == pytest.approx(1)
    # which code is which does not matter
    assert properties.disentanglement(codes[:, ::-1], FACTORS) == pytest.approx(1)
    rotated = properties.disentanglement(codes @ orthogonal(3), FACTORS)
    assert rotated < 0.5
    doubled = properties.disentanglement(np.repeat(codes, 2, axis=1), FACTORS)
    assert doubled == pytest.approx(0, abs=1e-12)  # each factor is told twice


@few_examples
@pytest.mark.parametrize(("n", "least"), [(50, 0.8), (100, 0.9), (1000, 0.99)])
def test_disentanglement_of_a_perfect_code_is_one_for_any_number_of_examples(n, least):
    """Ten levels and features that say nothing: their information is all chance, 0.6 of the entropy with n=50."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        v = rng.integers(0, 10, (n, 3))
        codes = np.c_[v, rng.standard_normal((n, 2))]
        assert least < properties.disentanglement(codes, v) <= 1
        assert properties.disentanglement(rng.standard_normal((n, 5)), v) < 1 - least + 0.05
        far = codes.copy()
        far[-1, :3] = 1e6  # equal parts of the range would then be one for all others
        assert properties.disentanglement(far, v) > least - 0.1


def test_disentanglement_of_continuous_features_does_not_change_with_their_scale():
    """Quantiles know the order alone, and an outlier is but the last; atoms, as of ReLU, are one level."""
    rng = np.random.default_rng(0)
    v = rng.integers(0, 4, (3000, 2))
    codes = v + 0.5 * rng.standard_normal((3000, 2))
    once = properties.disentanglement(codes, v)
    assert 0.4 < once < 0.9
    assert properties.disentanglement(np.exp(3 * codes), v) == pytest.approx(once, rel=1e-12)
    above = np.maximum(codes - 0.5, 0)
    assert 0.3 < properties.disentanglement(above, v) < once
    # a factor of more levels than there are parts is still told wholly by itself
    many = rng.integers(0, 40, (8000, 2))
    assert properties.disentanglement(many.astype(float), many) == pytest.approx(1, abs=0.01)


def test_disentanglement_is_the_gap_of_adjusted_mutual_informations():
    """scikit-learn's, normalised by the factor's entropy: its `min` where the feature has the larger one."""
    from sklearn.metrics import adjusted_mutual_info_score

    rng = np.random.default_rng(0)
    v = rng.integers(0, 3, 400)
    codes = np.stack([v + 3 * rng.integers(0, 2, 400) * (rng.random(400) < 0.5), rng.integers(0, 9, 400)], 1)
    codes[:40, 0] = rng.integers(0, 6, 40)
    codes[200:300, 1] = v[200:300]
    told = [adjusted_mutual_info_score(v, code, average_method="min") for code in codes.T]
    found = properties.disentanglement(codes.astype(float), v[:, None])
    assert found == pytest.approx(abs(told[0] - told[1]), rel=1e-9) and min(told) > 0.01


def test_disentanglement_of_codes_that_tell_half():
    """z₁ says whether v is below 2 of its 4 equal levels, z₂ nothing: (ln 2 − 0) / ln 4 = ½."""
    v = np.tile(np.arange(4), 2500)[:, None]
    codes = np.stack([v[:, 0] < 2, np.repeat(np.arange(2500), 4) % 5], 1).astype(float)
    assert properties.disentanglement(codes, v) == pytest.approx(0.5, abs=1e-4)


def test_disentanglement_warns_of_few_examples():
    rng = np.random.default_rng(0)
    for n, few in ((100, True), (600, False)):
        v = rng.integers(0, 10, (n, 2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            properties.disentanglement(rng.standard_normal((n, 3)), v)
        assert [w.category for w in caught] == [SmallSampleWarning] * few
        if few:
            assert "with 100 examples, chance alone tells" in str(caught[0].message)
            assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        (np.zeros((60, 1)), "has the same value"),
        (np.arange(60)[:, None], "expected a few levels each"),
        (np.where(np.arange(60) == 7, np.nan, np.arange(60) % 3)[:, None], "finite factors; got nan .* of example 7"),
    ],
)
def test_factors_that_say_nothing(factors, says):
    with pytest.raises(MeasurementError, match=says):
        properties.disentanglement(FEATURES, factors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_disentanglement_of_features_that_are_not_finite(value):
    features = FEATURES.copy()
    features[3, 2] = value
    with pytest.raises(MeasurementError, match=f"finite features; got {value} in column 2 of example 3"):
        properties.disentanglement(features, FACTORS)


# ------------------------------------------------------------------------------------------------------------ llc


@pytest.mark.slow
def test_llc_of_a_quadratic():
    """½ a nβ / (H (1 − h/4)) per direction, H = a nβ + γ, h = εH: SGLD's own stationary variance, nβ = n / ln n."""
    n, gamma, step = 1000, 100.0, 0.15
    data = (torch.zeros(n, 4), torch.zeros(n, dtype=torch.int64))

    class Away(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.w

    a = torch.tensor([2.0, 1.0, 0.5, 0.1])
    found = properties.llc(Away(), data, lambda out, _: (a * out**2).sum(1).mean() / 2, draws=3000)
    nbeta = n / np.log(n)
    h = a.numpy() * nbeta + gamma
    expected = (0.5 * a.numpy() * nbeta / (h * (1 - step * h / h.max() / 4))).sum()
    assert found["n"] == n and found["nbeta"] == pytest.approx(nbeta)
    assert found["trusted"] == 1
    assert found["se"] < 0.05 * expected
    assert abs(found[""] - expected) < 4 * found["se"]
    assert 0.9 < found["acceptance"] < 1
    assert found["rhat"] < 1.1
    assert 0 < found["step_bias"] < step / 4 * found[""]


def test_an_llc_that_is_not_to_be_trusted_can_be_a_failure():
    data, model = (torch.randn(50, 3), torch.randint(0, 2, (50,))), nn.Linear(3, 2)  # at no minimum
    given = {"draws": 20, "burn_in": 10}
    assert properties.llc(model, data, functional.cross_entropy, **given)["trusted"] == 0
    with pytest.raises(MeasurementError, match="llc: -?[0-9.]+ is not to be trusted: "):
        properties.llc(model, data, functional.cross_entropy, strict=True, **given)

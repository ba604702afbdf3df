"""Transferability metrics beside the implementations of their authors: seconds, and where the numbers differ.

    python benchmarks/transferability.py [--reference DIR] [--repeats 3] [--only parc] [--quick]

DIR holds checkouts by their names: `LogME` and `Transfer-Learning-Library` of github.com/thuml, `parc` of
github.com/dbolya. Nothing is fetched; without DIR ours stand alone. The linear probe's counterpart is scikit-learn's
StandardScaler and LogisticRegression on the same split, with their defaults, which is what LoCoMoSeT runs and stops
early, and converged (tol=1e-6).

Data are float32: 100 classes in features with a mean and correlated noise, 1,000 source classes. CPU seconds of one
thread; ours and theirs in turn, one call of each on little data beforehand for what is compiled or loaded once. A
counterpart that took more than a minute is called once.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from store import machine  # noqa: E402  (beside this file)

from datamodels.measurements import transferability as ours  # noqa: E402
from datamodels.measurements.arrays import encode  # noqa: E402

CLASSES, SOURCES = 100, 1000
SIZES = ((10_000, 768), (50_000, 2_048))
QUICK = ((600, 64), (2_000, 128))
LONG = 60.0  # seconds after which a counterpart is called no more
PARC_LIMIT = 20_000  # examples: theirs holds several n × n matrices of float64


class Data(NamedTuple):
    features: np.ndarray
    labels: np.ndarray
    theta: np.ndarray
    source: np.ndarray


class Case(NamedTuple):
    name: str
    run: Callable[[Data], float]
    theirs: str
    reference: Callable[[Data], float] | None


def draw(n: int, d: int, seed: int = 0) -> Data:
    """ReLU features of latent ones whose size falls over two decades; a linear probe gets some of the classes wrong."""
    rng = np.random.default_rng((seed, n, d))
    labels = rng.permutation(np.arange(n) % CLASSES)
    centres = rng.standard_normal((CLASSES, d), dtype=np.float32) * np.float32(7 / math.sqrt(d))
    sizes = np.logspace(0, -2, d, dtype=np.float32)
    mix = rng.standard_normal((d, d), dtype=np.float32) * sizes[:, None]
    features = (rng.standard_normal((n, d), dtype=np.float32) + centres[labels]) @ mix
    features += 0.5 * features.std()
    np.maximum(features, 0, out=features)
    logits = 2 * rng.standard_normal((n, SOURCES), dtype=np.float32)
    logits[np.arange(n), labels * 7] += 3
    theta = np.exp(logits - logits.max(axis=1, keepdims=True))
    theta /= theta.sum(axis=1, keepdims=True)
    return Data(features, labels, theta, theta.argmax(axis=1))


# ------------------------------------------------------------------------------------------------------- counterparts


class References:
    """Functions out of others' checkouts, or the reason why one is not to be had."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.missing: list[str] = []

    def load(
        self, path: str, needs: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    ) -> Any:
        if self.folder is None:
            return None
        file = self.folder / path
        if not file.is_file():
            self.missing.append(f"{path} (not in {self.folder})")
            return None
        spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
        try:
            module = importlib.util.module_from_spec(spec)
            with needs():
                spec.loader.exec_module(module)
        except Exception as error:
            self.missing.append(f"{path} ({error})")
            return None
        return module

    @contextlib.contextmanager
    def beside_parc(self) -> Iterator[None]:
        """methods.py imports pandas and loaders of images, which its PARC and H-score do not use."""
        assert self.folder is not None
        sys.path.insert(0, str(self.folder / "parc"))
        absent = [name for name in ("pandas", "datasets") if name == "datasets" or not importlib.util.find_spec(name)]
        sys.modules.update({name: types.ModuleType(name) for name in absent})
        try:
            yield
        finally:
            sys.path.pop(0)
            for name in absent:
                del sys.modules[name]


def cases(references: References) -> list[Case]:
    logme = references.load("LogME/LogME.py")
    logme_old = references.load("Transfer-Learning-Library/tllib/ranking/logme.py")
    leep = references.load("LogME/LEEP.py")
    nce = references.load("LogME/NCE.py")
    h_score = references.load("Transfer-Learning-Library/tllib/ranking/hscore.py")
    parc = references.load("parc/methods.py", references.beside_parc)

    def bolya(kind: Any) -> Callable[[Data], float]:
        def run(data: Data) -> float:
            parc.constants.num_classes["benchmark"] = CLASSES
            return kind(data.features.copy(), data.theta, data.labels, "", "benchmark", "", None)

        return run

    return [
        Case("log_me", lambda x: ours.log_me(x.features, x.labels), "thuml/LogME",
             logme and (lambda x: logme.LogME().fit(x.features, x.labels))),
        Case("log_me", lambda x: ours.log_me(x.features, x.labels), "tllib",
             logme_old and (lambda x: logme_old.log_maximum_evidence(x.features, x.labels))),
        Case("h_score", lambda x: ours.h_score(x.features, x.labels), "tllib",
             h_score and (lambda x: h_score.h_score(x.features, x.labels))),
        Case("h_score, shrunk", lambda x: ours.h_score(x.features, x.labels, shrinkage=True), "scikit-learn + numpy",
             shrunk_by_scikit_learn),
        Case("leep", lambda x: ours.leep(x.theta, x.labels), "thuml/LogME",
             leep and (lambda x: leep.LEEP(x.theta, x.labels))),
        Case("nce", lambda x: ours.nce(x.source, x.labels), "thuml/LogME",
             nce and (lambda x: nce.NCE(x.source, x.labels))),
        Case("parc", lambda x: ours.parc(x.features, x.labels), "dbolya/parc",
             parc and bolya(parc.PARC(n_dims=32))),
        Case("linear_probe", lambda x: ours.linear_probe(x.features, x.labels), "scikit-learn",
             probe_by_scikit_learn()),
        Case("linear_probe", lambda x: ours.linear_probe(x.features, x.labels), "converged",
             probe_by_scikit_learn(tol=1e-6, max_iter=10_000)),
    ]  # fmt: skip


def shrunk_by_scikit_learn(data: Data) -> float:
    """The formula as its authors' sketch has it: LedoitWolf, numpy's cov of the class means, pinv."""
    from sklearn.covariance import LedoitWolf

    features = data.features.astype(np.float64)
    fitted = LedoitWolf().fit(features)
    means = np.stack([features[data.labels == k].mean(axis=0) for k in range(CLASSES)])[data.labels]
    between = (1 - fitted.shrinkage_) * np.cov(means, rowvar=False)
    return float(np.trace(np.linalg.pinv(fitted.covariance_, rcond=1e-15) @ between))


def probe_by_scikit_learn(**options: Any) -> Callable[[Data], float]:
    def run(data: Data) -> float:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        held = ours._stratified(encode(data.labels, "benchmark"), 0.25, 0)
        model = make_pipeline(StandardScaler(), LogisticRegression(**options))
        model.fit(data.features[~held], data.labels[~held])
        return float(model.score(data.features[held], data.labels[held]))

    return run


# --------------------------------------------------------------------------------------------------------- measurements


def timed(run: Callable[[Data], float], data: Data) -> tuple[float, float]:
    start = time.process_time()
    value = run(data)
    return float(value), time.process_time() - start


def seconds(times: list[float]) -> str:
    if not times:
        return "-"
    spread = f" ({min(times):.3g}–{max(times):.3g})" if len(times) > 1 else " (once)"
    return f"{statistics.median(times):.3g}{spread}"


def compare(case: Case, data: Data, repeats: int) -> None:
    mine: list[float] = []
    others: list[float] = []
    n = len(data.labels)
    reference = None if case.theirs == "dbolya/parc" and n > PARC_LIMIT else case.reference
    value = other = math.nan
    for _ in range(repeats):
        value, taken = timed(case.run, data)
        mine.append(taken)
        if reference is not None and not (others and max(others) > LONG):
            other, taken = timed(reference, data)
            others.append(taken)
    ratio = f"{statistics.median(others) / statistics.median(mine):.3g}x" if others else "-"
    print(
        f"  {case.name:16} {seconds(mine):>25}  {case.theirs:>20} {seconds(others):>25}  {ratio:>7}"
        f"   {value:>12.7g} {other:>12.7g}",
        flush=True,
    )


def differences(references: References) -> None:
    """Small inputs on which a counterpart gives another number."""
    print("\nwhere numbers differ, on small inputs" + 32 * " " + "ours         theirs")
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(600) % 3)
    few = labels[:60]
    features = rng.standard_normal((3, 20))[labels] + rng.standard_normal((600, 20))
    far = np.array([0, 1, 9])[labels]
    wide = rng.standard_normal((3, 300))[few] + 3 * rng.standard_normal((60, 300))
    padded = np.pad(wide, ((0, 0), (0, 100)))
    turned = features @ np.linalg.qr(rng.standard_normal((20, 20)))[0]
    theta = rng.dirichlet(np.ones(5), 600) * np.array([1, 1, 1, 0, 1])
    theta /= theta.sum(axis=1, keepdims=True)
    source = rng.permutation(np.arange(600) % 5)
    one_hot = np.eye(3)[labels[:90]]

    current = references.load("LogME/LogME.py")
    if current is not None:
        for what, f, y in (
            ("labels 0, 1, 2", features, labels),
            ("the same labels called 0, 1, 9", features, far),
            ("features · 1e-4", features * 1e-4, labels),
            ("features · 1e4", features * 1e4, labels),
            ("60 examples of 300 features", wide, few),
            ("the same and 100 features of zeros", padded, few),
        ):
            show(f"LogME, {what}", lambda f=f, y=y: ours.log_me(f, y), lambda f=f, y=y: current.LogME().fit(f, y))
    older = references.load("Transfer-Learning-Library/tllib/ranking/logme.py")
    if older is not None:
        for what, f, y in (("labels 0, 1, 9", features, far), ("60 examples of 300 features", wide, few)):
            show(f"LogME of tllib, {what}", lambda f=f, y=y: ours.log_me(f, y),
                 lambda f=f, y=y: older.log_maximum_evidence(f, y))  # fmt: skip
    leep = references.load("LogME/LEEP.py")
    if leep is not None:
        show("LEEP, a source class without mass", lambda: ours.leep(theta, labels), lambda: leep.LEEP(theta, labels))
    nce = references.load("LogME/NCE.py")
    if nce is not None:
        show("NCE", lambda: ours.nce(source, labels), lambda: nce.NCE(source, labels))
        show(
            "NCE, arguments swapped as in LoCoMoSeT", lambda: ours.nce(source, labels), lambda: nce.NCE(labels, source)
        )
    parc = references.load("parc/methods.py", references.beside_parc)
    if parc is not None:
        parc.constants.num_classes["benchmark"] = 3

        def bolya(f: np.ndarray, y: np.ndarray, dims: int | None) -> float:
            return parc.PARC(n_dims=dims)(f, None, y, "", "benchmark", "", None)

        for what, f, y, dims in (
            ("25 examples to 32 dims", wide[:25], few[:25], 32),
            ("20 features to 32 dims", features, labels, 32),
            ("to 8 dims", features, labels, 8),
            ("to 8 dims, features rotated", turned, labels, 8),
            ("one-hot features", one_hot, labels[:90], None),
        ):
            show(f"PARC, {what}", lambda f=f, y=y, dims=dims: ours.parc(f, y, dims=dims),
                 lambda f=f, y=y, dims=dims: bolya(f, y, dims))  # fmt: skip


def show(what: str, mine: Callable[[], float], theirs: Callable[[], float]) -> None:
    try:
        other = f"{float(theirs()):.6g}"
    except Exception as error:  # whatever a counterpart dies of is its answer
        other = type(error).__name__
    print(f"  {what:52} {mine():>16.6g}  {other:>17}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="folder of the counterparts' checkouts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="metrics whose name begins so")
    parser.add_argument("--quick", action="store_true", help="little data, to see that it works")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # small samples, and what the counterparts divide by
    references = References(args.reference)
    chosen = [case for case in cases(references) if case.name.startswith(args.only)]
    print(f"{datetime.date.today()}  {machine()}, load average {os.getloadavg()[0]:.1f}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "scikit-learn", "numba"))
    print(f"Python {platform.python_version()}, {versions}")
    print(f"CPU seconds of one thread, medians of n={args.repeats} (least–most); ratio: theirs / ours; float32")
    for case in chosen:
        for run in filter(None, (case.run, case.reference)):
            run(draw(400, 40))
    for n, d in QUICK if args.quick else SIZES:
        data = draw(n, d)
        print(f"\nn={n:,}, d={d:,}; leep and nce: {SOURCES:,} source classes")
        print(f"  {'':16} {'ours':>25}  {'':>20} {'theirs':>25}  {'ratio':>7}   {'ours':>12} {'theirs':>12}")
        for case in chosen:
            compare(case, data, args.repeats)
    if args.reference is not None and not args.only:
        differences(references)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end; not measured: several threads, GPU, float64 input, n < d"
          + (", " + ", ".join(dict.fromkeys(references.missing)) if references.missing else "")
          + (", the counterparts but scikit-learn (no --reference)" if args.reference is None else "")
          + f", dbolya/parc beyond {PARC_LIMIT:,} examples (n × n matrices)")  # fmt: skip


if __name__ == "__main__":
    main()

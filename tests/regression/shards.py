"""A small store to fit, and ways to fit it in shards, for the tests of shards and of their merging."""

import contextlib
import io
from pathlib import Path

import numpy as np

from datamodels.regression import Datamodel, result, shard
from datamodels.regression.compute_datamodels import main
from datamodels.store import Store


def make_store(path, rows=120, p=24, T=10):
    """A store with so many training rows, all complete; its last target is constant."""
    schema = {"masks": {"shape": [p], "dtype": "bits"}, "margins": {"shape": [T], "dtype": "float32"}}
    design = [{"role": "train", "count": rows, "seed": 1, "sampler": "bernoulli", "alpha": 0.5}]
    store = Store.create(path, {"schema": schema, "design": design}, sync=False)
    store.commit_many(range(rows), outcomes(store, rows))
    return path


def outcomes(store, rows, seed=0):
    p, T = (store.spec.schema[key].shape[0] for key in ("masks", "margins"))
    rng = np.random.default_rng(seed)
    masks = np.stack([store.design.assignment(row).mask for row in range(rows)])
    weight = rng.standard_normal((p, T)) * (rng.random((p, T)) < 0.3)
    margins = masks @ weight + rng.standard_normal((rows, T)) * np.linspace(0.1, 2, T)
    margins[:, -1] = 0.5
    return {"masks": masks, "margins": margins.astype("f4")}


def compute(logdir, out, *options):
    """compute_datamodels in this process; its exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        source = [] if logdir is None else [f"--data.logdir={logdir}"]
        code = main([*source, f"--cfg.out_dir={out}", *options])
    return code, said.getvalue()


def begin(monkeypatch, logdir, out, shards, *options):
    """Plan a fit in shards and fill none of them."""
    monkeypatch.setattr(shard.pool, "main", lambda argv: 1)
    assert compute(logdir, out, f"--cfg.shards={shards}", *options)[0] == 1
    monkeypatch.undo()


def fill(out, shards=None, **instead):
    """Fit shards in this process, and commit them as a worker does."""
    with Store.open(out / "shards", sync=False) as store:
        for row in range(store.num_models) if shards is None else shards:
            folder = Path(store.path) / "workers" / str(row)
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stderr(io.StringIO()):
                values = shard.main(index=row, logdir=str(folder)) | instead
            store.commit_many([row], {key: np.asarray(value)[None] for key, value in values.items()})


def assert_same_result(one, other):
    """Two results are the same to the bit."""
    one, other = Datamodel.load(one), Datamodel.load(other)
    for name in ("ended", "columns", "targets", "about"):
        assert getattr(one, name) == getattr(other, name), name
    a, b = result.arrays(one), result.arrays(other)
    assert list(a) == list(b)
    for name, values in a.items():
        assert values.dtype == b[name].dtype
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def files(folder):
    """{path: content} of every file below folder, but for the shards' store."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "shards" not in path.relative_to(folder).parts
    }

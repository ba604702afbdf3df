"""The example of properties and benefits, with few small networks and a short LLC."""

import json

import numpy as np
import pytest

from datamodels.errors import DatamodelsError
from datamodels.store import Store
from examples.interplay import run
from tests.jobs import ROOT


@pytest.mark.slow
def test_it_runs_from_the_zoo_to_the_picture_and_goes_on_where_it_was(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    for _ in range(2):
        assert run.main(out=out, options=["--pool.workers=2", "--worker.sync=false"], draws=20, smoke=True) == 0
    said = capfd.readouterr().out
    assert said.count("12 models of 12 different choices") == 2 and "digits_test_accuracy: R2" in said
    assert "digits_train_nll: R2" not in said  # how well it fits is a property
    assert (out / "effects.png").read_bytes().startswith(b"\x89PNG")
    with Store.open(out / "store") as store:
        assert store.completed().all()
        # the first moment of each row is its own training: wider and longer trained models know more digits
        accuracy, width = (
            store.rows("digits_test_accuracy"),
            [store.design.assignment(r).choices["epochs"] for r in range(12)],
        )
        assert np.mean(accuracy[np.array(width) == 3]) > np.mean(accuracy[np.array(width) == 1])
        assert len(set(store.rows("weight_norms_l2"))) == 12
        records = {key: store.layout.records(key)["status"] for key in store.spec.schema}
        assert all((status == 1).all() for key, status in records.items() if "llc" not in key)
    with pytest.raises(DatamodelsError, match=r"design\[0\].count is 12 there and 128 here"):
        run.main(out=out)


def test_its_smoke_spec_differs_from_the_whole_in_size_alone():
    spec = json.loads((ROOT / run.SPEC).read_text())
    small = run.small(spec)
    assert small["schema"] == spec["schema"] and small["design"][0]["count"] == 12
    kinds = [[name.split("?")[0].split("@")[0] for name in s["measurements"]["names"]] for s in (spec, small)]
    assert kinds[0] == kinds[1] and set(small["design"][0]["choices"]) == set(spec["design"][0]["choices"])

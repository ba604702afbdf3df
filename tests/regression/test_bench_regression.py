"""The benchmark of the CPU solvers runs from end to end, small; what it counts and what it compares with are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks/regression.py"


def run(*args):
    """It sets the environment of its process to one thread, and so has a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", *args], capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ
    )


def test_small():
    done = run(str(SCRIPT), "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for kind in ("sparse", "heavy"):
        for text in (
            f"{kind}, n=400, p=60, T=8, 80 of the rows validate, k=20, eps=0.001",
            f"floor, {kind}, n=400, p=60, T=8",
            f"wide, {kind}, n=60, p=400, T=4",
        ):
            assert text in done.stdout, done.stdout
    for text in (
        "scikit-learn, float32 Gram, our lambdas",
        "fast_l1 and its defaults, written in torch",
        "ours, early stop off",
        "patience  misses  of",
        "log-log slope in n",
        "n=500, p=80, T=8, once",
    ):
        assert text in done.stdout, done.stdout
    for peer in ("adelie", "celer"):
        assert f"not measured: {peer}'s full path" in done.stdout or f"  {peer}'s full path   " in done.stdout
    assert "goal" not in done.stdout


def test_only_what_is_named():
    done = run(str(SCRIPT), "--small", "--wide")
    assert done.returncode == 0, done.stderr
    assert "wide, heavy" in done.stdout
    assert "floor" not in done.stdout
    assert "fast_l1" not in done.stdout


def test_fast_l1s_algorithm_solves_the_lasso_when_it_has_time():
    code = """
import json, numpy as np
import benchmarks.regression as b
problem = b.draw(b.Size(400, 60, 5), "heavy")
design, options = b.Design(problem), b.PathOptions(k=4, eps=0.1)
for stop in (1e-4, 1e-14):
    path, refit = b.saga(design, problem.y, options, 60, b.Step(lr=0.05, batch=80, stop=stop))
    for found, sd, rows in ((path, design.sd, np.sort(problem.train)), (refit, design.sd_full, np.arange(400))):
        gap = b.gaps(problem, found.weight.numpy() / sd[:, None], found.lam.numpy(), rows, np.arange(5))
        print(json.dumps([found.place.tolist(), found.ended.tolist(), gap.tolist()]))
least = options.grid(1.0)[b.ours(problem, options)[0].best]
print(bool(np.allclose(refit.lam.numpy() / b.ours(problem, options)[0].path_lam[0], least, rtol=1e-5)))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    *found, same_lambda = map(json.loads, done.stdout.replace("True", "true").splitlines())
    (_, _, early), _, (place, _, _), _ = found
    assert place == [3] * 5
    assert max(early) > 1e-3
    for _, ended, late in found[2:]:
        assert all(ended)
        assert max(late) < 1e-5
    assert same_lambda


def test_work_is_counted_where_it_is_done_and_answers_stay():
    code = """
import json, numpy as np
import benchmarks.regression as b
p, n_val = 30, 17
M = np.diag(np.arange(1, p + 1)).astype(np.float32)
diag, zero, which, by = np.diag(M).astype(float), np.zeros(p), np.arange(p, dtype=np.int32), np.ones(p)
problem, options = b.draw(b.Size(200, 40, 3), "sparse"), b.PathOptions(k=10, eps=1e-2)
plain = b.ours(problem, options)[0].weight
with b.counted() as counts:
    same = bool((b.ours(problem, options)[0].weight == plain).all())
    counted = counts.calls.sum(axis=1).tolist()
    counts.work[:], counts.calls[:] = 0, 0
    kernels = b.gram_path.descent
    kernels.move(M, diag, zero.astype(np.float32), 1.0, which, by, 5, np.zeros(p, np.float32))
    kernels.move(M, diag, zero, 1.0, which, by, 3, np.zeros(p))
    kernels.slide(np.ones((p, n_val), np.int8), zero, which, by, 9, np.zeros(n_val, np.float32))
    kernels.descend(M, 7, np.zeros(7), 100 * np.ones(7), diag[:7], zero[:7], 1.0, by[:7], by[:7], 0.5, 1e-3)
assert b.gram_path.descent is b.descent
print(json.dumps([same, counted, counts.work.tolist(), counts.calls.tolist()]))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    same, counted, work, calls = json.loads(done.stdout)
    assert same
    assert all(count > 0 for count in counted)
    # Orthogonal columns: each of the seven moves once.
    assert work == [[5 * 30, 3 * 30], [9 * 17, 0], [0, 0], [0, 7 * 7]]
    assert calls == [[1, 1], [1, 0], [0, 0], [0, 7]]

"""Who may import whom, read from the source; and what never loads torch, tried in processes where torch cannot load."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import missing

ROOT = Path(__file__).parent.parent
MAIN = 4  # the layer of entry points

# The first line that fits decides; a file that fits none fails the test: say here where it belongs.
LAYERS = [
    ("*.__main__", MAIN),
    ("initialize_logdir", MAIN),
    ("worker", MAIN),
    ("watchdog", MAIN),
    ("pool", MAIN),
    ("training", MAIN),
    ("regression.write_dataset", MAIN),
    ("regression.compute_datamodels", MAIN),
    ("regression.shard", MAIN),
    ("regression.merge", MAIN),
    ("evaluation", 3),
    ("report", 3),
    ("regression", 2),
    ("executors", 2),
    ("store", 1),
    ("design", 1),
    ("row_filter", 1),
    ("running", 1),
    ("ranks", 1),
    ("learning", 1),
    ("zoo", 1),
    ("measurements", 1),
    ("errors", 0),
    ("files", 0),
    ("spec", 0),
    ("cli", 0),
    ("", 0),  # datamodels/__init__.py itself
]
# Layer 1 is two halves that never see each other; in the second, the left never imports the right.
STORE_HALF = {"store", "design", "row_filter", "running", "ranks"}
LEARNING_HALF = ["learning", "zoo", "measurements"]
WITHOUT_TORCH = (
    "spec",
    "design",
    "row_filter",
    "running",
    "errors",
    "cli",
    "store",
    "executors",
    "initialize_logdir",
    "worker",
    "watchdog",
    "pool",
)


def part(module):
    """The entry of LAYERS that a module of the package belongs to, and its layer; KeyError for a stranger."""
    name = module.removeprefix("datamodels").removeprefix(".")
    for entry, layer in LAYERS:
        if entry == "" or entry.startswith("*"):
            fits = name == entry if entry == "" else name.endswith("." + entry[2:])
        else:
            fits = name == entry or name.startswith(entry + ".")
        if fits:
            return name.partition(".")[0], layer
    raise KeyError(module)


def modules():
    """{dotted name: source} of every file of the package."""
    found = {}
    for path in sorted((ROOT / "datamodels").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def imports(source, module, is_package, known):
    """(line, dotted name) of everything a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


def breaches(source, module, is_package, known):
    """Sentences, one for each import of a file that its layer does not allow."""
    own, layer = part(module)
    for line, name in imports(source, module, is_package, known):
        where = f"{module}:{line} imports {name}"
        if name.partition(".")[0] == "fastargs" and module != "datamodels.cli":
            yield f"{where}: inside the package only cli.py touches fastargs"
        if name.partition(".")[0] == "torch" and own in WITHOUT_TORCH:
            yield f"{where}: this part works without torch"
        if name.partition(".")[0] in ("worker_scripts", "examples", "benchmarks", "tests"):
            yield f"{where}: the package must not know of it"
        if name.partition(".")[0] != "datamodels":
            continue
        if name not in known:
            yield f"{where}: there is no such module"
            continue
        other, below = part(name)
        if below > layer:
            yield f"{where}: layer {layer} may not see layer {below}"
        if other == "cli" and own != "cli" and layer != MAIN:
            yield f"{where}: cli is for entry points"
        if own in STORE_HALF and layer == 1 and other in LEARNING_HALF:
            yield f"{where}: the store never sees training code"
        if own in LEARNING_HALF and layer == 1:
            if other in STORE_HALF or other == "spec":
                yield f"{where}: training code never sees a store"
            if other in LEARNING_HALF[LEARNING_HALF.index(own) + 1 :]:
                yield f"{where}: {other} may import {own}, not the reverse"


def test_every_import_follows_the_layers():
    known = modules()
    found = []
    for module, path in known.items():
        try:
            part(module)
        except KeyError:
            found.append(f"{path.relative_to(ROOT)}: belongs to no layer; add it to LAYERS in {Path(__file__).name}")
            continue
        found += breaches(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", known)
    assert found == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("datamodels.store.store", "from datamodels.learning import loop", "never sees training code"),
        ("datamodels.store.store", "def f():\n    from ..learning.loop import train", "never sees training code"),
        ("datamodels.design", "import datamodels.learning.loop", "never sees training code"),
        ("datamodels.learning.loop", "from datamodels.store import Store", "never sees a store"),
        ("datamodels.learning.loop", "from datamodels import design", "never sees a store"),
        ("datamodels.spec", "from datamodels import design", "layer 0 may not see layer 1"),
        ("datamodels.store.store", "from datamodels.regression import fit", "layer 1 may not see layer 2"),
        ("datamodels.regression.lasso", "from datamodels.worker import main", "layer 2 may not see layer 4"),
        ("datamodels.regression.lasso", "from .compute_datamodels import main", "layer 2 may not see layer 4"),
        ("datamodels.regression.lasso", "from datamodels import cli", "for entry points"),
        ("datamodels.executors.base", "from fastargs import Param", "only cli.py touches fastargs"),
        ("datamodels.worker", "def f():\n    import torch.nn", "works without torch"),
        ("datamodels.worker", "from worker_scripts.train_mlp import main", "must not know of it"),
        ("datamodels.worker", "from datamodels.nothing import main", "no such module"),
        ("datamodels.worker", "from datamodels.store import Store\nfrom datamodels import cli, __version__", None),
        ("datamodels.regression.lasso", "from . import gram\nimport torch", None),
    ],
)
def test_the_rule_itself(module, source, complaint):
    known = {*modules(), "datamodels.executors.base", "datamodels.worker", "datamodels.learning.loop"}
    found = list(breaches(source, module, False, known))
    assert found == [] if complaint is None else len(found) == 1 and complaint in found[0]


def test_a_stranger_has_no_layer():
    with pytest.raises(KeyError):
        part("datamodels.utils")


@pytest.fixture
def no_torch(tmp_path):
    """Environment of a process, and of its children, in which `import torch` fails."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch is blocked by this test')\n")
    return {**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}


def python(*argv, env):
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_torch_is_really_blocked(no_torch):
    assert "torch is blocked by this test" in python("-c", "import torch", env=no_torch).stderr


def test_importing_the_store_and_the_entry_points_does_not_need_torch(no_torch):
    names = ["cli", "design", "initialize_logdir", "pool", "spec", "store", "worker", "executors.local"]
    code = "; ".join(f"import datamodels.{name}" for name in names)
    done = python("-W", "error", "-c", code, env=no_torch)
    assert (done.returncode, done.stderr) == (0, "")


def test_worker_and_pool_run_without_torch(no_torch, tmp_path):
    logdir = tmp_path / "store"
    spec = ROOT / "examples/minimal/spec.json"
    row = ["--worker.main_import=examples.minimal.train_minimal", f"--worker.logdir={logdir}", "--trainer.multiple=2"]
    for argv in (
        ["datamodels.initialize_logdir", f"--logging.logdir={logdir}", f"--logging.spec={spec}"],
        ["datamodels.worker", "--worker.index=0", *row],
        ["datamodels.pool", "--pool.workers=1", *row],
    ):
        done = python("-m", *argv, env=no_torch)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "module",
    [
        "initialize_logdir",
        "worker",
        "pool",
        "store",
        "regression.compute_datamodels",
        "regression.write_dataset",
        "training.worker",
    ],
)
def test_help_loads_nothing_heavy(no_torch, tmp_path, module):
    for name in ("sklearn", "matplotlib", "yaml"):
        (tmp_path / "blocked" / f"{name}.py").write_text("raise ImportError('blocked by this test')\n")
    done = python("-W", "error", "-m", f"datamodels.{module}", "--help", env=no_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m datamodels.")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_importing_datamodels_is_quick():
    """Under 0.3 s: no numpy, no torch, nothing but the standard library."""
    code = "import sys; import datamodels; print(sorted({'numpy', 'torch', 'fastargs', 'scipy'} & set(sys.modules)))"
    done = python("-c", code, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "[]\n")


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    """People clone into `datamodels` and start Python beside it, where the clone looks like a package of that name."""
    if not _installed():
        missing("the package is not installed in this environment; make test does that")
    (tmp_path / "datamodels").symlink_to(ROOT)
    code = "from datamodels.regression import Datamodel; from datamodels import __version__"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _installed():
    try:
        return bool(importlib.metadata.distribution("datamodels-store"))
    except importlib.metadata.PackageNotFoundError:
        return False

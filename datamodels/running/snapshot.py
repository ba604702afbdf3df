"""A copy of the user's code in the store, so that it can be edited while jobs run.

`snapshots/<id>/` holds what git would take of the repository that main's module is in: tracked files, and untracked
ones that it does not ignore. The id comes from the bytes, so that the same code is copied once. `snapshots/<id>.json`
says where it came from. A worker that is told of a copy starts itself anew with the copy in front of the Python path;
the current folder stays, so relative paths to data mean what they did. Python processes that main starts see the copy
too; a script among them finds modules beside it only where the Python path leads there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from datamodels import files
from datamodels.errors import ConfigError
from datamodels.store import describe

LIMIT = 100 << 20  # bytes; code is less, and data has no place in a copy of it
_VARIABLE = "DATAMODELS_SNAPSHOT"


def take(store: Path, module: str) -> str:
    """Copy the code that `module` belongs to into a store, unless it is there; the id of the copy.

    Raises `ConfigError` where the module is not in a git repository, or the repository holds more than `LIMIT` bytes
    that git does not ignore; the store itself is left out.
    """
    file, start = _find(module)
    root = _root(start)
    names = [name for name in _names(root) if not (root / name).is_relative_to(store.resolve())]
    sizes = Counter({name: (root / name).lstat().st_size for name in names})
    if sizes.total() > LIMIT:
        folders: Counter[str] = Counter()
        for name, size in sizes.items():
            folders[name.split("/")[0]] += size
        most = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for name, size in folders.most_common(3))
        raise ConfigError(
            f"--pool.snapshot: {root} holds {sizes.total() / 1e6:.0f} MB that git does not ignore, more than "
            f"{LIMIT / 1e6:.0f}: {most}; put what is not code into .gitignore, or start it without a snapshot"
        )
    facts = {"from": str(root), "path": str(start.relative_to(root)), "taken": time.time(), **describe.code(file)}
    facts |= {"files": len(names), "bytes": sizes.total()}
    folder = store / "snapshots"
    folder.mkdir(exist_ok=True)
    part = folder / f".{os.getpid()}.partial"
    try:
        for name in names:
            _copy(root, name, part / name)
        copy = _digest(part, names)
        place = folder / copy
        if not place.exists():
            with files.whole(folder / f"{copy}.json") as beside:
                beside.write(json.dumps(facts | {"names": names}, indent=1).encode())
            with contextlib.suppress(OSError):  # another pool was first
                os.rename(part, place)
        _check(store, copy)
        return copy
    finally:
        shutil.rmtree(part, ignore_errors=True)


def enter(store: Path, copy: str, argv: Sequence[str]) -> dict[str, Any]:
    """Go on in a copy; what the run's record says of it: the copy, the commit, and whether the code was the same.

    The process becomes a worker with the arguments `argv` whose Python path begins with the copy, and comes here again.
    Raises `ConfigError` where there is no such copy, or where it was edited.
    """
    facts = _read(store, copy)
    if os.environ.get(_VARIABLE) != copy:
        _check(store, copy)
        os.execve(sys.executable, [sys.executable, "-m", "datamodels.worker", *argv], _environment(store, copy, facts))
    del os.environ[_VARIABLE]  # but PYTHONSAFEPATH stays: `python -m` that main starts would find what is here now
    return {"snapshot": copy, **{name: facts[name] for name in ("git_commit", "git_dirty") if name in facts}}


def _environment(store: Path, copy: str, facts: dict[str, Any]) -> dict[str, str]:
    """That of a process for which each entry of this one's Python path has the copy's own before it."""
    root, place = Path(facts["from"]), (store / "snapshots" / copy).resolve()
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = [root / facts["path"], *(Path(entry).resolve() for entry in (os.getcwd(), *given, *sys.path))]
    inside = [place / entry.relative_to(root) for entry in found if entry.is_relative_to(root)]
    path = dict.fromkeys([*(str(entry) for entry in inside if entry.is_dir()), os.getcwd(), *given])
    return {**os.environ, _VARIABLE: copy, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def _find(module: str) -> tuple[Path, Path]:
    """A module's file, and the entry of the Python path that it is found in, without importing anything."""
    first, *rest = module.split(".")
    spec: ModuleSpec | None = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(first)
    for part in rest:
        spec = spec and PathFinder.find_spec(part, spec.submodule_search_locations)
    if spec is None or not spec.has_location or not spec.origin:
        raise ConfigError(f"--pool.snapshot: there is no module {module!r} to copy; run it where the name begins")
    file = Path(spec.origin).resolve()
    return file, file.parents[len(rest) + (file.name == "__init__.py")]


def _root(folder: Path) -> Path:
    """The repository that a folder is in."""
    try:
        found = _git(folder, "rev-parse", "--show-toplevel").rstrip("\n")
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        raise ConfigError(
            f"--pool.snapshot: {folder} must be in a git repository, which says what is code ({why.strip()}); "
            f"`git init` there is enough"
        ) from None
    return Path(found).resolve()


def _names(root: Path) -> list[str]:
    """Files of a repository and of its submodules, relative to it, that git does not ignore."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    names = []
    for name in sorted({name for name in listed if name}):
        path = root / name.rstrip("/")
        if path.is_dir() and not path.is_symlink():  # a repository in the repository
            if (path / ".git").exists():
                names += [f"{name.rstrip('/')}/{inner}" for inner in _names(path)]
        elif os.path.lexists(path):
            names.append(name)
    return names


def _git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout


def _copy(root: Path, name: str, place: Path) -> None:
    source = root / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():  # one that leaves the repository, as to a data set, must not miss its target
        target = source.resolve()
        os.symlink(os.readlink(source) if target.is_relative_to(root) else target, place)
    else:
        shutil.copy(source, place)


def _digest(folder: Path, names: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for name in names:
        path = folder / name
        mode = path.lstat().st_mode
        data = os.readlink(path).encode() if stat.S_ISLNK(mode) else path.read_bytes()
        whole.update(f"{name}\0{stat.S_IFMT(mode) | mode & stat.S_IXUSR:o}\0{len(data)}\0".encode())
        whole.update(data)
    return whole.hexdigest()[:12]


def _read(store: Path, copy: str) -> dict[str, Any]:
    folder = store / "snapshots"
    try:
        facts: dict[str, Any] = json.loads((folder / f"{copy}.json").read_bytes())
    except FileNotFoundError:
        there = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
        raise ConfigError(f"--worker.snapshot: {folder} has no {copy!r}; it has: {there}") from None
    return facts


def _check(store: Path, copy: str) -> None:
    place = store / "snapshots" / copy
    try:
        same = _digest(place, _read(store, copy)["names"]) == copy
    except FileNotFoundError:
        same = False
    if not same:
        raise ConfigError(
            f"--worker.snapshot: {place} was edited since it was made, and rows that name it would be wrong; remove it "
            f"and its .json, and start the pool with --pool.snapshot"
        )

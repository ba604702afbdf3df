"""How the runners of examples show what they do: a title for each step, and commands that also work by themselves."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from datamodels import cli, files
from datamodels.errors import ConfigError, DatamodelsError
from datamodels.store import Store


def step(title: str) -> None:
    print(f"\n{title}", flush=True)


def command(module: str, *options: object) -> None:
    """Run `python -m module …`, shown; end this script where it fails."""
    words = [module, *map(str, options)]
    print(f"   $ python -m {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *words], check=False).returncode
    if code:
        sys.exit(code)


def run(main: Callable[[], int | None]) -> NoReturn:
    """End the process with main's exit code; an error of the package is one line on stderr, and exit code 2."""

    def asked() -> int | None:
        try:
            return main()
        except DatamodelsError as error:
            raise ConfigError(str(error)) from None

    cli.run(asked)


def only_for_workers(module: str) -> NoReturn:
    """What a module says that is run as a script, and has only the main() of a row."""
    print(f"{module} trains a row of a store: python -m datamodels.worker --worker.main_import={module}; "
          f"python -m {module.rpartition('.')[0]}.run does all of it", file=sys.stderr)  # fmt: skip
    raise SystemExit(2)


def store(path: Path, kept: Path, spec: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
    """A store of that spec, kept in a file beside it; `settings` is what else its numbers come from.

    What is there already is gone on with. DatamodelsError where it is another's, as in `check`.
    """
    check(path, kept, spec, settings)
    # A mistake in the settings may have come out before any row was complete: the next ones stand from then on.
    if settings is not None and not _complete(path):
        _write(_settings(kept), settings)
    if (path / "spec.json").exists():
        with Store.open(path) as made:
            print(f"   {path} is there, {int(made.completed().sum())} of {len(made.completed())} rows complete")
        return
    _write(kept, spec)
    command("datamodels.initialize_logdir", f"--logging.logdir={path}", f"--logging.spec={kept}")


def check(path: Path, kept: Path, spec: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
    """DatamodelsError that says what differs, where a store is there that was made from something else."""
    if not (path / "spec.json").exists():
        return
    if not kept.exists():
        raise DatamodelsError(f"{path} is there, and no {kept} that says what it was made from; {_advice(path)}")
    found = _differences(json.loads(kept.read_text()), json.loads(json.dumps(spec)), "")
    if settings is not None and _settings(kept).exists() and _complete(path):
        found += _differences(json.loads(_settings(kept).read_text()), json.loads(json.dumps(settings)), "")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise DatamodelsError(f"{path} was made from something else: {'; '.join(found[:5])}{more}. {_advice(path)}")


def options(words: Iterable[str]) -> dict[str, str | float]:
    """{name: value} of `--name=value`, without those that say how rows are run and not what comes out."""
    pairs = (word.partition("=") for word in words)
    return {
        name: _number(value)
        for name, _, value in pairs
        if not name.startswith(("--worker.", "--pool.", "--llc.device"))
    }


def _number(text: str) -> str | float:
    """1e-8 and 1e-08 are the same."""
    try:
        return float(text)
    except ValueError:
        return text


def _advice(path: Path) -> str:
    return f"Name another folder for the results, or remove {path} to have them made again"


def _settings(kept: Path) -> Path:
    return kept.with_suffix(".settings.json")


def _complete(path: Path) -> bool:
    if not (path / "spec.json").exists():
        return False
    with Store.open(path) as made:
        return bool(made.completed().any())


def _differences(there: Any, wanted: Any, where: str) -> list[str]:
    """Each place where two contents of JSON files differ. A schema may lack keys that came or went since."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        names = [name for name in {**there, **wanted} if where != "schema" or (name in there and name in wanted)]
        parts = [(f"{where}.{name}".strip("."), there.get(name), wanted.get(name)) for name in names]
    elif (
        isinstance(there, list)
        and isinstance(wanted, list)
        and len(there) == len(wanted)
        and all(isinstance(entry, dict) for entry in there + wanted)
    ):
        parts = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(there, wanted, strict=True))]
    else:
        return [] if there == wanted else [f"{where} is {_short(there)} there and {_short(wanted)} here"]
    return [line for where, old, new in parts for line in _differences(old, new, where)]


def _short(value: Any, most: int = 100) -> str:
    text = "left out" if value is None else json.dumps(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())

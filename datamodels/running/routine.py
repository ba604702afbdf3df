"""The functions of the user's module: found, asked what they want, and called with it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import inspect
import random
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from datamodels.design import RESERVED
from datamodels.errors import ConfigError
from datamodels.running.ends import JobTimeout, Stopped, last_line
from datamodels.spec import nearest
from datamodels.store import Store


def import_main(name: str) -> ModuleType:
    """The user's module. `ConfigError` where there is none, saying which path was tried, or where its import fails."""
    if not name or "/" in name or name.startswith(".") or name.endswith(".py"):
        raise ConfigError(
            f"--worker.main_import: expected a dotted name as in examples.minimal.train_minimal, got {name!r}; it is "
            f"not a path: leave out .py and write . for /"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            path = Path.cwd() / (name.replace(".", "/") + ".py")
            raise ConfigError(
                f"--worker.main_import: there is no module {name!r}; tried {path} and the Python path "
                f"(sys.path[0] is {sys.path[0]!r}); run it from the folder that the name begins in"
            ) from None
        raise _not_importable(name) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(name) from error


def _not_importable(name: str) -> ConfigError:
    traceback.print_exc()
    error = sys.exc_info()[1]
    assert error is not None
    return ConfigError(f"--worker.main_import: importing {name} failed: {last_line(error)}; its traceback is above")


@dataclass(frozen=True)
class Routine:
    """A function of the user's module, and which of our arguments it asks for by name."""

    function: Callable[..., Any]
    name: str
    wanted: tuple[str, ...]
    required: tuple[str, ...] = ()  # those among them that have no default

    @classmethod
    def find(cls, module: ModuleType, name: str, available: Sequence[str]) -> Routine | None:
        """The module's function of that name; `ConfigError` when it needs an argument that nobody has."""
        function = getattr(module, name, None)
        if function is None:
            return None
        where = f"{module.__name__}.{name}"
        if not callable(function):
            raise ConfigError(f"{where}: expected a function, got {type(function).__name__}")
        inner, filled = unwrapped(function)
        wanted: list[str] = []
        required: list[str] = []
        missing: list[str] = []
        for parameter in inspect.signature(inner).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                wanted += [n for n in available if n not in wanted]
            elif parameter.kind is parameter.VAR_POSITIONAL:
                continue
            elif parameter.name in available and parameter.kind is not parameter.POSITIONAL_ONLY:
                wanted.append(parameter.name)
                if parameter.default is parameter.empty and parameter.name not in filled:
                    required.append(parameter.name)
            elif parameter.default is parameter.empty and parameter.name not in filled:
                missing.append(parameter.name)
        if missing:
            raise ConfigError(
                f"{where}: asks for {', '.join(missing)}, which a row does not have; it has "
                f"{', '.join(available)}{_hint(missing, available)}; give the argument a default, or name "
                f"a factor of the design"
            )
        return cls(function, where, tuple(wanted), tuple(required))

    def check_blocks(self, store: Store) -> None:
        """`ConfigError` for a block whose rows do not have a factor that the function cannot do without."""
        for number, block in enumerate(store.design.blocks):
            for factor in store.design.factors:
                if factor in self.required and factor not in block.cells[0]:
                    raise ConfigError(
                        f"{self.name}: asks for {factor}, and the rows of design[{number}] ({block.role}) do not have "
                        f"that factor; give the argument a default, or the block `choices` (a block has only its own)"
                    )

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Call it with what it wants of `arguments`: a factor that a row's block does not have is left out."""
        try:
            return self.function(**{name: arguments[name] for name in self.wanted if name in arguments})
        except (Exception, JobTimeout, Stopped):
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                raise  # a real Ctrl-C
            what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
            raise RuntimeError(f"{self.name} {what}; a row ends by returning its values") from error


def _hint(missing: Sequence[str], available: Sequence[str]) -> str:
    return " (the design of this store defines no masks)" if {"mask", "masks"} & set(missing) else ""


def check_factors(module: ModuleType, routines: Sequence[Routine], store: Store) -> list[str]:
    """A sentence for each factor of the design that reaches nobody: no function takes it, and no key holds it.

    That may be meant, to tell repeats apart. `ConfigError` where the module says that its functions take all the
    factors that mean anything to them, in a line `ALL_FACTORS_ARE_TAKEN = True`.
    """
    found = []
    for factor in store.design.factors:
        if factor in store.spec.schema or any(factor in routine.wanted for routine in routines):
            continue
        first = routines[0]
        parameters = inspect.signature(unwrapped(first.function)[0]).parameters
        known = nearest(factor, [name for name in parameters if name not in RESERVED])
        found.append(
            f"the factor {factor!r} reaches nobody: {first.name} does not take it and no key of the schema holds "
            f"it{known}"
        )
    if found and getattr(module, "ALL_FACTORS_ARE_TAKEN", False):
        raise ConfigError(f"{found[0]}; make a store with a design whose factors have these names")
    return found


def unwrapped(function: Callable[..., Any]) -> tuple[Callable[..., Any], set[str]]:
    """The function inside fastargs' `@param` decorators, and the arguments that they fill."""
    wrapper = getattr(function, "__fastarg_wrapper", function)
    filled: set[str] = set()
    while hasattr(wrapper, "arg_paths") and hasattr(wrapper, "func"):
        filled |= {alias for _, _, alias in wrapper.arg_paths}
        wrapper = getattr(wrapper.func, "__fastarg_wrapper", wrapper.func)
    return wrapper, filled


def available(store: Store, *, many: bool) -> list[str]:
    """Names that `main` (or `main_many`) may ask for."""
    masks = any(block.sampler for block in store.design.blocks)
    names = ["indices", "seeds", "logdirs", "smoke"] if many else ["index", "seed", "logdir", "smoke"]
    names += ["keys", "measurements"]
    names += (["masks"] if many else ["mask"]) if masks else []
    return names + [f for f in store.design.factors if f not in RESERVED]


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and, where it is loaded, torch's global generators from a row's seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    else:
        _LATE_TORCH.seed = seed
        if _LATE_TORCH not in sys.meta_path:
            sys.meta_path.insert(0, _LATE_TORCH)


class _SeedLateTorch(importlib.abc.MetaPathFinder):
    """Seeds torch when it is imported only by main, after the row's seeds were set."""

    seed = 0

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                module.manual_seed(self.seed)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_LATE_TORCH = _SeedLateTorch()

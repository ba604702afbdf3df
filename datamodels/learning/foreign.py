"""Checkpoints that other code wrote: `.pth`, `.pt`, `.pth.tar`, of a bare state_dict or of a training run's everything.

Read with `weights_only`, so no code in them is run. What wraps the weights is looked through: entries such as
`state_dict` or `model`, and prefixes as `module.` of DataParallel or `_orig_mod.` of torch.compile.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datamodels.errors import DatamodelsError

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
STEPS = ("step", "global_step", "iteration", "iter", "epoch")
# What a number in a file name counts, those first that count finest; `lr_1e-3` and `step_10k` count nothing.
_SAID = [
    re.compile(rf"(?<![a-z]){words}[-_= ]?(\d+)(?!\.?[0-9a-z])")
    for words in ("steps?", "iter(?:ation)?s?", "it", "epochs?", "ep", "(?<![0-9])e")
]
_BARE = re.compile(r"(?:(?:check[-_]?point|ch?k?pt|model|net|network|state|weights|params|snapshot)[-_. ]?)?(\d+)")
_ENDING = re.compile(r"(?:\.(?:tar|pth|pt|ckpt|bin|pkl|th|safetensors|gz))+$")
# Beside the weights lie the run's arguments and numpy's numbers; to build these runs nothing of the file's choosing.
_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [argparse.Namespace, np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")] + [
    type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)
]


@dataclass(frozen=True)
class Checkpoint:
    """The weights by name as the file has them, and the training step: of the file, else of its name, else None.

    Of a name it is the number behind step, iter, it, epoch, ep or e, in this order, or the only thing that the name
    says beside `checkpoint`, `model` and the like: 12 of `resnet18_epoch12_acc93.1.pth`, nothing of `resnet18.pth`.
    """

    path: Path
    state: dict[str, torch.Tensor]
    step: int | None


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. DatamodelsError where it cannot be read, or holds no weights by name."""
    path = Path(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DatamodelsError(f"checkpoint {path}: no such file") from None
    except OSError:
        raise
    except Exception as error:  # on damaged bytes torch's unpickler raises whatever comes
        found = re.search(r"(?:global: GLOBAL|unsupported GLOBAL) (\S+)", str(error))
        why = f"it holds a {found[1]}, which could run code" if found else (str(error).splitlines() or ["damaged"])[0]
        raise DatamodelsError(
            f"checkpoint {path}: cannot be read: {why}; expected tensors by name; where you trust the file, load it "
            f"yourself and save its state_dict alone"
        ) from error
    return Checkpoint(path, _weights(content, path), _step(content, path))


def _weights(content: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
            return dict(content)
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if inner:
            return _weights(inner[0], path)
        names = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise DatamodelsError(
            f"checkpoint {path}: found {names}; expected weights, bare or under {', '.join(WRAPPERS)}"
        )
    raise DatamodelsError(f"checkpoint {path}: expected weights by name, got {type(content).__name__}")


def _step(content: Any, path: Path) -> int | None:
    for key in STEPS:
        value = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(value, int | float | np.number) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            return int(value)
    return step_of_name(path.name)


def step_of_name(name: str) -> int | None:
    """The training step that a file's name says, as in `Checkpoint`; None where it says none, or two of a kind."""
    words = _ENDING.sub("", re.sub(r"([a-z])(?=[A-Z])", r"\1_", name).lower())
    for said in _SAID:
        numbers = {int(number) for number in said.findall(words)}
        if numbers:
            return numbers.pop() if len(numbers) == 1 else None
    alone = _BARE.fullmatch(words)
    return int(alone[1]) if alone else None


def by_step(folder: str | Path, pattern: str = "*") -> dict[int, Path]:
    """The checkpoints of a folder by training step, ascending.

    Raises DatamodelsError, naming the files, where there is none, where one says no step, or where two say the same.
    """
    found: dict[int, Path] = {}
    for path in sorted(path for path in Path(folder).glob(pattern) if _ENDING.search(path.name.lower())):
        step = read(path).step
        if step is None:
            raise DatamodelsError(
                f"checkpoint {path}: nothing says its training step; rename it, as in step-000100{path.suffix}"
            )
        if step in found:
            raise DatamodelsError(
                f"checkpoints {found[step]} and {path.name}: both say that they are of step {step}; move one away, or "
                f"rename it, as in step-000100{path.suffix}"
            )
        found[step] = path
    if not found:
        raise DatamodelsError(f"{folder}: no checkpoint {pattern} in it; expected .pt, .pth, .ckpt or .pth.tar")
    return dict(sorted(found.items()))


def fill(model: nn.Module, found: Checkpoint) -> None:
    """Put the weights into a model, all of them or none; a prefix that all names share is taken off until they fit.

    Raises DatamodelsError that names what is missing, left over or of another shape.
    """
    own = model.state_dict()
    state = dict(found.state)
    while not set(state) & set(own):
        heads = {name.partition(".")[0] for name in state}
        if len(heads) > 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    # batches seen, which old files lack and which weights do not depend on
    for name in own:
        if name.endswith("num_batches_tracked") and name not in state:
            state[name] = own[name]
    wrong = [
        f"{n} {tuple(state[n].shape)}, not {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    problems = {"missing": sorted(set(own) - set(state)), "unknown": sorted(set(state) - set(own)), "shapes": wrong}
    said = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise DatamodelsError(
            f"checkpoint {found.path}: does not fit {type(model).__name__}: {'; '.join(said)}; "
            f"name the architecture, classes and stem that it was trained with"
        )
    model.load_state_dict(state)


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, names, shapes and dtypes included; 64 hex digits."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

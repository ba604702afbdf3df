"""A model's weights in a file that is either whole or not there, and that is never unpickled into code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from datamodels import files
from datamodels.errors import DatamodelsError


def save(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state_dict to `path`: beside it first, synced, then renamed, so a crash leaves the old file or the new.

    Raises DatamodelsError if `state` holds anything but tensors, which `load` would refuse.
    """
    path = Path(path)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise DatamodelsError(
                f"checkpoint {path}: expected tensors by name, got {type(value).__name__} under {name!r}; "
                f"give model.state_dict()"
            )
    # a slice would be saved with all of the storage it is cut from, as an ensemble's are
    state = {name: value.detach().clone() for name, value in state.items()}
    with files.whole(path) as file:
        torch.save(state, file)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read what `save` wrote, onto a device; no code in the file is run.

    Raises DatamodelsError if there is no such file, or if it holds anything but tensors by name.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise DatamodelsError(f"checkpoint {path}: no such file") from None
    except OSError:
        raise
    except Exception as error:  # on damaged bytes torch's unpickler raises whatever comes
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatamodelsError(
            f"checkpoint {path}: expected tensors by name, as checkpoints.save writes them; cannot be read: {first}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise DatamodelsError(f"checkpoint {path}: expected tensors by name, got {type(state).__name__}")
    return dict(state)

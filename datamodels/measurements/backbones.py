"""Models by name, whatever library they come from, behind one face: a batch of examples to features and logits.

| name | what |
|---|---|
| `NAME` or `FOLDER` | transformers, with a tokenizer or an image processor; a classifier where the checkpoint is one |
| `timm:NAME`, `torchvision:NAME` | their pretrained models; `?pretrained=false`: untrained. No test runs these two |
| `torch:package.module.function[?option=value][@CHECKPOINT]` | a torch module that a function makes |

A CHECKPOINT is a file or a URL; it ends in `#sha256=HEX` where it is a URL, and may where it is a file. Features are
the penultimate representation: of transformers the last hidden states, pooled; otherwise the input of the last linear
layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datamodels import files
from datamodels.errors import MeasurementError
from datamodels.learning import foreign
from datamodels.learning.models import Seeded
from datamodels.measurements.datasets import ImageFiles
from datamodels.measurements.library import attribute, parse

CACHE = Path("~/.cache/datamodels")
POOLINGS = ("auto", "cls", "mean")
_SHA256 = "#sha256="


class Answer(nn.Module):
    """A model as measurements see it: one tensor in, logits out; or features and logits of the same pass.

    The tensor is what `Backbone.prepare` makes of examples, so that it can be cut into batches and have a gradient.
    """

    def both(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (n, d) and logits (n, c), or None where the model has no head."""
        raise NotImplementedError

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits (n, c)."""
        logits = self.both(batch)[1]
        if logits is None:
            raise MeasurementError("this model has no head, so it gives no logits")
        return logits


@dataclass(frozen=True)
class Backbone:
    """A model in eval mode.

    Parameters
    ----------
    prepare : a few inputs of a data set to the tensor that `module` takes, on the CPU.
    classes : what the outputs of its head stand for, where the checkpoint says so.
    """

    name: str
    module: Answer
    prepare: Callable[[Any], torch.Tensor]
    classes: tuple[str, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def ready(self, device: str | torch.device) -> Backbone:
        """It, in eval mode and float32 on a device; every parameter takes a gradient."""
        self.module.requires_grad_(True).float().eval().to(device)
        return self


def load(
    name: str,
    kind: str,
    *,
    device: str | torch.device = "cpu",
    pooling: str = "auto",
    max_length: int = 256,
    local_files_only: bool = False,
    cache: str | Path = CACHE,
) -> Backbone:
    """The model of that name for data of a kind (image, text, array); see the table at the top.

    pooling: how a transformer's hidden states become one vector: `cls`, the first; `mean` over those that the mask
    keeps; `auto`, cls where an image model has a class token, otherwise mean. max_length: tokens of a text. Raises
    DatamodelsError.
    """
    if pooling not in POOLINGS:
        raise MeasurementError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    form, _, rest = name.partition(":")
    if form == "torch":
        factory, _, reference = rest.partition("@")
        path, options = parse(factory)
        file = checkpoint_file(reference, Path(cache).expanduser()) if reference else None
        found = from_factory(name, attribute(path, f"model {name!r}"), options, file)
    elif form == "timm":
        found = _from_timm(name, *_pretrained(name, rest), kind)
    elif form == "torchvision":
        found = _from_torchvision(name, *_pretrained(name, rest), kind)
    else:
        from datamodels.measurements import hub

        found = hub.load(name, kind, pooling, max_length, local_files_only)
    return found.ready(device)


# ------------------------------------------------------------------------------------------ plain torch modules


class Module(Answer):
    """Any torch module whose last linear layer is its head; given mean and deviation, images are normalised first."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, model: nn.Module, name: str, mean: Sequence[float] = (), deviation: Sequence[float] = ()):
        super().__init__()
        self.model, self.name = model, name
        for key, values in (("mean", mean or [0.0]), ("deviation", deviation or [1.0])):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)
        self.normalises = bool(mean)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.model((batch - self.mean) / self.deviation if self.normalises else batch)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise MeasurementError(f"{self.name}: expected the module to return logits (n, c), got {got}")
        return logits

    def both(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(lambda module, given, out: last.append(given[0]))
            for module in self.model.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            logits = self.forward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        if not last or last[-1].shape[:-1] != (len(batch),):
            raise MeasurementError(
                f"{self.name}: expected a last linear layer with inputs (n, d), whose inputs are the features; "
                f"{f'its inputs are {tuple(last[-1].shape)}' if last else 'the module calls none'}"
            )
        return last[-1], logits


def _arrays(inputs: Any) -> torch.Tensor:
    """Inputs that are numbers already."""
    if isinstance(inputs, ImageFiles):
        inputs = inputs.array()
    if not isinstance(inputs, np.ndarray):
        raise MeasurementError(
            f"a plain torch module takes arrays, got {type(inputs[0]).__name__}; give it a method `prepare` that makes "
            f"a tensor of a list of inputs"
        )
    return torch.from_numpy(np.ascontiguousarray(inputs))


def from_factory(
    name: str, factory: Callable[..., Any], options: Mapping[str, Any], checkpoint: Path | None
) -> Backbone:
    """A torch module that a function makes, filled from a checkpoint; `prepare` may be a method of it.

    What it draws comes from torch seeded by 0. Raises DatamodelsError where the checkpoint does not fit the module.
    """
    model = Seeded(lambda: factory(**options))(0)
    if not isinstance(model, nn.Module):
        raise MeasurementError(f"model {name!r}: expected a torch module from its function, got {type(model).__name__}")
    if checkpoint is not None:
        foreign.fill(model, foreign.read(checkpoint))
    return Backbone(name, Module(model, name), getattr(model, "prepare", _arrays))


def checkpoint_file(reference: str, cache: Path) -> Path:
    """The file of `FILE`, `FILE#sha256=HEX` or `URL#sha256=HEX`, its hash checked; a URL's is kept in `cache`.

    Raises MeasurementError for a URL without a hash, and for bytes that have another one.
    """
    place, _, expected = reference.partition(_SHA256)
    expected = expected.lower()
    if "://" not in place:
        if expected and os.path.isfile(place) and (found := _sha256(Path(place))) != expected:
            raise MeasurementError(f"{place}: expected sha256 {expected}, got {found}; it is another file")
        return Path(place)
    if len(expected) != 64:
        raise MeasurementError(f"{place}: expected the file's hash behind it, as in {place}{_SHA256}<64 hex digits>")
    kept = cache / f"{expected}{Path(place.partition('?')[0]).suffix}"
    if kept.is_file() and _sha256(kept) == expected:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(place, timeout=60) as response, files.whole(kept) as file:
            shutil.copyfileobj(response, file)
            file.flush()
            if (found := _sha256(Path(file.name))) != expected:
                raise MeasurementError(f"{place}: expected sha256 {expected}, got {found}; nothing was kept")
    except (urllib.error.URLError, TimeoutError) as error:
        raise MeasurementError(f"{place}: cannot be fetched ({error})") from error
    return kept


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pretrained(name: str, rest: str) -> tuple[str, bool]:
    model, options = parse(rest)
    if set(options) - {"pretrained"}:
        raise MeasurementError(f"model {name!r}: expected no option but pretrained=true or false")
    return model, bool(options.get("pretrained", True))


def _images_only(name: str, kind: str) -> None:
    if kind != "image":
        raise MeasurementError(f"model {name!r}: takes images, and the data set has {kind}s")


def _from_timm(name: str, model: str, pretrained: bool, kind: str) -> Backbone:
    _images_only(name, kind)
    with installed(name, "timm"):
        import timm
        from timm.data import create_transform, resolve_model_data_config
    try:
        module = timm.create_model(model, pretrained=pretrained)
    except (RuntimeError, OSError) as error:
        raise MeasurementError(f"model {name!r}: {error}") from error
    config = resolve_model_data_config(module)
    mean, deviation = config["mean"], config["std"]
    transform = create_transform(**{**config, "mean": (0.0,) * 3, "std": (1.0,) * 3}, is_training=False)
    return Backbone(name, Module(module, name, mean, deviation), _transformed(transform))


def _from_torchvision(name: str, model: str, pretrained: bool, kind: str) -> Backbone:
    _images_only(name, kind)
    with installed(name, "torchvision"):
        from torchvision import models
    try:
        weights = models.get_model_weights(model).DEFAULT
        module = Seeded(lambda: models.get_model(model, weights=weights if pretrained else None))(0)
    except (ValueError, OSError) as error:
        raise MeasurementError(f"model {name!r}: {error}") from error
    transform = weights.transforms()
    mean, deviation = transform.mean, transform.std
    transform.mean, transform.std = [0.0] * 3, [1.0] * 3
    classes = tuple(weights.meta["categories"]) if pretrained else None
    return Backbone(name, Module(module, name, mean, deviation), _transformed(transform), classes)


@contextlib.contextmanager
def installed(name: str, package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MeasurementError(
            f"model {name!r}: {error.name} is not installed; pip install {package}, or name a model of another library"
        ) from None


def _transformed(transform: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """Images to what a torchvision transform, its normalisation taken out, makes of each."""
    return lambda inputs: torch.stack([transform(image) for image in pictures(inputs)])


def pictures(inputs: Any) -> list[Any]:
    """Images (n, 1 or 3, h, w) in [0, 1], or files, as PIL's, RGB, 8 bits."""
    if isinstance(inputs, ImageFiles):
        return inputs.open()
    from PIL import Image

    pixels = np.rint(np.asarray(inputs) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image.repeat(3, -1) if image.shape[-1] == 1 else image) for image in pixels]

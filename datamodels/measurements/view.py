"""What is known of one model on one data set, each thing computed when it is first asked for, and once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from datamodels.measurements.arrays import check_finite
from datamodels.measurements.backbones import Backbone
from datamodels.measurements.datasets import Examples, ImageFiles
from datamodels.measurements.library import NEEDS, Unmet

REFERENCE = "reference_"


class View(Mapping[str, Any]):
    """The needs of measurements by name, of a model and examples; `seconds_inference` beside them.

    Features and logits are of one forward pass; where some are not finite, MeasurementError says of how many examples,
    and so do `embed` and `predict`. Where the names of the head's classes are those of the data set,
    logits come in the data set's order. `reference` is a second model, whose needs are `reference_<need>`. `data` is
    held in memory as the model takes it, so it has at most `data_examples`, drawn from the seed with classes in
    proportion. `name` is what the user calls the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        examples: Examples,
        *,
        batch_size: int = 64,
        seed: int = 0,
        reference: Backbone | None = None,
        data_examples: int = 1000,
        name: str | None = None,
    ):
        self.backbone, self.examples = backbone, examples
        self.batch_size, self.seed, self.data_examples = batch_size, seed, data_examples
        self.name = backbone.name if name is None else name
        self.reference = None if reference is None else View(reference, examples, batch_size=batch_size, seed=seed)

    def __getitem__(self, need: str) -> Any:
        """The value; `Unmet`, saying what is missing, or KeyError for what is no need."""
        if need.startswith(REFERENCE):
            if self.reference is None:
                raise Unmet("needs a second model; name it with measure.reference")
            return self.reference[need.removeprefix(REFERENCE)]
        if need not in NEEDS and need != "seconds_inference":
            raise KeyError(need)
        return getattr(self, f"_{need}")

    def __iter__(self) -> Iterator[str]:
        return iter((*NEEDS, "seconds_inference"))

    def __len__(self) -> int:
        return len(NEEDS) + 1

    # ----------------------------------------------------------------------------------------- of the data set

    @property
    def _labels(self) -> np.ndarray:
        return self.examples.labels

    @property
    def _num_classes(self) -> int:
        return len(self.examples.classes)

    @cached_property
    def _inputs(self) -> Any:
        inputs = self.examples.inputs
        return inputs.array() if isinstance(inputs, ImageFiles) else inputs

    @property
    def _groups(self) -> np.ndarray:
        return self._known("groups")

    @property
    def _factors(self) -> np.ndarray:
        return self._known("factors")

    def _known(self, what: str) -> np.ndarray:
        values: np.ndarray | None = getattr(self.examples, what)
        if values is None:
            raise Unmet(f"needs {what}, which the data set {self.examples.name} does not have")
        return values

    # -------------------------------------------------------------------------------------------- of the model

    @property
    def _model(self) -> torch.nn.Module:
        return _Reordered(self.backbone.module, self._order) if self._order is not None else self.backbone.module

    @property
    def _checkpoint(self) -> str:
        return self.name

    @property
    def _seed(self) -> int:
        return self.seed

    @cached_property
    def _order(self) -> torch.Tensor | None:
        """Which output of the head is each class of the data set, where both have the same names."""
        given, wanted = self.backbone.classes, self.examples.classes
        if given is None or given == wanted or sorted(given) != sorted(wanted):
            return None
        return torch.tensor([given.index(name) for name in wanted], device=self.backbone.device)

    # ------------------------------------------------------------------------------------------------- of both

    @cached_property
    def _outcome(self) -> tuple[np.ndarray, np.ndarray | None, float] | Exception:
        started = time.perf_counter()
        try:
            features, logits = self._run(self.examples.inputs)
        except Exception as error:  # kept: what fails is not tried again for every measurement
            return error
        return features, logits, time.perf_counter() - started

    @property
    def _pass(self) -> tuple[np.ndarray, np.ndarray | None, float]:
        """Features, logits and the seconds they took, from texts or pixels on."""
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    @property
    def _features(self) -> np.ndarray:
        return self._finite(self._pass[0], "features")

    @property
    def _logits(self) -> np.ndarray:
        return self._headed(self._pass[1])

    @property
    def _seconds_inference(self) -> float:
        return self._pass[2]

    @property
    def _embed(self) -> Callable[[Any], np.ndarray]:
        return lambda inputs: self._finite(self._run(inputs)[0], "features")

    @property
    def _predict(self) -> Callable[[Any], np.ndarray]:
        return lambda inputs: self._headed(self._run(inputs)[1])

    def _headed(self, logits: np.ndarray | None) -> np.ndarray:
        if logits is None:
            raise Unmet(f"needs logits, and the model {self.backbone.name} has no head")
        return self._finite(logits, "logits")

    def _finite(self, values: np.ndarray, name: str) -> np.ndarray:
        return check_finite(values, f"model {self.backbone.name}", name)

    @torch.no_grad()
    def _run(self, inputs: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Features (n, d) and logits (n, c) of any inputs, float64, in batches; texts of like length go together."""
        order = np.arange(len(inputs))
        if isinstance(inputs, list):
            order = np.argsort([len(text) for text in inputs], kind="stable")[::-1]
        features: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        # None: quiet where nobody watches
        for start in tqdm(range(0, len(order), self.batch_size), "inference", leave=False, unit="batch", disable=None):
            chosen = order[start : start + self.batch_size]
            batch = [inputs[i] for i in chosen] if isinstance(inputs, list) else inputs[chosen]
            made, answer = self.backbone.module.both(self.backbone.prepare(batch).to(self.backbone.device))
            features.append(made.double().cpu())
            if answer is not None:
                logits.append((answer if self._order is None else answer[:, self._order]).double().cpu())
        back = np.argsort(order)
        return torch.cat(features).numpy()[back], torch.cat(logits).numpy()[back] if logits else None

    @cached_property
    def _data(self) -> tuple[torch.Tensor, torch.Tensor]:
        device, prepare = self.backbone.device, self.backbone.prepare
        with torch.no_grad():
            some = self.backbone.module.both(prepare(self.examples.inputs[:1]).to(device))[1]
        outputs = 0 if some is None else some.shape[1]
        if outputs != self._num_classes:
            head = f"has a head of {outputs} outputs" if outputs else "has no head"
            raise Unmet(f"needs a head for {self._num_classes} classes, and the model {self.backbone.name} {head}")
        held = self.examples
        if len(held) > self.data_examples:
            held = held.sample(self.data_examples, seed=self.seed)
        return prepare(held.inputs).to(device), torch.from_numpy(held.labels).to(device)

    @property
    def _loss_fn(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Mean cross-entropy."""
        return functional.cross_entropy


class _Reordered(torch.nn.Module):
    """A model whose outputs are put into the order of the data set's classes."""

    def __init__(self, model: torch.nn.Module, order: torch.Tensor):
        super().__init__()
        self.model, self.order = model, order

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)[:, self.order]

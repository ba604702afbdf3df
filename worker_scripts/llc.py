"""A row is the local learning coefficient (LLC) of one checkpoint, by one setting of the sampler.

    python -m datamodels.pool --worker.logdir=DIR --worker.main_import=worker_scripts.llc \\
           --llc.model='datamodels.learning.resnet.resnet18?num_classes=10&stem=cifar' --llc.data=cifar10:FOLDER

Factors of the design that it knows: checkpoint, epsilon, gamma, sampler, nbeta, batch_size; each stands above the
option of its name. So a calibration is a design over epsilon and gamma, and a curve one over checkpoints. A setting in
which every chain diverges is a row too: NaN, with `step too large` as its verdict. specs/llc.json has all keys that
there are (`KEYS`; `schema` writes them for other numbers of chains and draws); a spec may have some of them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fastargs import Param, Section, get_current_config
from fastargs.validation import And, InRange, OneOf
from torch import nn
from tqdm import tqdm

from datamodels.errors import ConfigError, MeasurementError
from datamodels.learning import foreign
from datamodels.learning.models import Seeded
from datamodels.measurements import datasets, llc
from datamodels.measurements.library import attribute, parse
from datamodels.measurements.samplers import LOSSES, SAMPLERS, Diverged, Settings

ALL_FACTORS_ARE_TAKEN = True  # by main: another one is a mistake, as the worker says
POSITIVE, COUNT = And(float, InRange(min=0)), And(int, InRange(min=1))
# Pixels in [0, 1], per channel: what the networks of these data are usually trained with.
NORMALISE = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

Section("llc", "the model, its data, and how chains are run around it").params(
    model=Param(str, "dotted path of the function that makes the module, ?option=value behind it; needed"),
    checkpoint=Param(str, "file with its weights, if no factor of the design names it"),
    data=Param(
        str, "digits, fashion_mnist[:DIR], cifar10:DIR, folder:DIR?size=224, or a dotted path", default="digits"
    ),
    split=Param(str, "train, test or all: of the data that it was trained on", default="train"),
    samples=Param(And(int, InRange(min=0)), "so many examples, classes in proportion; 0 for all", default=0),
    normalise=Param(
        OneOf(["none", "data", *NORMALISE]), "how the model wants its pixels; data: by their own mean", default="none"
    ),
    flatten=Param(bool, "give the model a vector for each example", default=False),
    loss=Param(str, "cross_entropy, mse_loss, or a dotted path to a mean loss", default="cross_entropy"),
    parameters=Param(str, "regular expression of the parameters' names that may move; left out: all", default=""),
    sampler=Param(OneOf(SAMPLERS), "how chains move", default="sgld"),
    epsilon=Param(POSITIVE, "step size", default=1e-4),
    gamma=Param(POSITIVE, "localisation around the checkpoint", default=100.0),
    nbeta=Param(POSITIVE, "inverse temperature times n; 0 for n/ln n", default=0.0),
    chains=Param(COUNT, "chains", default=4),
    draws=Param(COUNT, "states of each chain that count", default=200),
    burn_in=Param(And(int, InRange(min=0)), "steps before them", default=400),
    thin=Param(COUNT, "steps from one to the next", default=1),
    batch_size=Param(
        And(int, InRange(min=0)), "examples for each step's gradient, at most all; 0 for all", default=512
    ),
    losses=Param(OneOf(LOSSES), "a draw's loss over the step's batch, or over all examples", default="batch"),
    device=Param(OneOf(["auto", "cpu", "cuda"]), "where; auto: on a GPU where there is one", default="auto"),
)

# Every key that a spec may name: its shape for given chains and draws, and its dtype.
KEYS: dict[str, tuple[Callable[[int, int], tuple[int, ...]], str]] = {
    **{
        name: (lambda chains, draws: (), "float64")
        for name in (
            *("llc", "llc_se", "llc_std", "wbic", "initial_loss", "nbeta", "rhat", "ess", "acceptance", "share_below"),
            *("step_bias", "arrival", "drift_z", "gradient_norm", "pull_norm", "noise_norm", "distance"),
        )
    },
    **{name: (lambda chains, draws: (), "int64") for name in ("n", "num_parameters", "chains_stopped", "step")},
    "stationary": (lambda chains, draws: (), "bool"),
    "verdict": (lambda chains, draws: (), "U32"),
    "reason": (lambda chains, draws: (), "U400"),
    "weights_hash": (lambda chains, draws: (), "U64"),
    "llc_chains": (lambda chains, draws: (chains,), "float64"),
    "llc_trace": (lambda chains, draws: (chains, draws), "float32"),
}


def schema(chains: int, draws: int) -> dict[str, dict[str, Any]]:
    """The schema of a store of such rows. llc_trace (chains, draws) is nβ (L(w) − L(w*)) of each draw."""
    return {
        key: {"shape": list(shape(chains, draws)), "dtype": dtype}
        | ({"allow_nonfinite": True} if dtype.startswith("float") else {})
        for key, (shape, dtype) in KEYS.items()
    }


def main(
    *,
    seed: int,
    keys: Sequence[str] | None = None,
    smoke: bool = False,
    checkpoint: str | None = None,
    epsilon: float | None = None,
    gamma: float | None = None,
    sampler: str | None = None,
    nbeta: float | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Estimate one LLC; everything that `KEYS` names, or what of it `keys` asks for."""
    config = get_current_config()
    if not config["llc.model"]:  # not `required` above: the registry of sections is everybody's in this process
        raise ConfigError("--llc.model: which model? Name the function that makes the module, package.module.function")
    factors = {"epsilon": epsilon, "gamma": gamma, "sampler": sampler, "nbeta": nbeta, "batch_size": batch_size}
    given = {name: config[f"llc.{name}"] if value is None else value for name, value in factors.items()}
    chains, draws = config["llc.chains"], config["llc.draws"]
    data = _data(*(config[f"llc.{name}"] for name in ("data", "split", "samples", "normalise", "flatten", "device")))
    batch_size = given["batch_size"] if 0 < given["batch_size"] < len(data[1]) else None
    settings = Settings(
        **{**given, "nbeta": given["nbeta"] or None, "batch_size": batch_size},
        chains=min(chains, 2) if smoke else chains,
        draws=min(draws, 2) if smoke else draws,
        burn_in=1 if smoke else config["llc.burn_in"],
        thin=1 if smoke else config["llc.thin"],
        losses=config["llc.losses"],
    )
    model, step = load(config["llc.model"], checkpoint or config["llc.checkpoint"])
    pattern = re.compile(config["llc.parameters"])
    masks = {name: False for name, _ in model.named_parameters() if not pattern.search(name)}
    found: dict[str, Any] = {"weights_hash": foreign.digest(model), "step": -1 if step is None else step}
    with tqdm(total=settings.chains * settings.steps, desc="chains", unit="step", leave=False, disable=None) as bar:
        arguments = (model.to(data[0].device), _loss(config["llc.loss"]), data, settings)
        try:
            estimate = llc.estimate(*arguments, seed=seed, masks=masks, progress=bar.update)
        except Diverged as error:
            found |= _diverged(error)
            trace = error.chains.excess
        else:
            found |= estimate.columns()
            trace = estimate.trace
    print(f"checkpoint {checkpoint or config['llc.checkpoint']}, {settings}: {found['verdict']}: {found['reason']}")
    found["reason"] = found["reason"][:400]
    found["llc_trace"] = np.full((chains, draws), math.nan)
    found["llc_trace"][: len(trace), : trace.shape[1]] = trace  # a smoke run's is smaller
    found["llc_chains"] = np.full(chains, math.nan)
    found["llc_chains"][: len(trace)] = trace.mean(axis=1)
    return found if keys is None else {key: found[key] for key in keys if key in found}


def load(model: str, checkpoint: str | None) -> tuple[nn.Module, int | None]:
    """The module that a dotted path with options makes, filled from a checkpoint; and the checkpoint's step."""
    path, options = parse(model)
    made = Seeded(lambda: attribute(path, f"--llc.model={model}")(**options))(0)
    if not isinstance(made, nn.Module):
        raise MeasurementError(
            f"--llc.model={model}: expected {path} to return a torch module, got {type(made).__name__}"
        )
    if checkpoint is None:
        raise MeasurementError(
            "no checkpoint: name a file with --llc.checkpoint, or files with the design's factor checkpoint"
        )
    found = foreign.read(checkpoint)
    foreign.fill(made, found)
    return made, found.step


def _diverged(error: Diverged) -> dict[str, Any]:
    chains = error.chains
    unknown = {key: math.nan for key, (shape, dtype) in KEYS.items() if dtype == "float64"}
    return unknown | {
        "n": chains.n, "nbeta": chains.nbeta, "num_parameters": chains.num_parameters,
        "initial_loss": chains.initial_loss, "chains_stopped": len(chains.stopped), "stationary": False,
        "verdict": "step too large", "reason": str(error),
    }  # fmt: skip


def _loss(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return attribute(name if "." in name else f"torch.nn.functional.{name}", f"--llc.loss={name}")


@functools.cache
def _data(
    name: str, split: str, samples: int, normalise: str, flatten: bool, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels on the device; read once for all rows of a worker."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = datasets.load(name, split)
    if samples:
        examples = examples.sample(samples, seed=0)
    inputs = examples.inputs.array() if isinstance(examples.inputs, datasets.ImageFiles) else examples.inputs
    if not isinstance(inputs, np.ndarray):
        raise MeasurementError(f"--llc.data={name}: expected images or arrays, got {examples.kind}s")
    x = torch.from_numpy(np.ascontiguousarray(inputs))
    if normalise == "data":
        x = (x - x.mean()) / x.std(correction=0)
    elif normalise != "none":
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in NORMALISE[normalise])
        x = (x - mean) / deviation
    return (x.flatten(1) if flatten else x).to(device), torch.from_numpy(examples.labels).to(device)

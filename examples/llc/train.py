"""A small network trained on digits, its weights kept at log-spaced steps: python -m examples.llc.train

Whoever brings checkpoints of their own does not need this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from datamodels.learning import checkpoints, data
from datamodels.learning.models import MLP
from examples import steps as runner

OUT, STEPS, BATCH, RATE = Path("out/llc/checkpoints"), 20_000, 64, 0.05


def network(hidden: int = 16) -> nn.Module:
    """64 pixels, two hidden layers, ten classes; 1,480 parameters with 16 hidden units."""
    return MLP((64, hidden, hidden, 10))(0)


def kept_steps(steps: int) -> list[int]:
    """0, 1, 2, 4, … and three further steps between each two of them from 64 on, up to the last."""
    spaced = [round(2 ** (k / 4)) for k in range(4 * steps.bit_length() + 1)]
    return sorted({0, steps} | {s for k, s in enumerate(spaced) if s <= steps and (k % 4 == 0 or s > 64)})


def main(out: Path = OUT, steps: int = STEPS) -> None:
    """Train and keep what is not there yet; the same weights every time."""
    wanted = {step: out / f"step-{step:06d}.pt" for step in kept_steps(steps)}
    if all(path.exists() for path in wanted.values()):
        return
    out.mkdir(parents=True, exist_ok=True)
    split = data.load("digits").train
    inputs = torch.from_numpy(split.inputs).flatten(1)
    inputs = (inputs - inputs.mean()) / inputs.std(correction=0)
    labels = torch.from_numpy(split.labels)
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(steps + 1):
        if step in wanted:
            checkpoints.save(wanted[step], model.state_dict())
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    print(f"   {len(wanted)} checkpoints in {out}, from step 0 to {steps:,}")


def cli() -> None:
    parser = argparse.ArgumentParser("python -m examples.llc.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the checkpoints; {OUT}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"how long it is trained; {STEPS:,}")
    given = parser.parse_args()
    main(given.out, given.steps)


if __name__ == "__main__":
    runner.run(cli)

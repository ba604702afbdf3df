"""`python -m datamodels.report path OUT_DIR`: pictures of what a fit left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError

SECTIONS = {
    "report": {
        "targets": Option(int, "how many targets to show, from badly to well predicted", default=5, min=1),
        "out": Option(str, "file to draw, as png, svg or pdf; left out: regularization_path/path.png in OUT_DIR"),
    }
}


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.report",
        "Draw what a fit left. path: validation error and non-zeros of some targets against lambda.",
        SECTIONS,
        argv,
        positional=(("picture", "path"), ("out_dir", "the cfg.out_dir of the fit")),
    )
    if args.positional["picture"] != "path":
        raise ConfigError(f"picture: expected path, got {args.positional['picture']!r}")
    folder = Path(args.positional["out_dir"])
    out = Path(args["report.out"] or folder / "regularization_path" / "path.png")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--report.out={out}: expected a name that ends in .png, .svg or .pdf")

    from datamodels.regression import Datamodel
    from datamodels.report import figures

    print(figures.save(figures.regularization_path(Datamodel.load(folder), targets=args["report.targets"]), out))
    return 0


if __name__ == "__main__":
    cli.run(main)

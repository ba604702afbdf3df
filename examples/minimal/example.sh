#!/usr/bin/env bash
# The whole way in four commands: a store, one row, all other rows, a look at what is in it.
#
#   bash examples/minimal/example.sh [FOLDER]      the folder for the store; a temporary one if left out
#   PYTHON=.venv/bin/python bash examples/minimal/example.sh
set -euo pipefail

python=${PYTHON:-$(command -v python || command -v python3)}
[[ $python == */* ]] && python=$(realpath --no-symlinks "$python")
logdir=$(realpath --canonicalize-missing "${1:-$(mktemp -d)}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.." # modules are named from the repository root

"$python" -m datamodels.initialize_logdir \
    --logging.logdir="$logdir" \
    --logging.spec=examples/minimal/spec.json

job=(--worker.main_import=examples.minimal.train_minimal --worker.logdir="$logdir" --trainer.multiple=2)

# One row by its number: what an array job or GNU parallel would call once per row.
"$python" -m datamodels.worker --worker.index=0 "${job[@]}"

# Without a number, a worker goes on until no row is left. Any number of them may run at once, on any machine that
# sees the folder; `python -m datamodels.pool --pool.workers=8` starts eight here.
"$python" -m datamodels.worker "${job[@]}"

"$python" -m examples.minimal.check --checking.logdir="$logdir" --trainer.multiple=2
echo "The store is in $logdir"

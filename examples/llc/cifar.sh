#!/usr/bin/env bash
# The LLC of somebody's checkpoints of a ResNet, by the commands that examples/llc/run.py runs on a small network.
#
#   bash examples/llc/cifar.sh CHECKPOINTS DATA [FOLDER] [options of worker_scripts/llc.py]
#
# CHECKPOINTS is a folder of .pt, .pth or .pth.tar files (bare state_dicts, or what a training run saved; prefixes as
# `module.` are understood; each says its training step, in the file or by its name), DATA what they were trained on: cifar10:DIR with CIFAR-10's batches, or
# folder:DIR?size=224 with a folder of images for each class. Results go to FOLDER, out/llc-checkpoints if left out.
#
# Defaults are for a ResNet-18 on CIFAR-10, on one GPU. MODEL, NORMALISE and the options behind FOLDER change that:
#
#   MODEL='datamodels.learning.resnet.resnet50?num_classes=1000' NORMALISE=imagenet \
#       bash examples/llc/cifar.sh runs/1 'folder:/data/imagenet/train?size=224' out/r50 --llc.samples=2000
#
# First a sweep over epsilon and gamma on the last checkpoint; then all checkpoints by the setting that it chooses, or
# by EPSILON and GAMMA where you set them. EPSILONS='[1e-7, 1e-6]' and GAMMAS make another sweep. CHAINS=4 chains of
# DRAWS=200 draws each; WORKERS=1. Stop it anywhere and run it again: no row is estimated twice. What was estimated by
# other settings stays: then it says what differs, and ends.
set -euo pipefail

if [[ $# -lt 2 || $1 == -* || $2 == -* ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
checkpoints=$(realpath --canonicalize-missing "$1")
if [[ ! -d $checkpoints ]]; then
    echo "error: $1: no such folder; the first argument is a folder of checkpoints" >&2
    exit 2
fi
data=$2
shift 2
out=$(dirname "${BASH_SOURCE[0]}")/../../out/llc-checkpoints
if [[ ${1:--} != -* ]]; then
    out=$1
    shift
fi
out=$(realpath --canonicalize-missing "$out")
python=${PYTHON:-$(command -v python || command -v python3)}
[[ $python == */* ]] && python=$(realpath --no-symlinks "$python")
cd "$(dirname "${BASH_SOURCE[0]}")/../.." # modules are named from the repository root
mkdir -p "$out"

chains=${CHAINS:-4} draws=${DRAWS:-200}
model=${MODEL:-datamodels.learning.resnet.resnet18?num_classes=10&stem=cifar}
job=(--worker.main_import=worker_scripts.llc --llc.model="$model" --llc.data="$data"
    --llc.normalise="${NORMALISE:-cifar10}" --llc.chains="$chains" --llc.draws="$draws" "$@")

# spec NAME FACTORS OPTIONS…: a store whose rows are the combinations of the factors' levels, estimated by the options
spec() {
    "$python" - "$chains" "$draws" "$out/$1" "${@:2}" <<'EOF'
import json, sys
from pathlib import Path
from datamodels.errors import DatamodelsError
from examples import steps
from worker_scripts.llc import schema
chains, draws, store, factors, *options = sys.argv[1:]
def main():
    try:
        keys, choices = schema(int(chains), int(draws)), json.loads(factors)
    except ValueError as error:
        raise DatamodelsError(f"CHAINS={chains}, DRAWS={draws}, {factors}: expected whole numbers, and lists as in "
                              f"EPSILONS='[1e-7, 1e-6]' ({error})") from None
    spec = {"schema": keys, "design": [{"role": "train", "seed": 0, "choices": choices}]}
    steps.store(Path(store), Path(f"{store}.json"), spec, steps.options(options))
steps.run(main)
EOF
}

# The last checkpoint; a folder without any, in which two are of one step, or one of none, ends it here.
last=$("$python" -c 'import sys
from datamodels.learning.foreign import by_step
from examples import steps
steps.run(lambda: print(list(by_step(sys.argv[1], "*.p*t*").values())[-1]))' "$checkpoints")

if [[ -z ${EPSILON:-} || -z ${GAMMA:-} ]]; then
    spec sweep "{\"epsilon\": ${EPSILONS:-[1e-9, 1e-8, 1e-7, 1e-6, 1e-5]}, \"gamma\": ${GAMMAS:-[100, 1000, 10000]}}" \
        "${job[@]}" --llc.checkpoint="$last"
    # One row on a few steps first: a wrong folder or option ends it here, and not row after row.
    "$python" -m datamodels.worker --worker.smoke --worker.logdir="$out/sweep" "${job[@]}" --llc.checkpoint="$last"
    "$python" -m datamodels.pool --pool.workers="${WORKERS:-1}" --worker.logdir="$out/sweep" "${job[@]}" \
        --llc.checkpoint="$last"
    "$python" -m examples.llc.show sweep "$out/sweep" --out "$out/sweep.png"
    read -r EPSILON GAMMA < <("$python" -c 'import sys
from pathlib import Path
from examples.llc.show import chosen, table
found = table(Path(sys.argv[1]))
row = chosen(found).row
if row is None:
    sys.exit("no setting of the sweep will do: set EPSILON and GAMMA, or EPSILONS and GAMMAS for another sweep in "
             "another FOLDER; DRAWS=400 or --llc.burn_in=400 make chains longer")
print(found["epsilon"][row], found["gamma"][row])' "$out/sweep") || exit 1
    "$python" -m examples.llc.show trace "$out/sweep" --out "$out/trace.png"
    tried=yes
fi

job+=(--llc.epsilon="$EPSILON" --llc.gamma="$GAMMA")
spec curve "{\"checkpoint\": {\"files\": \"$checkpoints/*.p*t*\"}}" "${job[@]}"
if [[ -z ${tried:-} ]]; then
    "$python" -m datamodels.worker --worker.smoke --worker.logdir="$out/curve" "${job[@]}"
fi
"$python" -m datamodels.pool --pool.workers="${WORKERS:-1}" --worker.logdir="$out/curve" "${job[@]}"
"$python" -m examples.llc.show curve "$out/curve" --out "$out/curve.png"

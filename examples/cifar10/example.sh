#!/usr/bin/env bash
# CIFAR-10 with a ResNet-9: 1,000 networks on random halves of the training images, 20 x 5 to evaluate.
#
#   bash examples/cifar10/example.sh IMAGES [FOLDER] [options of train_cifar.py]
#
# IMAGES holds CIFAR-10's python or binary batches (https://www.cs.toronto.edu/~kriz/cifar.html, unpacked); results
# go to FOLDER, out/cifar10 if left out. Stop it whenever you like: the same command goes on where it was. It runs
# WORKERS=1 worker on the first visible GPU, or on the CPU. For each further GPU run the pool's command beside it,
# with CUDA_VISIBLE_DEVICES=1, 2, ...: the workers share the rows. Each holds about 2.5 GB of images.
#
# Without a GPU only a toy is practical: --training.epochs=1 --training.width=8 takes about 20 CPU seconds a network.
#
# The regression takes about 0.15 CPU seconds per test image and 1 GB of memory; regression.yaml names the slice of test
# images that it fits. No image's datamodel depends on the others', so all of them can be fitted slice by slice, on as
# many machines as see FOLDER:
#
#   for start in $(seq 0 1000 9000); do
#       python -m datamodels.regression.compute_datamodels -C examples/cifar10/regression.yaml \
#           --data.logdir=FOLDER/store --cfg.out_dir=FOLDER/datamodels-$start \
#           --data.target_start_ind=$start --data.target_end_ind=$((start + 1000))
#   done
set -euo pipefail

if [[ ${1:-} == '' || $1 == -* ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
images=$(realpath --canonicalize-missing "$1")
shift
out=$(dirname "${BASH_SOURCE[0]}")/../../out/cifar10
if [[ ${1:--} != -* ]]; then
    out=$1
    shift
fi
out=$(realpath --canonicalize-missing "$out")
python=${PYTHON:-$(command -v python || command -v python3)}
[[ $python == */* ]] && python=$(realpath --no-symlinks "$python")
cd "$(dirname "${BASH_SOURCE[0]}")/../.." # modules are named from the repository root

[[ -e $out/store/spec.json ]] ||
    "$python" -m datamodels.initialize_logdir \
        --logging.logdir="$out/store" --logging.spec="${SPEC:-examples/cifar10/spec.json}"

job=(--worker.main_import=examples.cifar10.train_cifar --worker.logdir="$out/store" --data.dir="$images" "$@")

# One row on three batches first: a wrong folder or option ends it here, and not row after row.
"$python" -m datamodels.worker --worker.smoke "${job[@]}"

"$python" -m datamodels.pool --pool.workers="${WORKERS:-1}" "${job[@]}"

[[ -e $out/datamodels/datamodels.pt ]] ||
    "$python" -m datamodels.regression.compute_datamodels \
        -C "${REGRESSION:-examples/cifar10/regression.yaml}" \
        --data.logdir="$out/store" --cfg.out_dir="$out/datamodels"

echo "$out/store/masks.npy           which training images each network saw, one bit each (numpy.unpackbits, little)"
echo "$out/store/margins.npy         how far the right class led on each test image"
echo "$out/datamodels/datamodels.pt  weight[i, j]: what training image i does to the margin of the slice's image j"

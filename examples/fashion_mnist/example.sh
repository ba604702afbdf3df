#!/usr/bin/env bash
# Fashion-MNIST with a small network: 2,000 on random halves of the 60,000 training images, 50 x 5 to evaluate.
#
#   bash examples/fashion_mnist/example.sh [FOLDER] [options of worker_scripts/train_mlp.py]
#
# Reads the IDX files of Debian's and Ubuntu's package (apt-get install dataset-fashion-mnist), or those of another
# folder, gzipped or not, with --data.dir=DIR. Results go to FOLDER, out/fashion_mnist if left out. Stop it whenever
# you like: the same command goes on where it was. WORKERS=4 starts so many at once; one per core if left out.
#
# A network takes about 0.8 CPU seconds and gets 87 % of the test images right. The regression takes about half a CPU
# second per test image and 1.2 GB of memory; regression.yaml names the slice of test images that it fits. No image's
# datamodel depends on the others', so all of them can be fitted slice by slice, on as many machines as see FOLDER:
#
#   for start in $(seq 0 1000 9000); do
#       python -m datamodels.regression.compute_datamodels -C examples/fashion_mnist/regression.yaml \
#           --data.logdir=FOLDER/store --cfg.out_dir=FOLDER/datamodels-$start \
#           --data.target_start_ind=$start --data.target_end_ind=$((start + 1000))
#   done
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit
fi
out=$(dirname "${BASH_SOURCE[0]}")/../../out/fashion_mnist
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
        --logging.logdir="$out/store" --logging.spec="${SPEC:-examples/fashion_mnist/spec.json}"

job=(--worker.main_import=worker_scripts.train_mlp --worker.logdir="$out/store"
    -C examples/fashion_mnist/train.yaml "$@")

# One row on three batches first: missing files or a wrong option end it here, and not row after row.
"$python" -m datamodels.worker --worker.smoke "${job[@]}"

"$python" -m datamodels.pool --pool.workers="${WORKERS:-0}" --worker.batch=8 "${job[@]}"

[[ -e $out/datamodels/datamodels.pt ]] ||
    "$python" -m datamodels.regression.compute_datamodels \
        -C "${REGRESSION:-examples/fashion_mnist/regression.yaml}" \
        --data.logdir="$out/store" --cfg.out_dir="$out/datamodels"

echo "$out/store/masks.npy           which training images each network saw, one bit each (numpy.unpackbits, little)"
echo "$out/store/margins.npy         how far the right class led on each test image"
echo "$out/datamodels/datamodels.pt  weight[i, j]: what training image i does to the margin of the slice's image j"

#!/bin/sh
# CIFAR-10 with a ResNet-9: 1,000 networks on random halves of the training images, 20 x 5 to evaluate.
#
#   examples/cifar10/example.sh FOLDER [OUT] [options of the pool and of train_cifar.py]
#
# FOLDER holds CIFAR-10's python or binary batches (https://www.cs.toronto.edu/~kriz/cifar.html, unpacked). Stop
# the script whenever you like: the same command goes on where it was. It runs one worker, on the first visible
# GPU, or on the CPU. For each further GPU run the pool command below beside it, with CUDA_VISIBLE_DEVICES=1, 2, ...:
# the workers share the rows. For a first look, in a minute or two per network even without a GPU:
#
#   examples/cifar10/example.sh FOLDER out/try --training.epochs=1 --training.width=8
set -eu
cd "$(dirname "$0")/../.."

case ${1:-} in '' | -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
folder=$1; shift
case ${1:-} in '' | -*) out=out/cifar10 ;; *) out=$1; shift ;; esac
PYTHON=${PYTHON:-python3}
[ -n "${SPEC:-}" ] || SPEC=examples/cifar10/spec.json
[ -n "${REGRESSION:-}" ] || REGRESSION=examples/cifar10/regression.yaml

[ -e "$out/store/spec.json" ] ||
    $PYTHON -m datamodels.initialize_logdir --logging.logdir="$out/store" --logging.spec="$SPEC"

# One row on three batches first: a wrong folder or option ends it here, and not row after row.
$PYTHON -m datamodels.worker --worker.smoke --worker.logdir="$out/store" \
    --worker.main_import=examples.cifar10.train_cifar --data.dir="$folder" "$@"

$PYTHON -m datamodels.pool --pool.workers=1 --worker.logdir="$out/store" \
    --worker.main_import=examples.cifar10.train_cifar --data.dir="$folder" "$@"

[ -e "$out/datamodels/datamodels.pt" ] ||
    $PYTHON -m datamodels.regression.compute_datamodels -C "$REGRESSION" \
        --data.logdir="$out/store" --cfg.out_dir="$out/datamodels"

echo "$out/store/masks.npy        which training images each network saw, one bit each (numpy.unpackbits, little)"
echo "$out/store/margins.npy      how far the right class led on each test image"
echo "$out/datamodels/datamodels.pt   weight[i, j]: what training image i does to the margin of test image j"

#!/bin/bash
# Workers on SLURM: each task of the array is one, and works on rows of the store until none is left or its time is up.
#
#   sbatch --array=0-63 --partition=gpu --gres=gpu:1 --time=8:00:00 worker_scripts/slurm_array.sh \
#       --worker.logdir=DIR --worker.main_import=MODULE [what main takes]
#
# It needs nothing else: rows that are in hand when a task ends are given back, and a task whose node fails comes again.
# To have dead or timed-out workers submitted again until all rows are done, let the pool do it; with a copy of this
# file, in which you load modules or an environment, as its template:
#
#   python -m datamodels.pool --pool.executor=slurm --pool.workers=64 --pool.template=mine.sh --pool.slurm.time=8:00:00 \
#       --worker.logdir=DIR --worker.main_import=MODULE
#
# One row per task, as one may be used to, pays the start of Python for every row: --array=0-999 and
# --worker.index="$SLURM_ARRAY_TASK_ID" in the last line.
#
#SBATCH --job-name=datamodels
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
#SBATCH --signal=B:USR1@120

trap '' USR1 # until the worker listens to it; then: finish the row in hand, and begin no other
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}}"
export PYTHONUNBUFFERED=1

# exec, so that the worker is the batch shell that the signal is for
exec "${PYTHON:-python}" -m datamodels.worker "$@"

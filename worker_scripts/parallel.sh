#!/bin/bash
# Workers under GNU parallel. Two forms:
#
#   worker_scripts/parallel.sh workers 8 --worker.logdir=DIR --worker.main_import=MODULE [what main takes]
#   worker_scripts/parallel.sh rows 8 0-99 --worker.logdir=DIR --worker.main_import=MODULE [what main takes]
#
# workers: eight of them, each of which works on row after row until none is left, and is started again when it dies. This
#          is the one to use: Python and torch are imported once by each.
# rows:    one process per row, eight at a time, as scripts for the released code do; seconds of imports for each row.
#
# Each job gets one GPU of CUDA_VISIBLE_DEVICES, or of all that nvidia-smi lists, in turn; 16 jobs on 8 GPUs are two on
# each. Rows that are complete are not run again, so the same line goes on after a stop. PYTHON names the interpreter.
# Exit code: 0 when every row is done that was to be, 2 for a mistake in the configuration, 130 when it was stopped, else 1.

usage() { sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" >&2; exit 2; }
form=$1 jobs=$2
[[ $form =~ ^(workers|rows)$ && $jobs =~ ^[1-9][0-9]*$ ]] || usage
shift 2
if [ "$form" = rows ]; then
    [[ $1 =~ ^([0-9]+)-([0-9]+)$ ]] || usage
    list=$(seq "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}")
    shift
else
    list=$(seq "$jobs")
fi
[[ $(parallel --version 2>/dev/null) == "GNU parallel"* ]] || { echo "error: GNU parallel is not installed" >&2; exit 2; }

export PYTHON="${PYTHON:-python}" PYTHONUNBUFFERED=1 FORM=$form
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    GPUS=$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | tr '\n' ' ')
else
    GPUS=${CUDA_VISIBLE_DEVICES//,/ }
fi
export GPUS
share=$(($(nproc) / jobs))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"

# One mistake in the configuration is told once, before there are many processes.
"$PYTHON" -m datamodels.worker "$@" --worker.dry_run >/dev/null || exit

# What jobs must know of each other: `stop`, `finished` (a row is), `deaths` and `left`, a line each.
NOTES=$(mktemp -d)
export NOTES
trap 'rm -rf "$NOTES"' EXIT

# A job: a worker, or one row in one. Dead ones are started again, but not for ever.
work() {
    local item=$1 code gpus began deaths=0
    shift
    [ "$FORM" = rows ] && set -- "--worker.index=$item" "$@"
    read -ra gpus <<<"$GPUS"
    [ ${#gpus[@]} -gt 0 ] && export CUDA_VISIBLE_DEVICES=${gpus[(PARALLEL_JOBSLOT - 1) % ${#gpus[@]}]}
    while [ ! -e "$NOTES/stop" ]; do
        began=$SECONDS
        "$PYTHON" -m datamodels.worker "$@"
        code=$?
        case $FORM-$code in
            *-0) : >"$NOTES/finished"; return 0 ;;
            *-2) return 2 ;; # halts all
            rows-1 | workers-3) echo "$item" >>"$NOTES/left"; return 0 ;;
        esac
        [ -e "$NOTES/stop" ] && return 0
        deaths=$((SECONDS - began > 600 ? 1 : deaths + 1)) # what did not last cannot have done much
        echo "$item" >>"$NOTES/deaths"
        if [ ! -e "$NOTES/finished" ] && [ "$(wc -l <"$NOTES/deaths")" -ge 10 ]; then
            : >"$NOTES/stop"
            echo "10 processes died, the last with code $code, and none had finished; stopped" >&2
        elif [ $deaths -ge 5 ]; then
            echo "${FORM%s} $item died $deaths times, the last time with code $code; it is not started again" >&2
        else
            echo "${FORM%s} $item ended with code $code; starting it again" >&2
            continue
        fi
        echo "$item" >>"$NOTES/left"
        return 0
    done
}
export -f work

# In the background, so that a signal is dealt with at once: workers are asked to end, and give their rows back.
parallel --jobs "$jobs" --line-buffer --quote --halt now,fail=1 --termseq TERM,30000,KILL,25 --will-cite \
    work {} "$@" <<<"$list" &
pid=$!
stopped=
trap 'stopped=130; : >"$NOTES/stop"; kill -TERM $pid; kill -TERM $pid' INT TERM
wait $pid
code=$?
[ -n "$stopped" ] && { wait $pid; code=130; }
[ $code -eq 0 ] && { [ -s "$NOTES/left" ] || [ -e "$NOTES/stop" ]; } && code=1
for argument; do
    [[ $argument == --worker.logdir=* ]] && "$PYTHON" -m datamodels.store status "${argument#*=}" >&2
done
exit $code

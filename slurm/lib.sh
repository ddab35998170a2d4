# What the job scripts share. They are submitted from the repository's root: Slurm runs a copy of them from elsewhere.
set -uo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the comment below the #SBATCH lines of a script, which says how it is used.
usage() {
    sed -n '/^# usage:/,/^[^#]/p' "$1" | sed -n 's/^# \{0,1\}//p'
    exit 0
}

# The interpreter of the project's virtual environment, or what $PERSONA_PYTHON names.
find_python() {
    PYTHON=${PERSONA_PYTHON:-.venv/bin/python}
    command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON in $PWD: submit from the repository's root, or set PERSONA_PYTHON"
}

# A line on what runs where, for whoever reads the log.
header() {
    echo "--- job ${SLURM_JOB_ID:-none} (start $((${SLURM_RESTART_COUNT:-0} + 1))) on ${SLURM_JOB_NODELIST:-$(hostname)}," \
        "${SLURM_NTASKS:-1} tasks, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -Is)"
    echo "--- $*"
}

# Waits until a server has written its address into the file $1, for at most $2 seconds.
await_server() {
    local left=$2
    until [ -s "$1" ]; do
        [ "$left" -gt 0 ] || fail "no server wrote its address to $1 within $2 seconds: is slurm/serve.sbatch running?"
        sleep 1
        left=$((left - 1))
    done
    echo "--- server at $(cat "$1")"
}

# Runs a command once per task, as one group of processes (the names that torch and accelerate read).
#
# There is no launcher between srun and Python: torchrun's and accelerate's die of SIGUSR1. Near the time limit the
# batch shell gets SIGUSR1 and hands it on; training saves a checkpoint and stops, and the job is put back into the
# queue, where it goes on. A cancelled job is not put back, and a preempted one Slurm puts back itself.
run_tasks() {
    local code=0
    if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
        local first
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) WORLD_SIZE=$SLURM_NTASKS
        # shellcheck disable=SC2016  # the task's own shell fills these in
        set -- bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' task "$@"
    fi
    TIME_IS_UP=0
    CANCELLED=0
    srun --kill-on-bad-exit=1 "$@" &
    STEP=$!
    trap 'TIME_IS_UP=1; kill -USR1 $STEP 2>/dev/null' USR1
    trap 'CANCELLED=1; kill -TERM $STEP 2>/dev/null' TERM
    # A signal ends `wait`, not the step; asked again, bash still knows how the step ended.
    while :; do
        wait $STEP
        code=$?
        kill -0 $STEP 2>/dev/null || break
    done
    wait $STEP
    code=$?
    trap - USR1 TERM
    if [ $code -ne 0 ] && [ $TIME_IS_UP -eq 1 ] && [ $CANCELLED -eq 0 ]; then
        echo "--- the time is up: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return $code
}

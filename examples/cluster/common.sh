# What torchrun.sh and slurm.sh share. They source it; it does nothing by itself.
# shellcheck shell=bash

# shellcheck source=../flores12/training.sh
source "$(dirname "${BASH_SOURCE[0]}")/../flores12/training.sh"
RECIPE=cluster
STOPPED=75 # the exit status after a signal, as fairseq-train has it with this package

# begin_on PROCESSES : begins the run. Its updates hold as many batches as in one process.
begin_on() {
    [ $((UPDATE_FREQ % $1)) = 0 ] ||
        fail "UPDATE_FREQ=$UPDATE_FREQ batches make an update, which $1 processes cannot share" \
            "evenly: give a multiple of $1, and MAX_TOKENS for the size of a batch"
    UPDATE_FREQ=$((UPDATE_FREQ / $1))
    # a signal to all processes of a job would end those that load data, and these the run
    begin_run --num-workers 0
    echo "$1 processes: $SAVE_DIR/train.log"
}

# pass_on LAUNCHER : a signal to the processes. srun passes it on itself; torchrun would end, and
# leave those of other machines waiting for it, so its processes get it one by one.
pass_on() {
    local groups="$SAVE_DIR/ended.${NODE_RANK:-0}"
    # shellcheck disable=SC2046  # split into words
    if [ -s "$groups" ]; then
        kill -USR1 -- $(cat "$groups") 2>/dev/null || true
    else
        kill -TERM "$1" 2>/dev/null || true
    fi
}

# train_on LAUNCHER... : TRAIN, on all processes that the launcher starts by rank.sh. A signal is
# passed on to all of them; STOPPED if they stopped.
train_on() {
    local ended="$SAVE_DIR/ended" status=0 launcher how
    rm -f "$ended" "$ended.${NODE_RANK:-0}" # no process starts before all machines have come here
    "$@" bash "$ROOT/examples/cluster/rank.sh" "$ended" "${TRAIN[@]}" >>"$SAVE_DIR/train.log" 2>&1 &
    launcher=$!
    # shellcheck disable=SC2064  # expanded now
    trap "pass_on $launcher" TERM USR1
    while kill -0 "$launcher" 2>/dev/null; do # a signal ends a wait, too
        wait "$launcher" || true
    done
    wait "$launcher" || status=$?
    how="$(head -n 1 "$ended" 2>/dev/null || true)"
    if [ "$how" = stopped ]; then
        echo "stopped by a signal: run this again to go on"
        return "$STOPPED"
    fi
    [ "$status" = 0 ] ||
        fail "${how:-$1 failed}: see $SAVE_DIR/train.log; run this again to go on"
}

#!/usr/bin/env bash
# One process of a run, started by torchrun or srun: gives the command its place among all.
#   bash examples/cluster/rank.sh FILE COMMAND...
# The first line of FILE tells how the first of them ended, unless they finished.
set -uo pipefail
ended="$1"
shift
rank="${RANK:-$SLURM_PROCID}"
[ -z "${GROUP_RANK:-}" ] || echo "-$$" >>"$ended.$GROUP_RANK" # torchrun makes each a process group
trap : TERM USR1 # they are for the command, which stops by itself; this waits for it
status=0
"$@" --distributed-init-method env:// --distributed-no-spawn --distributed-rank "$rank" \
    --distributed-world-size "${WORLD_SIZE:-$SLURM_NTASKS}" \
    --device-id "${LOCAL_RANK:-$SLURM_LOCALID}" || status=$?
case "$status" in
    0) ;;
    75) # stopped by a signal, as all are: a launcher that took it for a failure would end the others
        echo stopped >>"$ended"
        status=0
        ;;
    *)
        how="ended with exit status $status"
        [ "$status" -le 128 ] || how="was ended by signal $((status - 128))"
        echo "rank $rank on $(uname -n) $how" >>"$ended"
        ;;
esac
exit "$status"

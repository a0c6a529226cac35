#!/usr/bin/env bash
# The fine-tuning of examples/flores12 on all GPUs of a machine, started by torchrun. Settings and
# data are those of examples/flores12, whose download.sh and prepare.sh come first.
#   bash examples/cluster/torchrun.sh
# On several machines, which share WORK, it is started on each:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=first.machine bash examples/cluster/torchrun.sh
#   NODES=2 NODE_RANK=1 MASTER_ADDR=first.machine bash examples/cluster/torchrun.sh
# SIGTERM or SIGUSR1 to one of them makes all save and stop, with exit status 75. Started again, the
# run goes on from the last checkpoint, whatever ended it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NODES="${NODES:-1}"                       # machines
NODE_RANK="${NODE_RANK:-0}"               # this one's number, from 0
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"   # of number 0, as all others reach it
MASTER_PORT="${MASTER_PORT:-29500}"       # a free one there
PROCESSES="${PROCESSES:-}"                # on each machine; as many as it has GPUs if empty

activate_python
PROCESSES="${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
[ "$PROCESSES" -gt 0 ] || fail "there is no GPU: PROCESSES says how many processes to start"
begin_on $((NODES * PROCESSES))
train_on python -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" \
    --nproc_per_node "$PROCESSES" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --no_python
[ "$NODE_RANK" != 0 ] || end_run

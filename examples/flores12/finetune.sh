#!/usr/bin/env bash
# Fine-tunes the adapters with the authors' settings (config.sh), in one process; examples/cluster
# has the same on several GPUs and machines. Started again after an interruption it goes on from the
# last checkpoint; once finished it does nothing, unless MAX_EPOCH was raised. A run of other settings
# needs another SAVE_DIR.
#   bash examples/flores12/finetune.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/training.sh"

begin_run
"${TRAIN[@]}" 2>&1 | tee -a "$SAVE_DIR/train.log" ||
    fail "fairseq-train stopped: see $SAVE_DIR/train.log; run this again to go on"
end_run

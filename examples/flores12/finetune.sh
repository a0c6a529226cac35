#!/usr/bin/env bash
# Fine-tunes the adapters with the authors' settings (config.sh). Started again after an
# interruption it goes on from the last checkpoint; once finished it does nothing.
#   bash examples/flores12/finetune.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

need "$MODEL_DIR/model.pt" "run examples/flores12/download.sh"
set_task_args
need_data
set_extra_args --amp "$EXTRA_TRAIN_ARGS"
activate_python

sides=(--encoder-index-side "$ENCODER_SIDES" --decoder-index-side "$DECODER_SIDES")
[ -z "$WEIGHT_LEARNING" ] || sides=(--lora-weight-learning)
command=(
    fairseq-train "$DATA" "${TASK_ARGS[@]}"
    --arch "$ARCH" --finetune-from-model "$MODEL_DIR/model.pt"
    --lora-tiers "$TIERS" --lora-rank "$RANKS" --lora-shape "$SHAPE"
    --encoder-target-modules "$ENCODER_MODULES" --decoder-target-modules "$DECODER_MODULES"
    "${sides[@]}"
    --optimizer pruned_adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-8
    --pruning-final-sparsity "$FINAL_SPARSITY" --pruning-scope "$PRUNING_SCOPE"
    --pruning-begin "$PRUNING_BEGIN" --pruning-duration "$PRUNING_DURATION"
    --lr-scheduler inverse_sqrt --lr "$LR" --warmup-updates 1
    --criterion label_smoothed_cross_entropy --label-smoothing "$LABEL_SMOOTHING"
    --dropout "$DROPOUT" --sampling-method temperature
    --sampling-temperature "$SAMPLING_TEMPERATURE"
    --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --required-batch-size-multiple 1
    --max-epoch "$MAX_EPOCH" --ddp-backend no_c10d --seed "$SEED"
    --save-dir "$SAVE_DIR" --no-epoch-checkpoints --log-format simple --log-interval 20
    ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"}
)
finished="$SAVE_DIR/finished" # holds the command that has ended well
if [ -s "$SAVE_DIR/checkpoint_last.pt" ] &&
    [ "$(cat "$finished" 2>/dev/null)" = "${command[*]}" ]; then
    echo "$SAVE_DIR is finished"
    exit
fi
mkdir -p "$SAVE_DIR"
"${command[@]}" 2>&1 | tee -a "$SAVE_DIR/train.log" ||
    fail "fairseq-train stopped: see $SAVE_DIR/train.log; run this again to go on"
echo "${command[*]}" >"$finished"

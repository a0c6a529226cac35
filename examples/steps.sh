# How a recipe does its work in steps that are not done again. Recipes source it, with RECIPE and
# ROOT set; it does nothing by itself.
# shellcheck shell=bash

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

# start FOLDER : makes WORK, a folder of the clone unless it is set, locks it, makes the Python
# environment and readies the steps
start() {
    local began=$SECONDS
    mkdir -p "${WORK:=$ROOT/$1}"
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

# binarise CORPUS LANGUAGE
binarise() {
    logged "$LOGS/binarise.$1.en-$2.log" fairseq-preprocess --source-lang en --target-lang "$2" \
        --trainpref "$WORK/pieces/$1/train.en-$2" --validpref "$WORK/pieces/$1/valid.en-$2" \
        --testpref "$WORK/pieces/$1/test.en-$2" --destdir "$WORK/data/$1" \
        --srcdict "$WORK/pieces/dict.txt" --tgtdict "$WORK/pieces/dict.txt" >/dev/null || return
    echo "binarised $1 en-$2"
}
export -f binarise

# binarise_all CORPUS... : from and into all LANGUAGES
binarise_all() {
    local corpus
    for corpus in "$@"; do
        printf '%s\n' "${LANGUAGES[@]}" | side_by_side binarise "$corpus" || return
    done
}

# Prints the directions from and into LANGUAGES, one a line.
directions() {
    local language
    for language in "${LANGUAGES[@]}"; do
        printf '%s\n' "en-$language" "$language-en"
    done
}

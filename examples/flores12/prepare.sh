#!/usr/bin/env bash
# Encodes FLORES with the model's SentencePiece model and binarises every pair of languages once;
# fairseq reads the reverse direction from the same files. FLORES dev becomes train and valid,
# devtest becomes test. JOBS pairs are binarised side by side.
#   bash examples/flores12/prepare.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

for file in dict.txt sentencepiece.bpe.model; do
    need "$MODEL_DIR/$file" "run examples/flores12/download.sh"
done
texts="" # a line for each: of one pair, only those of its languages matter
sources=()
for language in $LANGUAGES; do
    code="$(flores_code "$language")"
    sources+=("$language" "$FLORES_DIR/dev/$code.dev" "$FLORES_DIR/devtest/$code.devtest")
    for split in dev devtest; do
        need "$FLORES_DIR/$split/$code.$split" "run examples/flores12/download.sh"
        texts+="$(text_checksum "$language" "$split")"$'\n'
    done
done
common="VALID_LINES=$VALID_LINES
dict.txt of checksum $(checksum "$MODEL_DIR/dict.txt")
sentencepiece.bpe.model of checksum $(checksum "$MODEL_DIR/sentencepiece.bpe.model")"

# settings_of PAIR : what its data is made from
settings_of() {
    echo "$common"
    grep -E "^(${1%-*}|${1#*-})\." <<<"$texts"
}

mkdir -p "$DATA"
lock "$DATA"
todo=()
for pair in $(pairs); do
    if [ -s "$DATA/$pair.done" ]; then
        same_settings "$DATA/$pair.done" "$(settings_of "$pair")" \
            "delete it, or choose another WORK"
    else
        todo+=("$pair")
    fi
done
if [ ${#todo[@]} = 0 ]; then
    echo "$DATA is complete"
    exit
fi
activate_python
mkdir -p "$TEXT" "$WORK/log"
python "$ROOT/examples/flores12/encode.py" "$MODEL_DIR/sentencepiece.bpe.model" "$TEXT" \
    "$VALID_LINES" "${sources[@]}"

binarise() {
    local pair="$1" made="$DATA/$1.tmp" log="$WORK/log/prepare.$1.log"
    rm -rf "$made"
    if ! {
        fairseq-preprocess --source-lang "${pair%-*}" --target-lang "${pair#*-}" \
            --trainpref "$TEXT/train" --validpref "$TEXT/valid" --testpref "$TEXT/test" \
            --srcdict "$MODEL_DIR/dict.txt" --tgtdict "$MODEL_DIR/dict.txt" --destdir "$made" &&
            mv -f "$made"/*.bin "$made"/*.idx "$made"/dict.*.txt "$DATA/"
    } >"$log" 2>&1; then
        echo "flores12: error: fairseq-preprocess failed on $pair: see $log" >&3
        return 255 # xargs starts no other pair
    fi
    rm -rf "$made"
    settings_of "$pair" >"$DATA/$pair.done"
    echo "binarised $pair"
}
export -f binarise settings_of
export DATA TEXT WORK MODEL_DIR common texts
# shellcheck disable=SC2016  # expanded by the inner bash
printf '%s\0' "${todo[@]}" |
    xargs -0 -n 1 -P "${JOBS:-$(python "$ROOT/lslora_fairseq/cores.py")}" \
        bash -c 'binarise "$1"' binarise 3>&2 2>/dev/null || exit 1

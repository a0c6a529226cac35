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
sources=()
for language in $LANGUAGES; do
    code="$(flores_code "$language")"
    sources+=("$language" "$FLORES_DIR/dev/$code.dev" "$FLORES_DIR/devtest/$code.devtest")
    for file in "${sources[@]: -2}"; do
        need "$file" "run examples/flores12/download.sh"
    done
done
settings="VALID_LINES=$VALID_LINES"
mkdir -p "$TEXT" "$DATA" "$WORK/log"
if [ -f "$DATA/settings" ] && [ "$(cat "$DATA/settings")" != "$settings" ]; then
    fail "$DATA was made with $(cat "$DATA/settings"): delete $TEXT and $DATA, or choose another WORK"
fi
echo "$settings" >"$DATA/settings"
activate_python

python "$ROOT/examples/flores12/encode.py" "$MODEL_DIR/sentencepiece.bpe.model" "$TEXT" \
    "$VALID_LINES" "${sources[@]}"

binarise() {
    local pair="$1" made="$DATA/$1.tmp" log="$WORK/log/prepare.$1.log"
    [ -f "$DATA/$pair.done" ] && return
    rm -rf "$made"
    if ! fairseq-preprocess --source-lang "${pair%-*}" --target-lang "${pair#*-}" \
        --trainpref "$TEXT/train" --validpref "$TEXT/valid" --testpref "$TEXT/test" \
        --srcdict "$MODEL_DIR/dict.txt" --tgtdict "$MODEL_DIR/dict.txt" \
        --destdir "$made" >"$log" 2>&1; then
        echo "flores12: error: fairseq-preprocess failed on $pair: see $log" >&3
        return 255 # xargs starts no other pair
    fi
    mv -f "$made"/*.bin "$made"/*.idx "$made"/dict.*.txt "$DATA/"
    rm -rf "$made"
    touch "$DATA/$pair.done"
    echo "binarised $pair"
}
export -f binarise
export DATA TEXT WORK MODEL_DIR
# shellcheck disable=SC2016  # expanded by the inner bash
pairs | tr '\n' '\0' |
    xargs -0 -n 1 -P "$JOBS" bash -c 'binarise "$1"' binarise 3>&2 2>/dev/null || exit 1
echo "prepared $(pairs | grep -c .) pairs in $DATA"

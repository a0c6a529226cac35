#!/usr/bin/env bash
# Downloads M2M-124 615M and FLORES-101 into $WORK (config.sh); a broken download goes on where it
# stopped. What is there already is not fetched again.
#   bash examples/flores12/download.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

BASE_URL="${BASE_URL:-https://dl.fbaipublicfiles.com/flores101}"
MODEL_FILES=(model.pt dict.txt sentencepiece.bpe.model language_pairs.txt)

# fetch URL FOLDER FILE... : unpacks the archive's folder to FOLDER unless the files are there
fetch() {
    local url="$1" folder="$2" archive file complete=yes
    shift 2
    for file in "$@"; do
        [ -s "$folder/$file" ] || complete=no
    done
    if [ $complete = yes ]; then
        echo "$folder is complete"
        return
    fi
    archive="$WORK/${url##*/}"
    if [ ! -f "$archive" ]; then
        curl -fL -C - -o "$archive.part" "$url" ||
            fail "cannot download $url: run this again to go on where it stopped"
        mv "$archive.part" "$archive"
    fi
    echo "unpacking $archive"
    rm -rf "$WORK/unpacked"
    mkdir -p "$WORK/unpacked" "$folder"
    tar -xzf "$archive" -C "$WORK/unpacked" ||
        fail "$archive is damaged: delete it and run this again"
    for file in "$WORK/unpacked"/*/*; do
        rm -rf "${folder:?}/${file##*/}"
        mv "$file" "$folder/"
    done
    rm -rf "$WORK/unpacked"
    for file in "$@"; do
        need "$folder/$file" "$archive does not hold it; delete the archive and run this again"
    done
    rm "$archive"
}

mkdir -p "$WORK"
fetch "$BASE_URL/pretrained_models/flores101_mm100_615M.tar.gz" "$MODEL_DIR" "${MODEL_FILES[@]}"
flores_files=()
for language in $LANGUAGES; do
    code="$(flores_code "$language")"
    flores_files+=("dev/$code.dev" "devtest/$code.devtest")
done
fetch "$BASE_URL/dataset/flores101_dataset.tar.gz" "$FLORES_DIR" "${flores_files[@]}"

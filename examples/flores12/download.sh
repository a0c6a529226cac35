#!/usr/bin/env bash
# Downloads M2M-124 615M and FLORES-101 into $WORK (config.sh); a broken download goes on where it
# stopped. A folder that is there already is checked and left as it is.
#   bash examples/flores12/download.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"

BASE_URL="${BASE_URL:-https://dl.fbaipublicfiles.com/flores101}"
MODEL_FILES=(model.pt dict.txt sentencepiece.bpe.model language_pairs.txt)

# fetch URL FOLDER FILE... : makes FOLDER from the archive at URL, which must hold the files
fetch() {
    local url="$1" folder="$2" archive="$WORK/${1##*/}" file error
    shift 2
    rmdir "$folder" 2>/dev/null || true # an empty folder counts as none
    if [ -d "$folder" ]; then
        for file in "$@"; do
            need "$folder/$file" "complete $folder, or move it away and run this again"
        done
        echo "$folder is complete"
        return
    fi
    if [ ! -f "$archive" ]; then
        curl -fL -C - -o "$archive.part" "$url" ||
            fail "cannot download $url: run this again to go on where it stopped, or delete" \
                "$archive.part to start over"
        mv "$archive.part" "$archive"
    fi
    echo "unpacking $archive"
    rm -rf "$folder.part"
    mkdir -p "$folder.part"
    error="$(tar -xzf "$archive" -C "$folder.part" 2>&1)" ||
        fail "cannot unpack $archive (${error//$'\n'/ }): free some space, or delete it if it is" \
            "damaged, and run this again"
    for file in "$@"; do
        [ -s "$(echo "$folder.part"/*/"$file")" ] ||
            fail "$archive does not hold $file: delete it and run this again"
    done
    mv "$folder.part"/*/ "$folder"
    rm -r "$folder.part" "$archive"
}

flores_files=()
for language in $LANGUAGES; do
    code="$(flores_code "$language")"
    flores_files+=("dev/$code.dev" "devtest/$code.devtest")
done
mkdir -p "$WORK"
lock "$WORK"
fetch "$BASE_URL/pretrained_models/flores101_mm100_615M.tar.gz" "$MODEL_DIR" "${MODEL_FILES[@]}"
fetch "$BASE_URL/dataset/flores101_dataset.tar.gz" "$FLORES_DIR" "${flores_files[@]}"

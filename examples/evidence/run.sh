#!/usr/bin/env bash
# How good language-specific adapters are, and what each choice of settings is worth, on real text:
# the messages of Debian's programs. Trains a base model with stock fairseq, fine-tunes it for
# programs that it has not seen in many ways, with several seeds, scores all of them, and writes
# tables and figures to examples/evidence/results/.
#   bash examples/evidence/run.sh
#   CHOICES=1 bash examples/evidence/run.sh       also what each choice of settings is worth
#   NEWS=FOLDER bash examples/evidence/run.sh     also on news, {train,valid,test}.CODE line by line
# Everything else is written to evidence_work/ in the clone (WORK names another folder). What is
# done is not done again, and an interrupted run goes on where it stopped.
# Debian's packages come by apt-get; elsewhere DEBS names a folder with their .deb files.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
RECIPE=evidence
# shellcheck source=../steps.sh
source "$ROOT/examples/steps.sh"
no_arguments "$@"

LANGUAGES=(de fr nl cs af cy oc) # from and into English
LANGS=af,cs,cy,de,en,fr,nl,oc
PACKAGES=(
    libreoffice-l10n-{de,fr,nl,cs,af,cy,oc} gimp-data krita-l10n vlc-l10n gnucash-common
    kdenlive-data evolution-common digikam-data kmymoney-common inkscape
)
FEW=(sc sca)     # LibreOffice Calc
MORE=(evolution) # a mail client
BASE_UPDATES=6000
QUARTER=$((BASE_UPDATES / 4))

download() {
    if [ -n "${DEBS:-}" ]; then
        cp "$DEBS"/*.deb "$WORK/packages"
    elif command -v apt-get >/dev/null; then
        (cd "$WORK/packages" && apt-get download "${PACKAGES[@]}")
    else
        echo "no apt-get here: fetch the .deb files of ${PACKAGES[*]} from a mirror of Debian, and" \
            "name their folder: DEBS=… bash examples/evidence/run.sh" >&2
        return 1
    fi
}

unpack() {
    local package
    for package in "$WORK"/packages/*.deb; do
        dpkg-deb --extract "$package" "$WORK/programs/$(basename "${package%%_*}")" || return
        dpkg-deb --showformat='${Package} ${Version}\n' --show "$package"
    done | tee "$WORK/programs/versions.txt"
}

quarter() { # the base after a quarter of its updates
    cp "$WORK/base/checkpoint_"*"_$QUARTER.pt" "$WORK/quarter/checkpoint_last.pt"
}

start evidence_work
export PYTHONPATH="$ROOT/scripts" # corpus.py shares the cleaning of po_corpus.py
pairs="$(directions | paste -sd, -)"
step download "$WORK/packages" download
step unpack "$WORK/programs" unpack
follows "$(checksum "$ROOT"/scripts/{po_corpus,evidence/corpus}.py)"
step corpus "$WORK/corpus" \
    python "$ROOT/scripts/evidence/corpus.py" --programs "$WORK/programs" --out "$WORK/corpus" \
    --few "${FEW[@]}" --more "${MORE[@]}" --languages "${LANGUAGES[@]}"
follows "$(checksum "$ROOT/scripts/pieces.py")"
step pieces "$WORK/pieces" \
    python "$ROOT/scripts/pieces.py" --corpus "$WORK/corpus" --out "$WORK/pieces" --vocab-size 6000
step binarise "$WORK/data" binarise_all base few more
# stock fairseq's own transformer and task
OMP_NUM_THREADS="$JOBS" step train_base "$WORK/base" \
    fairseq-train "$WORK/data/base" --cpu --user-dir "$ROOT/lslora_fairseq" \
    --task translation_multi_simple_epoch --langs "$LANGS" --lang-pairs "$pairs" \
    --encoder-langtok src --decoder-langtok --arch transformer --share-all-embeddings \
    --encoder-layers 3 --encoder-embed-dim 192 --encoder-ffn-embed-dim 768 \
    --encoder-attention-heads 4 --encoder-normalize-before \
    --decoder-layers 3 --decoder-embed-dim 192 --decoder-ffn-embed-dim 768 \
    --decoder-attention-heads 4 --decoder-normalize-before \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
    --lr-scheduler polynomial_decay --lr 0.002 --warmup-updates 400 \
    --total-num-update "$BASE_UPDATES" --max-update "$BASE_UPDATES" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0 \
    --sampling-method temperature --sampling-temperature 1.5 \
    --max-tokens 1500 --required-batch-size-multiple 1 --num-workers 0 --seed 1 \
    --save-dir "$WORK/base" --no-epoch-checkpoints --save-interval-updates 500 \
    --keep-interval-updates 1 --keep-interval-updates-pattern "$QUARTER" \
    --log-format simple --log-interval 50
step quarter "$WORK/quarter" quarter

binarise_news() {
    local LANGUAGES
    read -ra LANGUAGES <"$LOGS/news.languages"
    binarise_all news
}

news() {
    python "$ROOT/scripts/evidence/news.py" --news "$NEWS" --spm "$WORK/pieces/spm.model" \
        --out "$WORK/pieces/news" --languages "${LANGUAGES[@]}" | tee "$LOGS/news.languages"
}

corpora=(few more)
if [ -n "${NEWS:-}" ]; then
    step news "$WORK/pieces/news" news
    step binarise_news "$WORK/data/news" binarise_news
    corpora+=(news)
fi

results="$ROOT/examples/evidence/results"
cd "$ROOT/scripts/evidence"
python evidence.py --work "$WORK" --corpora "${corpora[@]}"
python evidence.py --work "$WORK" --base quarter --rates-of base --corpora few \
    --systems full ours --seeds 1
python report.py --work "$WORK" --out "$results"
python report.py --work "$WORK" --base quarter --out "$results"
if [ -n "${CHOICES:-}" ]; then
    python choices.py --work "$WORK" --out "$results"
fi

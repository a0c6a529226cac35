#!/usr/bin/env bash
# Writes WORK/peft, a PEFT folder for each language as source and as target and for what they
# share, and for each direction of EXPORT a merged model for transformers, such as
# WORK/eng_Latn-oci_Latn (default: none, each is as large as the base model).
#   source examples/nllb/settings.sh && EXPORT=eng_Latn-oci_Latn bash examples/nllb/export.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../flores12/config.sh"
RECIPE=nllb

need "$CHECKPOINT" "run examples/flores12/finetune.sh"
activate_python
[ -d "$WORK/peft" ] || lslora export-peft "$CHECKPOINT" --out "$WORK/peft"
for pair in ${EXPORT:-}; do
    [ -d "$WORK/$pair" ] || lslora export-hf "$CHECKPOINT" --pair "$pair" --out "$WORK/$pair" \
        --dict "$MODEL_DIR/dict.txt" --spm "$MODEL_DIR/sentencepiece.bpe.model"
done

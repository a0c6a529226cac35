#!/usr/bin/env bash
# Makes the base model of a Hugging Face folder, HF_DIR, once.
#   source examples/nllb/settings.sh && bash examples/nllb/import.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../flores12/config.sh"
RECIPE=nllb

if [ -s "$MODEL_DIR/model.pt" ]; then
    echo "$MODEL_DIR is complete"
    exit
fi
need "${HF_DIR:-HF_DIR}/config.json" "name the folder of the model: HF_DIR=/models/nllb-200-…"
activate_python
lslora import-hf "$HF_DIR" --out "$MODEL_DIR"

# NLLB-200 from a Hugging Face folder, fine-tuned and evaluated on FLORES-200 by the scripts of
# examples/flores12, and out to Hugging Face and PEFT again. In a shell of its own:
#   export HF_DIR=/models/nllb-200-distilled-600M     # as it was downloaded
#   export FLORES_DIR=/data/flores200_dataset         # dev/oci_Latn.dev, devtest/oci_Latn.devtest
#   source examples/nllb/settings.sh
#   bash examples/nllb/import.sh
#   bash examples/flores12/prepare.sh
#   bash examples/flores12/finetune.sh
#   bash examples/flores12/evaluate.sh
#   bash examples/nllb/export.sh
# Any parallel text in such files serves: dev is what is trained on (its last VALID_LINES lines
# validate), devtest what is scored. Its licence and that of the model are yours to look at.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export WORK="${WORK:-$ROOT/nllb_work}"
export MODEL_DIR="${MODEL_DIR:-$WORK/base}" # what import.sh writes
export TIERS="${TIERS:-high=eng_Latn,fra_Latn;low=oci_Latn,wol_Latn}"
# of the distilled 600M; of others lslora_nllb_200_1b3 and lslora_nllb_200_3b3
export ARCH="${ARCH:-lslora_nllb_200_600m}"
# the defaults of this package, not the authors' settings
export RANKS="${RANKS:-4}" SHAPE="${SHAPE:-full}"
export SHARED_RANK="${SHARED_RANK:-16}" EMBEDDING_RANK="${EMBEDDING_RANK:-48}"
export BLEU_TOKENIZER="${BLEU_TOKENIZER:-flores200}"
# FLORES-200 names its files as NLLB names its languages
FLORES_CODES="$(tr ';,' '\n\n' <<<"$TIERS" | sed 's/.*=//; s/.*/&=&/' | paste -sd' ' -)"
export FLORES_CODES

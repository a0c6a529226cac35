#!/usr/bin/env bash
# Learns the architecture of the adapters, after download.sh and prepare.sh:
#   1. weight learning: every layer learns how much it wants of its source- and target-indexed
#      adapters (`lslora sides`)
#   2. estimation: with the better side, all languages have the same rank and compete while their
#      adapters are pruned (`lslora demand`, `lslora suggest`)
# Either is a run of finetune.sh, with the settings of config.sh but for ranks, sides and pruning;
# started again after an interruption it goes on from the last checkpoint. BUDGET says how many
# parameters the learned architecture may have. Tables, the figure demand.png and what was found go
# to $WORK/architecture; it ends with the commands that fine-tune and score with it.
#   bash examples/flores12/learn_architecture.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/config.sh"
activate_python
python -c 'import matplotlib' 2>/dev/null ||
    fail "matplotlib is missing, which draws demand.png: pip install matplotlib"
mkdir -p "$LEARNED"
lock "$LEARNED"

# train NAME SETTING=VALUE... : a run of finetune.sh with some settings of its own
train() {
    env "${@:2}" RANKS="$EQUAL_RANK" SAVE_DIR="$LEARNED/$1" \
        bash "$ROOT/examples/flores12/finetune.sh"
}

# show FILE COMMAND... : what the command prints goes to FILE and to the screen
show() {
    echo
    "${@:2}" >"$1"
    cat "$1"
    echo
}

# found NAME OPTION : its value in NAME.flags, one word a line, which lslora wrote
found() {
    sed -n "/^$2\$/{n;p;}" "$LEARNED/$1.flags"
}

train weight_learning WEIGHT_LEARNING=yes FINAL_SPARSITY=0
rm -f "$LEARNED/settings.sh" # what follows may be interrupted
checkpoint="$LEARNED/weight_learning/checkpoint_last.pt"
show "$LEARNED/sides.txt" lslora sides "$checkpoint"
lslora sides "$checkpoint" --format flags >"$LEARNED/sides.flags"
ENCODER_SIDES="$(found sides --encoder-index-side)"
DECODER_SIDES="$(found sides --decoder-index-side)"

train estimation ENCODER_SIDES="$ENCODER_SIDES" DECODER_SIDES="$DECODER_SIDES" PRUNING_SCOPE=layer
checkpoint="$LEARNED/estimation/checkpoint_last.pt"
show "$LEARNED/demand.txt" lslora demand "$checkpoint" --plot "$LEARNED/demand.png"
lslora demand "$checkpoint" --format json >"$LEARNED/demand.json"
show "$LEARNED/suggestion.txt" lslora suggest "$checkpoint" --budget "$BUDGET"
lslora suggest "$checkpoint" --budget "$BUDGET" --format flags >"$LEARNED/suggestion.flags"
RANKS="$(found suggestion --lora-rank)"
ENCODER_MODULES="$(found suggestion --encoder-target-modules)"
DECODER_MODULES="$(found suggestion --decoder-target-modules)"

SAVE_DIR="$WORK/finetuned_learned"
RESULTS="$WORK/results_learned"
for name in WORK MODEL_DIR FLORES_DIR SAVE_DIR RESULTS; do
    [ "${!name:0:1}" = / ] || printf -v "$name" '%s' "$PWD/${!name}"
done
for name in WORK MODEL_DIR FLORES_DIR SAVE_DIR RESULTS TIERS ARCH SHAPE RANKS SHARED_RANK \
    EMBEDDING_RANK ENCODER_SIDES DECODER_SIDES ENCODER_MODULES DECODER_MODULES; do
    printf 'export %s=%q\n' "$name" "${!name}"
done >"$LEARNED/settings.sh"
cat "$LEARNED/settings.sh"
printf '\nTo fine-tune and score with these settings:\n'
printf '    source %q\n' "$LEARNED/settings.sh"
printf '    bash %q\n' "$ROOT/examples/flores12/finetune.sh" "$ROOT/examples/flores12/evaluate.sh"

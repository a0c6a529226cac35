#!/usr/bin/env bash
# Learns the architecture of the adapters instead of setting it by hand, on the quickstart's data,
# in minutes on a CPU:
#   1. weight learning: every layer holds source- and target-indexed adapters and learns how much of
#      each it wants; `lslora sides` reads off which side should index it
#   2. estimation: with those sides, all languages have the same rank and compete while their
#      adapters are pruned; `lslora demand` shows what survives, and `lslora suggest` turns it into
#      ranks and modules with as many parameters as the quickstart's own setting has
#   3. fine-tuning of the base model once more, with what was found
# The table at the end sets that model beside the quickstart's.
#   bash examples/architecture_learning.sh
# It first runs examples/quickstart.sh, as far as that was not done, and like it writes to
# quickstart_work/ (WORK names another folder): tables, flags and the figure demand.png to
# architecture/, logs with the full command of every step to logs/. A step that is done is not done
# again, and an interrupted one goes on where it stopped.
set -euo pipefail
# shellcheck source=quickstart_steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_steps.sh"
no_arguments "$@"

EQUAL_RANK=8 # of all languages, while the architecture is learned

# kept FILE COMMAND... : what the command prints goes to FILE
kept() {
    quoted "${@:2}"
    "${@:2}" >"$1"
}

read_sides() { # CHECKPOINT FOLDER
    kept "$2/sides.txt" lslora sides "$1" &&
        kept "$2/flags" lslora sides "$1" --format flags
}

read_demand() { # CHECKPOINT FOLDER
    kept "$2/demand.txt" lslora demand "$1" --plot "$2/demand.png" &&
        kept "$2/demand.csv" lslora demand "$1" --format csv &&
        kept "$2/demand.json" lslora demand "$1" --format json
}

read_suggestion() { # CHECKPOINT FOLDER PARAMETERS
    kept "$2/suggestion.txt" lslora suggest "$1" --budget "$3" &&
        kept "$2/flags" lslora suggest "$1" --budget "$3" --format flags
}

read_words() { # FILE : WORDS becomes its lines
    local word
    WORDS=()
    while IFS= read -r word; do
        WORDS+=("$word")
    done <"$1"
}

show() { # FILE...
    echo
    cat "$@"
    echo
}

bash "$ROOT/examples/quickstart.sh"
echo
start quickstart_work
# what changes a step of the quickstart, but for its report, changes all steps here
chain="$(cat "$WORK/decoded/finetuned/.done")"
FOUND="$WORK/architecture"

finetune weight_learning "$WORK/weight_learning" 0 language \
    --lora-rank "$EQUAL_RANK" --lora-weight-learning
step sides "$FOUND/sides" \
    read_sides "$WORK/weight_learning/checkpoint_last.pt" "$FOUND/sides"
show "$FOUND/sides/sides.txt"
read_words "$FOUND/sides/flags"
SIDES=("${WORDS[@]}")

finetune estimation "$WORK/estimation" 0.9 layer --lora-rank "$EQUAL_RANK" "${SIDES[@]}"
step demand "$FOUND/demand" \
    read_demand "$WORK/estimation/checkpoint_last.pt" "$FOUND/demand"
show "$FOUND/demand/demand.txt"
echo "the same as a figure: $FOUND/demand/demand.png"
# the log of a training starts with a table of what it trains
hand_set="$(sed -nE 's/^total .* all +all +([0-9,]+) .*/\1/p' "$LOGS/finetune.log" | tail -n 1)"
step suggestion "$FOUND/suggestion" \
    read_suggestion "$WORK/estimation/checkpoint_last.pt" "$FOUND/suggestion" "${hand_set//,/}"
show "$FOUND/suggestion/suggestion.txt"
read_words "$FOUND/suggestion/flags"
RANKS_AND_MODULES=("${WORDS[@]}")

finetune finetune_learned "$WORK/learned" 0.9 language "${RANKS_AND_MODULES[@]}" "${SIDES[@]}"
evaluate decode_learned "$WORK/decoded/learned" "$WORK/learned/checkpoint_last.pt" finetune
follows "$(checksum "$ROOT"/scripts/{quickstart,architecture}_report.py)"
step report_learned "$FOUND/report" \
    python "$ROOT/scripts/architecture_report.py" --work "$WORK" \
    --hand-set "$WORK/finetuned/checkpoint_last.pt" --learned "$WORK/learned/checkpoint_last.pt" \
    --out "$FOUND/report/table.txt"
show "$FOUND/report/table.txt"
print_seconds "${steps[@]}"

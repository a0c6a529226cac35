# Settings that the scripts of this folder share. They source it; it does nothing by itself.
# Every setting can be given in the environment instead of being edited here:
#   WORK=/data/flores12 bash examples/flores12/finetune.sh
# shellcheck shell=bash disable=SC2034  # used by the scripts that source this file

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# ── folders ──
WORK="${WORK:-$ROOT/flores12_work}"                     # everything that the recipe writes
MODEL_DIR="${MODEL_DIR:-$WORK/flores101_mm100_615M}"    # M2M-124 615M, as its archive unpacks
FLORES_DIR="${FLORES_DIR:-$WORK/flores101_dataset}"     # FLORES-101, as its archive unpacks
TEXT="$WORK/text"                                       # FLORES in SentencePiece pieces
DATA="$WORK/data"                                       # the same, binarised
SAVE_DIR="${SAVE_DIR:-$WORK/finetuned}"                 # checkpoints
CHECKPOINT="${CHECKPOINT:-$SAVE_DIR/checkpoint_last.pt}" # what evaluate.sh decodes with
RESULTS="${RESULTS:-$WORK/results}"                     # hypotheses and scores

# ── languages: all directions between them are trained and scored ──
TIERS="${TIERS:-high=en,fr,it,de;medium=nl,zh,ja,ko;low=oc,or,sd,wo}"
VALID_LINES="${VALID_LINES:-47}"  # FLORES dev has 997 lines: these last ones validate, the rest train

# ── adapters ──
ARCH="${ARCH:-lslora_m2m_124_615m}"
RANKS="${RANKS:-high=2,medium=2,low=8}"
SHAPE="${SHAPE:-square}"
ENCODER_SIDES="${ENCODER_SIDES:-source*9,target*3}"
DECODER_SIDES="${DECODER_SIDES:-target}"
FINAL_SPARSITY="${FINAL_SPARSITY:-0.9}"
PRUNING_BEGIN="${PRUNING_BEGIN:-2}"
PRUNING_DURATION="${PRUNING_DURATION:-10}"

# ── training ──
MAX_EPOCH="${MAX_EPOCH:-15}"
MAX_TOKENS="${MAX_TOKENS:-4000}"
UPDATE_FREQ="${UPDATE_FREQ:-4}"
LR="${LR:-3e-3}"
DROPOUT="${DROPOUT:-0.1}"
LABEL_SMOOTHING="${LABEL_SMOOTHING:-0.2}"
SAMPLING_TEMPERATURE="${SAMPLING_TEMPERATURE:-5}"
SEED="${SEED:-2}"
# more options of fairseq-train, split at spaces; the last word wins. With --cpu, --amp is left out.
EXTRA_TRAIN_ARGS="${EXTRA_TRAIN_ARGS:-}"

# ── decoding and scoring ──
BEAM="${BEAM:-5}"
BLEU_TOKENIZER="${BLEU_TOKENIZER:-flores101}"  # of sacrebleu
# more options of fairseq-generate; with --cpu, --fp16 is left out
EXTRA_GENERATE_ARGS="${EXTRA_GENERATE_ARGS:-}"

# ── commands side by side ──
JOBS="${JOBS:-$(getconf _NPROCESSORS_ONLN)}"  # fairseq-preprocess
DECODE_JOBS="${DECODE_JOBS:-1}"               # fairseq-generate: each loads the model

LANGUAGES="$(tr ';' '\n' <<<"$TIERS" | cut -d= -f2 | tr ',\n' '  ')"

# FLORES-101 names its files by three-letter codes.
flores_code() {
    case "$1" in
        de) echo deu ;;
        en) echo eng ;;
        fr) echo fra ;;
        it) echo ita ;;
        ja) echo jpn ;;
        ko) echo kor ;;
        nl) echo nld ;;
        oc) echo oci ;;
        or) echo ory ;;
        sd) echo snd ;;
        wo) echo wol ;;
        zh) echo zho_simpl ;;
        *) fail "no FLORES code known for $1: add it to flores_code in examples/flores12/config.sh" ;;
    esac
}

# All directions, one a line.
directions() {
    local source target
    for source in $LANGUAGES; do
        for target in $LANGUAGES; do
            [ "$source" = "$target" ] || echo "$source-$target"
        done
    done
}

# The same, but only the first direction of each pair.
pairs() {
    directions | awk -F- '!(($2, $1) in seen) { seen[$1, $2]; print }'
}

# The languages of the base model, in the order in which it appended their tokens to its
# dictionary: fairseq sorts the languages of the directions that a model is trained on, and the
# archive lists those in language_pairs.txt. All of them are needed, whichever are fine-tuned.
model_languages() {
    local list="$MODEL_DIR/language_pairs.txt" language found
    need "$list" "run examples/flores12/download.sh, or name the base model's languages in its order: MODEL_LANGUAGES=af,am,..."
    found="$(tr -cs 'A-Za-z0-9_' '\n' <"$list" | grep . | LC_ALL=C sort -u | paste -sd, -)"
    for language in $LANGUAGES; do
        case ",$found," in
            *",$language,"*) ;;
            *) fail "$language of TIERS is not a language of $list: leave it out" ;;
        esac
    done
    echo "$found"
}

# Options by which fairseq-train and fairseq-generate learn of the languages.
set_task_args() {
    MODEL_LANGUAGES="${MODEL_LANGUAGES:-$(model_languages)}"
    TASK_ARGS=(
        --user-dir "$ROOT/lslora_fairseq" --task translation_multi_lslora
        --langs "$MODEL_LANGUAGES" --lang-pairs "$(directions | paste -sd, -)"
        --encoder-langtok src --decoder-langtok
    )
}

# with_precision FLAG OPTION... : EXTRA_ARGS becomes the options, with FLAG in front unless one of
# them is --cpu.
with_precision() {
    EXTRA_ARGS=("$@")
    case " $* " in *" --cpu "*) EXTRA_ARGS=("${@:2}") ;; esac
}

fail() {
    echo "flores12: error: $*" >&2
    exit 1
}

# need FILE REMEDY
need() {
    [ -s "$1" ] || fail "$1 is missing or empty: $2"
}

# Uses the fairseq on PATH; where there is none, that of the clone's .venv, made if need be.
activate_python() {
    local wanted='from importlib.util import find_spec as f; import sys
sys.exit(not all(map(f, ("fairseq", "sentencepiece", "sacrebleu"))))'
    if ! { command -v fairseq-train && python -c "$wanted"; } >/dev/null 2>&1; then
        # shellcheck source=../../scripts/environment.sh
        source "$ROOT/scripts/environment.sh"
    fi
}

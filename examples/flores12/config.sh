# Settings that the scripts of this folder share. They source it; it does nothing by itself.
# Every setting can be given in the environment instead of being edited here:
#   WORK=/data/flores12 bash examples/flores12/finetune.sh
# shellcheck shell=bash disable=SC2034  # used by the scripts that source this file

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
RECIPE=flores12
# shellcheck source=../common.sh
source "$ROOT/examples/common.sh"

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
# Any languages of FLORES_CODES below, by tier; RANKS gives each tier its rank.
TIERS="${TIERS:-high=en,fr,it,de;medium=nl,zh,ja,ko;low=oc,or,sd,wo}"
VALID_LINES="${VALID_LINES:-47}"  # FLORES dev has 997 lines: these last ones validate, the rest train

# ── adapters ──
ARCH="${ARCH:-lslora_m2m_124_615m}"
RANKS="${RANKS:-high=2,medium=2,low=8}"
SHARED_RANK="${SHARED_RANK:-0}"       # of an adapter that all share; the authors have none
EMBEDDING_RANK="${EMBEDDING_RANK:-0}" # of one of the embeddings
SHAPE="${SHAPE:-square}"
ENCODER_SIDES="${ENCODER_SIDES:-source*9,target*3}"
DECODER_SIDES="${DECODER_SIDES:-target}"
WEIGHT_LEARNING="${WEIGHT_LEARNING:-}" # yes: the sides are learned instead
ENCODER_MODULES="${ENCODER_MODULES:-self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,fc1,fc2}"
DECODER_MODULES="${DECODER_MODULES:-self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,\
encoder_attn.q_proj,encoder_attn.k_proj,encoder_attn.v_proj,fc1,fc2}"
FINAL_SPARSITY="${FINAL_SPARSITY:-0.9}"
PRUNING_BEGIN="${PRUNING_BEGIN:-2}"
PRUNING_DURATION="${PRUNING_DURATION:-10}"
PRUNING_SCOPE="${PRUNING_SCOPE:-language}"

# ── learn_architecture.sh ──
LEARNED="${LEARNED:-$WORK/architecture}" # what it writes
EQUAL_RANK="${EQUAL_RANK:-8}"            # of all languages, while the architecture is learned
BUDGET="${BUDGET:-15335424}" # parameters to spend, or a share of the model's (2%): those of RANKS

# ── training ──
MAX_EPOCH="${MAX_EPOCH:-15}"
MAX_TOKENS="${MAX_TOKENS:-4000}"
UPDATE_FREQ="${UPDATE_FREQ:-4}"
LR="${LR:-3e-3}"
DROPOUT="${DROPOUT:-0.1}"
ATTENTION_DROPOUT="${ATTENTION_DROPOUT:-0.1}"
LABEL_SMOOTHING="${LABEL_SMOOTHING:-0.2}"
SAMPLING_TEMPERATURE="${SAMPLING_TEMPERATURE:-5}"
SEED="${SEED:-2}"
# more options of fairseq-train, split at spaces; the last word wins. With --cpu, --amp is left out.
EXTRA_TRAIN_ARGS="${EXTRA_TRAIN_ARGS:-}"

# ── decoding and scoring ──
BEAM="${BEAM:-5}"
BLEU_TOKENIZER="${BLEU_TOKENIZER:-flores101}"  # of sacrebleu
# more options of lslora evaluate; with --cpu, --fp16 is left out
EXTRA_GENERATE_ARGS="${EXTRA_GENERATE_ARGS:-}"

JOBS="${JOBS:-}" # fairseq-preprocess side by side; as many as there are cores if empty

LANGUAGES="$(tr ';' '\n' <<<"$TIERS" | cut -d= -f2 | tr ',\n' '  ')"

# The model's code of every language of FLORES-101, and the one that FLORES names its files by.
# Pairs in the environment come first: FLORES_CODES=zh=zho_trad
FLORES_CODES="${FLORES_CODES:-}
    af=afr am=amh ar=ara as=asm ast=ast az=azj be=bel bg=bul bn=ben bs=bos ca=cat ceb=ceb cs=ces
    cy=cym da=dan de=deu el=ell en=eng es=spa et=est fa=fas ff=ful fi=fin fr=fra ga=gle gl=glg
    gu=guj ha=hau he=heb hi=hin hr=hrv hu=hun hy=hye id=ind ig=ibo is=isl it=ita ja=jpn jv=jav
    ka=kat kam=kam kea=kea kk=kaz km=khm kn=kan ko=kor ku=ckb ky=kir lb=ltz lg=lug ln=lin lo=lao
    lt=lit luo=luo lv=lav mi=mri mk=mkd ml=mal mn=mon mr=mar ms=msa mt=mlt my=mya ne=npi nl=nld
    no=nob ns=nso ny=nya oc=oci om=orm or=ory pa=pan pl=pol ps=pus pt=por ro=ron ru=rus sd=snd
    sk=slk sl=slv sn=sna so=som sr=srp sv=swe sw=swh ta=tam te=tel tg=tgk th=tha tl=tgl tr=tur
    uk=ukr umb=umb ur=urd uz=uzb vi=vie wo=wol xh=xho yo=yor zh=zho_simpl zu=zul"

flores_code() {
    local entry
    for entry in $FLORES_CODES; do
        if [ "${entry%%=*}" = "$1" ]; then
            echo "${entry#*=}"
            return
        fi
    done
    fail "no FLORES-101 files known for '$1' of TIERS: leave it out, or name them:" \
        "FLORES_CODES=$1=code"
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

# One direction of each pair, whatever the order of TIERS.
pairs() {
    directions | awk -F- '$1 < $2'
}

# need_data: every pair of languages has been prepared
need_data() {
    local pair
    for pair in $(pairs); do
        [ -s "$DATA/$pair.done" ] || fail "$DATA lacks $pair: run examples/flores12/prepare.sh"
    done
}

# data_checksum : of all that the pairs' binarised texts were made from
data_checksum() {
    local pair
    for pair in $(pairs | LC_ALL=C sort); do # in whatever order TIERS has them
        cat "$DATA/$pair.done"
    done | cksum
}

# text_checksum LANGUAGE dev|devtest : a line that tells one text of FLORES from another
text_checksum() {
    echo "$1.$2 of checksum $(checksum "$FLORES_DIR/$2/$(flores_code "$1").$2")"
}

# same_settings FILE SETTINGS REMEDY... : fails if FILE holds other settings than these, one a line
same_settings() {
    local was now
    [ "$(cat "$1")" = "$2" ] && return
    was="$({ grep -vxF -e "$2" "$1" || true; } | cut -c 1-100 | paste -sd, -)"
    now="$({ grep -vxF -f "$1" <<<"$2" || true; } | cut -c 1-100 | paste -sd, -)"
    fail "${1%/*} was made with ${was:-less} and not with ${now:-less}: ${*:3}"
}

# The languages of the base model, in the order in which it appended their tokens to its
# dictionary: fairseq sorts the languages of the directions that a model is trained on, and the
# archive lists those in language_pairs.txt. All of them are needed, whichever are fine-tuned.
# This holds for M2M. The tokens of NLLB are in no alphabetical order (pes_Arab stands before
# fij_Latn, zsm_Latn before mya_Mymr): lslora import-hf writes them to langs.txt in their own.
model_languages() {
    local list="$MODEL_DIR/language_pairs.txt" language found
    if [ -s "$MODEL_DIR/langs.txt" ]; then
        list="$MODEL_DIR/langs.txt"
        found="$(paste -sd, - <"$list")"
    else
        need "$list" "run examples/flores12/download.sh, or name the base model's languages in" \
            "its order: MODEL_LANGUAGES=af,am,..."
        found="$(tr -cs 'A-Za-z0-9_' '\n' <"$list" | sed '/^$/d' | LC_ALL=C sort -u |
            paste -sd, -)"
    fi
    for language in $LANGUAGES; do
        case ",$found," in
            *",$language,"*) ;;
            *) fail "$language of TIERS is not a language of $list: leave it out" ;;
        esac
    done
    echo "$found"
}

# Options by which fairseq-train and lslora evaluate learn of the languages.
set_language_args() {
    MODEL_LANGUAGES="${MODEL_LANGUAGES:-$(model_languages)}"
    LANGUAGE_ARGS=(
        --langs "$MODEL_LANGUAGES" --lang-pairs "$(directions | paste -sd, -)"
        --encoder-langtok src --decoder-langtok
    )
}

# set_extra_args FLAG TEXT : EXTRA_ARGS becomes the words of TEXT, with FLAG in front unless one of
# them is --cpu.
set_extra_args() {
    set -f # a word such as source*9 is no file name
    # shellcheck disable=SC2206  # split at spaces
    EXTRA_ARGS=($2)
    set +f
    case " ${EXTRA_ARGS[*]-} " in
        *" --cpu "*) ;;
        *) EXTRA_ARGS=("$1" ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"}) ;;
    esac
}

# need FILE REMEDY...
need() {
    [ -s "$1" ] || fail "$1 is missing or empty: ${*:2}"
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

lslora() { # of this clone, whether or not it is installed
    PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" python -m lslora "$@"
}

[ -n "$(directions)" ] || fail "TIERS='$TIERS' names no two languages: write 'high=en,fr;low=oc'"

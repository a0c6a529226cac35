# What quickstart.sh, architecture_learning.sh and add_language.sh share: settings and commands.
# They source it; it does nothing by itself.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RECIPE="$(basename "$0" .sh)"
LANGUAGES=(de fr nl cs cy af) # from and into English
LANGS=af,cs,cy,de,en,fr,nl
BASE_PRODUCTS=(plone.app.locales==7.0.4 pretix==2026.8.0)
FINETUNE_PRODUCTS=(django==5.2.19 wagtail==8.0.1)
SIZES=(
    --share-all-embeddings
    --encoder-layers 3 --encoder-embed-dim 192 --encoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --encoder-normalize-before
    --decoder-layers 2 --decoder-embed-dim 192 --decoder-ffn-embed-dim 512
    --decoder-attention-heads 4 --decoder-normalize-before
)
# shellcheck source=steps.sh
source "$ROOT/examples/steps.sh"

pairs="$(directions | paste -sd, -)"

# what all fine-tunings share
FINETUNING=(
    --langs "$LANGS" --lang-pairs "$pairs" --encoder-langtok src --decoder-langtok
    "${SIZES[@]}"
    --adam-betas '(0.9, 0.98)' --clip-norm 1.0
    --lr-scheduler inverse_sqrt --warmup-updates 50 --max-epoch 3
    --label-smoothing 0.1 --sampling-method temperature --sampling-temperature 1.5
    --max-tokens 750 --required-batch-size-multiple 1 --num-workers 0 --seed 1 --dropout 0
    --no-epoch-checkpoints --log-format simple --log-interval 50
)

ATTENTION=self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.out_proj
ENCODER_MODULES=$ATTENTION,fc1,fc2
DECODER_MODULES=$ATTENTION,${ATTENTION//self/encoder},fc1,fc2

# finetune STEP FOLDER SPARSITY SCOPE OPTION... : a step that trains adapters of the frozen base
# model: one LoRA for each language, pruned epoch by epoch, one that all share, and one of the
# embeddings; the options say what the languages' are. The last two are larger than by default, and
# the linears more, since this weak base has nearly all to learn.
finetune() {
    step "$1" "$2" \
        fairseq-train "$WORK/data/finetune" --cpu --user-dir "$ROOT/lslora_fairseq" \
        --task translation_multi_lslora --arch lslora_transformer "${FINETUNING[@]}" \
        --finetune-from-model "$WORK/base/checkpoint_last.pt" --save-dir "$2" \
        --lora-tiers "$WORK/corpus/tiers.tsv" --lora-shared-rank 32 --lora-embedding-rank 64 \
        --encoder-target-modules "$ENCODER_MODULES" --decoder-target-modules "$DECODER_MODULES" \
        "${@:5}" --criterion lslora_label_smoothed_cross_entropy \
        --optimizer pruned_adam --lr 0.004 \
        --pruning-final-sparsity "$3" --pruning-begin 1 --pruning-duration 2 --pruning-scope "$4"
}

DECODING=(--cpu --beam 4 --lenpen 1.5 --max-len-a 1.5 --max-len-b 8)

# evaluate STEP FOLDER CHECKPOINT CORPUS : a step that decodes and scores the corpus' test set
evaluate() {
    step "$1" "$2" \
        lslora evaluate "$WORK/data/$4" --path "$3" --out "$2" "${DECODING[@]}" \
        --spm "$WORK/pieces/spm.model" --tiers "$WORK/corpus/tiers.tsv"
}

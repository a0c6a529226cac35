"""One fine-tuning of examples/evidence: its command, and what its log tells."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEST, LAST = "checkpoint_best.pt", "checkpoint_last.pt"
# what the base model is, and all systems with it: train_base in run.sh has the same
MODEL = (
    "--encoder-langtok src --decoder-langtok --share-all-embeddings "
    "--encoder-layers 3 --encoder-embed-dim 192 --encoder-ffn-embed-dim 768 "
    "--encoder-attention-heads 4 --encoder-normalize-before "
    "--decoder-layers 3 --decoder-embed-dim 192 --decoder-ffn-embed-dim 768 "
    "--decoder-attention-heads 4 --decoder-normalize-before"
)
TRAINING = (
    "--lr-scheduler inverse_sqrt --warmup-updates 50 --clip-norm 1.0 "
    "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--sampling-method temperature --sampling-temperature 1.5 "
    "--max-tokens 1000 --required-batch-size-multiple 1 --num-workers 0 "
    "--no-epoch-checkpoints --log-format simple --log-interval 50"
)
STOCK = "--task translation_multi_simple_epoch --arch transformer --optimizer adam"
ADAPTERS = "--task translation_multi_lslora --arch lslora_transformer --optimizer pruned_adam"


def languages(work):
    """Language codes, English first."""
    lines = (work / "corpus" / "tiers.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines]


def command(work, corpus, base, system, epochs, rate, seed):
    """The words of fairseq-train; ``{out}`` stands for the folder of its checkpoints.

    Args:
        work: folder of the evidence
        corpus: name of the fine-tuning corpus
        base: the base model's checkpoint
        system: a :class:`~systems.System`
    """
    pivot, *others = languages(work)
    pairs = [pair for la in others for pair in (f"{pivot}-{la}", f"{la}-{pivot}")]
    how = STOCK if system.is_stock else f"{ADAPTERS} --lora-tiers {work}/corpus/tiers.tsv"
    return [
        "fairseq-train", work / "data" / corpus, "--cpu", "--user-dir", ROOT / "lslora_fairseq",
        *how.split(), *MODEL.split(), *TRAINING.split(), "--adam-betas", "(0.9, 0.98)",
        "--langs", ",".join(sorted((pivot, *others))), "--lang-pairs", ",".join(pairs),
        "--finetune-from-model", base, "--save-dir", "{out}",
        "--max-epoch", epochs, "--lr", rate, "--seed", seed, *system.options,
    ]  # fmt: skip


def curve(log):
    """The loss on the validation set after each epoch."""
    return [float(loss) for loss in re.findall(r"valid on 'valid' subset \| loss ([\d.]+)", log)]


def facts(log):
    """Numbers of a training: parameters that are trained, and seconds an update."""
    (trained,) = re.findall(r"num\. shared model params: .*trained: ([\d,]+)\)", log)[-1:]
    epochs = re.findall(r"\| train \| .* num_updates (\d+) .* train_wall ([\d.]+)", log)
    seconds = sum(float(wall) for _, wall in epochs)
    return {
        "trained": int(trained.replace(",", "")),
        "updates": int(epochs[-1][0]),
        "seconds_an_update": seconds / int(epochs[-1][0]),
    }

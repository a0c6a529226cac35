"""One fine-tuning of examples/evidence: its command, and what its log tells."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEST, LAST = "checkpoint_best.pt", "checkpoint_last.pt"
PIVOT = "en"
# what the base model is, and all systems with it: train_base in run.sh has the same
MODEL = (
    "--encoder-langtok src --decoder-langtok --share-all-embeddings "
    "--encoder-layers 3 --encoder-embed-dim 192 --encoder-ffn-embed-dim 768 "
    "--encoder-attention-heads 4 --encoder-normalize-before "
    "--decoder-layers 3 --decoder-embed-dim 192 --decoder-ffn-embed-dim 768 "
    "--decoder-attention-heads 4 --decoder-normalize-before"
)
TRAINING = (
    "--lr-scheduler inverse_sqrt --warmup-updates 50 --clip-norm 1.0 --dropout 0 "
    "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--sampling-method temperature --sampling-temperature 1.5 "
    "--max-tokens 1000 --required-batch-size-multiple 1 --num-workers 0 "
    "--no-epoch-checkpoints --log-format simple --log-interval 50"
)
STOCK = "--task translation_multi_simple_epoch --arch transformer --optimizer adam"
ADAPTERS = "--task translation_multi_lslora --arch lslora_transformer --optimizer pruned_adam"


def languages(work):
    """The languages beside English, by tier."""
    lines = (work / "corpus" / "tiers.tsv").read_text(encoding="utf-8").splitlines()
    codes = [line.split("\t")[0] for line in lines]
    return [code for code in codes if code != PIVOT]


def pairs(work, corpus):
    """The directions from and into English that a binarised corpus has."""
    data = work / "data" / corpus
    return [
        pair
        for la in languages(work)
        if (data / f"train.{PIVOT}-{la}.{la}.idx").exists()
        for pair in (f"{PIVOT}-{la}", f"{la}-{PIVOT}")
    ]


def command(work, corpus, start, system, directions, length, rate, seed):
    """The words of fairseq-train; ``{out}`` stands for the folder of its checkpoints.

    Args:
        work: folder of the evidence
        corpus: name of the fine-tuning corpus
        start: the checkpoint to start from
        system: a :class:`~systems.System`
        directions: list such as ``en-de``
        length: options that say how long it lasts
    """
    how = STOCK if system.is_stock else f"{ADAPTERS} --lora-tiers {work}/corpus/tiers.tsv"
    langs = ",".join(sorted((PIVOT, *languages(work))))
    return [
        "fairseq-train", work / "data" / corpus, "--cpu", "--user-dir", ROOT / "lslora_fairseq",
        *how.split(), *MODEL.split(), *TRAINING.split(), "--adam-betas", "(0.9, 0.98)",
        "--langs", langs, "--lang-pairs", ",".join(directions),
        "--finetune-from-model", start, "--save-dir", "{out}",
        *length, "--lr", rate, "--seed", seed, *system.options,
    ]  # fmt: skip


def curve(log):
    """(update, loss on the validation set) each time that it was looked at."""
    found = re.findall(r"valid on 'valid' subset \| loss ([\d.]+) .*?num_updates (\d+)", log)
    return [(int(update), float(loss)) for loss, update in found]


def lowest(losses):
    """The lowest loss of a :func:`curve`."""
    return min(loss for _, loss in losses)


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

"""Training modes through the console: precisions, token placements, processes, base models."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toy
from console import (
    LANGS,
    LANGTOKS,
    adapters_in,
    finetune_args,
    generate_args,
    run,
    train_args,
    with_option,
    without,
)

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

IN_PIECES = "lslora_label_smoothed_cross_entropy"


def losses(out):
    return [float(x) for x in re.findall(r"\| train \| epoch \d+ \| loss ([\d.]+)", out)]


def model_of(save_dir):
    return torch.load(save_dir / "checkpoint_last.pt")["model"]


@pytest.fixture(scope="module")
def fp32(finetuned):
    """(the losses of each epoch, the model) of a run without further options."""
    checkpoint, out = finetuned
    return losses(out), model_of(checkpoint.parent)


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp"],
        ["--fp16", "--fp16-init-scale", "4"],
        ["--fp16-no-flatten-grads", "--fp16", "--fp16-init-scale", "4"],
        pytest.param(["--memory-efficient-fp16", "--fp16-init-scale", "4"], marks=pytest.mark.slow),
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_precisions(corpus, tmp_path, fp32, flags):
    """--amp computes in fp32 where there is no GPU; models/ has its autocast."""
    if flags != ["--amp"] and not toy.HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    args = finetune_args(corpus, tmp_path / "run", *flags)
    _, out, _ = run("fairseq-train", *with_option(args, "--criterion", IN_PIECES))
    # fp16 keeps 11 bits; losses are means over hundreds of tokens
    assert losses(out) == pytest.approx(fp32[0], abs=0.02)
    model = model_of(tmp_path / "run")
    found = adapters_in(model).items()
    pruned = [(B, mask) for (_, owner), (_, B, _, mask) in found if owner != "shared"]
    assert all(not w[~m].any() for w, m in pruned)
    removed = sum(int((~m).sum()) for _, m in pruned) / sum(m.numel() for _, m in pruned)
    assert removed == pytest.approx(0.9, abs=0.001)


@pytest.mark.parametrize("flag", ["--checkpoint-activations", "--offload-activations"])
def test_checkpointed_activations_change_no_bit(corpus, tmp_path, fp32, flag):
    """With dropout, which is drawn again; offloading implies checkpointing."""
    save_dir = tmp_path / "run"
    _, out, _ = run("fairseq-train", *finetune_args(corpus, save_dir, flag))
    assert "checkpoint_activations=True" in out
    assert losses(out) == fp32[0]
    for key, value in model_of(save_dir).items():
        assert torch.equal(value, fp32[1][key]), key


PLACEMENTS = {
    "source token in front": LANGTOKS,
    "replacing </s> and <s>": [*LANGTOKS, "--lang-tok-replacing-bos-eos"],
    "target token on the source": ["--encoder-langtok", "tgt", "--encoder-index-side", "target"],
    "target token on the target alone": ["--decoder-langtok", "--encoder-index-side", "target"],
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_token_placements(corpus, tmp_path, placement):
    """Each language trains its own adapters wherever its token stands, and decodes with them."""
    pairs = "en-fr,ja-en"
    args = without(
        without(finetune_args(corpus, tmp_path / "run"), "--encoder-langtok"), LANGTOKS[2], 0
    )
    args = with_option(with_option(args, "--lang-pairs", pairs), "--max-epoch", "1")
    run("fairseq-train", *args, *PLACEMENTS[placement], "--pruning-final-sparsity", "0")
    model = model_of(tmp_path / "run")
    on_target = "--encoder-index-side" in PLACEMENTS[placement]
    expected = {
        "encoder.layers.0": {"en", "fr"} if on_target else {"en", "ja"},
        "encoder.layers.2": {"en", "fr"},  # the last quarter is indexed by the target
        "decoder.layers.0": {"en", "fr"},
    }
    moved = {layer: set() for layer in expected}
    for (name, language), (_, B, _, _) in adapters_in(model).items():
        layer = name.rpartition(".")[0]
        if layer in expected and language != "shared" and B.any():
            moved[layer].add(language)
    assert moved == expected
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    _, out, _ = run("fairseq-generate", *generate_args(corpus, checkpoint, "en", "fr"))
    assert len(re.findall(r"^H-", out, re.M)) == 8


def test_two_processes_give_what_one_gives(corpus, tmp_path):
    """Over gloo, with different languages on the two ranks, and one seen by neither."""

    def args(name, *more):
        # ja has adapters and no sentence; an odd number of batches gives one rank a dummy batch
        made = finetune_args(
            corpus, tmp_path / name, "--dropout", "0", "--weight-decay", "0.01", *more
        )
        made = with_option(made, "--lang-pairs", "en-de,fr-en")
        made = with_option(made, "--criterion", IN_PIECES)
        return [*made, "--batch-size", "8"]

    _, one, _ = run("fairseq-train", *args("one", "--update-freq", "2"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def process(rank):
        return run(
            "fairseq-train",
            *args(
                "two", "--ddp-backend", "legacy_ddp", "--distributed-backend", "gloo",
                "--distributed-world-size", "2", "--distributed-init-method",
                f"tcp://localhost:{port}", "--distributed-rank", str(rank),
                "--distributed-no-spawn",
            ),
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(process, range(2)))
    # 9 batches an epoch, so in the last update the second rank has a dummy batch
    assert re.findall(r"num_updates (\d+)", one)[-1] == "15"
    alone, together = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    for key, value in alone.items():
        torch.testing.assert_close(value, together[key], atol=1e-6, rtol=0, msg=key)
    for key, (A, B, _, _) in adapters_in(together).items():
        if key[1] == "ja":
            assert not B.any()
            assert torch.equal(A, adapters_in(alone)[key][0])
    assert losses(outputs[0][1]) == pytest.approx(losses(one), abs=2e-3)


def test_base_with_another_language_order_or_without_tokens(corpus, tmp_path):
    """Rows are matched by symbol: fine-tuning starts from the same function of the same text."""
    reordered = tmp_path / "reordered.pt"
    state = torch.load(corpus.base)
    order = LANGS.split(",")[::-1]
    table = state["model"]["encoder.embed_tokens.weight"]
    words = table.size(0) - len(order)
    for key, value in state["model"].items():
        if value.shape == table.shape:
            state["model"][key] = torch.cat([value[:words], value[words:].flip(0)])
    state["cfg"]["task"].langs = state["cfg"]["model"].langs = order
    torch.save(state, reordered)
    none = tmp_path / "none.pt"
    for key, value in state["model"].items():
        if value.shape == table.shape:
            state["model"][key] = value[:words].clone()
    state["cfg"]["task"].langs = state["cfg"]["model"].langs = []
    torch.save(state, none)
    found = {}
    for name, base in (("own", corpus.base), ("reordered", reordered), ("none", none)):
        args = with_option(finetune_args(corpus, tmp_path / name), "--finetune-from-model", base)
        args = [*with_option(args, "--max-epoch", "1"), "--lora-train-tokens", "none"]
        _, out, _ = run("fairseq-train", *args)
        found[name] = model_of(tmp_path / name), out
    own = found["own"][0]
    for key, value in found["reordered"][0].items():
        assert torch.equal(value, own[key]), key
    without_tokens, out = found["none"]
    key = "encoder.embed_tokens.weight"
    assert torch.equal(without_tokens[key][:words], own[key][:words])
    assert not torch.equal(without_tokens[key][words:], own[key][words:])
    assert "4 embedding rows are new to the base model" in out


def test_stock_checkpoints_decode_with_the_user_dir(corpus):
    _, out, _ = run(
        "fairseq-generate",
        *with_option(
            generate_args(
                corpus, corpus.base, "en", "de", "--langs", LANGS, "--lang-pairs", "en-de"
            ),
            "--task",
            "translation_multi_simple_epoch",
        ),
        *LANGTOKS,
    )
    assert len(re.findall(r"^H-", out, re.M)) == 8


def test_plain_adam_and_a_missing_base_are_warned_about(corpus, tmp_path):
    args = train_args(
        corpus, tmp_path / "run", "--arch", "lslora_transformer", "--optimizer", "adam",
        "--lora-tiers", "all=de,en,fr,ja", "--max-update", "1",
    )  # fmt: skip
    _, out, _ = run("fairseq-train", *args)
    assert "use pruned_adam" in out
    assert "the frozen base has random weights: name a pretrained model" in out

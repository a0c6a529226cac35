"""The main job in miniature, through the real console commands on real text."""

import re

import pytest
import torch
from console import LANGS, adapters_in, generate_args, run

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints


def test_training_logs_the_table_and_the_sparsity(finetuned):
    _, out = finetuned
    assert re.search(r"^total +4 +all +all +[\d,]+ +[\d.]+%$", out, re.M)
    assert re.search(r"^low +2 +all +all +", out, re.M)
    assert "sparsity 0.9 " in out.replace(" |", " ")
    assert "random weights" not in out


def test_only_adapters_moved(corpus, finetuned):
    base = torch.load(corpus.base)["model"]
    tuned = torch.load(finetuned[0])["model"]
    frozen = [key for key in tuned if key.endswith((".weight", ".bias"))]
    assert len(frozen) > 80 and all(torch.equal(tuned[key], base[key]) for key in frozen)
    adapters = adapters_in(tuned)
    assert len(adapters) == (3 + 2) * (4 + 1)  # languages, and shared
    assert all(B.any() for _, B, _, _ in adapters.values())


def test_every_language_ends_at_the_final_sparsity(finetuned):
    model = torch.load(finetuned[0])["model"]
    for language in LANGS.split(","):
        own = [found for (_, code), found in adapters_in(model).items() if code == language]
        assert all(mask_A.all() for _, _, mask_A, _ in own)
        assert all(not B[~mask].any() for _, B, _, mask in own)
        entries = sum(mask.numel() for _, _, _, mask in own)
        kept = sum(int(mask.sum()) for _, _, _, mask in own)
        assert entries - kept == int(0.9 * entries + 0.5)


@pytest.mark.parametrize("source, target", [("en", "fr"), ("ja", "en")])
def test_generate_takes_everything_from_the_checkpoint(corpus, finetuned, source, target):
    _, out, _ = run("fairseq-generate", *generate_args(corpus, finetuned[0], source, target))
    assert len(re.findall(r"^H-\d+\t", out, re.M)) == 8
    assert "BLEU4" in out
    flags = ["--langs", "de,en,fr,ja", "--lang-pairs", "en-fr", "--encoder-langtok", "src"]
    _, again, _ = run(
        "fairseq-generate",
        *generate_args(corpus, finetuned[0], source, target, *flags, "--decoder-langtok"),
    )
    assert _hypotheses(again) == _hypotheses(out)


def test_interactive_gives_the_hypotheses_of_generate(corpus, finetuned):
    _, out, _ = run("fairseq-generate", *generate_args(corpus, finetuned[0], "en", "ja"))
    sources = dict(re.findall(r"^S-(\d+)\t(?:__en__ )?(.*)$", out, re.M))
    args = generate_args(corpus, finetuned[0], "en", "ja")
    _, said, _ = run(
        "fairseq-interactive", *args, "--buffer-size", "8", "--batch-size", "8",
        stdin="\n".join(sources[str(i)] for i in range(8)) + "\n",
    )  # fmt: skip
    assert _hypotheses(said) == _hypotheses(out)


def test_the_adapters_matter_and_differ_by_language(corpus, finetuned, tmp_path):
    """Swapping two languages' adapters in the checkpoint changes what is decoded."""
    state = torch.load(finetuned[0])
    model = state["model"]
    for key in [key for key in model if key.endswith(".lora_fr")]:
        other = key.replace("lora_fr", "lora_ja")
        model[key], model[other] = model[other], model[key]
    torch.save(state, tmp_path / "swapped.pt")
    scores = {}
    for name, path in (("own", finetuned[0]), ("swapped", tmp_path / "swapped.pt")):
        _, out, _ = run("fairseq-generate", *generate_args(corpus, path, "en", "fr"))
        scores[name] = re.findall(r"^P-\d+\t(.*)$", out, re.M)
    assert scores["own"] != scores["swapped"]


def _hypotheses(out):
    return sorted(re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", out, re.M))

"""The 204 language codes of NLLB, on random text through the console commands."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from console import LANGTOKS, SIZES, USER_DIR, adapters_in, run, with_option

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

CODES = (USER_DIR.parent / "tests" / "data" / "nllb_codes.txt").read_text("utf-8").split()
TIERS = ("high", "medium", "low")
PAIRS = "eng_Latn-ace_Arab,ace_Arab-eng_Latn,zho_Hans-eng_Latn"
USED = {"eng_Latn", "ace_Arab", "zho_Hans"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs that is resumed for a third: its folder, arguments and both outputs."""
    folder = tmp_path_factory.mktemp("many")
    words = [f"w{i}" for i in range(40)]
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    tiers = folder / "tiers.tsv"
    tiers.write_text("".join(f"{c}\t{TIERS[i % 3]}\n" for i, c in enumerate(CODES)))
    chance = random.Random(0)
    for split, lines in (("train", 48), ("valid", 8), ("test", 8)):
        for code in USED:
            text = [" ".join(chance.choices(words, k=chance.randint(3, 9))) for _ in range(lines)]
            (folder / f"{split}.{code}").write_text("\n".join(text) + "\n")
    for lang in sorted(USED - {"eng_Latn"}):
        run(
            "fairseq-preprocess", "-s", "eng_Latn", "-t", lang, "--trainpref", folder / "train",
            "--validpref", folder / "valid", "--testpref", folder / "test", "--destdir",
            folder / "data", "--srcdict", folder / "dict.txt", "--tgtdict", folder / "dict.txt",
        )  # fmt: skip
    args = [
        folder / "data", "--user-dir", USER_DIR, "--cpu", "--task", "translation_multi_lslora",
        "--langs", ",".join(CODES), "--lang-pairs", PAIRS, *LANGTOKS, "--arch",
        "lslora_transformer", "--optimizer", "pruned_adam", "--lora-tiers", tiers, "--lora-rank",
        "high=1,medium=2,low=4", "--lora-shared-rank", "0", "--lora-embedding-rank", "0",
        "--pruning-begin", "1", "--pruning-duration", "1", "--criterion",
        "label_smoothed_cross_entropy", "--max-tokens", "300", "--num-workers", "0", "--lr",
        "0.01", "--save-dir", folder / "run", "--no-epoch-checkpoints", "--log-format", "simple",
        *SIZES, "--max-epoch", "2",
    ]  # fmt: skip
    _, first, _ = run("fairseq-train", *args)
    _, second, _ = run("fairseq-train", *with_option(args, "--max-epoch", "3"))
    return SimpleNamespace(folder=folder, args=args, outputs=(first, second))


def test_they_train_prune_save_and_resume(trained):
    first, second = trained.outputs
    losses = [
        float(loss)
        for out in (first, second)
        for loss in re.findall(r"\| train \| epoch \d+ \| loss ([\d.]+)", out)
    ]
    assert "Loaded checkpoint" in second
    assert len(losses) == 3 and losses[2] < losses[0]
    adapters = adapters_in(torch.load(trained.folder / "run" / "checkpoint_last.pt")["model"])
    assert {language for _, language in adapters} == set(CODES)
    moved = {language for (_, language), (_, B, _, _) in adapters.items() if B.any()}
    assert moved == USED
    trained_sides = 0
    for language in CODES:
        pruned = []
        for side in ("source", "target"):
            own = [
                (B, mask)
                for (layer, code), (_, B, _, mask) in adapters.items()
                if code == language and layer.endswith(f"{side}_adapters")
            ]
            if any(B.any() for B, _ in own):
                trained_sides += 1
                pruned += [~mask.flatten() for _, mask in own]
            else:  # never updated
                assert own and all(mask.all() for _, mask in own)
        entries = sum(mask.numel() for mask in pruned)
        assert sum(int(mask.sum()) for mask in pruned) == int(0.9 * entries + 0.5)
    assert trained_sides == 3 + 2
    for _, B, _, mask in adapters.values():
        assert not B[~mask].any()


def test_its_optimizer_state_is_that_of_the_languages_seen(trained):
    state = torch.load(trained.folder / "run" / "checkpoint_last.pt")["last_optimizer_state"]
    assert len(state["shapes"]) == 2 * len(CODES)
    assert len(state["state"]) == 3 + 2  # as sources and as targets


def test_the_log_is_as_long_as_with_three_languages(trained):
    first, _ = trained.outputs
    lines = first.splitlines()
    start = next(i for i, line in enumerate(lines) if f"adapters of {len(CODES)} languages" in line)
    table = [line.split() for line in lines[start + 1 :]][: 3 * 14 + 2]
    # header; in each tier 5 modules of source layers, 8 of target layers and their sum; total
    assert table[0][:2] == ["tier", "languages"]
    assert [row[0] for row in table[1:-1]] == [tier for tier in TIERS for _ in range(14)]
    assert table[-1][:2] == ["total", f"{len(CODES)}"]
    # options, the data's and the checkpoint's, are the only lines that name all languages
    naming_all = [line for line in lines if all(code in line for code in CODES)]
    assert len(naming_all) <= 6
    others = [line for line in lines if line not in naming_all]
    assert max(map(len, others)) < 400
    assert len(lines) < 300


def test_they_decode(trained):
    _, out, _ = run(
        "fairseq-generate", trained.folder / "data", "--user-dir", USER_DIR, "--cpu", "--task",
        "translation_multi_lslora", "--path", trained.folder / "run" / "checkpoint_last.pt", "-s",
        "ace_Arab", "-t", "eng_Latn", "--beam", "2", "--max-len-b", "10", "--num-workers", "0",
        "--required-batch-size-multiple", "1",
    )  # fmt: skip
    assert len(re.findall(r"^H-", out, re.M)) == 8

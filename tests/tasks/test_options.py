"""What a command takes from the checkpoint that it loads, and what it refuses."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from commands import build, decoding, refused, set_up_decoding, training
from console import LANGS, PAIRS, with_option, without

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.tasks.options import begin_adapters, check_continued, restore_lora_options


def checkpoint(path, **more):
    """A checkpoint file that tells what it was trained with, and has no weights."""
    trained = dict(
        langs=LANGS.split(","), lang_pairs=PAIRS, encoder_langtok="src", decoder_langtok=True,
        optimizer="pruned_adam", arch="lslora_transformer", lora_tiers="high=de,en;low=fr,ja",
        lora_rank="high=2,low=4", lora_alpha=None, lora_dropout=0.0,
        encoder_target_modules="fc1", decoder_target_modules="fc1,fc2", encoder_lora_layers="0-1",
        decoder_lora_layers=None, encoder_index_side="source*1,target*2",
        decoder_index_side="target", lora_shape="full",
    )  # fmt: skip
    torch.save({"model": {}, "args": Namespace(**{**trained, **more})}, path)
    return str(path)


def resuming(data, save_dir, *more):
    """A resumed command line without any option of the adapters."""
    words = without(without(training(data, *more), "--lora-tiers"), "--lora-rank")
    return with_option(words, "--save-dir", str(save_dir))


def test_a_resumed_run_takes_its_adapters_from_the_checkpoint(data, tmp_path):
    checkpoint(tmp_path / "checkpoint_last.pt")
    _, model = build(resuming(data, tmp_path, "--finetune-from-model", "/gone.pt"))
    assert model.plan.ranks == (2, 2, 4, 4)
    assert [s.side for s in model.plan.sites if s.stack == "encoder"] == ["source", "target"]
    assert [s.name for s in model.plan.sites if s.stack == "encoder"] == [
        "encoder.layers.0.fc1",
        "encoder.layers.1.fc1",
    ]


def test_a_resumed_run_learns_weights_as_its_checkpoint_did(data, tmp_path):
    checkpoint(
        tmp_path / "checkpoint_last.pt", lora_weight_learning=True, encoder_index_side=None,
        decoder_index_side=None,
    )  # fmt: skip
    for given in ([], ["--lora-weight-learning"]):
        _, model = build(resuming(data, tmp_path, *given))
        assert model.plan.weight_learning


def test_options_that_say_the_same_are_accepted(data, tmp_path):
    checkpoint(tmp_path / "checkpoint_last.pt")
    tiers = tmp_path / "tiers.tsv"
    tiers.write_text("ja\tlow\nfr\tlow\nen\thigh\nde\thigh\n")
    for spelled in (str(tiers), "low=ja,fr;high=de,en"):
        _, model = build(
            resuming(data, tmp_path, "--lora-tiers", spelled, "--lora-rank", "high=2,low=4")
        )
        assert model.plan.languages.spec == "high=de,en;low=fr,ja"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lora-rank", "4"], "--lora-rank 4 differs from high=2,low=4 of {path}, which this run"),
        (["--lora-tiers", "all=de,en,fr,ja"], "--lora-tiers all=de,en,fr,ja differs from high="),
        (["--lora-dropout", "0.1"], "--lora-dropout 0.1 differs from 0.0 of {path}"),
        (["--lora-weight-learning"], "--lora-weight-learning True differs from False of {path}"),
        (["--encoder-index-side", "source"], "--encoder-index-side source differs from source*1,"),
        (["--decoder-target-modules", "fc1"], "--decoder-target-modules fc1 differs from fc1,fc2"),
        (["--lora-shared-rank", "2"], "--lora-shared-rank 2 differs from 0 of {path}, which this"),
        (["--lora-embedding-rank", "2"], "--lora-embedding-rank 2 differs from 0 of {path}, which"),
        (["--lora-train-languages", "fr"], "--lora-train-languages fr differs from None of {path}"),
    ],
)
def test_a_resumed_run_refuses_other_adapters(data, tmp_path, more, message):
    path = checkpoint(tmp_path / "checkpoint_last.pt")
    before = Path(path).read_bytes()
    refused(build, resuming(data, tmp_path, *more), message.format(path=path))
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "was_kept, given", [("en", []), (None, ["--lora-train-languages", "ja,en"])]
)
def test_a_further_stage_decides_itself_what_it_trains(data, tmp_path, was_kept, given):
    trained = {"lora_shared_rank": 3, "lora_shared_alpha": 6.0, "lora_train_languages": was_kept}
    trained["lora_embedding_rank"] = 2
    path = checkpoint(tmp_path / "first.pt", **trained)
    _, model = build(resuming(data, tmp_path / "x", "--finetune-from-model", path, *given))
    assert (model.plan.shared_rank, model.plan.shared_alpha) == (3, 6.0)
    assert model.plan.embedding_rank == 2
    assert model.plan.trained == (("en", "ja") if given else None)
    message = f"--lora-shared-rank 4 differs from 3 of {path}, which this run starts from: leave"
    more = ["--finetune-from-model", path, "--lora-shared-rank", "4"]
    refused(build, resuming(data, tmp_path / "x", *more), message)
    checkpoint(tmp_path / "checkpoint_last.pt", **trained)  # and a run that goes on does not
    if was_kept:
        for more in ([], ["--lora-train-languages", " en "]):
            assert build(resuming(data, tmp_path, *more))[1].plan.trained == ("en",)


@pytest.mark.parametrize("is_new", [False, True])
def test_what_is_not_there_cannot_be_kept(data, tmp_path, is_new):
    path = checkpoint(tmp_path / "base.pt", lora_tiers=None)
    words = training(data, "--lora-shared-rank", "2", "--lora-train-languages", "fr")
    words += ["--save-dir", str(tmp_path)] if is_new else ["--finetune-from-model", path]
    has_none = "a new model" if is_new else path
    message = f"--lora-train-languages keeps the other languages' adapters, and {has_none} has none"
    refused(build, words, message)


@pytest.mark.parametrize("langs", ["ja,fr,en,de", "de,en,fr,ja,ko"])
def test_a_resumed_run_refuses_other_langs(data, tmp_path, langs):
    path = checkpoint(tmp_path / "checkpoint_last.pt")
    message = f"{path} was trained with --langs de,en,fr,ja, this run has {langs}: the order numbe"
    refused(build, with_option(resuming(data, tmp_path), "--langs", langs), message)


def test_of_two_long_lists_the_message_shows_where_they_differ():
    codes = [f"l{number}" for number in range(200)]
    swapped = [*codes[:90], codes[91], codes[90], *codes[92:]]
    saved = {"langs": codes, "lora_tiers": f"all={','.join(codes)}"}
    message = (
        "x.pt was trained with --langs …l90,l91,l92,l93,l94,l95,l96,l97,… (200 in all), this run "
        "has …l91,l90,l92,l93,l94,l95,l96,l97,… (200 in all): the order numbers"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_continued(Namespace(), "x.pt", saved, swapped)
    tiers = Namespace(lora_tiers=f"all={','.join(codes[:-1])};low={codes[-1]}")
    message = (
        "--lora-tiers …l198;low=l199 (200 in all) differs from …l198,l199 (200 in all) of x.pt, "
        "which this run resumes"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        restore_lora_options(tiers, "x.pt", saved)


RANKS = ("lora_shared_rank", "lora_embedding_rank")


@pytest.mark.parametrize(
    "given, ranks",
    [
        ({"share_all_embeddings": True}, (16, 48)),
        ({"share_all_embeddings": True, "encoder_embed_dim": 32}, (16, 32)),
        ({"share_all_embeddings": True, "words": 28}, (16, 28)),
        ({"share_all_embeddings": True, "lora_shared_rank": 0}, (0, 48)),
        ({"share_all_embeddings": True, "lora_embedding_rank": 3}, (16, 3)),
        ({}, (16, 0)),  # several matrices
        ({"share_all_embeddings": True, "adaptive_softmax_cutoff": "9"}, (16, 0)),
    ],
)
def test_new_adapters_are_shared_and_of_embeddings_too_unless_told(given, ranks):
    args = Namespace(**{"encoder_embed_dim": 512, **given})
    begin_adapters(args, given.pop("words", 1000))
    assert tuple(getattr(args, name) for name in RANKS) == ranks


def test_a_checkpoint_older_than_the_options_has_none():
    args = Namespace(share_all_embeddings=True)
    restore_lora_options(args, "x.pt", {"lora_tiers": "all=de,en"}, is_fresh=True)
    begin_adapters(args, 1000)
    assert [getattr(args, name) for name in RANKS] == [0, 0]


def test_a_resumed_run_refuses_another_optimizer_unless_it_is_reset(data, tmp_path):
    path = checkpoint(tmp_path / "checkpoint_last.pt", optimizer="pruned_sgd")
    message = (
        f"{path} was trained with --optimizer pruned_sgd, this run has pruned_adam: resume with "
        "the old one, or add --reset-optimizer (and leave out --finetune-from-model)"
    )
    refused(build, resuming(data, tmp_path), message)
    build(resuming(data, tmp_path, "--reset-optimizer"))


def test_a_damaged_checkpoint_is_not_resumed(data, tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    checkpoint(path)
    path.write_bytes(path.read_bytes()[:-50])
    refused(build, resuming(data, tmp_path), f"cannot read the checkpoint {path} (")


def test_decoding_takes_languages_and_tokens_from_the_checkpoint(data, tmp_path):
    path = checkpoint(tmp_path / "model.pt", langs=["ja", "fr", "en", "de"])
    task, args = set_up_decoding(
        with_option(decoding(data, "-s", "en", "-t", "fr"), "--path", f"{path}:{tmp_path}/other")
    )
    assert task.langs == args.langs == ["ja", "fr", "en", "de"]
    assert (args.encoder_langtok, args.decoder_langtok) == ("src", True)
    assert task.source_dictionary.symbols[-4:] == ["__ja__", "__fr__", "__en__", "__de__"]


def test_the_command_line_decides_for_a_checkpoint_of_stock_fairseq(data, tmp_path):
    path = checkpoint(tmp_path / "model.pt", lora_tiers=None)
    words = ["-s", "en", "-t", "fr", "--langs", "fr,en", "--lang-pairs", "en-fr"]
    task, args = set_up_decoding(with_option(decoding(data, *words), "--path", path))
    assert task.langs == ["fr", "en"] and args.encoder_langtok is None


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "decoding needs both languages of a direction: give -s and -t"),
        (["-s", "en"], "decoding needs both languages of a direction: give -s and -t"),
        (["-t", "en"], "decoding needs both languages of a direction: give -s and -t"),
        (["-s", "en", "-t", "ko"], "en-ko: ko is absent from --langs (de,en,fr,ja): choose one of"),
        (["-s", "ko", "-t", "en"], "ko-en: ko is absent from --langs (de,en,fr,ja): choose one of"),
        (
            ["-s", "en", "-t", "fr", "--langs", "fr,en,de,ja"],
            "--langs fr,en,de,ja differs from de,en,fr,ja, with which {path} was trained: leave",
        ),
        (
            ["-s", "en", "-t", "fr", "--encoder-langtok", "tgt"],
            "--encoder-langtok tgt differs from src, with which {path} was trained: leave the opti",
        ),
        (["-s", "en", "-t", "fr", "--path", "/none.pt"], "--path /none.pt: no such file: name the"),
    ],
)
def test_decoding_refuses(data, tmp_path, more, message):
    path = checkpoint(tmp_path / "model.pt")
    words = with_option(decoding(data), "--path", path)
    refused(set_up_decoding, [*words, *more], message.format(path=path))


def test_decoding_refuses_a_damaged_checkpoint(data, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04")
    words = with_option(decoding(data, "-s", "en", "-t", "fr"), "--path", path)
    refused(set_up_decoding, words, f"cannot read the checkpoint {path} (")


def test_a_direction_in_which_nothing_is_trained_is_refused(data, tmp_path):
    path = checkpoint(tmp_path / "first.pt")
    words = resuming(data, tmp_path / "x", "--finetune-from-model", path)
    words += ["--lora-train-languages", "ja"]
    message = "--lora-train-languages ja: en-de, de-en, en-fr, fr-en would train nothing: leave"
    refused(build, words, message)
    _, model = build(with_option(words, "--lang-pairs", "en-ja,ja-en"))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_ja"
    }

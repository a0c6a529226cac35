"""What the task checks while it and a model are built, from the words of a command line."""

import logging
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from console import LANGS, LANGTOKS, PAIRS, SIZES, TIERS, with_option, without
from fairseq import options
from omegaconf import OmegaConf

from lslora_fairseq import unsupported
from lslora_fairseq.errors import ConfigError, UserError
from lslora_fairseq.tasks import translation_multi_lslora
from lslora_fairseq.tasks.options import check_continued, restore_lora_options


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with dictionaries alone: all that building a task and a model reads."""
    folder = tmp_path_factory.mktemp("data")
    for lang in LANGS.split(","):
        (folder / f"dict.{lang}.txt").write_text("".join(f"w{i} 1\n" for i in range(20)))
    return str(folder)


def training(data, *more):
    return [
        data, "--task", "translation_multi_lslora", "--arch", "lslora_transformer", "--langs",
        LANGS, "--lang-pairs", PAIRS, *LANGTOKS, "--optimizer", "pruned_adam", "--lora-tiers",
        TIERS, "--lora-rank", "high=2,low=4", "--save-dir", "/nonexistent", *SIZES, *more,
    ]  # fmt: skip


def decoding(data, *more):
    return [data, "--task", "translation_multi_lslora", "--path", "model.pt", *more]


Task = translation_multi_lslora.TranslationMultiLSLoTask


def set_up(words, parser=options.get_training_parser):
    args = options.parse_args_and_arch(parser(), list(map(str, words)))
    return Task.setup_task(args), args


def build(words):
    task, args = set_up(words)
    return task, task.build_model(args)


def set_up_decoding(words):
    return set_up(words, options.get_generation_parser)


def refused(function, words, message):
    with pytest.raises(UserError, match=f"^lslora: error: {re.escape(message)}") as caught:
        function(words)
    assert "\n" not in str(caught.value)


def test_a_good_command_line_builds(data):
    task, model = build(training(data))
    assert task.languages.codes == ("de", "en", "fr", "ja")
    assert model.plan.ranks == (2, 2, 4, 4)
    assert len(task.source_dictionary) == 28
    assert task.source_dictionary.rows_in_file == 24


@pytest.mark.parametrize(
    "option, value, message",
    [
        (
            "--lora-tiers",
            "high=en,de;low=fr",
            "no adapter for ja of the data: add it to --lora-tiers (adapters: de, en, fr)",
        ),
        (
            "--lora-tiers",
            "high=en,de;low=fr,ja,ko",
            "--lora-tiers has ko, absent from --langs (de,en,fr,ja), and would have no language "
            "token: take it out of --lora-tiers, or add it to --langs",
        ),
        ("--lora-tiers", "high=en,EN,de;low=fr,ja", "--lora-tiers: languages EN and en differ on"),
        ("--lora-rank", "high=2,medium=4", "--lora-rank: medium is neither a tier (high, low) nor"),
        ("--lora-rank", "0", "--lora-rank: rank 0 of de must lie between 1 and 32"),
        ("--lora-rank", "33", "--lora-rank: rank 33 of de must lie between 1 and 32"),
        ("--lang-pairs", "en-ko", "en-ko: ko is absent from --langs (de,en,fr,ja): choose one"),
        ("--lang-pairs", "en-de,enfr", "--lang-pairs: cannot read 'enfr': write source-target"),
        ("--lang-pairs", "zh-CN-en", "--lang-pairs: cannot read 'zh-CN-en': write source-target"),
        ("--lang-pairs", "en-", "--lang-pairs: cannot read 'en-': write source-target"),
    ],
)
def test_languages_must_agree(data, option, value, message):
    refused(build, with_option(training(data), option, value), message)


def test_a_language_needs_an_adapter_on_the_sides_that_index_a_layer(data):
    """ja is a source alone, and no layer is indexed by the source language."""
    words = with_option(training(data), "--lora-tiers", "high=en,de;low=fr")
    words = with_option(words, "--lang-pairs", "ja-en,en-de")
    refused(build, words, "no adapter for ja of the data")
    task, _ = build([*words, "--encoder-index-side", "target"])
    assert task.languages.codes == ("de", "en", "fr")


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--encoder-index-side", "source*9,target*3"],
            "--encoder-index-side=source*9,target*3 names a side for 12 layers, the model has 3: "
            "make the counts add up",
        ),
        (
            ["--decoder-target-modules", "fc1,cross_attn.q_proj"],
            "--decoder-target-modules: unknown module 'cross_attn.q_proj'; valid: self_attn.q_proj",
        ),
        (["--pruning-final-sparsity", "1"], "--pruning-final-sparsity 1.0 must lie in [0, 1): 0"),
        (["--pruning-final-sparsity", "-0.5"], "--pruning-final-sparsity -0.5 must lie in [0, 1)"),
        (["--pruning-duration", "0"], "--pruning-duration 0 must be at least 1"),
        (["--pruning-unit", "batch"], "--pruning-unit batch must be epoch or update"),
        (["--pruning-scope", "all"], "--pruning-scope all must be language or layer"),
        (["--finetune-from-model", "/none.pt"], "--finetune-from-model /none.pt: no such file: n"),
        (
            ["--finetune-from-model", "base.pt", "--reset-optimizer"],
            "--finetune-from-model and --reset-optimizer exclude each other: leave out "
            "--finetune-from-model to resume a run, or --reset-optimizer to start from the base",
        ),
        (
            ["--finetune-from-model", "base.pt", "--restore-file", "other.pt"],
            "--finetune-from-model and --restore-file exclude each other: leave out",
        ),
        (["--restore-file", "/none.pt"], "--restore-file /none.pt: no such file, and nothing to"),
    ],
)
def test_options_are_refused_before_anything_is_trained(data, more, message):
    refused(build, training(data, *more), message)


UNSUPPORTED = [
    "--encoder-layerdrop 0.1", "--decoder-layerdrop 0.1", "--encoder-layers-to-keep 0,2",
    "--decoder-layers-to-keep 0", "--base-layers 1", "--encoder-xformers-att-config {'name':'x'}",
    "--decoder-xformers-att-config {'name':'x'}", "--no-cross-attention", "--quant-noise-pq 0.1",
    "--quant-noise-scalar 0.1", "--quantization-config-path q.yaml", "--model-parallel-size 2",
    "--pipeline-model-parallel", "--store-ema", "--use-bmuf", "--zero-sharding os",
    "--ddp-backend fully_sharded", "--ddp-backend slowmo",
]  # fmt: skip


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_options_that_do_not_work_with_adapters_are_refused(data, words):
    option = words if words.startswith("--ddp-backend") else words.split()[0]
    refused(
        build, training(data, *words.split()), f"{option} does not work with adapters: leave it out"
    )


def test_every_unsupported_option_is_among_these():
    tried = {words.split()[0].lstrip("-").replace("-", "_") for words in UNSUPPORTED}
    assert tried == {*unsupported.MODEL, *unsupported.TRAINING, "ddp_backend"}


@pytest.mark.parametrize(
    "given, told", [("tpu", "tpu"), ("bf16", "bf16"), ("memory-efficient-bf16", "bf16")]
)
def test_bf16_which_fairseq_trains_on_a_tpu_is_refused(data, given, told):
    message = f"--{told} makes fairseq train on a TPU, where adapters were never tried: use --amp"
    refused(build, training(data, f"--{given}"), message)


PROCESSES = {
    "--ddp-backend pytorch_ddp": "needs --find-unused-parameters, since a process may have no "
    "sentence of a language: add it, or use --ddp-backend legacy_ddp",
    **dict.fromkeys(
        [
            "--ddp-backend c10d --find-unused-parameters --checkpoint-activations",
            "--ddp-backend c10d --find-unused-parameters --offload-activations",
        ],
        "does not work with --checkpoint-activations or --offload-activations: use --ddp-backend "
        "legacy_ddp",
    ),
    "--ddp-backend c10d --find-unused-parameters": None,
    "--ddp-backend legacy_ddp --checkpoint-activations": None,
    "--ddp-backend no_c10d": None,
}


@pytest.mark.parametrize("words", PROCESSES)
def test_backends_that_would_wait_for_absent_languages_are_refused(data, monkeypatch, words):
    words, message = words.split(), PROCESSES[words]
    build(training(data, *words))  # one process
    monkeypatch.setattr(translation_multi_lslora, "get_global_world_size", lambda: 2)
    if message is None:
        build(training(data, *words))
    else:
        refused(build, training(data, *words), f"{words[0]} {words[1]} with 2 processes {message}")


@pytest.mark.parametrize("version, message", [("2.3.1", "and --update-freq does"), ("2.4.0", None)])
def test_an_old_torch_loses_gradients_of_several_batches(data, monkeypatch, version, message):
    words = "--ddp-backend c10d --find-unused-parameters --update-freq 1,2".split()
    monkeypatch.setattr(translation_multi_lslora, "get_global_world_size", lambda: 2)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    if message is None:
        build(training(data, *words))
    else:
        refused(build, training(data, *words), f"--ddp-backend c10d with 2 processes {message}")


def test_fp16_keeps_the_languages_apart(data):
    """As if --fp16-no-flatten-grads had been given."""
    _, args = set_up(training(data, "--fp16"))
    assert args.fp16_no_flatten_grads


@pytest.mark.parametrize(
    "missing, values, needed, more",
    [
        ("--encoder-langtok", 1, "source", []),
        ("--decoder-langtok", 0, "target", []),
        ("--decoder-langtok", 0, "target", ["--encoder-index-side", "source"]),
    ],
)
def test_language_tokens_are_needed_where_a_layer_is_indexed(data, missing, values, needed, more):
    flag = {"source": "--encoder-langtok src", "target": "--decoder-langtok"}[needed]
    message = (
        f"layers indexed by the {needed} language need its token in every sentence, and the data "
        f"has none: add {flag} (for --extra-data: --langtoks), or index those layers by the other"
    )
    refused(build, without(training(data, *more), missing, values), message)


def test_a_category_of_extra_data_without_tokens_is_refused(data):
    words = training(
        data, "--extra-data", f"{{'mined': '{data}'}}", "--extra-lang-pairs", "{'mined': 'en-fr'}"
    )
    refused(build, words, "layers indexed by the source language need its token in every")
    build([*words, "--langtoks", "{'mined': ('src', 'tgt')}"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda words: ["/none", *words[1:]], "/none/dict.de.txt: no such file: name the folder"),
        (lambda words: [*words, "--fixed-dictionary", "/none"], "/none: no such file: name the"),
        (lambda words: without(words, "--lang-pairs"), "--lang-pairs is required"),
        (
            lambda words: [*words, "--lang-dict", "langs.txt"],
            "--langs and --lang-dict can not both",
        ),
        (lambda words: without(words, "--lora-tiers"), "--lora-tiers is missing: list the langua"),
    ],
)
def test_missing_files_and_options(data, change, message):
    refused(build, change(training(data)), message)


def warnings_of(caplog, words):
    with caplog.at_level(logging.WARNING, "lslora_fairseq"):
        build(words)
    found = [r.getMessage() for r in caplog.records if r.name.startswith("lslora_fairseq")]
    return [text for text in found if not text.startswith("the frozen base has random weights")]


@pytest.mark.parametrize("epochs, warned", [("11", True), ("12", False), ("0", False)])
def test_a_schedule_that_ends_after_the_run_is_a_warning(data, caplog, epochs, warned):
    found = warnings_of(caplog, training(data, "--max-epoch", epochs))
    assert len(found) == warned
    if warned:
        assert found[0].startswith(
            "the pruning schedule ends at epoch 12, after the run's last (11)"
        )


def test_an_optimizer_that_moves_absent_languages_is_a_warning(data, caplog):
    (warning,) = warnings_of(caplog, with_option(training(data), "--optimizer", "adam"))
    assert "use pruned_adam (with --pruning-final-sparsity 0 for no pruning)" in warning


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
    ],
)
def test_a_resumed_run_refuses_other_adapters(data, tmp_path, more, message):
    path = checkpoint(tmp_path / "checkpoint_last.pt")
    before = Path(path).read_bytes()
    refused(build, resuming(data, tmp_path, *more), message.format(path=path))
    assert Path(path).read_bytes() == before


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


def test_a_sentencepiece_model_that_is_missing_or_none(data, tmp_path):
    task, _ = set_up(training(data))
    text = tmp_path / "spm.model"
    text.write_text("not a model\n")
    remedy = "name the model that made the training data"
    for model, message in (
        ("???", f"--sentencepiece-model is missing: {remedy}"),
        ("/none.model", f"--sentencepiece-model /none.model: no such file: {remedy}"),
        (str(text), f"--sentencepiece-model {text} is no SentencePiece model: {remedy}"),
    ):
        args = OmegaConf.create({"_name": "sentencepiece", "sentencepiece_model": model})
        refused(task.build_bpe, args, message)


def test_a_traceback_is_shown_on_request(data, monkeypatch):
    monkeypatch.setenv("LSLORA_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="^--lora-rank: rank 0 of de"):
        build(with_option(training(data), "--lora-rank", "0"))

"""What the task checks while it and a model are built, from the words of a command line."""

import logging

import pytest
import torch
from commands import build, refused, set_up, training
from console import with_option, without
from omegaconf import OmegaConf

from lslora_fairseq import unsupported
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.tasks import translation_multi_lslora


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
        ("--lora-rank", "high=0,low=2", "--lora-rank: rank 0 of de must lie between 1 and 32"),
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


def test_shared_adapters_alone_need_no_language_and_no_token(data):
    words = with_option(training(data), "--lora-rank", "0")
    words = without(without(words, "--encoder-langtok"), "--decoder-langtok", 0)
    words = with_option([*words, "--lora-shared-rank", "2"], "--lora-tiers", "high=en,de")
    _, model = build(words)
    assert not model.plan.sites and model.plan.shared_sites


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


BASE_DTYPES = {
    "--lora-base-dtype float16": "must be fp32, bf16 or fp16",
    **{
        f"--lora-base-dtype bf16 {other}": f"and {other} exclude each other: leave one of them out"
        for other in (
            "--fp16", "--amp", "--bf16", "--memory-efficient-fp16", "--memory-efficient-bf16"
        )
    },
    "--lora-base-dtype fp16 --write-checkpoints-asynchronously": "does not work with "
    "--write-checkpoints-asynchronously, which writes into the file that a resumed run reads its "
    "base from: leave it out",
}  # fmt: skip


@pytest.mark.parametrize("words", BASE_DTYPES)
def test_what_a_base_in_half_precision_does_not_go_with(data, words):
    words, told = words.split(), BASE_DTYPES[words]
    refused(build, training(data, *words), f"{words[0]} {words[1]} {told}")


def test_the_dtype_of_the_base_is_that_of_one_run(data):
    """What is saved says nothing of it: a checkpoint decodes in fp32."""
    task, model = build(training(data, "--lora-base-dtype", "bf16"))
    assert model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    assert task.args.lora_base_dtype == "fp32"


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
    with pytest.raises(ConfigError, match="^--lora-rank: rank 33 of de"):
        build(with_option(training(data), "--lora-rank", "33"))

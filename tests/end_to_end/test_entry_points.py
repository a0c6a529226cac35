"""Ways into a fine-tuned model beyond one fairseq-generate a direction: Python, validation and
training of one direction, ensembles, other processes that load data."""

import itertools
import re
import sys

import pytest
import torch
from console import (
    LANGS,
    PAIRS,
    USER_DIR,
    adapters_in,
    finetune_args,
    generate_args,
    run,
    with_option,
    without,
)
from fairseq import checkpoint_utils, utils

import lslora_fairseq  # noqa: F401  registers the task
from lslora_fairseq.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def tuned(corpus, tmp_path_factory):
    """Path of a model with adapters that matter."""
    save_dir = tmp_path_factory.mktemp("tuned")
    run("fairseq-train", *finetune_args(corpus, save_dir, "--disable-validation"))
    return str(save_dir / "checkpoint_last.pt")


def load(corpus, path, **overrides):
    overrides = {"data": str(corpus.data), **overrides}
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides=overrides
    )
    cfg.generation.beam, cfg.generation.max_len_b = 3, 30
    return model.eval(), cfg, task


def direct(task, pair):
    task.args.source_lang, task.args.target_lang = pair.split("-")


def dataset(corpus, task, pair):
    """The test sentences of a direction."""
    source = pair.split("-")[0]
    pieces = (corpus.data.parent / f"test.{source}").read_text("utf-8").splitlines()
    lines = [task.source_dictionary.encode_line(x, add_if_not_exist=False).long() for x in pieces]
    return task.build_dataset_for_inference(lines, [len(x) for x in lines])


def decode(model, cfg, task, data):
    """(tokens, score) of the best hypothesis of each sentence."""
    batch = data.collater([data[i] for i in range(len(data))])
    hypos = task.inference_step(task.build_generator([model], cfg.generation), [model], batch)
    found = dict(zip(batch["id"].tolist(), hypos))
    return [(found[i][0]["tokens"].tolist(), float(found[i][0]["score"])) for i in sorted(found)]


def same(found, expected):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    # sums over the same numbers in another order
    assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-5)


def decoded_alone(corpus, path, pair):
    """Those of a model that is loaded for this direction, its adapters merged as in
    fairseq-generate."""
    source, target = pair.split("-")
    model, cfg, task = load(corpus, path, source_lang=source, target_lang=target)
    model.prepare_for_inference_(cfg)
    assert not list(model.adapted_linears())
    return decode(model, cfg, task, dataset(corpus, task, pair))


DIRECTIONS = ["en-de", "fr-en", "en-ja"]


@pytest.mark.parametrize(
    "overrides, directions",
    [
        ({}, DIRECTIONS),
        # fairseq then reads the dictionaries of these two languages alone
        ({"source_lang": "en", "target_lang": "de"}, ["en-de", "de-en"]),
    ],
    ids=["loaded without a direction", "loaded for one"],
)
def test_one_loaded_model_serves_every_direction(corpus, tuned, overrides, directions):
    model, cfg, task = load(corpus, tuned, **overrides)
    for pair in directions:
        direct(task, pair)
        found = decode(model, cfg, task, dataset(corpus, task, pair))
        same(found, decoded_alone(corpus, tuned, pair))


def test_sentences_keep_the_languages_that_they_were_prepared_with(corpus, tuned):
    """Also where the task has gone on to another direction in between."""
    model, cfg, task = load(corpus, tuned)
    prepared = {}
    for pair in DIRECTIONS:
        direct(task, pair)
        prepared[pair] = dataset(corpus, task, pair)
    for pair, data in prepared.items():
        direct(task, "fr-en")
        same(decode(model, cfg, task, data), decoded_alone(corpus, tuned, pair))


def test_scores_are_those_of_fairseq_generate(corpus, tuned):
    args = generate_args(corpus, tuned, "fr", "en", "--required-batch-size-multiple", "1")
    _, out, _ = run("fairseq-generate", *args)
    printed = {int(n): float(s) for n, s in re.findall(r"^H-(\d+)\t(\S+)", out, re.M)}
    found = decoded_alone(corpus, tuned, "fr-en")
    # printed to the base 2
    expected = [s / torch.tensor(2.0).log().item() for _, s in found]
    assert [printed[i] for i in sorted(printed)] == pytest.approx(expected, abs=1e-4)


def test_a_merged_model_refuses_another_direction(corpus, tuned):
    model, cfg, task = load(corpus, tuned, source_lang="en", target_lang="de")
    model.prepare_for_inference_(cfg)
    direct(task, "de-en")
    with pytest.raises(RuntimeError, match="merged into the weights.*load the checkpoint anew"):
        decode(model, cfg, task, dataset(corpus, task, "de-en"))


def test_a_direction_that_nothing_tells_is_an_error(corpus, tuned):
    model, cfg, task = load(corpus, tuned)
    direct(task, "en-de")
    generator = task.build_generator([model], cfg.generation)
    sample = {"net_input": {"src_tokens": torch.tensor([[5, 6, 2]])}}
    task.args.source_lang = None
    with pytest.raises(ConfigError, match="the source language of the sentences is not known: set"):
        task.inference_step(generator, [model], sample)


def validation_loss(corpus, path, **direction):
    """Sum of the validation loss, and its number of tokens, as fairseq-validate computes it."""
    model, cfg, task = load(corpus, path, **direction)
    task.load_dataset("valid")
    criterion = task.build_criterion(cfg.criterion)
    itr = task.get_batch_iterator(task.datasets["valid"], max_sentences=5, epoch=1)
    sums = torch.zeros(2, dtype=torch.double)
    for sample in itr.next_epoch_itr(shuffle=False):
        _, size, log = task.valid_step(sample, model, criterion)
        sums += torch.tensor([float(log["loss"]), float(size)], dtype=torch.double)
    return sums


def test_directions_validate_one_by_one(corpus, tuned):
    pairs = [pair.split("-") for pair in PAIRS.split(",")]
    alone = [validation_loss(corpus, tuned, source_lang=s, target_lang=t) for s, t in pairs]
    together = validation_loss(corpus, tuned)
    torch.testing.assert_close(sum(alone), together, rtol=1e-5, atol=0)
    loss, size = alone[0]
    _, out, _ = run(
        "fairseq-validate", corpus.data, "--user-dir", USER_DIR, "--cpu", "--task",
        "translation_multi_lslora", "--path", tuned, "--valid-subset", "valid", "--max-tokens",
        "600", "-s", pairs[0][0], "-t", pairs[0][1], "--num-workers", "0",
        "--required-batch-size-multiple", "1",
    )  # fmt: skip
    printed = float(re.findall(r"\| valid on 'valid' subset \| loss ([\d.]+)", out)[-1])
    assert printed == pytest.approx(float(loss / size) / torch.tensor(2.0).log().item(), abs=2e-3)


def test_one_direction_is_trained(corpus, tmp_path):
    """Only the adapters that it passes through move, and those of all."""
    args = finetune_args(corpus, tmp_path, "-s", "en", "-t", "de", "--disable-validation")
    run("fairseq-train", *with_option(args, "--max-epoch", "1"))
    model = torch.load(tmp_path / "checkpoint_last.pt")["model"]
    moved = {
        (layer.split(".")[-1].removesuffix("_adapters"), code)
        for (layer, code), (_, B, _, _) in adapters_in(model).items()
        if B.any()
    }
    assert moved == {("source", "en"), ("target", "de"), ("shared", "shared")}


def test_an_ensemble_with_the_stock_base(corpus, tuned):
    outs = []
    for path in itertools.permutations([tuned, str(corpus.base)]):
        _, out, _ = run("fairseq-generate", *generate_args(corpus, ":".join(path), "en", "fr"))
        outs.append(re.findall(r"^H-.*", out, re.M))
    assert len(outs[0]) > 3
    assert [line.split("\t")[::2] for line in outs[0]] == [x.split("\t")[::2] for x in outs[1]]
    scores = [[float(line.split("\t")[1]) for line in lines] for lines in outs]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    _, alone, _ = run("fairseq-generate", *generate_args(corpus, tuned, "en", "fr"))
    assert re.findall(r"^H-.*", alone, re.M) != outs[0]


def test_an_ensemble_with_a_base_of_other_tokens_is_refused(corpus, tuned, tmp_path):
    state = torch.load(corpus.base)
    for section in (state.get("args"), (state.get("cfg") or {}).get("model")):
        if section is not None:
            section.langs = ["ja", "fr", "en", "de"]
    path = tmp_path / "other.pt"
    torch.save(state, path)
    args = generate_args(corpus, f"{tuned}:{path}", "en", "fr")
    status, _, err = run("fairseq-generate", *args, check=False)
    assert status == 1
    told = f"a stock model was trained with --langs ja,fr,en,de, here they are {LANGS}: the order"
    assert err.strip().splitlines()[-1].startswith(f"lslora: error: {told}")


SPAWNING = """
import multiprocessing, sys
from fairseq_cli.train import cli_main
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    cli_main()
"""


@pytest.mark.slow
def test_workers_that_are_spawned_load_the_same_batches(corpus, tmp_path):
    """As on macOS and Windows, and on Linux from Python 3.14."""
    script = tmp_path / "train.py"
    script.write_text(SPAWNING)
    args = with_option(finetune_args(corpus, tmp_path / "spawned"), "--num-workers", "1")
    args = with_option([*args, "--disable-validation"], "--max-epoch", "1")
    run(sys.executable, script, *args, PYTHONPATH=str(USER_DIR.parent), fresh=True)
    args = with_option(with_option(args, "--num-workers", "0"), "--save-dir", tmp_path / "alone")
    run("fairseq-train", *args)
    spawned, alone = (
        torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("spawned", "alone")
    )
    assert all(torch.equal(value, spawned[key]) for key, value in alone.items())


@pytest.mark.parametrize(
    "workers, sampling", [(0, "temperature"), (1, "temperature"), (0, "RoundRobin")]
)
def test_a_sentence_without_its_token_ends_the_command_with_one_line(
    corpus, tuned, workers, sampling
):
    """Whatever thread or process collates the batch."""
    _, _, task = load(corpus, tuned, sampling_method=sampling)
    task.load_dataset("valid")
    task._read_ids.index_of[:] = -1
    itr = task.get_batch_iterator(
        task.datasets["valid"], max_sentences=4, num_workers=workers, epoch=1, data_buffer_size=2
    ).next_epoch_itr(shuffle=False)
    with pytest.raises(UserError, match=r"^lslora: error: a sentence has '__..__' where the") as e:
        list(itr)
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="a sentence has"):
        data = task.datasets["valid"]
        data.collater([data[0]])


def test_what_a_user_dir_needs_not_be_said_twice(corpus, tuned):
    """Python users import the package, or name it as fairseq's commands do."""
    from argparse import Namespace

    utils.import_user_module(Namespace(user_dir=str(USER_DIR)))
    assert load(corpus, tuned)[0].plan.ranks == (2, 2, 4, 4)


def test_decoding_without_a_direction_names_the_options(corpus, tuned):
    args = without(without(generate_args(corpus, tuned, "en", "fr"), "-s"), "-t")
    status, _, err = run("fairseq-generate", *args, check=False)
    assert status == 1 and "give -s and -t" in err.strip().splitlines()[-1]

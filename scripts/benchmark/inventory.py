"""The section about large inventories: how long fairseq-train takes to begin, and each epoch."""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from fairseq.trainer import Trainer
from fairseq_cli import train

from benchmark.contenders import OURS
from benchmark.lifecycle import as_arguments, our_options, run_command
from benchmark.measuring import in_own_process, interleaved, progress
from benchmark.report import Result, Spread, Table, ratios
from benchmark.shapes import MANY_LANGUAGES, codes

DIRECTIONS, LINES, WORDS_A_LINE = 1000, 1997, 25  # as many lines as NTREX has, about as long
ALONE = "fairseq alone"


def inventory(options):
    """fairseq-train with 200 languages and 1,000 directions against fairseq alone: up to the first
    update, and what the beginning of an epoch takes (writes 50 MB to the folder for temporary
    files)."""
    with tempfile.TemporaryDirectory() as folder:
        progress("inventory: writing the data")
        pairs = write_data(Path(folder), options.setting.words)
        stock = ["--arch", "transformer", "--optimizer", "adam",
                 "--task", "translation_multi_simple_epoch"]  # fmt: skip
        commands = {
            ALONE: command(options.setting, folder, pairs, *stock),
            OURS: command(options.setting, folder, pairs, *our_options(MANY_LANGUAGES)),
        }
        runs = {
            name: lambda words=words: in_own_process(begin, words, options.threads)
            for name, words in commands.items()
        }
        raw = interleaved("inventory", runs, options.repetitions)
    titles = [
        "Up to the first update",
        "Beginning of the first epoch",
        "Beginning of another epoch",
    ]
    tables = []
    for number, title in enumerate(titles):
        times = {name: [measured[number] for measured in found] for name, found in raw.items()}
        rows = {
            name: [Spread.of(found), ratios(found, times[ALONE])] for name, found in times.items()
        }
        tables.append(Table(title, ["seconds", f"÷ {ALONE}"], rows))
    return Result(tables, {"seconds": raw})


def write_data(folder, words):
    """Writes a data set whose directions all have the same text; returns the directions."""
    rng, langs = random.Random(0), codes(MANY_LANGUAGES)
    names = [f"w{number}" for number in range(words - 4 - MANY_LANGUAGES)]
    (folder / "dict.txt").write_text("".join(f"{name} 1\n" for name in names))
    for lang in langs[:2]:
        text = (" ".join(rng.choices(names, k=WORDS_A_LINE)) + "\n" for _ in range(LINES))
        (folder / f"train.{lang}").write_text("".join(text))
    first = [
        sys.executable, "-m", "fairseq_cli.preprocess", "-s", langs[0], "-t", langs[1],
        "--trainpref", folder / "train", "--destdir", folder / "data",
        "--srcdict", folder / "dict.txt", "--tgtdict", folder / "dict.txt",
    ]  # fmt: skip
    run_command(first, 1)
    data, pairs = folder / "data", []
    for step in range(1, MANY_LANGUAGES):
        for number, source in enumerate(langs):
            target = langs[(number + step) % MANY_LANGUAGES]
            if len(pairs) < DIRECTIONS and f"{source}-{target}" not in pairs:
                pairs += [f"{source}-{target}", f"{target}-{source}"]
                _link(data, langs, source, target)
    return pairs


def _link(data, langs, source, target):
    """Gives a pair of languages the text of the first two."""
    text = f"train.{langs[0]}-{langs[1]}"
    for there, here in zip(langs, (source, target)):
        for kind in ("bin", "idx"):
            own = data / f"train.{source}-{target}.{here}.{kind}"
            if not own.exists():
                own.symlink_to(data / f"{text}.{there}.{kind}")
        if not (data / f"dict.{here}.txt").exists():
            (data / f"dict.{here}.txt").symlink_to(data / f"dict.{langs[0]}.txt")


def command(setting, folder, pairs, *more):
    """fairseq-train for two short epochs."""
    return [
        "fairseq-train", Path(folder) / "data", *more, "--cpu",
        "--langs", ",".join(codes(MANY_LANGUAGES)), "--lang-pairs", ",".join(pairs),
        "--encoder-langtok", "src", "--decoder-langtok", "--sampling-method", "temperature",
        "--sampling-temperature", "5", "--virtual-epoch-size", "1000",
        *as_arguments(setting.options()), "--criterion", "label_smoothed_cross_entropy",
        "--label-smoothing", "0.1", "--max-tokens", "4000", "--num-workers", "0", "--lr", "0.001",
        "--save-dir", Path(folder) / "run", "--no-save", "--disable-validation", "--max-epoch", "2",
    ]  # fmt: skip


def begin(words, threads):
    """Runs fairseq-train in this process, without its updates.

    Returns:
        seconds up to the first update, those of the beginning of the first epoch, of the second
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    began, firsts, epochs = time.perf_counter(), [], []
    get_iterator = Trainer.get_train_iterator

    def timed(*args, **kwargs):
        start = time.perf_counter()
        found = get_iterator(*args, **kwargs)
        epochs.append(time.perf_counter() - start)
        return found

    def no_update(trainer, samples, raise_oom=False):
        if not firsts:
            firsts.append(time.perf_counter() - began)
        trainer.set_num_updates(trainer.get_num_updates() + 1)

    Trainer.get_train_iterator, Trainer.train_step = timed, no_update
    sys.argv = [str(word) for word in words]
    train.cli_main()
    return firsts[0], epochs[0], epochs[1]

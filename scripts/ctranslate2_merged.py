"""Compares CTranslate2 with fairseq on a checkpoint of lslora merge: greedy tokens, speed.

    pip install ctranslate2
    python scripts/ctranslate2_merged.py en-fr.pt DATA

converts the file to float32 and int8 with CTranslate2's own converter, decodes 100 sentences of the
test set with fairseq and with both, on one core, and exits with 1 unless the tokens of float32 are
fairseq's. DATA is the folder of fairseq-preprocess. It does not import this package.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import ctranslate2
import torch
from ctranslate2.converters import FairseqConverter
from fairseq import checkpoint_utils

MAX_LENGTH = 100  # tokens of a translation, that of the language included
KINDS = ("float32", "int8")
SENTENCES = 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="of one direction, with a language token on both sides")
    parser.add_argument("data", help="folder of fairseq-preprocess")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.checkpoint], {"data": args.data}
    )
    model.eval()
    task.load_dataset("test")
    sentences, token = sources(task)
    found, seconds = {}, {}
    found["fairseq"], seconds["fairseq"] = timed(by_fairseq, model, task)
    with TemporaryDirectory() as folder:
        for kind in KINDS:
            path = str(Path(folder) / kind)
            FairseqConverter(args.checkpoint, args.data).convert(path, quantization=kind)
            translator = ctranslate2.Translator(path, compute_type=kind, intra_threads=1)
            found[kind], seconds[kind] = timed(by_ctranslate2, translator, sentences, token)
    print(
        f"ctranslate2 {ctranslate2.__version__}, torch {torch.__version__}: {len(sentences)} "
        "sentences, greedy, one by one, on one core"
    )
    for kind, ours in found.items():
        same = sum(map(list.__eq__, ours, found["fairseq"]))
        print(
            f"{kind:8} {same:4} sentences as fairseq, {agreed(ours, found['fairseq']):6.1%} of its "
            f"tokens up to the first difference, {sum(map(len, ours)) / seconds[kind]:8,.0f} "
            "tokens/s"
        )
    return found["float32"] != found["fairseq"]


def sources(task):
    """The test set as tokens, with that of its source language and without the end, and the token
    of the target language."""
    words, data = task.source_dictionary, task.dataset("test")
    sentences = [[words[i] for i in data[n]["source"][:-1]] for n in numbers(data)]
    token = words[task.data_manager.get_decoder_langtok(task.args.target_lang, "tgt")]
    return sentences, token


def numbers(data):
    """Of the sentences that are compared."""
    return range(min(SENTENCES, len(data)))


def by_fairseq(model, task):
    """Greedy translations, as tokens."""
    data, words = task.dataset("test"), task.target_dictionary
    about = argparse.Namespace(beam=1, max_len_b=MAX_LENGTH, keep_inference_langtok=True)
    generator = task.build_generator([model], about)
    found = []
    for number in numbers(data):
        sample = data.collater([data[number]])
        ((best,),) = task.inference_step(generator, [model], sample)
        found.append([words[i] for i in best["tokens"][1:-1]])
    return found


def by_ctranslate2(translator, sentences, token):
    """As :func:`by_fairseq`."""
    found = []
    for sentence in sentences:
        (best,) = translator.translate_batch(
            [sentence], target_prefix=[[token]], beam_size=1, max_decoding_length=MAX_LENGTH
        )
        found.append(best.hypotheses[0][1:])
    return found


def timed(decode, *args):
    """What it gives, and the seconds of a second call."""
    decode(*args)
    start = time.perf_counter()
    return decode(*args), time.perf_counter() - start


def agreed(ours, theirs):
    """Share of *theirs*, lists of tokens, that *ours* repeat up to the first difference."""
    both = 0
    for pair in zip(ours, theirs):
        both += next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), min(map(len, pair)))
    return both / max(1, sum(map(len, theirs)))


if __name__ == "__main__":
    sys.exit(main())

"""Directions without English: their text, directly and by way of English."""

import sys
from pathlib import Path

import sentencepiece
from finetune import PIVOT, languages

sys.path.append(str(Path(__file__).resolve().parents[1]))  # scripts/
from po_corpus import normalise

CORPUS = "few"
OWN = "across"  # the folder of their own text, within that of the data


def directions(work):
    """Each language into the next one, so that each is a source and a target once."""
    codes = languages(work)
    return list(zip(codes, [*codes[1:], codes[0]]))


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def common(work, source, target, subset):
    """The messages of a subset that two languages have.

    Returns:
        list of (line of the source language's subset, line of the target language's)
    """
    numbers = []
    for la in (source, target):
        english = lines(work / "corpus" / CORPUS / f"{subset}.{PIVOT}-{la}.{PIVOT}")
        numbers.append({normalise(text): number for number, text in enumerate(english)})
    return [(i, numbers[1][key]) for key, i in numbers[0].items() if key in numbers[1]]


def texts(work, pair, hypotheses=None, subset="test"):
    """A subset of a direction as pieces.

    Args:
        pair: (source, target)
        hypotheses: folder in which its source text was translated into English; that is then what
            is translated into the target language

    Returns:
        (source lines, target lines)
    """
    source, target = pair
    pieces = work / "pieces" / CORPUS
    if hypotheses is None:
        here = lines(pieces / f"{subset}.{PIVOT}-{source}.{source}")
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=str(work / "pieces" / "spm.model"))
        english = lines(hypotheses / f"{source}-{PIVOT}.hyp")
        here = [" ".join(words) for words in model.encode(english, out_type=str)]
    there = lines(pieces / f"{subset}.{PIVOT}-{target}.{target}")
    numbers = common(work, source, target, subset)
    return [here[i] for i, _ in numbers], [there[j] for _, j in numbers]


def binarise(jobs, work, folder, hypotheses=None, after=(), subsets=("test",)):
    """Binarises subsets of all :func:`directions`, by way of English those of English into their
    targets.

    Args:
        folder: where, within the work folder
        hypotheses: as :func:`texts` has it
        after: folders of the jobs that made them
    """
    for source, target in directions(work):
        code = source if hypotheses is None else PIVOT
        text = work / folder / "text" / f"{code}-{target}"
        text.mkdir(parents=True, exist_ok=True)
        for subset in subsets:
            found = texts(work, (source, target), hypotheses, subset)
            for la, of_it in zip((code, target), found):
                content = "".join(line + "\n" for line in of_it)
                (text / f"{subset}.{la}").write_text(content, encoding="utf-8")
        dictionary = work / "pieces" / "dict.txt"
        prefixes = [word for name in subsets for word in (f"--{name}pref", text / name)]
        jobs.run(f"{folder}/jobs/{code}-{target}", [
            "fairseq-preprocess", "--source-lang", code, "--target-lang", target,
            *prefixes, "--destdir", work / folder / "data",
            "--srcdict", dictionary, "--tgtdict", dictionary,
        ], after=["data", *after])  # fmt: skip

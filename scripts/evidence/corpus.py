#!/usr/bin/env python3
"""Builds the corpora of examples/evidence from compiled catalogues (.mo) of installed programs.

PROGRAMS is a folder with what Debian's packages unpack to: every LC_MESSAGES/NAME.mo under it is
the catalogue of a program part NAME in the language that its path tells. Three groups are written,
each split by message into train, valid and test as po_corpus.py does, with its cleaning:

base   all programs but those below; nothing of their text, in any language, is in it
few    programs that the base has not seen: --few-messages messages that all languages have
more   all there is of another such program

OUT/counts.tsv counts the pairs, OUT/tiers.tsv gives the resource tier of every language by its
share of the base's text.
"""

import argparse
import random
import re
import sys
from pathlib import Path

import polib
from po_corpus import (
    SPLITS,
    normalise,
    split,
    texts,
    usable,
    without,
    write_split,
    write_tables,
)

GROUPS = ("base", "few", "more")
MNEMONIC = re.compile(r"[~_&](?=\w)")  # marks the letter that an Alt key reaches
CONTEXT = re.compile(r"^\w+\|")  # LibreOffice's, before the English text


def cleaned(text):
    """A message without the marks of keyboard access, white space made single spaces."""
    return MNEMONIC.sub("", " ".join(text.split()))


def messages(path):
    """Yields (English, translation) of the finished entries of a .mo file, but plural forms."""
    for entry in polib.mofile(str(path)):
        if entry.msgstr and not entry.msgid_plural:
            yield cleaned(CONTEXT.sub("", entry.msgid)), cleaned(entry.msgstr)


def find_catalogues(folder, languages):
    """(program part, language) -> paths of its catalogues, in a fixed order."""
    found = {}
    for path in sorted(Path(folder).rglob("LC_MESSAGES/*.mo")):
        language = path.parts[-3]
        if language in languages:
            found.setdefault((path.stem, language), []).append(path)
    return found


def collect(catalogues, names, languages, max_chars):
    """The usable messages of some program parts.

    Returns:
        language -> normalised English -> (English, translation); of several translations of a
        message the first is kept.
    """
    pairs = {language: {} for language in languages}
    for name in names:
        for language in languages:
            for path in catalogues.get((name, language), ()):
                for source, target in messages(path):
                    if usable(source, target, max_chars):
                        pairs[language].setdefault(normalise(source), (source, target))
    return pairs


def in_all_languages(pairs):
    """The messages that every language has."""
    common = set.intersection(*(set(of_language) for of_language in pairs.values()))
    return {
        language: {key: pair for key, pair in of_language.items() if key in common}
        for language, of_language in pairs.items()
    }


def build(args):
    """Builds and writes the corpora; returns (group, split, language) -> number of pairs."""
    catalogues = find_catalogues(args.programs, args.languages)
    names = sorted({name for name, _ in catalogues})
    for group in ("few", "more"):
        missing = set(getattr(args, group)) - set(names)
        if missing:
            raise FileNotFoundError(
                f"{args.programs} has no catalogue {', '.join(sorted(missing))}.mo of --{group}: "
                "unpack the packages that hold it there"
            )
    kept_out = [*args.few, *args.more]
    corpus = {
        "base": collect(
            catalogues, [n for n in names if n not in kept_out], args.languages, args.max_chars
        ),
        "few": in_all_languages(collect(catalogues, args.few, args.languages, args.max_chars)),
        "more": collect(catalogues, args.more, args.languages, args.max_chars),
    }
    corpus["more"] = without(corpus["more"], texts(corpus["few"]))
    corpus["base"] = without(corpus["base"], texts(corpus["few"]) | texts(corpus["more"]))
    counts = {}
    for group in GROUPS:
        parts = split(corpus[group], args.held_out, args.seed)
        if group == "few":
            parts["train"] = _first(parts["train"], args.few_messages, args.seed)
        for name in SPLITS:
            write_split(args.out / group, name, parts[name])
            counts.update({(group, name, la): len(parts[name][la]) for la in args.languages})
    return counts


def _first(pairs, number, seed):
    """*number* messages, drawn with *seed*."""
    keys = sorted(set().union(*pairs.values()))
    chosen = set(random.Random(seed).sample(keys, min(number, len(keys))))
    return {
        language: {key: pair for key, pair in of_language.items() if key in chosen}
        for language, of_language in pairs.items()
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--programs", type=Path, required=True, help="folder with the unpacked packages")
    add("--out", type=Path, required=True, help="folder to write the corpora to")
    add("--few", nargs="+", required=True, metavar="NAME", help="catalogues of the group few")
    add("--more", nargs="+", required=True, metavar="NAME", help="catalogues of the group more")
    add("--languages", nargs="+", required=True, metavar="CODE",
        help="languages beside English, by the code of their catalogue's folder")  # fmt: skip
    add("--few-messages", type=int, default=1000, help="size of few (default: 1000)")
    add("--held-out", nargs=2, type=int, default=(150, 250), metavar=("VALID", "TEST"),
        help="messages of each group held out (default: 150 250)")  # fmt: skip
    add("--max-chars", type=int, default=60, help="longest message kept (default: 60)")
    add("--seed", type=int, default=1, help="seed of the split (default: 1)")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    try:
        counts = build(args)
    except FileNotFoundError as error:
        sys.exit(f"mo_corpus.py: error: {error}")
    write_tables(args.out, args.languages, counts, GROUPS, tiers_by="base")


if __name__ == "__main__":
    main()

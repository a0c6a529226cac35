"""Splits and encodes parallel text: python encode.py SPM_MODEL FOLDER VALID_LINES LANG DEV TEST …

Writes FOLDER/{train,valid,test}.LANG in SentencePiece pieces; DEV's last VALID_LINES lines are
the validation set.
"""

import sys
from pathlib import Path

import sentencepiece


def main(model, folder, valid_lines, *sources):
    langs = sources[::3]
    devs, tests = ([read(path) for path in paths] for paths in (sources[1::3], sources[2::3]))
    for lang, dev, test in zip(langs, devs, tests):
        if (len(dev), len(test)) != (len(devs[0]), len(tests[0])):
            fail(
                f"{lang} has {len(dev)} dev and {len(test)} test lines, {langs[0]} has "
                f"{len(devs[0])} and {len(tests[0])}: they must be translations of each other, "
                "line by line; download FLORES again"
            )
    held_out = int(valid_lines) if valid_lines.isdecimal() else 0
    if not 0 < held_out < len(devs[0]):
        fail(f"VALID_LINES={valid_lines} must lie between 1 and {len(devs[0]) - 1}")
    spm = sentencepiece.SentencePieceProcessor(model_file=model)
    for lang, dev, test in zip(langs, devs, tests):
        splits = {"train": dev[:-held_out], "valid": dev[-held_out:], "test": test}
        for split, lines in splits.items():
            pieces = "".join(" ".join(spm.encode(line, out_type=str)) + "\n" for line in lines)
            Path(folder, f"{split}.{lang}").write_text(pieces, encoding="utf-8")


def read(path):
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\r\n") for line in lines]


def fail(message):
    sys.exit(f"flores12: error: {message}")


if __name__ == "__main__":
    main(*sys.argv[1:])

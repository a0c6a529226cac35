"""Splits and encodes parallel text: python encode.py SPM_MODEL FOLDER VALID_LINES LANG DEV TEST …

Writes FOLDER/{train,valid,test}.LANG in SentencePiece pieces; DEV's last VALID_LINES lines are
the validation set. A language whose files are there already is left alone.
"""

import os
import sys
from pathlib import Path

import sentencepiece


def main(model, folder, valid_lines, *languages):
    spm = sentencepiece.SentencePieceProcessor(model_file=model)
    folder, held_out = Path(folder), int(valid_lines)
    lengths = None
    for lang, dev, test in zip(languages[::3], languages[1::3], languages[2::3]):
        dev, test = read(dev), read(test)
        if lengths is None:
            lengths, first = (len(dev), len(test)), lang
        if (len(dev), len(test)) != lengths:
            fail(
                f"{lang} has {len(dev)} dev and {len(test)} test lines, {first} has "
                f"{lengths[0]} and {lengths[1]}: they must be translations of each other, line "
                "by line; download FLORES again"
            )
        if not 0 < held_out < len(dev):
            fail(f"VALID_LINES={held_out} must lie between 1 and {len(dev) - 1}")
        splits = {"train": dev[:-held_out], "valid": dev[-held_out:], "test": test}
        for split, lines in splits.items():
            path = folder / f"{split}.{lang}"
            if not path.exists():
                pieces = "".join(" ".join(spm.encode(line, out_type=str)) + "\n" for line in lines)
                made = path.with_name(path.name + ".tmp")
                made.write_text(pieces, encoding="utf-8")
                os.replace(made, path)


def read(path):
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\r\n") for line in lines]


def fail(message):
    sys.exit(f"flores12: error: {message}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Decoding with fairseq and with transformers, so that tokens can be compared."""

from console import USER_DIR, run

LENGTH = 20


def load(folder):
    """The model in a folder of transformers."""
    from transformers import M2M100ForConditionalGeneration

    return M2M100ForConditionalGeneration.from_pretrained(folder).eval()


def interactive(lines, source, target, *args):
    """Pieces of the sources, and of their translations, as fairseq-interactive tells them."""
    given = [
        "--user-dir", USER_DIR, "--cpu", "-s", source, "-t", target, "--beam", "1", "--max-len-b",
        LENGTH, "--bpe", "sentencepiece", *args,
    ]  # fmt: skip
    _, out, _ = run("fairseq-interactive", *given, stdin="\n".join(lines) + "\n")
    told = [line.split("\t") for line in out.splitlines() if "\t" in line]
    sources = [fields[1].split() for fields in told if fields[0].startswith("S-")]
    return sources, [fields[2].split() for fields in told if fields[0].startswith("H-")]


def greedy(model, tokenizer, lines, symbols, target, **kwargs):
    """As :func:`interactive`, of transformers.

    Args:
        symbols: of fairseq's dictionary, which names the tokens by their numbers
        target: the token of the target language, which fairseq leaves out
    """
    sources, found = [], []
    for line in lines:
        batch = tokenizer(line, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(
            **batch, max_new_tokens=LENGTH, max_length=None, num_beams=1, early_stopping=False,
            **kwargs,
        )  # fmt: skip
        sources.append([symbols[number] for number in batch["input_ids"][0, :-1]])
        pieces = [symbols[number] for number in out[0, 1 : LENGTH + 1]]
        assert pieces[0] == target
        pieces = pieces[: pieces.index("</s>")] if "</s>" in pieces else pieces
        found.append([piece for piece in pieces if piece != target])
    return sources, found


def compare(found, expected):
    """Sources and translations, line by line."""
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == other

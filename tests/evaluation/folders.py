"""Folders of ``lslora evaluate``, written by hand and scored by sacrebleu itself."""

import json
import random
from hashlib import sha256

from sacrebleu.metrics import BLEU, CHRF

WORDS = "a b c d e f g h i j k l m n o p q r s t".split()
TIERS = {"en": "high", "de": "high", "wo": "low"}


def sentences(number, seed):
    """Random sentences of 6 to 14 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(6, 14))) for _ in range(number)]


def worse(lines, share, seed):
    """A copy in which this share of the words is another one."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in line.split())
        for line in lines
    ]


def texts(share, seed=1, number=40, pairs=("en-de", "de-en", "en-wo", "wo-en")):
    """pair -> src, ref, hyp; the references of all seeds are the same."""
    found = {}
    for n, pair in enumerate(pairs):
        ref = sentences(number, n)
        found[pair] = {
            "src": [f"source {line}" for line in ref],
            "ref": ref,
            "hyp": worse(ref, share, f"{seed}{pair}"),
        }
    return found


def save(folder, content, **changes):
    """Writes a folder with the scores of sacrebleu's 13a and chrF++; returns it.

    Args:
        content: what :func:`texts` returns
        changes: other values at the top of scores.json
    """
    folder.mkdir()
    results = {
        "version": 1,
        "models": [{"path": f"{folder.name}.pt", "sha256": "ab" * 32}],
        "data": "data/finetune",
        "subset": "test",
        "decoding": {"beam": 5, "lenpen": 1.0},
        "text": "sentencepiece",
        "tiers": TIERS,
        "references": "detokenised test set",
        "langid": None,
        "versions": {},
        "tokenizers": ["13a"],
        "spm": None,
        "metrics": ["BLEU", "chrF++"],
        "directions": {},
        "seconds": {},
    }
    for pair, files in content.items():
        checksums = {}
        for kind, lines in files.items():
            data = "".join(f"{line}\n" for line in lines).encode()
            (folder / f"{pair}.{kind}").write_bytes(data)
            checksums[kind] = sha256(data).hexdigest()
        scores = {}
        for name, metric in (("BLEU", BLEU()), ("chrF++", CHRF(word_order=2))):
            score = metric.corpus_score(files["hyp"], [files["ref"]]).score
            scores[name] = {"score": score, "signature": str(metric.get_signature())}
        results["directions"][pair] = {
            "sentences": len(files["ref"]),
            "seconds": 1.5,
            "near_ties": 2,
            "sha256": checksums,
            "scores": scores,
        }
    results.update(changes)
    (folder / "scores.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def change(folder, edit):
    """Rewrites scores.json after *edit* has changed its content."""
    path = folder / "scores.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder

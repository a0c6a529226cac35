"""Content of a scores.json with round numbers."""

TIERS = {"en": "high", "de": "high", "wo": "low"}
PIECES = "nrefs:1|case:mixed|eff:no|tok:flores200|smooth:exp|version:2.6.0"
BLEU = "nrefs:1|case:mixed|eff:no|tok:{}|smooth:exp|version:2.6.0"
SCORES = {
    "en-de": (30.04, 0.02), "de-en": (36.04, 0.0), "en-wo": (4.04, None), "wo-en": (8.04, 0.1),
}  # fmt: skip


def make(scores=SCORES, tiers=TIERS, off_target=True):
    """Results of spBLEU, and BLEU as half of it.

    Args:
        scores: pair -> (spBLEU, share of off-target hypotheses)
    """
    directions = {}
    for pair, (score, share) in scores.items():
        tok = "zh" if pair.endswith("-zh") else "13a"
        directions[pair] = {
            "sentences": 1000,
            "seconds": 1.0,
            "near_ties": 2,
            "sha256": {},
            "scores": {
                "spBLEU": {"score": score, "signature": PIECES},
                "BLEU": {"score": score / 2, "signature": BLEU.format(tok)},
            },
        }
        if off_target:
            directions[pair]["off_target"] = share
    return {
        "version": 1,
        "models": [{"path": "tuned.pt", "sha256": "ab" * 32}],
        "data": "data/finetune",
        "subset": "test",
        "decoding": {"beam": 5, "lenpen": 1.0},
        "text": "sentencepiece",
        "tiers": tiers,
        "references": "detokenised test set",
        "langid": "py3langid 0.4.0" if off_target else None,
        "versions": {},
        "tokenizers": ["auto", "flores200"],
        "spm": None,
        "metrics": ["spBLEU", "BLEU"],
        "directions": directions,
        "seconds": {},
    }

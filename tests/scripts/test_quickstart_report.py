"""The quickstart's table, from what fairseq-generate printed and a model with pruned adapters."""

import pytest
import quickstart_report
import torch
from toy import build, set_adapters

SENTENCES = 40


def write_test_set(work, language, **models):
    """A test set of one language in both directions, with the hypotheses of each model."""
    for source, target in (("en", language), (language, "en")):
        references = [f"▁this ▁is ▁sentence ▁number ▁{i} ▁of {target}" for i in range(SENTENCES)]
        path = work / "pieces" / "finetune" / f"test.en-{language}.{target}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(references) + "\n", encoding="utf-8")
        for name, change in models.items():
            order = list(range(1, SENTENCES)) + [0]  # fairseq prints longest first
            text = "".join(
                f"S-{i}\t__en__ x\nT-{i}\tx\nH-{i}\t-0.5\t{change(references[i], i)}\n"
                for i in order
            )
            path = work / "decoded" / name / f"{source}-{target}.out"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("INFO loading\n" + text, encoding="utf-8")


def right(reference, number):
    return reference


def wrong_half(reference, number):
    return reference if number % 2 else reference.replace("▁is ▁sentence", "▁was ▁a ▁phrase")


def wrong_other_half(reference, number):
    return wrong_half(reference, number + 1)


@pytest.fixture
def work(tmp_path):
    write_test_set(tmp_path, "de", base=wrong_half, finetuned=right)
    write_test_set(tmp_path, "fr", base=wrong_half, finetuned=right)
    write_test_set(tmp_path, "ja", base=wrong_half, finetuned=wrong_other_half)
    return tmp_path


def test_table(work):
    model = set_adapters(build())  # high de (rank 1) en (2), low fr (3) ja (5)
    with torch.no_grad():
        for linear in model.adapted_linears():
            for language in (0, 1):  # de and en
                linear.masks(language)[1].fill_(False)
    heading, *rows = quickstart_report.table(model, quickstart_report.Scores(work))
    found = {row[0]: dict(zip(heading, row)) for row in rows}
    assert list(found) == ["high", "low", "all"]
    assert found["high"]["languages"] == "de en"
    assert found["high"]["sentences"] == "80" and found["low"]["sentences"] == "160"
    assert found["high"]["tuned BLEU"] == "100.0" and found["high"]["p"] == "< 0.001"
    assert float(found["high"]["base BLEU"]) == pytest.approx(100 - float(found["high"]["gain"]))
    assert 10 < float(found["high"]["gain"]) < 60
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found["all"]["trainable"] == f"{trained:,}"
    assert found["all"]["of base"] == f"{trained / frozen:.2%}"
    assert found["high"]["trainable"] == f"{trained * 3 // 11:,}"
    assert found["high"]["sparsity"] == "1.000" and found["low"]["sparsity"] == "0.000"


def test_no_difference_is_not_significant(work):
    scores = quickstart_report.Scores(work)
    count, base, tuned, p = scores.compared(["ja"])
    assert count == 80 and base == pytest.approx(tuned, abs=1) and p > 0.05
    assert "tok:none" in str(scores.signature) and "bs:1000" in str(scores.signature)


def test_equal_hypotheses_are_no_difference(work):
    scores = quickstart_report.Scores(work)
    count, before, after, p = scores.compared(["ja"], "finetuned", "finetuned")
    assert (count, before, p) == (80, after, 1.0)


def test_a_file_cut_short_is_an_error(work):
    out = work / "decoded" / "base" / "en-de.out"
    out.write_text(out.read_text(encoding="utf-8").replace("H-7\t", "X-7\t"), encoding="utf-8")
    with pytest.raises(SystemExit, match="39 hypotheses for 40 sentences: delete"):
        quickstart_report.Scores(work).compared(["de"])

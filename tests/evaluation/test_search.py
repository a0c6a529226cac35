"""Beam search beside fairseq's own, option by option: the same hypotheses with the same scores."""

import random

import pytest
import torch
import toy
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.sequence_generator import SequenceGenerator

from lslora_fairseq.evaluation import search as search_module
from lslora_fairseq.evaluation.search import BeamSearch


@pytest.fixture(scope="module")
def loaded(corpus, finetuned):
    """The fine-tuned model and its base, and a batch from English into French."""
    overrides = {"data": str(corpus.data), "source_lang": "en", "target_lang": "fr"}
    paths = [str(finetuned[0]), str(corpus.base)]
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(paths[:1], overrides)
    models += checkpoint_utils.load_model_ensemble(paths[1:], task=task)[0]
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[number] for number in range(24)])
    for model in models:
        model.eval()
    return models, task.target_dictionary, batch


def options(**given):
    return GenerationConfig(**{"beam": 4, "max_len_b": 25, **given})


def theirs(models, dictionary, batch, prefix=None, **given):
    """What fairseq finds: for each sentence its (score, tokens), best first."""
    o = options(**given)
    search = SequenceGenerator(
        models, dictionary, beam_size=o.beam, max_len_a=o.max_len_a, max_len_b=o.max_len_b,
        min_len=o.min_len, normalize_scores=not o.unnormalized, len_penalty=o.lenpen,
        unk_penalty=o.unkpen, temperature=o.temperature,
    )  # fmt: skip
    found = search.generate(models, batch, prefix_tokens=prefix)
    return [
        [(h["score"].item(), h["tokens"].tolist()[:-1]) for h in sentence] for sentence in found
    ]


def ours(models, dictionary, batch, prefix=None, limits=None, **given):
    search = BeamSearch(models, dictionary, options(**given))
    net_input = {k: v for k, v in batch["net_input"].items() if k != "prev_output_tokens"}
    limits = limits or [search.limit(net_input["src_tokens"].size(1))] * len(batch["id"])
    return [found for found, _ in search.search(net_input, limits, prefix=prefix)]


def same(here, there):
    """Equal, but for the order of hypotheses whose scores are nearly equal."""
    assert len(here) == len(there)
    for found, expected in zip(here, there):
        assert [f.score for f in found] == pytest.approx([s for s, _ in expected], 1e-6, 1e-4)
        scores = [score for score, _ in expected]
        for place, (score, tokens) in enumerate(expected):
            if all(abs(score - s) > 2e-4 for p, s in enumerate(scores) if p != place):
                assert found[place].tokens == tokens


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"beam": 1},
        {"beam": 7, "lenpen": 0.3},
        {"lenpen": -1.0, "min_len": 6},
        {"unnormalized": True, "temperature": 1.7},
        {"unkpen": 3.0, "max_len_a": 0.5, "max_len_b": 2},
        {"unkpen": -4.0, "max_len_b": 6},
        {"max_len_b": 40, "min_len": 12},
        {"max_len_b": 1},
    ],
    ids=str,
)
def test_options(loaded, given):
    models, dictionary, batch = loaded
    same(
        ours(models[:1], dictionary, batch, **given), theirs(models[:1], dictionary, batch, **given)
    )


def test_an_ensemble(loaded):
    models, dictionary, batch = loaded
    found = ours(models, dictionary, batch)
    same(found, theirs(models, dictionary, batch))
    assert found != ours(models[:1], dictionary, batch)


@pytest.mark.parametrize("size", [1, 2, 5, 60])
def test_forced_beginnings(loaded, size):
    """Of references, some of which are shorter and end within it: fairseq then finds the same one
    for each beam."""
    models, dictionary, batch = loaded
    prefix = batch["target"][:, :size]
    given = {"max_len_b": 70, "beam": 3}
    found = ours(models[:1], dictionary, batch, prefix=prefix, **given)
    expected = theirs(models[:1], dictionary, batch, prefix=prefix, **given)
    for place, hypotheses in enumerate(expected):
        if len({str(tokens) for _, tokens in hypotheses}) == 1:
            expected[place] = hypotheses[:1]
    same(found, expected)
    if size == 60:
        assert prefix.eq(dictionary.eos()).any()
        for hypotheses, target in zip(found, batch["target"]):
            assert hypotheses[0].tokens == target[target > dictionary.eos()].tolist()


def test_each_sentence_ends_by_its_own_limit(loaded):
    """As in a batch of fairseq's in which all have that limit."""
    models, dictionary, batch = loaded
    limits = [random.Random(0).randint(1, 9) for _ in batch["id"]]
    limits[0], limits[-1] = 1, 9
    prefix = batch["target"][:, :1]
    found = ours(models[:1], dictionary, batch, prefix=prefix, limits=limits)
    for limit in set(limits):
        expected = theirs(models[:1], dictionary, batch, prefix=prefix, max_len_b=limit)
        chosen = [number for number, own in enumerate(limits) if own == limit]
        same([found[n] for n in chosen], [expected[n] for n in chosen])
        assert max(len(h.tokens) for n in chosen for h in found[n]) <= limit


def test_sentences_do_not_see_each_other(loaded):
    """Nor does their order matter."""
    models, dictionary, batch = loaded
    whole = ours(models[:1], dictionary, batch)
    order = torch.randperm(len(batch["id"]))
    net_input = {k: v[order] for k, v in batch["net_input"].items()}
    shuffled = ours(models[:1], dictionary, {"id": order, "net_input": net_input})
    for place, number in enumerate(order.tolist()):
        same([shuffled[place]], [[(h.score, h.tokens) for h in whole[number]]])


@pytest.mark.parametrize(
    "closer_than, some, whole", [(0, False, False), (0.02, True, False), (99, True, True)]
)
def test_near_ties_are_told(loaded, monkeypatch, closer_than, some, whole):
    models, dictionary, batch = loaded
    monkeypatch.setattr(search_module, "TIE", closer_than)
    search = BeamSearch(models[:1], dictionary, options())
    net_input = {k: v for k, v in batch["net_input"].items() if k != "prev_output_tokens"}
    ties = [is_tie for _, is_tie in search.search(net_input, [25] * len(batch["id"]))]
    assert (any(ties), all(ties)) == (some, whole)


def test_the_beams_of_attention_are_as_before(loaded):
    """fairseq's generator, built before, goes on to work."""
    models, dictionary, batch = loaded
    before = theirs(models[:1], dictionary, batch)
    generator = SequenceGenerator(models[:1], dictionary, beam_size=4, max_len_b=25)
    ours(models[:1], dictionary, batch)
    found = generator.generate(models[:1], batch)
    assert [h[0]["tokens"].tolist()[:-1] for h in found] == [h[0][1] for h in before]


@pytest.mark.parametrize("with_ids", [True, False])
def test_adapters_that_all_share_and_sentences_that_end_apart(with_ids):
    """Sentences drop out on the way, and nothing need tell their languages."""
    model = toy.set_adapters(toy.build(lora_rank="0", lora_shared_rank=3), scale=0.3, seed=4).eval()
    model.encoder.embed_tokens.weight.data[2] *= 3  # </s> likelier for some, less for others
    net_input = toy.batch([(0, 1), (3, 2), (1, 0), (2, 2)] * 2)
    if not with_ids:
        net_input = {k: v for k, v in net_input.items() if "lang_ids" not in k}
    batch = {"net_input": net_input, "id": range(8)}
    here = ours([model], toy.dictionary(), batch)
    given = {k: v for k, v in net_input.items() if k != "prev_output_tokens"}
    same(here, theirs([model], toy.dictionary(), {**batch, "net_input": given}))
    assert len({len(found[0].tokens) for found in here}) > 1

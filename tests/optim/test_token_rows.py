"""Rows of language tokens that are trained, each as its language's own."""

import copy

import pytest
import torch
import toy
from fairseq.optim import OPTIMIZER_REGISTRY
from toy import adapters, batch, build, set_adapters
from updates import options

from lslora_fairseq.errors import UserError

ALL = [(0, 1), (1, 2), (2, 3), (3, 0)]
TOKENS = {code: 34 + number for number, code in enumerate(toy.CODES)}
OPTIONS = {"lora_train_tokens": "fr,ja", "lora_embedding_rank": 3}


def sentences(pairs, seed=3):
    """A batch whose sentences begin with the token of their source language, and their targets
    with that of theirs."""
    made = batch(pairs, seed=seed)
    for n, pair in enumerate(pairs):
        source, target = (TOKENS[toy.CODES[i]] for i in pair)
        made["src_tokens"][n, n % 4] = source
        made["prev_output_tokens"][n, 1] = target
    return made


def embeddings(model):
    return model.decoder.output_projection.weight


def rows_of(model):
    return {
        n.removeprefix("token_rows.lora_"): p for n, p in model.named_parameters() if "rows" in n
    }


def same_base():
    """A model with rows, and one without that computes the same."""
    model = set_adapters(build(**OPTIONS))
    other = set_adapters(build(**{**OPTIONS, "lora_train_tokens": None}))
    other.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())  # its rows are those of the embeddings
    return model, other


def test_the_output_changes_by_no_bit():
    model, other = same_base()
    for train in (True, False):
        model.train(train), other.train(train)
        assert torch.equal(model(**sentences(ALL))[0], other(**sentences(ALL))[0])


def test_a_row_has_the_gradient_of_its_token_where_it_is_looked_up():
    """That of a trained matrix whose output projection takes no part."""
    model, other = same_base()
    weight = embeddings(other).requires_grad_()
    for made in (model, other):
        made(**sentences(ALL), features_only=True)[0].square().mean().backward()
    for code, row in rows_of(model).items():
        torch.testing.assert_close(row.grad[0], weight.grad[TOKENS[code]])
        assert row.grad.any()


def test_the_words_to_predict_give_it_none():
    """A sentence of other languages does not move it, though its token has a logit there."""
    model, _ = same_base()
    model(**sentences([(0, 1), (1, 0)]))[0].square().mean().backward()
    assert not any(row.grad.any() for row in rows_of(model).values())


@pytest.mark.parametrize("inner", ["adam", "adafactor", "nag"])
def test_updates_move_the_rows_of_their_languages_alone(inner):
    model, _ = same_base()
    args = {"weight_decay": 0.1, "lr": [0.01]}
    optimizer = OPTIMIZER_REGISTRY[f"pruned_{inner}"](options(inner, **args), adapters(model))
    for pairs in ([(2, 0)], [(0, 1)], [(2, 1), (1, 0)]):
        before, base = {c: r.clone() for c, r in rows_of(model).items()}, embeddings(model).clone()
        optimizer.zero_grad()
        optimizer.backward(model(**sentences(pairs))[0].square().mean())
        optimizer.step()
        model.write_token_rows()
        present = {toy.CODES[i] for pair in pairs for i in pair}
        moved = {c for c, row in rows_of(model).items() if not torch.equal(row, before[c])}
        assert moved == present & {"fr", "ja"}
        changed = (embeddings(model) != base).any(1).nonzero().flatten().tolist()
        assert changed == [TOKENS[code] for code in sorted(moved)]
    inside = model.decoder.embed_tokens(torch.tensor([TOKENS["fr"]]))
    plain = embeddings(model)[TOKENS["fr"]] + sum(
        (A.t() @ B[:, TOKENS["fr"]] for A, B in [model.decoder.output_projection.factors()])
    )
    torch.testing.assert_close(inside[0], plain)


def test_a_state_dict_holds_them_in_the_embeddings():
    model, _ = same_base()
    row = rows_of(model)["ja"]
    row.data.fill_(0.5)
    model.write_token_rows()
    state = model.state_dict()
    assert not any("rows" in key for key in state)
    assert state["encoder.embed_tokens.weight"][TOKENS["ja"]].eq(0.5).all()
    other = build(seed=5, **OPTIONS)
    other.load_state_dict(state)
    assert torch.equal(rows_of(other)["ja"], row)


def test_half_precision_and_copies():
    model = copy.deepcopy(same_base()[0]).to(torch.bfloat16)
    assert {p.param_group.side for p in rows_of(model).values()} == {"token"}
    model(**sentences(ALL))[0].float().square().mean().backward()
    assert all(row.grad.any() for row in rows_of(model).values())
    rows_of(model)["fr"].data.fill_(0.25)
    model.write_token_rows()
    assert embeddings(model)[TOKENS["fr"]].eq(0.25).all()


def test_merged_they_are_gone():
    model, _ = same_base()
    model.merge(2, 3)
    assert not rows_of(model)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"lora_train_tokens": "xx"}, "--lora-train-tokens names xx, and not languages of --lora-"),
        ({"share_all_embeddings": False}, "--lora-train-tokens trains embeddings that are one mat"),
        ({"lora_train_languages": "fr"}, "names ja, whose adapters --lora-train-languages keeps"),
        ({"lora_rank": "0", "lora_shared_rank": 2}, "--lora-train-tokens trains the tokens' rows"),
    ],
)
def test_what_is_refused(options, told):
    given = {"lora_train_tokens": "fr,ja", **options}
    with pytest.raises(UserError, match=told):
        build(**given)


def test_tokens_of_the_dictionary_file_are_refused(monkeypatch):
    made = toy.dictionary()
    made.rows_in_file = len(made)
    monkeypatch.setattr(toy, "dictionary", lambda words: made)
    with pytest.raises(UserError, match="__fr__ is no token beyond the dictionary file"):
        build(lora_train_tokens="fr")

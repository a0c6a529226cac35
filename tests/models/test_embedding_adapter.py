"""The adapter of the token embeddings inside a model: where it acts, and what it may not change."""

import copy
import pickle
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import toy
from fairseq.models.transformer import TransformerModel
from fairseq.sequence_generator import SequenceGenerator
from test_identity import model_with
from test_lslora_transformer import beam_search, generation, without_targets
from torch import nn
from toy import (
    ALL_CODES,
    CODES,
    Work,
    adapters,
    batch,
    build,
    dictionary,
    rows,
    set_adapters,
    stock,
)

from lslora_fairseq.doctor.model import check_fit
from lslora_fairseq.errors import ConfigError, UserError
from lslora_fairseq.keys import RECORD, tidy
from lslora_fairseq.lora.adapters import Adapter, LayerAdapters
from lslora_fairseq.lora.embedding import AdaptedEmbedding, AdaptedProjection
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

PAIRS = [(0, 1), (3, 2), (1, 0), (0, 1)]
RANK = {"lora_embedding_rank": 3}
ALONE = {"lora_rank": "0", **RANK}
KEYS = {"embedding_adapters.lora_shared", "embedding_adapters.pruned"}
KINDS = [{}, {"checkpoint_activations": True}, {"lora_shared_rank": 2}, {"lora_rank": "0"}]


class TwoModules(LSLoTransformerModel):
    """Encoder and decoder have an embedding each, of the same weight."""

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        other = nn.Embedding(*embed_tokens.weight.shape, embed_tokens.padding_idx)
        other.weight = embed_tokens.weight
        return super().build_decoder(args, tgt_dict, other)


def without_adapter(model, **options):
    """The same model without the embeddings' adapter."""
    plain = build(seed=7, **options)
    state = {key: value for key, value in model.state_dict().items() if key not in {*KEYS, RECORD}}
    missing, unexpected = nn.Module.load_state_dict(plain, {**plain.state_dict(), **state})
    assert not missing and not unexpected
    return plain


def plainly(model, **options):
    """The same model without it, its embeddings E + Bᵀ A by the formula."""
    plain = without_adapter(model, **options) if model.plan.all_sites else stock(model)
    weight = model.embedding_adapters.weight(0).detach().float()
    plain.encoder.embed_tokens.weight.data += weight[:, 16:].t() @ weight[:, :16]
    return plain


@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"lora_shared_rank": 2}])
@pytest.mark.parametrize("train", [True, False])
def test_a_fresh_one_changes_no_bit(train, options):
    model = build(**RANK, **options).train(train)
    plain = without_adapter(model, **options).train(train)
    assert not hasattr(plain, "embedding_adapters") and model.embedding_adapters.lora_shared.any()
    assert torch.equal(model(**batch(PAIRS))[0], plain(**batch(PAIRS))[0])
    before = plain.decoder.output_projection.weight.clone()
    model.merge_embeddings()
    assert torch.equal(model.encoder.embed_tokens.weight, before)


@pytest.mark.parametrize("cls", [LSLoTransformerModel, TwoModules])
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"lora_shared_rank": 2}])
def test_it_acts_in_all_three_places_and_merged_the_same(options, cls):
    model = set_adapters(build(model=cls, **RANK, **options), 0.2).eval()
    plain, net_input = plainly(model, **options), batch(PAIRS)

    def results(model):
        ids = {key: value for key, value in net_input.items() if "lang_ids" in key}
        encoded = model.encoder(net_input["src_tokens"], net_input["src_lengths"], **ids)
        features = model.decoder(net_input["prev_output_tokens"], encoded, features_only=True)[0]
        return encoded["encoder_out"][0], features, model(**net_input)[0]

    found = results(model)
    torch.testing.assert_close(found, results(plain), atol=1e-5, rtol=1e-5)
    for mine, fresh in zip(found, results(without_adapter(model, **options))):
        assert not torch.allclose(mine, fresh, atol=0.05)
    for module in (model.encoder.embed_tokens, model.decoder.embed_tokens):
        torch.testing.assert_close(module(torch.tensor(9)), plain.encoder.embed_tokens.weight[9])
    for _ in range(2):  # the second time there is nothing to merge
        model.prepare_for_inference_(generation("en", None))
        torch.testing.assert_close(results(model), found, atol=1e-5, rtol=1e-5)
    kinds = (AdaptedEmbedding, AdaptedProjection, LayerAdapters)
    assert not any(isinstance(m, kinds[:2]) for m in model.modules())
    assert model.adapted_linears()  # the direction is not known: these stay
    build(seed=4, **options).load_state_dict(model.state_dict())  # a model without, and told so
    model.merge(0, 1)
    assert not any(isinstance(m, kinds) for m in model.modules())


def test_alone_it_needs_no_language():
    model = set_adapters(build(**ALONE), 0.2).eval()
    assert [p is model.embedding_adapters.lora_shared for p in adapters(model)] == [True]
    net_input = {key: v for key, v in batch(PAIRS).items() if "lang_ids" not in key}
    found = model(**net_input)[0]
    assert not model.adapted_linears()
    torch.testing.assert_close(found, plainly(model)(**net_input)[0], atol=1e-5, rtol=1e-5)
    model.prepare_for_inference_(generation())
    torch.testing.assert_close(model(**net_input)[0], found, atol=1e-5, rtol=1e-5)
    expected = stock(build()).state_dict()
    tidy(expected)
    assert model.state_dict().keys() == expected.keys()


@pytest.mark.parametrize("options", KINDS)
def test_gradients_are_those_of_the_formula(options):
    """E + Bᵀ A as one matrix of a plain model, whose gradient is handed on by the chain rule."""
    model, net_input = set_adapters(build(**RANK, **options), 0.2), batch(PAIRS)
    plain = plainly(model, **options)
    if not model.plan.all_sites:
        net_input = {key: value for key, value in net_input.items() if "lang_ids" not in key}
    weight = plain.encoder.embed_tokens.weight.requires_grad_()
    for each in (model, plain):  # the loss of padding does not count
        logits = each(**net_input)[0][net_input["prev_output_tokens"] != 1]
        logits.log_softmax(-1).square().mean().backward()
    A, B = model.embedding_adapters.lora_shared.detach().split([16, 38], 1)
    expected = torch.cat([B @ weight.grad, A @ weight.grad.t()], 1)
    found = model.embedding_adapters.lora_shared.grad
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert found[:, 16:].ne(0).all()  # of every word, the logits have each
    assert model.encoder.embed_tokens.weight.grad is None


def test_frozen_it_passes_gradients_on_and_has_none():
    trained = set_adapters(build(**RANK))
    frozen = build(seed=9, lora_train_languages=ALL_CODES, checkpoint_activations=True, **RANK)
    frozen.load_state_dict(trained.state_dict())
    found = []
    for model in (trained, frozen):
        model(**batch(PAIRS))[0].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() - found[1].keys() == {"embedding_adapters.lora_shared"}
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, found[0][name], atol=1e-6, rtol=1e-5)


def test_logits_are_not_copied():
    """Those of all words are the largest thing in a training step; the adapter adds into them."""
    done = []
    for options in ({}, RANK):
        model = set_adapters(build(**options), 0.2)
        with Work() as work:
            logits = model(**batch(PAIRS))[0]
            logits.backward(torch.ones_like(logits))
        full = [name for name, sizes in work.done if (28, 38) in sizes or (4, 7, 38) in sizes]
        done.append([name for name in full if "view" not in name])
    assert sorted(done[1]) == sorted([*done[0], "aten.addmm_.default"])


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16, torch.half])
def test_padding_is_harmless(dtype):
    """A sentence gives the same alone and beside a longer one, whatever <pad> has learned."""
    if dtype == torch.half and not toy.HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    model = set_adapters(build(**RANK), 0.2).to(dtype).eval()
    assert model.embedding_adapters.lora_shared[:, 16 + 1].any()
    mixed = batch(PAIRS)
    padded = mixed["src_tokens"][3].eq(1)
    assert padded.any()
    alone = rows(mixed, [3])
    alone["src_tokens"] = alone["src_tokens"][:, ~padded]
    tolerance = {torch.float: 1e-5, torch.bfloat16: 0.1, torch.half: 0.02}[dtype]
    found, expected = model(**mixed)[0][3:], model(**alone)[0]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_lower_precision_agrees_with_fp32(dtype):
    if dtype == torch.half and not toy.HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    model, net_input = set_adapters(build(**RANK), 0.2), batch(PAIRS)
    expected = model(**net_input)[0]
    model = model.to(dtype)
    assert model.embedding_adapters.lora_shared.dtype == dtype
    found = model(**net_input)[0]
    assert found.dtype == dtype
    found.square().mean().backward()
    assert Adapter.of(model.embedding_adapters.lora_shared).weight.grad.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    with torch.no_grad():
        model.eval().merge(0, 1)
    merged = model(**rows(net_input, [0, 3]))[0].float()
    torch.testing.assert_close(merged, expected[[0, 3]], atol=0.1, rtol=0.1)


def test_autocast_computes_in_its_dtype():
    model, net_input = set_adapters(build(**RANK), 0.2), batch(PAIRS)
    expected = model(**net_input)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**net_input)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    found.float().square().mean().backward()
    assert model.embedding_adapters.lora_shared.grad.ne(0).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_an_adapter_of_its_own(copied):
    model, net_input = set_adapters(build(**RANK)), batch(PAIRS)
    expected = model(**net_input)[0].detach()
    made = copied(model)
    assert torch.equal(made(**net_input)[0], expected)
    with torch.no_grad():
        made.embedding_adapters.lora_shared.zero_()
    plain = without_adapter(model)
    assert torch.equal(made(**net_input)[0], plain(**net_input)[0])
    assert torch.equal(model(**net_input)[0], expected)
    weight = made.embedding_adapters.lora_shared
    assert Adapter.of(weight).weight is weight
    assert made.state_dict().keys() == model.state_dict().keys()
    made.merge_embeddings()
    assert hasattr(model, "embedding_adapters")


def test_the_keys_are_those_of_the_model_without_it_and_two_more():
    model = build(**RANK)
    assert model.state_dict().keys() - build().state_dict().keys() == KEYS
    assert len(adapters(model)) == len(adapters(build())) + 1
    again = build(seed=8, **RANK)
    again.load_state_dict(set_adapters(model).state_dict())
    assert torch.equal(again(**batch(PAIRS))[0], model(**batch(PAIRS))[0])


@pytest.mark.parametrize(
    "options",
    [
        {"share_all_embeddings": False},
        {"share_all_embeddings": False, "share_decoder_input_output_embed": True},
        {"share_all_embeddings": False, "decoder_embed_dim": 12},
        {"adaptive_softmax_cutoff": "10,20", "tie_adaptive_weights": False},
    ],
    ids=str,
)
def test_embeddings_of_several_matrices_are_refused(options):
    message = "^lslora: error: --lora-embedding-rank adapts embeddings that are one matrix in enc"
    with pytest.raises(UserError, match=message):
        build(**RANK, **options)
    build(**options)


@pytest.mark.parametrize("langs, seed", [(["ja", "de", "fr", "en"], 5), (["ja", "xx", "en"], 5)])
def test_columns_follow_their_words(langs, seed):
    """And so do their masks; a word that the checkpoint lacks begins with none."""
    model = set_adapters(model_with(**RANK))
    holder = model.embedding_adapters
    holder.mask[:, 16 + 4 :: 3] = False
    holder.mask[1, 16 + 35] = False
    holder.refresh_pruned()
    holder.lora_shared.data.mul_(holder.mask)
    other = model_with(langs, seed=seed, **RANK)
    other.load_state_dict(model.state_dict())
    theirs, symbols = other.embedding_adapters, other.encoder.dictionary.symbols
    assert theirs.is_pruned
    assert torch.equal(theirs.lora_shared[:, :16], holder.lora_shared[:, :16])
    for place, symbol in enumerate(symbols, 16):
        if symbol in model.encoder.dictionary:
            there = 16 + model.encoder.dictionary.index(symbol)
            assert torch.equal(theirs.lora_shared[:, place], holder.lora_shared[:, there]), symbol
            assert torch.equal(theirs.mask[:, place], holder.mask[:, there]), symbol
        else:
            assert not theirs.lora_shared[:, place].any() and theirs.mask[:, place].all()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    other.load_state_dict(copy.deepcopy(other.state_dict()))  # what it holds is in its own order
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("words, rank, fits", [(40, 3, True), (40, 2, False)])
def test_the_doctor_takes_a_checkpoint_of_other_words(words, rank, fits):
    """Which columns it has is matched by token; their number here says nothing."""
    options = {**toy.OPTIONS, "lora_embedding_rank": rank}
    made = LSLoTransformerModel.build_model(Namespace(**options), toy.task(words))
    checkpoint = SimpleNamespace(weights=made.state_dict(), path="x.pt")
    if fits:
        check_fit(build(**RANK), checkpoint)
    else:
        with pytest.raises(
            ConfigError, match="of the embeddings' adapter it has rank 2, this model rank 3"
        ):
            check_fit(build(**RANK), checkpoint)


def test_a_base_model_leaves_it_fresh():
    model = build(**RANK)
    fresh = model.embedding_adapters.lora_shared.clone()
    model.load_state_dict(build(seed=6, model=TransformerModel).state_dict())
    assert torch.equal(model.embedding_adapters.lora_shared, fresh)


@pytest.mark.parametrize("others", [{}, {"lora_rank": "0", "lora_shared_rank": 2}])
def test_beam_search_alone_and_in_an_ensemble_with_a_model_without(others):
    """Merged, or not; in the ensemble each keeps its own."""
    first = set_adapters(build(**RANK), 0.3, seed=4).eval()
    second = set_adapters(build(seed=3, **others), 0.3, seed=5).eval()
    net_input = without_targets(batch(PAIRS))

    def ensemble(*models):
        generator = SequenceGenerator([*models], dictionary(), beam_size=4, max_len_b=12)
        found = generator.generate([*models], {"net_input": net_input})
        return [([h["tokens"].tolist() for h in best], float(best[0]["score"])) for best in found]

    alone, together = beam_search(first, net_input), ensemble(first, second)
    plain = plainly(first).eval()
    for expected, found in zip(beam_search(plain, net_input), alone):
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in ensemble(plain, second)]
    for model in (first, second):
        model.prepare_for_inference_(generation())
    merged = ensemble(first, second)
    assert [tokens for tokens, _ in merged] == [tokens for tokens, _ in together]
    assert [s for _, s in merged] == pytest.approx([s for _, s in together], abs=1e-5)
    assert len({str(tokens) for tokens, _ in together}) > 1 and len(CODES) == 4

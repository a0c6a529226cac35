"""The adapted transformer: mixed batches, exactness against stock fairseq, gradients, beams."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import nn
from toy import batch, build, dictionary, rows, set_adapters, stock

from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.lora import routing
from lslora_fairseq.lora.plan import SHARED

PAIRS = [(0, 1), (3, 2), (1, 0), (1, 3), (2, 2), (0, 1), (3, 0), (2, 1)]
SIDES = [
    {},  # encoder source*3,target*1, decoder target
    {"encoder_index_side": "target", "decoder_index_side": "source"},
    {"lora_weight_learning": True},
    {"lora_shared_rank": 3, "lora_shared_alpha": 2.0},
    {"lora_rank": "0", "lora_shared_rank": 3},
]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("train", [True, False])
def test_mixed_batch_equals_single_language_runs(sides, train):
    model = set_adapters(build(**sides)).train(train)
    mixed = batch(PAIRS)
    out = model(**mixed)[0]
    for pair in sorted(set(PAIRS)):
        chosen = [i for i, p in enumerate(PAIRS) if p == pair]
        alone = model(**rows(mixed, chosen))[0]
        torch.testing.assert_close(out[chosen], alone, atol=2e-5, rtol=1e-5)
    # and the adapters do differ: another language gives another output; but where all share one
    other = {**mixed, "target_lang_ids": (mixed["target_lang_ids"] + 1) % 4}
    differs = not torch.allclose(out, model(**other)[0], atol=1e-2)
    assert differs == bool(model.plan.sites)


def test_one_sentence_of_each_direction():
    model = set_adapters(build())
    mixed = batch(PAIRS)
    out = model(**mixed)[0]
    for i in range(len(PAIRS)):
        torch.testing.assert_close(
            out[i : i + 1], model(**rows(mixed, [i]))[0], atol=2e-5, rtol=1e-5
        )


SHAPES = {
    "post-norm": {"encoder_normalize_before": False, "decoder_normalize_before": False},
    "separate embeddings": {"share_all_embeddings": False},
    "another width in the decoder": {"share_all_embeddings": False, "decoder_embed_dim": 12},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "layer norm of embeddings": {"layernorm_embedding": True},
    "cross+self-attention": {"cross_self_attention": True},
    "checkpointed": {"checkpoint_activations": True},
    "weight learning": {"lora_weight_learning": True},
    "shared": {"lora_shared_rank": 3, "lora_shared_alpha": 2.0},
    "shared and checkpointed": {"lora_shared_rank": 3, "checkpoint_activations": True},
    "shared and weight learning": {"lora_shared_rank": 3, "lora_weight_learning": True},
    "shared alone": {"lora_rank": "0", "lora_shared_rank": 3},
}


@pytest.mark.parametrize("shape", [{}, *SHAPES.values()], ids=["default", *SHAPES])
def test_merged_weights_of_one_direction_give_the_same_output(shape):
    """ΔW added to the frozen weights of a stock transformer: the adapters act everywhere."""
    model = set_adapters(build(**shape), scale=0.2)
    for source, target in [(0, 2), (3, 1)]:
        merged = stock(model, **shape)
        for linear in model.adapted_linears():
            weight = merged.get_submodule(linear.site.name).weight.data
            for side in linear.adapters:
                language = {"source": source, "target": target, SHARED: 0}[side]
                weight += linear.delta_weight(language, side)
        net_input = batch([(source, target)] * 3)
        expected = merged(**{k: v for k, v in net_input.items() if "lang_ids" not in k})[0]
        found = model(**net_input)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found.square().sum().backward()
        given = {
            p.param_group.language
            for p in model.parameters()
            if p.grad is not None and p.param_group.side != SHARED
        }
        owners = {source, target} if model.plan.sites else set()
        assert given - {None} == owners  # w belongs to no language
        model.zero_grad()


def base_state(model):
    """What a state dict holds beside the adapters."""
    return {key: v for key, v in model.state_dict().items() if not is_adapter_key(key)}


def generation(source=None, target=None):
    """The configuration that fairseq-generate hands to prepare_for_inference_."""
    task = SimpleNamespace(source_lang=source, target_lang=target)
    return SimpleNamespace(generation=SimpleNamespace(beam=5), task=task)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float, 1e-5), (torch.bfloat16, 0.05)])
def test_one_direction_is_merged_for_decoding(sides, dtype, tolerance):
    model = set_adapters(build(**sides), scale=0.2).to(dtype).eval()
    net_input = batch([(3, 1)] * 3)
    expected = model(**net_input)[0]
    hypotheses = beam_search(model, without_targets(net_input))
    model.prepare_for_inference_(generation("ja", "en"))
    torch.testing.assert_close(model(**net_input)[0], expected, atol=tolerance, rtol=tolerance)
    if dtype == torch.float:
        merged = beam_search(model, without_targets(net_input))
        assert [[tokens for tokens, _ in best] for best in hypotheses] == [
            [tokens for tokens, _ in best] for best in merged
        ]
    assert {*model.state_dict()} == {*base_state(build())}
    assert not model.adapted_linears()


def test_merging_a_fresh_adapter_changes_no_bit():
    model = build()
    before = {key: value.clone() for key, value in base_state(model).items()}
    model.merge(0, 1)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_merged_model_refuses_other_directions():
    model = set_adapters(build())
    model.merge(3, 1)
    for pair in ((3, 2), (0, 1)):
        with pytest.raises(RuntimeError, match="load the checkpoint anew"):
            model(**batch([(3, 1), pair]))


def test_adapters_stay_where_no_direction_is_known():
    model = build()
    for direction in ((None, None), ("en", "xx"), ("en", None)):
        model.prepare_for_inference_(generation(*direction))
        assert len(model.adapted_linears()) == 4 * 5 + 2 * 8


def test_post_norm_models_decode_with_their_adapters():
    """fairseq 0.12.2 has a fused path for them in eval mode, which would read the raw weights."""
    model = set_adapters(build(encoder_normalize_before=False, decoder_normalize_before=False))
    model.load_state_dict(model.state_dict())
    net_input = batch(PAIRS)
    with torch.no_grad():
        decoded = model.eval()(**net_input)[0]
    torch.testing.assert_close(decoded, model.train()(**net_input)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"encoder_target_modules": "self_attn.out_proj,fc2,fc1"}, {"lora_shape": "square"}],
)
def test_fresh_adapters_change_no_bit(train, options):
    """Against the same model with every adapted linear replaced by the frozen one inside it."""
    model = build(**options).train(train)
    net_input = batch(PAIRS)
    out = model(**net_input)[0]
    for linear in model.adapted_linears():
        plain = nn.Linear(linear.in_features, linear.out_features)
        plain.weight, plain.bias = linear.weight, linear.bias
        parent, _, name = linear.site.name.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    assert not model.adapted_linears()
    assert torch.equal(model(**net_input)[0], out)


@pytest.mark.parametrize("train", [True, False])
def test_fresh_adapters_agree_with_stock_fairseq(train):
    model = build().train(train)
    plain = stock(model).train(train)
    net_input = batch(PAIRS)
    expected = plain(**{k: v for k, v in net_input.items() if "lang_ids" not in k})[0]
    torch.testing.assert_close(model(**net_input)[0], expected, atol=1e-5, rtol=1e-5)


def beam_search(model, net_input, beam=4):
    generator = SequenceGenerator([model], dictionary(), beam_size=beam, max_len_b=12)
    hypotheses = generator.generate([model], {"net_input": net_input})
    return [[(h["tokens"].tolist(), float(h["score"])) for h in best] for best in hypotheses]


def without_targets(net_input):
    return {k: v for k, v in net_input.items() if k != "prev_output_tokens"}


def test_fresh_adapters_decode_like_stock_fairseq():
    model = build().eval()
    net_input = without_targets(batch(PAIRS))
    plain = {k: v for k, v in net_input.items() if "lang_ids" not in k}
    ours, theirs = beam_search(model, net_input), beam_search(stock(model).eval(), plain)
    for mine, other in zip(ours, theirs):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in other]
        assert [s for _, s in mine] == pytest.approx([s for _, s in other], abs=1e-5)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("gathers", [False, True])
def test_beam_search_of_mixed_directions_equals_each_alone(monkeypatch, sides, gathers):
    """Beams finish at different steps, so sentences are dropped and reordered on the way."""
    costs = routing.COSTS["cpu"]._replace(unsorted_columns=0 if gathers else 64)
    monkeypatch.setitem(routing.COSTS, "cpu", costs)
    model = set_adapters(build(**sides), scale=0.3, seed=4).eval()
    model.encoder.embed_tokens.weight.data[2] *= 3  # </s> likelier for some, less for others
    mixed = without_targets(batch(PAIRS))
    together = beam_search(model, mixed)
    alone = [beam_search(model, rows(mixed, [i]))[0] for i in range(len(PAIRS))]
    for mine, other in zip(together, alone):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in other]
        assert [s for _, s in mine] == pytest.approx([s for _, s in other], abs=1e-5)
    lengths = {len(best[0][0]) for best in together}
    assert len(lengths) > 1  # the test would be weak if all sentences ended together


@pytest.mark.parametrize("together", [False, True])
def test_steps_of_attention_are_those_of_fairseq(together):
    """fairseq takes its own path where it is asked for weights. Sources are padded, and the beams
    of one may look into it together."""
    model, found, beam = set_adapters(build(), scale=0.3, seed=4).eval(), [], 3
    for layer in model.decoder.layers if together else ():
        layer.encoder_attn.set_beam_size(beam)
    for wants_weights in (True, False):
        for layer in model.decoder.layers:
            layer.need_attn = wants_weights
        found.append(beam_search(model, without_targets(batch(PAIRS)), beam))
    for mine, other in zip(*found):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in other]
        assert [s for _, s in mine] == pytest.approx([s for _, s in other], abs=1e-5)


def test_a_word_of_one_language_is_there_for_its_sentences_alone():
    """In search; a full pass has the distribution over all words."""
    model = set_adapters(build(), scale=0.3, seed=4).eval()
    owner, mixed = 3, batch(PAIRS)
    whole, before = model(**mixed)[0], beam_search(model, without_targets(mixed))
    foreign = [i for i, pair in enumerate(PAIRS) if owner not in pair]
    words = [w for i in foreign for tokens, _ in before[i] for w in tokens if w != 2]
    word = max(words, key=words.count)
    model.decoder.set_own_words([(word, owner)])
    assert torch.equal(whole, model(**mixed)[0])
    found = beam_search(model, without_targets(mixed))
    for i, (was, mine) in enumerate(zip(before, found)):
        alone = beam_search(model, rows(without_targets(mixed), [i]))[0]
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in alone]
        assert (mine == was) == (i not in foreign)
        assert i not in foreign or not any(word in tokens for tokens, _ in mine)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_the_adapters_of_the_batch_and_no_other(sides, checkpointed):
    model = set_adapters(build(checkpoint_activations=checkpointed, **sides))
    pairs = [(0, 1), (0, 3), (0, 1)]
    model(**batch(pairs))[0].square().sum().backward()
    present = {"source": {0}, "target": {1, 3}, SHARED: {0}}
    for linear in model.adapted_linears():
        for side, adapters in linear.adapters.items():
            for language, code in enumerate(adapters.names):
                grad = adapters.weight(language).grad
                assert (grad is not None) == (language in present[side]), code
                for columns in adapters.columns[linear.site.module]:
                    assert grad is None or grad[:, columns].ne(0).any(1).all(), (linear.site, code)


def test_the_frozen_base_has_no_gradient():
    model = set_adapters(build())
    model(**batch(PAIRS))[0].sum().backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == is_adapter_key(name), name
        assert param.requires_grad == is_adapter_key(name), name


def test_checkpointed_activations_use_their_own_batch_in_backward():
    """A second forward pass before backward must not change the gradients of the first."""
    grads = []
    for checkpointed in (False, True):
        model = set_adapters(build(checkpoint_activations=checkpointed))
        loss = model(**batch(PAIRS))[0].square().mean()
        if checkpointed:
            model(**batch([(1, 1)] * 2))
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*grads):
        torch.testing.assert_close(plain, again, atol=1e-5, rtol=1e-4)


def test_a_model_of_one_side_needs_only_that_sides_languages():
    model = set_adapters(build(encoder_index_side="target"))
    net_input = batch(PAIRS)
    expected = model(**net_input)[0]
    net_input["source_lang_ids"] = None
    assert torch.equal(model(**net_input)[0], expected)
    net_input["target_lang_ids"] = None
    with pytest.raises(RuntimeError, match="target_lang_ids"):
        model(**net_input)


def test_layers_and_modules_can_be_chosen():
    model = build(
        encoder_lora_layers="1,3",
        encoder_target_modules="fc2",
        decoder_target_modules="encoder_attn.out_proj",
        decoder_lora_layers="0",
    )
    assert [linear.site.name for linear in model.adapted_linears()] == [
        "encoder.layers.1.fc2",
        "encoder.layers.3.fc2",
        "decoder.layers.0.encoder_attn.out_proj",
    ]
    assert [s.side for s in model.plan.sites] == ["source", "target", "target"]


def test_state_dict_round_trip_changes_no_bit():
    model = set_adapters(build())
    model.adapted_linears()[3].masks(0)[1][0, 2] = False
    again = build(seed=9)
    again.load_state_dict(model.state_dict())
    net_input = batch(PAIRS)
    assert torch.equal(model(**net_input)[0], again(**net_input)[0])
    assert not again.adapted_linears()[3].masks(0)[1][0, 2]
    assert [
        linear.adapters[linear.site.side].is_pruned for linear in again.adapted_linears()[:6]
    ] == [
        *[True] * 5,  # the first layer
        False,
    ]


def test_two_hundred_languages():
    tiers = "all=" + ",".join(f"l{i:03d}" for i in range(200))
    model = set_adapters(build(lora_tiers=tiers, lora_rank="2"))
    mixed = batch([(0, 199), (137, 5)])
    out = model(**mixed)[0]
    torch.testing.assert_close(out[1:], model(**rows(mixed, [1]))[0], atol=1e-5, rtol=1e-5)

"""What a forward pass keeps to itself, and what is asked of its language ids."""

import copy
import gc
import threading
import weakref
from argparse import Namespace

import pytest
import torch
from fairseq.models.transformer import TransformerModel
from fairseq.optim import OPTIMIZER_REGISTRY
from toy import adapters, batch, build, set_adapters, stock

from lslora_fairseq.lora import linear
from lslora_fairseq.lora.routing import current_pass

DIRECTIONS = [(0, 1), (2, 3)]
CHECKPOINTED = {"checkpoint_activations": True}


def in_threads(work):
    """Calls work(0) and work(1) side by side; raises what they raise."""
    errors = []

    def guarded(number):
        try:
            work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_threads_decode_side_by_side():
    model = set_adapters(build()).eval()
    batches = [batch([direction] * 4, length=9) for direction in DIRECTIONS]
    with torch.no_grad():
        expected = [model(**b)[0] for b in batches]
    assert not torch.allclose(*expected, atol=1e-2)

    def work(number):
        for _ in range(30):
            with torch.no_grad():
                assert torch.equal(model(**batches[number])[0], expected[number])

    in_threads(work)


@pytest.mark.parametrize("options", [{}, CHECKPOINTED], ids=["kept", "checkpointed"])
def test_threads_train_their_own_languages(options):
    """Forward and backward passes of one model in two threads, each on its own languages."""
    model = set_adapters(build(**options)).train()
    batches = [batch([direction] * 4, length=9) for direction in DIRECTIONS]
    owners = [
        [p for p in adapters(model) if p.param_group.language in direction]
        for direction in DIRECTIONS
    ]

    def gradients(number):
        for param in owners[number]:
            param.grad = None
        model(**batches[number])[0].square().mean().backward()
        return [param.grad for param in owners[number]]

    expected = [gradients(number) for number in (0, 1)]
    assert all(any(g is not None for g in grads) for grads in expected)

    def work(number):
        for _ in range(10):
            for found, wanted in zip(gradients(number), expected[number]):
                assert (found is None) == (wanted is None)
                assert found is None or torch.equal(found, wanted)

    in_threads(work)


@pytest.mark.parametrize("options", [{}, CHECKPOINTED], ids=["kept", "checkpointed"])
def test_a_pass_that_fails_leaves_nothing_behind(monkeypatch, options):
    """As after an out-of-memory that the trainer survives."""
    model, net_input = set_adapters(build(**options)), batch(DIRECTIONS * 2)
    expected = model(**net_input)[0]
    stacks, stack = [], linear.stack

    def watched(*args, **kwargs):
        made = stack(*args, **kwargs)
        stacks.append(weakref.ref(made[0]))
        return made

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(linear, "stack", watched)
    with monkeypatch.context() as context:
        context.setattr(model.decoder.layers[1].fc2, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**net_input)
    assert len(stacks) > 4
    gc.collect()
    assert not any(ref() is not None for ref in stacks)
    assert current_pass() == ({}, {}, {})
    assert torch.equal(model(**net_input)[0], expected)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([0], "source_lang_ids must hold one whole number for each of the 2 sentences, found"),
        ([[0, 1]], r"found torch.int64 of shape \(1, 2\)"),
        ([0.0, 1.0], r"found torch.float32 of shape \(2,\)"),
        ([0, -1], "language indices -1, 0: the model has adapters of 4 languages, 0 to 3"),
        ([4, 1], "language indices 1, 4: the model has adapters of 4 languages, 0 to 3"),
    ],
)
def test_language_ids_are_checked(ids, message):
    model = set_adapters(build())
    with pytest.raises(ValueError, match=message):
        model(**{**batch(DIRECTIONS), "source_lang_ids": torch.tensor(ids)})


def test_target_ids_are_checked_where_no_encoder_layer_needs_them():
    model = set_adapters(build(encoder_index_side="source"))
    for ids in ([1], [1, 9]):
        with pytest.raises(ValueError, match="target_lang_ids|language indices 1, 9"):
            model(**{**batch(DIRECTIONS), "target_lang_ids": torch.tensor(ids)})


def test_one_merge_is_all():
    model, net_input = set_adapters(build()).eval(), batch([(0, 1)] * 2)
    with pytest.raises(ValueError, match="target language 4: the model has adapters of languages"):
        model.merge(0, 4)
    expected = model(**net_input)[0]
    for _ in range(2):  # the second is for the same direction
        model.merge(0, 1)
        torch.testing.assert_close(model(**net_input)[0], expected, atol=1e-5, rtol=1e-5)
    message = "the adapters of source de and target en were merged into the weights before those of"
    with pytest.raises(RuntimeError, match=f"{message} source en and target de: load"):
        model.merge(1, 0)


def test_hidden_states_of_both_stacks_are_those_of_the_base():
    """Fresh adapters change nothing; the states come in the caller's order."""
    model, net_input = build().eval(), batch([(3, 2), (0, 1), (2, 0), (1, 3)])
    base = stock(model).eval()
    plain = {k: v for k, v in net_input.items() if "lang_ids" not in k}
    found, expected = (
        m(**inputs, return_all_hiddens=True)[1]["inner_states"]
        for m, inputs in ((model, net_input), (base, plain))
    )
    assert len(found) == 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    encoded = [
        m.encoder(n["src_tokens"], n["src_lengths"], return_all_hiddens=True, **ids)
        for m, n, ids in (
            (model, net_input, {k: v for k, v in net_input.items() if "lang_ids" in k}),
            (base, plain, {}),
        )
    ]
    torch.testing.assert_close(*(e["encoder_states"] for e in encoded), atol=1e-5, rtol=1e-5)
    assert model(**net_input)[1]["inner_states"] == []  # they cost time, and nobody asked


def optimizer(params):
    pruned = OPTIMIZER_REGISTRY["pruned_sgd"]
    options = Namespace(
        lr=[0.1], momentum=0.0, weight_decay=0.0, pruning_final_sparsity=0.0, pruning_begin=1,
        pruning_duration=1, pruning_unit="epoch", pruning_scope="language", pruning_target="B",
        pruning_masks="keep",
    )  # fmt: skip
    return pruned(options, params)


@pytest.mark.parametrize(
    "options", [{}, CHECKPOINTED, {"lora_weight_learning": True}], ids=lambda o: [*o, "plain"][0]
)
def test_a_deep_copy_is_a_whole_model_of_its_own(options):
    model, net_input = set_adapters(build(**options)), batch(DIRECTIONS * 2)
    expected = model(**net_input)[0].detach()
    made = copy.deepcopy(model)
    steps = optimizer(adapters(made))
    steps.backward(made(**net_input)[0].square().sum())
    steps.step()
    assert torch.equal(model(**net_input)[0], expected)
    assert not torch.allclose(made(**net_input)[0], expected, atol=1e-3)
    for param in adapters(made):
        assert param.param_group.weight is param


def test_a_parameter_is_found_by_its_name():
    """Registering one again, as torch.nn.utils.prune does, puts it last."""
    model, net_input = set_adapters(build()), batch(DIRECTIONS * 2)
    expected = model(**net_input)[0]
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        for side in ("source", "target"):
            holder = getattr(layer, f"{side}_adapters", None)
            if holder is not None:
                weight = holder.lora_de
                del holder.lora_de
                holder.register_parameter("lora_de", weight)
    assert torch.equal(model(**net_input)[0], expected)


def test_a_second_derivative_is_refused_in_words():
    model = set_adapters(build())
    loss = model(**batch(DIRECTIONS))[0].square().sum()
    grads = torch.autograd.grad(loss, adapters(model)[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


@pytest.mark.parametrize(
    "names",
    [
        ["TransformerEncoderLayerBase"],
        ["TransformerDecoderLayerBase"],
        ["TransformerEncoder", "TransformerDecoder"],
        ["MultiheadAttention"],
        None,
    ],
    ids=str,
)
def test_dropout_is_retained_under_the_names_of_stock_fairseq(names):
    def retained(model):
        cfg = Namespace(retain_dropout=True, retain_dropout_modules=names)
        model.make_generation_fast_(
            retain_dropout=cfg.retain_dropout, retain_dropout_modules=cfg.retain_dropout_modules
        )
        return {
            name for name, m in model.named_modules() if getattr(m, "apply_during_inference", 0)
        }

    found = retained(build(dropout=0.1))
    assert found and found == retained(build(dropout=0.1, model=TransformerModel))

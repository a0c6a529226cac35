"""A frozen base that is cast to half precision, and what stays in fp32."""

from pathlib import Path

import pytest
import torch
import toy
from torch import nn
from toy import adapters, batch, build, set_adapters

from lslora_fairseq.checkpoints import being_loaded
from lslora_fairseq.keys import EMBEDDINGS, is_adapter_key
from lslora_fairseq.lora.embedding import AdaptedEmbedding, AdaptedProjection

PAIRS = [(0, 1), (1, 2), (2, 3), (3, 0)]
MORE = {"lora_shared_rank": 3, "lora_embedding_rank": 3, "lora_train_tokens": "fr,ja"}
DTYPES = [
    torch.bfloat16,
    pytest.param(
        torch.half,
        marks=pytest.mark.skipif(not toy.HALF_ON_CPU, reason="this torch has no fp16 on a CPU"),
    ),
]


def cast(dtype=torch.bfloat16, seed=1, **options):
    model = build(seed, **options)
    model.cast_base(dtype)
    return model


def base_of(model):
    return {name: p for name, p in model.named_parameters() if not is_adapter_key(name)}


def size(params):
    return sum(param.numel() * param.element_size() for param in params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_takes_half_the_memory_and_what_is_trained_stays_in_fp32(dtype):
    whole, half = build(**MORE), cast(dtype, **MORE)
    assert {param.dtype for param in base_of(half).values()} == {dtype}
    assert 2 * size(base_of(half).values()) == size(base_of(whole).values())
    assert {param.dtype for param in adapters(half)} == {torch.float}
    for name, param in base_of(whole).items():
        assert torch.equal(half.get_parameter(name), param.to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"lora_weight_learning": True}, MORE])
def test_activations_have_its_dtype(dtype, options):
    """Nothing on the way brings them back to fp32, in training and in decoding."""
    model, seen = set_adapters(cast(dtype, **options)), []

    def note(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output  # attention's weights come after
        tensors = [t for t in (*inputs, first) if torch.is_tensor(t)]
        seen.extend(t.dtype for t in tensors if t.is_floating_point())

    for module in model.modules():
        module.register_forward_hook(note)
    for train in (True, False):
        out, _ = model.train(train)(**batch(PAIRS))
        assert out.isfinite().all()
    assert len(seen) > 100 and set(seen) == {dtype}


class BatchFirstLinear(nn.Linear):
    """torch rounds the product of a transposed input twice: before it adds the bias, and after."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
def test_fresh_adapters_change_no_bit(dtype, train):
    """Against the same model without any, cast alike."""
    model = cast(dtype, **MORE).train(train)
    net_input = batch(PAIRS)
    out = model(**net_input)[0]
    for linear in model.adapted_linears():
        plain = BatchFirstLinear(linear.in_features, linear.out_features)
        plain.weight, plain.bias = linear.weight, linear.bias
        parent, _, name = linear.site.name.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    for module in list(model.modules()):
        if isinstance(module, (AdaptedEmbedding, AdaptedProjection)):
            module.restore()
    assert torch.equal(model(**net_input)[0], out)


def test_norms_are_computed_in_fp32():
    norm = cast().encoder.layers[0].self_attn_layer_norm
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
        x = torch.randn(5, 4, 16, dtype=torch.bfloat16) * 3 + 40  # the mean hides in bf16
        expected = nn.functional.layer_norm(
            x.float(), (16,), norm.weight.float(), norm.bias.float(), norm.eps
        )
        assert torch.equal(norm(x), expected.bfloat16())


def gradients(model):
    set_adapters(model, 0.2)
    net_input = batch(PAIRS)
    net_input["src_tokens"][:, 4] = torch.tensor([34, 35, 36, 37])  # the tokens
    model(**net_input)[0].float().logsumexp(-1).sum().backward()
    return {n: param.grad for n, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_fp32_but_for_roundings(dtype, checkpointed):
    """Of adapters of every kind, rows of tokens and the embeddings' among them; fp32 on the same
    rounded base. Where bf16 turns an input of a ReLU to 0, small gradients differ by more."""
    rounded = build(**MORE)
    for param in base_of(rounded).values():
        param.data = param.data.to(dtype).float()
    expected = gradients(rounded)
    found = gradients(cast(dtype, **MORE, checkpoint_activations=checkpointed))
    assert {gradient.dtype for gradient in found.values()} == {torch.float}
    errors = {name: found[name] - gradient for name, gradient in expected.items()}
    digits = torch.finfo(dtype).eps
    for name, error in errors.items():
        assert (
            error.norm() < (20 if dtype == torch.bfloat16 else 5) * digits * expected[name].norm()
        )
    error, size = (torch.cat([t.flatten() for t in ts.values()]) for ts in (errors, expected))
    assert error.norm() < 4 * digits * size.norm()


@pytest.fixture
def saved(tmp_path):
    """The file of a base model, and its state dict."""
    state = {k: v for k, v in build(9).state_dict().items() if not is_adapter_key(k)}
    # fairseq 0.12.2 has buffers without meaning
    state = {k: v for k, v in state.items() if not k.endswith("_float_tensor")}
    torch.save({"model": state}, tmp_path / "base.pt")
    return tmp_path / "base.pt", state


def loaded(path, model, state=None):
    """The model, filled from a file as fairseq's trainer does it."""
    state = torch.load(path)["model"] if state is None else state
    token = being_loaded.set(str(path))
    try:
        model.load_state_dict(state)
    finally:
        being_loaded.reset(token)
    return model


def knowing(model, monkeypatch):
    """A model whose file needs no options of its own."""
    monkeypatch.setattr(
        "lslora_fairseq.models.lslora_transformer.read_args",
        lambda path: {"langs": list(toy.CODES)},
    )
    model.identity.langs = list(toy.CODES)
    return model


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_a_state_dict_holds_the_base_as_it_was(saved, monkeypatch, dtype):
    path, state = saved
    state.update(
        {name: weight.to(dtype) for name, weight in state.items() if "version" not in name}
    )
    torch.save({"model": state}, path)
    model = loaded(path, knowing(cast(), monkeypatch))
    found = model.state_dict()
    for name, weight in state.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
    assert model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    assert len({found[key].data_ptr() for key in EMBEDDINGS}) == 1  # saved once
    again = loaded(path, knowing(cast(seed=5), monkeypatch), found)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def mapped(path):
    """The addresses at which this process has a file in its memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = (line[0].split("-") for line in lines if line[-1] == str(path))
    return [range(int(first, 16), int(last, 16)) for first, last in places]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from /proc")
def test_weights_stay_in_a_file_that_is_replaced(saved, monkeypatch):
    """They are no memory of the process."""
    path, state = saved
    model = loaded(path, knowing(cast(), monkeypatch))
    places = mapped(path)
    for name, weight in model.state_dict().items():
        if name in state and weight.dim() and "version" not in name:
            assert any(weight.data_ptr() in place for place in places), name
    path.with_name("other.pt").write_bytes(b"other")
    path.with_name("other.pt").replace(path)
    found = model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in state.items())


def test_what_a_file_lacks_is_kept(saved, monkeypatch):
    """Rows of tokens, in another order here, and weights of no file."""
    path, state = saved
    other = {**state, **{k: torch.cat([state[k][:34], state[k][34:].flip(0)]) for k in EMBEDDINGS}}
    other["decoder.layers.1.fc2.bias"] = state["decoder.layers.1.fc2.bias"] * (1 + 1e-6)
    found = loaded(path, knowing(cast(), monkeypatch), dict(other)).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in other.items())


def test_trained_rows_of_tokens_keep_their_digits(saved, monkeypatch):
    path, _ = saved
    model = loaded(path, knowing(cast(**MORE), monkeypatch))
    row = model.token_rows.weight(2)
    with torch.no_grad():
        row.add_(0.001)
    model.write_token_rows()
    assert torch.equal(model.encoder.embed_tokens.weight[36], row[0].bfloat16())
    state = model.state_dict()
    assert all(torch.equal(state[key][36], row[0]) for key in EMBEDDINGS)
    for at in (None, path):  # a state dict of Python, and one of a file
        again = knowing(cast(seed=5, **MORE), monkeypatch)
        again.load_state_dict(dict(state)) if at is None else loaded(at, again, dict(state))
        assert torch.equal(again.token_rows.weight(2), row)
        assert torch.equal(again.state_dict()[EMBEDDINGS[0]][36], row[0])


@pytest.mark.parametrize("options", [{}, MORE])
def test_a_merged_model_is_saved_as_it_is(saved, monkeypatch, options):
    model = set_adapters(loaded(saved[0], knowing(cast(**options), monkeypatch)))
    model.merge(0, 1)
    found = model.state_dict()
    for name, param in model.named_parameters():
        assert torch.equal(found[name], param), name


def test_new_rows_are_those_of_a_run_in_fp32(saved):
    """Of tokens that the base lacks, with a row that is trained."""
    models = [build(**MORE), cast(**MORE)]
    one, other = (model.state_dict()[EMBEDDINGS[0]][[36, 37]] for model in models)
    assert torch.equal(one, other) and one.any()

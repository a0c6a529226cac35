"""Every inner optimizer is fairseq's own, for each language apart."""

import pytest
import torch
from benchmark.operations import Operations
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.adam import Adam
from toy import adapters, batch, build, set_adapters
from updates import ALL, optimizer_for, options, update

from lslora_fairseq.errors import UserError
from lslora_fairseq.lora.adapters import Adapter
from lslora_fairseq.optim.pruned import INNER_OPTIMIZERS, MATRIX_OPTIMIZERS

# a learning rate that changes at every update, and languages that come and go; ja (3) comes last
RATES = [0.002, 0.005, 0.01, 0.008, 0.006, 0.005, 0.003, 0.002]
PAIRS = [ALL[:2], [(0, 1)], [(2, 0)], ALL[:2], ALL, [(1, 2)], [(3, 0), (2, 1)], ALL]
INNER = [
    *((inner, {}) for inner in INNER_OPTIMIZERS),
    ("sgd", {"momentum": 0.9}),
    ("adafactor", {"scale_parameter": True}),
    ("adafactor", {"scale_parameter": True, "beta1": 0.9}),
]


class Alone:
    """fairseq's own optimizers, one for each language and side, on copies of its tensors.

    Adafactor's own has a group for every tensor: it writes the scaled learning rate of a tensor
    into the group, where the next tensor would take it for the setting.
    """

    def __init__(self, model, inner, build_own):
        self.tensors = {}  # (side, language) -> list of (parameter, columns, copy)
        for param in adapters(model):
            adapter = Adapter.of(param)
            columns = [slice(None)]
            if inner in MATRIX_OPTIMIZERS:
                columns = [part for factors in adapter.layer.columns.values() for part in factors]
            owned = self.tensors.setdefault((adapter.side, adapter.language), [])
            for part in columns:
                copied = torch.nn.Parameter(param.detach()[:, part].clone())
                owned.append((param, part, copied))
        self.optimizers = {}
        for key, owned in self.tensors.items():
            copies = [copied for _, _, copied in owned]
            groups = [{"params": [c]} for c in copies] if inner in MATRIX_OPTIMIZERS else copies
            self.optimizers[key] = build_own(groups)

    def step(self, lr):
        """An update of those with a gradient."""
        for key, owned in self.tensors.items():
            if all(param.grad is None or not param.grad.any() for param, _, _ in owned):
                continue
            for param, part, copied in owned:
                copied.grad = param.grad[:, part].clone()
            self.optimizers[key].set_lr(lr)
            self.optimizers[key].step()
        self.clear_pruned()

    @torch.no_grad()
    def clear_pruned(self):
        """Weights and moments of pruned entries are zero."""
        for key, owned in self.tensors.items():
            for param, part, copied in owned:
                pruned = ~Adapter.of(param).mask[:, part]
                state = self.optimizers[key].optimizer.state.get(copied, {})
                for value in [copied, *state.values()]:
                    if torch.is_tensor(value) and value.shape == copied.shape:
                        value.masked_fill_(pruned, 0)

    def equal(self):
        """Whether the model has the same bits."""
        owned = [entry for tensors in self.tensors.values() for entry in tensors]
        return all(torch.equal(param[:, part], copied) for param, part, copied in owned)


@pytest.mark.parametrize("final", [0.0, 0.6])
@pytest.mark.parametrize("inner, more", INNER)
def test_each_language_has_fairseqs_own_optimizer_for_itself(inner, more, final):
    """Under a changing learning rate, languages coming and going, with pruning: every bit."""
    more = {**more, "weight_decay": 0.1, "pruning_final_sparsity": final}
    model = set_adapters(build())
    optimizer = optimizer_for(model, inner, **more)
    own = options(inner, **more)
    alone = Alone(model, inner, lambda groups: optimizer._build_inner(own, groups))
    for number, (lr, pairs) in enumerate(zip(RATES, PAIRS)):
        optimizer.prune_at(number + 1, number)
        alone.clear_pruned()
        optimizer.set_lr(lr)
        update(model, optimizer, pairs, seed=number)
        alone.step(lr)
        assert alone.equal(), number
    assert optimizer.prune_at(9, 8) == pytest.approx(final, abs=1e-3)


@pytest.mark.parametrize("inner, more", [c for c in INNER if c[0] not in MATRIX_OPTIMIZERS])
def test_with_all_languages_present_it_is_one_optimizer_of_fairseq(inner, more):
    more = {**more, "weight_decay": 0.1, "pruning_final_sparsity": 0.0}
    ours, theirs = set_adapters(build()), set_adapters(build())
    optimizer = optimizer_for(ours, inner, **more)
    plain = optimizer._build_inner(options(inner, **more), adapters(theirs))
    for seed, lr in enumerate(RATES):
        for model, opt in ((ours, optimizer), (theirs, plain)):
            opt.set_lr(lr)
            update(model, opt, ALL, seed=seed)
    assert all(map(torch.equal, adapters(ours), adapters(theirs)))


def test_adafactor_scales_the_learning_rate_of_each_factor_by_its_own_size():
    """Fresh adapters: B is zero, A is not; both move, in every site, in the first update."""
    model = build()
    optimizer = optimizer_for(model, "adafactor", scale_parameter=True, lr=[0.1])
    for linear in model.adapted_linears():
        linear.factors(0)[0].detach().mul_(5)
    before = [[f.detach().clone() for f in lin.factors(0)] for lin in model.adapted_linears()]
    for seed in range(2):  # A gets a gradient once B is not zero
        update(model, optimizer, ALL, seed=seed)
    for linear, factors in zip(model.adapted_linears(), before):
        assert all(not torch.equal(*pair) for pair in zip(linear.factors(0), factors))
    assert optimizer.get_lr() == 0.1


def test_learning_rate_reaches_the_inner_optimizer():
    model = set_adapters(build())
    optimizer = optimizer_for(model)
    update(model, optimizer, ALL)
    before = [p.detach().clone() for p in adapters(model)]
    optimizer.set_lr(0.0)
    update(model, optimizer, ALL)
    assert all(map(torch.equal, before, adapters(model)))


def test_what_is_overridden_reaches_every_language_and_nothing_else_does():
    """fairseq writes --optimizer-overrides into our group; nag keeps lr_old in the inner ones."""
    model = set_adapters(build())
    optimizer = optimizer_for(model, "nag")
    update(model, optimizer, ALL)
    optimizer.load_state_dict(optimizer.state_dict(), {"weight_decay": 0.5})
    optimizer.set_lr(0.004)
    update(model, optimizer, [(0, 1)])
    found = {}
    for master, group in zip(optimizer.optimizer.masters, optimizer.optimizer.inner.param_groups):
        found[master.key] = group["weight_decay"], group["lr_old"]
    present = {("source", 0), ("target", 1)}
    assert found == {key: (0.5, 0.004 if key in present else 0.01) for key in found}
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_other_parameters_are_refused():
    with pytest.raises(UserError, match="--fp16-no-flatten-grads"):
        OPTIMIZER_REGISTRY["pruned_adam"](options(), [torch.nn.Parameter(torch.zeros(3))])


def test_flat_gradients_are_refused_with_the_option():
    """What fairseq hands over to code that sets fp16_no_flatten_grads to False: one flat copy."""
    model = set_adapters(build()).half()
    flat = torch.nn.Parameter(torch.cat([p.flatten() for p in adapters(model)]).float())
    with pytest.raises(UserError, match="--fp16-no-flatten-grads on"):
        OPTIMIZER_REGISTRY["pruned_adam"](options(), [flat])


def test_an_update_does_few_operations_for_a_language():
    """Its gradient is gathered into one; all else is done for all languages at once."""
    counts, model = {}, set_adapters(build())
    made = optimizer_for(model)
    for _ in range(2):  # state is made the first time
        for pairs in (ALL[:1], ALL):
            made.zero_grad()
            made.backward(model(**batch(pairs))[0].square().mean())
            with Operations() as found:
                made.clip_grad_norm(1.0)
                made.step()
            counts[len(pairs)] = found.count
    assert counts[4] - counts[1] <= 6  # more languages and sides
    assert counts[1] < 40


def test_other_settings_for_some_languages_are_left_to_fairseq():
    """As a checkpoint might have them."""
    model, other = (set_adapters(build()) for _ in range(2))
    steps = []
    for made in (model, other):
        optimizer = optimizer_for(made)
        optimizer.optimizer._groups[0]["betas"] = (0.5, 0.9)
        if made is other:
            optimizer.optimizer.inner.__class__ = Adam
        for seed in range(3):
            update(made, optimizer, ALL, seed)
        steps.append([p.detach().clone() for p in adapters(made)])
    assert all(map(torch.equal, *steps))

"""Two processes over gloo, with other languages on each: every rank gets what one process gets.

Through fairseq's own wrapper for legacy_ddp; for c10d through torch's DistributedDataParallel,
to which fairseq gives the number of a GPU. end_to_end/test_modes.py has the console command.
"""

import contextlib
import copy
import socket
from types import SimpleNamespace

import pytest
import torch
import toy
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.distributed import ModuleProxyWrapper
from fairseq.models import DistributedFairseqModel
from torch.nn.parallel import DistributedDataParallel
from toy import adapters, batch, build, set_adapters
from updates import SIDES, optimizer_for, same, snapshot

from lslora_fairseq.lora.adapters import Adapter

EVERYONE = [(0, 1), (1, 2), (2, 3), (3, 0)]
# update -> rank -> directions of each of its batches; ja (3) has sentences in the first alone
SENTENCES = [
    [[EVERYONE], [EVERYONE]],
    [[[(0, 1)] * 2], [[(1, 2)] * 2]],
    [[[(2, 1)], [(0, 0)]], [[(1, 2)], [(1, 2)]]],  # --update-freq 2
    [[[(0, 2)] * 2], [[(2, 0)] * 2]],
]
if torch.__version__ < (2, 4):  # c10d with --update-freq is refused, see unsupported.py
    SENTENCES[2] = [batches[:1] for batches in SENTENCES[2]]
MODES = {
    "legacy_ddp": {},
    "legacy_ddp, checkpointed": {"checkpoint_activations": True},
    "c10d": {},
    # the projection's part of the embeddings' gradient comes from outside of the wrapped model
    "legacy_ddp, loss in pieces": {"lora_embedding_rank": 3},
    "c10d, loss in pieces": {"lora_embedding_rank": 3},
    # gradients are summed in fp32, whatever the base computes in
    "legacy_ddp, loss in pieces, bf16": {"lora_embedding_rank": 3},
    "c10d, bf16": {},
}


def made(mode, **options):
    model = set_adapters(build(**options))
    if "bf16" in mode:
        model.cast_base(torch.bfloat16)
    return model


def loss_of(model, net_input, mode):
    if "pieces" not in mode:
        return model(**net_input)[0].float().square().mean()
    task = SimpleNamespace(target_dictionary=toy.dictionary())
    target = net_input["src_tokens"].flip(1)
    sample = {"net_input": net_input, "target": target, "ntokens": int(target.ne(1).sum())}
    return CRITERION_REGISTRY["lslora_label_smoothed_cross_entropy"](task, False, 0.1)(
        model, sample
    )[0]


def train(model, ranks, mode, wrapped=None):
    """Four updates with weight decay and pruning.

    Args:
        model: whose adapters are trained
        ranks: whose batches this process takes
        mode: of :data:`MODES`
        wrapped: the model with the wrapper that reduces gradients, if there are other processes

    Returns:
        after every update, (the model's state, the optimizer's, what ja owns, the bytes that were
        sent to reduce gradients)
    """
    optimizer = optimizer_for(model, weight_decay=0.1)
    states = []
    for update, sentences in enumerate(SENTENCES):
        optimizer.prune_at(update + 1, update)
        optimizer.zero_grad()
        batches = [(rank, number) for rank in ranks for number in range(len(sentences[rank]))]
        for rank, number in batches:
            is_last = (rank, number) == batches[-1]
            with contextlib.nullcontext() if is_last or not wrapped else wrapped.no_sync():
                net_input = batch(sentences[rank][number], seed=100 * update + 10 * rank + number)
                loss = loss_of(wrapped or model, net_input, mode)
                optimizer.backward(loss / len(ranks))
        with counted() as sent:
            optimizer.all_reduce_grads(wrapped)
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        with torch.no_grad():
            ja = [snapshot(model, optimizer, 3, side) for side in SIDES]
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), ja, sum(sent))))
    return states


@contextlib.contextmanager
def counted():
    """The bytes of each tensor that is reduced meanwhile, but for what torch's C++ code sends."""
    sent, all_reduce = [], torch.distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    yield sent
    torch.distributed.all_reduce = all_reduce


def wrap(model, mode):
    if mode.startswith("c10d"):
        return ModuleProxyWrapper(
            DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        )
    args = SimpleNamespace(ddp_backend="legacy_ddp", tpu=False)
    return DistributedFairseqModel(args, model, torch.distributed.group.WORLD, "cpu")


def process(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2
    )
    found = {}
    for mode, options in MODES.items():
        model = made(mode, **options)
        found[mode] = train(model, [rank], mode, wrap(model, mode))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """For each of the two ranks, mode -> the states of :func:`train`."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_have_the_same_bits(two, mode):
    """Weights and masks of the model, masters and moments of the optimizer, after every update."""
    assert same(two[0][mode], two[1][mode])
    masks = [value for key, value in two[1][mode][-1][0].items() if key.endswith(".pruned")]
    removed = sum(int(mask.sum()) for mask in masks)
    assert len(masks) == 4 + 2 + ("lora_embedding_rank" in MODES[mode]) and removed > 0


@pytest.mark.parametrize("mode", MODES)
def test_they_are_those_of_one_process(two, mode):
    alone = made(mode, lora_embedding_rank=MODES[mode].get("lora_embedding_rank", 0))
    expected = train(alone, [0, 1], mode)
    for (model, *_), (alone, *_) in zip(two[0][mode], expected):
        assert model.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(model[key], value, atol=1e-6, rtol=0, msg=key)


@pytest.mark.parametrize("mode", MODES)
def test_a_language_seen_by_no_rank_keeps_every_bit(two, mode):
    before, after = two[0][mode][-2:]  # pruning is over
    assert same(before[2], after[2])
    assert not same(before[0], after[0])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("legacy_ddp")])
def test_only_the_gradients_of_languages_present_are_sent(two, mode):
    """And one byte for each parameter, which tells what is present."""
    params = adapters(build(**MODES[mode]))
    for directions, (*_, sent) in zip(SENTENCES, two[0][mode]):
        pairs = [pair for batches in directions for sentences in batches for pair in sentences]
        present = dict(zip(SIDES, map(set, zip(*pairs))), shared={0})
        wanted = [p for p in params if Adapter.of(p).language in present[Adapter.of(p).side]]
        assert sent == len(params) + sum(p.nbytes for p in wanted)
        assert (len(wanted) == len(params)) == (directions is SENTENCES[0])

#!/usr/bin/env python3
"""What several processes send each other in an update, for docs/cluster.md.

The bytes of the gradients are counted exactly, on a model in the shape of M2M-124 615M with the
authors' adapters, without memory for its weights. The times are measured, on a model that fits:
processes of this machine, over gloo.

    python scripts/traffic.py                      # both
    python scripts/traffic.py --processes 0        # the bytes alone
"""

import contextlib
import random
import socket
import statistics
import time
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from fairseq.distributed import ModuleProxyWrapper
from fairseq.models import ARCH_CONFIG_REGISTRY, DistributedFairseqModel
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lslora_fairseq  # noqa: F401  registers the architectures
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

LANGUAGES = (12, 200)
SENTENCES = (64, 500)  # of an update
SHAPE = {"arch": "lslora_m2m_124_615m", "words": 256_125, "sides": "source*9,target*3"}
MEASURED = {"arch": "lslora_m2m_124_175m", "words": 16_000, "sides": "source*5,target*1"}
LEGACY_BUFFER = 2**28  # entries, of fairseq's legacy_ddp


def build(languages, arch, words, sides):
    """A model; every third language has rank 8, the others 2, as in the authors' three tiers."""
    dictionary = Dictionary()
    dictionary.symbols += [f"word {i}" for i in range(len(dictionary), words)]
    codes = [f"l{number}" for number in range(languages)]
    args = Namespace(
        lora_tiers=f"high={','.join(c for i, c in enumerate(codes) if i % 3)};"
        f"low={','.join(codes[::3])}",
        lora_rank="high=2,low=8", lora_shape="square", lora_shared_rank=0, lora_embedding_rank=0,
        encoder_index_side=sides, decoder_index_side="target", dropout=0.1,
        max_source_positions=256, max_target_positions=256,
    )  # fmt: skip
    ARCH_CONFIG_REGISTRY[arch](args)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return LSLoTransformerModel.build_model(args, task)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def count(languages):
    """Bytes of an fp32 update by label; what depends on the sentences, as a mean over random
    ones."""
    with torch.device("meta"):
        model = build(languages, **SHAPE)
    params = trained(model)
    every = 4 * sum(p.numel() for p in params)
    buffer = 4 * min(LEGACY_BUFFER, sum(p.numel() for p in model.parameters()))
    found = {
        "pytorch_ddp": every + 4 * len(params),  # with a counter of uses for each parameter
        "legacy_ddp, fairseq alone": buffer,
        "legacy_ddp, all languages present": every + len(params),
    }
    for sentences in SENTENCES:
        is_present = 1 - (1 - 1 / languages) ** sentences
        label = f"legacy_ddp, {sentences} sentences of random languages"
        found[label] = round(every * is_present) + len(params)
    return found


def batch(model, languages, sentences, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (2, sentences, tokens)
    src, prev = torch.randint(
        4, model.encoder.embed_tokens.num_embeddings, size, generator=generator
    )
    ids = torch.randint(languages, (2, sentences), generator=generator)
    return {
        "src_tokens": src,
        "src_lengths": torch.full((sentences,), tokens),
        "prev_output_tokens": prev,
        "source_lang_ids": ids[0],
        "target_lang_ids": ids[1],
    }


@contextlib.contextmanager
def counted():
    """The bytes that Python reduces meanwhile."""
    sent, all_reduce = [], distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    yield sent
    distributed.all_reduce = all_reduce


class Way:
    """One way of reducing gradients: a model of its own, and the seconds and bytes of updates."""

    def __init__(self, name, options):
        self.name, self.seconds, self.bytes = name, [], []
        torch.manual_seed(0)
        self.model = build(options.languages, **MEASURED)
        parser = ArgumentParser()
        OPTIMIZER_REGISTRY["pruned_adam"].add_args(parser)
        defaults = {**vars(parser.parse_args([])), "lr": [1e-4], "tpu": False}
        self.optimizer = OPTIMIZER_REGISTRY["pruned_adam"](
            Namespace(**defaults), trained(self.model)
        )
        group = distributed.group.WORLD
        if name == "pytorch_ddp":
            ddp = DistributedDataParallel(
                self.model, broadcast_buffers=False, find_unused_parameters=True
            )
            ddp.register_comm_hook(group, allreduce_hook)  # in Python, where it is counted
            self.wrapped = ModuleProxyWrapper(ddp)
        else:
            args = SimpleNamespace(ddp_backend="legacy_ddp", tpu=False)
            self.wrapped = DistributedFairseqModel(args, self.model, group, "cpu")

    def update(self, net_input):
        """Forward, backward and reduction, and what they sent."""
        self.optimizer.zero_grad()
        distributed.barrier()
        start = time.perf_counter()
        alone = self.name == "no reduction"
        with counted() as sent, self.wrapped.no_sync() if alone else contextlib.nullcontext():
            features, _ = self.wrapped(**net_input, features_only=True)
            features.square().mean().backward()
            if self.name == "legacy_ddp, fairseq alone":
                FairseqOptimizer.all_reduce_grads(self.optimizer, self.wrapped)
            elif not alone:
                self.optimizer.all_reduce_grads(self.wrapped)
        distributed.barrier()
        self.seconds.append(time.perf_counter() - start)
        self.bytes.append(sum(sent))


WAYS = ("no reduction", "pytorch_ddp", "legacy_ddp, fairseq alone", "legacy_ddp")


def process(rank, port, options):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=options.processes
    )
    ways = [Way(name, options) for name in WAYS]
    for repetition in range(options.repetitions + 1):
        seed = repetition * options.processes + rank
        net_input = batch(ways[0].model, options.languages, options.sentences, 27, seed)
        order = list(ways)
        random.Random(repetition).shuffle(order)
        for way in order:
            way.update(net_input)
    if rank == 0:
        print(
            f"\n{options.processes} processes over gloo, {options.languages} languages, "
            f"{options.sentences} sentences in each: medians of {options.repetitions}"
        )
        alone = ways[0].seconds[1:]  # the first update allocates
        for way in ways:
            more = [time - base for time, base in zip(way.seconds[1:], alone)]
            print(
                f"{way.name:28} {statistics.median(way.bytes[1:]) / 1e6:8.1f} MB "
                f"{statistics.median(way.seconds[1:]):7.3f} s  "
                f"{statistics.median(more):+7.3f} s"
            )
    distributed.destroy_process_group()


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="0 measures nothing (2)")
    parser.add_argument("--languages", type=int, default=12, help="of what is measured (12)")
    parser.add_argument("--sentences", type=int, default=4, help="in each process (4)")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    counts = [count(languages) for languages in LANGUAGES]
    print("MB of fp32 gradients in an update, M2M-124 615M", *LANGUAGES, "languages")
    for label in counts[0]:
        print(f"{label:48}", *(f"{found[label] / 1e6:10,.1f}" for found in counts))
    if options.processes:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(process, args=(port, options), nprocs=options.processes)


if __name__ == "__main__":
    main()

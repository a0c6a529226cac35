"""Trains a small model for three updates; prints the peak of this process and the estimate of it.

peak.py WORDS DIM LAYERS TOKENS CRITERION, run by test_memory.py in a process of its own.
"""

import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import planted
import torch
import toy
from fairseq.criterions import CRITERION_REGISTRY

from lslora_fairseq.doctor import memory
from lslora_fairseq.doctor.model import shape
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

words, dim, layers, tokens = map(int, sys.argv[1:5])
name = sys.argv[5]
LENGTH = 20
process = memory.own_size()
task = toy.task(words)
sizes = {
    "encoder_layers": layers,
    "decoder_layers": layers,
    "encoder_embed_dim": dim,
    "encoder_ffn_embed_dim": 4 * dim,
    "dropout": 0.1,
}
model = LSLoTransformerModel.build_model(Namespace(**{**toy.OPTIONS, **sizes}), task).train()
optimizer = planted.pruned_adam(model, 0.001)
criterion = CRITERION_REGISTRY[name](
    SimpleNamespace(target_dictionary=task.target_dictionary), False, 0.1
)
pairs = [(0, 1), (2, 3), (1, 2), (3, 0)] * (tokens // LENGTH // 4)
net_input = toy.batch(pairs, LENGTH)
target = torch.randint(4, words, (len(pairs), LENGTH))
for update in range(3):
    optimizer.prune_at(1, update)
    optimizer.zero_grad()
    sample = {"net_input": net_input, "target": target, "ntokens": target.numel()}
    optimizer.backward(criterion(model, sample)[0])
    optimizer.step()
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
in_pieces = name.startswith("lslora")
parts = memory.estimate(shape(model), "fp32", target.numel(), process=process, in_pieces=in_pieces)
print(peak, sum(parts.values()), process)

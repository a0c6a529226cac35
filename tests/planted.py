"""Planted problems: a teacher whose changes of the base are known, and a student to find them.

Both share the frozen weights of a small random base. The student sees random sentences in random
directions and what the teacher makes of them, and learns with the real optimizer.
"""

from argparse import ArgumentParser, Namespace

import pytest
import torch
import toy
from fairseq.optim import OPTIMIZER_REGISTRY
from toy import CODES

# one of ten in a plain run, since each takes half a minute; all with -m 'slow or not slow'
SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed else ()) for seed in range(10)]


def plant(teacher, size, generator):
    """Gives every adapter random factors: r rank-one changes of Frobenius norm *size* each."""
    with torch.no_grad():
        for linear in teacher.adapted_linears():
            for language in range(len(CODES)):
                for factor, norm in zip(linear.factors(language), (1, size)):
                    rows = torch.randn(factor.shape, generator=generator)
                    factor.copy_(norm * rows / rows.norm(dim=1, keepdim=True))
    return teacher


def mixed_batch(sentences, length, generator):
    """A random batch in which every language is a source, and a target, equally often."""
    sides = [torch.randperm(sentences, generator=generator) % len(CODES) for _ in range(2)]
    seed = int(torch.randint(2**31, (), generator=generator))
    return toy.batch(list(zip(*(side.tolist() for side in sides))), length, seed)


def pruned_adam(model, lr, **options):
    """The real optimizer of a model, with the command line's defaults and these *options*."""
    cls = OPTIMIZER_REGISTRY["pruned_adam"]
    parser = ArgumentParser()
    cls.add_args(parser)
    args = {**vars(parser.parse_args([])), "lr": [lr], "tpu": False, **options}
    return cls(Namespace(**args), toy.adapters(model))


def learn(student, teacher, optimizer, updates, generator, sentences=64, length=5):
    """Trains a student to give the teacher's features; the learning rate falls linearly to 0.

    Returns:
        the mean squared error of each update
    """
    losses, lr = [], optimizer.get_lr()
    for update in range(updates):
        batch = mixed_batch(sentences, length, generator)
        with torch.no_grad():
            wanted, _ = teacher(**batch, features_only=True)
        optimizer.prune_at(1, update)
        optimizer.set_lr(lr * (1 - update / updates))
        optimizer.zero_grad()
        features, _ = student(**batch, features_only=True)
        loss = (features - wanted).square().mean()
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(student, options, optimizer, path):
    """Writes what the analyses read of a checkpoint of fairseq-train.

    Args:
        options: those that the student was built with
    """
    args = Namespace(**{**toy.OPTIONS, **options, **optimizer.optimizer.settings})
    torch.save({"model": student.state_dict(), "args": args}, path)

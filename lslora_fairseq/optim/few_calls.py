"""fairseq's Adam and its gradient norm in a few calls for all parameters.

fairseq steps one parameter after the other, with a dozen operations each. On a GPU every operation
costs its launch, and there are two parameters for each language of the batch.
"""

import math

import torch
from fairseq.optim.adam import Adam


class FewCallsAdam(Adam):
    """fairseq's Adam, entry by entry the same, in calls for all parameters at once."""

    @torch.no_grad()
    def step(self, closure=None):
        """One update; where groups have different settings, fairseq's own."""
        groups = self.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        settings = {
            (*group["betas"], group["eps"], group["weight_decay"], group["lr"]) for group in groups
        }
        if len(settings) != 1 or any(group.get("amsgrad") for group in groups):
            return super().step(closure)
        ((beta1, beta2, eps, decay, lr),) = settings
        states = [self.state[p] for p in params]
        for param, state in zip(params, states):
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
        gradients = [param.grad for param in params]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, eps)
        if decay:
            torch._foreach_add_(params, params, alpha=-decay * lr)
        sizes = [
            -lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
            for state in states
        ]
        torch._foreach_addcdiv_(params, means, roots, sizes)
        return None


def in_few_calls(optimizer):
    """Lets fairseq's own Adam work in few calls; any other optimizer stays what it is."""
    if type(optimizer) is Adam:
        optimizer.__class__ = FewCallsAdam
    return optimizer


def clip_gradient_norm(gradients, largest):
    """As fairseq's ``clip_grad_norm_``.

    Args:
        gradients: list of tensors, one or more
        largest: the norm of all together is brought down to it; 0 leaves them

    Returns:
        their norm before, a scalar tensor
    """
    norms = torch._foreach_norm([gradient.float() for gradient in gradients])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if largest > 0:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp_(max=1))
    return norm

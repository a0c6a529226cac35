"""Embedding rows of language tokens that are trained, each as its language's own.

The base is frozen, so a token that is new to it would keep a random row. The row is trained through
a parameter of its own, which gets the gradient of the token where it is looked up: only sentences
of its language hold it. Where it is one of the words to predict it has none, or every sentence
would move it. The matrix itself holds the row, too, so that whoever reads, saves or merges it needs
to know nothing of this.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lslora_fairseq.lora.adapters import Adapter


class TokenRows(nn.Module):
    """One parameter ``lora_<code>`` (1, d) per language whose token is trained. Nothing of it is in
    a state dict. To an optimizer it looks like an adapter that has no site to prune.

    Args:
        rows: code -> (index of the language, row of its token)
        weight: the embeddings (words, d), which encoder, decoder and output projection share
    """

    side, sites, is_pruned, side_weights = "token", (), False, None

    def __init__(self, rows, weight):
        super().__init__()
        d = weight.size(1)
        self.columns, self.width_A = {"": (slice(None),)}, d
        self._names = {language: f"lora_{code}" for code, (language, _) in rows.items()}
        for name in self._names.values():
            self.register_parameter(name, nn.Parameter(weight.new_zeros(1, d)))
        self._tag()
        numbers = torch.tensor([row for _, row in rows.values()], device=weight.device)
        slots = torch.full((len(weight),), len(rows), device=weight.device)
        slots[numbers] = torch.arange(len(rows), device=weight.device)
        for name, buffer in (("numbers", numbers), ("slots", slots)):
            self.register_buffer(name, buffer, persistent=False)
        mask = torch.ones(1, d, dtype=torch.bool, device=weight.device)
        self.register_buffer("mask", mask, persistent=False)

    def _tag(self):
        for language, name in self._names.items():
            getattr(self, name).param_group = Adapter(self, language)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tag()  # copies of parameters lose their attributes

    def weight(self, language):
        """The parameter of a language (its index): (1, d)."""
        return getattr(self, self._names[language])

    def rows(self, _):
        """The rows of :attr:`mask` that a language owns: the mask is the same for all."""
        return slice(None)

    def refresh_pruned(self):
        pass

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass

    def _weights(self):
        return torch.cat([*self.parameters(recurse=False)])

    @torch.no_grad()
    def read(self, weight):
        """Takes the rows from the embeddings, as after loading."""
        rows = weight[self.numbers.to(weight.device)]
        for param, row in zip(self.parameters(recurse=False), rows):
            param.copy_(row)

    @torch.no_grad()
    def write(self, weight):
        """Brings the rows into the embeddings, as after an update."""
        weight[self.numbers.to(weight.device)] = self._weights().to(weight)

    def pass_gradient(self, _, inputs, output):
        """A forward hook of embeddings: adds nothing to what was looked up (batch, time, d), and
        gives each row the gradient of its token."""
        if not torch.is_grad_enabled():
            return None
        weights = self._weights()
        nothing = F.pad(weights - weights.detach(), (0, 0, 0, 1))
        return output + F.embedding(self.slots[inputs[0]], nothing).to(output.dtype)

"""An adapter of the token embeddings, which all languages share.

The embeddings E (words, d) are looked up in encoder and decoder and are the output projection, too;
in all three places they become E + Bᵀ A, with A (r, d) and B (r, words). As in every adapter B is
zero at first. It is not pruned: there, unlike in the linears, most of what pruning removes is
missed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lslora_fairseq.lora.merge import folded_embeddings


class _Adapted:
    """Embeddings or output projection of a model that owns their adapter."""

    @classmethod
    def adapt(cls, module, adapters):
        """Turns a plain module into this one; its parameters and their names stay.

        Args:
            adapters: :class:`~lslora_fairseq.lora.adapters.LayerAdapters` of one site and one
                owner, from d features to words
        """
        module.__class__ = cls
        module.__dict__["adapters"] = adapters  # the model owns them, as a submodule

    def restore(self):
        """Turns it back into the plain module."""
        self.__class__ = self.plain
        del self.adapters

    def factors(self):
        """A (r, d) and B (r, words)."""
        weight = self.adapters.weight(0)
        ((a, b),) = self.adapters.columns.values()
        return weight[:, a], weight[:, b]


class AdaptedEmbedding(_Adapted, nn.Embedding):
    """Token embeddings with an adapter: (…) indices -> (…, d)."""

    plain = nn.Embedding

    def forward(self, tokens):
        A, B = self.factors()
        x = super().forward(tokens)
        columns = F.embedding(tokens, B.t(), self.padding_idx).to(x.dtype)
        return x + columns @ A.to(x.dtype)  # another dtype where the base is cast


class AdaptedProjection(_Adapted, nn.Linear):
    """An output projection that shares weight and adapter with the embeddings: (…, d) -> (…,
    words)."""

    plain = nn.Linear

    def forward(self, x):
        A, B = self.factors()
        flat = x.flatten(0, -2)  # added in place to a view, logits would be copied in backward
        out = super().forward(flat)
        # another dtype under autocast, or where the base is cast
        out.addmm_(F.linear(flat, A.to(out.dtype)), B.to(out.dtype))
        return out.unflatten(0, x.shape[:-1])


@torch.no_grad()
def merge_embeddings(adapted):
    """Adds the adapter to the weight (words, d) of embeddings or projection, in place, summed in
    fp32."""
    adapted.weight.copy_(folded_embeddings(adapted.weight, *adapted.factors()))

"""Beam search over sentences of many directions: fairseq's, faster, and free of its batches.

It finds what fairseq's ``SequenceGenerator`` finds, but for rounding. Two things differ:

- Each sentence has a longest length of its own. fairseq ends all sentences of a batch after
  ``max_len_a`` · (longest source of the batch) + ``max_len_b`` tokens, so that there a translation
  depends on the sentences beside it.
- Less work: sentences have one row, not one for each beam, until their beams differ, which is after
  the tokens that all are forced to begin with; the best words are taken row by row; and what the
  encoder said is reordered only where sentences have ended.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

TIE = 1e-4  # scores that are closer may change places, since sums are rounded


class Found(NamedTuple):
    """A finished hypothesis.

    Attributes:
        score: log-probability, divided by length ** lenpen
        tokens: list of its tokens, those that it was forced to begin with among them, without
            the end of the sentence
    """

    score: float
    tokens: list


class BeamSearch:
    """Beam search with a model or an ensemble.

    Args:
        models: fairseq models with an encoder and an incremental decoder
        dictionary: the target's
        options: fairseq's ``GenerationConfig``
    """

    OPTIONS = (
        "beam", "nbest", "max_len_a", "max_len_b", "min_len", "unnormalized", "lenpen", "unkpen",
        "prefix_size", "temperature",
    )  # fmt: skip

    def __init__(self, models, dictionary, options):
        self.models = models
        self.options = SimpleNamespace(**{name: getattr(options, name) for name in self.OPTIONS})
        self.pad, self.eos, self.unk = dictionary.pad(), dictionary.eos(), dictionary.unk()
        self.beam = min(options.beam, len(dictionary) - 1)  # pad is never chosen
        self.longest = min(model.max_decoder_positions() for model in models)
        self._stateful = [
            [m for m in model.decoder.modules() if hasattr(m, "reorder_incremental_state")]
            for model in models
        ]
        self._attentions = [
            m for model in models for m in model.modules() if hasattr(m, "set_beam_size")
        ]

    def limit(self, source_length):
        """The position, counted from 0, of the last token that fairseq allows in a batch.

        Args:
            source_length: tokens of the longest source of that batch
        """
        allowed = int(self.options.max_len_a * source_length + self.options.max_len_b)
        return min(allowed, self.longest - 1)

    @torch.no_grad()
    def search(self, net_input, limits, bos=None, prefix=None):
        """Decodes a batch.

        Args:
            net_input: fairseq's, without ``prev_output_tokens``
            limits: list of :meth:`limit` for each sentence
            bos: (sentences,) token that each sentence begins with; the end of sentence if None
            prefix: (sentences, tokens) that hypotheses are forced to begin with, padded; or None

        Returns:
            for each sentence a list of :class:`Found`, best first, and whether it was decided by a
            near tie: of its best two, or of what was the last to stay in the beam
        """
        run = _Run(self, net_input, max(limits))
        run.tokens[:, 0] = self.eos if bos is None else bos
        forced = 0 if prefix is None else self._forced_of_all(prefix, min(limits))
        found = [[] for _ in limits]
        ids = list(range(len(limits)))  # of the sentences that are left
        close = torch.zeros(len(limits), dtype=torch.bool, device=run.tokens.device)
        for step in range(max(limits) + 1):
            logp = run.log_probabilities(step)
            logp[:, self.pad] = -math.inf
            if self.options.unkpen:
                logp[:, self.unk] -= self.options.unkpen
            if step < forced:
                run.extend(step, prefix[:, step], logp)
                continue
            self._constrain(logp, step, run, [limits[i] for i in ids], prefix)
            scores, words, beams = self._candidates(logp, run)
            is_end = words.eq(self.eos) & scores.ne(-math.inf)
            self._finish(step, run, scores, beams, is_end[:, : self.beam], ids, found)
            close[ids] |= self._is_close(scores, is_end)
            is_whole = [False] * len(ids)  # a reference that ends where it was to be followed
            if prefix is not None and step < prefix.size(1):
                is_whole = prefix[:, step].eq(self.eos).tolist()
            left = [
                place
                for place, i in enumerate(ids)
                if len(found[i]) < self.beam and step < limits[i] and not is_whole[place]
            ]
            if not left:
                break
            # the best that go on; ends are ranked behind them
            rank = torch.arange(is_end.size(1), device=words.device) + is_end * is_end.size(1)
            active = rank.topk(self.beam, dim=1, largest=False)[1]
            scores, words, beams = (t.gather(1, active) for t in (scores, words, beams))
            run.spread(self.beam)
            if len(left) < len(ids):
                ids = [ids[place] for place in left]
                left = torch.tensor(left, device=words.device)
                scores, words, beams = scores[left], words[left], beams[left]
                prefix = None if prefix is None else prefix[left]
            else:
                left = None
            run.go_on(step, scores, words, beams, left)
        run.end()
        found = [sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found]
        return [
            (hypotheses, tied or _best_two_are_close(hypotheses))
            for hypotheses, tied in zip(found, close.tolist())
        ]

    def _forced_of_all(self, prefix, least):
        """How many tokens all sentences are forced to begin with."""
        free = (prefix.eq(self.pad) | prefix.eq(self.eos)).any(0).tolist()
        return min(free.index(True) if True in free else len(free), least)

    def _constrain(self, logp, step, run, limits, prefix):
        """Takes away the words that a hypothesis must not go on with."""
        word = torch.arange(logp.size(1), device=logp.device)
        if step >= min(limits):
            over = torch.tensor(limits, device=logp.device).le(step)
            over = over.repeat_interleave(run.width).unsqueeze(1)
            logp.masked_fill_(over & word.ne(self.eos), -math.inf)
        if prefix is not None and step < prefix.size(1):
            forced = prefix[:, step].repeat_interleave(run.width).unsqueeze(1)
            logp.masked_fill_(forced.ne(self.pad) & word.ne(forced), -math.inf)
        elif step < self.options.min_len:
            logp[:, self.eos] = -math.inf

    def _candidates(self, logp, run):
        """The best continuations of each sentence, twice as many as beams, since half of them may
        be ends.

        Returns:
            scores, words and numbers of their beams, (sentences, candidates) each, best first
        """
        count = min(2 * self.beam, logp.size(1) - 1)
        scores, words = logp.topk(count, dim=1)
        scores = (scores + run.scores.unsqueeze(1)).unflatten(0, (-1, run.width)).flatten(1)
        scores = scores.nan_to_num(-math.inf, math.inf, -math.inf)
        scores, places = scores.topk(min(2 * self.beam, scores.size(1)), dim=1)
        words = words.unflatten(0, (-1, run.width)).flatten(1).gather(1, places)
        return scores, words, places.div(count, rounding_mode="trunc")

    def _is_close(self, scores, is_end):
        """(sentences,) whether a candidate nearly took the place of another one in the beam."""
        if scores.size(1) <= self.beam:
            return False
        last, next_ = self.beam - 1, self.beam
        ends = (scores[:, last] - scores[:, next_] < TIE) & (is_end[:, last] | is_end[:, next_])
        goes_on = scores.masked_fill(is_end, -math.inf).sort(dim=1, descending=True)[0]
        return ends | (goes_on[:, last] - goes_on[:, next_] < TIE)

    def _finish(self, step, run, scores, beams, is_end, ids, found):
        """Notes the hypotheses that end here, in the order of their rank."""
        rows, ranks = is_end.nonzero(as_tuple=True)
        if not len(rows):
            return
        if not self.options.unnormalized:
            scores = scores / (step + 1) ** self.options.lenpen
        tokens = run.tokens[rows * run.width + beams[rows, ranks], 1 : step + 1].tolist()
        for row, score, words in zip(rows.tolist(), scores[rows, ranks].tolist(), tokens):
            if len(found[ids[row]]) < self.beam:
                found[ids[row]].append(Found(score, words))


def _best_two_are_close(found):
    return (
        len(found) > 1
        and found[0].score - found[1].score < TIE
        and found[0].tokens != found[1].tokens
    )


class _Run:
    """The rows of a batch: what they hold so far, and the states of the models.

    Attributes:
        width: rows of a sentence, beside each other: 1, and as many as beams once these differ
        tokens: (rows, longest + 2)
        scores: (rows,) log-probabilities
    """

    def __init__(self, search, net_input, longest):
        self.search, self.width = search, 1
        tokens = net_input["src_tokens"]
        self.tokens = tokens.new_full((tokens.size(0), longest + 2), search.pad)
        self.scores = torch.zeros(tokens.size(0), device=tokens.device)
        self.states = [{} for _ in search.models]
        self._set_beams(1)
        self.encoded = [model.encoder.forward_torchscript(net_input) for model in search.models]

    def _set_beams(self, beams):
        """fairseq's cross-attention keeps what it computed once for all beams of a sentence."""
        for attention in self.search._attentions:
            attention.beam_size = beams

    def end(self):
        self._set_beams(self.search.beam)

    def log_probabilities(self, step):
        """(rows, words) of the next token; of an ensemble, of the mean of the probabilities."""
        found = []
        for model, encoded, state in zip(self.search.models, self.encoded, self.states):
            out = model.decoder(
                self.tokens[:, : step + 1], encoder_out=encoded, incremental_state=state
            )
            logits = out[0][:, -1:]
            if self.search.options.temperature != 1:
                logits = logits / self.search.options.temperature
            found.append(model.get_normalized_probs((logits, *out[1:]), log_probs=True)[:, -1])
        if len(found) == 1:
            return found[0]
        return torch.stack(found).logsumexp(0) - math.log(len(found))

    def extend(self, step, words, logp):
        """Goes on with given words, (rows,)."""
        self.tokens[:, step + 1] = words
        self.scores += logp.gather(1, words.unsqueeze(1)).squeeze(1)

    def spread(self, beams):
        """Gives every sentence a row for each beam, if it has not."""
        if self.width == beams:
            return
        order = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(beams)
        self.width = beams
        self._set_beams(beams)
        self.tokens = self.tokens[order]
        self._reorder_states(order)
        self._reorder_encoded(order)

    def go_on(self, step, scores, words, beams, left):
        """Goes on with chosen words of chosen beams.

        Args:
            scores, words, beams: (sentences, beams) each, of the sentences that are left
            left: numbers of these sentences, None if all are left
        """
        if left is None:
            left = torch.arange(len(self.tokens) // self.width, device=beams.device)
        else:
            rows = torch.arange(self.width, device=beams.device)
            self._reorder_encoded((left.unsqueeze(1) * self.width + rows).flatten())
        order = (left.unsqueeze(1) * self.width + beams).flatten()
        self.tokens = self.tokens[order]
        self.tokens[:, step + 1] = words.flatten()
        self.scores = scores.flatten()
        self._reorder_states(order)

    def _reorder_states(self, order):
        for modules, state in zip(self.search._stateful, self.states):
            for module in modules:
                module.reorder_incremental_state(state, order)

    def _reorder_encoded(self, order):
        self.encoded = [
            model.encoder.reorder_encoder_out(encoded, order)
            for model, encoded in zip(self.search.models, self.encoded)
        ]

"""Gradual pruning in plain torch; knows nothing of fairseq."""

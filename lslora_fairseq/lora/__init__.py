"""Language-specific LoRA in plain torch; knows nothing of fairseq."""

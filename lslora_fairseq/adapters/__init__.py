"""Adapters as files: one for each language, and one for what all languages share."""

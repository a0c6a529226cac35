"""Measures what adapters cost: python scripts/benchmark."""

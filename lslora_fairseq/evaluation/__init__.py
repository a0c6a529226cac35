"""All directions of a model: decoded in one process, scored, reported and compared."""

"""The symbols of a model's embeddings, row by row, from its dictionary file."""

from lslora_fairseq.errors import ConfigError


def symbols(path, identity, rows):
    """What the rows stand for.

    Args:
        path: of the dictionary file, given as ``--dict``
        identity: :class:`~lslora_fairseq.identity.Identity` of the model
        rows: of its embeddings

    Returns:
        the symbols of the file, specials included, and those of all rows

    Raises:
        ConfigError: it cannot be read, or is that of another model.
    """
    from fairseq.data import Dictionary

    try:
        lines = Dictionary.load(str(path)).symbols
    except Exception as error:  # fairseq raises that itself
        raise ConfigError(
            f"--dict {path} cannot be read ({error}): name the dict.txt of the model"
        ) from None
    found = identity.symbols(lines) or lines
    if len(found) != rows:
        raise ConfigError(
            f"{identity.path} has {rows:,} embedding rows, --dict {path} and language tokens make "
            f"{len(found):,}: name the dictionary file that the model was trained with"
        )
    return lines, found

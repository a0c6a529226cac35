"""The text that hypotheses are scored against: raw files, or the detokenised data."""

import os

from lslora_fairseq.errors import ConfigError, listed

DETOKENISED = "detokenised test set"


class References:
    """Sources and references of directions.

    Args:
        template: path of a language's text with ``{lang}`` in it; None for that of the data
        pairs: the directions that will be asked for

    Raises:
        ConfigError: the template lacks ``{lang}``, or a language's file.

    Attributes:
        origin: where they come from, in words
    """

    def __init__(self, template, pairs):
        self.origin = template or DETOKENISED
        self._lines = None
        if template is None:
            return
        if "{lang}" not in template:
            raise ConfigError(
                f"--references {template} lacks {{lang}}, which stands for the language: write "
                "such as 'devtest/{lang}.devtest'"
            )
        languages = sorted({language for pair in pairs for language in pair.split("-")})
        files = {language: template.replace("{lang}", language) for language in languages}
        lacking = [path for path in files.values() if not os.path.isfile(path)]
        if lacking:
            raise ConfigError(f"--references: no such file: {listed(lacking)}")
        self._lines = {language: _read(path) for language, path in files.items()}

    def raw(self, pair, sentences):
        """Source and reference lines of a direction; None where the data has them.

        Args:
            sentences: how many the data has

        Raises:
            ConfigError: a file has another number of lines.
        """
        if self._lines is None:
            return None
        for language in pair.split("-"):
            found = len(self._lines[language])
            if found != sentences:
                raise ConfigError(
                    f"--references: {self.origin.replace('{lang}', language)} has {found} lines, "
                    f"the data {sentences} sentences of {pair}: name the text that the data was "
                    "made from"
                )
        return tuple(self._lines[language] for language in pair.split("-"))


def _read(path):
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--references: cannot read {path} ({error})") from None

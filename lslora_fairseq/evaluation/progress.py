"""How far a decoding has come: a bar on a terminal, a line for each direction elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts sentences and directions on stderr.

    Args:
        sentences, directions: how many there are
    """

    def __init__(self, sentences, directions):
        self.sentences, self.directions = sentences, directions
        self.decoded = self.finished = 0
        self.began = time.perf_counter()

    def __enter__(self):
        self.bar = tqdm(
            total=self.sentences, unit=" sentences", disable=None, dynamic_ncols=True, leave=False
        )
        self._describe()
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, sentences):
        self.decoded += sentences
        self.bar.update(sentences)

    def done(self, pair):
        """Tells that a direction is written."""
        self.finished += 1
        self._describe()
        left = (time.perf_counter() - self.began) * (self.sentences / max(self.decoded, 1) - 1)
        with tqdm.external_write_mode(file=sys.stderr):
            print(
                f"decoded {pair}: {self.finished} of {self.directions} directions, "
                f"{self.decoded:,} of {self.sentences:,} sentences, "
                f"{tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _describe(self):
        self.bar.set_description(f"{self.finished}/{self.directions} directions", refresh=False)

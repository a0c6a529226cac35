"""The gradual pruning schedule (method, section 4)."""

from dataclasses import dataclass

from lslora_fairseq.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Share of entries removed at a step, rising by a cubic law.

    Attributes:
        final_sparsity: share removed at the end, in [0, 1)
        begin: first step of the rise, counted in *unit*
        duration: steps from 0 to the final share, at least 1
        unit: ``epoch`` (from 1) or ``update`` (updates done so far)
    """

    final_sparsity: float
    begin: int
    duration: int
    unit: str = "epoch"

    def __post_init__(self):
        if not 0 <= self.final_sparsity < 1:
            raise ConfigError(
                f"--pruning-final-sparsity {self.final_sparsity} must lie in [0, 1): "
                "0 prunes nothing, 0.9 removes nine entries of ten"
            )
        if self.begin < 0:
            raise ConfigError(f"--pruning-begin {self.begin} must not be negative")
        if self.duration < 1:
            raise ConfigError(f"--pruning-duration {self.duration} must be at least 1")
        if self.unit not in ("epoch", "update"):
            raise ConfigError(f"--pruning-unit {self.unit} must be epoch or update")

    @property
    def end(self):
        """The step from which on the final share holds."""
        return self.begin + self.duration

    def sparsity(self, step):
        """Share removed at *step*: 0 before ``begin``, ``final_sparsity`` from ``end`` on."""
        done = min(max((step - self.begin) / self.duration, 0.0), 1.0)
        return self.final_sparsity * (1 - (1 - done) ** 3)

    def applies_at(self, step):
        """Whether masks may change at *step*.

        Every epoch; with updates as the unit about a hundred times over the rise and as often
        after it, since finding the smallest entries of all languages is not free.
        """
        every = max(1, self.duration // 100) if self.unit == "update" else 1
        return step >= self.begin and (step - self.end) % every == 0

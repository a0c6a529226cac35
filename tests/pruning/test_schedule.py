"""The schedule as a pure function (method, section 4)."""

import pytest

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.pruning.schedule import Schedule

GOLDEN = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]


def test_golden_values_from_epoch_2_on():
    schedule = Schedule(0.9, 2, 10)
    assert [schedule.sparsity(e) for e in range(2, 13)] == pytest.approx(GOLDEN, abs=5e-13)


def test_corners():
    schedule = Schedule(0.9, 2, 10)
    assert schedule.sparsity(0) == schedule.sparsity(1) == schedule.sparsity(2) == 0
    assert schedule.sparsity(12) == schedule.sparsity(13) == schedule.sparsity(10**9) == 0.9
    assert Schedule(0.0, 2, 10).sparsity(7) == 0
    assert Schedule(0.5, 0, 1).sparsity(1) == 0.5


def test_it_only_rises():
    values = [Schedule(0.7, 3, 40, "update").sparsity(t) for t in range(60)]
    assert values == sorted(values)


def test_epochs_prune_at_every_step_updates_about_a_hundred_times():
    assert all(Schedule(0.9, 2, 500).applies_at(e) for e in range(2, 600))
    by_update = Schedule(0.9, 100, 5000, "update")
    applied = [t for t in range(100, 5101) if by_update.applies_at(t)]
    assert applied == list(range(100, 5101, 50))
    assert not by_update.applies_at(99)
    # the end is among them though the steps do not divide the rise, and so are steps after it
    uneven = Schedule(0.9, 1, 350, "update")
    assert [t for t in range(340, 360) if uneven.applies_at(t)] == [342, 345, 348, 351, 354, 357]


@pytest.mark.parametrize(
    "values, named",
    [
        ((1.0, 2, 10), "--pruning-final-sparsity"),
        ((-0.1, 2, 10), "--pruning-final-sparsity"),
        ((0.5, -1, 10), "--pruning-begin"),
        ((0.5, 2, 0), "--pruning-duration"),
        ((0.5, 2, 10, "batch"), "--pruning-unit"),
    ],
)
def test_bad_values_name_the_option(values, named):
    with pytest.raises(ConfigError, match=named):
        Schedule(*values)

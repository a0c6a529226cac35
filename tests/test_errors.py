"""How messages name many items."""

import pytest

from lslora_fairseq.errors import listed

FEW, MANY = [f"l{i}" for i in range(12)], [f"l{i}" for i in range(200)]


@pytest.mark.parametrize(
    "items, start, expected",
    [
        ([], 0, ""),
        (FEW, 0, "l0,l1,l2,l3,l4,l5,l6,l7,l8,l9,l10,l11"),
        (FEW, 5, "l0,l1,l2,l3,l4,l5,l6,l7,l8,l9,l10,l11"),
        (MANY, 0, "l0,l1,l2,l3,l4,l5,l6,l7,… (200 in all)"),
        (MANY, 30, "…,l30,l31,l32,l33,l34,l35,l36,l37,… (200 in all)"),
        (MANY, 192, "…,l192,l193,l194,l195,l196,l197,l198,l199 (200 in all)"),
        (MANY, 200, "… (200 in all)"),
    ],
)
def test_of_many_items_a_few_are_named(items, start, expected):
    assert listed(items, ",", start) == expected

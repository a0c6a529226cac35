"""Which directions are averaged together: by resource tiers, and from and into English."""

from statistics import fmean

ARROW = "→"
ENGLISH = ("en", "eng")


def sides(pair):
    """``en-fr`` -> (``en``, ``fr``)."""
    source, _, target = pair.partition("-")
    return source, target


def groups(pairs, tiers):
    """The groups that are averaged, in the order in which they are printed.

    Args:
        pairs: directions such as ``en-fr``
        tiers: language -> resource tier; {} where unknown

    Returns:
        label -> list of pairs: pairs of tiers such as ``high→low``; ``en→x``, ``x→en`` and
        ``other``, if English is a side of a direction; ``all``. Only groups that have directions.
        A direction of a language without tier belongs to no pair of tiers.
    """
    names = dict.fromkeys(tiers.values())
    found = {f"{source}{ARROW}{target}": [] for source in names for target in names}
    english = {f"en{ARROW}x": [], f"x{ARROW}en": [], "other": []}
    from_english, into_english, other = english.values()
    for pair in pairs:
        source, target = sides(pair)
        if source in tiers and target in tiers:
            found[f"{tiers[source]}{ARROW}{tiers[target]}"].append(pair)
        is_from, is_into = is_english(source), is_english(target)
        (from_english if is_from else into_english if is_into else other).append(pair)
    if from_english or into_english:
        found.update(english)
    return {**{label: members for label, members in found.items() if members}, "all": list(pairs)}


def is_english(code):
    return code.split("_")[0] in ENGLISH


def axes(pairs, tiers):
    """Rows and columns of a matrix: source languages and target languages.

    Both are in the same order, tier by tier in the order of the tiers, then as first seen.

    Returns:
        for each side, tier -> its languages; None, the last, is the tier of those without one
    """
    by_side = list(zip(*map(sides, pairs)))
    languages = dict.fromkeys(code for codes in by_side for code in codes)
    return [
        {
            tier: members
            for tier in (*dict.fromkeys(tiers.values()), None)
            if (members := [c for c in languages if c in codes and tiers.get(c) == tier])
        }
        for codes in map(set, by_side)
    ]


def mean(values):
    """Mean of what is there; None without any."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None

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


def by_tier(codes, tiers):
    """Languages in the order of rows and columns: tier by tier, in the order of the tiers.

    Returns:
        tier -> codes; None is the tier of languages without one, and comes last
    """
    found = {tier: [] for tier in (*tiers.values(), None)}
    for code in dict.fromkeys(codes):
        found[tiers.get(code)].append(code)
    return {tier: members for tier, members in found.items() if members}


def mean(values):
    """Mean of what is there; None without any."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None

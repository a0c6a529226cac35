"""Scores of many directions as text: a matrix for each metric, means of groups; CSV, JSON, LaTeX.

Everything here takes the content of scores.json as ``lslora evaluate`` writes it.
"""

import re
from collections import defaultdict

from lslora_fairseq.evaluation import groups
from lslora_fairseq.rendering import tables

OFF_TARGET = "off-target"
WIDTH = 120  # characters; a wider matrix is printed in parts
HEADER = ("source", "target", "source_tier", "target_tier", "metric", "score", "signature")


def render(results, format):
    """The results as text in one of :data:`FORMATS`."""
    return FORMATS[format](results)


def scores(results, metric):
    """Score of each direction: pair -> 0 to 100."""
    return {pair: d["scores"][metric]["score"] for pair, d in results["directions"].items()}


def signatures(results, metric):
    """sacrebleu's signatures of a metric, which may differ by target language.

    Returns:
        signature -> target languages, in order
    """
    found = results["directions"].items()
    return by_signature({pair: d["scores"][metric]["signature"] for pair, d in found})


def by_signature(signature_of):
    """pair -> signature, turned into signature -> target languages, in order."""
    found = defaultdict(dict)
    for pair, signature in signature_of.items():
        found[signature][groups.sides(pair)[1]] = True
    return {signature: list(targets) for signature, targets in found.items()}


def short_signature(results, metric):
    """One signature for all targets: where theirs differ, it names all their tokenizers."""
    first, *others = signatures(results, metric)
    toks = [re.search(r"\|tok:([^|]*)", signature) for signature in (first, *others)]
    if not others or not all(toks):
        return first
    return first.replace(toks[0][0], f"|tok:{','.join(tok[1] for tok in toks)}")


def off_target(results):
    """Share of off-target hypotheses by direction, None where unknown; {} if not counted."""
    found = results["directions"]
    return {pair: d["off_target"] for pair, d in found.items() if "off_target" in d}


def means(results):
    """Means over groups of directions (see :mod:`~lslora_fairseq.evaluation.groups`).

    Returns:
        group -> ``directions``, their number, and metric -> mean of their unrounded scores; with
        ``off-target``, the mean share where it is known, if it was counted
    """
    columns = {metric: scores(results, metric) for metric in results["metrics"]}
    shares = off_target(results)
    if shares:
        columns[OFF_TARGET] = shares
    return {
        label: {
            "directions": len(pairs),
            **{name: groups.mean([v.get(pair) for pair in pairs]) for name, v in columns.items()},
        }
        for label, pairs in groups.groups(results["directions"], results["tiers"]).items()
    }


def matrix(results, values, text):
    """A table of directions, sources in rows and targets in columns, by tier; with means.

    Args:
        values: pair -> number or None
        text: number -> text

    Returns:
        header and rows, lists of text; ``-`` where there is no direction, ``?`` for None
    """
    sources, targets = (
        [code for tier in tiers.values() for code in tier]
        for tiers in groups.axes(results["directions"], results["tiers"])
    )

    def cell(pair):
        value = values[pair] if pair in values else "-"
        return value if value == "-" else shown(value, text)

    def average(pairs):
        return shown(groups.mean([values[pair] for pair in pairs if pair in values]), text)

    rows = [
        [s, *(cell(f"{s}-{t}") for t in targets), average([f"{s}-{t}" for t in targets])]
        for s in sources
    ]
    below = [average([f"{s}-{t}" for s in sources]) for t in targets]
    return ["source", *targets, "mean"], [*rows, ["mean", *below, average(values)]]


def shown(value, text):
    return "?" if value is None else text(value)


def one_decimal(score):
    return f"{score:.1f}"


def _table(results):
    parts = []
    for metric in results["metrics"]:
        title = f"{metric}, source languages in rows, target languages in columns"
        table = _in_parts(*matrix(results, scores(results, metric), one_decimal))
        parts += [f"{title}\n\n{table}\n\n{signature_lines(signatures(results, metric))}"]
    shares = off_target(results)
    if shares:
        title = f"{OFF_TARGET}: share of hypotheses in another language, by {results['langid']}"
        table = _in_parts(*matrix(results, shares, tables.percent))
        parts.append(f"{title}\n\n{table}{_unknown(shares, results['langid'])}")
    return "\n\n".join([*parts, _means_table(results), _conditions(results)])


def _in_parts(header, rows):
    """An aligned table in parts of at most WIDTH characters, each with the first column."""
    columns = list(zip(header, *rows))
    widths = [max(map(len, column)) + 2 for column in columns]
    parts, left = [], 0
    for column, width in zip(columns[1:], widths[1:]):
        if not parts or width > left:
            parts.append([columns[0]])
            left = WIDTH - widths[0] + 2
        parts[-1].append(column)
        left -= width
    texts = []
    for part in parts:
        head, *body = zip(*part)
        texts.append(tables.aligned("<" + ">" * (len(head) - 1), head, body))
    return "\n\n".join(texts)


def signature_lines(found):
    """The signatures of a metric, one a line.

    Args:
        found: signature -> target languages, as :func:`signatures` returns
    """
    if len(found) == 1:
        return next(iter(found))
    return "\n".join(f"{signature} into {', '.join(t)}" for signature, t in found.items())


def _unknown(shares, library):
    targets = dict.fromkeys(groups.sides(pair)[1] for pair, v in shares.items() if v is None)
    return f"\n\n? unknown to {library}: {', '.join(targets)}" if targets else ""


def _means_rows(results):
    """Header and rows of the means, as text."""
    found = means(results)
    names = [name for name in found["all"] if name != "directions"]
    texts = {name: tables.percent if name == OFF_TARGET else one_decimal for name in names}
    rows = [
        [label, f"{row['directions']:,}", *(shown(row[name], texts[name]) for name in names)]
        for label, row in found.items()
    ]
    return ["means over", "directions", *names], rows


def _means_table(results):
    header, rows = _means_rows(results)
    return tables.aligned("<" + ">" * (len(header) - 1), header, rows)


def _conditions(results):
    """What was translated by what, and how it was scored."""
    directions = results["directions"].values()
    sentences = sum(d["sentences"] for d in directions)
    ties = sum(d.get("near_ties") or 0 for d in directions)
    settings = ", ".join(f"{name} {value}" for name, value in results["decoding"].items())
    models = (f"{model['path']} ({model['sha256'][:8]})" for model in results["models"])
    lines = [
        ("model", ", ".join(models)),
        ("test set", f"{results['subset']} of {results['data']}, {sentences:,} sentences"),
        ("references", results["references"]),
        ("detokenised", results["text"]),
        ("decoding", settings),
        ("near ties", f"{ties:,} of {sentences:,} sentences"),
    ]
    too_long = sum(d.get("too_long", 0) for d in directions)
    if too_long:
        lines.append(("too long", f"{too_long:,} sentences, of which the hypotheses are empty"))
    return "\n".join(f"{name:<13}{text}" for name, text in lines)


def _csv(results):
    tiers, rows = results["tiers"], []
    for pair, direction in results["directions"].items():
        source, target = groups.sides(pair)
        start = (source, target, tiers.get(source), tiers.get(target))
        for metric in results["metrics"]:
            found = direction["scores"][metric]
            rows.append((*start, metric, found["score"], found["signature"]))
        if "off_target" in direction:
            rows.append((*start, OFF_TARGET, direction["off_target"], results["langid"]))
    return tables.csv_text(HEADER, rows)


def _latex(results):
    metric = results["metrics"][0]
    header, rows = matrix(results, scores(results, metric), one_decimal)
    caption = f"{metric} ({short_signature(results, metric)})"
    first = _tabular(header, [*rows[:-1], None, rows[-1]], caption)
    return f"{first}\n\n{_tabular(*_means_rows(results), 'Means over directions')}"


def _tabular(header, rows, caption):
    """A table of the package booktabs; a row of None is a line."""
    body = [
        "\\midrule" if row is None else f"{' & '.join(map(_escaped, row))} \\\\"
        for row in (header, None, *rows)
    ]
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            "\\toprule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            f"\\caption{{{_escaped(caption)}}}",
            "\\end{table}",
        ]
    )


LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "|": "\\textbar{}",
    groups.ARROW: "$\\rightarrow$",
}


def _escaped(text):
    return "".join(LATEX.get(character, character) for character in text)


FORMATS = {"table": _table, "json": tables.json_text, "csv": _csv, "latex": _latex}

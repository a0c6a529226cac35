"""``lslora compare``: is a system better than another, in which directions, and by how much."""

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import reports
from lslora_fairseq.rendering import figures, tables

EXAMPLES = """\
examples:
  lslora compare results/base results/tuned
      scores, differences and p of each direction, of tiers and of all
  lslora compare results/base results/tuned results/merged --plot difference.png
      two systems against the first; a heat map of the differences of each
  lslora compare results/base results/tuned --metric chrF++ --examples en-wo
      another metric; the sentences of one direction that changed most

Each folder is one that lslora evaluate wrote; all are of the same test set. The first is the
baseline. p is that of sacrebleu's paired bootstrap test (1,000 resamples, seed SACREBLEU_SEED);
for a group of directions, that of the mean of their scores. Below 0.05 the system is better or
worse, else undecided. Equal hypotheses have p = 1. The test is generous: of systems that are
equally good, about one pair in nine comes out as decided. Among many directions, some are; trust
the groups more than any one direction.
"""

HEADER = (
    "system", "kind", "name", "directions", "baseline", "score", "difference", "p", "verdict",
)  # fmt: skip


def add_arguments(parser):
    parser.add_argument("baseline", metavar="BASELINE", help="folder of lslora evaluate")
    parser.add_argument("systems", metavar="SYSTEM", nargs="+", help="folders to compare with it")
    parser.add_argument("--metric", help="the metric that is tested (default: the main one)")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="table", help="(default: table)"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also draw a heat map of differences: .png, .pdf or .svg (needs matplotlib)",
    )
    parser.add_argument(
        "--examples",
        metavar="PAIR",
        help="also show the sentences of this direction, such as en-wo, that changed most",
    )


def run(args):
    """Prints the comparison, draws it if asked to; returns the exit status."""
    from lslora_fairseq.evaluation import comparison, heatmap  # not for --help

    if args.plot:
        figures.check(args.plot)
    if args.examples and args.format == "csv":
        raise ConfigError(
            "--examples has no place in --format csv: choose table or json, or leave it out"
        )
    loaded = comparison.load([args.baseline, *args.systems])
    examples = comparison.examples(loaded, args.examples) if args.examples else []
    found = comparison.compare(loaded, args.metric)
    if args.plot:
        tiers = loaded[args.baseline]["tiers"]
        figures.save(heatmap.differences(found, tiers), args.plot)
    print(FORMATS[args.format](found, examples))
    return 0


def _table(found, examples):
    parts = [part for system in found["systems"] for part in _system_parts(found, system)]
    parts.append(reports.signature_lines(found["signatures"]))
    return "\n\n".join([*parts, *map(_example, examples)])


def _system_parts(found, system):
    yield f"{found['metric']} of {system['system']} against {found['baseline']}"
    columns = ("baseline", "score", "difference", "p", "verdict")
    rows = [(pair, *_cells(row)) for pair, row in system["directions"].items()]
    yield tables.aligned("<>>>><", ("direction", *columns), rows)
    rows = [
        (label, f"{row['directions']:,}", *_cells(row)) for label, row in system["groups"].items()
    ]
    yield tables.aligned("<>>>>><", ("means over", "directions", *columns), rows)
    yield (
        f"of {len(system['directions']):,} directions {system['better']:,} better, "
        f"{system['worse']:,} worse, {system['undecided']:,} undecided (p < {found['level']})"
    )


def _cells(row):
    scores = (reports.one_decimal(row[name]) for name in ("baseline", "score"))
    return *scores, f"{row['difference']:+.1f}", f"{row['p']:.3f}", row["verdict"]


def _example(row):
    return "\n".join(
        [
            f"{row['system']}, sentence {row['sentence']:,}: chrF++ {row['difference']:+.1f}",
            *(f"  {name:<12}{row[name]}" for name in ("source", "reference")),
            f"  {'baseline':<12}{row['baseline']}",
            f"  {'system':<12}{row['hypothesis']}",
        ]
    )


def _json(found, examples):
    return tables.json_text({**found, "examples": examples} if examples else found)


def _csv(found, _):
    rows = []
    for system in found["systems"]:
        for kind in ("directions", "groups"):
            for name, row in system[kind].items():
                values = (row[column] for column in HEADER[4:])
                rows.append((system["system"], kind[:-1], name, row.get("directions", 1), *values))
    return tables.csv_text(HEADER, rows)


FORMATS = {"table": _table, "json": _json, "csv": _csv}

"""``lslora evaluate``: decodes and scores all directions of a model."""

import logging
import sys
import warnings
from dataclasses import fields

from lslora_fairseq.errors import ConfigError

EXAMPLES = """\
examples:
  lslora evaluate data --path finetuned/checkpoint_last.pt --out results
      decodes every direction of the test set, scores it, and prints tables
  lslora evaluate data --path base.pt --out results_base --pairs 'en-*,*-en' --fp16
      a stock model, from and into English; its languages and tokens are taken from the checkpoint
      if that tells them, else give --langs, --encoder-langtok, --decoder-langtok
  lslora evaluate data --path base.pt --lora-adapters adapters --out results
      the base model with the adapter files of lslora extract
  lslora evaluate data --path a.pt:b.pt --out results --plot scores.png \\
      --references 'flores/devtest/{lang}.devtest' --bleu-tokenizer flores200,auto
      an ensemble; spBLEU and BLEU on the raw references, and a heat map

Started again, it goes on where it stopped, and scores anew what was scored otherwise. Every other
option of fairseq-generate that has a meaning here is taken too, with its name and default: not
those that pick one direction, sample, or print more than hypotheses. Hypotheses are those of one
fairseq-generate (with --required-batch-size-multiple 1) for each direction.
"""

# what the help says of fairseq-generate's options; fairseq's own parser reads them
DECODING = (
    ("--gen-subset", "NAME", "the subset to decode (default: test)"),
    ("--beam", "N", "beam size (default: 5)"),
    ("--nbest", "N", "also write the best N hypotheses to {pair}.nbest.tsv (default: 1)"),
    ("--lenpen", "X", "length penalty (default: 1)"),
    ("--max-len-a", "X", "a hypothesis has at most a · source + b tokens (default: 0)"),
    ("--max-len-b", "N", "(default: 200)"),
    ("--prefix-size", "N", "begin with that many tokens of the reference (default: 0)"),
    ("--max-tokens", "N", "tokens of a batch (default: 12000)"),
    ("--batch-size", "N", "sentences of a batch"),
    ("--remove-bpe", "NAME", "how words were cut (default: as the dictionary shows)"),
    ("--fp16", None, "half precision, on a GPU"),
    ("--lora-base-dtype", "DTYPE", "bf16 or fp16: models with adapters decode in that"),
    ("--cpu", None, "do not use a GPU; all cores that the process may use"),
)
# options of fairseq-generate that have no place here -> what to do instead
REFUSED = {
    "source_lang": "choose directions with --pairs",
    "target_lang": "choose directions with --pairs",
    "results_path": "name the folder with --out",
    "required_batch_size_multiple": "every sentence is decoded; leave it out",
}


def add_arguments(parser):
    """The options of the command, for its help; :func:`parse` reads them beside fairseq's."""
    parser.add_argument("data", metavar="DATA_BIN", help="the folder that fairseq-preprocess wrote")
    parser.add_argument(
        "--path", metavar="CHECKPOINT[:CHECKPOINT…]", required=True, help="model, or ensemble"
    )
    _add_own(parser)
    group = parser.add_argument_group("decoding, as fairseq-generate")
    for option, metavar, text in DECODING:
        takes = {"action": "store_true"} if metavar is None else {"metavar": metavar}
        group.add_argument(option, help=text, **takes)


def _add_own(parser):
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="where texts and scores.json go")
    add(
        "--pairs", metavar="all | en-fr,'*-en' | FILE", default="all",
        help="directions of the data, patterns, or a file of them (default: all)",
    )  # fmt: skip
    add(
        "--references", metavar="TEMPLATE",
        help="raw text instead of the detokenised test set, {lang} standing for a language, such "
        "as 'flores/devtest/{lang}.devtest'; sources are read from there too",
    )  # fmt: skip
    add(
        "--bleu-tokenizer", metavar="NAME,…", default="auto",
        help="of sacrebleu, such as flores200; auto: 13a, and zh, ja-mecab, ko-mecab for Chinese, "
        "Japanese and Korean (default: auto); the first one is the main score",
    )  # fmt: skip
    add("--spm", metavar="FILE", help="main score: spBLEU over this SentencePiece model")
    add(
        "--langid", action="store_true",
        help="share of hypotheses in another language than asked for (needs py3langid)",
    )  # fmt: skip
    add(
        "--tiers", metavar="'high=en,fr;low=oc' | FILE",
        help="resource tiers of the tables (default: those of the checkpoint)",
    )  # fmt: skip
    add(
        "--format", choices=("table", "json", "csv", "latex"), default="table",
        help="(default: table)",
    )  # fmt: skip
    add(
        "--plot", metavar="FILE", help="also draw a heat map: .png, .pdf or .svg (needs matplotlib)"
    )


def parse(argv):
    """Reads the command line with fairseq's parser.

    Returns:
        a namespace: our options, and fairseq's configuration as ``cfg``

    Raises:
        ConfigError: an option is unknown or has no place here.
    """
    import lslora_fairseq

    lslora_fairseq.register()
    from fairseq import options
    from fairseq.dataclass.configs import GenerationConfig
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    from lslora_fairseq.evaluation.search import BeamSearch

    parser = options.get_generation_parser(default_task="translation_multi_lslora")
    parser.error = _refuse
    _add_own(parser)
    args = options.parse_args_and_arch(parser, argv)
    if args.task != parser.get_default("task"):
        raise ConfigError(f"--task {args.task}: leave it out, stock models are decoded as well")
    if args.path is None:
        raise ConfigError("--path is missing: name the checkpoint to decode with")
    others = {f.name for f in fields(GenerationConfig)} - {*BeamSearch.OPTIONS, "sacrebleu"}
    refused = {**REFUSED, **dict.fromkeys(sorted(others), "use fairseq-generate")}
    for name, remedy in refused.items():
        if getattr(args, name, None) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} has no place in lslora evaluate: {remedy}")
    if args.max_tokens is None and args.batch_size is None:
        args.max_tokens = 12000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hydra, about fairseq's use of it
        args.cfg = convert_namespace_to_omegaconf(args)
    return args


def _refuse(message):
    raise ConfigError(f"{message}: see lslora evaluate --help, and fairseq-generate --help")


def run(args):
    """Decodes, scores and prints; returns the exit status."""
    import torch
    from fairseq import tasks
    from fairseq.utils import split_paths

    from lslora_fairseq.evaluation import heatmap, pairs, reports, settings
    from lslora_fairseq.evaluation.decoding import Text
    from lslora_fairseq.evaluation.folder import Folder
    from lslora_fairseq.evaluation.references import References
    from lslora_fairseq.evaluation.scores import Scores
    from lslora_fairseq.rendering import figures

    if args.plot:
        figures.check(args.plot)
    logging.getLogger("fairseq").setLevel(logging.ERROR)  # what it warns of is told here
    cfg, data = args.cfg, split_paths(args.data)[0]
    asked = pairs.chosen(args.pairs, pairs.in_data(data, args.gen_subset))
    scores = Scores(args.bleu_tokenizer, args.spm, args.langid, asked)
    cfg.task.source_lang, cfg.task.target_lang = asked[0].split("-")
    if cfg.common.cpu or not torch.cuda.is_available():
        torch.set_num_threads(1)  # copies of this process decode, one for each core
    task = tasks.setup_task(cfg.task)
    text = Text(cfg, task)
    folder = Folder(args.out, settings.made_with(cfg, task, text))
    references = References(args.references, {*asked, *folder.results["directions"]})
    folder.results.update(tiers=_tiers(args, task), references=references.origin)
    sums = {pair: settings.data_sum(data, args.gen_subset, pair) for pair in asked}
    todo = [pair for pair in asked if not folder.is_decoded(pair, sums[pair])]
    if len(todo) < len(asked):
        print(f"{len(asked) - len(todo)} of {len(asked)} directions were decoded before",
              file=sys.stderr)  # fmt: skip
    if todo:
        _decode(cfg, task, text, folder, references, {pair: sums[pair] for pair in todo})
    _check_texts(task, args.gen_subset, text, folder, references)
    scores.bring_up_to_date(folder)
    print(reports.render(folder.results, args.format))
    if args.plot:
        figures.save(heatmap.figure(folder.results), args.plot)
    return 0


def _tiers(args, task):
    """Language -> resource tier: as the option says, else as the first checkpoint or the adapter
    files do."""
    from fairseq.utils import split_paths

    from lslora_fairseq.checkpoints import read_args
    from lslora_fairseq.languages import Languages

    spec = args.tiers or read_args(split_paths(args.path)[0]).get("lora_tiers")
    if not spec and task.adapters is not None:
        spec = task.adapters.languages.spec
    if not spec:
        return {}
    try:
        languages = Languages.parse(spec)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--lora-tiers", "--tiers")) from None
    order = sorted(languages.codes, key=lambda code: languages.tiers.index(languages.tier(code)))
    return {code: languages.tier(code) for code in order}


def _decode(cfg, task, text, folder, references, sums):
    """Decodes directions, and writes each once it is whole.

    Args:
        sums: pair -> checksum of its data
    """
    from lslora_fairseq.evaluation.decoding import Translator
    from lslora_fairseq.evaluation.progress import Progress
    from lslora_fairseq.evaluation.workers import schedule, translated

    translator = Translator(cfg, task, text)
    # of one target after the other: few adapters are in a batch of its decoder
    directions = [
        translator.direction(pair) for pair in sorted(sums, key=lambda p: p.split("-")[::-1])
    ]
    for direction in directions:
        references.raw(direction.pair, len(direction.dataset))
    found = [[None] * len(direction.dataset) for direction in directions]
    left = [sum(limit >= 0 for limit in direction.limits) for direction in directions]
    cut, workers = schedule(translator, directions)

    def write(place):
        direction = directions[place]
        texts, facts = _read(found[place], cfg.generation.nbest)
        lines = _texts(text, references, direction.task, direction.dataset, direction.pair)
        facts.update(data=sums[direction.pair], references=references.origin)
        folder.write(direction.pair, facts, **texts, **lines)
        found[place] = None
        progress.done(direction.pair)

    with Progress(sum(left), len(directions)) as progress:
        for place, sentences in enumerate(left):
            if sentences == 0:  # all are too long
                write(place)
        for batch, results in translated(translator, directions, cut, workers):
            progress.add(len(batch))
            for (place, number), result in zip(batch, results):
                found[place][number] = result
                left[place] -= 1
                if left[place] == 0:
                    write(place)


def _read(found, nbest):
    """The texts and facts of a direction.

    Args:
        found: for each sentence what the translator returns; None where it was too long
    """
    too_long = found.count(None)
    found = [([(0.0, "")], False, 0.0) if result is None else result for result in found]
    texts = {"hyp": [hypotheses[0][1] for hypotheses, _, _ in found]}
    if nbest > 1:
        texts["nbest.tsv"] = [
            f"{number}\t{score:.6f}\t{text}"
            for number, (hypotheses, _, _) in enumerate(found, 1)
            for score, text in hypotheses
        ]
    facts = {
        "sentences": len(found),
        "seconds": sum(seconds for _, _, seconds in found),
        "near_ties": sum(is_tie for _, is_tie, _ in found),
    }
    return texts, {**facts, "too_long": too_long} if too_long else facts


def _texts(text, references, task, dataset, pair):
    """Source and reference lines of a direction by the suffixes of their files."""
    lines = references.raw(pair, len(dataset)) or text.sentences(dataset, task)
    return dict(zip(("src", "ref"), lines))


def _check_texts(task, subset, text, folder, references):
    """Sources and references of all directions become those that this run asks for."""
    from lslora_fairseq.evaluation.folder import of_lines

    for pair, facts in folder.results["directions"].items():
        raw = references.raw(pair, facts["sentences"])
        if raw is not None:
            texts = dict(zip(("src", "ref"), raw))
            if all(of_lines(texts[suffix]) == facts["sha256"][suffix] for suffix in texts):
                continue
        elif facts["references"] == references.origin:
            continue
        else:
            of_pair = task.in_direction(*pair.split("-"), models=())
            of_pair.load_dataset(subset)
            texts = _texts(text, references, of_pair, of_pair.dataset(subset), pair)
        folder.write(pair, {"references": references.origin}, **texts)

"""The checks of a run's inputs; each returns lines, or raises ConfigError for a single one."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from lslora_fairseq.criterions.label_smoothed_cross_entropy import NAME as CRITERION
from lslora_fairseq.doctor import memory, model, unknown
from lslora_fairseq.doctor.report import ERROR, OK, WARNING, Line
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.models.embedding_rows import SPECIALS, match_rows
from lslora_fairseq.tasks.options import check_continued

TIGHT = 0.8  # share of the free memory from which on an estimate is a warning: it is a rough one


def check_checkpoint(inputs):
    """What the checkpoint is."""
    checkpoint = inputs.checkpoint
    langs = checkpoint.base.langs
    known = f"{len(langs)} languages" if langs else "languages not told"
    kind = "with adapters" if checkpoint.has_adapters else "a base model"
    arch = checkpoint.base.arch or "architecture not told"
    found = f"{checkpoint.path}: {kind}, {arch}, {known}, {_size(checkpoint.size)}"
    return [Line(OK, "checkpoint", found)]


def check_data(inputs):
    """What the data holds."""
    files = inputs.data_files
    found = {file.pair for file in files if file.split == "train"}
    lacking = [p for p in inputs.lang_pairs or [] if not {p, p[::-1]} & found]
    if lacking:
        raise ConfigError(
            f"{inputs.args.data} has no train data of {listed('-'.join(p) for p in lacking)}: "
            "prepare it with fairseq-preprocess, or leave the direction out of --lang-pairs"
        )
    splits = ", ".join(dict.fromkeys(file.split for file in files))
    both = {pair for file in files for pair in (file.pair, file.pair[::-1])}
    directions = both.intersection(inputs.lang_pairs or both)
    found = f"{inputs.args.data}: {splits}; {len(directions)} directions"
    return [Line(OK, "data", found)]


def check_dictionaries(inputs):
    """The dictionaries of the data agree with each other, and with the one that is fixed."""
    name = "dictionary"
    contents = {path: _lines(path) for path in inputs.data_dictionaries}
    if inputs.args.dict:
        contents = {inputs.args.dict: _lines(inputs.args.dict), **contents}
    first, *others = contents
    remedy = "run fairseq-preprocess with one dictionary as --srcdict and --tgtdict"
    for path in others:
        # what follows the lines of the data's dictionary changes no number in the data
        mine = contents[first][: len(contents[path])] if inputs.args.dict else contents[first]
        if mine != contents[path]:
            found = f"{path} differs from {first}"
            return [Line(ERROR, name, found, remedy)]
    found = f"{first}: {inputs.dictionary.rows_in_file - SPECIALS:,} lines"
    if others:
        found += f", in agreement with {len(others)} more"
    return [Line(OK, name, found)]


def _lines(path):
    """The pieces of a dictionary file, without their counts."""
    with open(path, encoding="utf-8") as file:
        return [line.rpartition(" ")[0] for line in file if not line.startswith("#fairseq:")]


def check_rows(inputs):
    """The embedding rows of the checkpoint against the dictionary and the language tokens."""
    dictionary, checkpoint = inputs.dictionary, inputs.checkpoint
    matched = match_rows(checkpoint.rows, dictionary, checkpoint.base)
    tokens = len(dictionary) - dictionary.rows_in_file
    found = (
        f"{checkpoint.rows:,} in the checkpoint; {dictionary.rows_in_file - SPECIALS:,} dictionary "
        f"lines + {SPECIALS} specials + {tokens} language tokens here"
    )
    return [Line(OK, "embedding rows", found + (", matched by token" * (matched is not None)))]


def check_order(inputs):
    """The order of --langs against that of the checkpoint."""
    name, langs, checkpoint = "language order", inputs.langs, inputs.checkpoint
    trained = checkpoint.base.langs
    if trained is None:
        return [_untold_order(inputs)]
    if checkpoint.has_adapters:
        check_continued(Namespace(), checkpoint.path, checkpoint.options, langs)
    if not inputs.are_langs_told:
        found = f"{listed(langs, ',')}, taken from the checkpoint"
        return [Line(OK, name, found, values={"langs": list(langs)})]
    if list(langs) == list(trained):
        return [Line(OK, name, "that of the checkpoint")]
    lacking = [lang for lang in trained if lang not in langs]
    found = f"the checkpoint has {listed(trained, ',')}: rows are matched by token"
    if lacking:
        found += f"; {len(lacking)} of its languages are not in --langs"
    return [Line(OK, name, found)]


def _untold_order(inputs):
    """Of a checkpoint that does not tell its languages: what decides the order of their rows."""
    name, dictionary = "language order", inputs.dictionary
    in_file = set(dictionary.symbols[: dictionary.rows_in_file]) if dictionary else set()
    tokens = [get_lang_tok(lang, inputs.lang_tok_style) for lang in inputs.langs]
    appended = [token for token in tokens if token not in in_file]
    untold = "the checkpoint does not tell its languages"
    if len(appended) <= 1:
        return Line(OK, name, f"{untold}; the dictionary file holds their tokens in its order")
    source = inputs.checkpoint.options.get("lang_dict")
    if not source:
        source = "the list that its authors published, such as a lang_dict or langs file"
    return Line(
        WARNING,
        name,
        f"{untold}, and {listed(appended, ' ')} are no lines of the dictionary file: the order of "
        "their rows cannot be known, they are taken in the order "
        f"{listed(inputs.langs, ',')}, and a wrong one swaps languages without an error",
        f"give the order of {source} as --langs or --lang-dict; it need not be the alphabet's: "
        "NLLB has pes_Arab before fij_Latn, and zsm_Latn before mya_Mymr",
    )


def check_tokens(inputs):
    """Every language has a token, and the base model a trained row for it."""
    name, langs, dictionary = "language tokens", inputs.langs, inputs.dictionary
    tokens = [get_lang_tok(lang, inputs.lang_tok_style) for lang in langs]
    in_file = set(dictionary.symbols[: dictionary.rows_in_file])
    present = sum(token in in_file for token in tokens)
    lines = _uncovered(inputs)
    new = _new_tokens(inputs, tokens)
    if new:
        lines.append(
            Line(
                WARNING,
                name,
                f"{listed(new, ' ')}: new to the base model, untrained and frozen",
                "write the language codes as the base model does (--langs, --lang-tok-style), or "
                "use languages that it has",
            )
        )
    if not lines:
        found = f"{len(tokens)} languages: {present} in the dictionary file"
        lines.append(Line(OK, name, f"{found}, {len(tokens) - present} appended to it"))
    return lines


def _new_tokens(inputs, tokens):
    """Tokens without a row in the checkpoint."""
    dictionary, checkpoint = inputs.dictionary, inputs.checkpoint
    if checkpoint is None:
        return []
    try:
        matched = match_rows(checkpoint.rows, dictionary, checkpoint.base)
    except ConfigError:  # told by check_rows
        return []
    return [t for t in tokens if matched is not None and matched[dictionary.index(t)] < 0]


def _uncovered(inputs):
    """Languages that lack a token or an adapter."""
    lines, langs, adapters = [], inputs.langs, inputs.adapter_languages
    with_adapters = adapters.codes if adapters else ()
    absent = [code for code in with_adapters if code not in langs]
    if absent:
        found = f"{listed(absent)} of --lora-tiers: absent from --langs ({listed(langs, ',')})"
        remedy = "add it to --langs, or take it out of --lora-tiers"
        lines.append(Line(ERROR, "language tokens", found, remedy))
    pairs = inputs.lang_pairs or [file.pair for file in inputs.data_files or []]
    in_data = sorted({lang for pair in pairs for lang in pair})
    for option, known in (("--langs", langs), ("--lora-tiers", with_adapters or in_data)):
        lacking = [lang for lang in in_data if lang not in known]
        if lacking:
            found = f"{listed(lacking)} of the data: absent from {option}"
            remedy = f"add it to {option}, or leave its directions out of --lang-pairs"
            lines.append(Line(WARNING, "language tokens", found, remedy))
    return lines


def check_unknown(inputs):
    """The share of <unk> in each split."""
    shares = unknown.measure(inputs.data_files, inputs.dictionary)
    splits = dict.fromkeys(share.file.split for share in shares)
    return [
        unknown.judge(
            split,
            [share for share in shares if share.file.split == split],
            inputs.dictionary.rows_in_file,
        )
        for split in splits
    ]


def check_model(inputs):
    """The LoRA options fit the model, and the checkpoint's weights too."""
    if inputs.checkpoint:
        model.check_fit(inputs.model, inputs.checkpoint)
    plan, size = inputs.model.plan, inputs.shape
    shared = [f"shared adapters of rank {plan.shared_rank}"] if plan.shared_sites else []
    if plan.embedding_site:
        shared.append(f"an adapter of the embeddings of rank {plan.embedding_rank}")
    more = " alone" * (not plan.sites)
    if plan.trained is not None:
        more += f"; only those of {listed(plan.trained)} are trained"
    if inputs.model.added:
        more += f"; those of {listed(inputs.model.added)} are new"
    found = (
        f"{size.adapter_entries:,} trainable parameters, "
        f"{size.adapter_entries / size.base_parameters:.2%} of {size.base_parameters:,}: "
        f"{len(plan.languages)} languages, {len({site.name for site in plan.all_sites})} linears"
        f"{''.join(f', {name}' for name in shared)}{more}"
    )
    return [Line(OK, "adapters", found)]


def check_memory(inputs):
    """The free memory against the estimate, for training and for loading."""
    args = inputs.args
    if args.criterion not in (None, *CRITERION_REGISTRY):
        raise ConfigError(f"--criterion {args.criterion} is unknown: the recipes use {CRITERION}")
    in_pieces = args.criterion == CRITERION
    device, free = memory.free_on_device(args.cpu)
    process = inputs.process if device == "CPU" else None
    parts = memory.estimate(
        inputs.shape,
        args.precision,
        args.max_tokens,
        args.checkpoint_activations,
        process,
        in_pieces,
    )
    setting = f"{args.precision}, {args.max_tokens:,} tokens"
    largest = sorted(parts, key=parts.get, reverse=True)[:3]
    most = ", ".join(f"{part} {_size(parts[part])}" for part in largest)
    lines = [
        _compare(
            "memory",
            f"about {_size(sum(parts.values()))} to train with {setting} ({most})",
            sum(parts.values()),
            device,
            free,
            ("" if in_pieces else f"add --criterion {CRITERION}, ")
            + "lower --max-tokens (and raise --update-freq), add --checkpoint-activations or --amp",
            parts,
        )
    ]
    if inputs.checkpoint:
        peak = inputs.process + memory.loading_peak(
            inputs.shape, inputs.checkpoint.size, args.precision
        )
        found = f"about {_size(peak)} while the checkpoint is loaded"
        free = memory.free_on_cpu()
        remedy = "end other programs, or take a machine with more memory"
        lines.append(_compare("memory to load", found, peak, "CPU", free, remedy, {}))
    return lines


def _compare(check, found, needed, device, free, remedy, parts):
    values = {"bytes": needed, "free": free, "parts": parts}
    if free is None:
        remedy = f"check by hand that {_size(needed)} are free"
        return Line(WARNING, check, f"{found}; cannot read what is free", remedy, values)
    status = ERROR if needed > free else WARNING if needed > TIGHT * free else OK
    found = f"{found}; {_size(free)} free ({device})"
    return Line(status, check, found, remedy if status != OK else "", values)


def check_disk(inputs):
    """Space for the checkpoints of a run: the last, the best, and the one being written."""
    folder = inputs.args.save_dir
    size = memory.checkpoint_size(inputs.shape, inputs.args.precision)
    free = memory.free_on_disk(folder)
    found = f"a checkpoint takes about {_size(size)}; {_size(free)} free for {folder}"
    values = {"bytes": size, "free": free}
    if free >= 3 * size:
        return [Line(OK, "disk", found, values=values)]
    status = ERROR if free < size else WARNING
    remedy = f"free {_size(3 * size - free)} or name another --save-dir: a run keeps up to three"
    return [Line(status, "disk", found, remedy, values)]


def _size(size):
    return f"{size / memory.GIB:.1f} GiB" if size >= memory.GIB / 10 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Check:
    """A check and what it needs.

    Attributes:
        name: what is checked
        run: :class:`Inputs` -> lines
        inputs: names of the attributes of :class:`Inputs` that must be there
        options: names of the options that must be given
        needs: what the user has to give, for the message
    """

    name: str
    run: Callable
    inputs: tuple
    options: tuple
    needs: str


_DICTIONARY = "a dictionary (--data or --dict)"
_MODEL = "--lora-tiers and --checkpoint (or --arch and a dictionary)"
CHECKS = (
    Check("checkpoint", check_checkpoint, ("checkpoint",), (), "--checkpoint"),
    Check("data", check_data, ("data_files",), (), "--data"),
    Check("dictionary", check_dictionaries, ("dictionary",), (), "--data or --dict"),
    Check(
        "embedding rows",
        check_rows,
        ("checkpoint", "dictionary", "langs"),
        (),
        f"--checkpoint and {_DICTIONARY}",
    ),
    Check("language order", check_order, ("checkpoint", "langs"), (), "--checkpoint and --langs"),
    Check(
        "language tokens", check_tokens, ("dictionary", "langs"), (), f"{_DICTIONARY} and --langs"
    ),
    Check("<unk>", check_unknown, ("data_files", "dictionary"), (), "--data"),
    Check("adapters", check_model, ("model",), (), _MODEL),
    Check("memory", check_memory, ("shape",), ("max_tokens",), f"--max-tokens, {_MODEL}"),
    Check("disk", check_disk, ("shape",), ("save_dir",), f"--save-dir, {_MODEL}"),
)


def run_checks(inputs, report):
    """Runs every check that has what it needs; a mistake that stops several is told once."""
    told = set()
    for check in CHECKS:
        try:
            ready = all(getattr(inputs, name) is not None for name in check.inputs)
            if ready and all(getattr(inputs.args, name) for name in check.options):
                report.lines += check.run(inputs)
            else:
                report.not_checked[check.name] = check.needs
        except ConfigError as error:
            if str(error) in told:
                report.not_checked[check.name] = "what failed above"
            else:
                report.lines.append(Line(ERROR, check.name, str(error)))
            told.add(str(error))

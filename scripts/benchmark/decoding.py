"""The sections about decoding."""

from types import SimpleNamespace

from fairseq.dataclass.configs import GenerationConfig
from fairseq.sequence_generator import SequenceGenerator

from benchmark.contenders import CONTENDERS, FULL, LOOP, OURS
from benchmark.measuring import interleaved, seconds
from benchmark.report import Result, Spread, Table, ratios
from benchmark.shapes import LANGUAGES, codes
from lslora_fairseq.evaluation.search import BeamSearch

EVALUATED = 30  # sentences of a batch in the section evaluate


def decoding(contender, batch, setting, direction=(None, None), length=25, beam=5):
    """Prepares a model as fairseq-generate does; returns a function that decodes once.

    All hypotheses get the same length.

    Args:
        direction: codes of the source and target language if all sentences share them: the
            adapters may then be merged
    """
    # frozen, the output projection of stock models would take a slow path (ContiguousFrozenBase)
    model = contender.model.eval().requires_grad_()
    source, target = direction
    task = SimpleNamespace(source_lang=source, target_lang=target)
    model.prepare_for_inference_(SimpleNamespace(generation=SimpleNamespace(), task=task))
    generator = SequenceGenerator(
        [model], setting.dictionary, beam_size=beam, max_len_b=length, min_len=length
    )

    def decode():
        start = seconds(setting.device)
        generator.generate([model], {"net_input": contender.net_input(batch)})
        return seconds(setting.device) - start

    return decode


def decode(options):
    """Beam search of one direction, and of mixed directions against the number of languages."""
    setting = options.setting
    mixed = setting.batch(LANGUAGES, sentences=8, tokens=25)
    single = mixed.in_one_direction()
    direction = codes(LANGUAGES)[:2]
    runs = {}
    for name, label, languages, batch, merged in (
        ("base", FULL, LANGUAGES, single, False),
        ("merged, one direction", OURS, LANGUAGES, single, True),
        ("adapters, one direction", OURS, LANGUAGES, single, False),
        *(
            (f"adapters, directions of {n}", OURS, n, setting.batch(n, 8, 25), False)
            for n in sorted({LANGUAGES, *options.languages})
        ),
        (f"per-language loop, directions of {LANGUAGES}", LOOP, LANGUAGES, mixed, False),
    ):
        contender = CONTENDERS[label](setting, languages)
        contender.add_noise()
        runs[name] = decoding(contender, batch, setting, direction if merged else (None, None))
    found = interleaved("decode", runs, options.repetitions)
    base = found["base"]
    rows = {name: [Spread.of(times), ratios(times, base)] for name, times in found.items()}
    title = f"Decoding, beam 5, 8 sentences of 25 tokens, {LANGUAGES} languages or as told"
    return Result([Table(title, ["seconds", "÷ base"], rows)], {"times": found})


def searching(contender, batch, setting, length=25, beam=5, merged=None):
    """Prepares a model as ``lslora evaluate`` does; returns a function that decodes once.

    Args:
        merged: numbers of the languages of a direction that is merged first
    """
    model = contender.model.eval()
    if merged:
        model.merge(*merged)
    search = BeamSearch(
        [model],
        setting.dictionary,
        GenerationConfig(beam=beam, max_len_b=length, min_len=length),
    )
    net_input = {k: v for k, v in contender.net_input(batch).items() if k != "prev_output_tokens"}
    if merged:
        net_input = {key: net_input[key] for key in ("src_tokens", "src_lengths")}

    def decode():
        start = seconds(setting.device)
        search.search(net_input, [length] * len(net_input["src_tokens"]))
        return seconds(setting.device) - start

    return decode


def evaluate(options):
    """Batches of several directions as lslora evaluate makes them, against merging one."""
    setting, tables, raw = options.setting, [], {}
    for languages in (LANGUAGES, 100):
        mixed = setting.batch(languages, sentences=EVALUATED, tokens=25)
        single = mixed.in_one_direction()

        def model(languages=languages):
            made = CONTENDERS[OURS](setting, languages)
            made.add_noise()
            return made

        stock = CONTENDERS[OURS](setting, languages)
        stock.add_noise()
        runs = {
            "merged, one direction": searching(model(), single, setting, merged=(0, 1)),
            "fairseq's search, merged": decoding(stock, single, setting, codes(languages)[:2]),
            "five directions into one language": searching(
                model(), mixed.into_one_language(5), setting
            ),
            "all directions": searching(model(), mixed, setting),
        }
        found = interleaved("evaluate", runs, options.repetitions)
        merged = found["merged, one direction"]
        rows = {name: [Spread.of(times), ratios(times, merged)] for name, times in found.items()}
        title = f"Evaluation, beam 5, {EVALUATED} sentences of 25 tokens, {languages} languages"
        tables.append(Table(title, ["seconds", "÷ merged"], rows))
        raw[languages] = found
    return Result(tables, {"times": raw})

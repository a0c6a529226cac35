"""The benchmark: its baselines compute the same as the package, its record holds its tables."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark import (
    command,
    contenders,
    inventory,
    lifecycle,
    loss,
    measuring,
    memory,
    operations,
    shapes,
    steps,
)
from benchmark.contenders import CONTENDERS, FrozenBase, LanguageLoop, Ours, SharedLoRA
from benchmark.report import Spread, ratios
from benchmark.shapes import Setting
from fairseq.models.transformer import TransformerModel
from torch import nn
from toy import HALF_ON_CPU

from lslora_fairseq.errors import ConfigError

TINY = Setting(layers=2, dim=16, ffn=32, heads=2, words=40, sentences=9, tokens=6)
LANGUAGES = 4


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The benchmark at sizes that take no time, in one process."""
    monkeypatch.setitem(shapes.PRESETS, "cpu-small", TINY)
    monkeypatch.setattr(shapes, "M2M_615M", TINY)
    monkeypatch.setattr(operations, "SHAPE", replace(TINY, dropout=0.0))
    monkeypatch.setattr(steps, "MANY_LANGUAGES", 20)
    for module in (memory, lifecycle):
        monkeypatch.setattr(module, "in_own_process", lambda f, *args: f(*args))


def our_factors(linear, language, of=lambda param: param):
    """A (rank, in) and B (out, rank) of one language at one site, or *of* them; None for None."""
    weight = of(linear.adapters[linear.site.side].weight(language))
    if weight is None:
        return None, None
    a, b = linear.adapters[linear.site.side].columns[linear.site.module]
    return weight[:, a], weight[:, b].T


def sites(ours, other):
    """Each adapted linear of this package's model with the module in its place in another."""
    return [
        (linear, other.model.get_submodule(linear.site.name))
        for linear in ours.model.adapted_linears()
    ]


@torch.no_grad()
def copy_adapters(ours, loop, languages):
    for linear, module in sites(ours, loop):
        for language in range(languages):
            A, B = our_factors(linear, language)
            module.lora_A[language].copy_(A)
            module.lora_B[language].copy_(B)


def test_the_loop_computes_what_the_package_computes():
    ours, loop = Ours(TINY, LANGUAGES), LanguageLoop(TINY, LANGUAGES)
    with torch.no_grad():
        for param in ours.trainable():
            param.copy_(torch.randn_like(param) * 0.3)
    copy_adapters(ours, loop, LANGUAGES)
    batch = TINY.batch(LANGUAGES)
    losses = []
    for contender in (ours, loop, FrozenBase(TINY, LANGUAGES)):
        contender.model.eval()  # no dropout
        losses.append(contender.loss(batch))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert (losses[2] - losses[0]).abs() > 1  # the adapters do differ from none
    present = set()
    for linear, module in sites(ours, loop):
        for language in range(LANGUAGES):
            wanted = our_factors(linear, language, lambda param: param.grad)
            found = module.lora_A[language].grad, module.lora_B[language].grad
            if found == (None, None):  # absent from the batch
                assert wanted == found
            else:
                present.add((linear.site.side, language))
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert [sum(side == s for side, _ in present) for s in ("source", "target")] == batch.present()


def test_the_loop_finds_the_language_of_every_beam():
    loop = LanguageLoop(TINY, LANGUAGES)
    loop.add_noise()
    batch = TINY.batch(LANGUAGES)
    loop.net_input(batch)
    module = loop.model.decoder.layers[0].fc1
    x = torch.randn(1, TINY.sentences, TINY.dim)
    beams = module(x.repeat_interleave(3, dim=1))
    torch.testing.assert_close(beams, module(x).repeat_interleave(3, dim=1))


def test_shared_lora_is_the_loop_of_one_language():
    shared, loop = SharedLoRA(TINY, 1), LanguageLoop(TINY, 1)
    shared.add_noise()
    with torch.no_grad():
        for ours, theirs in zip(shared.trainable(), loop.trainable()):
            theirs.copy_(ours)
    batch = TINY.batch(1)
    outputs = [c.logits(batch) for c in (shared, loop) if c.model.eval()]
    torch.testing.assert_close(*outputs)


def test_what_each_contender_trains():
    names = {}
    for label, kind in CONTENDERS.items():
        if label not in contenders.HUGGING_FACE:
            contender = kind(TINY, LANGUAGES)
            named = contender.model.named_parameters()
            names[label] = [name for name, param in named if param.requires_grad]
            contender.start_optimizer()
            contender.forward_backward(TINY.batch(LANGUAGES))
            assert any(p.grad is not None for p in contender.trainable()), label
            before = [p.clone() for p in contender.trainable()]
            contender.update()
            moved = [not torch.equal(a, b) for a, b in zip(before, contender.trainable())]
            frozen = (contenders.FROZEN, contenders.CONTIGUOUS)
            assert any(moved) != (label in frozen), label
    assert len(names["frozen base"]) == 6
    assert all(name.endswith("_proj.bias") for name in names["frozen base"])
    count = len(Ours(TINY, LANGUAGES).model.adapted_linears())
    assert count == TINY.layers * (5 + 8)
    assert len(names["shared LoRA (rank 8)"]) == 2 * count
    assert len(names["per-language loop"]) == 2 * count * LANGUAGES
    adapters_and_w = 2 * LANGUAGES + 1  # of a layer
    assert len(names[contenders.BOTH_SIDES]) == 2 * TINY.layers * adapters_and_w


@pytest.mark.parametrize("before", [None, "glibc.malloc.mmap_max=0"])
def test_free_memory_is_not_counted(monkeypatch, before):
    """Whatever the allocator is told elsewhere."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    found = memory.memory_of(os.getenv, "GLIBC_TUNABLES")
    assert found == "glibc.malloc.mmap_threshold=1048576"
    assert os.environ.get("GLIBC_TUNABLES") == before


def test_ranks_of_the_package_are_those_of_the_loop():
    ours = Ours(TINY, 7)
    assert list(ours.model.languages.codes) == shapes.codes(7)
    assert list(ours.model.plan.ranks) == shapes.ranks(7) == [8, 2, 2, 8, 2, 2, 8]


def test_batch():
    batch = replace(TINY, sentences=200).batch(30)
    src, prev = batch.tokens["src_tokens"], batch.tokens["prev_output_tokens"]
    assert torch.equal(src.ne(1).sum(1), batch.tokens["src_lengths"])
    assert src[:, -1].ne(1).all() and prev[:, 0].ne(1).all()  # padded on the left, on the right
    assert abs(batch.target.ne(1).sum() / 200 - TINY.tokens) < 0.5
    assert batch.present() == [30, 30]
    assert batch.in_one_direction().present() == [1, 1]
    assert [ids[0] for ids in batch.in_one_direction().lang_ids.values()] == [0, 1]


def test_base_parameters():
    modules = TINY.build(TransformerModel).modules()
    matrices = {m.weight for m in modules if isinstance(m, (nn.Linear, nn.Embedding))}
    assert TINY.base_parameters == sum(matrix.numel() for matrix in matrices)


def test_record_holds_what_the_tables_say(tmp_path, capsys):
    command.main(
        ["--languages", "4,1", "--repetitions", "2", "--threads", "1", "--loop-up-to", "3"]
        + ["--sections", "step,memory,decode,optimizer,pruning", "--out", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert record["setting"]["dim"] == 16 and record["machine"]["threads"] == 1
    assert record["machine"]["cpu"] in printed and record["versions"]["torch"] in printed
    tables = [t for section in record["sections"].values() for t in section["tables"]]
    for table in tables:
        assert table["title"] in printed
        for label, cells in table["rows"].items():
            shown = ["" if cell is None else str(Spread(**cell)) for cell in cells]
            assert any(
                line.startswith(label)
                and line.split() == [*label.split(), *" ".join(shown).split()]
                for line in printed.splitlines()
            ), (label, shown)

    steps, raw = tables[0], record["sections"]["step"]["raw"]["times"]
    assert steps["columns"] == [1, 4]
    assert steps["rows"]["per-language loop"][1] is None  # --loop-up-to
    seconds = raw["4"]["step"]
    assert len(seconds["frozen base"]) == 2
    expected = ratios(seconds["lslora_fairseq"], seconds["frozen base"])
    assert steps["rows"]["lslora_fairseq"][1] == expected._asdict()

    figure = (tmp_path / "benchmark.svg").read_text(encoding="utf-8")
    for label in ("frozen base", *steps["rows"], "languages"):
        assert label in figure
    memory = record["sections"]["memory"]["tables"][0]["rows"]
    assert memory["full fine-tuning"][2]["median"] == 1
    assert {"lslora_fairseq, 1 language", "lslora_fairseq, 4 languages"} < memory.keys()


def test_half_precision_and_operations(tmp_path, capsys):
    command.main(
        ["--languages", "3", "--repetitions", "1", "--threads", "1", "--precision", "bf16"]
        + ["--sections", "step,memory,operations", "--loop-up-to", "2", "--out", str(tmp_path)]
    )
    record = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert record["setting"]["precision"] == "bf16"
    assert capsys.readouterr().out.count("bf16: this package's adapters, and PEFT's, keep") == 2
    over, decoding, passes, updates, waits = record["sections"]["operations"]["tables"]
    assert "per-language loop" not in passes["rows"]  # --loop-up-to
    counts = {label: cells[0]["median"] for label, cells in passes["rows"].items()}
    ratio = counts["lslora_fairseq"] / counts["frozen base"]
    assert over["rows"]["lslora_fairseq"][0]["median"] == ratio > 1
    assert decoding["rows"]["frozen base"][0]["median"] == 1
    assert waits["rows"]["lslora_fairseq"][0]["median"] == 2


@pytest.mark.parametrize("precision", shapes.DTYPES)
@pytest.mark.parametrize("label", ["full fine-tuning", "lslora_fairseq"])
def test_contenders_are_trained_in_every_precision(label, precision):
    if precision == "fp16" and not HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    contender = CONTENDERS[label](replace(TINY, precision=precision), LANGUAGES)
    contender.start_optimizer()
    before = [p.clone() for p in contender.trainable()]
    contender.forward_backward(TINY.batch(LANGUAGES))
    contender.update()
    after = contender.trainable()
    frozen = {p.dtype for p in contender.model.parameters() if not p.requires_grad}
    dtype, has_adapters = shapes.DTYPES[precision], label == "lslora_fairseq"
    assert frozen == ({dtype} if has_adapters else set())
    assert {p.dtype for p in after} == {torch.float if has_adapters else dtype}
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after))


def test_passes_are_timed_by_events_on_a_gpu(monkeypatch):
    class Event:
        """Marks that are 250 milliseconds apart."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    contender, batch = FrozenBase(TINY, 1), TINY.batch(1)
    assert steps.timed_step(contender, batch, "cuda")["events"] == 0.25
    assert "events" not in steps.timed_step(contender, batch, "cpu")
    spent = {"frozen base": [2.0], "full fine-tuning": [4.0], "lslora_fairseq": [3.0]}
    parts = dict.fromkeys(("forward_backward", "optimizer", "step", "events"), spent)
    titles = {t.title: t for t in steps.step_tables(list(spent), {1: parts})}
    table = titles["Forward and backward by CUDA events ÷ frozen base"]
    assert table.rows["lslora_fairseq"] == [Spread(1.5, 1.5, 1.5)]


def test_the_command_starts_in_a_process_of_its_own():
    script = Path(contenders.__file__).parent
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True
    )
    for name in (*command.SECTIONS, *shapes.PRESETS, "--precision"):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("kind", ["", loss.ADAPTED])
def test_both_losses_are_the_same(kind):
    losses = [loss.Loss(TINY, label + kind).run() for label in (loss.STOCK, loss.OURS)]
    torch.testing.assert_close(*losses)


def test_losses_and_the_memory_of_steps():
    options = SimpleNamespace(repetitions=2, threads=1)
    plain, adapted = loss.loss(options).tables
    for table in (plain, adapted):
        stock, ours = table.rows.values()
        assert stock[1].median == stock[3].median == 1 and ours[1].median > 0
    (table,) = loss.loss_step(options).tables
    assert list(table.rows) == ["full fine-tuning", contenders.STOCK_LOSS, "lslora_fairseq"]


@pytest.mark.slow
def test_startup(monkeypatch, capfd):
    def once(name, runs, repetitions):
        return {label: [run()] for label, run in runs.items()}

    monkeypatch.setattr(lifecycle, "interleaved", once)
    (table,) = lifecycle.startup(SimpleNamespace(repetitions=1, threads=1)).tables
    assert list(table.rows) == ["fairseq alone", "lslora_fairseq"]
    for seconds, _, peak, _ in table.rows.values():
        assert seconds.median > 0.5 and peak.median > 100
    assert table.rows["fairseq alone"][1].median == 1


@pytest.mark.slow
def test_inventory(monkeypatch):
    """fairseq-train begins and goes through two epochs, updates left out."""

    def once(name, runs, repetitions):
        return {label: [run()] for label, run in runs.items()}

    monkeypatch.setattr(inventory, "interleaved", once)
    tables = inventory.inventory(
        SimpleNamespace(repetitions=1, threads=1, setting=replace(TINY, words=300))
    ).tables
    assert len(tables) == 3
    for table in tables:
        assert list(table.rows) == ["fairseq alone", "lslora_fairseq"]
        assert all(seconds.median > 0 for seconds, _ in table.rows.values())


@pytest.mark.slow
def test_lifecycle():
    """Real commands: a model is trained, resumed, pruned, merged and decoded."""
    result = lifecycle.lifecycle(SimpleNamespace(threads=1))
    assert len(result.tables[0].rows) == 6
    assert result.raw["checkpoint"] > result.raw["checkpoint (light)"] > 1000
    for seconds, peak in result.tables[0].rows.values():
        assert seconds.median > 0.5 and peak.median > 100


def test_startup_needs_room(monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(lifecycle.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match="--sections startup writes .* set TMPDIR"):
        lifecycle.startup(SimpleNamespace(repetitions=1, threads=1))


def test_a_command_that_fails_is_told():
    with pytest.raises(ConfigError, match="no_such_module ended with status 1: .*No module named"):
        lifecycle.run_command([sys.executable, "-m", "no_such_module"], 1)


def test_repetitions_are_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    found = measuring.interleaved("test", runs, 2)
    assert "".join(order) == "abc" + "bca" + "cab"  # a warm-up comes first
    assert found == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}


def test_spread():
    assert ratios([2, 6, 10], [1, 2, 10]) == Spread(2, 1, 3)
    assert str(Spread(1.0361, 1.031, 1.049)) == "1.036 (1.03-1.05)"
    assert str(Spread(2345.6, 2345.6, 2345.6)) == "2,346"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--languages", "1,zwölf"], "--languages: write numbers from 1 to 999, such as 1,12,100"),
        (["--languages", "0,4"], "--languages: write numbers"),
        (["--languages", "1000"], "--languages: write numbers"),
        (["--sections", "step,speed"], "unknown section 'speed'; valid: step, memory, decode"),
        (["--repetitions", "0"], "--repetitions 0 must be at least 1"),
        (["--preset", "gpu"], "--preset gpu needs a CUDA device and torch finds none: choose"),
        (["--out", "/dev/null/x"], "Not a directory"),
    ],
)
def test_bad_options_are_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    line = str(stopped.value)
    assert line.startswith("lslora: error: ") and message in line and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_comes_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "can_draw", lambda: False)
    command.main(
        ["--languages", "1", "--repetitions", "1", "--threads", "1", "--sections", "step"]
        + ["--out", str(tmp_path)]
    )
    progress = capsys.readouterr().err.splitlines()
    assert progress[0].endswith("no figure will be drawn: pip install matplotlib")
    assert not (tmp_path / "benchmark.svg").exists()

"""The recipe of examples/nllb in miniature: its own scripts on a folder like NLLB's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from console import ROOT, folder_of_commands

CODES = {"en": "eng_Latn", "fr": "fra_Latn"}
SIZES = (
    "--encoder-layers 2 --decoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--decoder-ffn-embed-dim 24 --encoder-attention-heads 4 --decoder-attention-heads 2 "
    "--encoder-normalize-before --decoder-normalize-before --share-all-embeddings"
)


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory):
    """Environment of the scripts."""
    folder = tmp_path_factory.mktemp("nllb")
    text = [line for code in CODES for line in corpus.text[code]]
    hub.nllb(folder / "hf", hub.spm(folder / "spm.model", text))
    for ours, code in CODES.items():
        lines = corpus.text[ours]
        for split, part in (("dev", lines[16:] + lines[:8]), ("devtest", lines[8:16])):
            place = folder / "flores200_dataset" / split / f"{code}.{split}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("\n".join(part) + "\n", "utf-8")
    return {
        "WORK": str(folder / "work"), "HF_DIR": str(folder / "hf"),
        "FLORES_DIR": str(folder / "flores200_dataset"), "TIERS": "high=eng_Latn;low=fra_Latn",
        "ARCH": "lslora_transformer", "EMBEDDING_RANK": "4", "SHARED_RANK": "2", "RANKS": "2",
        "ENCODER_SIDES": "source,target", "VALID_LINES": "8", "MAX_EPOCH": "2",
        "PRUNING_BEGIN": "1", "PRUNING_DURATION": "1", "MAX_TOKENS": "600", "UPDATE_FREQ": "1",
        "BEAM": "2", "BLEU_TOKENIZER": "char", "JOBS": "1",
        "EXTRA_TRAIN_ARGS": f"--cpu --num-workers 0 {SIZES}",
        "EXTRA_GENERATE_ARGS": "--cpu --num-workers 0 --max-len-b 20",
    }  # fmt: skip


def script(name, settings, **more):
    """Runs a script after the recipe's settings; (exit status, stdout, stderr)."""
    folders = folder_of_commands(), Path(sys.executable).parent, os.environ["PATH"]
    path = os.pathsep.join(map(str, folders))
    python = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", 'source "$1/nllb/settings.sh" && bash "$1/$2"', "script",
         ROOT / "examples", name],
        capture_output=True, text=True, timeout=300, cwd=Path(settings["WORK"]).parent,
        env={**os.environ, **python, **settings, **more},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_from_a_folder_to_folders(settings):
    """Import, prepare, fine-tune, evaluate, export; and nothing twice."""
    status, _, stderr = script("nllb/import.sh", settings, HF_DIR="")
    assert status == 1 and stderr.startswith("nllb: error: ") and "HF_DIR=" in stderr
    steps = ["nllb/import.sh", *(f"flores12/{s}.sh" for s in ("prepare", "finetune", "evaluate"))]
    for name in [*steps, "nllb/export.sh"]:
        status, out, stderr = script(name, settings, EXPORT="eng_Latn-fra_Latn")
        assert status == 0, f"{name} failed:\n{out[-3000:]}\n{stderr[-3000:]}"
    work = Path(settings["WORK"])
    langs = (work / "base" / "langs.txt").read_text("utf-8").split()
    assert langs != sorted(langs)  # they are taken as they are
    log = (work / "finetuned" / "settings").read_text("utf-8")
    assert f"--langs {','.join(langs)}" in log
    scored = json.loads((work / "results" / "scores.json").read_text("utf-8"))
    assert scored["tiers"] == {"eng_Latn": "high", "fra_Latn": "low"}
    assert {*scored["directions"]} == {"eng_Latn-fra_Latn", "fra_Latn-eng_Latn"}
    halves = {f"{code}-{side}" for code in CODES.values() for side in ("source", "target")}
    assert {path.name for path in (work / "peft").iterdir()} == {*halves, "shared"}
    assert (work / "eng_Latn-fra_Latn" / "model.safetensors").stat().st_size > 10_000
    assert script("nllb/import.sh", settings)[1] == f"{work / 'base'} is complete\n"
    assert script("nllb/export.sh", settings)[1] == ""

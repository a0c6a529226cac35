#!/usr/bin/env bash
# Runs ruff and the tests: bash scripts/test.sh [--python 3.10] [pytest arguments]
# With --python, in an environment of its own with that Python (.venv-3.10).
# With --hf, after --python if both are given, the tests with transformers and peft alone, in an
# environment of its own that has the two (.venv-hf).
# With --cov=lslora_fairseq, tells which lines they reach, and takes a third longer.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ "${1:-}" = --python ]; then
    if [ -z "${2:-}" ]; then
        echo "lslora: error: --python needs a version, such as 3.10" >&2
        exit 1
    fi
    export PYTHON="${PYTHON:-python$2}" VENV="$ROOT/.venv-$2"
    shift 2
fi
if [ "${1:-}" = --hf ]; then
    export HF=1 VENV="${VENV:-$ROOT/.venv}-hf"
    shift
    set -- tests/huggingface "$@"
fi
source "$ROOT/scripts/environment.sh"
cd "$ROOT"
ruff check .
ruff format --check .
# a process for each core, each with one thread, which keeps them off each other's cores
export OMP_NUM_THREADS=1
# a file's tests share what they trained; in the order of folders, which ends with quick ones
python -m pytest -n "$(python lslora_fairseq/cores.py)" --dist loadscope --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Runs ruff and the tests with coverage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/environment.sh"
cd "$ROOT"
ruff check .
ruff format --check .
# a process for each core, each with one thread, which keeps them off each other's cores
export OMP_NUM_THREADS=1
python -m pytest -n "$(getconf _NPROCESSORS_ONLN)" --dist loadscope \
    --cov=lslora_fairseq --cov-report=term "$@"

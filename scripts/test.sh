#!/usr/bin/env bash
# Runs ruff and the tests with coverage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/environment.sh"
cd "$ROOT"
ruff check .
ruff format --check .
# several commands run side by side in some tests: one thread each keeps them off each other's cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python -m pytest --cov=lslora_fairseq --cov-report=term "$@"

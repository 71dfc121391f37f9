#!/usr/bin/env bash
# Set up, then everything CI runs: lint, types, layers, tests.
#
#   bash launch/test.sh                      all of it
#   bash launch/test.sh tests/unit -k name   these tests only; arguments go to pytest
#
# Tests marked slow or gpu are left out: `.venv/bin/pytest -m slow` runs the former, `-m gpu` the latter where there is a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1

bash launch/setup.sh
if [ $# -eq 0 ]; then
  .venv/bin/ruff check .
  .venv/bin/mypy
  .venv/bin/lint-imports
fi
exec .venv/bin/pytest -m "not slow and not gpu" "$@"

#!/usr/bin/env bash
# Run the tests in .venv, which it sets up first: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh --test
# One thread per process: the tests start several processes at a time.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"

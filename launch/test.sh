#!/usr/bin/env bash
# Run the tests in .venv, which it sets up first:
#
#   bash launch/test.sh [--full] [pytest arguments]
#
#   bash launch/test.sh               what CI runs
#   bash launch/test.sh tests/unit    what a contributor runs between edits
#   bash launch/test.sh --full        these and the slow checks, before a release
#
# Two processes share the tests, or as many as WORKERS says; a single test file runs in one. tests/README.md has the
# times and what is slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh --test
workers=${WORKERS:-2}
for argument in "$@"; do
  case $argument in
    *.py | *.py::*) workers=0 ;;
  esac
done
# Each of some ten thousand files of checkpoints waits for the disk that it is written to; in memory it waits for nothing.
if [[ -z ${TMPDIR:-} && -d /dev/shm && $(df --output=avail -k /dev/shm | tail -1) -gt 2000000 ]]; then
  export TMPDIR=/dev/shm
fi
SECONDS=0
status=0
# One thread per process: the tests start several processes at a time.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@" || status=$?
echo "The tests took $SECONDS seconds."
exit "$status"

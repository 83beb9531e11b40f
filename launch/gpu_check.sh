#!/usr/bin/env bash
# Measure on a GPU what README and docs/performance.md do not know yet, in at most 560 seconds:
#
#   bash launch/gpu_check.sh [OUTPUT] [--stages 0 4 7] [--wheels FOLDER]
#   bash launch/gpu_check.sh --rehearse      the same stages on a CPU, at small sizes, in a few minutes
#
# It takes the Python that PYTHON names, else .venv's, else python3, and installs nothing into it: what is missing comes
# from the folder that launch/gpu_wheels.sh filled, into a folder of its own. docs/gpu.md says what each stage tells.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ ! -x .venv/bin/python ]] || python=.venv/bin/python
fi
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || {
  echo "launch/gpu_check.sh: error: $python has no torch; set PYTHON to one that has, or run bash launch/setup.sh" >&2
  exit 2
}
exec "$python" -m benchmarks.gpu_check "$@"

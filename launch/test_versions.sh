#!/usr/bin/env bash
# Run the tests that touch DeepSpeed's internals with every supported version: bash launch/test_versions.sh [options]
# Options are those of benchmarks/versions.py, such as --versions 0.18.4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh --test
.venv/bin/python -m benchmarks.versions "$@"

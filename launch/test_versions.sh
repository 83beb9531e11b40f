#!/usr/bin/env bash
# Run combinations of all settings with every supported DeepSpeed version: bash launch/test_versions.sh [options]
# Options are those of tests/compatibility/versions.py, such as --versions 0.18.4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh --test
.venv/bin/python -m tests.compatibility.versions "$@"

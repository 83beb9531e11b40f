#!/usr/bin/env bash
# Gather the packages that a rented GPU machine without a network lacks, for launch/gpu_check.sh there:
#
#   bash launch/gpu_wheels.sh [FOLDER] [--python 3.12]      by default runs/gpu_wheels, under 40 MB
#
# Needs a network, and the environment that launch/setup.sh makes, in which DeepSpeed's wheel is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
exec .venv/bin/python -m benchmarks.gpu_check.wheels "$@"

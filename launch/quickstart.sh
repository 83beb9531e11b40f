#!/usr/bin/env bash
# From nothing to a pre-trained small LLaMA: sets up .venv, then trains with FiraAdam under the DeepSpeed launcher.
#
#   bash launch/quickstart.sh [options of examples/pretrain_llama.py]
#
# On GPUs it uses all of them, otherwise two CPU processes. Results: runs/quickstart/. LAUNCHER=torchrun or mpirun
# chooses another launcher, see launch/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
VIRTUAL_ENV=$PWD/.venv exec bash launch/run.sh examples/pretrain_llama.py \
  --deepspeed-config ds_configs/zero2_bf16.json --output-dir runs/quickstart --time-budget 240 --report "$@"

#!/usr/bin/env bash
# From nothing to a pre-trained small LLaMA: sets up .venv, then trains with FiraAdam under the DeepSpeed launcher.
#
#   bash launch/quickstart.sh [options of examples/pretrain_llama.py]
#
# On GPUs it uses all of them, otherwise two CPU processes. Results: runs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh

# A free port, so that a second run on the same machine does not meet the first one.
port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
launcher=(.venv/bin/deepspeed --log_level warning --master_port "$port")
if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  launcher+=(--num_gpus 2)
  # One thread per process; and told of the CPU, DeepSpeed does not warn in every process that it found no GPU.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

"${launcher[@]}" examples/pretrain_llama.py --deepspeed-config ds_configs/zero2_bf16.json \
  --output-dir runs/quickstart --time-budget 240 "$@"

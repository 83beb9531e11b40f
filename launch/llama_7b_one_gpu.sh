#!/usr/bin/env bash
# LLaMA 7B on one card of 24 GB: weights in bfloat16, stepped in the backward pass, int8 states, layers computed again.
#
#   bash launch/llama_7b_one_gpu.sh --text FILE [options of examples/hf_trainer.py]
#   bash launch/llama_7b_one_gpu.sh --text FILE --model FOLDER      # go on from a checkpoint of a LLaMA
#   bash launch/llama_7b_one_gpu.sh --text FILE --resume_from_checkpoint last
#
# docs/one_gpu.md says what fits, by `ds-fira estimate`. Options given here come last, and so win.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCHER=python exec bash "$repository/launch/run.sh" "$repository/examples/hf_trainer.py" \
  --model llama_7b --weights bfloat16 --seq_length 1024 --per_device_train_batch_size 1 \
  --optim fira_adamw \
  --optim_args preset=recommended,rank=256,state_dtype=int8,weight_rounding=stochastic,step_in_backward=true \
  --activation_checkpointing True --lr_scheduler_type cosine --warmup_steps 1000 --max_steps 10000 --save_steps 1000 \
  --logging_steps 10 --output_dir "$repository/runs/llama_7b_one_gpu" "$@"

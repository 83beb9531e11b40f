#!/usr/bin/env bash
# LLaMA 7B as in the released code's script: rank 64 of 4096, lr 0.005, gap 500, clipping 1.0, 10,000 steps of C4.
#
#   bash launch/llama_7b_rank64.sh [options of examples/pretrain_llama.py]
#   LAUNCHER=torchrun bash launch/llama_7b_rank64.sh --data /data/c4/en --tokenizer /data/t5-base
#
# The paper shows the loss curve (Figure 5).
# Processes, machines and launchers: launch/run.sh. To go on after an end of any kind: the same command with --resume.
set -euo pipefail
# shellcheck source=launch/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe llama_7b llama_7b_rank64 10000 "$@"

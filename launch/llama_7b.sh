#!/usr/bin/env bash
# LLaMA 7B, rank 1024 of 4096, lr 0.005, gap 500, clipping 1.0, 150,000 steps of 131K tokens of C4 (19.7B, Table 5).
#
#   bash launch/llama_7b.sh [options of examples/pretrain_llama.py]
#   LAUNCHER=torchrun bash launch/llama_7b.sh --data /data/c4/en --tokenizer /data/t5-base
#
# The paper shows Fira at rank 64 beside GaLore at 64 and 512 (Figure 5); 1024 is the rank of GaLore's own 7B run.
# Processes, machines and launchers: launch/run.sh. To go on after an end of any kind: the same command with --resume.
set -euo pipefail
# shellcheck source=launch/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe llama_7b llama_7b 150000 "$@"

#!/usr/bin/env bash
# LLaMA 60M as in the paper: rank 128 of 512, alpha 0.25, 10,000 steps of 131K tokens of C4 (1.3B).
#
#   bash launch/llama_60m.sh [options of examples/pretrain_llama.py]
#   LAUNCHER=torchrun bash launch/llama_60m.sh --data /data/c4/en --tokenizer /data/t5-base
#
# The paper's validation perplexity: 31.06, with Adam 34.06 (Table 2).
# Processes, machines and launchers: launch/run.sh. To go on after an end of any kind: the same command with --resume.
set -euo pipefail
# shellcheck source=launch/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe llama_60m llama_60m 10000 "$@"

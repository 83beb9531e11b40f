#!/usr/bin/env bash
# LLaMA 350M as in the paper: rank 256 of 1024, alpha 0.25, 60,000 steps of 131K tokens of C4 (7.8B).
#
#   bash launch/llama_350m.sh [options of examples/pretrain_llama.py]
#   LAUNCHER=torchrun bash launch/llama_350m.sh --data /data/c4/en --tokenizer /data/t5-base
#
# The paper's validation perplexity: 16.85, with Adam 18.80 (Table 2).
# Processes, machines and launchers: launch/run.sh. To go on after an end of any kind: the same command with --resume.
set -euo pipefail
# shellcheck source=launch/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe llama_350m llama_350m 60000 "$@"

#!/usr/bin/env bash
# LLaMA 130M as in the paper: rank 256 of 768, alpha 0.25, 20,000 steps of 131K tokens of C4 (2.6B).
#
#   bash launch/llama_130m.sh [options of examples/pretrain_llama.py]
#   LAUNCHER=torchrun bash launch/llama_130m.sh --data /data/c4/en --tokenizer /data/t5-base
#
# The paper's validation perplexity: 22.73, with Adam 25.08 (Table 2).
# Processes, machines and launchers: launch/run.sh. To go on after an end of any kind: the same command with --resume.
set -euo pipefail
# shellcheck source=launch/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe llama_130m llama_130m 20000 "$@"

#!/usr/bin/env bash
# LLaMA 1B as in the paper: rank 512 of 2048, alpha 0.0625, 100,000 steps of 131K tokens of C4 (13.1B).
#
#   bash launch/llama_1b.sh [options of examples/pretrain_llama.py]
#   LAUNCHER=torchrun bash launch/llama_1b.sh --data /data/c4/en --tokenizer /data/t5-base
#
# The paper's validation perplexity: 14.31, with Adam 15.56 (Table 2).
# Processes, machines and launchers: launch/run.sh. To go on after an end of any kind: the same command with --resume.
set -euo pipefail
# shellcheck source=launch/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe llama_1b llama_1b 100000 "$@"

# shellcheck shell=bash
# Sourced by the recipes beside it; not a command of its own.
#
#   recipe MODEL CONFIG STEPS [options]   pre-train a LLaMA of the paper on C4
#
# Common to all of them (appendix A.2): sequences of 256 tokens, 512 a step as the config says, a linear warm-up over a
# tenth of the steps, a cosine down to a tenth of the learning rate, which are the script's defaults. T5's tokenizer is the
# one that the released code takes. Options given to the recipe come last, and so win; `--preset recommended` takes the
# place of the learning rate and alpha that the config has.

recipe() {
  local model=$1 config=$2 steps=$3 repository
  shift 3
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  exec bash "$repository/launch/run.sh" "$repository/examples/pretrain_llama.py" \
    --model "$model" --deepspeed-config "$repository/ds_configs/$config.json" \
    --data c4 --tokenizer t5-base --seq-length 256 \
    --steps "$steps" --eval-every 1000 --save-every 1000 --output-dir "$repository/runs/$config" "$@"
}

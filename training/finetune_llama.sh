#!/usr/bin/env bash
# Llama 3.2 3B with adapters of rank 256 (alpha 512) on embed_tokens and lm_head, whose head
# (hidden 3072, vocabulary 128256) other trainers refuse or leave untrained.
#
#   training/finetune_llama.sh                             # one GPU
#   LAUNCH="--multi_gpu --num_processes 4" training/finetune_llama.sh
#   LAUNCH="--use_fsdp --fsdp_version 2 --num_processes 4" training/finetune_llama.sh
#   MODEL=FOLDER DATA=my.jsonl OUTPUT=out training/finetune_llama.sh --steps 100 --lr 1e-4
#
# The model's licence has to be accepted on the hub, and the data set needs `pip install datasets`; a
# folder and a .jsonl file with the fields instruction and output do without both. What is given at
# the end is handed to training.train and overrides what stands here.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC2086  # LAUNCH is several words
exec "${PYTHON:-python3}" -m accelerate.commands.launch ${LAUNCH:---num_processes 1} -m training.train \
  --model "${MODEL:-meta-llama/Llama-3.2-3B}" \
  --data "${DATA:-yahma/alpaca-cleaned}" --prompt-field instruction --field output \
  --output "${OUTPUT:-llama-3.2-3b-lora}" \
  --lora-rank 256 --lora-alpha 512 --lora-targets embed_tokens lm_head \
  --bf16 --checkpointing --length 2048 --batch 4 --accumulate 4 \
  --steps 1000 --lr 1e-4 --warmup 50 "$@"

#!/usr/bin/env bash
# Tune before serving, on one machine of a fleet, and ship the result to the others.
#
#   examples/tune_and_ship.sh fleet.json        on the one
#   adaptive-moe cache import fleet.json        on each of the others, before they serve
set -euo pipefail
file=${1:?say where the tables go, such as fleet.json}

# As `vllm serve` will ask: the same model, parallelism, batches and captured sizes.
adaptive-moe calibrate --kernel "${KERNEL:-aiter}" --for "${ENGINE:-vllm}" \
    --model "${MODEL:-deepseek-v3}" --tp "${TP:-8}" \
    --max-batched-tokens "${MAX_TOKENS:-8192}" --capture-sizes "${SIZES:-1,2,4,8,16,32,64}" \
    --budget "${BUDGET:-3}"
adaptive-moe cache export "$file"
adaptive-moe list

#!/usr/bin/env bash
# Tune before serving, on one machine of a fleet, and ship the result to the others of its kind.
#
#   examples/tune_and_ship.sh tables vllm bench latency --model MODEL --num-iters 1     on one
#   ADAPTIVE_MOE_CACHE_DIR=tables vllm serve MODEL         on the others, with a copy of the folder
#
# Any command will do that starts the engine and ends. It measures each shape of the model and keeps
# its table in the folder. A start with the same parallelism, batches and captured sizes finds it.
set -euo pipefail
export ADAPTIVE_MOE_CACHE_DIR=${1:?say which folder the tables go to, such as tables}
export ADAPTIVE_MOE_DISPATCH_POLICY=auto
shift
"$@"
adaptive-moe list
tar -czf "$ADAPTIVE_MOE_CACHE_DIR.tar.gz" -C "$(dirname "$ADAPTIVE_MOE_CACHE_DIR")" \
    "$(basename "$ADAPTIVE_MOE_CACHE_DIR")"

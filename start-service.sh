#!/usr/bin/env bash
# Start the OpenAI-compatible service (/v1/completions, /v1/chat/completions, /v1/models).
#
# Set the model and its name below; one card or several is `tensor_parallel_size`. Then:
#
#     bash start-service.sh
#     bash start-service.sh --max-num-seqs 32       # further flags win over the ones below
#     DRY_RUN=1 bash start-service.sh               # only show the command
#
# Runs on Intel GPUs, CUDA cards and CPUs alike. Too little memory: lower gpu_memory_utilization,
# max_model_len, max_num_batched_tokens or max_num_seqs, in this order.
set -euo pipefail

model=${MODEL:-demo_model}
served_model_name=${SERVED_MODEL_NAME:-demo_model}
tensor_parallel_size=${TENSOR_PARALLEL_SIZE:-1}

port=${PORT:-8000}
low_bit=${LOW_BIT:-bf16}
gpu_memory_utilization=${GPU_MEMORY_UTILIZATION:-0.9} # share of the device's memory, weights included
max_model_len=${MAX_MODEL_LEN:-2048}                  # tokens of prompt and answer together
max_num_batched_tokens=${MAX_NUM_BATCHED_TOKENS:-4096} # tokens in one step; longer prompts in chunks
max_num_seqs=${MAX_NUM_SEQS:-12}                      # requests in one step; further ones wait

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
# shellcheck source=scripts/intel_gpu.sh
source "$ROOT/scripts/intel_gpu.sh"

require_count tensor_parallel_size "$tensor_parallel_size"
require_port "$port"
cd -- "$ROOT"
NUMA_PREFIX=()
if [[ -n $(intel_gpus) ]]; then
    use_environment requirements/xpu.txt
    prepare_intel_gpus "$tensor_parallel_size"
else
    use_environment requirements.txt
fi
share_cores "$tensor_parallel_size"

launch "${NUMA_PREFIX[@]}" mpirun -np "$tensor_parallel_size" --prepend-rank python serving.py \
    --model "$model" \
    --served-model-name "$served_model_name" \
    --port "$port" \
    --low-bit "$low_bit" \
    --gpu-memory-utilization "$gpu_memory_utilization" \
    --max-model-len "$max_model_len" \
    --max-num-batched-tokens "$max_num_batched_tokens" \
    --max-num-seqs "$max_num_seqs" \
    "$@"

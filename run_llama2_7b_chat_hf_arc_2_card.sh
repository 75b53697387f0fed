#!/usr/bin/env bash
# Serve Llama-2-7b-chat-hf, sharded over two Intel Arc A770, on http://0.0.0.0:8000 .
#
# Before the first run: pip install -r requirements/xpu.txt, then put the path of the model into the
# last line, or give it as the first argument:
#
#     bash run_llama2_7b_chat_hf_arc_2_card.sh /path/to/Llama-2-7b-chat-hf
#     NUM_GPUS=4 bash run_llama2_7b_chat_hf_arc_2_card.sh MODEL --low-bit fp8   # further flags at the end
#     DRY_RUN=1 bash run_llama2_7b_chat_hf_arc_2_card.sh MODEL                  # only show the command
#
# The port, and to avoid running out of GPU memory --max-num-seqs and --max-num-batched-tokens, are
# in the last line too.
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
# shellcheck source=scripts/intel_gpu.sh
source "$ROOT/scripts/intel_gpu.sh"

NUM_GPUS=${NUM_GPUS:-2}

require_count NUM_GPUS "$NUM_GPUS"
MODEL=
if (($# > 0)) && [[ $1 != -* ]]; then
    MODEL=$1
    shift
fi
use_environment requirements/xpu.txt
prepare_intel_gpus "$NUM_GPUS"
share_cores "$NUM_GPUS"
cd -- "$ROOT"

launch "${NUMA_PREFIX[@]}" mpirun -np "$NUM_GPUS" --prepend-rank python serving.py --device xpu --repo-id-or-model-path "${MODEL:-YOUR_REPO_ID_OR_MODEL_PATH}" --low-bit sym_int4 --port 8000 --max-num-seqs 8 --max-num-batched-tokens 4096 "$@"

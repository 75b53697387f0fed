#!/usr/bin/env bash
# start-service.sh under the name that the vLLM guide gives it. Set the model and its name here:
model=${MODEL:-/llm/demo_model}
served_model_name=${SERVED_MODEL_NAME:-demo_model}

echo "start-vllm-service.sh is a link to start-service.sh, which has the other settings" >&2
export MODEL=$model SERVED_MODEL_NAME=$served_model_name
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/start-service.sh" "$@"

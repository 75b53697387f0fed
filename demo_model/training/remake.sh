#!/usr/bin/env bash
# Remakes the demo model: WordNet -> tokenizer and corpus -> training -> export -> evaluation.
#
#   bash demo_model/training/remake.sh [folder]     (default: demo_model itself)
#
# Needs the Debian package wordnet-base, one or more CUDA GPUs, and Python with torch,
# transformers, tokenizers, safetensors and numpy. MINUTES sets the length of the training,
# WORDNET and CORPUS where the database lies and where the training data goes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$(dirname "$here")}
corpus=${CORPUS:-$(mktemp -d)/corpus.npz}
gpus=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')

python3 "$here/make_corpus.py" --wordnet "${WORDNET:-/usr/share/wordnet}" \
    --model "$model" --corpus "$corpus"
python3 -m torch.distributed.run --nproc-per-node "$gpus" "$here/train.py" \
    --corpus "$corpus" --model "$model" --minutes "${MINUTES:-9}"
python3 "$here/evaluate.py" --model "$model"

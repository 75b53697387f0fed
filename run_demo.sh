#!/usr/bin/env bash
# Start the server with the embedded model, sharded over two processes (or one for each memory node,
# where there are several), on http://127.0.0.1:8000 .
#
#     bash run_demo.sh                                  # the first time also installs everything
#     NUM_RANKS=1 PORT=9000 bash run_demo.sh            # one process, another port
#     bash run_demo.sh --max-num-seqs 16                # further flags go to serving.py
#
# Environment: NUM_RANKS (2, or the number of memory nodes), PORT (8000), OMP_NUM_THREADS (cores / ranks), VENV (.venv),
# PYTHON (python3), TORCH_INDEX_URL (where torch comes from), DRY_RUN=1 (print the last command only).
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"

nodes=$(numa_nodes)
NUM_RANKS=${NUM_RANKS:-$((nodes > 2 ? nodes : 2))}
PORT=${PORT:-8000}
require_count NUM_RANKS "$NUM_RANKS"
require_port "$PORT"

cd -- "$ROOT"
[[ -f demo_model/config.json ]] ||
    die "demo_model/ is not complete: clone the repository again, or remake it as demo_model/README.md says"
setup_venv requirements.txt
check_compiler
share_cores "$NUM_RANKS"

# 8 bits rather than the server's default of 4: this small model knows less than half with those, and
# with 8 as much as with 16 (docs/low_bit.md).
launch mpirun -np "$NUM_RANKS" --prepend-rank \
    python serving.py --repo-id-or-model-path demo_model --low-bit sym_int8 --port "$PORT" "$@"

#!/usr/bin/env bash
# Serve one model that is sharded over several machines. Start it on the machine that is to answer HTTP.
#
#     bash scripts/run_multi_host.sh HOSTS MODEL [further flags of serving.py]
#     DRY_RUN=1 bash scripts/run_multi_host.sh HOSTS MODEL      # only show the command
#
# HOSTS is a file with one line a machine, its name and the number of its ranks (cards, or memory
# nodes of a CPU), this machine first:
#
#     alpha:2
#     beta:2
#
# Each machine needs: this folder and the environment in VENV at the same paths as here; a name that
# all others resolve to its address in /etc/hosts or DNS (its own must not be 127.0.1.1); an sshd
# that lets this user in from here without a password; all ports open among the machines.
#
# The model may lie elsewhere on each machine: leave MODEL out and give `--config FILE` instead, a
# file that says `model: /where/it/is` on each. docs/deploy.md tells all this at more length.
#
# Environment: VENV (.venv), OMP_NUM_THREADS (this machine's cores / its ranks, the same everywhere),
# GLOO_SOCKET_IFNAME and HYDRA_IFACE (the network interface, as eth0, where there are several),
# DRY_RUN=1. All of it is handed on to the other machines.
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
# shellcheck source=scripts/intel_gpu.sh
source "$ROOT/scripts/intel_gpu.sh"

HOSTS=${1:-}
[[ -n $HOSTS ]] || die "no host file named: bash scripts/run_multi_host.sh HOSTS MODEL"
[[ -r $HOSTS ]] || die "$HOSTS cannot be read: name a file with lines of the form host:ranks"
HOSTS=$(realpath -- "$HOSTS")
shift
MODEL=()
if (($# > 0)) && [[ $1 != -* ]]; then
    MODEL=(--repo-id-or-model-path "$1")
    shift
fi

# Names and ranks of the machines; comments and empty lines are skipped, as mpirun does.
NAMES=()
NUM_RANKS=0
LOCAL_RANKS=0
while IFS=: read -r name ranks || [[ -n $name ]]; do
    name=${name%%#*}
    name=${name//[[:space:]]/}
    if [[ -z $name ]]; then continue; fi
    ranks=${ranks%%#*}
    ranks=${ranks//[[:space:]]/}
    require_count "the number of ranks of $name in $HOSTS" "${ranks:-1}"
    NAMES+=("$name")
    NUM_RANKS=$((NUM_RANKS + ${ranks:-1}))
    if ((LOCAL_RANKS == 0)); then LOCAL_RANKS=${ranks:-1}; fi # this machine comes first
done <"$HOSTS"
((NUM_RANKS > 0)) || die "$HOSTS names no machine: write lines of the form host:ranks"

cd -- "$ROOT"
NUMA_PREFIX=()
if [[ -n $(intel_gpus) ]]; then
    use_environment requirements/xpu.txt
    # Shared memory does not reach other machines. With InfiniBand or RoCE: FI_PROVIDER=verbs.
    export FI_PROVIDER=${FI_PROVIDER:-tcp} CCL_ATL_SHM=${CCL_ATL_SHM:-0}
    prepare_intel_gpus "$LOCAL_RANKS"
else
    use_environment requirements.txt
fi
share_cores "$LOCAL_RANKS"

# An ssh whose other side has fallen silent ends after 20 s rather than 15 minutes; the ranks know
# after 15 s.
SSH_OPTIONS=(-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=4)
export HYDRA_LAUNCHER_EXTRA_ARGS=${HYDRA_LAUNCHER_EXTRA_ARGS:-${SSH_OPTIONS[*]}}

# What a rank needs, asked of each other machine now rather than found out after minutes of loading.
PYTHON_PATH=$(command -v python || true)
for name in "${NAMES[@]:1}"; do
    say "asking $name whether it is ready"
    if [[ ${DRY_RUN:-0} == 1 ]]; then continue; fi
    problem=$(ssh "${SSH_OPTIONS[@]}" -o ConnectTimeout=10 "$name" \
        "test -x '$PYTHON_PATH' || echo 'there is no $PYTHON_PATH'; test -e '$ROOT/serving.py' || echo 'there is no $ROOT/serving.py'" 2>&1) ||
        die "ssh $name does not work (${problem##*$'\n'}): let $(id -un) in with a key, and try 'ssh $name true'"
    [[ -z $problem ]] || die "on $name: ${problem//$'\n'/, }: put this folder and its environment at the same paths on every machine"
done

LAUNCHER=$(mpirun --version 2>/dev/null || true)
if [[ $LAUNCHER == *"Open MPI"* ]]; then
    die "this mpirun is Open MPI's, which has other flags: see docs/deploy.md, or use the one of requirements.txt"
fi

launch "${NUMA_PREFIX[@]}" mpirun -f "$HOSTS" -np "$NUM_RANKS" --prepend-rank "${PYTHON_PATH:-python}" serving.py \
    "${MODEL[@]}" "$@"

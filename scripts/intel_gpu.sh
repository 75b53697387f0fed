# shellcheck shell=bash
# The environment of the Intel GPU stack: oneAPI, tcmalloc, oneCCL, memory nodes. Sourced by launch
# scripts after common.sh. Each missing piece is one line that says how to get it.
#
# Every variable set here keeps a value that you exported before. Written from the projects'
# documentation; no Intel GPU was at hand to try it on.

SYS=${SYS:-/sys}            # tests point it at a made-up machine
INTEL_VENDOR_ID=0x8086

# One sysfs folder per Intel GPU that has a render node.
intel_gpus() {
    local device
    for device in "$SYS"/class/drm/renderD*/device; do
        if [[ -r $device/vendor && $(<"$device/vendor") == "$INTEL_VENDOR_ID" ]]; then
            printf '%s\n' "$device"
        fi
    done
}

# Warn when fewer than $1 Intel GPUs can be seen or used.
check_intel_gpus() {
    local wanted=$1 found device
    found=$(intel_gpus | wc -l)
    if ((found < wanted)); then
        warn "$found Intel GPU(s) found, $wanted wanted: check the driver (sycl-ls), in a container --device=/dev/dri, or ask for fewer"
        return
    fi
    for device in /dev/dri/renderD*; do
        if [[ -e $device && ! -r $device ]]; then
            warn "$device cannot be opened: sudo usermod -aG render $(id -un), then log in again"
            return
        fi
    done
}

# Source oneAPI's setvars.sh where it is installed. SETVARS names another one, or none.
source_oneapi() {
    local setvars=${SETVARS:-${ONEAPI_ROOT:-/opt/intel/oneapi}/setvars.sh}
    if [[ $setvars == none || -n ${SETVARS_COMPLETED:-} ]]; then return; fi
    if [[ ! -f $setvars ]]; then
        warn "oneAPI is not at $setvars: not needed with the wheels of requirements/xpu.txt, which bring its runtimes; ipex-llm needs it (apt-get install intel-oneapi-base-toolkit, or set ONEAPI_ROOT)"
        return
    fi
    local python
    python=$(command -v python || true)
    say "sourcing $setvars (SETVARS=none leaves it out, should its libraries clash with torch's)"
    set +eu # setvars.sh reads unset variables and lets commands fail
    # shellcheck disable=SC1090
    source "$setvars" >/dev/null
    set -eu
    # Some toolkits put a Python of their own in front of the environment's.
    if [[ -n $python && $(command -v python) != "$python" ]]; then PATH=${python%/*}:$PATH; fi
}

# Preload tcmalloc: many short-lived host allocations per step go faster.
preload_tcmalloc() {
    local folder name
    for folder in "${CONDA_PREFIX:-/nowhere}/lib" /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/local/lib; do
        for name in libtcmalloc.so libtcmalloc.so.4 libtcmalloc_minimal.so.4; do
            if [[ -e $folder/$name ]]; then
                export LD_PRELOAD=$folder/$name${LD_PRELOAD:+:$LD_PRELOAD}
                say "preloading $folder/$name"
                return
            fi
        done
    done
    warn "tcmalloc is not installed: apt-get install libtcmalloc-minimal4, or conda install -c conda-forge gperftools"
}

# What the collectives and the SYCL runtime are told.
intel_gpu_variables() {
    # Compiled kernels are kept on disk: the second start skips their compilation.
    export SYCL_CACHE_PERSISTENT=${SYCL_CACHE_PERSISTENT:-1}
    # oneCCL between ranks of one host: libfabric over shared memory. GPU buffers are handed over
    # through sockets, because the default (pidfd) needs ptrace rights that containers do not have.
    export CCL_ATL_TRANSPORT=${CCL_ATL_TRANSPORT:-ofi}
    export CCL_ATL_SHM=${CCL_ATL_SHM:-1}
    export FI_PROVIDER=${FI_PROVIDER:-shm}
    export CCL_ZE_IPC_EXCHANGE=${CCL_ZE_IPC_EXCHANGE:-sockets}
    # Where the ranks meet.
    export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    # Left alone on purpose: USE_XETLA, TORCH_LLM_ALLREDUCE, CCL_WORKER_COUNT and
    # SYCL_PI_LEVEL_ZERO_USE_IMMEDIATE_COMMANDLISTS belong to the ipex-llm stack of torch 2.1 to
    # 2.6; CCL_TOPO_P2P_ACCESS (1 or 0) says whether cards reach each other over PCIe. Export them
    # and they reach every rank.
}

# shellcheck disable=SC2034 # NUMA_PREFIX is read by the scripts that source this file
# Fill the array NUMA_PREFIX: all GPUs on one memory node of several keep the ranks there.
numa_prefix() {
    local nodes
    NUMA_PREFIX=()
    if (($(numa_nodes) < 2)); then return; fi
    nodes=$(while read -r device; do cat "$device/numa_node" 2>/dev/null; done < <(intel_gpus) | sort -u)
    if [[ ! $nodes =~ ^[0-9]+$ ]]; then return; fi
    if ! command -v numactl >/dev/null; then
        warn "the GPUs sit on memory node $nodes, but numactl is missing: apt-get install numactl"
        return
    fi
    say "the GPUs sit on memory node $nodes: the ranks run there"
    NUMA_PREFIX=(numactl "--cpunodebind=$nodes" "--preferred=$nodes")
}

# All of the above for $1 GPUs.
prepare_intel_gpus() {
    check_intel_gpus "$1"
    source_oneapi
    preload_tcmalloc
    intel_gpu_variables
    numa_prefix
}

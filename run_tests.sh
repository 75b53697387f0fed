#!/usr/bin/env bash
# Set everything up and run every test.
#
#     bash run_tests.sh                           # all tests
#     bash run_tests.sh tests/scripts -k demo     # anything further goes to pytest
#     bash run_tests.sh --clients                 # the clients of docs/clients.md, from environments of
#                                                 # their own (5 GB; npm where it is)
#     bash run_tests.sh --ipex-llm                # the core of them beside ipex-llm 2.2.0, which needs
#                                                 # transformers 4.53, from an environment of its own
#     bash run_tests.sh --deploy                  # docker/ and deploy/, with their checkers; makes
#                                                 # the cpu image (root, ten minutes, 3 GB)
#     bash run_tests.sh --ray                     # deploy/ray on a cluster of two nodes made here, from
#                                                 # an environment of its own (15 minutes)
#     bash run_tests.sh --xpu-compile             # every Triton kernel compiled for Intel cards that
#                                                 # need not be here, from an environment of its own
#
# Environment: VENV (.venv), CLIENTS_VENV (.venv-clients), IPEX_LLM_VENV (.venv-ipex-llm),
# DEPLOY_VENV (.venv-deploy), RAY_VENV (.venv-ray), XPU_COMPILE_VENV (.venv-xpu-compile),
# PYTHON (python3), TEST_TIMEOUT (seconds a test may take, 600).
set -euo pipefail
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
cd -- "$ROOT"

# Intel's Triton beside torch for the CPU, Intel's compiler from Debian; no driver, no card.
if [[ ${1:-} == --xpu-compile ]]; then
    shift
    ensure_apt ocloc intel-opencl-icd
    if [[ ! -e /usr/include/level_zero/ze_api.h ]]; then ensure_apt ze_api.h libze-dev; fi
    command -v ocloc >/dev/null || die "ocloc is missing: apt-get install intel-opencl-icd"
    VENV=${XPU_COMPILE_VENV:-$ROOT/.venv-xpu-compile}
    setup_venv requirements/xpu-compile.txt
    # Triton builds a small C++ helper and links it as C unless told otherwise.
    CC=g++ CXX=g++ exec python scripts/xpu_compile.py "$@"
fi

job="tests"
CLIENT_PYTHONS=()
if [[ ${1:-} == --ipex-llm ]]; then
    shift
    job="tests with ipex-llm"
    VENV=${IPEX_LLM_VENV:-$ROOT/.venv-ipex-llm}
    setup_venv requirements/ipex-llm.txt requirements/dev.txt
    # What depends on transformers 4 or on the provider: formats, layers, checkpoints, tokenizers,
    # sharding at two ranks. Kernels, scheduling and the API are the same there. Paths among the
    # arguments take the place of these.
    core=(tests/low_bit/test_formats.py tests/low_bit/test_golden.py tests/kernels/test_ipex_llm.py
        tests/layers tests/memory/test_known_shapes.py)
    for name in checkpoint families fused_layers gguf_tokenizer ipex_llm_folders leftovers lengths \
        llm_logprobs llm_tool_calls producers quantized quantized_refusals save self_check; do
        core+=("tests/model/test_$name.py")
    done
    for name in chat_history detokenizer template_variables tokenizer; do
        core+=("tests/engine/test_$name.py")
    done
    core+=(tests/ranks/test_ipex_llm.py
        "tests/ranks/test_equality.py::test_tokens_equal_those_of_transformers[2]")
    for name in llama llama-rope-dynamic qwen2-window gemma2 phi3 gpt-neox mixtral qwen2-moe; do
        core+=("tests/ranks/test_families.py::test_tokens_equal_those_of_transformers[$name]"
            "tests/ranks/test_families.py::test_low_bit_tokens_are_those_of_one_rank[$name]")
    done
    for word in "$@"; do
        if [[ -e ${word%%::*} ]]; then core=(); fi
    done
    set -- "${core[@]}" "$@"
else
    setup_venv requirements.txt requirements/dev.txt
    for tool in wrk jq curl openssl chromium; do ensure_apt "$tool" "$tool"; done
    ensure_apt chromedriver chromium-driver
    # The test of two hosts needs an ssh server; where systemd runs, installing one would start it.
    if [[ ! -d /run/systemd/system ]]; then
        ensure_apt ip iproute2
        ensure_apt sshd openssh-server
    fi
fi
check_compiler
if [[ ${1:-} == --clients ]]; then
    shift
    job="tests of clients"
    export SERVER_PYTHON=$VENV/bin/python
    VENV=${CLIENTS_VENV:-$ROOT/.venv-clients}
    if command -v npm >/dev/null; then
        export NODE_CLIENTS=$VENV-node
        mkdir -p "$NODE_CLIENTS"
        cp tests/clients/node/* "$NODE_CLIENTS"
        say "installing tests/clients/node/package.json"
        npm install --prefix "$NODE_CLIENTS" --no-audit --no-fund --loglevel=error >&2 ||
            die "npm could not install the clients: see its message above"
    else
        warn "npm is missing: its clients are left out (apt-get install npm)"
    fi
    # Each environment runs what it has; the rest is skipped there.
    clients_venv=$VENV
    for kind in aider older proxy webui; do
        VENV=$clients_venv-$kind
        if (setup_venv "requirements/clients-$kind.txt"); then
            CLIENT_PYTHONS+=("$VENV/bin/python")
        else
            warn "requirements/clients-$kind.txt could not be installed: its clients are left out"
        fi
    done
    VENV=$clients_venv
    setup_venv requirements/clients.txt
    set -- tests/clients "$@"
elif [[ ${1:-} == --ray ]]; then
    shift
    job="tests with ray"
    export SERVER_PYTHON=$VENV/bin/python
    VENV=${RAY_VENV:-$ROOT/.venv-ray}
    setup_venv tests/deploy/requirements-ray.txt
    TEST_TIMEOUT=${TEST_TIMEOUT:-3600}
    set -- tests/deploy/test_ray.py -s "$@"
elif [[ ${1:-} == --deploy ]]; then
    shift
    job="tests of deployment"
    for tool in debootstrap haproxy; do ensure_apt "$tool" "$tool"; done
    ensure_apt nginx nginx-light
    (VENV=${DEPLOY_VENV:-$ROOT/.venv-deploy}; setup_venv tests/deploy/requirements.txt)
    PATH=$PATH:${DEPLOY_VENV:-$ROOT/.venv-deploy}/bin
    export TEST_IMAGE=1
    TEST_TIMEOUT=${TEST_TIMEOUT:-3600}
    set -- tests/deploy "$@"
fi

# Tests use the embedded model and models that they make: nothing is fetched from a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

# Run one job of the suite: its name, then the command. The first failure ends the run.
run_job() {
    local name=$1 start=$SECONDS status=0
    shift
    say "$name: $(printf '%q ' "$@")"
    "$@" || status=$?
    if ((status == 5)); then warn "$name: pytest found no test at all, which counts as a failure"; fi
    if ((status != 0)); then
        warn "$name: FAILED (exit code $status) after $((SECONDS - start)) s"
        exit "$status"
    fi
    say "$name: passed in $((SECONDS - start)) s"
}

for client_python in "${CLIENT_PYTHONS[@]}"; do
    run_job "$job, ${client_python%/bin/python}" "$client_python" -m pytest \
        --timeout="${TEST_TIMEOUT:-600}" -p no:cacheprovider tests/clients/test_libraries.py \
        tests/clients/test_commands.py tests/clients/test_litellm_proxy.py \
        tests/clients/test_open_webui.py \
        -k "aider or instructor or llama_index or crewai or proxy or webui"
done
run_job "$job" python -m pytest --timeout="${TEST_TIMEOUT:-600}" --durations=10 "$@"

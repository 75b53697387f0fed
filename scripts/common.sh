# shellcheck shell=bash
# What the launch scripts share: narration, the virtual environment, cores shared out to the ranks.
# Sourced by them, never run; expects ROOT, the folder of the repository.

VENV=${VENV:-$ROOT/.venv}

say() { printf '==> %s\n' "$*" >&2; }
warn() { printf 'WARNING: %s\n' "$*" >&2; }

# One line, cause and cure; 2 is the exit code of everything that cannot start.
die() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 2
}

# Stop unless $2 is a whole number of at least 1; $1 is its name for the reader.
require_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 must be a whole number of at least 1, not '$2'"
}

# Stop unless $1 is a port that can be listened at.
require_port() {
    if ! [[ $1 =~ ^[0-9]{1,5}$ ]] || ((10#$1 > 65535)); then
        die "PORT must be a number from 0 to 65535, not '$1'"
    fi
}

# Cores this process may use: the smallest of affinity, physical cores and the container's quota.
usable_cores() {
    local cores physical quota period
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    physical=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l) || physical=0
    if ((physical > 0 && physical < cores)); then cores=$physical; fi
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
        quota=$((quota / period))
        if ((quota > 0 && quota < cores)); then cores=$quota; fi
    fi
    echo "$cores"
}

# Give each of $1 ranks its share of the cores; one alone looks which are idle when it starts.
# OMP_NUM_THREADS set by the caller wins.
share_cores() {
    local ranks=$1 cores
    cores=$(usable_cores)
    if [[ -z ${OMP_NUM_THREADS:-} ]] && ((ranks > 1)); then
        export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
    fi
    # Where torch runs on Intel's OpenMP runtime: threads sleep soon after a parallel region (the
    # event loop and the engine need the core between steps), and with several ranks they are not
    # pinned, or every rank would take the same first cores.
    export KMP_BLOCKTIME=${KMP_BLOCKTIME:-1}
    if ((ranks > 1)); then export KMP_AFFINITY=${KMP_AFFINITY:-disabled}; fi
    say "$ranks rank(s), ${OMP_NUM_THREADS:-up to $cores} thread(s) each, on $cores core(s)"
}

# Show the last command of a script and become it; with DRY_RUN=1 only show it.
launch() {
    local word
    say "$(printf '%q ' "$@")"
    if [[ ${DRY_RUN:-0} == 1 ]]; then exit 0; fi
    for word in "$@"; do
        if [[ $word == YOUR_REPO_ID_OR_MODEL_PATH ]]; then
            die "no model named: put its path into the last line of $0, or give it as the first argument"
        fi
    done
    command -v mpirun >/dev/null || die "mpirun is missing: install the requirements first (see README.md)"
    # A container that starts as root for the sake of its cards (docker/as-llm) does not serve as root.
    if ((EUID == 0)) && [[ -n ${SERVICE_USER_COMMAND:-} ]]; then set -- "$SERVICE_USER_COMMAND" "$@"; fi
    export PYTHONUNBUFFERED=1 # lines reach the terminal as they are written, also through mpirun
    exec "$@"
}

numa_nodes() { lscpu -p=NODE 2>/dev/null | grep -v '^#' | sort -u | grep -c . || true; }

# Find a Python of 3.10 or later that can make environments; PYTHON names another one.
find_python() {
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" >/dev/null || die "$PYTHON is not there: apt-get install python3 python3-venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$PYTHON" -V) is too old: install Python 3.10 or later and name it, PYTHON=python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null && return
    ensure_apt ensurepip python3-venv
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$PYTHON cannot make virtual environments: apt-get install python3-venv"
}

# Where torch comes from: TORCH_INDEX_URL if given; PyTorch's CPU index when there is no NVIDIA card
# and the index can be reached; else pip's own configuration decides.
torch_index() {
    local cpu_index=https://download.pytorch.org/whl/cpu
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        echo "$TORCH_INDEX_URL"
    elif ! command -v nvidia-smi >/dev/null && "$VENV/bin/python" - "$cpu_index/torch/" <<'PY' 2>/dev/null; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5)
PY
        echo "$cpu_index"
    fi
}

# Install the given requirement files into $VENV, one after the other; nothing to do for one that has
# not changed since the last time. Then the environment is the one in use.
setup_venv() {
    local file
    mkdir -p "$VENV"
    exec 9>"$VENV/.lock"
    flock 9 # two scripts started at once install one after the other
    find_python
    if [[ ! -x $VENV/bin/python ]]; then
        say "making a virtual environment in $VENV with $("$PYTHON" -V)"
        "$PYTHON" -m venv "$VENV" || die "could not make $VENV: is there room on the disk?"
    fi
    for file in "$@"; do install_requirements "$file" "$1"; done
    exec 9>&-
    export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
}

# Install the requirement file $1 beside what $2 pins: torch first, then DeepSpeed, after which
# native code is compiled while pip goes on.
install_requirements() {
    local stamp_file key index torch others
    stamp_file=$VENV/.installed-${1##*/}
    key=$({ "$VENV/bin/python" -V && cat -- "$1"; } | sha256sum)
    if [[ -f $stamp_file && $(<"$stamp_file") == "$key" ]]; then return; fi
    require_pip
    torch=$(grep -m1 '^torch==' -- "$1" || true)
    mapfile -t others < <(grep -oE '^(deepspeed|ninja)==[^ ]+' -- "$1" || true)
    if [[ -n $torch ]] && ! pip_has "$torch"; then
        index=$(torch_index)
        pip_install "$torch from ${index:-the configured package index}" \
            ${index:+--index-url "$index"} "$torch"
        if ((${#others[@]} == 2)); then
            pip_install "${others[*]}" "${others[@]}" -c "$1"
            compile_early
        fi
    fi
    pip_install "${1#"$ROOT"/}" -r "$1" -c "$2"
    printf '%s\n' "$key" >"$stamp_file"
}

# Start to compile what a server on CPUs needs, in the demo's weight format; a server that comes
# before this is done waits for it.
compile_early() {
    if ! has_compiler || command -v nvidia-smi >/dev/null; then return; fi
    say "compiling native code meanwhile (its log: $VENV/.compile.log)"
    (cd -- "$ROOT" && PATH=$VENV/bin:$PATH exec python -m scripts.compile_native sym_int8) \
        </dev/null >"$VENV/.compile.log" 2>&1 9>&- &
}

# Use the environment that the caller is in, else $VENV; $1 names what belongs into it.
use_environment() {
    local missing
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $VENV/bin/python ]]; then
        export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
    fi
    missing=$(python - 2>/dev/null <<'PY'
from importlib.util import find_spec
print(*[name for name in ("torch", "transformers", "deepspeed", "mpi4py", "fastapi") if not find_spec(name)])
PY
    ) || missing=python
    if [[ -n $missing ]]; then
        warn "missing from this environment: $missing (pip install -r $1)"
        if [[ ${DRY_RUN:-0} != 1 ]]; then exit 2; fi
    fi
}

pip_has() { "$VENV/bin/python" -m pip freeze 2>/dev/null | grep -qE "^${1}(\+|$)"; }

# Wheels of today need a pip that knows their platform tags.
require_pip() {
    local version
    version=$("$VENV/bin/python" -m pip --version 2>/dev/null | cut -d' ' -f2)
    if [[ ${version%%.*} =~ ^[0-9]+$ ]] && ((${version%%.*} >= 22)); then return; fi
    pip_install "a newer pip, since ${version:-the one there} is too old" 'pip>=22'
}

# pip_install WHAT ARGUMENTS...: run pip with the arguments, and tell of WHAT at least each 3 s.
pip_install() {
    local what=$1 log=$VENV/.pip.log teller status=0 started=$SECONDS
    shift
    say "installing $what"
    : >"$log"
    tell_progress "$log" "$started" 9>&- &
    teller=$!
    # Modules are compiled when they are first imported; most never are.
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install --no-compile \
        --progress-bar off "$@" >"$log" 2>&1 9>&- || status=$?
    kill "$teller" 2>/dev/null || true
    wait "$teller" 2>/dev/null || true
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    if ((status == 0)); then return; fi
    grep -v 'is ignored: it is neither a file nor a directory' "$log" | tail -n 12 >&2 || true
    die "pip could not install the requirements: see its message above, mend that, start again"
}

# Say each 3 s what pip (whose log is $1, since second $2) is at, in one line that is written over on
# a terminal; until this script ends.
tell_progress() {
    local line
    while sleep 3 && kill -0 $$ 2>/dev/null; do
        line=$(grep -E '^ *(Collecting|Downloading|Building|Installing|Using cached)' "$1" | tail -n1 | cut -c1-70) || true
        line=${line:-starting pip}
        line="    ${line#"${line%%[! ]*}"}, $((SECONDS - $2)) s"
        if [[ -t 2 ]]; then printf '\r\033[K%s' "$line" >&2; else printf '%s\n' "$line" >&2; fi
    done
}

has_compiler() { command -v g++ >/dev/null || command -v clang++ >/dev/null; }

# Without a C++ compiler everything works, only slower.
check_compiler() {
    has_compiler ||
        warn "no C++ compiler: ranks fall back to Gloo, about 100 times slower for small messages (apt-get install g++)"
}

# ensure_apt COMMAND PACKAGE: install a system package when its command is missing and we may.
ensure_apt() {
    command -v "$1" >/dev/null && return
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        warn "$1 is missing: sudo apt-get install $2"
        return
    fi
    say "installing $2 with apt-get"
    { apt-get install -y -qq "$2" || { apt-get update -qq && apt-get install -y -qq "$2"; }; } \
        >/dev/null 2>&1 </dev/null || warn "$1 is missing and apt-get could not install $2"
}

# Makes and activates the Python environment. Sourced, not run:
#
#     source env.sh
#
# The first time it finds (or installs) CPython 3.10, the newest that oneflow 0.9.0 supports, makes .venv beside this
# file and installs requirements.txt into it, about 5 GB. Ours carries .venv/made_by_env.sh, a complete one .venv/ready,
# the digest of its requirements; where that is another one, it is made anew. Everything is in functions,
# so that a shell that sources this file keeps its options and goes on when something fails.

[ -n "${BASH_VERSION-}" ] || { echo "env.sh: source it from bash" >&2 && return 1; }

unet_say() { echo "env.sh: $*" >&2; }

# Prints the path of a CPython 3.10 that starts and can make environments. A name on PATH proves nothing: pyenv's shims
# refuse versions that are not selected.
unet_find_python() {
    local candidate
    {
        type -aP python3.10 python3 python
        ls -d "$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-${HOME-}/.pyenv}")"/versions/3.10.*/bin/python3.10
        command -v uv >/dev/null && uv python find --system --no-python-downloads 3.10
    } 2>/dev/null | while read -r candidate; do
        "$candidate" -c 'import ensurepip, ssl, sys, venv
sys.exit(sys.version_info[:2] != (3, 10) or sys.implementation.name != "cpython")' 2>/dev/null || continue
        echo "$candidate" && break
    done
}

# Installs CPython 3.10 with uv, itself fetched into a scratch folder where it is missing, and prints its path.
unet_install_python() {
    local uv scratch
    uv=$(command -v uv)
    scratch=$(mktemp -d)
    if [ -z "$uv" ]; then
        python3 -m pip install --quiet --target "$scratch" uv 2>/dev/null
        uv=$scratch/bin/uv
    fi
    "$uv" python install 3.10 >/dev/null 2>&1 && "$uv" python find --system --no-python-downloads 3.10
    rm -rf "$scratch"
}

# Prints the OpenBLAS kernels that multiply matrices fastest here, in OneFlow and NumPy together. OneFlow's old OpenBLAS
# doesn't know recent CPUs and would fall back to slow ones; kernels that the CPU lacks kill the process.
unet_measure_blas() {
    local core
    for core in "" Haswell SkylakeX; do
        env -u OPENBLAS_CORETYPE ${core:+OPENBLAS_CORETYPE=$core} .venv/bin/python -c 'if True:
            import sys, timeit, numpy, oneflow
            a = numpy.ones((1024, 1024), numpy.float32)
            x = oneflow.tensor(a)
            print(sum(min(timeit.repeat(f, number=1)) for f in (lambda: a @ a, lambda: (x @ x).numpy())), *sys.argv[1:])
        ' "$core"
    done 2>/dev/null | sort -g | head -n 1 | cut -d ' ' -f 2
}

unet_make() {
    local python error
    if [ -e .venv ] && [ ! -e .venv/made_by_env.sh ] && [ ! -e .venv/ready ]; then
        unet_say "$PWD/.venv was not made by this file: move it away, then run this again" && return 1
    fi
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        unet_say "oneflow 0.9.0 exists for Linux on x86-64 only, this is $(uname -sm)" && return 1
    fi
    python=$(unet_find_python)
    if [ -z "$python" ]; then
        unet_say "no CPython 3.10 found, installing one with uv"
        python=$(unet_install_python)
    fi
    if [ -z "$python" ]; then
        unet_say "can't find or fetch CPython 3.10: install it (python3.10, python3.10-venv), then run this again" && return 1
    fi
    unet_say "making .venv with $python ($("$python" --version)), a few minutes and 5 GB"
    rm -rf .venv
    mkdir .venv && : >.venv/made_by_env.sh
    if ! "$python" -m venv .venv || ! .venv/bin/python -m pip install \
        --disable-pip-version-check --no-deps --require-hashes -r requirements.txt >&2; then
        unet_say "making .venv failed, see above (network? disk space?), then run this again" && return 1
    fi
    # A notebook's MPLBACKEND is not installed here.
    if ! error=$(env -u MPLBACKEND .venv/bin/python -c \
        'import oneflow, cv2, safetensors, matplotlib, skimage.segmentation' 2>&1); then
        unet_say "the installed packages can't be imported: ${error##*$'\n'}" && return 1
    fi
    unet_measure_blas >.venv/blas
    unet_requirements >.venv/ready
}

unet_requirements() { sha256sum <requirements.txt; }

# The second test: its interpreter may have been removed.
unet_ready() { [ "$(cat .venv/ready 2>/dev/null)" = "$(unet_requirements)" ] && .venv/bin/python -c '' 2>/dev/null; }

unet_env() {
    local before=$PWD failed=0
    cd "$(dirname "${BASH_SOURCE[0]}")" || return
    # One at a time: a second shell waits, then finds the environment ready.
    unet_ready || { flock 9 && { unet_ready || unet_make; }; } 9>.venv.lock || failed=1
    if [ $failed = 0 ]; then
        # As bin/activate does, but that breaks when the folder is moved.
        export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
        export GLOG_minloglevel=2 # no warnings
        [ -e /dev/nvidia0 ] || GLOG_minloglevel=3 # nor errors about a missing CUDA driver
        local blas=${OPENBLAS_CORETYPE:-$(cat .venv/blas)}
        [ -z "$blas" ] || export OPENBLAS_CORETYPE=$blas
    fi
    cd "$before" || return
    return $failed
}

unet_env

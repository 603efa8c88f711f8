# Makes and activates the Python environment. Sourced, not run:
#
#     source env.sh
#
# The first time it finds (or installs) CPython 3.10, the newest that oneflow 0.9.0 supports, makes .venv beside this
# file and installs requirements.txt into it, about 5 GB. An environment of ours has .venv/ready, the digest of its
# requirements, empty until it is complete; where that is another one, it is made anew. Everything is in functions, so
# that a shell that sources this file keeps its options and goes on when something fails.

[ -n "${BASH_VERSION-}" ] || { echo "env.sh: source it from bash" >&2 && return 1; }

# Prints a message, and fails.
unet_say() { ! echo "env.sh: $*" >&2; }

# Prints the path of a CPython 3.10 that starts and can make environments. A name on PATH proves nothing: pyenv's shims
# refuse versions that are not selected.
unet_find_python() {
    local candidate
    {
        type -aP python3.10 python3 python
        ls -d "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/3.10.*/bin/python3.10
    } 2>/dev/null | while read -r candidate; do
        "$candidate" -c 'import ensurepip, ssl, sys, venv
sys.exit(sys.version_info[:2] != (3, 10) or sys.implementation.name != "cpython")' 2>/dev/null || continue
        echo "$candidate" && break
    done
}

# Prints the path of uv's CPython 3.10, which uv installs where it has none. A missing uv is fetched for that alone.
unet_ask_uv() {
    local uv scratch
    scratch=$(mktemp -d)
    uv=$(command -v uv) || uv=$scratch/bin/uv
    [ -x "$uv" ] || python3 -m pip install --quiet --target "$scratch" uv
    "$uv" python install 3.10 >/dev/null
    "$uv" python find --system --no-python-downloads 3.10
    rm -rf "$scratch"
}

unet_make() {
    local python
    [ ! -e .venv ] || [ -e .venv/ready ] ||
        unet_say "$PWD/.venv was not made by this file: move it away, then run this again" || return
    [ "$(uname -sm)" = "Linux x86_64" ] ||
        unet_say "oneflow 0.9.0 exists for Linux on x86-64 only, this is $(uname -sm)" || return
    python=$(unet_find_python)
    [ -n "$python" ] || unet_say "no CPython 3.10 found, asking uv for one" || python=$(unet_ask_uv 2>/dev/null)
    [ -n "$python" ] || unet_say \
        "can't find or fetch CPython 3.10: install it (python3.10, python3.10-venv), then run this again" || return
    unet_say "making .venv with $python ($("$python" --version)), a few minutes and 5 GB"
    rm -rf .venv
    mkdir .venv && : >.venv/ready && "$python" -m venv .venv &&
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps \
            --require-hashes -r requirements.txt >&2 &&
        env -u MPLBACKEND .venv/bin/python -c 'import common.quiet, cv2, safetensors, matplotlib, skimage.segmentation' &&
        sha256sum <requirements.txt >.venv/ready ||
        unet_say "making .venv failed, see above (network? disk space?), then run this again"
}

# Whether .venv is complete. The second test: its interpreter may have been removed.
unet_ready() { sha256sum --status -c .venv/ready <requirements.txt 2>/dev/null && .venv/bin/python -c '' 2>/dev/null; }

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
    fi
    cd "$before" || return
    return $failed
}

unet_env

# Sourced by the other scripts: go to the project's root and have .venv ready with the given
# requirements, installed only when they have changed.
#
#     source scripts/setup.sh requirements.txt [more requirements ...]

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Threads that sleep while they wait: beside other work, spinning ones cost small kernels 50-fold.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; name it with PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    local python
    python=$(find_python)
    # Some distributions ship venv without the pip that it installs; then the outer pip serves.
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    fi
}

install_requirements() {
    local wanted stamp=.venv/requirements.stamp
    wanted=$(cat "$@")
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        echo "making .venv"
        make_venv
    fi
    # An install that was asked for before covers a smaller one asked for now.
    if [ -f "$stamp" ] && [[ "$(cat "$stamp")" == "$wanted"* ]]; then
        return
    fi
    echo "installing $* into .venv (PyTorch is large: some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        $(printf -- '-r %s ' "$@")
    printf '%s' "$wanted" > "$stamp"
}

install_requirements "$@"

# Sourced by scripts/demo, test, test-lowest, test-kernels, test-vllm, check-integration, make-peers and nightly: a virtual environment with
# logitcache in it, from a fresh machine with Python 3.11 to 3.13. Sets $venv: .venv, or the folder that venv_name says. Pip is quiet unless
# it fails; a second run only reinstalls logitcache itself.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/${venv_name:-.venv}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "expected Python 3.11, 3.12 or 3.13 with the venv module on PATH, found none. Install one, or set PYTHON." >&2
    return 1
}

install_logitcache() { # $1: what to install, '.' or '.[test]'; the rest goes to pip
    if [ ! -x "$venv/bin/python" ]; then
        local python
        python=$(find_python)
        echo "Making $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    echo "Installing logitcache into ${venv##*/} (the first time this fetches PyTorch: minutes)"
    rm -rf build/lib build/bdist.* # setuptools would install files from here that the tree no longer has
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

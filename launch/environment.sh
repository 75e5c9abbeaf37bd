# To be sourced from the repository root: gives `environment FILE`, which makes .venv and installs the pinned packages of FILE.

environment() {
    local requirements=$1 stamp wanted
    stamp=.venv/installed-$requirements
    wanted=$(cat requirements*.txt pyproject.toml | sha256sum)
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    (
        set -euo pipefail
        flock 9 # two launches at once: the second waits, then finds the work done
        [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit
        echo "Installing $requirements into .venv; this is done once and takes minutes." >&2
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            make_venv
        fi
        # torch goes first and alone, so that a CPU wheel, where the installer is pointed at one, stays the one chosen.
        .venv/bin/python -m pip install --quiet "$(grep '^torch==' requirements.txt)"
        .venv/bin/python -m pip install --quiet -r "$requirements"
        .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
        echo "$wanted" >"$stamp"
    ) 9>.venv.lock
}

make_venv() {
    local python
    python=$(command -v python3.11 || command -v python3)
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$python is older than Python 3.11, which is needed" >&2; exit 1; }
    # Debian ships Python without ensurepip; there the machine's own pip fills the new environment.
    "$python" -m venv .venv 2>/dev/null ||
        { "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install --quiet pip; }
}

# Threads a rank may use when $1 ranks share this machine's cores.
threads_per_rank() {
    local threads=$(($(nproc) / $1))
    echo $((threads > 0 ? threads : 1))
}

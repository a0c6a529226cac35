# Sourced by the scripts that need Python packages: finds or makes .venv in the clone, installs the
# tested versions from requirements.txt once, and puts them first on PATH.
# Expects ROOT (the clone). PYTHON chooses the interpreter, VENV another folder. HF=1 adds the
# packages of requirements-hf.txt, and takes torchaudio away: fairseq's package asks for it and
# nothing here does, and that of another build than torch's breaks the import of transformers.

# shellcheck source=lock.sh
source "$ROOT/scripts/lock.sh"

lslora_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "lslora: error: no Python 3.10, 3.11 or 3.12 found${PYTHON:+ as $PYTHON}:" \
        "install one, or name it: PYTHON=/path/to/python" >&2
    return 1
}

# lslora_installed VENV : whether the tested versions are there
lslora_installed() {
    "$1/bin/python" -c '' 2>/dev/null &&
        [ "$(cat "$1/.lslora-installed" 2>/dev/null)" = "$(lslora_wanted)" ]
}

lslora_wanted() {
    cat "$ROOT/requirements.txt" ${HF:+"$ROOT/requirements-hf.txt"} "$ROOT/setup.py"
    echo "$ROOT"
}

lslora_install() { # VENV
    local log="$1/install.log" python
    if ! "$1/bin/python" -c '' 2>/dev/null; then
        python="$(lslora_find_python)" || return 1
        echo "making $1 with $("$python" --version)" >&2
        "$python" -m venv --clear "$1" || return 1
    fi
    rm -f "$1/.lslora-installed" # from here on the versions may be mixed
    echo "installing the packages of requirements.txt (a minute or two; log: $log)" >&2
    if ! {
        # fairseq 0.12.2 depends on an omegaconf whose metadata pip 24.1 and later refuse
        "$1/bin/python" -m pip install 'pip<24.1' 'setuptools<85' wheel &&
            "$1/bin/python" -m pip install -r "$ROOT/requirements.txt" \
                ${HF:+-r "$ROOT/requirements-hf.txt"} &&
            { [ -z "${HF:-}" ] || "$1/bin/python" -m pip uninstall -y torchaudio; } &&
            "$1/bin/python" -m pip install --no-deps --no-build-isolation -e "$ROOT"
    } >"$log" 2>&1; then
        tail -n 3 "$log" >&2
        echo "lslora: error: the installation failed, see $log; once mended, run again" >&2
        return 1
    fi
    lslora_wanted >"$1/.lslora-installed"
}

lslora_environment() {
    local venv="${VENV:-$ROOT/.venv}"
    if ! lslora_installed "$venv"; then
        mkdir -p "$(dirname "$venv")"
        exec 8>>"$venv.lock"
        if ! lslora_lock 8; then
            echo "waiting for another process that installs $venv" >&2
            lslora_lock 8 wait
        fi
        lslora_installed "$venv" || lslora_install "$venv" || return 1
        exec 8>&-
    fi
    export PATH="$venv/bin:$PATH"
    unset PYTHONHOME
}

lslora_environment || exit 1

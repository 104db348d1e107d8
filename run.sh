#!/usr/bin/env bash
# One command from a fresh clone: makes .venv beside this file, then does what usage says.
set -euo pipefail

usage() {
    cat <<'END'
./run.sh                               train a tiny model, and ask it a question before and after
./run.sh test [PYTEST ARGUMENTS]       run the tests
./run.sh train CONFIG [--key value]    train on every GPU of this machine
PYTHON=/path/to/python3 chooses the Python (3.10 or later) for .venv.
END
}

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$here/.venv

# Print major.minor of a Python; fails if it does not run or is too old.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' \
        2>/dev/null
}

find_python() {
    local candidate candidates=("$venv/bin/python" python3 python3.{13,12,11,10})
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if version_of "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done
    candidate=${PYTHON:-python3}
    fail "Python 3.10 or later is needed, and $candidate is $(version_of "$candidate" ||
        [[ $? == 1 ]] || echo "not there"); name another: PYTHON=/path/to/python3 $0"
}

# Install this package with an extra and the pinned versions, unless that was done already.
install() {
    local extra=$1 python version wanted
    python=$(find_python)
    version=$(version_of "$python")
    wanted=$(cksum < <(echo "$here $version" && cat "$here"/{constraints.txt,setup.cfg,pyproject.toml}))
    if [[ -f $venv/installed-$extra && $(<"$venv/installed-$extra") == "$wanted" ]]; then
        return
    fi
    echo "run.sh: setting up $venv: about a minute, more where torch brings CUDA with it" >&2
    if [[ $(version_of "$venv/bin/python") != "$version" ]]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python lacks the venv module; on Debian or Ubuntu: apt install python$version-venv"
        "$python" -m venv --clear "$venv" || fail "could not make $venv"
    fi
    # DS_BUILD_OPS=0: none of DeepSpeed's own kernels is needed, so neither is a compiler.
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$here/constraints.txt" --editable "${here}[$extra]" >"$venv/install.log" 2>&1 ||
        fail "pip could not install, is there a network?" \
            "$(grep --only-matching --max-count=1 'ERROR.*' "$venv/install.log") ($venv/install.log)"
    echo "$wanted" >"$venv/installed-$extra"
}

# What libraries cache goes into .venv, never into HOME, unless the user named a place.
keep_caches_here() {
    export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$venv/cache}"
    export HF_HOME="${HF_HOME:-$venv/cache/huggingface}"
    export MPLCONFIGDIR="${MPLCONFIGDIR:-$venv/cache/matplotlib}"
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$venv/cache/triton}"
    [[ -n ${PIP_CACHE_DIR:-} ]] || export PIP_NO_CACHE_DIR=1 # one copy of CUDA is enough
}

# Train with these arguments: on every GPU, or on the CPU where there is none.
launch() {
    exec "$venv/bin/python" -m minilora train "$@"
}

ask() {
    "$venv/bin/python" -m minilora.generate --model_name_or_path outputs/tiny \
        --prompt "$question" --max_new_tokens 40 --temperature 0 "$@"
}

demo() {
    local question="What is minilora?" processes=2 gpus
    cd "$here"
    gpus=$("$venv/bin/python" -c 'from minilora.launch import count_gpus; print(count_gpus())')
    [[ $gpus != 1 ]] || processes=1
    "$venv/bin/python" -m minilora.tiny outputs/tiny
    echo "Before the training: $question"
    ask
    (launch --num_gpus "$processes" examples/demo/demo.yaml)
    echo "After the training: $question"
    ask --adapter_name_or_path outputs/demo
    echo
    echo "Adapter: $here/outputs/demo/adapter_model.safetensors"
    echo "Picture of the loss: $here/outputs/demo/training_loss.png"
    echo "Data and settings: $here/examples/demo"
}

command=${1:-demo}
[[ $# == 0 ]] || shift
case $command in
demo | train | test) keep_caches_here ;;
-h | --help | help) usage && exit ;;
*) usage >&2 && exit 2 ;;
esac
case $command in
demo)
    install plot
    demo
    ;;
train)
    install plot
    launch "$@"
    ;;
test)
    install test
    cd "$here"
    # Two workers, each with whole files: most tests share the processes that a file starts. In the
    # order of their names: by their number of tests the longest files would come last.
    exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
esac

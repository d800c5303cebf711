#!/usr/bin/env bash
# What a GPU does with Qwen2-VL-2B, in under 8 minutes, without a network and without an installation of this project:
#
#     scripts/gpu_check.sh --wheels DIR              beforehand, with a network: the packages that such a machine may lack
#     scripts/gpu_check.sh [--wheels-from DIR] ...   the check; DIR is build/gpu_check/wheels by default
#
# The machine has Python 3.12, torch 2.11, transformers 5.17, peft, accelerate, safetensors, pillow, rich and numpy. Of
# the wheels those are unpacked that it lacks, into build/gpu_check/site; nothing else is touched. The other options are
# those of scripts/gpu_check.py, which prints and writes build/gpu_check/results.json. PYTHON names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
here="$root/build/gpu_check"
wheels="$here/wheels"
locked="annotated-types certifi charset-normalizer idna pydantic pydantic-core pydantic-settings python-dotenv
    qwen-vl-utils requests typing-inspection urllib3"

# download_wheels DIR: the versions of requirements.lock, and the torchvision that goes with torch 2.11.
download_wheels() {
    local name platforms=() wanted=("torchvision==0.26.0")
    for name in $locked; do
        wanted+=("$(grep -E "^$name==" "$root/requirements.lock")")
    done
    for name in 2_28 2_27 2_24 2_17 2_12 2_5; do
        platforms+=(--platform "manylinux_${name}_x86_64")
    done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$1" "${wanted[@]}"
    du -ch "$1"/*.whl
}

# unpack_lacking DIR: the wheels of DIR whose packages this Python does not have.
unpack_lacking() {
    local wheel name lacking=()
    for wheel in "$1"/*.whl; do
        name="$(basename "$wheel")"
        "$python" -c "import importlib.metadata as m; m.version('${name%%-*}')" 2>/dev/null || lacking+=("$wheel")
    done
    if [ "${#lacking[@]}" -gt 0 ]; then
        echo "unpacking into $here/site: ${lacking[*]##*/}"
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$here/site" "${lacking[@]}"
    fi
}

if [ "${1:-}" = "--wheels" ]; then
    download_wheels "${2:?--wheels needs a directory, such as $wheels}"
    exit
fi
if [ "${1:-}" = "--wheels-from" ]; then
    wheels="${2:?--wheels-from needs the directory that --wheels has filled}"
    shift 2
    ls "$wheels"/*.whl >/dev/null || { echo "$wheels has no wheels: fill it with --wheels" >&2; exit 2; }
fi
rm -rf "$here/site"
if ls "$wheels"/*.whl >/dev/null 2>&1; then
    unpack_lacking "$wheels"
fi
export PYTHONPATH="$here/site:$root/src:$root/benchmarks" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -u "$root/scripts/gpu_check.py" "$@"

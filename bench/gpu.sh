#!/usr/bin/env bash
# What needs a GPU, in four stages of less than ten minutes each: GPU machines are often borrowed for minutes, bare at the
# start, without a network, and with a folder $OUT of which a few files survive.
#
#   bench/gpu.sh 1            the build, ceilings, all tests marked gpu, compute-sanitizer
#   bench/gpu.sh 2            what decides the order of backends
#   bench/gpu.sh 3            the other kernels, and each kernel once under ncu
#   bench/gpu.sh 4            blocks, steps and a model of 1 B parameters
#   bench/gpu.sh rotary ...   these benchmarks
#   bench/gpu.sh 2 --dry      all but the launches, on a machine without a GPU
#   bench/gpu.sh pack [PYTHON]  beforehand: what saves time there, in kit/ (the extensions for that Python, wheels, COMMIT)
#
# Results lie in bench/results (a dry run: a scratch folder) and, at every exit, in $OUT/gpu-STAGE.tgz. What was finished at
# the same commit on the same device is not measured again. Variables: OUT, LIMIT (seconds, 540), RESULTS, PYTHON, TESTS.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
root=$PWD

pack() { # PYTHON
    set -e
    local python=${1:-python3.12} build
    build=$(mktemp -d)
    mkdir -p kit/wheels
    "$python" -m venv "$build/venv"
    "$build/venv/bin/python" -m pip install --quiet setuptools
    "$build/venv/bin/python" setup.py --quiet build_ext --build-temp "$build/temp" --build-lib kit
    # Pure Python, and compared with where they are installed; their dependencies are torch and Triton.
    "$build/venv/bin/python" -m pip download --quiet --no-deps --only-binary=:all: -d kit/wheels liger-kernel cut-cross-entropy ||
        echo "No wheels: linear_cross_entropy is measured without Liger and cut-cross-entropy."
    echo "$(git rev-parse HEAD)$([ -z "$(git status --porcelain -- ':!bench/results')" ] || echo +)" > kit/COMMIT
    rm -r "$build"
    du -sh kit
    find kit -type f
}

asked=() dry=()
for word in "$@"; do
    if [ "$word" = --dry ]; then dry=(--dry); else asked+=("$word"); fi
done
[ ${#asked[@]} -gt 0 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
if [ "${asked[0]}" = pack ]; then pack "${asked[@]:1}"; exit; fi

PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-540}
if [ ${#dry[@]} -gt 0 ]; then RESULTS=${RESULTS:-$(mktemp -d)}; else RESULTS=${RESULTS:-$root/bench/results}; fi
OUT=${OUT:-$RESULTS}
mkdir -p "$RESULTS/logs" "$OUT"

child=
finish() {
    if [ -n "$child" ]; then kill "$child" 2> /dev/null && wait "$child"; fi
    (cd "$RESULTS" && tar -czf "$OUT/gpu-$(IFS=-; echo "${asked[*]}").tgz" logs $(ls -- *-cuda.json 2> /dev/null))
    echo "Results: $OUT/gpu-$(IFS=-; echo "${asked[*]}").tgz"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# Compiled kernels stay in the tree between two calls on one machine.
export TRITON_CACHE_DIR=$root/.triton TORCHINDUCTOR_CACHE_DIR=$root/.triton/inductor
export PYTHONUNBUFFERED=1 PYTHONPATH=$root:$root/kit/site OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Nothing is installed: a link stands for what pyproject.toml maps, and wheels go into a folder of their own.
[ -e efftune/triton_kernels ] || ln -s ../triton_kernels efftune/triton_kernels
if ls kit/wheels/*.whl > /dev/null 2>&1 && [ ! -e kit/site ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target kit/site kit/wheels/*.whl
fi

built() { "$PYTHON" -c "import efftune._cpu, efftune._cuda" 2> /dev/null; }
if [ ${#dry[@]} -eq 0 ]; then
    built || cp kit/efftune/*.so efftune/ 2> /dev/null
    built || timeout 240 "$PYTHON" setup.py --quiet build_ext --inplace > "$RESULTS/logs/build.txt" 2>&1
    built || echo "The extensions are not built (logs/build.txt): what needs them is left out."
fi

"$PYTHON" -m bench.stage "${asked[@]}" --results "$RESULTS" --seconds "$((LIMIT - SECONDS))" \
    --tests "${TESTS:-tests}" "${dry[@]}" &
child=$!
wait "$child"
status=$?
child=
exit "$status"

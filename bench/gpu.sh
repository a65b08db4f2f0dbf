#!/usr/bin/env bash
# Everything that needs a GPU, with the packages that are installed and no network: builds csrc with nvcc in place, runs the
# tests marked gpu, runs the benchmarks, and prints their tables last.
#
#   bench/gpu.sh                 all of it
#   bench/gpu.sh tests           the build and the tests
#   bench/gpu.sh block rms_norm  the build and these benchmarks, where a machine is lent for ten minutes at a time
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p bench/results

python3 -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
python3 setup.py --quiet build_ext --inplace
python3 -c "import efftune._cpu, efftune._cuda, efftune.triton_kernels"

status=0
if [ $# -eq 0 ] || [ "$1" = tests ]; then
    timeout 400 python3 -m pytest -q -m gpu -p no:cacheprovider || status=$?
    # A benchmark of wrong results is worth nothing.
    if [ "$status" -ne 0 ]; then
        echo "The GPU tests failed: no benchmarks." >&2
        exit "$status"
    fi
    if [ $# -gt 0 ]; then exit 0; fi
fi

run() { timeout 200 python3 -m "bench.$1" --device cuda "${@:2}" > "bench/results/$1${2:+$2}-cuda.txt" || status=$?; }

names=("$@")
# perturb and the like first: what is cheap should not wait for what is not.
if [ $# -eq 0 ]; then names=(perturb mezo lowrank_linear pack_act rms_norm glu rotary rows_grad linear_cross_entropy vcas block); fi
for name in "${names[@]}"; do
    run "$name"
    if [ "$name" = block ]; then run block --lora; fi
done
tail -n +1 bench/results/*-cuda.txt
exit "$status"

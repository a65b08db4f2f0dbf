#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes, with the packages that are installed and no network:
# builds csrc with nvcc in place, runs the tests marked gpu, runs the benchmarks, and prints their tables last.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p bench/results

python3 -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
python3 setup.py --quiet build_ext --inplace
python3 -c "import efftune._cpu, efftune._cuda, efftune.triton_kernels"

status=0
timeout 240 python3 -m pytest -q -m gpu -p no:cacheprovider || status=$?
# A benchmark of wrong results is worth nothing.
if [ "$status" -ne 0 ]; then
    echo "The GPU tests failed: no benchmarks." >&2
    exit "$status"
fi

for bench in bench/*.py; do
    name=$(basename "$bench" .py)
    case $name in harness | tables | sst2 | __init__) continue ;; esac # no benchmark, or one that needs data
    timeout 150 python3 -m "bench.$name" --device cuda > "bench/results/$name-cuda.txt" || status=$?
done
tail -n +1 bench/results/*-cuda.txt
exit "$status"

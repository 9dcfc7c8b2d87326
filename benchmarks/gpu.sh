#!/usr/bin/env bash
# The checks and the benchmark of a GPU in one command of at most eight minutes: the CUDA tests, what recording and
# replay cost beside the training, and a CPU replay of the same recording. On a machine with a CUDA build of torch.
#
#     benchmarks/gpu.sh [FILE.json]
#
# PYTHON names the interpreter that has torch. Where packages cannot be fetched, WHEELS names a folder that has them:
#     pip download --dest WHEELS --python-version 3.12 --only-binary :all: --no-deps \
#         h5py hdf5plugin polars polars-runtime-32 typer click rich jinja2 markupsafe pytest pluggy iniconfig hypothesis \
#         sortedcontainers scipy scikit-learn joblib threadpoolctl
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results/gpu.json}")
python=${PYTHON:-python3}
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU here"'
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"$python" -m venv --system-site-packages "$venv"
if [ -n "${WHEELS:-}" ]; then
    "$venv/bin/pip" install --quiet --no-index --no-deps "$WHEELS"/*.whl
    export PYTHONPATH=$PWD
else
    "$venv/bin/pip" install --quiet --editable '.[report]' pytest hypothesis
fi
timeout 480 "$venv/bin/python" benchmarks/gpu.py --limit 400 --out "$out"

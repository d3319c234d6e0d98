#!/bin/sh
# All measurements for one GPU, in at most 8 minutes and without a network: sh benchmarks/gpu.sh FOLDER
set -e
out=${1:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH="$(pwd)/src${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest -m gpu -n 0 -q -p no:cacheprovider 2>&1 | tee "$out/tests.txt" || echo "GPU tests failed" >> "$out/tests.txt"
timeout 200 python benchmarks/run.py --only steps --models vit_small_patch16_224 vit_base_patch16_224 \
    --objectives mapet mim --precisions bf16 --batch-size 256 --rounds 5 --compile --json "$out/steps.json" \
    2>&1 | tee "$out/steps.md" || echo "the step table failed" >> "$out/steps.md"
timeout 200 python benchmarks/gpu.py --compile --json "$out/gpu.json" 2>&1 | tee "$out/gpu.txt"

#!/usr/bin/env bash
# Whether the promises hold on a GPU, and what a step costs at the tables of Llama 3 8B, Qwen3 8B and Gemma 2 2B, at
# 2,048 and 8,192 tokens. Made for one GPU of 80 GB and eight minutes; nothing is installed or downloaded. It needs
# torch, transformers, peft, matplotlib and tqdm.
#
#   bash examples/benchmark/gpu.sh [OUTPUT [DEVICE [SHRINK]]]
#
# OUTPUT gets checks.txt, and a dated JSON file and picture of the benchmark. `gpu.sh out cpu 32` tries it on a CPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
output=${1:-outputs/gpu} device=${2:-cuda} shrink=${3:-1}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
mkdir -p "$output"
failed=0
timeout 200 "$python" examples/benchmark/gpu_checks.py --device "$device" --shrink "$shrink" 2>&1 |
  tee "$output/checks.txt" || failed=1
timeout 270 "$python" examples/benchmark/run.py --sections large --device "$device" --shrink "$shrink" \
  --repetitions 3 --output "$output" 2>&1 | tee "$output/benchmark.txt" || failed=1
exit "$failed"

#!/usr/bin/env bash
# One machine with 8 GPUs: one process sees all of them. Usage: configs/launch/one_host.sh CONFIG [--key value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
make install ACCELERATOR=cuda
# JAX takes 75 % of a GPU's memory unless it is told otherwise; what is left is for CUDA, its libraries and NCCL. No XLA
# flag is set: docs/scale.md says which ones were tried, and which are on by themselves.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# `exec`: a signal to this process is one to Python, which ends its step, saves and exits; a second one ends it at once.
exec .venv/bin/python -m train policy --config "$1" --mesh.data 1 --mesh.fsdp 8 "${@:2}"

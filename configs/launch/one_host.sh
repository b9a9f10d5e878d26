#!/usr/bin/env bash
# One machine with 8 GPUs: one process sees all of them. Usage: configs/launch/one_host.sh CONFIG [--key value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
make install ACCELERATOR=cuda
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95  # JAX takes 75 % of a GPU unless it is told otherwise
exec .venv/bin/python -m train policy --config "$1" --mesh.data 1 --mesh.fsdp 8 "${@:2}"

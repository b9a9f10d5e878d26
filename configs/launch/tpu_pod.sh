#!/usr/bin/env bash
# A TPU pod slice: the same command on every host, JAX finds the others by itself.
# Usage: NAME=my-pod ZONE=us-east5-a RUN=gs://my-bucket/my-run configs/launch/tpu_pod.sh CONFIG [--key value ...]
# The checkout must lie in ~/gopo_jax on every host:
#   gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "git clone REPOSITORY gopo_jax"
# No LIBTPU_INIT_ARGS are set: what is safe on a chip is on by itself; docs/scale.md says which were tried.
# A spot TPU has 30 s left when it gets its notice, which a step may exceed: add --checkpoint.every_minutes 10.
set -euo pipefail
: "${NAME:?the name of the TPU}" "${ZONE:?its zone}" "${RUN:?where checkpoints go: hosts share no disk}"
train="make install ACCELERATOR=tpu && .venv/bin/pip install -q gcsfs && .venv/bin/python -m train policy --config $1"
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
    --command "cd gopo_jax && $train --checkpoint.directory $RUN ${*:2}"

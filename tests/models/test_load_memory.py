"""What loading costs: peak anonymous host memory (RssAnon: mapped file pages do not count) of a 2 GB checkpoint."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.config import Qwen3Config
from models.hf_weights import INDEX_FILE, _hf_names, _hf_shape, abstract_model, flatten, split

ROOT = Path(__file__).parents[2]
CONFIG = Qwen3Config(32_000, 2048, 8192, 14, 16, 16, 128, tie_word_embeddings=True)
SHARD_BYTES = 400 * 10**6

PROGRAM = """
import json, sys, threading
import jax, jax.numpy as jnp
from models.hf_weights import load_pretrained, split
from models.sharding import make_layout

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

devices = len(jax.devices())
layout = make_layout(fsdp=devices // 2, tensor=2) if devices > 1 else None
jnp.zeros(8).block_until_ready()
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
params = split(load_pretrained(sys.argv[1], mesh=layout, dtype="auto"))[1]
done.set()
watcher.join()
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(json.dumps({"devices": devices, "peak": peak - before, "held": held}))
"""


@pytest.fixture(scope="module")
def two_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sharded bfloat16 checkpoint, written without a network in memory."""
    directory = tmp_path_factory.mktemp("two_gigabytes")
    values = np.random.default_rng(0).normal(size=2**20).astype("bfloat16")
    tensors = {
        theirs: np.resize(values, _hf_shape(name, CONFIG))
        for name in flatten(split(abstract_model(CONFIG))[1])
        for theirs in _hf_names(name, CONFIG).values()
    }
    (directory / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"dtype": "bfloat16"}))
    shards: list[dict[str, np.ndarray]] = [{}]
    for name in sorted(tensors):
        if sum(tensor.nbytes for tensor in shards[-1].values()) + tensors[name].nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensors[name]
    for i, shard in enumerate(shards):
        save_file(shard, directory / f"model-{i}.safetensors")
    weight_map = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_holds_its_shards_and_one_tensor(two_gigabytes: Path, devices: int) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", PROGRAM, str(two_gigabytes)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    names = flatten(split(abstract_model(CONFIG))[1])
    largest = max(2 * math.prod(_hf_shape(name, CONFIG)) for name in names)
    stored = sum(file.stat().st_size for file in two_gigabytes.glob("*.safetensors"))
    bound = found["held"] + largest
    print(
        f"{found['devices']} devices, {stored / 1e9:.3f} GB stored: peak anonymous memory {found['peak'] / 1e9:.3f} GB "
        f"(bound {bound / 1e9:.3f} GB = own shards {found['held'] / 1e9:.3f} + largest tensor {largest / 1e9:.3f})"
    )
    assert found["devices"] == devices and stored > 1.9e9
    assert found["peak"] <= bound

"""Laws of digests: the same however arrays are sharded, another for any change of any element of any copy."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import digests
from models.digests import digest_arrays, digest_json, first_change
from models.sharding import to_host

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.normal(size=(4, 6)).astype(np.float32),
    "bfloat16": RNG.normal(size=(2, 3, 4)).astype(jnp.bfloat16),
    "float16": RNG.normal(size=(2, 2)).astype(np.float16),
    "int32": np.arange(5, dtype=np.int32),
    "int8": RNG.integers(-9, 9, (2, 4)).astype(np.int8),
    "bool": RNG.normal(size=7) > 0,
    "scalar": np.float32(2.5),
    "special": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
}
TREE = jax.tree.map(jnp.asarray, ARRAYS)
DIGESTS = digest_arrays(TREE)


def flipped(array: np.ndarray, byte: int, bit: int) -> jax.Array:
    """The array with another bit; a bool has one bit that means something."""
    raw = np.array(array)
    raw.reshape(-1).view(np.uint8)[byte] ^= 1 if raw.dtype == bool else 1 << bit
    return jnp.asarray(raw.reshape(np.shape(array)))


def plain_digest(array: np.ndarray) -> str:
    """The definition, element by element."""
    array = np.asarray(array)
    bits = array.reshape(-1).view(np.uint8 if array.dtype == bool else f"u{array.itemsize}")
    sums = [0, 0]
    for i, x in enumerate(map(int, bits)):
        for lane, (multiplier, first, shift, second) in enumerate(digests._MIXES):
            mixed = x ^ i * multiplier % 2**32
            mixed = (mixed ^ mixed >> 16) * first % 2**32
            mixed = (mixed ^ mixed >> shift) * second % 2**32
            sums[lane] += mixed ^ mixed >> 16
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype}[{shape}] {sums[0] % 2**32:08x}{sums[1] % 2**32:08x}"


@pytest.mark.parametrize("on_host", [True, False])
def test_a_digest_is_its_definition_on_host_and_device(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_ON_HOST", 1 << 15 if on_host else 0)
    names = list(ARRAYS) if on_host else ["float32", "bfloat16", "bool", "scalar"]  # each is a program of its own
    tree = {name: TREE[name] for name in names}
    assert digest_arrays(tree) == {name: plain_digest(ARRAYS[name]) for name in names}
    assert first_change(tree, DIGESTS) is None


def test_a_digest_is_the_same_of_an_array_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of an optimizer that is kept there between updates (`optimizer.offload`)."""
    monkeypatch.setattr(digests, "_ON_HOST", 0)
    tree = {"float32": TREE["float32"]}
    expected = {"float32": DIGESTS["float32"]}
    assert digest_arrays(to_host(tree)) == expected and first_change(to_host(tree), expected) is None


@pytest.mark.parametrize("name", ARRAYS)
def test_every_bit_of_every_element_counts(name: str) -> None:
    size = np.asarray(ARRAYS[name]).nbytes
    for byte in {*range(0, size, 3), size - 1}:
        for bit in range(8):
            change = first_change({name: flipped(ARRAYS[name], byte, bit)}, DIGESTS)
            assert change is not None and change.name == name and change.text == "has other values than were saved"


def test_order_form_and_name_count() -> None:
    array = ARRAYS["float32"]
    assert first_change({"float32": jnp.asarray(array[::-1])}, DIGESTS) is not None
    turned = first_change({"float32": jnp.asarray(array.T)}, DIGESTS)
    assert turned is not None and turned.text == "is float32[6,4], but float32[4,6] was saved"
    cast = first_change({"int32": jnp.arange(5, dtype=jnp.float32)}, DIGESTS)
    assert cast is not None and cast.text == "is float32[5], but int32[5] was saved"
    unknown = first_change({"other": jnp.zeros(2)}, DIGESTS)
    assert unknown is not None and unknown.text == "is float32[2], but none was saved"
    for broken in ("float32[4,6] ", "float32[4,6] 0x12345678", "float32[4,6] -1234567-1234567"):
        assert first_change({"float32": jnp.asarray(array)}, {"float32": broken}) is not None
    nested = {"a": [jnp.zeros(1), {"b": jnp.ones(1)}]}
    assert digest_arrays(nested).keys() == {"a.0", "a.1.b"}


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from models import digests

mesh = jax.make_mesh((2, 2), ("a", "b"))
array = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
changed = array.copy()
changed[3, 5] = np.nextafter(changed[3, 5], 9)
expected = digests.digest_arrays({"x": jnp.asarray(array)})
for on_host in (1 << 15, 0):
    digests._ON_HOST = on_host
    for spec in ((), ("a",), (None, "b"), (("a", "b"),), ("a", "b")):
        put = lambda value: {"x": jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))}
        sharded, damaged = put(array), put(changed)
        with jax.transfer_guard("disallow"):
            assert digests.digest_arrays(sharded) == expected, spec
            assert digests.first_change(sharded, expected) is None, spec
            assert digests.first_change(damaged, expected) is not None, spec
    for odd in range(4):
        copies = [jax.device_put(changed if i == odd else array, d) for i, d in enumerate(mesh.devices.flat)]
        whole = jax.make_array_from_single_device_arrays((4, 8), NamedSharding(mesh, PartitionSpec()), copies)
        assert digests.first_change({"x": whole}, expected) is not None, odd
"""


def test_shards_and_copies_on_four_devices() -> None:
    """However an array is sharded its digest is the same; a copy that differs is noticed on any device."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_order_of_keys_does_not_count_in_json() -> None:
    assert digest_json({"a": 1, "b": [1, (2.5, None)]}) == digest_json({"b": [1, [2.5, None]], "a": 1})
    assert digest_json({1: "x"}) == digest_json({"1": "x"}) != digest_json({"1": "y"})

"""Digests of arrays: they tell values that were damaged on a disk from those that were saved.

    digest(x) = dtype[shape] and, modulo 2^32, sum_i mix_1(bits(x_i), i) and sum_i mix_2(bits(x_i), i)

i counts the elements of the whole array, so the sums do not depend on how the array is sharded, and every device adds
up its own shards: two numbers of each array are gathered, nothing else. A change of one element always shows, for a mix
is a bijection of the element's bits; of other changes one in 2^64 does not.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from models.sharding import to_device

_ON_HOST = 1 << 15  # shards with fewer elements are added up on the host: compiling a program for them takes longer
# (multiplier of i, first multiplier, shift, second multiplier): the finalizers of MurmurHash3 and lowbias32
_MIXES = ((0x9E3779B9, 0x85EBCA6B, 13, 0xC2B2AE35), (0x85157AF5, 0x7FEB352D, 15, 0x846CA68B))


def digest_arrays(tree: Any) -> dict[str, str]:
    """Returns name -> digest of the arrays of a pytree, on every process; to be called by all."""
    arrays = _named_arrays(tree)
    sums = _sums(arrays, all_copies=False)
    return {
        array.name: f"{array.form} {first:08x}{second:08x}" for array, (first, second) in zip(arrays, sums, strict=True)
    }


class Change(NamedTuple):
    """An array that is not the one that was saved."""

    name: str
    text: str


def first_change(tree: Any, digests: Mapping[str, str]) -> Change | None:
    """Returns an array of a pytree that is not what was saved, on any of its devices; to be called by all processes.

    Args:
      digests: those of the saved tree, which may have more arrays.
    """
    arrays = _named_arrays(tree)
    for array in arrays:
        saved_form = digests.get(array.name, "none").partition(" ")[0]
        if array.form != saved_form:
            return Change(array.name, f"is {array.form}, but {saved_form} was saved")
    for array, sums in zip(arrays, _sums(arrays, all_copies=True), strict=True):
        saved = digests[array.name].partition(" ")[2]
        expected = [_number(half) * array.copies**2 % 2**32 for half in (saved[:8], saved[8:])]
        if expected != sums.tolist():
            return Change(array.name, "has other values than were saved")
    return None


def digest_json(value: Any) -> str:
    """Returns a digest of a value of JSON's types; the order of keys does not count."""
    plain = json.loads(json.dumps(value))  # with text for keys, as it is read again
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class _Array(NamedTuple):
    name: str
    value: jax.Array

    @property
    def form(self) -> str:
        return f"{self.value.dtype}[{','.join(map(str, self.value.shape))}]"

    @property
    def copies(self) -> int:
        """On how many devices each element lies."""
        sharding, shape = self.value.sharding, self.value.shape
        return sharding.num_devices * math.prod(sharding.shard_shape(shape)) // max(1, self.value.size)


def _named_arrays(tree: Any) -> list[_Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [_Array(array_name(path), jnp.asarray(leaf)) for path, leaf in leaves]


def array_name(path: Any) -> str:
    """Returns the name of an array at a path in a pytree, such as "params.layers.query_LDHE"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _number(digits: str) -> int:
    """Returns the value of eight hexadecimal digits, -1 for anything else."""
    return int(digits, 16) if len(digits) == 8 and set(digits) <= set("0123456789abcdef") else -1


def _sums(arrays: list[_Array], *, all_copies: bool) -> np.ndarray:
    """Returns the two sums of every array, [arrays, 2] uint32.

    Args:
      all_copies: whether copy k of an array (k from 0) counts 2k + 1 times, so that the sums of n equal copies are n^2
        times those of one, and others if one copy differs; else the first copy counts alone.
    """
    shards = [
        (number, shard)
        for number, array in enumerate(arrays)
        for shard in array.value.addressable_shards
        if all_copies or shard.replica_id == 0
    ]
    pairs = jax.device_get([_shard_sums(shard, arrays[number].value.shape) for number, shard in shards])
    sums = np.zeros((len(arrays), 2), np.uint32)
    for (number, shard), pair in zip(shards, pairs, strict=True):
        sums[number] += np.asarray(pair) * np.uint32(2 * shard.replica_id + 1)
    if jax.process_count() == 1:
        return sums
    is_local = np.array([array.value.is_fully_addressable for array in arrays]).reshape(-1, 1)
    return np.where(is_local, sums, np.asarray(multihost_utils.process_allgather(sums)).sum(0, dtype=np.uint32))


def _shard_sums(shard: Any, shape: tuple[int, ...]) -> Any:
    """Returns the two sums over a shard of an array of this shape; on its device, where they may still be computed."""
    strides = np.array([math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))], np.uint32)
    starts = np.array([part.start or 0 for part in shard.index], np.uint32)
    if shard.data.size < _ON_HOST:
        return [lane.sum(dtype=np.uint32) for lane in _mixed(jax.device_get(shard.data), starts, strides, np)]
    # what is kept in the host's memory (optimizer.offload) is added up on its device too
    return _device_sums(to_device(shard.data), *jax.device_put((starts, strides), shard.device))


@jax.jit
def _device_sums(values: jax.Array, starts: jax.Array, strides: jax.Array) -> tuple[jax.Array, ...]:
    # One reduction of pairs: XLA reads the array once, and uses all cores of a CPU.
    zeros = (np.uint32(0), np.uint32(0))
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return tuple(jax.lax.reduce(_mixed(values, starts, strides, jnp), zeros, add, range(max(1, values.ndim))))


def _mixed(values: Any, starts: Any, strides: Any, numpy: Any) -> tuple[Any, ...]:
    """Returns both mixes of each element's bits and index.

    Args:
      values: an array of a part of a whole array.
      starts, strides: where the part begins on every axis, and how many elements of the whole a step on it is.
      numpy: `numpy`, or `jax.numpy` where values is a JAX array.
    """
    bits = _bits(values, numpy)
    index = numpy.zeros([1] * bits.ndim, np.uint32)
    for axis, size in enumerate(values.shape):
        along = numpy.arange(size, dtype=np.uint32).reshape([size if a == axis else 1 for a in range(values.ndim)])
        index = index + (along + starts[axis]) * strides[axis]
    return tuple(_mix(bits ^ index * np.uint32(multiplier), *rest) for multiplier, *rest in _MIXES)


def _mix(bits: Any, first: int, shift: int, second: int) -> Any:
    """Mixes 32 bits so that each of them changes every other one half of the time; a bijection."""
    bits = (bits ^ bits >> 16) * np.uint32(first)
    bits = (bits ^ bits >> shift) * np.uint32(second)
    return bits ^ bits >> 16


def _bits(values: Any, numpy: Any) -> Any:
    """Returns the bits of each element as uint32; of a scalar as those of an array of one."""
    values = values.reshape(values.shape or (1,))
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    if values.dtype == bool:
        bits = values.astype(unsigned)
    else:
        bits = values.view(unsigned)
    if unsigned.itemsize == 8:
        bits = bits ^ bits >> 32
    return bits.astype(np.uint32)

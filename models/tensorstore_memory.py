"""Keeps the memory of a run that saves often: what TensorStore loses in each conversion from JSON, Orbax asks for less.

`KvStore.Spec.to_json()` and `experimental_collect_matching_metrics()` of TensorStore (0.1.74 to 0.1.86) lose 100 to 300
bytes for every dictionary that they return. Orbax calls the first for every array of a save, always with the place of
the checkpoint, and the second four times a save, to log a throughput: 50 kB a save for a network of two layers, 14 MB
in 1,000 steps with a save every 5. Here a place in the file system is its own JSON, as it is there, the JSON of others
is made once for each, and the second is not called at all.
"""

import functools
import json
from typing import Any

import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils  # has no public name


class _Spec:
    """A `tensorstore.KvStore.Spec` that is converted to JSON once for each place, and in the file system not at all."""

    def __init__(self, spec: Any) -> None:
        self.value = spec

    def to_json(self) -> Any:
        if self.value.keys() == {"driver", "path"} and self.value["driver"] == "file":
            tensorstore.KvStore.Spec(self.value)  # raises for a path that it does not take
            return dict(self.value)
        return json.loads(_resolved(json.dumps(self.value, sort_keys=True)))


@functools.lru_cache(maxsize=16)
def _resolved(text: str) -> str:
    return json.dumps(tensorstore.KvStore.Spec(json.loads(text)).to_json())


class _KvStore:
    """`tensorstore.KvStore` with that Spec."""

    Spec = _Spec

    @staticmethod
    def open(spec: Any, **options: Any) -> Any:
        return tensorstore.KvStore.open(spec.value if isinstance(spec, _Spec) else spec, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorstore.KvStore, name)


class _TensorStore:
    """The module tensorstore, as Orbax's `tensorstore_utils` sees it."""

    KvStore = _KvStore()

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorstore, name)

    @staticmethod
    def experimental_collect_matching_metrics(prefix: str) -> list[Any]:
        """Returns no metrics: then Orbax logs no throughput."""
        return []


def spare_memory() -> None:
    """Replaces tensorstore in the one module of Orbax that converts so much; without effect on what is written."""
    if getattr(tensorstore_utils, "ts", None) is tensorstore:
        tensorstore_utils.ts = _TensorStore()

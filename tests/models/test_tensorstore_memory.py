"""A place that Orbax writes to is the same JSON as TensorStore makes of it, without asking TensorStore each time."""

import pytest
import tensorstore

from models.tensorstore_memory import _TensorStore


@pytest.mark.parametrize(
    "spec",
    [
        {"driver": "file", "path": "/runs/a/"},
        {"driver": "file", "path": "/runs/with a blank, 5% [x] and ü"},
        {"driver": "gcs", "bucket": "runs", "path": "a/"},
        {"driver": "memory", "path": "a/"},
    ],
    ids=["directory", "signs", "gcs", "memory"],
)
def test_json_of_a_place_is_that_of_tensorstore(spec: dict[str, str]) -> None:
    assert _TensorStore().KvStore.Spec(spec).to_json() == tensorstore.KvStore.Spec(spec).to_json()


def test_path_that_tensorstore_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid file path"):
        _TensorStore().KvStore.Spec({"driver": "file", "path": "/runs//a"}).to_json()

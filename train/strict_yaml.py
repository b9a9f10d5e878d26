"""YAML in which every key stands once: of two, PyYAML would keep the last without a word."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

MERGE = "tag:yaml.org,2002:merge"  # of the key <<, whose mapping the keys beside it override


class RepeatedKey(NamedTuple):
    """A key that stands twice in one mapping, as itself or as a dotted key beside the block that holds it."""

    key: Any
    first: int  # its lines
    second: int


class KeyNode(NamedTuple):
    """A key of a mapping, and what belongs to it."""

    key: Any
    line: int
    value: yaml.Node


def load_yaml(text: str, source: str, *, dotted: bool = False) -> Any:
    """Returns the value of one YAML document.

    Args:
      text: the document.
      source: its name in error messages.
      dotted: whether a key such as optimizer.learning_rate stands for one in the block `optimizer`.

    Raises:
      ValueError: not YAML, or a key that stands twice; the message names the key and its lines.
    """
    try:
        loader = yaml.SafeLoader(text)  # which refuses control characters
        node = loader.get_single_node()
        for key, first, second in _repeated_keys(loader, node, dotted, set()):
            lines = f"lines {first} and {second}" if first != second else f"line {first}"
            raise ValueError(
                f"{source}: key {key!r} stands twice, in {lines}; only the last one would count: put everything under "
                f"one"
            )
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: not YAML: nested too deeply") from error


def _repeated_keys(loader: yaml.SafeLoader, node: Any, dotted: bool, visited: set[int]) -> Iterator[RepeatedKey]:
    """Yields every repeated key in a tree of nodes, in which aliases may make circles."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in visited:
        return
    visited.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            yield from _repeated_keys(loader, item, dotted, visited)
        return
    keys = _keys(loader, node)
    lines: dict[Any, int] = {}
    for key, line, value in keys:
        if key in lines:
            yield RepeatedKey(key, lines[key], line)
        lines[key] = line
        yield from _repeated_keys(loader, value, dotted, visited)
    if dotted:
        yield from _keys_beside_their_block(loader, keys)


def _keys(loader: yaml.SafeLoader, node: yaml.MappingNode) -> list[KeyNode]:
    return [
        KeyNode(loader.construct_object(key), key.start_mark.line + 1, value)
        for key, value in node.value
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE
    ]


def _keys_beside_their_block(loader: yaml.SafeLoader, keys: list[KeyNode]) -> Iterator[RepeatedKey]:
    """Yields every dotted key that a block below replaces, or that a block above sets too."""
    for i, (block, block_line, node) in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            continue
        inner = {key: line for key, line, _ in _keys(loader, node)}
        for j, (key, line, _) in enumerate(keys):
            if str(key).startswith(f"{block}."):
                name = str(key).removeprefix(f"{block}.")
                if j < i or name in inner:
                    yield RepeatedKey(key, *sorted((line, inner.get(name, block_line))))

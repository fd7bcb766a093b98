"""Reads YAML whose size in memory is bounded: aliases can make a text of 1 KB stand for a billion values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000


class YamlTooLargeError(ValueError):
    """A YAML text is too long, or stands for too many values."""


def read_bounded(path: Path) -> str:
    """Returns the text of a UTF-8 file, which may be a pipe.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is not UTF-8.
        YamlTooLargeError: It is too long. No more than `MAX_BYTES` are read.
    """
    with path.open("rb") as handle:
        content = handle.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlTooLargeError(f"the file is longer than {MAX_BYTES:,} bytes")
    return content.decode("utf-8")


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Returns the value of a YAML text.

    Args:
        text: The text.
        loader: The loader class.

    Raises:
        YamlTooLargeError: The text is too long, or stands for more than `MAX_VALUES` values with its aliases replaced.
        yaml.YAMLError: It is not valid YAML. PyYAML also raises other errors, for example for an impossible date.
    """
    if len(text) > MAX_BYTES:
        raise YamlTooLargeError(f"the text is longer than {MAX_BYTES:,} characters")
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return reader.construct_document(node)
    finally:
        reader.dispose()


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Returns how many values a node stands for with its aliases replaced. An alias is the node of its anchor."""
    count = counts.get(id(node))
    if count == 0:
        raise YamlTooLargeError("a value contains itself")
    if count is None:
        counts[id(node)] = 0  # until its items are counted
        items: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            items = [item for pair in node.value for item in pair]
        elif isinstance(node, yaml.SequenceNode):
            items = node.value
        count = 1 + sum(_count(item, counts) for item in items)
        if count > MAX_VALUES:
            raise YamlTooLargeError(f"it stands for more than {MAX_VALUES:,} values")
        counts[id(node)] = count
    return count

"""Change values in params.yaml and leave every other byte as it is.

A key is named as in docs/reference.md: train.width, or seeds at the top level. A key with the
comment `# mine` in its line belongs to the user, and with it all keys below it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fullscale.params import load_params
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically

_MINE = re.compile(r"#\s*mine\b", re.IGNORECASE)
_COMMENT = re.compile(r"(\s*)#")

Nodes = dict[str, tuple[yaml.Node, yaml.Node]]


def find_mine(text: str) -> frozenset[str]:
    """Return the keys whose line has the comment `# mine`, and all keys below them.

    Args:
        text: of params.yaml.
    """
    lines = text.splitlines()
    nodes = _find_nodes(text)
    marked = {key for key, (name, _) in nodes.items() if _MINE.search(_comment_of(lines, name))}
    return frozenset(
        key for key in nodes if any(key == each or key.startswith(f"{each}.") for each in marked)
    )


def change_values(text: str, changes: Mapping[str, Any]) -> str:
    """Return params.yaml with other values; comments, order and all other lines stay.

    A list is written on one line. A key that is missing is added below its section's last one.

    Args:
        text: of params.yaml.
        changes: key to value.

    Raises:
        StageError: a key is the user's, or the file is written in a way that cannot be changed.
    """
    if mine := sorted(find_mine(text) & set(changes)):
        raise StageError(
            f"params.yaml: {', '.join(mine)} has the comment `# mine`; remove it first"
        )
    wanted = yaml.safe_load(text)
    try:
        for key, value in changes.items():
            *path, name = key.split(".")
            section = wanted
            for part in path:
                section = section.setdefault(part, {})
            section[name] = value
            text = _change_value(text, key, value)
        is_right = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        is_right = False
    if not is_right:
        raise StageError(
            "params.yaml is written in a way that cannot be changed here, perhaps with anchors; "
            "write the values of the plan into it yourself"
        )
    return text


def write_params(path: Path, changes: Mapping[str, Any]) -> None:
    """Change values of a params.yaml on disk, atomically, after the new file was checked.

    Raises:
        StageError: as `change_values` and `load_params` do.
    """
    text = change_values(path.read_text(encoding="utf-8"), changes)
    draft = path.with_name(path.name + ".draft")
    try:
        write_atomically(draft, text)
        load_params(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _change_value(text: str, key: str, value: Any) -> str:
    nodes = _find_nodes(text)
    if key not in nodes:
        return _add_key(text, nodes, key, value)
    node = nodes[key][1]
    start, end = node.start_mark.index, _end_of(node)
    new = _plain(value)
    if "\n" in text[start:end]:  # a list with an item in each line, below its key
        return text[: nodes[key][0].end_mark.index] + f": {new}" + text[end:]
    rest, line_end, after = text[end:].partition("\n")
    if comment := _COMMENT.match(rest):
        # The comment stays in its column where there is room.
        num_blanks = max(1, len(comment[1]) + (end - start) - len(new))
        rest = " " * num_blanks + rest[len(comment[1]) :]
    return text[:start] + new + rest + line_end + after


def _add_key(text: str, nodes: Nodes, key: str, value: Any) -> str:
    section, _, name = key.rpartition(".")
    if not section or section not in nodes:
        line = (
            f"{section}:\n  {name}: {_plain(value)}\n" if section else f"{name}: {_plain(value)}\n"
        )
        return text.rstrip("\n") + f"\n\n{line}"
    *_, last = (pair for other, pair in nodes.items() if other.rpartition(".")[0] == section)
    lines = text.splitlines(keepends=True)
    place = text.count("\n", 0, _end_of(last[1])) + 1
    lines.insert(place, f"{' ' * last[0].start_mark.column}{name}: {_plain(value)}\n")
    return "".join(lines)


def _find_nodes(text: str) -> Nodes:
    """Return key and value of each entry of all mappings, by dotted key, in order."""
    found: Nodes = {}

    def collect(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for name, value in node.value:
            found[f"{prefix}{name.value}"] = name, value
            collect(value, f"{prefix}{name.value}.")

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        collect(root, "")
    return found


def _end_of(node: yaml.Node) -> int:
    """Return where a value ends; YAML itself counts the lines after a block as part of it."""
    if isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False):
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end_of(last[1] if isinstance(last, tuple) else last)


def _comment_of(lines: list[str], name: yaml.Node) -> str:
    """Return the line of a key from its end on."""
    return lines[name.end_mark.line][name.end_mark.column :]


def _plain(value: Any) -> str:
    """Return a value on one line, as params.yaml has it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()
